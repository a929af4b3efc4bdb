"""Samplers, as functions of one signature, and the router that sends a timestep to its expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ebdiff.data.dataset import UNCONDITIONAL, Cond
from ebdiff.nets.execution import Eps

Predictor = Callable[[Tensor, int], Tensor]  # eps(x, t), all items at the same timestep
Noise = Callable[[int], Tensor]  # timestep -> fresh noise of the batch's shape


@dataclass(frozen=True)
class Router:
    """eps(x, t, cond) of the ensemble: every timestep goes to the expert whose serve-span holds it.

    Attributes:
        serves: half-open spans that tile [0, T).
        experts: their networks, in the same order, all ready on the device.
        null: the condition without its label, for guidance.
    """

    serves: Sequence[tuple[int, int]]
    experts: Sequence[Eps]
    null: Callable[[Cond], Cond] = lambda cond: cond

    def expert(self, t: int) -> Eps:
        """The network that serves timestep t."""
        return next(e for (lo, hi), e in zip(self.serves, self.experts, strict=True) if lo <= t < hi)

    def __call__(self, x: Tensor, t: int, cond: Cond = UNCONDITIONAL) -> Tensor:
        return self.expert(t)(x, torch.full((len(x),), t, device=x.device), cond)


def guided(
    eps: Callable[[Tensor, int, Cond], Tensor], null: Callable[[Cond], Cond], weight: float
) -> Callable[[Tensor, int, Cond], Tensor]:
    """eps_null + w (eps_cond - eps_null): classifier-free guidance, both passes as one batch.

    In Ho & Salimans (2022, Eq. 6) w is 1 more than theirs: 1 samples as if there were no guidance.

    Args:
        eps: what predicts, such as a router.
        null: the condition without its label.
        weight: w.
    """

    def predict(x: Tensor, t: int, cond: Cond) -> Tensor:
        both = (None if a is None else torch.cat([a, b]) for a, b in zip(cond, null(cond), strict=True))
        told, untold = eps(torch.cat([x, x]), t, Cond(*both)).chunk(2)
        return untold + weight * (told - untold)

    return predict


def ddim(
    denoiser: Predictor, x: Tensor, steps: Sequence[int], abar: np.ndarray, noise: Noise, clamp: bool
) -> Tensor:
    """DDIM with eta = 0 (Song et al. 2021, Eq. 12); needs no fresh noise.

    Args:
        denoiser: eps(x, t).
        x: x_T, standard normal, (B, ...).
        steps: distinct timesteps, ascending; alpha before the first is 1.
        abar: cumulative alphas, (T,).
        noise: unused (one signature for all samplers).
        clamp: clamp the predicted x0 to [-1, 1] and recompute eps from it.

    Returns:
        x_0 of the shape of x, about [-1, 1].
    """
    before = [1.0, *(float(abar[t]) for t in steps[:-1])]
    for t, a_next in zip(reversed(steps), reversed(before), strict=True):
        a = float(abar[t])
        eps = denoiser(x, t)
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        if clamp:
            x0 = x0.clamp(-1, 1)
            eps = (x - a**0.5 * x0) / (1 - a) ** 0.5
        x = a_next**0.5 * x0 + (1 - a_next) ** 0.5 * eps
    return x


def ddpm(
    denoiser: Predictor, x: Tensor, steps: Sequence[int], abar: np.ndarray, noise: Noise, clamp: bool
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2), variance beta_t ("fixedlarge").

    Arguments and result as `ddim`; `noise(t)` is added after every step but the last.
    """
    before = [1.0, *(float(abar[t]) for t in steps[:-1])]
    for t, a_before in zip(reversed(steps), reversed(before), strict=True):
        a = float(abar[t])
        beta = 1 - a / a_before
        eps = denoiser(x, t)
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        if clamp:
            x0 = x0.clamp(-1, 1)
        # Posterior mean of q(x_{t-1} | x_t, x0), Eq. 7.
        x = (a_before**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - a_before) * x) / (1 - a)
        if t != steps[0]:
            x = x + beta**0.5 * noise(t)
    return x


SAMPLERS = {"ddim": ddim, "ddpm": ddpm}
