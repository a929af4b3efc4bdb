"""How much of an experiment's job time is start-up, imports and file handling?

Overhead = sum(job wall - seconds inside training, sampling, metrics, timing) / sum(job wall), from
Snakemake's benchmark files and the ledgers. Run after an experiment, where its results are; the minutes
are those of the whole run, as its command took them:

    python benchmarks/overhead.py digits [MINUTES]
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import paired

from ebdiff.experiment import layout, load
from ebdiff.system.devices import pick_device


def wall_seconds(folder: Path) -> dict[str, float]:
    """Wall seconds of every job below a folder of benchmark files."""
    found = {}
    for path in sorted(folder.glob("**/*.tsv")):
        with path.open() as file:
            found[str(path.relative_to(folder))] = sum(
                float(row["s"]) for row in csv.DictReader(file, delimiter="\t")
            )
    return found


def inside_seconds(results: Path, data: Path) -> float:
    """Seconds that the ledgers say were spent on the work itself."""
    trainings = [*results.glob("seed*/dense/*/ledger.json"), *results.glob("seed*/experts/*/*.json")]
    whole = [results / "cost.json", *data.glob("classifier.json"), *results.glob("seed*/runs/*/*.json")]
    whole += results.glob("seed*/tickets/*/*/*/masks.ledger.json")
    # A milestone's ledger counts the ones before it too; its own job is the last process.
    own = sum(json.loads(p.read_text())["processes"][-1]["seconds"] for p in trainings)
    return own + sum(json.loads(p.read_text())["seconds"] for p in whole)


def main(name: str, minutes: str | None = None) -> None:
    """Print the jobs that took longest, and the overhead; write it with the other figures."""
    results = layout.path(layout.EXPERIMENT, experiment=name)
    data = layout.path(layout.DATA, dataset=load.load(name).dataset.name)
    jobs = wall_seconds(results / "benchmarks") | wall_seconds(data / "benchmarks")
    wall, inside = sum(jobs.values()), inside_seconds(results, data)
    for job, seconds in sorted(jobs.items(), key=lambda item: -item[1])[:12]:
        print(f"{seconds:8.1f} s  {job}")
    print(f"{len(jobs)} jobs, {wall:.0f} s of wall time in all, {inside:.0f} s inside the work")
    share, each = 100 * (wall - inside) / wall, (wall - inside) / len(jobs)
    note = f"{len(jobs)} jobs, {wall:.0f} s in all, {each:.2f} s of overhead per job"
    goals = {"goal": "≤ 13", "against": "all job time"} if name == "digits" else {}
    rows = [paired.row(f"overhead of the run `{name}`", [share], "%", note=note, **goals)]
    if minutes is not None:
        goal = "≤ 4.5" if name == "digits" else ""
        rows.append(paired.row(f"whole run `{name}`", [float(minutes)], "min", goal=goal))
    paired.write("overhead", rows, pick_device("auto"), paired.OUT)


if __name__ == "__main__":
    main(*sys.argv[1:])
