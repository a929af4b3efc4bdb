"""A table, and how it is written: csv for programs, Markdown and LaTeX for people."""

from __future__ import annotations

import csv
import io
import statistics
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ebdiff.report.text import MISSING


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: its name in the csv.
        heading: its heading; lines are separated by a newline.
        value: from what a row is about to the raw value; a tuple has one entry per seed.
        show: from the raw value to text.
        absent: text where there is no value.
        left: whether it is aligned to the left.
        marked: whether the marks of a row's notes stand here.
    """

    key: str
    heading: str
    value: Callable[[Any], Any]
    show: Callable[[Any], str] = str
    absent: str = MISSING
    left: bool = False
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A finished table.

    Attributes:
        caption: one sentence.
        columns: its columns.
        values: raw values, one list per row; None where the file isn't there yet.
        marks: what points from each row to its notes, such as `†`.
        notes: lines below the table.
        grouped: whether equal neighbours in the first column form a block.
        split: key of the column at which LaTeX, on narrow paper, starts a second part.
    """

    caption: str
    columns: tuple[Column, ...]
    values: list[list[Any]]
    marks: list[str]
    notes: list[str]
    grouped: bool = False
    split: str | None = None

    def cells(self) -> list[list[str]]:
        """The rows as text; a block's name stands in its first row only."""
        rows = [
            [_cell(column, value, marks) for column, value in zip(self.columns, row, strict=True)]
            for row, marks in zip(self.values, self.marks, strict=True)
        ]
        if self.grouped:
            blocks = [row[0] for row in rows]
            for i, row in enumerate(rows):
                row[0] = "" if i and blocks[i - 1] == blocks[i] else blocks[i]
        return rows


def _cell(column: Column, value: Any, marks: str) -> str:
    shown = column.absent if value is None else column.show(value)
    return f"{shown} {marks}" if column.marked and marks else shown


def to_csv(table: Table) -> str:
    """Raw numbers; a value with several seeds is `key` (mean), `key_std` and `key_seeds`."""
    per_seed = [any(isinstance(row[i], tuple) for row in table.values) for i in range(len(table.columns))]
    header: list[str] = []
    for column, spread in zip(table.columns, per_seed, strict=True):
        header += [column.key, f"{column.key}_std", f"{column.key}_seeds"] if spread else [column.key]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*header, "marks"])
    for row, marks in zip(table.values, table.marks, strict=True):
        flat: list[Any] = []
        for value, spread in zip(row, per_seed, strict=True):
            flat += _moments(value or ()) if spread else ["" if value is None else value]
        writer.writerow([*flat, marks])
    return out.getvalue()


def _moments(values: tuple[float, ...]) -> list[Any]:
    mean = statistics.fmean(values) if values else ""
    return [mean, statistics.stdev(values) if len(values) > 1 else "", len(values)]


def to_text(table: Table) -> str:
    """Aligned columns for a terminal, with caption and notes."""
    rows = [[c.heading.replace("\n", " ") for c in table.columns], *table.cells()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [table.caption]
    for row in rows:
        cells = zip(row, widths, table.columns, strict=True)
        lines.append("  ".join(t.ljust(w) if c.left else t.rjust(w) for t, w, c in cells).rstrip())
    return "\n".join([*lines, *table.notes])


def to_markdown(table: Table) -> str:
    """A pipe table with caption and notes."""
    lines = [
        f"**{_markdown(table.caption)}**",
        "",
        _pipes(c.heading.replace("\n", " ") for c in table.columns),
        _pipes("---" for _ in table.columns),
        *(_pipes(map(_markdown, row)) for row in table.cells()),
        "",
    ]
    lines += [f"{_markdown(note)}  " for note in table.notes]
    return "\n".join(lines) + "\n"


def _pipes(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown(text: str) -> str:
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    return plain.translate({ord(c): "\\" + c for c in "\\|*_`[]#"})


def to_tex(table: Table) -> str:
    r"""A booktabs table to `\input`: needs `\usepackage{booktabs}` and nothing else.

    A table with `split` is set in two parts below each other, its first two columns repeated.
    """
    columns = range(len(table.columns))
    cut = next((i for i in columns if table.columns[i].key == table.split), len(columns))
    parts = [list(columns[:cut])]
    if columns[cut:]:
        parts.append([0, 1, *columns[cut:]])
    lines = [
        r"\begin{table}[htbp]",
        r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{_tex(table.caption)}}}",
        "\n\\par\\medskip\n".join(_tabular(table, part) for part in parts),
        r"\par\medskip",
        r"\begin{minipage}{\linewidth}\scriptsize\raggedright",
        *(rf"{_tex(note)}\par" for note in table.notes),
        r"\end{minipage}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _tabular(table: Table, part: list[int]) -> str:
    """Some columns of a table, centred even where they are wider than the text."""
    columns = [table.columns[i] for i in part]
    lines = [
        r"\makebox[\linewidth][c]{%",
        rf"\begin{{tabular}}{{@{{}}{''.join('l' if c.left else 'r' for c in columns)}@{{}}}}",
        r"\toprule",
        " & ".join(_heading(c.heading) for c in columns) + r" \\",
        r"\midrule",
    ]
    for i, row in enumerate(table.cells()):
        if table.grouped and i and row[0]:
            lines.append(r"\midrule")
        lines.append(" & ".join(_tex(row[k]) for k in part) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}"])


def _heading(heading: str) -> str:
    lines = [_tex(line) for line in heading.split("\n")]
    return lines[0] if len(lines) == 1 else r"\shortstack[r]{" + r"\\".join(lines) + "}"


_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#",
    "_": r"\_", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$", "×": r"$\times$",
    "–": "--", "†": r"\dag{}", "‡": r"\ddag{}", "≥": r"$\geq$", "≤": r"$\leq$", "<": r"$<$", ">": r"$>$",
    "|": r"$|$",
    "\n": " ", '"': "''", "`": r"\textasciigrave{}", "[": "{[}", "]": "{]}",
}  # fmt: skip


def _tex(text: str) -> str:
    """Escape for LaTeX; characters that its usual fonts lack become '?'."""
    return "".join(_TEX.get(c) or _tex_letter(c) for c in text)


def _tex_letter(character: str) -> str:
    if " " <= character <= "~" or (character.isalpha() and "\xc0" <= character <= "\xff"):
        return character
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return "".join(_TEX.get(c, c) for c in plain if " " <= c <= "~") or "?"
