"""Timestep laws: objects that draw (t, weight) for a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ebdiff.diffusion.schedule import alphas_bar
from ebdiff.experiment.schema import Diffusion, Speed


class TimestepLaw(Protocol):
    """How training picks its timesteps."""

    def draw(self, rng: np.random.Generator, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps (batch,) int64 and loss weights (batch,) float32."""
        ...


@dataclass(frozen=True)
class Antithetic:
    """Uniform timesteps on the span [lo, hi), in antithetic pairs t and lo + hi - 1 - t (DDIM).

    Attributes:
        lo, hi: the half-open span.
    """

    lo: int
    hi: int

    def draw(self, rng: np.random.Generator, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps (batch,) int64 and loss weights (batch,) float32, all 1 here."""
        half = rng.integers(self.lo, self.hi, batch // 2 + 1)
        t = np.concatenate([half, self.lo + self.hi - 1 - half])[:batch]
        return t, np.ones(batch, np.float32)


class SpeeD:
    """SpeeD's asymmetric sampling and change-aware weighting (Wang et al. 2024, as its code has them).

    p(t) is k times larger below tau than from tau on, restricted to the span and renormalised. Half the
    batch is drawn, and each t has a partner at the opposite quantile: where t is the u-quantile of p, the
    partner is the (1 - u)-quantile, so that both follow p (of a uniform p they are t and lo + hi - 1 - t).
    Over the whole range SpeeD's code pairs t with M - t instead (t - M from M on), M one past the first t at
    which sqrt(1 - abar) grows by less than 1e-4 a step. For DDPM's schedule M = 642: no partner lies in the
    tail, whose mass is halved. Weights below tau follow the rate of change of 1 - abar, rescaled to
    [1 - lam, lam] over all timesteps; from tau on they are 1.

    Attributes:
        weights: loss weights, (T,) float32.
        pivot: M.
        dual: whether partners add up to M.
    """

    def __init__(self, lo: int, hi: int, diffusion: Diffusion, speed: Speed):
        abar, t = alphas_bar(diffusion), np.arange(diffusion.timesteps)
        self._mass = (np.where(t < speed.tau, speed.k, 1.0) * ((t >= lo) & (t < hi))).cumsum()
        change = np.gradient(1 - abar)
        share = (change - change.min()) / (change.max() - change.min())
        low, high = 1 - speed.lam, speed.lam
        self.weights = np.where(t < speed.tau, low + (high - low) * share, 1.0).astype(np.float32)
        self.pivot = 1 + int(np.argmax(np.gradient(np.sqrt(1 - abar)) < 1e-4))
        self.dual = speed.dual and (lo, hi) == (0, diffusion.timesteps)

    def draw(self, rng: np.random.Generator, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps (batch,) int64 and loss weights (batch,) float32."""
        u, whole = rng.random(batch // 2 + 1), self._mass[-1]
        t = np.searchsorted(self._mass, u * whole, side="right")
        if self.dual:
            partner = np.abs(self.pivot - t)
        else:  # u lies in [0, 1), 1 - u in (0, 1]: the other end is closed
            partner = np.searchsorted(self._mass, (1 - u) * whole, side="left")
        t = np.concatenate([t, partner])[:batch]
        return t, self.weights[t]
