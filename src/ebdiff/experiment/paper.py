"""The paper's tables (CVPR 2025, arXiv 2504.09606), by the cells that runs stand beside.

`report/paper/table*.csv` holds their rows, every number as printed (Tables 3 and 8 leave their iterations to
the text). Where the paper contradicts itself, a column `..._corrected` stands beside. `cell` names what a row
is about, the same in every table that has it.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

TABLES = tuple(f"table{i}" for i in range(1, 10))

Row = dict[str, str]


@cache
def rows(table: str, dataset: str) -> dict[str, Row]:
    """The rows of a table about one of the paper's datasets, by cell; none where it isn't the paper's."""
    if table not in TABLES:
        return {}
    file = Path(__file__).parents[1] / "report/paper" / f"{table}.csv"
    found = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    return {row["cell"]: row for row in found if row["dataset"] == dataset}


@cache
def cells(dataset: str) -> frozenset[str]:
    """Every cell of a dataset."""
    return frozenset(cell for table in TABLES for cell in rows(table, dataset))
