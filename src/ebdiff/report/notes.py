"""What the quality numbers are, and everything else that stands below a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ebdiff.cost.roofline import in_vain
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.report import published, text
from ebdiff.report.facts import RunFacts
from ebdiff.report.results import Results

UNSETTLED, FEW = "†", "‡"  # marks: a ticket that was still moving; a distance of too few images


class Measure(NamedTuple):
    """How a protocol's Fréchet distance is called."""

    key: str  # in the csv
    name: str
    features: str  # what it lives in


MEASURES = {
    "classifier": Measure("cfd", "cFD", "the features of a small classifier"),
    "legacy_pytorch": Measure("fid", "FID", "Inception features (legacy_pytorch, as the paper's script)"),
    "clean": Measure("clean_fid", "clean FID", "Inception features (clean-fid's resizing)"),
}


@cache
def data(name: str) -> dict[str, Any]:
    """A YAML file of this room."""
    return yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8"))


def measure(experiment: Experiment) -> Measure:
    """The measure that tables and figures show."""
    return MEASURES[experiment.evaluation.protocols[0]]


def comparable(experiment: Experiment) -> bool:
    """Whether our numbers are of the same kind as the published ones: the paper's FID of its dataset."""
    same_data = experiment.dataset.name == experiment.published.dataset
    return same_data and experiment.evaluation.protocols[0] == "legacy_pytorch"


@cache
def template(name: str) -> Template:
    """One of this room's templates; in HTML, texts are escaped."""
    environment = Environment(
        loader=PackageLoader("ebdiff.report", "."), autoescape=".html" in name, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {"text": text, "measures": MEASURES, "in_vain": in_vain}
    return environment.get_template(name)


def marks(facts: RunFacts, rows: list[RunFacts]) -> str:
    """What points from a row to its notes: † unsettled ticket, ‡ too few images, [a] remark."""
    few = FEW if facts.ill_conditioned else ""
    return (UNSETTLED if facts.unsettled else "") + few + _letters(rows).get(facts.run.note or "", "")


def _letters(rows: list[RunFacts]) -> dict[str, str]:
    """Run notes in order of appearance and the letter each goes by: a, b, ... z, then a1, b1, ..."""
    remarks = dict.fromkeys(f.run.note for f in rows if f.run.note)
    return {note: f"[{chr(ord('a') + i % 26)}{i // 26 or ''}]" for i, note in enumerate(remarks)}


def of_table(results: Results, table: str, rows: list[RunFacts], columns: list[str], bold: bool) -> list[str]:
    """The notes of a table, in order of reading; `columns` are its keys, `bold`: whether some value is."""
    experiment, attempt = results.experiment, results.attempt
    found = template("notes.txt.j2").render(
        experiment=experiment,
        table=table,
        columns=columns,
        bold=bold,
        metrics=_metrics(rows),
        reconstruction=attempt(results.file, layout.RECONSTRUCTION) if experiment.codec.ENCODED else None,
        executed=executed(rows),
        linked=linked(results) if "seconds" in columns else "",
        chances={s["rate"]: s["chance"] for facts in rows for s in facts.tickets},
        few=any(facts.ill_conditioned for facts in rows),
        seeds=sorted({len(facts.seeds) for facts in rows}),
        common=rows[0].seeds if any(f.seeds != experiment.seeds_of(f.name) for f in rows) else (),
        letters=_letters(rows),
        unsettled=unsettled(rows),
        comparable=comparable(experiment),
        dense=attempt(results.network, "dense"),
        published=published,
        beside=any(published.row(experiment, table, facts.name) for facts in rows),
        slips=data("paper/slips.yaml").get(table, []),
    )
    return list(dict.fromkeys(filter(None, found.split("\n"))))


def executed(rows: list[RunFacts]) -> str:
    """In one line how networks were trained and sampled, by the ledgers; of which rows, where they differ."""
    told = []
    for use in ("training", "sampling"):
        known = [(f.run.title, ways) for f in rows if (ways := f.executed(use))]
        parts = []
        for way in dict.fromkeys(way for _, ways in known for way in ways):
            titles = [title for title, ways in known if way in ways]
            parts.append(way if len(titles) == len(known) else f"{way} ({', '.join(titles)})")
        told += [f"{use} {' and '.join(parts)}"] if parts else []
    return f"Executed: {'; '.join(told)}." if told else ""


def linked(results: Results) -> str:
    """In one line which trainings another experiment did, whose seconds came with them."""
    found: dict[str, dict[str, None]] = {}
    for job, folder in results.linked.values():
        if job.stage.verb in ("train-dense", "finetune-region"):
            found.setdefault(folder, {})[job.where.get("expert", job.where.get("search", ""))] = None
    told = "; ".join(f"{', '.join(networks)} from {folder}" for folder, networks in found.items())
    return f"Linked, with the seconds that they took where they were trained: {told}." if told else ""


def unsettled(rows: list[RunFacts]) -> list[str]:
    """One line for each ticket that was cut before it had settled."""
    lines = [
        f"{UNSETTLED} Not settled at its horizon: search {story['search']}, {story['criterion']}, "
        f"rate {text.percent(story['rate'])} %, seed {story['seed']}; last distances "
        f"{', '.join(map(text.three, story['last_distances']))}, threshold {story['threshold']:g}."
        for facts in rows
        for story in facts.unsettled
    ]
    return list(dict.fromkeys(lines))


def _metrics(rows: Iterable[RunFacts]) -> list[dict]:
    """The metrics of some runs that are there."""
    pairs = ((f, seed) for f in rows for seed in f.seeds)
    return [m for f, seed in pairs if (m := f.results.attempt(f.results.metrics, f.name, seed))]


def protocols(runs: Iterable[RunFacts]) -> list[dict]:
    """Every way in which some runs' quality was measured, and which: versions, weights and the like."""
    ways: dict[str, list[str]] = {}
    kept = ("protocol", "split", "images", "reference_images", "mode", "weights_sha256", "versions", "device")
    for metrics in _metrics(runs):
        for entry in metrics["protocols"].values():
            way = json.dumps({key: entry[key] for key in kept})
            ways.setdefault(way, []).append(f"{metrics['run']}, seed {metrics['seed']}")
    return [{**json.loads(way), "runs": runs} for way, runs in ways.items()]
