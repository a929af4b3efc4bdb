"""What the report writes: tables, figures, and one self-contained HTML page that needs no network.

Every file is written atomically. With `partial`, what isn't there yet is shown as such, and what can't be
used is left out with a line; otherwise each is a UserError that names the file.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ebdiff import __version__
from ebdiff.experiment import layout, places
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.records import Work
from ebdiff.experiment.stages import figures
from ebdiff.report import notes, reading, tables
from ebdiff.report.facts import RunFacts, stories
from ebdiff.report.results import Results
from ebdiff.system.errors import UserError, unknown
from ebdiff.system.files import write_text

_PIXELS = 180 / 240  # of the page for one of a figure, which has `style.DPI` to an inch


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
    with _job(experiment, "tabulate", partial) as (results, folder):
        return write(results, what or known, folder)


@contextmanager
def _job(experiment: Experiment, verb: str, partial: bool) -> Iterator[tuple[Results, Path]]:
    """What a job reads, and the folder that it writes to; a whole one is checked and recorded."""
    work = None if partial else Work(experiment, verb)
    results = Results(experiment, partial=partial)
    yield results, results.path(layout.SO_FAR if partial else layout.EXPERIMENT)
    if work:
        work.end()


def write(results: Results, names: Sequence[str], folder: Path) -> list[Path]:
    """Write some tables into `{folder}/tables` and figures into `{folder}/figures`; give their paths."""
    asked = [name for name in names if name in results.experiment.tables]
    written = tables.write(results, asked, folder / "tables") if asked else []
    return [*written, *_draw(results, [name for name in names if name not in asked], folder / "figures")]


def report(experiment: Experiment, *, partial: bool = False) -> Path:
    """Write the page (verb `report`), with the finished figures; a partial one first draws what is there."""
    with _job(experiment, "report", partial) as (results, folder):
        write_page(results, path := folder / Path(layout.REPORT).name)
        return path


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
    search_ledger = partial(attempt, results.file, layout.DENSE_LEDGER)
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
        "manifest": attempt(results.file, layout.MANIFEST),
        "cost": attempt(results.file, layout.COST),
        "runs": runs,
        "versions": [("ebdiff", __version__), *(pair for x in ledgers for pair in x["versions"].items())],
        "dates": [process["started"][:10] for x in ledgers for process in x["processes"]],
        "stories": [s | {"to_final": attempt(results.to_final, s)} for s in stories(runs)],
        "finished": places.finished(experiment) is not None,
        "unsettled": notes.unsettled(runs),
        "searches": [(s, n, x) for s, n in sorted(used) if (x := search_ledger(seed=n, search=s))],
        "samples": [(f.run.title, m) for f in runs if (m := attempt(results.metrics, f.name, f.seeds[0]))],
        # An `img` runs no script that an SVG may hold.
        "drawings": [
            (f.run.title, f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}")
            for f in runs
            if (svg := attempt(results.svg, f.name, f.seeds[0]))
        ],
        "ways": notes.protocols(runs),
        "executed": notes.executed(runs),
        "plan": plan,
        "jobs": [(job["kind"], job["seconds"], actual) for job, actual in seconds if actual is not None],
        "left_out": results.left_out,
    }


def embedded(png: bytes) -> Markup:
    """The attributes of an `img` that holds a PNG, at which all figures' text has the same size."""
    pixels = (int.from_bytes(png[at : at + 4]) for at in (16, 20))  # where a PNG says its own
    width, height = (int(count * _PIXELS) for count in pixels)
    size = f'width="{width}" height="{height}" style="--shape: {width / height:.3f}"'
    return Markup(f'src="data:image/png;base64,{base64.b64encode(png).decode()}" {size}')
