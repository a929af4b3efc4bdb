"""A table, and how it is written: csv for programs; Markdown and LaTeX for people."""

from __future__ import annotations

import html
import re
import statistics
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd

from ebdiff.report.text import MISSING

_ON_A_PAGE = 16  # columns that fit beside each other at 1280 pixels


@dataclass(frozen=True)
class Corrected:
    """A published number, and what was printed for it where its paper contradicts itself."""

    value: float
    printed: float

    def text(self, show: Callable[[float], str]) -> str:
        """Both, if they differ."""
        same = self.printed == self.value
        return show(self.value) if same else f"{show(self.value)} (printed {show(self.printed)})"


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    key: str  # in the csv
    heading: str  # lines are separated by a newline
    value: Callable[[Any], Any]  # of what a row is about: the raw value; a tuple has one entry per seed
    show: Callable[[Any], str] = str
    absent: str = MISSING  # where there is no value
    left: bool = False
    marked: bool = False  # marks that point to notes stand in the first such column
    beside: bool = False  # sets ours beside the paper's


@dataclass(frozen=True)
class Table:
    """A finished table."""

    caption: str
    columns: tuple[Column, ...]
    values: list[list[Any]]  # row by row; None where the file isn't there yet
    marks: list[str]  # what points from each row to its notes, such as `†`
    notes: list[str]
    grouped: bool = False  # whether equal neighbours in the first column form a block
    bold: frozenset[tuple[int, int]] = frozenset()  # (row, column)

    def cells(self) -> list[list[str]]:
        """The rows as text; a block's name stands in its first row only."""
        rows = []
        for values, marks in zip(self.values, self.marks, strict=True):
            pairs = zip(self.columns, values, strict=True)
            rows.append([c.absent if value is None else c.show(value) for c, value in pairs])
            if marks:
                rows[-1][self.label] += f" {marks}"
        if self.grouped:
            for above, row in reversed(list(pairwise(rows))):
                row[0] = "" if row[0] == above[0] else row[0]
        return rows

    @property
    def label(self) -> int:
        """The column that tells what a row is."""
        return next((i for i, column in enumerate(self.columns) if column.marked), 0)

    @property
    def parts(self) -> list[list[int]]:
        """Columns in parts as wide as a page: of many, those beside the paper's follow, after the label."""
        ours = [k for k, column in enumerate(self.columns) if not column.beside]
        theirs = [k for k, column in enumerate(self.columns) if column.beside]
        wide = theirs and len(self.columns) > _ON_A_PAGE
        return [ours, [*range(self.label + 1), *theirs]] if wide else [[*range(len(self.columns))]]


def to_csv(table: Table) -> str:
    """Raw numbers; a value with several seeds is `key` (mean), `key_std` and `key_seeds`.

    A published one is `key` and `key_as_printed`.
    """
    columns: dict[str, list[Any]] = {}
    for column, *values in zip(table.columns, *table.values, strict=True):
        columns[column.key] = values
        if any(isinstance(value, tuple) for value in values):
            seeds = [value or () for value in values]
            columns[column.key] = [statistics.fmean(v) if v else None for v in seeds]
            columns[f"{column.key}_std"] = [statistics.stdev(v) if len(v) > 1 else None for v in seeds]
            columns[f"{column.key}_seeds"] = [len(v) for v in seeds]
        if any(isinstance(value, Corrected) for value in values):
            columns[column.key] = [value and value.value for value in values]
            columns[f"{column.key}_as_printed"] = [value and value.printed for value in values]
    columns["marks"] = table.marks
    frame = pd.DataFrame({k: list(map(_no_formula, v)) for k, v in columns.items()}, dtype=object)
    return frame.to_csv(index=False, lineterminator="\n")


def _no_formula(cell: Any) -> Any:
    """A text that a spreadsheet would calculate gets an apostrophe before it: to these that means text."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")) else cell


def to_markdown(table: Table) -> str:
    """A pipe table with caption and notes."""
    rows = [list(map(_markdown, row)) for row in table.cells()]
    for i, k in table.bold:
        rows[i][k] = f"**{rows[i][k]}**"
    frame = pd.DataFrame(rows, columns=[column.heading.replace("\n", " ") for column in table.columns])
    sides = ["left" if column.left else "right" for column in table.columns]
    cells = frame.to_markdown(index=False, tablefmt="pipe", disable_numparse=True, colalign=sides)
    lines = [f"**{_markdown(table.caption)}**", "", cells, ""]
    return "\n".join([*lines, *(f"{_markdown(note)}  " for note in table.notes)]) + "\n"


def _markdown(text: str) -> str:
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    return plain.translate({ord(c): "\\" + c for c in "\\|*_`[]#"})


def from_markdown(text: str) -> Table:
    """The table that `to_markdown` wrote, every value as text.

    Raises:
        ValueError: it is none.
    """
    caption, _, *lines = text.splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    heads, sides, *body = ([cell.strip() for cell in row] for row in rows)
    grouped, values = (
        not heads[0],
        [[_plain(cell) for _, cell in zip(heads, row, strict=True)] for row in body],
    )
    columns = tuple(
        Column(head, _plain(head), str, left=side.startswith(":"), marked=k == grouped)
        for k, (head, side) in enumerate(zip(heads, sides, strict=True))
    )
    return Table(
        _plain(caption),
        columns,
        values,
        [""] * len(body),
        [_plain(line) for line in lines if line and not line.startswith("|")],
        grouped,
        frozenset((i, k) for i, row in enumerate(body) for k, cell in enumerate(row) if cell[:2] == "**"),
    )


def _plain(markdown: str) -> str:
    """The inverse of `_markdown`."""
    return html.unescape(re.sub(r"\*\*|\\(.)", r"\1", markdown.strip()))


_PAGE = (469, 68)  # points and lines of a two-column article; a CVPR page has room for more
_GAP = 6  # points between columns
_LABEL, _TEXT = 84, 44  # points at which what a row is, and other texts, go on in the next line


def to_tex(table: Table) -> str:
    r"""One or more `table*` to `\input`: needs `\usepackage{booktabs}` and nothing else.

    Columns beyond the width of the page stand in further parts, which all begin with what a row is: below
    each other, or where that is too long in floats of their own; and so do notes.
    """
    kinds, widths = [], []
    for k, (column, *cells) in enumerate(zip(table.columns, *table.cells(), strict=True)):
        widest, limit = max(map(_points, cells)), _LABEL if k == table.label else _TEXT
        wrapped = column.left and widest > limit
        kinds.append(f"p{{{limit}pt}}" if wrapped else "l" if column.left else "r")
        heading = max(map(_points, column.heading.split("\n")))
        widths.append(_GAP + max(heading, limit if wrapped else widest))
    parts: list[list[int]] = [[]]
    for k, width in enumerate(widths):
        if sum(widths[i] for i in parts[-1]) + width > _PAGE[0] + _GAP:
            parts.append([table.label])
        parts[-1].append(k)
    rows = sum(1 + int(_points(row[table.label]) // _LABEL) for row in table.cells())
    height, notes = rows + 7, sum(1 + len(note) // 115 for note in table.notes)
    tabulars = [_tabular(table, part, kinds) for part in parts]
    end = r"\end{table*}"
    begin = r"\begin{table*}[tp]\centering\scriptsize\setlength{\tabcolsep}{3pt}"
    again = rf"{end}{begin}\addtocounter{{table}}{{-1}}\caption{{(continued)}}"
    lines = [
        rf"{begin}\caption{{{_tex(table.caption)}}}",
        ("\\par\\medskip\n" if len(parts) * height + notes <= _PAGE[1] else f"{again}\n").join(tabulars),
        *([again] if height + notes > _PAGE[1] else []),
        r"\par\medskip\begin{minipage}{\linewidth}\raggedright",
        *(rf"{_tex(note)}\par" for note in table.notes),
        rf"\end{{minipage}}{end}",
    ]
    return "\n".join(lines) + "\n"


def _points(text: str) -> float:
    """About the width of a text at scriptsize."""
    narrow, wide = set(" .,:;'()[]-ijlft†‡"), set("mwMW%±×")
    return sum(2.7 if c in narrow else 6.5 if c in wide else 5.7 if c.isupper() else 4.1 for c in text)


def _tabular(table: Table, part: list[int], kinds: list[str]) -> str:
    """Some columns of a table, each of a LaTeX kind."""
    heads = [[*column.heading.split("\n"), ""][:2] for column in table.columns]
    rows = []
    for i, row in enumerate(table.cells()):
        cells = [rf"\textbf{{{_tex(row[k])}}}" if (i, k) in table.bold else _tex(row[k]) for k in part]
        cells = [rf"\raggedright {c}" if kinds[k][0] == "p" else c for k, c in zip(part, cells, strict=True)]
        if table.grouped and i and row[0]:  # a block begins
            cells[0] = rf"\midrule {cells[0]}"
        rows.append(cells)
    columns = pd.MultiIndex.from_tuples([tuple(map(_tex, heads[k])) for k in part])
    plain = pd.DataFrame(rows, columns=columns).style.hide(axis="index")
    layout = f"@{{}}{''.join(kinds[k] for k in part)}@{{}}"
    return plain.to_latex(hrules=True, column_format=layout, multicol_align="c")


_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#",
    "_": r"\_", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$", "×": r"$\times$",
    "–": "--", "†": r"\dag{}", "‡": r"\ddag{}", "≥": r"$\geq$", "≤": r"$\leq$", "<": r"$<$", ">": r"$>$",
    "|": r"$|$", "\n": " ", '"': "''", "`": r"\textasciigrave{}", "[": "{[}", "]": "{]}",
}  # fmt: skip


def _tex(text: str) -> str:
    """Escape for LaTeX; characters that its usual fonts lack become '?'."""
    return "".join(_TEX.get(c) or _letter(c) for c in text)


def _letter(character: str) -> str:
    if " " <= character <= "~" or (character.isalpha() and "À" <= character <= "ÿ"):
        return character
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return "".join(_TEX.get(c, c) for c in plain if c.isprintable()) or "?"
