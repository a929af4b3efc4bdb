"""How every figure looks, and how it is saved."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ebdiff.files import replacing

_COLOURS = sns.color_palette("colorblind")
METHOD_COLOURS = {
    "unpruned": "#444444", "scratch": _COLOURS[7], "finetune": _COLOURS[1],
    "eb": _COLOURS[0], "ta-eb": _COLOURS[2], "control": _COLOURS[4],
}  # fmt: skip
SPAN_COLOURS = [_COLOURS[0], _COLOURS[1], _COLOURS[2], _COLOURS[4], _COLOURS[3]]
WEIGHTS_COLOURS = {"ema": _COLOURS[0], "raw": _COLOURS[1]}
CLOSENESS = sns.color_palette("rocket_r", as_cmap=True)  # lighter = closer, as in the paper
DPI = 160


@contextmanager
def theme() -> Iterator[None]:
    """The look of all figures, for the length of a block."""
    look = {
        **sns.axes_style("ticks"),
        **sns.plotting_context("paper", font_scale=1.05),
        "font.family": "DejaVu Sans",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "legend.frameon": False,
        "text.parse_math": False,  # titles come from a configuration; a dollar sign is a dollar sign
        "pdf.fonttype": 42,
    }
    with matplotlib.rc_context(look):
        yield


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
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=DPI, metadata=metadata)
    return paths


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()
