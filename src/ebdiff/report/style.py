"""How every figure looks, and how it is saved."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ebdiff.system.files import write_bytes

# Seaborn's "colorblind" palette, "ticks" style and "paper" context at 1.05, written out: importing
# seaborn takes half as long as drawing a figure, and only the heat maps need it.
_COLOURS = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494"]
_SMALL, _LARGE = 9.24, 10.08  # points
_SEABORN = {
    **{f"{part}.color": "0.15" for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}": "0.15" for part in ("edgecolor", "labelcolor")},
    **{f"{x}tick.labelsize": _SMALL for x in "xy"},
    **{f"{x}tick.{kind}.size": size for x in "xy" for kind, size in (("major", 4.8), ("minor", 3.2))},
    **{f"{x}tick.{kind}.width": width for x in "xy" for kind, width in (("major", 1), ("minor", 0.8))},
    "axes.axisbelow": True, "axes.linewidth": 1, "axes.labelsize": _LARGE, "axes.titlesize": _LARGE,
    "font.size": _LARGE, "legend.fontsize": _SMALL, "legend.title_fontsize": _LARGE, "grid.color": "0.8",
    "lines.linewidth": 1.2, "lines.markersize": 4.8, "lines.solid_capstyle": "round",
    "patch.linewidth": 0.8, "patch.edgecolor": "white", "patch.force_edgecolor": True,
}  # fmt: skip
METHOD_COLOURS = {
    "unpruned": "#444444", "scratch": _COLOURS[7], "finetune": _COLOURS[1],
    "eb": _COLOURS[0], "ta-eb": _COLOURS[2], "control": _COLOURS[4],
}  # fmt: skip
SPAN_COLOURS = [_COLOURS[0], _COLOURS[1], _COLOURS[2], _COLOURS[4], _COLOURS[3]]
WEIGHTS_COLOURS = {"ema": _COLOURS[0], "raw": _COLOURS[1]}
DPI = 160


@contextmanager
def theme() -> Iterator[None]:
    """The look of all figures, for the length of a block."""
    look = {
        **_SEABORN,
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
        out = io.BytesIO()  # on a full disk Matplotlib's own writing ends in errors of its clean-up
        figure.savefig(out, format=path.suffix[1:], dpi=DPI, metadata=metadata)
        write_bytes(path, out.getvalue())
    return paths


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()
