"""What the report writes: tables, figures, and one self-contained HTML page that needs no network.

Every file is written atomically. With `partial`, what isn't there yet is shown as such, and what can't be
used is left out with a line; otherwise each is a UserError that names the file.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ebdiff import __version__
from ebdiff.experiment import layout, places
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.records import Work
from ebdiff.experiment.stages import figures
from ebdiff.report import notes, reading, shown, tables
from ebdiff.report.facts import RunFacts, stories
from ebdiff.report.results import Results
from ebdiff.system.errors import UserError, unknown
from ebdiff.system.files import write_text

_PIXELS = 180  # of the page for an inch of a figure


def tabulate(experiment: Experiment, what: Sequence[str] = (), *, partial: bool = False) -> list[Path]:
    """Write all tables and figures of an experiment (verb `tabulate`); give their paths.

    Args:
        experiment: whose.
        what: names of tables and figures; all where there is none.
        partial: show what is there, under so-far/.

    Raises:
        UserError: no such table or figure.
    """
    known = [*experiment.tables, *figures(experiment)]
    for name in what:
        if name not in known:
            raise UserError(f"experiment {experiment.name!r}: {unknown(name, known)}")
    if not partial:
        work = Work(experiment, "tabulate")
    folder = layout.path(layout.SO_FAR if partial else layout.EXPERIMENT, experiment=experiment.name)
    written = write(Results(experiment, partial=partial), what or known, folder)
    if not partial:
        work.end()
    return written


def write(results: Results, names: Sequence[str], folder: Path) -> list[Path]:
    """Write some tables into `{folder}/tables` and figures into `{folder}/figures`; give their paths."""
    asked = [name for name in names if name in results.experiment.tables]
    written = tables.write(results, asked, folder / "tables") if asked else []
    return [*written, *_draw(results, [name for name in names if name not in asked], folder / "figures")]


def report(experiment: Experiment, *, partial: bool = False) -> Path:
    """Write the page (verb `report`), with the finished figures; a partial one first draws what is there."""
    if not partial:
        work = Work(experiment, "report")
    path = layout.path(layout.SO_FAR if partial else layout.EXPERIMENT, experiment=experiment.name)
    write_page(Results(experiment, partial=partial), path / Path(layout.REPORT).name)
    if not partial:
        work.end()
    return path / Path(layout.REPORT).name


def write_page(results: Results, path: Path) -> None:
    """Write the page to a path; a partial one's figures and tables, which it links to, beside it."""
    names = figures(results.experiment)
    if results.partial:
        write(results, (*results.experiment.tables, *names), path.parent)
    pictures = {name: results.png(path.parent / "figures" / f"{name}.png") for name in names}
    write_text(path, notes.template("page.html.j2").render(pictures=pictures, **_told(results)))


def _draw(results: Results, figures: Iterable[str], folder: Path) -> list[Path]:
    from ebdiff.report.figures import write  # here, because a whole page needs no Matplotlib

    return write(results, figures, folder)


def _told(results: Results) -> dict[str, Any]:
    """What the page says beside its figures."""
    experiment, attempt = results.experiment, results.attempt
    runs = [RunFacts(results, name) for name in experiment.runs]
    ledgers = [x for f in runs for n in f.seeds for e in f.experts if (x := attempt(results.ledger, n, e))]
    used = {(search, n) for f in runs for n in f.seeds for search in attempt(f.search_steps, n) or ()}
    plan = results.plan() or {"jobs": []}
    seconds = [(job, results.job_seconds(job["benchmark"])) for job in plan["jobs"]]
    return {
        "experiment": experiment,
        "embedded": embedded,
        "partial": results.partial,
        "measure": notes.measure(experiment),
        "comparable": notes.comparable(experiment),
        "claims": reading.read(results),
        "tables": [tables.build(results, name) for name in experiment.tables],
        "manifest": attempt(results.manifest),
        "cost": attempt(results.cost),
        "runs": runs,
        "versions": [("ebdiff", __version__), *(pair for x in ledgers for pair in x["versions"].items())],
        "dates": [process["started"][:10] for x in ledgers for process in x["processes"]],
        "stories": [s | {"to_final": attempt(results.to_final, s)} for s in stories(runs)],
        "finished": places.finished(experiment) is not None,
        "unsettled": notes.unsettled(runs),
        "searches": [(s, n, x) for s, n in sorted(used) if (x := attempt(results.search_ledger, n, s))],
        "samples": [(f.run.title, m) for f in runs if (m := attempt(results.metrics, f.name, f.seeds[0]))],
        "drawings": [(f.run.title, _svg(x)) for f in runs if (x := attempt(results.svg, f.name, f.seeds[0]))],
        "ways": notes.protocols(runs),
        "executed": notes.executed(runs),
        "plan": plan,
        "jobs": [(job["kind"], job["seconds"], actual) for job, actual in seconds if actual is not None],
        "left_out": results.left_out,
    }


def _svg(document: bytes) -> str:
    """The address of an `img` that holds an SVG: there no script of it would run."""
    return f"data:image/svg+xml;base64,{base64.b64encode(document).decode()}"


def embedded(png: bytes) -> Markup:
    """The attributes of an `img` that holds a PNG, at which all figures' text has the same size."""
    pixels = (int.from_bytes(png[at : at + 4]) for at in (16, 20))  # where a PNG says its own
    width, height = (count * _PIXELS // shown.DPI for count in pixels)
    size = f'width="{width}" height="{height}" style="--shape: {width / height:.3f}"'
    return Markup(f'src="data:image/png;base64,{base64.b64encode(png).decode()}" {size}')
