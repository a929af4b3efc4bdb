"""Memory-mapped uint8 images and the batches drawn from them, a function of (seed, stream, step)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.system.draws import generator
from ebdiff.system.errors import UserError
from ebdiff.system.files import load_memmap


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


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, H, W, C) in 0..255 -> float32 (B, C, H, W) in [-1, 1], on the device of the images."""
    return _scaled(_planar(images))


def _planar(images: Tensor) -> Tensor:
    """uint8 (B, H, W, C) -> (B, C, H, W): moved while a pixel is still one byte."""
    return images.permute(0, 3, 1, 2).contiguous()


def _scaled(planar: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1]."""
    return planar.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> np.ndarray:
    """float (B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C), clipped and rounded."""
    pixels = images.float().clamp(-1, 1).add(1).mul(127.5).round()
    return pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8).contiguous().numpy()


def open_pixels(dataset: str) -> np.ndarray:
    """All images of `resources/data/{dataset}`, uint8 (N, H, W, C), memory-mapped.

    Raises:
        Missing, Unusable: they aren't there, or are no whole file.
    """
    return load_memmap(layout.path(layout.IMAGES, dataset=dataset))


def open_labels(dataset: str) -> np.ndarray:
    """All labels of `resources/data/{dataset}`, int64 (N,), or (0,) where there are none.

    Raises:
        Missing, Unusable: as `open_pixels`.
    """
    return np.array(load_memmap(layout.path(layout.LABELS, dataset=dataset)))


@dataclass(frozen=True)
class Images:
    """A prepared dataset as training sees it.

    Attributes:
        pixels: uint8 (N, H, W, C), memory-mapped.
        flip: whether each image is mirrored with probability 1/2.
    """

    pixels: np.ndarray
    flip: bool

    @classmethod
    def of(cls, experiment: Experiment) -> Images:
        """The training set of an experiment.

        Raises:
            UserError: missing, fewer than the subset, or of another size than the network's.
        """
        dataset, network = experiment.dataset, experiment.network
        pixels = open_pixels(dataset.name)
        size = (network.image_size, network.image_size, network.channels)
        if pixels.shape[1:] != size:
            raise UserError(
                f"dataset {dataset.name} holds images of {pixels.shape[1:]}, but {experiment.name}'s network "
                f"expects {size}; change network.image_size and channels, or give the dataset another name"
            )
        if dataset.subset is not None and dataset.subset > len(pixels):
            raise UserError(
                f"dataset.subset is {dataset.subset}, but {dataset.name} has {len(pixels)} images"
            )
        return cls(pixels[: dataset.subset], dataset.flip)

    def draw(self, size: int, seed: int, stream: str, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Which images the batch of a step holds and which of them are mirrored: (size,) each."""
        indices = batch_indices(len(self.pixels), size, seed, stream, step)
        if not self.flip:
            return indices, np.zeros(size, bool)
        return indices, generator(seed, f"{stream}/flip", step).random(size) < 0.5

    def batch(self, size: int, seed: int, stream: str, step: int) -> Tensor:
        """The training batch of a step: float32 (size, C, H, W) in [-1, 1]."""
        indices, mirrored = self.draw(size, seed, stream, step)
        return mirrored_float(torch.from_numpy(self.pixels[indices]), torch.from_numpy(mirrored))


def mirrored_float(images: Tensor, mirrored: Tensor) -> Tensor:
    """`to_float` of uint8 images (B, H, W, C), those where `mirrored` (B,) holds turned left to right.

    Whole images are picked from both versions: four times as fast on a CPU as choosing pixel by pixel,
    and a GPU needn't wait, as it would for a choice by booleans.
    """
    planar = _planar(images)
    both = torch.cat([planar, planar.flip(3)])
    rows = torch.arange(len(images), device=images.device) + len(images) * mirrored
    return _scaled(both.index_select(0, rows))
