"""Two experiments, or two dates of one: what differs, runs of one name, tables, curves and samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.report import figures, notes, significance, tables, text
from ebdiff.report.facts import RunFacts, paired
from ebdiff.report.page import embedded
from ebdiff.report.render import Column, Table
from ebdiff.report.results import Earlier, Results, dated
from ebdiff.report.significance import SEEDS
from ebdiff.system.errors import UserError
from ebdiff.system.files import write_text

FIGURES = {
    "figure1": "Quality against relative training time, as the paper counts it",
    "losses": "Training losses, first seed",
    "figure5": "Samples, first seed",
}
MEASURED = ("protocol", "split", "images", "reference_images", "mode", "weights_sha256")
NAMES = {"name", "about", "runs", "tables", "claims", "published", "tuning"}  # no settings of a training

Pair = tuple[RunFacts, RunFacts]


def compare(a: Experiment, b: Experiment | Path) -> Path:
    """Write a page about what two experiments have so far; give its path.

    Args:
        a: an experiment.
        b: another one; or a folder with results of the same one, of an earlier date.

    Raises:
        UserError: they are the same one, or the folder holds no results, or another experiment's.
    """
    now, earlier = layout.path(layout.EXPERIMENT, experiment=a.name), isinstance(b, Path)
    if earlier and not b.is_dir():
        raise UserError(f"compare: {b}: no such folder; give a copy of {now}")
    if b.resolve() == now.resolve() if earlier else b.name == a.name:
        raise UserError(f"compare: {a.name} with itself; name two experiments, or a copy of {now}")
    both = Results(a, partial=True), Earlier(a, b) if earlier else Results(b, partial=True)
    if earlier and (others := both[1].whose - {a.name}):
        raise UserError(f"compare: {b} holds results of {', '.join(sorted(others))}; give a copy of {now}")
    folder = layout.path(layout.COMPARED, experiment=a.name, other=b.resolve().name if earlier else b.name)
    names, shared = titles(*both), common(*both)
    if earlier and not any((shared.values, *_side(both[1], folder))):
        raise UserError(f"compare: {b} holds no results of {a.name}; give a copy of {now}")
    sides = [(name, *_side(results, folder)) for name, results in zip(names, both, strict=True)]
    told = notes.template("compare.html.j2").render(
        names=names,
        common=shared,
        differing=[] if earlier else list(differing(a, b)),
        captions=FIGURES,
        sides=sides,
        embedded=embedded,
        left_out=[line for results in both for line in results.left_out],
    )
    write_text(folder / "compare.html", told)
    return folder / "compare.html"


def titles(a: Results, b: Results) -> tuple[str, str]:
    """What tells two sides apart: the experiments' names, or of one at two dates these."""
    if not isinstance(b, Earlier):
        return a.experiment.name, b.experiment.name
    now = layout.path(layout.EXPERIMENT, experiment=a.experiment.name)
    return dated(a.experiment.name, now), dated(str(b.folder), b.folder)


def _side(results: Results, folder: Path) -> tuple[dict[str, bytes], list[Table]]:
    """The figures and tables of a side: drawn into a folder, or as they were at an earlier date."""
    if isinstance(results, Earlier):
        return results.pictures(FIGURES), results.tables()
    experiment = results.experiment
    figures.write(results, FIGURES, folder / experiment.name)
    pictures = {figure: (folder / experiment.name / f"{figure}.png").read_bytes() for figure in FIGURES}
    return pictures, [tables.build(results, table) for table in experiment.tables]


def common(a: Results, b: Results) -> Table:
    """The runs that two sides have under one name, b's distance minus a's paired by seed.

    Distances that were measured in different ways stand there without a difference.
    """
    shared = [name for name in a.experiment.runs if name in b.experiment.runs]
    rows: list[Pair] = [(RunFacts(a, name), RunFacts(b, name)) for name in shared]
    if isinstance(b, Earlier):
        rows = [row for row in rows if row[1].quality]
    unlike = [f.run.title for f, g in rows if ways(f) and ways(g) and ways(f) != ways(g)]
    columns = tuple(_columns(a, b))
    values = [[a.attempt(column.value, row) for column in columns] for row in rows]
    names = titles(a, b)
    told = [
        f"Differences: {names[1]} less {names[0]}, paired by seed, which "
        f"draws the same noise; from {SEEDS} common seeds on with a 95 % interval and p of Student's t, "
        "two-sided and not adjusted: exploratory.",
        "Seconds are what the ledgers say was spent on all devices, searches included.",
    ]
    if unlike:
        told.append(f"Measured in different ways, so not compared: {', '.join(unlike)}.")
    if isinstance(b, Earlier):
        told.append(
            f"Of {names[1]} only what its files say by themselves is here and, as written then, below."
        )
        changed = ", ".join(f.run.title for f, _ in rows if f.name in b.changed)
        told += [f"Made for other settings than those of now: {changed}."] if changed else []
    told += notes.unsettled([facts for row in rows for facts in row])
    marks = [notes.UNSETTLED if any(facts.unsettled for facts in row) else "" for row in rows]
    return Table("Runs of one name", columns, values, marks, told)


def ways(facts: RunFacts) -> set[str]:
    """How a run's first distance was measured, over its seeds."""
    results = facts.results
    found = (results.attempt(results.metrics, facts.name, seed) for seed in facts.seeds)
    entries = ((m["protocols"][m["protocol"]], m.get("codec")) for m in found if m)
    return {json.dumps([*(entry[key] for key in MEASURED), codec]) for entry, codec in entries}


def _columns(a: Results, b: Results) -> Iterator[Column]:
    yield Column("run", "Run", lambda pair: pair[0].run.title, left=True, marked=True)
    names = [title.replace(", ", "\n") for title in titles(a, b)]  # a date in a line of its own
    for i, results in enumerate((a, b)):
        measure, shown = notes.measure(results.experiment), text.over_seeds(text.two)
        yield Column(f"{measure.key}_{i}", f"{measure.name}\n{names[i]}", lambda p, i=i: p[i].quality, shown)
    yield Column("minus", f"{names[1]}\nminus {names[0]}", _minus, tables.difference, absent="")
    yield Column("p", "p", _p, text.p_value, absent="")
    for key, heading, value, show in (
        ("kid", "KID", lambda f: f.metric("kid"), text.number),
        ("speedup", "Speed-up", lambda f: tuple(s.as_paper for s in f.speedups()), text.two),
        ("seconds", "Seconds", lambda f: f.seconds, text.whole),
    ):
        for i, name in enumerate(names):
            if i == 0 or key == "kid" or not isinstance(b, Earlier):
                yield Column(
                    f"{key}_{i}",
                    f"{heading}\n{name}",
                    lambda pair, i=i, value=value: value(pair[i]),
                    text.over_seeds(show),
                )


def _minus(pair: Pair) -> tuple[float, ...] | None:
    """The differences of a run's distances, for each common seed; None where they can't be compared."""
    a, b = pair
    found = paired(a, b, lambda facts: facts.quality) if ways(a) == ways(b) else []
    return tuple(y - x for x, y in found) or None


def _p(pair: Pair) -> float | None:
    differences = _minus(pair) or ()
    return significance.above(differences).p if len(differences) >= SEEDS else None


def differing(a: Experiment, b: Experiment) -> Iterator[tuple[str, str, str]]:
    """The keys that two experiments set differently, but for names, runs and tables."""
    x, y = (dict(_flat(e.model_dump(mode="json", exclude=NAMES))) for e in (a, b))
    for key in dict.fromkeys((*x, *y)):
        if x.get(key) != y.get(key):
            yield key, *(json.dumps(side[key]) if key in side else text.MISSING for side in (x, y))


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield key, value
        return
    for name, part in value.items():
        yield from _flat(part, f"{key}.{name}".lstrip("."))
