"""What the report's verbs write (`tabulate` and `report`)."""

from __future__ import annotations

from pathlib import Path

from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.records import Work
from ebdiff.experiment.stages import FIGURES
from ebdiff.report.figures import write_figure
from ebdiff.report.page import write_report
from ebdiff.report.tables import write_table
from ebdiff.system.errors import UserError, unknown


def tabulate(experiment: Experiment, what: list[str], *, partial: bool = False) -> list[Path]:
    """Write all tables and figures of an experiment, or some of them from what is finished.

    Args:
        experiment: whose.
        what: names of tables and figures; all where there is none.
        partial: show what is there, under so-far/.

    Returns:
        the paths.

    Raises:
        UserError: no such table or figure; a file is damaged, or missing while `partial` is false.
    """
    known = [*experiment.tables, *FIGURES]
    for name in what:
        if name not in known:
            raise UserError(f"experiment {experiment.name!r}: {unknown(name, known)}")
    work = None if partial else Work(experiment, "tabulate")
    folder = layout.path(layout.SO_FAR if partial else layout.EXPERIMENT, experiment=experiment.name)
    written = []
    for name in what or known:
        write = write_figure if name in FIGURES else write_table
        place = folder / ("figures" if name in FIGURES else "tables")
        written += write(experiment, name, place, partial=partial)
    if work:
        work.end()
    return written


def report(experiment: Experiment, *, partial: bool = False) -> Path:
    """Write the report page; `partial` as `tabulate`. Returns its path."""
    if partial:
        path = layout.path(layout.SO_FAR, experiment=experiment.name) / Path(layout.REPORT).name
        write_report(experiment, path, partial=True)
        return path
    work = Work(experiment, "report")
    write_report(experiment, work.path(layout.REPORT))
    work.end()
    return work.path(layout.REPORT)
