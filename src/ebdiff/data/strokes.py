"""Drawings as strokes: Quick, Draw!'s raw .ndjson, KanjiVG's SVG, and ChiroDiff's preprocessing.

A line of .ndjson is a drawing: {"word": its category, "drawing": a list of strokes}, a stroke [[x, ...],
[y, ...]], where more axes (time) are left alone; y points down. VMNIST is published as pickles, which are
never loaded, because they are code: convert files that you trust, of a folder SOURCE into a file TARGET, with

    import json, pathlib, pickle
    with open(TARGET, "w") as out:
        for path in sorted(pathlib.Path(SOURCE).rglob("*.pkl")):
            strokes = pickle.loads(path.read_bytes())  # [[xs, ys, times], ...] of one digit
            drawing = [[list(map(float, axis)) for axis in stroke] for stroke in strokes]
            print(json.dumps({"word": path.parent.name, "drawing": drawing}), file=out)
"""

from __future__ import annotations

import re
import unicodedata
import urllib.parse
import xml.etree.ElementTree as ET
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ebdiff.data.archives import below, fetch, local, opened_zip
from ebdiff.data.images import Broken
from ebdiff.experiment import layout
from ebdiff.experiment.members import SketchesConfig
from ebdiff.system.errors import UserError

RADIUS = 10.0  # of a whole drawing around its first point, in the units of an item
QUICKDRAW = "https://storage.googleapis.com/quickdraw_dataset/full/raw"
STORIES = {
    "sketches": {},
    "quickdraw": {
        "title": "Quick, Draw!",
        "origin": "github.com/googlecreativelab/quickdraw-dataset, raw drawings",
        "licence": "CC BY 4.0",
    },
    "vmnist": {"title": "VMNIST", "origin": "A. Das et al., 2022: MNIST's digits as strokes"},
    "kanjivg": {
        "title": "KanjiVG",
        "origin": "kanjivg.tagaini.net, U. Apel: characters without variants",
        "licence": "CC BY-SA 3.0",
    },
}
LINE = FILE = 2**20  # bytes of a line of .ndjson, or of an SVG file; Quick, Draw!'s lines have up to 0.1 MB
WHOLE = 16 * LINE  # bytes of .ndjson that a look reads whole
PIECES = 16  # straight pieces that stand for a segment of an SVG path

Strokes = list[np.ndarray]


class Drawing(NamedTuple):
    """One drawing: its strokes, float64 (n, 2) each, y pointing down; and its category, if it has one."""

    strokes: Strokes
    word: str | None = None


# A drawing's place, in words, and what reads it; reading raises `Broken`.
Named = tuple[str, Callable[[], Drawing]]


# --- sources ------------------------------------------------------------------------------------------------


def find(dataset: SketchesConfig) -> Iterator[Named]:
    """The drawings that `dataset` names, always in the same order; UserError if they can't be found."""
    if dataset.source == "kanjivg":
        return kanji(local(dataset))
    return (named for file in _files(dataset) for named in lines(file))


def look(dataset: SketchesConfig, most: int) -> tuple[int, list[Named]]:
    """How many drawings there are, and about `most` of them, evenly spread.

    Of large files only so many lines are read, whose mean length tells about how many there are.
    """
    files = [] if dataset.source == "kanjivg" else _files(dataset)
    size = sum(file.stat().st_size for file in files if file.exists())
    if size <= WHOLE:
        found = list(find(dataset))
        return len(found), found[:: max(1, len(found) // most)]
    found = [named for file in files for named in lines(file, size // most)]
    count = round(size * len(found) / max(1, sum(len(read.args[0]) for _, read in found)))
    return round(count, 2 - len(str(count))), found


def _files(dataset: SketchesConfig) -> list[Path]:
    """The files of lines that `dataset` names; those of Quick, Draw! are fetched where no path is given."""
    path = local(dataset)
    folder = path or layout.path(layout.DOWNLOAD, file="quickdraw")
    files = [folder / f"{category}.ndjson" for category in dataset.categories]
    if path is None:
        for file in files:
            fetch(f"{QUICKDRAW}/{urllib.parse.quote(file.name)}", file)
    elif path.is_dir():
        files = files or sorted(path.glob("*.ndjson"))
    else:
        files = [path]
    if not files:
        raise UserError(
            f"{path or dataset.name}: no .ndjson files of strokes (convert pickles: none is loaded)"
        )
    if odd := [file for file in files if file.exists() and not file.is_file()]:
        raise UserError(f"{odd[0]}: neither a file nor a folder of them")
    return files


class _Line(BaseModel):
    model_config = ConfigDict(strict=True)

    word: str | None = None
    drawing: list[list[list[Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]]]]


def lines(path: Path, apart: int = 0) -> Iterator[Named]:
    """The drawings of a file, a line each; with `apart` only those that begin about so many bytes apart."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_read(file, apart), 1):
                if number == 1 and (line[:1] == b"\x80" or path.suffix.lower() in (".pkl", ".pickle")):
                    raise UserError(f"{path}: a pickle, which is never loaded; convert it to stroke .ndjson")
                name = str(path) if apart else f"{path}:{number}"
                if len(line) == LINE:
                    raise UserError(f"{name}: a line of {LINE >> 20} MiB is no drawing; split it")
                if line.strip():
                    yield name, partial(_parsed, line)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; set dataset.path or dataset.categories to what is there"
        ) from None


def _read(file: BinaryIO, apart: int) -> Iterator[bytes]:
    """Lines, or those that begin `apart`; of longer ones than any drawing's the first part."""
    while line := file.readline(LINE):
        start = file.tell() - len(line)
        yield line
        if apart and start + apart > file.tell():
            file.seek(start + apart)
            file.readline(LINE)  # the rest of one


def _parsed(line: bytes) -> Drawing:
    """The drawing of a line; Broken if it holds none."""
    try:
        found = _Line.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"][:1])
        raise Broken(f"{where}{first['msg']}") from None
    for k, axes in enumerate(found.drawing):
        if len(axes) < 2 or len(axes[0]) != len(axes[1]):
            raise Broken(f"stroke {k}: needs as many x as y")
    return Drawing([np.array(axes[:2], float).T for axes in found.drawing], found.word)


def kanji(path: Path | None) -> Iterator[Named]:
    """KanjiVG's ideographs, without variants, from the package or from its archive, packed or not."""
    if path is None:
        try:
            files = [Path(f.locate()) for f in metadata.files("kanjivg") or ()]
        except metadata.PackageNotFoundError:
            raise UserError(
                "dataset.source kanjivg: needs its package, pip install 'ebdiff[sketches]', or set "
                "dataset.path to the project's SVG archive"
            ) from None
    elif path.is_dir():
        files = sorted(path / name for name in below(path) if name.endswith(".svg"))
    else:
        archive = opened_zip(path)
        files = [zipfile.Path(archive, name) for name in archive.namelist()]
    found = sorted((f for f in files if _is_ideograph(f.name)), key=lambda f: f.name)
    if not found:
        raise UserError(f"{path or 'kanjivg'}: no KanjiVG files, named as 04e00.svg, in it")
    return ((str(file), partial(_drawn, file)) for file in found)


def _is_ideograph(name: str) -> re.Match | None:
    """Whether a file is named by the code point of a CJK ideograph; those of variants have a longer name."""
    coded = re.fullmatch(r"([0-9a-f]{5})\.svg", name)
    return coded is not None and re.match("CJK .*IDEOGRAPH", unicodedata.name(chr(int(coded[1], 16)), ""))


def _drawn(file: Path | zipfile.Path) -> Drawing:
    """The character of an SVG file, and how it is composed; Broken if it isn't KanjiVG's."""
    try:
        if not file.is_file():  # a pipe would be waited for
            raise Broken("not a file")
        with file.open("rb") as content:
            root = ET.fromstring(content.read(FILE))
    except (ET.ParseError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise Broken(f"not SVG: {error}") from None
    paths = [path.get("d", "") for path in root.iterfind(".//{*}path")]
    return Drawing([stroke for d in paths for stroke in traced(d)], _composition(root))


def _composition(root: ET.Element) -> str:
    """The kind of a character by the place of its first part: KanjiVG's `position`."""
    told = (pair for group in root.iterfind(".//{*}g") for pair in group.items())
    places = (value for key, value in told if key.endswith("}position"))
    kinds = {None: "one piece", "left": "left and right", "right": "left and right", "top": "top and bottom"}
    return kinds.get(next(places, None), "enclosed")


def traced(d: str) -> Strokes:
    """The strokes of an SVG path's data, straight pieces for its curves; Broken if it can't be read."""
    try:
        from svgpathtools import parse_path
    except ImportError:
        raise UserError("SVG paths need svgpathtools: pip install 'ebdiff[sketches]'") from None
    if unknown := re.search(r"[^MmZzLlHhVvCcSsQqTtAaEe\d\s.,+-]", d):
        raise Broken(f"SVG path with the unknown command {unknown[0]!r}")
    try:
        parts = parse_path(d).continuous_subpaths()
        at = np.linspace(0, 1, PIECES + 1)[1:]
        ways = [[part[0].start, *(segment.point(t) for segment in part for t in at)] for part in parts]
    except (ValueError, IndexError, ZeroDivisionError, AssertionError) as error:
        raise Broken(f"SVG path that can't be read: {error}") from None
    strokes = [np.array(way).view(float).reshape(-1, 2) for way in ways]
    if not all(np.isfinite(stroke).all() for stroke in strokes):
        raise Broken("SVG path with numbers that aren't finite")
    return strokes


# --- strokes as sequences -----------------------------------------------------------------------------------


def movements(strokes: Strokes, step: float, simplify: float = 0.0) -> np.ndarray:
    """A drawing as what ChiroDiff denoises: velocities, and where strokes begin.

    Strokes of one point go, the first point becomes the origin, the largest distance from it 1; each stroke
    is resampled at equal arc lengths, then simplified; the largest distance becomes 10. The first point is
    left out, for it is known.

    Args:
        strokes: (n, 2) each, in any units; Broken if nothing is drawn.
        step: arc length between points, of the radius.
        simplify: tolerance, of the radius; 0: none.

    Returns:
        float32 (points - 1, 3): dx, dy, and 1 where a stroke begins, else 0.
    """
    if not strokes:
        raise Broken("no strokes")
    strokes = [stroke for stroke in strokes if len(stroke) > 1]
    if not strokes:
        raise Broken("no stroke has two points")
    radius = max(np.hypot(*(stroke - strokes[0][0]).T).max() for stroke in strokes)
    if not radius > 0:
        raise Broken("all points are the same")
    even = [resampled((stroke - strokes[0][0]) / radius, step) for stroke in strokes]
    if simplify:
        even = [simplified(stroke, simplify) for stroke in even]
    pen = np.repeat(np.arange(len(even)), [len(stroke) for stroke in even])
    return np.diff(np.column_stack([RADIUS * np.concatenate(even), pen]), axis=0).astype(np.float32)


def resampled(stroke: np.ndarray, step: float) -> np.ndarray:
    """Points at equal arc lengths, as near to `step` as fits, both ends among them: at least two."""
    arc = np.concatenate([[0], np.hypot(*np.diff(stroke, axis=0).T).cumsum()])
    at = np.linspace(0, arc[-1], max(2, round(arc[-1] / step) + 1))
    return np.column_stack([np.interp(at, arc, axis) for axis in stroke.T])


def simplified(stroke: np.ndarray, tolerance: float) -> np.ndarray:
    """The points without which the line would be off by more than a tolerance (Douglas and Peucker 1973)."""
    kept, spans = {0, len(stroke) - 1}, [(0, len(stroke) - 1)]
    while spans:
        a, b = spans.pop()
        chord, between = stroke[b] - stroke[a], stroke[a + 1 : b] - stroke[a]
        share = np.clip(between @ chord / max(chord @ chord, 1e-12), 0, 1)
        off = np.hypot(*(between - share[:, None] * chord).T)
        if len(off) and off.max() > tolerance:
            farthest = a + 1 + int(off.argmax())
            kept.add(farthest)
            spans += [(a, farthest), (farthest, b)]
    return stroke[sorted(kept)]


def strokes_of(sequence: np.ndarray, pen: float) -> Strokes:
    """The strokes of a sequence (n, 3) of movements: the inverse of `movements`, up to place and size.

    A stroke begins where the third value is above `pen`; numbers that aren't finite count as 0.
    """
    sequence = np.nan_to_num(sequence.astype(float), nan=0, posinf=0, neginf=0)
    points = np.concatenate([np.zeros((1, 2)), sequence[:, :2].cumsum(axis=0)])
    return np.split(points, 1 + np.flatnonzero(sequence[:, 2] > pen))
