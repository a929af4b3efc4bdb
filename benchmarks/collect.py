"""Gathers what the scripts of this folder measured into committed tables and docs/benchmarks.md.

    python benchmarks/collect.py

Reads `benchmarks/out/*.json`, writes `results/reference/benchmarks/{device}/benchmarks.{csv,md}` and puts
the tables of all devices between the two markers of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks: begin (written by benchmarks/collect.py) -->", "<!-- benchmarks: end -->"
COLUMNS = ("measure", "against", "goal", "value", "low", "high", "unit", "reached", "note")


def reached(row: dict[str, Any]) -> str:
    """Whether a row's value meets its goal: yes, no, or nothing where there is no goal."""
    if not row["goal"]:
        return ""
    sign, bound = row["goal"].split()
    holds = {
        "≥": row["value"] >= float(bound),
        "≤": row["value"] <= float(bound),
        "<": row["value"] < float(bound),
    }
    return "yes" if holds[sign] else "no"


def text(row: dict[str, Any]) -> list[str]:
    """The cells of a row for people."""
    unit = {"x": "x", "": ""}.get(row["unit"], f" {row['unit']}")
    spread = "" if row["low"] is None else f" ({row['low']:.3g} to {row['high']:.3g})"
    value = f"{row['value']:.3g}{unit}{spread}"
    goal = f"{row['goal']}{unit}" if row["goal"] else "reported"
    return [row["measure"], row["against"], goal, value, row["reached"], row["note"]]


def markdown(rows: Sequence[dict[str, Any]], notes: bool) -> str:
    """The rows as a table, with or without the times behind them."""
    head = ["measure", "against", "goal", "median (quartiles)", "reached", "notes"]
    cells = [head, ["---"] * len(head), *(text(row) for row in rows)]
    return "".join(f"| {' | '.join(line if notes else line[:-1])} |\n" for line in cells)


def gather(out: Path, reference: Path) -> None:
    """Write the tables of every device that has been measured."""
    devices: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*.json")):
        found = json.loads(path.read_text())
        devices.setdefault(found["device"], []).append(found)
    for device, files in devices.items():
        rows = [{**row, "reached": reached(row)} for file in files for row in file["rows"]]
        folder = reference / re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "benchmarks.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        used = ", ".join(f"{name} {version}" for name, version in files[0]["versions"].items())
        threads = ", ".join(f"{file['benchmark']} {file['threads']}" for file in files)
        about = f"# Benchmarks: {device}\n\nMedians of paired ratios; {used}. Threads: {threads}.\n\n"
        (folder / "benchmarks.md").write_text(about + markdown(rows, notes=True))


def section(reference: Path) -> str:
    """The tables of all devices, as docs/benchmarks.md shows them: what has a goal."""
    parts = []
    for path in sorted(reference.glob("*/benchmarks.csv")):
        device = (path.with_suffix(".md")).read_text().splitlines()[0].removeprefix("# Benchmarks: ")
        with path.open(newline="") as file:
            rows = [
                {**row, **{key: float(row[key]) if row[key] else None for key in ("value", "low", "high")}}
                for row in csv.DictReader(file)
            ]
        table = markdown([row for row in rows if row["goal"]], notes=False)
        rows_of_all = f"../{path.parent.relative_to(ROOT)}/benchmarks.md"
        parts.append(f"**{device}** ([all rows and times]({rows_of_all}))\n\n{table}")
    return "\n".join(parts) or "Nothing is measured yet.\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/out")
    args = parser.parse_args(argv)
    reference, page = ROOT / "results/reference/benchmarks", ROOT / "docs/benchmarks.md"
    gather(args.out, reference)
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{section(reference)}\n{END}{after}")


if __name__ == "__main__":
    main()
