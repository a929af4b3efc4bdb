"""The paper's tables with our numbers, published ones beside them."""

from __future__ import annotations

from pathlib import Path

from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.report import needs, notes, text
from ebdiff.report.columns import COSTS, columns_of
from ebdiff.report.facts import RunFacts
from ebdiff.report.render import Table, to_csv, to_markdown, to_tex
from ebdiff.report.results import Results
from ebdiff.system.files import write_text

_TICKETS = "Early-bird tickets by pruning rate and criterion"
_METHODS = "Quality and training cost of every method"
CAPTIONS = {
    "table1": _TICKETS,
    "table2": _TICKETS,
    "table3": "Timestep-aware experts with and without overlapping regions",
    "table4": _METHODS,
    "table5": _METHODS,
    "table6": _METHODS,
    "table7": "Early-bird training and SpeeD, alone and together",
    "table8": "Timestep-aware experts by the pruning rates of their regions",
    "table9": "Timestep-aware experts by the training iterations of their regions",
    "controls": "Controls: what the method itself adds",
}


def write_table(experiment: Experiment, table: str, folder: Path, *, partial: bool = False) -> list[Path]:
    """Write `{table}.csv`, `.md` and `.tex` into a folder, each atomically.

    Args:
        experiment: the experiment.
        table: one of its tables.
        folder: where to write.
        partial: show "–" where a file isn't there yet, with the command that fills it.

    Returns:
        The three paths.

    Raises:
        UserError: no such table; a file is damaged, or missing while `partial` is false.
    """
    built = build(Results(experiment, partial=partial), table)
    written = []
    for extension, render in (("csv", to_csv), ("md", to_markdown), ("tex", to_tex)):
        written.append(folder / f"{table}.{extension}")
        write_text(written[-1], render(built))
    return written


def build(results: Results, table: str) -> Table:
    """Fill a table.

    Raises:
        UserError: as `write_table`.
    """
    names = needs.rows(results.experiment, table)
    reference = needs.unpruned(results.experiment, names)
    rows = [RunFacts(results, name, reference) for name in names]
    columns = columns_of(results, table, rows)
    costly = COSTS[0] in columns
    below = notes.of_table(results, table, rows)
    if results.partial:
        target = results.path(layout.TABLE, table=table, ext="csv")
        below.append(f"So far: what shows {text.MISSING} is filled by `snakemake --cores all {target}`.")
    values = [[results.attempt(column.value, facts) for column in columns] for facts in rows]
    below += [f"Left out: {line}." for line in results.left_out]
    return Table(
        caption=f"{CAPTIONS[table]} ({results.experiment.dataset.name})",
        columns=columns,
        values=values,
        marks=[notes.marks(facts, rows) for facts in rows],
        notes=below,
        grouped=costly,
        split=COSTS[0].key if costly else None,
    )
