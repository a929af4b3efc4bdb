"""Drawings to images, by one written rule, because line width and size change every metric.

On white, the longer side fills the image but for a margin of one line width, in the middle; lines are black
and round at joints and ends, anti-aliased by drawing larger and averaging. The same figure as SVG.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ebdiff.codecs.codec import Codec
from ebdiff.data.dataset import Cond
from ebdiff.data.strokes import Strokes, strokes_of

LARGER = 4  # times, in which lines are drawn before they are averaged
UNIT = 256  # pixels in which line widths are given


class Raster(Codec):
    """Items are movements (L, 3), of which `cond.mask` tells each one's own."""

    def decode(self, items: Tensor, cond: Cond) -> np.ndarray:
        """Grey images: uint8 (B, size, size, 1)."""
        config = self.experiment.codec
        width = config.line_width / UNIT
        return np.stack([picture(s, config.size, width) for s in self._drawings(items, cond)])[..., None]

    def vector(self, items: Tensor, cond: Cond) -> list[str]:
        """The drawings as SVG documents."""
        return [svg(strokes, self.experiment.codec.line_width) for strokes in self._drawings(items, cond)]

    def _drawings(self, items: Tensor, cond: Cond) -> list[Strokes]:
        both = zip(items.cpu().numpy(), cond.mask.cpu().numpy(), strict=True)
        return [strokes_of(item[mask], self.experiment.codec.pen) for item, mask in both]


def fitted(strokes: Strokes, size: float, margin: float) -> Strokes:
    """Moved and scaled so that the longer side fills a square of a size but for its margins."""
    points = np.concatenate(strokes)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (size - 2 * margin) / max((high - low).max(), 1e-9)
    return [(stroke - (low + high) / 2) * scale + size / 2 for stroke in strokes]


def picture(strokes: Strokes, size: int, width: float) -> np.ndarray:
    """The image of a drawing, uint8 (size, size), 0 where there is ink, lines `width` of the size wide."""
    side = LARGER * size
    line = max(1, round(width * side))
    image = Image.new("L", (side, side), 255)
    pen, r = ImageDraw.Draw(image), line / 2
    for stroke in fitted(strokes, side, line):
        pen.line(stroke.ravel().tolist(), fill=0, width=line, joint="curve")
        for x, y in stroke[[0, -1]].tolist():
            pen.ellipse((x - r, y - r, x + r, y + r), fill=0)
    return np.asarray(image.reduce(LARGER))


def svg(strokes: Strokes, width: float) -> str:
    """The same as an SVG document, a path for each stroke."""
    ways = (" L".join(f"{x:.2f} {y:.2f}" for x, y in stroke) for stroke in fitted(strokes, UNIT, width))
    paths = "".join(f'<path d="M{way}"/>' for way in ways)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{UNIT}" height="{UNIT}" viewBox="0 0 {UNIT} {UNIT}">'
        f'<rect width="100%" height="100%" fill="#fff"/><g stroke="#000" stroke-width="{width:g}" '
        f'fill="none" stroke-linecap="round" stroke-linejoin="round">{paths}</g></svg>\n'
    )
