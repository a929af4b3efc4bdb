"""The process that training and gradient criteria share: noising items and the loss of predicted noise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ebdiff.diffusion.schedule import alphas_bar
from ebdiff.experiment.schema import Diffusion


@cache
def _levels(diffusion: Diffusion, device: torch.device) -> Tensor:
    """Signal and noise level of every timestep, float32 (2, T): once per device, for good: graphs read it."""
    abar = alphas_bar(diffusion)
    return torch.from_numpy(np.sqrt([abar, 1 - abar])).to(device, torch.float32)


def _along(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor of `other`'s first axes, broadcastable over the rest."""
    return tensor.reshape(*tensor.shape, *(1,) * (other.dim() - tensor.dim()))


@dataclass(frozen=True)
class Process:
    """q(x_t | x_0) and the loss, as `diffusion` describes them.

    Attributes:
        diffusion: schedule and loss.
    """

    diffusion: Diffusion

    @property
    def abar(self) -> np.ndarray:
        """Cumulative alphas, float64 (T,)."""
        return alphas_bar(self.diffusion)

    def noised(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (DDPM Eq. 4).

        Args:
            x0: items (B, ...).
            t: timesteps, int64 (B,).
            eps: standard normal noise of the shape of x0.
        """
        signal, sigma = (_along(level, x0) for level in _levels(self.diffusion, x0.device)[:, t])
        return signal * x0 + sigma * eps

    def loss(self, predicted: Tensor, eps: Tensor, mask: Tensor | None = None) -> Tensor:
        """The error of predicted noise, summed over each item or averaged over its values: (B,).

        Args:
            predicted, eps: (B, ...).
            mask: which entries of the first axis of an item count, bool (B, L); None: all.
        """
        apart = predicted - eps
        if mask is not None:
            apart = apart.masked_fill(~_along(mask, apart), 0)
        error = apart.abs() if self.diffusion.error == "l1" else apart.square()
        total = error.sum(dim=tuple(range(1, error.dim())))
        if self.diffusion.loss == "sum":
            return total
        values = error[0].numel()  # of an item; masked, as many of them as entries are its own
        return total / (values if mask is None else mask.sum(dim=1) * (values // mask.shape[1]))
