"""The batches of a training: drawn as a whole on the host, cut by process, moved to the device.

On a GPU the draws run ahead in other threads and travel through pinned memory, so that the device
never waits for them; the images themselves live there if they fit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ebdiff.data.dataset import Images, mirrored_float
from ebdiff.diffusion.timesteps import TimestepLaw
from ebdiff.system import parallel
from ebdiff.system.draws import generator

AHEAD = 3  # batches drawn before they are needed
BLOCK = 1024  # images copied to a GPU at a time
RESIDENT = 0.25  # share of a GPU's free memory that the images may take

T = TypeVar("T")


class Batch(NamedTuple):
    """This process's share of a global batch, on its device.

    Attributes:
        x0: images, float32 (B, C, H, W) in [-1, 1].
        t: timesteps, int64 (B,).
        weight: loss weights, float32 (B,).
        eps: standard normal noise of the shape of x0.
    """

    x0: Tensor
    t: Tensor
    weight: Tensor
    eps: Tensor

    def parts(self, size: int | None) -> Iterator[Batch]:
        """Micro-batches of up to `size` images; None: the whole."""
        size = size or len(self.t)
        for first in range(0, len(self.t), size):
            yield Batch(*(tensor[first : first + size] for tensor in self))


@dataclass(frozen=True)
class Draws:
    """Draws the batch of any step: a function of (seed, stream, step) alone.

    Attributes:
        images: the training set.
        law: draws (t, weight).
        size: images in the global batch.
        seed, stream: position in the experiment's randomness.
        device: where batches are wanted.
    """

    images: Images
    law: TimestepLaw
    size: int
    seed: int
    stream: str
    device: torch.device

    def batches(self, steps: Iterable[int]) -> Iterator[Batch]:
        """The batches of some steps, in order."""
        resident = self._resident()

        def draw(step: int) -> list[Tensor]:
            indices, mirrored = self.images.draw(self.size, self.seed, self.stream, step)
            t, weight = self.law.draw(generator(self.seed, f"{self.stream}/timestep", step), self.size)
            shape = (self.size, self.images.pixels.shape[3], *self.images.pixels.shape[1:3])
            eps = generator(self.seed, f"{self.stream}/noise", step).standard_normal(shape, np.float32)
            share = parallel.share(self.size)
            pixels = indices[share] if resident is not None else self.images.pixels[indices[share]]
            host = [pixels, mirrored[share], t[share], weight[share], eps[share]]
            return [torch.from_numpy(array) for array in host]

        if self.device.type == "cuda":
            drawn = _ahead(lambda step: [tensor.pin_memory() for tensor in draw(step)], steps)
        else:
            drawn = map(draw, steps)
        for tensors in drawn:
            gpu = self.device.type == "cuda"  # from pinned memory
            pixels, mirrored, t, weight, eps = (x.to(self.device, non_blocking=gpu) for x in tensors)
            if resident is not None:
                pixels = resident[pixels]
            yield Batch(mirrored_float(pixels, mirrored), t, weight, eps)

    def _resident(self) -> Tensor | None:
        """All images as uint8 on the GPU, where they fit; on a CPU they stay memory-mapped."""
        if self.device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self.device)
        if self.images.pixels.nbytes > RESIDENT * free:
            return None
        resident = torch.empty(self.images.pixels.shape, dtype=torch.uint8, device=self.device)
        for first in range(0, len(resident), BLOCK):  # never a second copy on the host
            block = np.array(self.images.pixels[first : first + BLOCK])
            resident[first : first + BLOCK] = torch.from_numpy(block)
        return resident


def _ahead(draw: Callable[[int], T], steps: Iterable[int]) -> Iterator[T]:
    """`map(draw, steps)`, a few calls ahead in other threads; NumPy's draws let go of the interpreter."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque = deque()
        for step in steps:
            waiting.append(pool.submit(draw, step))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
