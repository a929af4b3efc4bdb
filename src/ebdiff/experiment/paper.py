"""The paper's tables (CVPR 2025, arXiv 2504.09606), by the cells that runs stand beside.

`report/paper/table*.csv` holds their rows, every number as printed (Tables 3 and 8 leave their iterations to
the text). Where the paper contradicts itself, a column `..._corrected` stands beside. `cell` names what a row
is about, the same in every table that has it. `ratios.csv` holds the ratios to baselines of its text.
`sparse.csv` is another paper's: Table 1 of Sparse-to-Sparse Training of Diffusion Models (arXiv 2504.21380),
as far as it is known; mean and standard deviation.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

TABLES = tuple(f"table{i}" for i in range(1, 10))
PRINTED = (*TABLES, "sparse")

Row = dict[str, str]

_FOLDER = Path(__file__).parents[1] / "report/paper"


@cache
def rows(table: str, dataset: str) -> dict[str, Row]:
    """The rows of a table about one of the paper's datasets, by cell; none where it isn't a paper's."""
    if table not in PRINTED:
        return {}
    found = csv.DictReader(_FOLDER.joinpath(f"{table}.csv").read_text(encoding="utf-8").splitlines())
    return {row["cell"]: row for row in found if row["dataset"] == dataset}


@cache
def ratios(table: str, dataset: str) -> dict[tuple[str, str], Row]:
    """How many times faster the text calls a table's cells than a baseline, by cell and baseline's method.

    `over` is the cell whose printed speed-up gives the ratio; the text leaves that open.
    """
    found = csv.DictReader(_FOLDER.joinpath("ratios.csv").read_text(encoding="utf-8").splitlines())
    return {(r["cell"], r["method"]): r for r in found if (r["table"], r["dataset"]) == (table, dataset)}


@cache
def cells(dataset: str) -> frozenset[str]:
    """Every cell of a dataset."""
    return frozenset(cell for table in PRINTED for cell in rows(table, dataset))
