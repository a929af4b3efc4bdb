"""All randomness: a pure function of (seed, stream, position).

Seeds are mixed by `SeedSequence`, never added or shifted, so two seeds or two streams never share
a draw, and any step's draws can be made again without making the ones before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=256)
def _words(stream: str) -> tuple[int, ...]:
    """A stream's name as four 32-bit words."""
    return tuple(np.frombuffer(hashlib.sha256(stream.encode()).digest()[:16], "<u4").tolist())


def generator(seed: int, stream: str, *position: int) -> np.random.Generator:
    """A generator for one use of one stream.

    Args:
        seed: the experiment's seed, >= 0.
        stream: who draws and what for, such as ``dense/full/noise``.
        position: the step, or (image, step), >= 0 each.
    """
    sequence = np.random.SeedSequence((seed, *_words(stream), *position))
    return np.random.Generator(np.random.Philox(sequence))


def item_noise(seed: int, indices: Sequence[int], step: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise for sampled items, float32 of shape (len(indices), *shape).

    Item i's noise depends on (seed, i, step) alone: not on the run, the batch or the shard.
    """
    noise = np.empty((len(indices), *shape), np.float32)
    for row, index in zip(noise, indices, strict=True):
        generator(seed, "sample/noise", index, step).standard_normal(out=row, dtype=np.float32)
    return noise
