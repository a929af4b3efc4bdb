"""Latents as training sees them: images that the codec encoded, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ebdiff.data.dataset import Batch, Cond, Stored, moved, told_labels
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.system.files import load_memmap


@dataclass(frozen=True)
class Latents(Stored):
    """Encoded images in the order of the images, float16 (N, c, h, w)."""

    @classmethod
    def of(cls, experiment: Experiment) -> Latents:
        latents = load_memmap(layout.path(layout.LATENTS, experiment=experiment.name))
        dataset = experiment.dataset
        return cls(experiment.items, latents[: dataset.subset], told_labels(dataset))

    def batch(self, arrays: Sequence[np.ndarray | Tensor], device: torch.device) -> Batch:
        """Latents (B, c, h, w) as they were encoded, and their labels where these are told."""
        latents, *labels = moved(arrays, device, self.resident)
        return Batch(latents.float(), Cond(*labels))
