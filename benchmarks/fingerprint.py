"""Does the present code still give the same bits as another commit?

`take` runs the pipeline of a checkout or git revision in a scratch folder and writes what came out, as
hashes of decoded arrays and plain values, to JSON; `compare` sets two such files side by side:

    python benchmarks/fingerprint.py take main --out base.json
    python benchmarks/fingerprint.py take . --out present.json
    python benchmarks/fingerprint.py compare base.json present.json

Compared are tensors and arrays by name, metrics, ticket stories and what ledgers say of the work done; not
files as such, and nothing of settings, times or machines. Only files of one machine can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parents[1]
PARTS = ("Snakefile", "rules", "profiles", "config", "envs", "src", "pyproject.toml")
EXPERIMENTS = {"smoke": ["smoke"], "digits": ["digits"], "tiny": ["tiny", "tiny_ddpm", "tiny_pair"]}
UNTIL = "fid hamming_matrix measure_cost"  # no tables, no figures
# Keys with one of these words may change.
BOOKKEEPING = re.compile(
    "(?<![a-z])(checksum|date|device|digest|execution|hash|host|key|machine|mb|memory|ms|path|processes|record|"
    "second|settings|sha256|started|thread|time|timestamp|torch|version|world)s?(?![a-z])"
)
# Of JSON other than metrics and stories, only keys with one of these are compared.
LEDGERS = re.compile(
    "(?<![a-z])(accuracy|classes|count|evaluations|horizon|images|intervals|loss|macs|masks|params|realised|"
    "settled|shape|skipped|steps?|stopped)(?![a-z])"
)

# What smoke and digits lack: dropout, flips, attention in levels, micro-batches, gradient criteria, SpeeD's
# law, searches on spans, other intervals, raw weights, snapshots, a milestone after another, DDPM's sampler,
# two processes, precision and recall.
COMMON = """
dataset: {name: tiny-digits, source: bundled-digits, flip: true, subset: 160}
network: {image_size: 8, channels: 1, width: 16, multipliers: [1, 2], blocks: 1, attention: [4], dropout: 0.1,
  norm_groups: 4}
training: {batch: 16, learning_rate: 2.0e-3, warmup: 5, ema_decay: 0.9, log_every: 5, save_minutes: 60}
pruning: {images: 10, stride: 150}
evaluation: {reference: 300, precision_recall: true}
compute: {micro_batch: 6}
sampling: {steps: 10, clamp: true, images: 40, batch: 16}
"""
TINY = {
    "tiny": """
searches:
  full: {criteria: [magnitude, diff-pruning], weights: [raw, ema], rates: [0.3, 0.5], window: 2, horizon: 4}
  early: {span: [0, 400], interval: {unit: iteration, steps: 4}, weights: [raw], rates: [0.3], window: 3,
    threshold: 0.2, horizon: 8, watch: 1}
  late: {span: [300, 1000], interval: {unit: pseudo-epoch, steps: 6}, criteria: [taylor], rates: [0.5],
    window: 2, horizon: 3}
dense: {iterations: 60}
runs:
  unpruned: {title: A, method: unpruned, init: dense}
  speed: {title: B, method: eb, law: speed, rate: 0.5, iterations: 10}
  longer: {title: C, method: eb, law: speed, rate: 0.5, iterations: 20}
  experts: {title: D, method: ta-eb, iterations: 15, experts: [
    {search: early, weights: raw, rate: 0.3, law: speed, span: [0, 400], serve: [0, 350]},
    {search: late, criterion: taylor, rate: 0.5, span: [300, 1000], serve: [350, 700]},
    {criterion: diff-pruning, weights: raw, rate: 0.3, span: [600, 1000], serve: [700, 1000]}]}
  mixed: {title: E, method: control, iterations: 12, experts: [
    {init: fresh, rate: 0.5, span: [0, 300]},
    {init: snapshot, criterion: diff-pruning, rate: 0.5, span: [250, 600], serve: [300, 600]},
    {search: final, criterion: diff-pruning, rate: 0.3, span: [600, 800]},
    {criterion: random, rate: 0.5, span: [800, 900]},
    {search: final, criterion: random, rate: 0.3, span: [900, 1000]}]}
""",
    "tiny_ddpm": """
seeds: [3]
network: {attention: [8, 4], middle_attention: false, dropout: 0.0}
training: {clip: null, ema_warmup: true}
compute: {micro_batch: null}
diffusion: {timesteps: 50, beta_end: 0.1}
sampling: {sampler: ddpm, clamp: false, batch: 40}
searches: {full: {weights: [raw], rates: [0.3, 0.5], window: 2, horizon: 3}}
dense: {iterations: 40}
runs:
  unpruned: {title: A, method: unpruned, init: dense}
  experts: {title: B, method: ta-eb, weights: raw, iterations: 15, experts: [
    {rate: 0.5, span: [0, 30], serve: [0, 25]}, {rate: 0.3, span: [20, 50], serve: [25, 50]}]}
""",
    "tiny_pair": """
speed: {dual: false}
sampling: {spacing: uniform, images: 23}
searches: {full: {rates: [0.5], window: 2, horizon: 2}}
dense: {iterations: 30}
runs: {fresh: {title: A, method: scratch, init: fresh, law: speed, rate: 0.5, iterations: 15}}
""",
}
TOGETHER = "torch.distributed.run --standalone --nproc-per-node=2 --no-python -- ebdiff "
PAIR = (  # of tiny_pair, verbs run as two processes
    "train-dense tiny_pair",
    "finetune-region tiny_pair --expert fresh-0.5-t0-1000-speed --milestone 15",
    "sample tiny_pair --run fresh",
)


# --- running a checkout -------------------------------------------------------------------------------------


def copy(source: str, folder: Path) -> None:
    """Copy what a checkout's pipeline needs: of a folder as it lies there, or of a git revision."""
    if Path(source).is_dir():
        for path in (Path(source) / part for part in PARTS):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, folder)
    else:
        git = ["git", "-C", str(ROOT), "archive", source, "--", *PARTS]
        done = subprocess.run(git, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", str(folder)], input=done.stdout, check=True)
    shutil.rmtree(folder / "config/tuning", ignore_errors=True)  # measured: not the same in two checkouts


def write_tiny(folder: Path) -> None:
    """Write the tiny experiments, with an image's size and channels in the section where digits has them."""
    experiments = folder / "config/experiments"
    shipped = yaml.safe_load((experiments / "digits.yaml").read_text())
    place = next(section for section in ("dataset", "network") if "image_size" in shipped[section])
    for name, text in TINY.items():
        raw = yaml.safe_load(COMMON)
        for section, keys in yaml.safe_load(text).items():
            raw[section] = raw.get(section, {}) | keys if isinstance(keys, dict) else keys
        for key in ("image_size", "channels"):
            raw[place][key] = raw["network"].pop(key)
        (experiments / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, **raw}))


def environment(folder: Path) -> dict[str, str]:
    """The environment in which `ebdiff` and `import ebdiff` mean the copy in a folder, on the CPU."""
    entry = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["scripts"]["ebdiff"]
    module, function = entry.split(":")
    script = folder / "bin/ebdiff"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nfrom {module} import {function}\n{function}()\n")
    script.chmod(0o755)
    search = [str(script.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    changes = {"PATH": os.pathsep.join(search), "PYTHONPATH": str(folder / "src")}
    found = os.environ | changes | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    where = [sys.executable, "-c", "import ebdiff; print(ebdiff.__file__)"]
    used = subprocess.run(where, cwd=folder, env=found, check=True, capture_output=True, text=True).stdout
    if not Path(used.strip()).is_relative_to(folder):
        raise SystemExit(f"another ebdiff would run: {used}")
    return found


def run(source: str, config: str, folder: Path, cores: int) -> None:
    """Run a configuration's experiments, as a checkout has them, in an empty folder."""
    copy(source, folder)
    names = ",".join(name for name in EXPERIMENTS[config] if name != "tiny_pair")
    commands = [f"snakemake --cores {cores} --config experiments={names} --until {UNTIL}"]
    if config == "tiny":
        write_tiny(folder)
        commands += [TOGETHER + verb for verb in PAIR]
    env = environment(folder)
    for command in commands:
        whole = [sys.executable, "-m", *command.split()]
        done = subprocess.run(whole, cwd=folder, env=env, text=True, capture_output=True)
        if done.returncode:
            told = done.stdout + done.stderr
            logs = re.findall("^Logfile .*?\n=+\n.*?\n=+\n", told, re.MULTILINE | re.DOTALL)
            raise SystemExit("".join([f"{source}, {config}: {command}\n", *(logs or told[-5000:])]))


# --- what came out ------------------------------------------------------------------------------------------


def arrays(path: Path) -> Iterator[tuple[str, str]]:
    """Names of a file's arrays, each with a hash of its type, shape and bytes."""
    if path.suffix == ".safetensors":
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, tensor in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, last = tensor["data_offsets"]
                yield name, hashed(tensor["dtype"], tensor["shape"], data[start + first : start + last])
    elif path.suffix in (".npz", ".npy"):
        found = np.load(path)
        for name, array in ({"": found} if path.suffix == ".npy" else found).items():
            if not BOOKKEEPING.search(name):
                yield name, hashed(array.dtype.str, list(array.shape), array.tobytes())


def hashed(dtype: str, shape: list[int], data: bytes) -> str:
    return hashlib.sha256(f"{dtype} {shape} ".encode() + data).hexdigest()[:16]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested JSON by dotted name, without bookkeeping."""
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            if not BOOKKEEPING.search(str(key)):
                yield from leaves(child, f"{name}.{key}".lstrip("."))
    else:
        yield name, value


def values(path: Path) -> tuple[str, dict[str, Any]]:
    """What kind of values a JSON file holds, and the compared ones by name."""
    if path.suffix not in (".json", ".jsonl"):
        return "values", {}
    text = path.read_text()
    raw = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    if path.parts[-5] == "tickets" and "ledger" not in path.name:  # a ticket's story
        return "values", dict(leaves(raw))
    found = {k: v for k, v in leaves(raw) if k == "stopped" or not isinstance(v, str)}
    if path.name == "metrics.json":
        return "values", found
    return "ledgers", {k: v for k, v in found.items() if LEDGERS.search(k)}


def fingerprints(folder: Path, config: str) -> dict[str, dict[str, Any]]:
    """Everything that is compared: arrays, values of metrics and stories, and ledgers' values, by name."""
    found: dict[str, dict[str, Any]] = {"arrays": {}, "values": {}, "ledgers": {}}
    roots = [folder / "resources/data", *(folder / "results" / name for name in EXPERIMENTS[config])]
    for path in sorted(p for root in roots for p in root.rglob("*") if p.is_file()):
        kind, plain = values(path)
        for group, things in (("arrays", dict(arrays(path))), (kind, plain)):
            found[group] |= {f"{path.relative_to(folder)}:{name}": thing for name, thing in things.items()}
    return found


# --- the two verbs ------------------------------------------------------------------------------------------


def take(source: str, configs: list[str], out: Path, keep: Path | None, cores: int) -> None:
    """Write the fingerprints of some configurations into a file, which may hold others already."""
    for config in configs:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) if keep is None else keep.resolve() / config
            folder.mkdir(parents=True, exist_ok=keep is None)
            run(source, config, folder, cores)
            found = fingerprints(folder, config)
        known = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps(known | {config: found}, indent=1))
        print(f"{config}: {', '.join(f'{len(v)} {k}' for k, v in found.items())}", flush=True)


def prefixed(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, set[Any]]:
    """What new names hold, by each name that they end in: an array may have gained a prefix."""
    ends: dict[str, set[Any]] = defaultdict(set)
    for name in found.keys() - expected.keys():
        file, key = name.split(":", 1)
        while "." in key:
            key = key.split(".", 1)[1]
            ends[f"{file}:{key}"].add(found[name])
    return ends


def compare(config: str, base: dict[str, dict[str, Any]], present: dict[str, dict[str, Any]]) -> bool:
    """Print what differs or is missing, file by file, and a line for the whole; whether all is equal."""
    count: Counter[str] = Counter()
    told: dict[str, list[str]] = defaultdict(list)
    for kind, expected in base.items():
        found = present[kind]
        ends = prefixed(found, expected)
        count["extra"] += len(found.keys() - expected.keys())
        for name, value in expected.items():
            file, key = name.split(":", 1)
            if name in found:
                equal = found[name] == value or (value != value and found[name] != found[name])  # NaN
                state = kind if equal else "different"
                if not equal and kind != "arrays":
                    key += f" {value} -> {found[name]}"
            elif value in ends.get(name, ()):
                state = "under a longer name"
            else:
                state = "of ledgers gone" if kind == "ledgers" else "missing"
            count[state] += 1
            if state in ("different", "missing"):
                told[f"{config}: {state}: {file}"].append(key)
    for where, keys in told.items():
        print(f"{where}: {len(keys)}: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}")
    plain = count.pop("values", 0) + count.pop("ledgers", 0)
    print(f"{config}: {count.pop('arrays', 0)} arrays and {plain} values equal", end="")
    print(*(f", {n} {state}" for state, n in count.items() if n), sep="")
    return not told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    taking = verbs.add_parser("take", help="run a checkout and write its fingerprints")
    taking.add_argument("source", help="a folder with src/, config/ and Snakefile, or a git revision")
    taking.add_argument("--out", type=Path, required=True, help="JSON; configurations in it are kept")
    taking.add_argument("--keep", type=Path, help="keep the scratch folders here, one per configuration")
    taking.add_argument("--cores", type=int, default=2)
    comparing = verbs.add_parser("compare", help="print what differs; status 1 if anything does")
    comparing.add_argument("base", type=Path)
    comparing.add_argument("present", type=Path)
    for verb in (taking, comparing):
        verb.add_argument("--config", action="append", choices=EXPERIMENTS, help="default: every one")
    a = parser.parse_args()
    if a.verb == "take":
        return take(a.source, a.config or list(EXPERIMENTS), a.out, a.keep, a.cores)
    base, present = json.loads(a.base.read_text()), json.loads(a.present.read_text())
    equal = [compare(config, base[config], present[config]) for config in a.config or base]
    raise SystemExit(not all(equal))


if __name__ == "__main__":
    main()
