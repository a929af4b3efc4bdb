"""Published values of the paper (CVPR 2025, arXiv 2504.09606), and which of our rows they belong to.

The numbers stand in `paper/table*.csv` as printed; where the paper contradicts itself a corrected
value stands beside, and `slips` says why.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cache
from importlib import resources

from ebdiff.cost.accounting import AFTER_DENSE
from ebdiff.experiment.experiment import Experiment
from ebdiff.report.facts import RunFacts
from ebdiff.report.results import Results

Row = dict[str, str]

NAMES = {
    "cifar10": "CIFAR-10", "celeba": "CelebA", "lsun_church": "LSUN church", "lsun_bedroom": "LSUN bedroom",
}  # fmt: skip
IMAGES = 50_000  # samples per run in the paper

_DATASETS = {"table2": "celeba", "table5": "celeba"}  # Table 6 has a column; the others are CIFAR-10
_REGIONS = ((0, 260), (240, 460), (440, 1000))
_SERVED = ((0, 240), (240, 440), (440, 1000))
_RATES = (0.3, 0.6, 0.8)
_EACH = "200000"  # iterations of every expert of Tables 3 and 8
_BLOCKS = {
    "unpruned": "unpruned", "scratch": "baseline", "finetune": "baseline", "eb": "eb", "ta-eb": "ta-eb",
}  # fmt: skip


@cache
def rows(table: str) -> tuple[Row, ...]:
    """The rows of a published table, every value as text."""
    file = resources.files("ebdiff.report") / "paper" / f"{table}.csv"
    return tuple(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def cells(experiment: Experiment, table: str) -> tuple[Row, ...]:
    """The rows of a published table that are about the dataset an experiment stands for."""
    if table not in _DESCRIBED:
        return ()
    dataset = _DATASETS.get(table, "cifar10")
    return tuple(row for row in rows(table) if row.get("dataset", dataset) == experiment.published.dataset)


def published(table: str, facts: RunFacts) -> Row:
    """The published row that is the same cell as a run; empty if there is none.

    A row is the same where dataset, method, criterion, pruning rates, spans, timestep law and
    iterations agree. Our iterations are the paper's times `scale`; where the experiment maps them
    itself (`published.expert_iterations`), those of networks over all timesteps are compared only if
    the paper prints the row at several.
    """
    row = _find(table, facts)
    if row is None:
        return {}
    if table == "table4" and row["block"] == "ta-eb":
        (same,) = (r for r in rows("table8") if _same(r["average_rate"], 0.64))
        return {**row, "fid": same["fid"]}
    return row


def unmatched(experiment: Experiment) -> list[str]:
    """The cells of an experiment's tables that not exactly one run listed there matches, in words."""
    results, found = Results(experiment), []
    for table, names in experiment.tables.items():
        matches = {name: _find(table, RunFacts(results, name)) for name in names}
        for row in cells(experiment, table):
            same = [name for name, match in matches.items() if match is row]
            if len(same) != 1:
                cell = ", ".join(f"{key} {value}" for key, value in row.items() if key in _NAMING)
                found.append(f"{table}: {cell}: {' and '.join(same) or 'no run'}")
    return found


def unpruned_params(experiment: Experiment) -> float:
    """Millions of parameters of the paper's unpruned network for the dataset."""
    found = (row for table in ("table4", "table5", "table6") for row in cells(experiment, table))
    return next(float(row["params_m"]) for row in found if row["method"] == "unpruned")


def iterations(facts: RunFacts) -> tuple[int, ...] | None:
    """The paper's iterations that each expert's stand for; None if the experiment doesn't say."""
    experiment = facts.results.experiment
    stand_for = experiment.published.expert_iterations
    counts = []
    for expert in facts.experts:
        ours = expert.iterations
        if isinstance(ours, str) or (stand_for and ours not in stand_for):
            return None
        counts.append(stand_for[ours] if stand_for else round(ours / experiment.scale))
    return tuple(counts)


def shortened(experiment: Experiment) -> bool:
    """Whether our iterations stand for other ones of the paper."""
    return experiment.scale != 1 or bool(experiment.published.expert_iterations)


def _find(table: str, facts: RunFacts) -> Row | None:
    """The row, as printed, that is the same cell as a run."""
    if table not in _DESCRIBED or (facts.law != "uniform" and table != "table7"):
        return None
    wanted = _DESCRIBED[table](facts)
    if wanted is None:
        return None
    alike = [
        row
        for row in cells(facts.results.experiment, table)
        if all(_same(row[key], value) for key, value in wanted.items())
    ]
    found = [row for row in alike if _as_long(facts, _counts(row, facts), several=len(alike) > 1)]
    return found[0] if len(found) == 1 else None


def _same(printed: str, wanted: str | float) -> bool:
    return printed == wanted if isinstance(wanted, str) else float(printed) == round(wanted, 6)


def _counts(row: Row, facts: RunFacts) -> tuple[int, ...]:
    """The iterations that a row prints, or that the paper's text gives, lowest timesteps first."""
    if "iterations_rate30" in row:
        return tuple(int(row[f"iterations_rate{rate}"]) for rate in (30, 60, 80))
    return (int(row.get("iterations", _EACH)),) * len(facts.experts)


def _as_long(facts: RunFacts, counts: tuple[int, ...], *, several: bool) -> bool:
    """Whether a run's iterations stand for these; `several` if they alone tell rows apart."""
    experiment = facts.results.experiment
    if not experiment.published.expert_iterations:  # loading rounds in the same way
        scaled = [max(1, round(count * experiment.scale)) for count in counts]
        return [e.iterations for e in facts.experts] == scaled
    if facts.run.method != "ta-eb" and not several:
        return True
    ours = iterations(facts)
    return not several if ours is None else ours == counts


# --- how a run is described in the words of a table's csv ---------------------------------------------


def _timestep_aware(facts: RunFacts, spans: tuple = _REGIONS) -> bool:
    """Whether a run is the paper's TA-EB: magnitude tickets on its regions, scaled to our timesteps."""
    share = facts.results.experiment.diffusion.timesteps / 1000
    scaled = [(round(lo * share), round(hi * share)) for lo, hi in spans]
    regions = [e.span for e in facts.experts] == scaled
    return facts.run.method == "ta-eb" and facts.criterion == "magnitude" and regions


def _ticket(facts: RunFacts) -> dict | None:
    """Tables 1 and 2."""
    if facts.run.method != "eb":
        return None
    return {"nominal_rate": facts.rate, "criterion": facts.criterion}


def _overlap(facts: RunFacts) -> dict | None:
    """Table 3."""
    for overlap, spans in (("yes", _REGIONS), ("no", _SERVED)):
        if _timestep_aware(facts, spans) and facts.rates == _RATES:
            return {"overlap": overlap}
    return None


def _method(facts: RunFacts) -> dict | None:
    """Tables 4 and 5."""
    method = facts.run.method
    if method not in _BLOCKS:
        return None
    if method == "ta-eb":
        return {"block": "ta-eb"} if _timestep_aware(facts) and facts.rates == _RATES else None
    kind = method if method in ("unpruned", "scratch") else facts.criterion
    return {"block": _BLOCKS[method], "method": kind, "nominal_rate": facts.rate}


def _lsun(facts: RunFacts) -> dict | None:
    """Table 6: everything is pruned by magnitude, at 50 % or 30/60/80 %."""
    found, method = _method(facts), facts.run.method
    if found is None or facts.criterion not in ("none", "magnitude"):
        return None
    if method == "finetune" or found.get("nominal_rate", 0) not in (0, 0.5):
        return None
    return {"method": method}


def _speed(facts: RunFacts) -> dict | None:
    """Table 7."""
    if facts.law not in ("uniform", "speed"):
        return None
    method, rate = facts.run.method, f"{round(facts.rate, 6):g}"
    plus = "+speed" if facts.law == "speed" else ""
    if method == "unpruned":
        return {"block": "unpruned", "method": f"unpruned{plus}"}
    if _timestep_aware(facts):
        return {"block": f"average{rate}", "method": f"ta-eb{plus}"}
    if method == "eb" and facts.criterion == "magnitude":
        return {"block": f"rate{rate}", "method": f"eb{plus}"}
    if {e.init for e in facts.experts} != {"fresh"}:
        return None
    if method == "scratch" and not plus:
        return {"block": f"rate{rate}", "method": "scratch"}
    return {"block": f"rate{rate}", "method": "speed"} if plus and method not in AFTER_DENSE else None


def _rates(facts: RunFacts) -> dict | None:
    """Table 8."""
    if not _timestep_aware(facts):
        return None
    return dict(zip(("rate1", "rate2", "rate3"), facts.rates, strict=True))


def _lengths(facts: RunFacts) -> dict | None:
    """Table 9: its rows differ in iterations alone."""
    return {} if _timestep_aware(facts) and facts.rates == _RATES else None


_DESCRIBED: dict[str, Callable[[RunFacts], dict | None]] = {
    "table1": _ticket, "table2": _ticket, "table3": _overlap, "table4": _method, "table5": _method,
    "table6": _lsun, "table7": _speed, "table8": _rates, "table9": _lengths,
}  # fmt: skip
_NAMING = (
    "dataset", "block", "method", "criterion", "nominal_rate", "overlap", "rate1", "rate2", "rate3",
    "iterations", "iterations_rate80", "iterations_rate60", "iterations_rate30",
)  # fmt: skip
