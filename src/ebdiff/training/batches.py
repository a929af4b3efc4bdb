"""What a training's steps learn from: drawn as a whole on the host, cut by process, moved to the device.

For a GPU the draws run ahead in other threads and travel through pinned memory, so that the device never
waits for them; for a CPU they run ahead where images are decoded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebdiff.data.dataset import Cond, Dataset, moved
from ebdiff.diffusion.timesteps import TimestepLaw
from ebdiff.system import parallel
from ebdiff.system.ahead import ahead
from ebdiff.system.draws import generator

# Threads that draw, and batches drawn before they are needed: noise of 128 CIFAR-10 images takes 6 ms of a
# core, and a GPU step of a small network as long.
AHEAD = max(3, min(8, len(os.sched_getaffinity(0))))


class Draw(NamedTuple):
    """What this process learns from in a step, on its device.

    Attributes:
        x0: items, float32 (B, *items.shape), about [-1, 1].
        cond: their labels and masks.
        t: timesteps, int64 (B,).
        weight: loss weights, float32 (B,).
        eps: standard normal noise of the shape of x0.
    """

    x0: Tensor
    cond: Cond
    t: Tensor
    weight: Tensor
    eps: Tensor

    def parts(self, size: int | None) -> Iterator[Draw]:
        """Micro-batches of up to `size` items; None: the whole."""
        size = size or len(self.t)
        for first in range(0, len(self.t), size):
            rows = slice(first, first + size)
            yield Draw(self.x0[rows], self.cond.rows(rows), *(tensor[rows] for tensor in self[2:]))


@dataclass(frozen=True)
class Draws:
    """Draws for any step: a function of (seed, stream, step) alone.

    Attributes:
        dataset: the training set.
        law: draws (t, weight).
        size: items in the global batch.
        seed, stream: position in the experiment's randomness.
        device: where batches are wanted.
        label_dropout: share of labels that become the class after the last one.
    """

    dataset: Dataset
    law: TimestepLaw
    size: int
    seed: int
    stream: str
    device: torch.device
    label_dropout: float = 0.0

    def batches(self, steps: Iterable[int]) -> Iterator[Draw]:
        """What some steps learn from, in order."""
        dataset, share = self.dataset.on(self.device), parallel.share(self.size)

        def draw(step: int) -> list[np.ndarray]:
            t, weight = self.law.draw(generator(self.seed, f"{self.stream}/timestep", step), self.size)
            noise = generator(self.seed, f"{self.stream}/noise", step)
            eps = noise.standard_normal((self.size, *dataset.items.shape), np.float32)
            untold = np.zeros(self.size, bool)
            if self.label_dropout:
                untold = (
                    generator(self.seed, f"{self.stream}/label", step).random(self.size) < self.label_dropout
                )
            items = dataset.draw(self.size, self.seed, self.stream, step, share)
            return [t[share], weight[share], eps[share], untold[share], *items]

        early = partial(ahead, threads=AHEAD, most=AHEAD + 1)
        if self.device.type == "cuda":
            drawn = early(lambda step: [torch.from_numpy(a).pin_memory() for a in draw(step)], steps)
        else:
            drawn = (early if dataset.slow else map)(draw, steps)
        for t, weight, eps, untold, *items in drawn:
            x0, cond = dataset.batch(items, self.device)
            t, weight, eps, untold = moved([t, weight, eps, untold], self.device)
            if self.label_dropout:
                cond = cond._replace(label=cond.label.masked_fill(untold, dataset.items.classes))
            yield Draw(x0, cond, t, weight, eps)
