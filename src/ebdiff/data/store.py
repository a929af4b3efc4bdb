"""Memory-mapped uint8 images and the batches drawn from them, a function of (seed, stream, step)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ebdiff import layout
from ebdiff.draws import generator
from ebdiff.errors import UserError
from ebdiff.files import load_memmap, read_json


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, stream: str, number: int) -> np.ndarray:
    return generator(seed, f"{stream}/order", number).permutation(count)


def batch_indices(count: int, batch: int, seed: int, stream: str, step: int) -> np.ndarray:
    """Which images step `step` uses: one endless row of permutations, cut into full batches.

    Args:
        count: images in the training set.
        batch: images per step.
        seed, stream, step: position in the experiment's randomness.

    Returns:
        int64 indices, shape (batch,).
    """
    positions = np.arange(step * batch, (step + 1) * batch)
    numbers = positions // count
    indices = np.empty(batch, np.int64)
    for number in np.unique(numbers):
        here = numbers == number
        indices[here] = _permutation(count, seed, stream, int(number))[positions[here] % count]
    return indices


def to_float(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, C) in 0..255 -> float32 (B, C, H, W) in [-1, 1]."""
    return torch.tensor(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def to_uint8(images: Tensor) -> np.ndarray:
    """float (B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C), clipped and rounded."""
    pixels = images.float().clamp(-1, 1).add(1).mul(127.5).round()
    return pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8).contiguous().numpy()


@dataclass(frozen=True)
class Images:
    """A prepared dataset as training sees it.

    Attributes:
        pixels: uint8 (N, H, W, C), memory-mapped.
        flip: whether each image is mirrored with probability 1/2.
        sha256: hash of the image file, from its manifest.
    """

    pixels: np.ndarray
    flip: bool
    sha256: str

    @classmethod
    def open(cls, dataset: str, *, flip: bool = False, subset: int | None = None) -> Images:
        """Open `resources/data/{dataset}`.

        Raises:
            UserError: the images are missing, damaged, fewer than the subset, or not those of
                the manifest.
        """
        path = layout.path(layout.IMAGES, dataset=dataset)
        pixels, manifest = load_memmap(path), read_json(layout.path(layout.MANIFEST, dataset=dataset))
        if list(pixels.shape) != [manifest["count"], *manifest["shape"]] or pixels.dtype != np.uint8:
            raise UserError(f"{path}: not the images of its manifest; delete the folder and run again")
        if subset is not None and subset > len(pixels):
            raise UserError(f"dataset.subset is {subset}, but {dataset} has {len(pixels)} images")
        return cls(pixels[:subset], flip, manifest["sha256"])

    def batch(self, size: int, seed: int, stream: str, step: int) -> Tensor:
        """The training batch of a step: float32 (size, C, H, W) in [-1, 1]."""
        images = self.pixels[batch_indices(len(self.pixels), size, seed, stream, step)]
        if self.flip:
            mirrored = generator(seed, f"{stream}/flip", step).random(size) < 0.5
            images[mirrored] = images[mirrored, :, ::-1]
        return to_float(images)
