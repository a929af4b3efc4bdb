"""Latents as training sees them: images that the codec encoded, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ebdiff.data.dataset import Batch, Cond, Dataset, moved, resident, told_labels
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.members import Items
from ebdiff.system.files import load_memmap


@dataclass(frozen=True)
class Latents(Dataset):
    """Encoded images, in the order of the images.

    Attributes:
        items: their shape, and how many classes the network is told.
        latents: float16 (N, c, h, w), memory-mapped.
        labels: the class of each, int64 (N,), where it is told.
        resident: the latents on a GPU, where they fit.
    """

    items: Items
    latents: np.ndarray
    labels: np.ndarray | None = None
    resident: Tensor | None = None

    @classmethod
    def of(cls, experiment: Experiment) -> Latents:
        """The training set of an experiment.

        Raises:
            UserError: missing, or without the classes asked for.
        """
        latents = load_memmap(layout.path(layout.LATENTS, experiment=experiment.name))
        dataset = experiment.dataset
        return cls(experiment.items, latents[: dataset.subset], told_labels(dataset))

    def __len__(self) -> int:
        return len(self.latents)

    def on(self, device: torch.device) -> Latents:
        """With all latents as float16 on the GPU, where they fit; on a CPU they stay memory-mapped."""
        return replace(self, resident=resident(self.latents, device))

    def at(self, indices: np.ndarray) -> list[np.ndarray]:
        """Latents, or indices where all are resident; and labels, where told."""
        latents = indices if self.resident is not None else self.latents[indices]
        return [latents, *([] if self.labels is None else [self.labels[indices]])]

    def batch(self, arrays: Sequence[np.ndarray | Tensor], device: torch.device) -> Batch:
        """Latents (B, c, h, w) as they were encoded, and their labels where these are told."""
        latents, *labels = moved(arrays, device)
        if self.resident is not None:
            latents = self.resident[latents]
        return Batch(latents.float(), Cond(*labels))
