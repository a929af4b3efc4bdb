"""Fair timing: both sides take turns in one process, and what counts is the median of paired ratios.

Every script of this folder answers one question: it checks that both sides give the same result, times
them, prints a table and writes `benchmarks/out/{script}.json`; `collect.py` gathers those.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from ebdiff.cost.tune import candidates
from ebdiff.experiment import load
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.members import UNetConfig
from ebdiff.experiment.schema import Execution
from ebdiff.nets.execution import GPU, STRICT
from ebdiff.system.devices import device_name, pick_device
from ebdiff.system.ledger import versions

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks/out"
TINY = UNetConfig(width=16, multipliers=(1, 1), blocks=1, attention=(4,), norm_groups=4, dropout=0)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        measure: what is measured.
        against: what it is compared with; empty for a plain figure.
        goal: what was hoped for, such as `≥ 1.8`; empty where it is only reported.
        value: the median.
        low, high: its quartiles over the rounds; None of a single measurement.
        unit: of the value: `x` for a ratio of times, `ms`, `%`, or nothing for a share.
        note: the times behind it, and what else is to be known.
    """

    measure: str
    against: str
    goal: str
    value: float
    low: float | None
    high: float | None
    unit: str = "x"
    note: str = ""


def arguments(description: str | None, argv: Sequence[str] | None, rounds: int) -> argparse.Namespace:
    """What every script takes: device, rounds, where to write, and `--tiny` for a check that it runs."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON file")
    parser.add_argument("--tiny", action="store_true", help="small sizes: checks the script, times nothing")
    found = parser.parse_args(argv)
    found.device = pick_device(found.device)
    found.rounds = 1 if found.tiny else found.rounds
    return found


def experiment(batch: int, tiny: bool) -> Experiment:
    """The paper's CIFAR-10 experiment at a batch size; tiny: two images, few steps, a very small network."""
    found = load.load("cifar10", ROOT / "config/experiments")
    training = found.training.model_copy(update={"batch": 2 if tiny else batch})
    found = found.model_copy(update={"training": training})
    if not tiny:
        return found
    sampling = found.sampling.model_copy(update={"steps": 8})
    dataset = found.dataset.model_copy(update={"image_size": 8})
    return found.model_copy(update={"dataset": dataset, "network": TINY, "sampling": sampling})


def executions(device: torch.device) -> list[Execution]:
    """What is tried, the default first: all of `tune`'s on a CPU; on a GPU there is one."""
    if device.type == "cuda":
        return [GPU]
    return [STRICT, *(how for how in candidates() if how != STRICT)]


def named(rate: float) -> str:
    """A network by its rate: `dense`, `50 %`."""
    return f"{100 * rate:.0f} %" if rate else "dense"


def milliseconds(seconds: Sequence[float]) -> str:
    """The median of some times, in words."""
    return f"{median(seconds) * 1e3:.4g} ms"


def row(
    measure: str, values: Sequence[float], unit: str, *, against: str = "", goal: str = "", note: str = ""
) -> Row:
    """A row from the values of all rounds."""
    low, middle, high = (float(f"{q:.4g}") for q in np.percentile(values, [25, 50, 75]))
    spread = (low, high) if len(values) > 1 else (None, None)
    return Row(measure, against, goal, middle, *spread, unit, note)


def difference(measure: str, longer: Sequence[float], shorter: Sequence[float], per: int, goal: str) -> Row:
    """How many milliseconds longer one of `per` equal parts takes, round by round.

    A difference that its own scatter hides is no figure: told is then what it is at most.
    """
    apart = [(a - b) / per * 1e3 for a, b in zip(longer, shorter, strict=True)]
    found = row(measure, apart, "ms", goal=goal)
    if found.low is None or found.value > found.high - found.low:
        return found
    most = float(f"{max(apart):.4g}")
    return replace(
        found, value=most, low=None, high=None, note="hidden by the scatter of its rounds: at most"
    )


def compare(
    measure: str, against: str, goal: str, plain: Sequence[float], ours: Sequence[float], note: str = ""
) -> Row:
    """How many times as long the plain side takes, round by round."""
    ratios = [p / o for p, o in zip(plain, ours, strict=True)]
    times = f"{milliseconds(plain)} against {milliseconds(ours)}"
    return row(measure, ratios, "x", against=against, goal=goal, note=f"{times}; {note}".strip("; "))


def write(name: str, rows: Sequence[Row], device: torch.device, out: Path) -> None:
    """Print the rows and write them with the hardware and versions they belong to."""
    for r in rows:
        spread = "" if r.low is None else f" ({r.low:g} to {r.high:g})"
        print(f"{r.measure}: {r.value:g} {r.unit}{spread}, goal {r.goal or '-'}; {r.note}")
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": name,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "rows": [asdict(r) for r in rows],
    }
    (out / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
