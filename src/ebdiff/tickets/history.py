"""Mask histories, Hamming distances, the early-bird rule and its controls.

A search leaves one mask per interval and rate. A ticket is drawn at the first interval whose mask
lies within a threshold of each of the `window - 1` masks before it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.records import Work
from ebdiff.experiment.schema import INITIAL
from ebdiff.system.errors import Unusable
from ebdiff.system.files import read_arrays, read_json, write_arrays, write_json

if TYPE_CHECKING:  # torch takes longer to import than a matrix takes to make
    from ebdiff.pruning.graph import Group


def hamming(a: np.ndarray, b: np.ndarray, length: int) -> np.ndarray:
    """Share of differing entries between packed masks.

    Args:
        a, b: uint8 from `np.packbits`, or `words` of them; broadcastable, bytes last.
        length: entries of an unpacked mask.

    Returns:
        float distances in [0, 1], of the broadcast shape without its last axis.
    """
    return np.bitwise_count(a ^ b).sum(axis=-1, dtype=np.uint32) / length


def words(masks: np.ndarray) -> np.ndarray:
    """Packed masks (n, bytes) as 64-bit words (n, bytes / 8), padded with zeros: eight times fewer counts."""
    return np.pad(masks, ((0, 0), (0, -masks.shape[1] % 8))).view(np.uint64)


def settled(masks: np.ndarray, length: int, window: int, threshold: float) -> bool:
    """The early-bird rule on the masks so far, newest last: (n, bytes) packed.

    Only the newest is compared, with each of the `window - 1` before it; equality with the
    threshold counts as settled (the official code rejects on > only).
    """
    return len(masks) >= window and bool((last_distances(masks, length, window) <= threshold).all())


def last_distances(masks: np.ndarray, length: int, window: int) -> np.ndarray:
    """Distances of the newest mask to each of the up to `window - 1` before it, oldest first."""
    return hamming(masks[-1], masks[-window:-1], length)


def recent_distances(masks: np.ndarray, length: int, window: int) -> np.ndarray:
    """Distances of every mask (n, bytes) to each of the `window - 1` before it, oldest first.

    Returns:
        float (n, window - 1), NaN where there is no mask so far back.
    """
    found, packed = np.full((len(masks), window - 1), np.nan), words(masks)
    for back in range(1, min(window, len(masks))):
        found[back:, -back] = hamming(packed[back:], packed[:-back], length)
    return found


def first_settled(masks: np.ndarray, length: int, window: int, threshold: float) -> int | None:
    """Index of the first interval at which the rule holds, or None."""
    holds = (recent_distances(masks, length, window) <= threshold).all(axis=1)
    return int(holds.argmax()) if holds.any() else None


def chance(mask: np.ndarray, widths: Sequence[int]) -> float:
    """Expected distance of two independent masks of the same sizes.

    Entry-weighted mean over groups of 2 p (1 - p), p the share that the group really lost.

    Args:
        mask: bool, unpacked, True = kept.
        widths: channels of each group, in order.
    """
    parts = np.split(mask, np.cumsum(widths)[:-1])
    return float(sum(2 * p.mean() * (1 - p.mean()) * len(p) for p in parts) / len(mask))


@dataclass
class History:
    """Masks of one criterion and one kind of weights over the intervals of a search.

    Attributes:
        rates: asked rates, R of them.
        names, widths: the groups the mask entries belong to, checked on loading.
        initial: packed masks of the initial weights, (R, bytes) uint8, or None for gradient criteria
            and `final`.
        masks: one (R, bytes) array per interval, oldest first.
    """

    rates: tuple[float, ...]
    names: tuple[str, ...]
    widths: tuple[int, ...]
    initial: np.ndarray | None = None
    masks: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def empty(cls, rates: tuple[float, ...], groups: tuple[Group, ...]) -> History:
        """A history of no intervals yet."""
        return cls(tuple(rates), tuple(g.name for g in groups), tuple(g.width for g in groups))

    @property
    def length(self) -> int:
        """Entries of one mask."""
        return sum(self.widths)

    @property
    def sound(self) -> bool:
        """Whether types and shapes are those of a history and fit each other."""
        if not all(isinstance(w, int) and w > 0 for w in self.widths) or len(self.names) != len(self.widths):
            return False
        shape = len(self.rates), -(-self.length // 8)
        stacks = [*self.masks, *([] if self.initial is None else [self.initial])]
        return (
            bool(self.masks)
            and all(isinstance(r, float) for r in self.rates)
            and all(a.dtype == np.uint8 and a.shape == shape for a in stacks)
        )

    def of_rate(self, rate: float, first: int = 0, until: int | None = None) -> np.ndarray:
        """Masks of a rate over the intervals [first, until), packed: (intervals, bytes) uint8."""
        row = self.rates.index(rate)
        return np.stack([masks[row] for masks in self.masks[first:until]])

    def mask(self, rate: float, interval: int) -> np.ndarray:
        """One mask, unpacked: bool (length,), True = kept; at `INITIAL` that of the initial weights."""
        packed = (self.initial if interval == INITIAL else self.masks[interval])[self.rates.index(rate)]
        return np.unpackbits(packed, count=self.length).astype(bool)

    def distances(self, rate: float) -> np.ndarray:
        """Hamming matrix of all intervals, float32 (n, n)."""
        packed = words(self.of_rate(rate))
        matrix = np.zeros((len(packed), len(packed)), np.float32)
        for i, row in enumerate(packed):
            matrix[i, i:] = matrix[i:, i] = hamming(row, packed[i:], self.length)
        return matrix

    def to_initial(self, rate: float) -> np.ndarray:
        """Distance of each interval's mask to the initial one (n,); NaN where that isn't known."""
        if self.initial is None:
            return np.full(len(self.masks), np.nan)
        return hamming(self.of_rate(rate), self.initial[self.rates.index(rate)], self.length)

    def arrays(self) -> dict[str, np.ndarray]:
        """The history as named arrays, for npz and safetensors alike."""
        size = len(np.packbits(np.zeros(self.length, bool)))
        masks = np.stack(self.masks) if self.masks else np.zeros((0, len(self.rates), size), np.uint8)
        arrays = {"rates": np.array(self.rates), "widths": np.array(self.widths), "masks": masks}
        return arrays | ({} if self.initial is None else {"initial": self.initial})


def save_histories(path: Path, histories: dict[str, History]) -> None:
    """Write the histories of several kinds of weights to one npz: arrays named `{weights}.{array}`."""
    first = next(iter(histories.values()))
    arrays = {f"{k}.{name}": a for k, h in histories.items() for name, a in h.arrays().items()}
    write_arrays(path, **arrays, names=np.array(first.names))


def load_history(path: Path, weights: str, groups: tuple[Group, ...] | None = None) -> History:
    """Read one history and check that it belongs to the network of these groups, where they are given.

    Raises:
        UserError: unreadable, without these weights, or of another network.
    """
    arrays = read_arrays(path)
    try:
        history = History(
            tuple(arrays[f"{weights}.rates"].tolist()),
            tuple(arrays["names"].tolist()),
            tuple(arrays[f"{weights}.widths"].tolist()),
            arrays.get(f"{weights}.initial"),
            list(arrays[f"{weights}.masks"]),
        )
    except KeyError as missing:
        raise Unusable(path, f"has no {missing.args[0]}") from None
    except TypeError:  # a number where a row of them should be
        history = None
    if history is None or not history.sound:
        raise Unusable(path, "its arrays don't fit each other")
    found = list(zip(history.names, history.widths, strict=True))
    if groups is not None and found != [(g.name, g.width) for g in groups]:
        raise Unusable(path, "masks of another network, or in another order")
    return history


def take_masks(experiment: Experiment, search: str, weights: str, seed: int) -> None:
    """Select the magnitude masks that a search took while training (verb `prune-per-epoch`)."""
    began = time.perf_counter()
    ticket = dict(seed=seed, search=search, criterion="magnitude", weights=weights)
    work = Work(experiment, "prune-per-epoch", **ticket)
    history = load_history(work.path(layout.DENSE_MASKS), weights)
    save_histories(work.path(layout.MASKS), {weights: history})
    seconds = round(time.perf_counter() - began, 3)
    entry = {**ticket, "seconds": seconds, "masks": len(history.masks) * len(history.rates)}
    write_json(work.path(layout.MASKS_LEDGER), entry)
    work.end()


def hamming_matrix(experiment: Experiment, search: str, criterion: str, weights: str, seed: int) -> None:
    """All distances of a mask history, to the initial mask too, and chance (verb `hamming-matrix`)."""
    where = dict(seed=seed, search=search, criterion=criterion, weights=weights)
    work = Work(experiment, "hamming-matrix", **where)
    history, rule = load_history(work.path(layout.MASKS), weights), experiment.searches[search]
    write_arrays(
        work.path(layout.HAMMING),
        rates=np.array(history.rates),
        intervals=np.arange(len(history.masks)),
        matrix=np.stack([history.distances(r) for r in history.rates]),
        initial=np.stack([history.to_initial(r) for r in history.rates]),
        chance=np.array([chance(history.mask(r, 0), history.widths) for r in history.rates]),
        window=np.array(rule.window),
        threshold=np.array(rule.threshold),
        interval_steps=np.array(interval_steps(experiment, search)),
        unit=np.array(rule.interval.unit),
    )
    work.end()


def interval_steps(experiment: Experiment, search: str) -> int:
    """Optimiser steps per interval of a search on the prepared dataset."""
    manifest = read_json(layout.path(layout.MANIFEST, dataset=experiment.dataset.name))
    return experiment.interval_steps(search, manifest["count"])
