"""Images that stay encoded on disk (`dataset.store: encoded`): decoded whenever they are asked for.

Kept are the source's own bytes, so that nothing is lost, or the pixels themselves where these take no more.
Decoding applies the rule of `data.images`, with the same pixels as in a raw store (up to what another version
of Pillow makes of a JPEG or WebP).

The file is an npy of uint8 (bytes,): the images one after the other; where each ends, int64 (N,); and how
they become pixels, as JSON, filled up to `TAIL` bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ebdiff.data.images import Broken, Item, pixels
from ebdiff.experiment.members import ImagesConfig
from ebdiff.system.errors import Unusable
from ebdiff.system.files import load_memmap, reading

TAIL = 256
THREADS = len(os.sched_getaffinity(0))  # Pillow's decoders let go of the interpreter


@cache
def _threads() -> ThreadPoolExecutor:
    """Shared, so that however many batches are drawn at a time there is a thread per core."""
    return ThreadPoolExecutor(THREADS)


@dataclass(frozen=True)
class Encoded:
    """Images as an array of pixels, uint8 (N, H, W, C), of which only what is asked for is decoded.

    `images[a:b]` is a view, as of a memory map; `images[indices]` and `np.array(images)` are pixels.
    """

    path: Path  # for messages
    content: np.ndarray  # uint8 (bytes,), memory-mapped
    ends: np.ndarray  # of each image in it, int64
    rule: dict[str, Any]  # size, channels, crop and resize of the dataset
    rows: range  # which images these are

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""
        return len(self), self.rule["size"], self.rule["size"], self.rule["channels"]

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels, once decoded."""
        return math.prod(self.shape)

    def __getitem__(self, key: slice | int | Sequence[int] | np.ndarray) -> Encoded | np.ndarray:
        if isinstance(key, slice):
            return replace(self, rows=self.rows[key])
        if isinstance(key, int | np.integer):
            return self._decoded(self.rows[key])
        rows = [self.rows[i] for i in key]
        found = np.empty((len(rows), *self.shape[1:]), np.uint8)

        def fill(places: np.ndarray) -> None:
            for place in places:
                found[place] = self._decoded(rows[place])

        list(_threads().map(fill, np.array_split(np.arange(len(rows)), THREADS)))
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[range(len(self))].astype(dtype or np.uint8, copy=False)

    def _decoded(self, row: int) -> np.ndarray:
        """The pixels of a stored image, uint8 (H, W, C); Unusable if this machine's Pillow can't read it."""
        stored = self.content[self.ends[row - 1] if row else 0 : self.ends[row]]
        if len(stored) == math.prod(self.shape[1:]):
            return stored.reshape(self.shape[1:])
        try:
            return pixels(Item(f"{self.path}:{row}", stored.tobytes), **self.rule)[0]
        except Broken as error:
            raise Unusable(self.path, f"image {row} can't be decoded here: {error}") from None


def kept(stored: bytes | np.ndarray, found: np.ndarray) -> bytes:
    """What is kept of an image: its bytes, or its pixels `found` if they take no more."""
    return stored if isinstance(stored, bytes) and len(stored) < found.nbytes else found.tobytes()


def index(ends: Sequence[int], dataset: ImagesConfig) -> bytes:
    """What follows the images in their file."""
    rule = {"size": dataset.image_size, **dataset.model_dump(include={"channels", "crop", "resize"})}
    return np.array(ends, "<i8").tobytes() + json.dumps({**rule, "count": len(ends)}).encode().ljust(TAIL)


def open_images(path: Path) -> np.ndarray | Encoded:
    """Prepared images, uint8 (N, H, W, C): memory-mapped, or decoded when they are asked for.

    Raises:
        Missing, Unusable: they aren't there, or are no whole file.
    """
    content = load_memmap(path)
    if content.ndim != 1:
        return content
    with reading(path, ValueError, LookupError, TypeError, AttributeError):
        rule = json.loads(content[-TAIL:].tobytes())
        count = rule.pop("count")
        end = len(content) - TAIL - 8 * count
        ends = content[end:-TAIL].view("<i8")
        if count and ends[-1] != end:
            raise ValueError("its index is no index")
    return Encoded(path, content, ends, rule, range(count))
