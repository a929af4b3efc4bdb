"""Items in a fixed order and the batches drawn from them, a function of (seed, stream, step).

`Dataset` is what every source of items gives to training and sampling, `Stored` what the built-in ones have
in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebdiff.data.encoded import Encoded, open_images
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.members import DATASETS, DatasetConfig, Items
from ebdiff.system.draws import generator
from ebdiff.system.errors import UserError
from ebdiff.system.files import load_memmap, read_json

BLOCK = 1024  # items copied to a GPU at a time
RESIDENT = 0.25  # share of a GPU's free memory that the items may take


class Cond(NamedTuple):
    """What a denoiser is told of its items beside their noisy values; None where there is nothing."""

    label: Tensor | None = None  # classes, int64 (B,)
    mask: Tensor | None = None  # which of an item's entries are no padding, bool (B, L)

    def rows(self, rows: slice | Tensor) -> Cond:
        """Of some of the items."""
        return Cond(*(None if part is None else part[rows] for part in self))

    def to(self, device: torch.device) -> Cond:
        """On a device."""
        return Cond(*(None if part is None else part.to(device) for part in self))


UNCONDITIONAL = Cond()


class Batch(NamedTuple):
    """Some items on a device."""

    x0: Tensor  # float32 (B, *items.shape), about [-1, 1]; padding is zero
    cond: Cond


class Dataset:
    """A training set. Host arrays are drawn, cut by process and moved by `batch`."""

    items: Items  # what it holds
    lengths: np.ndarray  # entries of the first axis, int64 (N,), where items vary in that

    @classmethod
    def of(cls, experiment: Experiment) -> Dataset:
        """The training set of an experiment; UserError where it is missing or damaged.

        That images, labels and manifest are what was prepared is checked before; what a member keeps
        beside them it checks itself, against the manifest.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def slow(self) -> bool:
        """Whether items are worth drawing ahead on a CPU too."""
        return False

    def on(self, device: torch.device) -> Dataset:
        """The same for batches on a device: there already as a whole, if it fits."""
        return self

    def at(self, indices: np.ndarray) -> list[np.ndarray]:
        """Host arrays of given items as they are, from which `batch` makes a batch: (n, ...) each."""
        raise NotImplementedError

    def draw(
        self, size: int, seed: int, stream: str, step: int, share: slice = slice(None)
    ) -> list[np.ndarray]:
        """Host arrays of a process's `share` of the global batch of a step, which has `size` items."""
        return self.at(batch_indices(len(self), size, seed, stream, step)[share])

    def batch(self, arrays: Sequence[np.ndarray | Tensor], device: torch.device) -> Batch:
        """The items of host arrays (or pinned tensors) on a device."""
        raise NotImplementedError


def conditions(items: Items, lengths: np.ndarray | None, seed: int, indices: Sequence[int]) -> Cond:
    """What the samples of given numbers are asked to be, a function of (seed, number).

    Labels go by turns, so that they are balanced; lengths are drawn among those of the training set, int64
    (N,), where items vary in that.
    """
    label = torch.as_tensor(indices) % items.classes if items.classes else None
    if lengths is None:
        return Cond(label)
    drawn = [generator(seed, "sample/lengths", i).integers(len(lengths)) for i in indices]
    return Cond(label, inside(torch.from_numpy(lengths[drawn]), items.shape[0]))


def inside(lengths: Tensor, longest: int) -> Tensor:
    """Which places of padded sequences are their own: bool (B, longest)."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def open_dataset(experiment: Experiment) -> Dataset:
    """The training set of an experiment, encoded where its codec does so; see `Dataset.of`.

    Raises:
        UserError: the experiment asks for more items than there are.
    """
    manifest = read_json(layout.path(layout.MANIFEST, dataset=experiment.dataset.name))
    try:
        experiment.check_count(manifest["count"])
    except ValueError as error:
        raise UserError(f"{experiment.name}: {error}") from None
    if experiment.codec.ENCODED:
        return Latents.of(experiment)
    return DATASETS.member(experiment.dataset.source).of(experiment)


def resident(rows: np.ndarray, device: torch.device) -> Tensor | None:
    """All of a memory-mapped array on a GPU, if it fits; None if it doesn't, and on a CPU."""
    if device.type != "cuda" or rows.nbytes > RESIDENT * torch.cuda.mem_get_info(device)[0]:
        return None
    copied = torch.from_numpy(np.array(rows[:0])).new_empty(rows.shape, device=device)
    for first in range(0, len(rows), BLOCK):  # never a second copy on the host
        copied[first : first + BLOCK] = torch.from_numpy(np.array(rows[first : first + BLOCK]))
    return copied


def moved(
    arrays: Sequence[np.ndarray | Tensor], device: torch.device, resident: Tensor | None = None
) -> list[Tensor]:
    """Host arrays on a device, the first taken from `resident` where it holds indices into that.

    From pinned memory nothing waits for them.
    """
    first, *others = (torch.as_tensor(array).to(device, non_blocking=True) for array in arrays)
    return [first if resident is None else resident[first], *others]


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, stream: str, number: int) -> np.ndarray:
    return generator(seed, f"{stream}/order", number).permutation(count)


def batch_indices(count: int, batch: int, seed: int, stream: str, step: int) -> np.ndarray:
    """Which of `count` items a step uses, int64 (batch,): endless permutations in a row, cut into batches."""
    positions = np.arange(step * batch, (step + 1) * batch)
    numbers = positions // count
    indices = np.empty(batch, np.int64)
    for number in np.unique(numbers):
        here = numbers == number
        indices[here] = _permutation(count, seed, stream, int(number))[positions[here] % count]
    return indices


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, H, W, C) in 0..255 -> float32 (B, C, H, W) in [-1, 1], on the device of the images."""
    planar = images.permute(0, 3, 1, 2).contiguous()  # moved while a pixel is still one byte
    return planar.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> np.ndarray:
    """float (B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C), clipped and rounded."""
    pixels = images.float().clamp(-1, 1).add(1).mul(127.5).round()
    return pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8).contiguous().numpy()


def open_pixels(dataset: str) -> np.ndarray | Encoded:
    """All images of `resources/data/{dataset}`, uint8 (N, H, W, C); see `open_images`."""
    return open_images(layout.path(layout.IMAGES, dataset=dataset))


def open_held_out(dataset: str) -> np.ndarray | Encoded:
    """The images that no training sees, perhaps none; otherwise as `open_pixels`."""
    return open_images(layout.path(layout.HELD_OUT, dataset=dataset))


def open_labels(dataset: str) -> np.ndarray:
    """All labels, int64 (N,), or (0,) where there are none; otherwise as `open_pixels`."""
    return np.array(load_memmap(layout.path(layout.LABELS, dataset=dataset)))


def told_labels(dataset: DatasetConfig) -> np.ndarray | None:
    """The class of every item of a training set, int64 (N,); None where the network is told none.

    Raises:
        UserError: the data have none, or one that isn't among `dataset.classes`.
    """
    if not (classes := dataset.items.classes):
        return None
    labels = open_labels(dataset.name)[: dataset.subset]
    if not len(labels):
        raise UserError(f"dataset.classes is {classes}, but {dataset.name} has no labels; set it to null")
    for extreme in (labels.min(), labels.max()):
        if not 0 <= extreme < classes:
            raise UserError(
                f"dataset.classes is {classes}, but {dataset.name} holds the label {extreme}, which is none "
                f"of 0 to {classes - 1}"
            )
    return labels


@dataclass(frozen=True)
class Stored(Dataset):
    """Items that lie in one file, in order."""

    items: Items
    rows: np.ndarray | Encoded  # (N, ...), memory-mapped
    labels: np.ndarray | None = None  # classes, int64 (N,), where the network is told
    lengths: np.ndarray | None = None
    resident: Tensor | None = None  # the rows on a GPU, where they fit

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def slow(self) -> bool:
        """Whether items are decoded for every batch."""
        return isinstance(self.rows, Encoded)

    def on(self, device: torch.device) -> Stored:
        """With all rows on the GPU, where they fit; on a CPU they stay memory-mapped."""
        return replace(self, resident=resident(self.rows, device))

    def at(self, indices: np.ndarray) -> list[np.ndarray]:
        """Rows, or indices where all are resident; and labels or lengths, where there are any."""
        rows = indices if self.resident is not None else self.rows[indices]
        return [rows, *(told[indices] for told in (self.labels, self.lengths) if told is not None)]


@dataclass(frozen=True)
class Images(Stored):
    """Prepared images, uint8 (N, H, W, C), each mirrored with probability 1/2 where `flip` says so."""

    flip: bool = False

    @classmethod
    def of(cls, experiment: Experiment) -> Images:
        dataset = experiment.dataset
        pixels = open_pixels(dataset.name)
        size = (dataset.image_size, dataset.image_size, dataset.channels)
        if pixels.shape[1:] != size:
            raise UserError(
                f"dataset {dataset.name} holds images of {pixels.shape[1:]}, but {experiment.name} asks for "
                f"{size}; change dataset.image_size and channels, or give the dataset another name"
            )
        return cls(dataset.items, pixels[: dataset.subset], told_labels(dataset), flip=dataset.flip)

    def at(self, indices: np.ndarray) -> list[np.ndarray]:
        """Pixels or indices, labels where told, and which are mirrored: none."""
        return [*super().at(indices), np.zeros(len(indices), bool)]

    def draw(
        self, size: int, seed: int, stream: str, step: int, share: slice = slice(None)
    ) -> list[np.ndarray]:
        """As `at`, of the batch of a step, with which of them are mirrored."""
        *arrays, mirrored = super().draw(size, seed, stream, step, share)
        if self.flip:
            mirrored = (generator(seed, f"{stream}/flip", step).random(size) < 0.5)[share]
        return [*arrays, mirrored]

    def batch(self, arrays: Sequence[np.ndarray | Tensor], device: torch.device) -> Batch:
        """Images (B, C, H, W) in [-1, 1], and their labels where these are told.

        Whole images are picked from both versions: faster on a CPU than choosing pixel by pixel, and a GPU
        needn't wait, as it would for a choice by booleans.
        """
        pixels, *labels, mirrored = moved(arrays, device, self.resident)
        planar = pixels.permute(0, 3, 1, 2).contiguous()  # whose rows turn faster
        both = torch.cat([planar, planar.flip(3)])
        rows = torch.arange(len(pixels), device=device) + len(pixels) * mirrored
        return Batch(to_float(both.index_select(0, rows).permute(0, 2, 3, 1)), Cond(*labels))


class Latents(Stored):
    """Images that the codec encoded, once, in the order of the images: float16 (N, c, h, w)."""

    @classmethod
    def of(cls, experiment: Experiment) -> Latents:
        latents = load_memmap(layout.path(layout.LATENTS, experiment=experiment.name))
        dataset = experiment.dataset
        return cls(experiment.items, latents[: dataset.subset], told_labels(dataset))

    def batch(self, arrays: Sequence[np.ndarray | Tensor], device: torch.device) -> Batch:
        """Latents (B, c, h, w) as they were encoded, and their labels where these are told."""
        latents, *labels = moved(arrays, device, self.resident)
        return Batch(latents.float(), Cond(*labels))
