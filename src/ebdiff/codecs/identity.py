"""Items that are images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ebdiff.codecs.codec import Codec
from ebdiff.data.dataset import Cond, to_float, to_uint8


class Identity(Codec):
    """Pixels in [-1, 1] and nothing else."""

    keeps_items = False

    def decode(self, items: Tensor, cond: Cond) -> np.ndarray:
        """Clipped and rounded."""
        return to_uint8(items)

    def encode(self, images: np.ndarray) -> Tensor:
        """Scaled to [-1, 1]."""
        return to_float(torch.from_numpy(images).to(self.device))
