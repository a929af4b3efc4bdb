"""How every figure looks, and how it is saved."""

from __future__ import annotations

import io
import math
import textwrap
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ebdiff.report.shown import DPI
from ebdiff.system.files import write_bytes

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


def panels(
    count: int, *, columns: int = 4, width: float = 2.6, height: float = 2.5
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` equal panels, filled row by row; sizes in inches per panel."""
    across = min(count, columns)
    down = math.ceil(count / across)
    figure = Figure(figsize=(max(4.2, width * across), height * down + 0.5), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for unused in grid[count:]:
        unused.set_axis_off()
    return figure, list(grid[:count])


def sentence(text: str) -> Figure:
    """A figure that says in words why there is nothing to draw."""
    figure = Figure(figsize=(6, 1.6), layout="constrained")
    wrapped = "\n".join(textwrap.wrap(text, 70, break_on_hyphens=False))
    figure.text(0.5, 0.5, wrapped, ha="center", va="center", color="#555555")
    return figure


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write `{name}.pdf` and `.png` atomically; equal figures give equal bytes."""
    paths = [folder / f"{name}.pdf", folder / f"{name}.png"]
    for path, metadata in zip(paths, ({"CreationDate": None}, {"Software": None}), strict=True):
        out = io.BytesIO()  # on a full disk Matplotlib's own writing ends in errors of its clean-up
        figure.savefig(out, format=path.suffix[1:], dpi=DPI, metadata=metadata)
        write_bytes(path, out.getvalue())
    return paths
