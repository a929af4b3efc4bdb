"""The report: one self-contained HTML page, no network needed to read it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ebdiff import __version__
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.report import details, figures, protocol, reading, style, tables, text
from ebdiff.report.needs import FIGURES, milestone
from ebdiff.report.results import Results
from ebdiff.system.files import write_text

_SECTIONS = {
    "Quality against cost": ("figure1", "figure1b"),
    "Samples": ("figure5",),
    "Heat maps: when masks settle": ("figure2", "figure4"),
    "Controls: are the tickets learned?": ("figure2b",),
    "Spans and timelines": ("figure3",),
}


@dataclass(frozen=True)
class Picture:
    """A figure on the page.

    Attributes:
        uri: the PNG as a data URI.
        width: CSS pixels at which all figures' text has the same size.
        caption: one or two sentences.
    """

    uri: Markup
    width: int
    caption: str

    @classmethod
    def of(cls, png: bytes, caption: str) -> Picture:
        """A PNG (its width stands at byte 16) and its caption."""
        uri = Markup("data:image/png;base64,") + base64.b64encode(png).decode()
        return cls(uri, int.from_bytes(png[16:20]) * 98 // style.DPI, caption)


def write_report(experiment: Experiment, path: Path, *, partial: bool = False) -> None:
    """Write the report of an experiment as one HTML file, atomically.

    A whole report reads the PNGs of `results/{experiment}/figures/`; a partial one first draws
    what is there into `results/{experiment}/so-far/figures/`.

    Args:
        experiment: the experiment.
        path: the HTML file.
        partial: show what is there and say what isn't.

    Raises:
        UserError: a file is damaged, or missing while `partial` is false.
    """
    results = Results(experiment, partial=partial)
    if partial:
        for figure in FIGURES:
            figures.save(results, figure, _figures(results))
    sections = {title: [_picture(results, name) for name in names] for title, names in _SECTIONS.items()}
    environment = Environment(
        loader=PackageLoader("ebdiff.report", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    # Notes that a mark in the table points to stay in sight; the others fold away.
    environment.tests["pointed"] = lambda note: note.startswith(
        ("†", protocol.MARK, "[", "So far", "Left out")
    )
    html = environment.get_template("page.html.j2").render(
        experiment=experiment,
        partial=partial,
        measure=protocol.shown(experiment),
        comparable=protocol.comparable(experiment),
        facts=_headline(results),
        claims=reading.read(results),
        tables=[(name, tables.build(results, name)) for name in experiment.tables],
        sections=sections,
        losses=_losses(results),
        details=details.tables(results),
        left_out=results.left_out,
    )
    write_text(path, html)


def _figures(results: Results) -> Path:
    """Where the figures of this report lie."""
    if results.partial:
        return results.path(layout.SO_FAR) / "figures"
    return results.path(layout.FIGURE, figure="any", ext="png").parent


def _picture(results: Results, figure: str) -> Picture:
    path = _figures(results) / f"{figure}.png"
    return Picture.of(results.png(path), figures.CAPTIONS[figure])


def _losses(results: Results) -> Picture | None:
    with style.theme():
        drawn = figures.losses(results)
        if drawn is None:
            return None
        return Picture.of(style.png(drawn), "Training loss of one run of each method, first seed.")


# --- headline ---------------------------------------------------------------------------------------


def _headline(results: Results) -> list[tuple[str, str]]:
    """What ran, on what: (label, value) in order; values not known yet are left out."""
    experiment = results.experiment
    manifest, cost = results.attempt(results.manifest), results.attempt(results.cost)
    lines = [("Runs", f"{len(experiment.runs)}; seeds: {_seeds(experiment)}")]
    if manifest:
        shape = " × ".join(map(str, manifest["shape"]))
        lines.append(("Data", f"{manifest['title']}: {manifest['count']} images, {shape}"))
        lines.append(("Licence", f"{manifest['licence']}; from {manifest['origin']}"))
    trained = f"unpruned run of {experiment.dense.iterations} steps, batch {experiment.training.batch}"
    lines.append(("Network", f"{experiment.network.title}, {trained}"))
    sampling = experiment.sampling
    sampler = f"{sampling.sampler.upper()}, {sampling.steps} steps, {sampling.images} images per run"
    lines.append(("Samples", sampler))
    if cost:
        lines.append(("Hardware", f"{cost['device']}, {text.plural(cost['threads'], 'thread')} per training"))
    lines.append(("Versions", _versions(results)))
    dates = sorted(p["started"][:10] for ledger in _ledgers(results) for p in ledger["processes"])
    if dates:
        lines.append(
            ("Trained", text.span(dates).replace("-20", " to 20") if dates[0] != dates[-1] else dates[0])
        )
    return lines


def _seeds(experiment: Experiment) -> str:
    """The seeds, and how many runs have which where they differ."""
    groups: dict[tuple[int, ...], int] = {}
    for name in experiment.runs:
        seeds = experiment.seeds_of(name)
        groups[seeds] = groups.get(seeds, 0) + 1
    listed = {", ".join(map(str, seeds)): count for seeds, count in groups.items()}
    if len(listed) == 1:
        return next(iter(listed))
    return "; ".join(f"{seeds} ({text.plural(count, 'run')})" for seeds, count in listed.items())


def _versions(results: Results) -> str:
    """Every version that some training ran with."""
    found: dict[str, set[str]] = {"ebdiff": {__version__}}
    for ledger in _ledgers(results):
        for name, version in ledger["versions"].items():
            found.setdefault(name, set()).add(version)
    return ", ".join(f"{name} {' and '.join(sorted(versions))}" for name, versions in found.items())


def _ledgers(results: Results) -> list[dict]:
    """The ledgers of every training of every run that are there."""
    found = []
    for name, run in results.experiment.runs.items():
        for seed in results.experiment.seeds_of(name):
            for e in run.experts:
                ledger = results.attempt(results.ledger, seed, e.key, milestone(e))
                found += [ledger] if ledger else []
    return found
