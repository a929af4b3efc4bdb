"""How every figure looks, and how it is saved."""

from __future__ import annotations

import io
import math
import textwrap
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ebdiff.system.files import write_bytes

COLUMN, PAGE = 3.25, 6.875  # inches: the widths of one and of both columns of a CVPR page
SMALL = 6  # points: the smallest text
DPI = 240

# Seaborn's "colorblind" palette.
_BLUE, _ORANGE, _GREEN, _RED, _PINK, _GREY = "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#949494"
METHOD_COLOURS = {
    "unpruned": "#444444", "scratch": _GREY, "finetune": _ORANGE,
    "eb": _BLUE, "ta-eb": _GREEN, "sparse": _RED, "control": _PINK,
}  # fmt: skip
WEIGHTS_COLOURS = {"ema": _BLUE, "raw": _ORANGE}


def span_colour(i: int) -> str:
    """The colour of the i-th expert."""
    return (_BLUE, _ORANGE, _GREEN, _PINK, _RED)[i % 5]


def theme() -> AbstractContextManager[None]:
    """The look of all figures, for the length of a block."""
    return matplotlib.style.context("ebdiff.report.look")


def canvas(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with `count` equal panels of a height in inches: up to two in a column, else four in a row."""
    across = min(count, 4)
    width = COLUMN if count <= 2 else PAGE * across / 4
    down = math.ceil(count / across)
    figure = canvas(width, height * down)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for unused in grid[count:]:
        unused.set_axis_off()
    return figure, list(grid[:count])


def legend(figure: Figure, *axes: Axes) -> None:
    """Below a figure, which grows by it: each label of some axes once, in as many columns as fit."""
    entries: dict[str, Artist] = {}
    for handle, label in (
        pair for one in axes for pair in zip(*one.get_legend_handles_labels(), strict=True)
    ):
        entries.setdefault(label, handle)
    width, height = figure.get_size_inches()
    columns = max(1, min(len(entries), int(width / (0.38 + 0.056 * max(map(len, entries))))))
    figure.set_figheight(height + 0.14 * math.ceil(len(entries) / columns))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def sentence(text: str) -> Figure:
    """A figure that says in words why there is nothing to draw."""
    figure = canvas(COLUMN, 0.8)
    wrapped = "\n".join(textwrap.wrap(text, 50, break_on_hyphens=False))
    figure.text(0.5, 0.5, wrapped, ha="center", va="center", color="#555555")
    return figure


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write `{name}.pdf` and `.png` atomically; equal figures give equal bytes."""
    figure.draw_without_rendering()  # only from a second drawing on does the layout make room for all text
    paths = [folder / f"{name}.pdf", folder / f"{name}.png"]
    for path, metadata in zip(paths, ({"CreationDate": None}, {"Software": None}), strict=True):
        out = io.BytesIO()  # on a full disk Matplotlib's own writing ends in errors of its clean-up
        figure.savefig(out, format=path.suffix[1:], dpi=DPI, metadata=metadata)
        write_bytes(path, out.getvalue())
    return paths
