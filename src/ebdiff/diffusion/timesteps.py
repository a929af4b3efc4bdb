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

    p(t) is k times larger below tau than from tau on. Over the whole range half the batch is drawn and
    each t paired with M - t (t - M from M on), M one past the first t at which sqrt(1 - abar) grows by
    less than 1e-4 a step: 642 for DDPM's schedule. Inside a span p is restricted and renormalised, and
    the partner is lo + hi - 1 - t, because M - t would leave the span. Weights below tau follow the rate
    of change of 1 - abar, rescaled to [1 - lam, lam] over all timesteps; from tau on they are 1.

    Attributes:
        probabilities: p over all timesteps before pairing, (T,), zero outside the span.
        weights: loss weights, (T,) float32.
        pivot: M.
    """

    def __init__(self, lo: int, hi: int, diffusion: Diffusion, speed: Speed):
        self.lo, self.hi = lo, hi
        abar, t = alphas_bar(diffusion), np.arange(diffusion.timesteps)
        density = np.where(t < speed.tau, speed.k, 1.0) * ((t >= lo) & (t < hi))
        self.probabilities = density / density.sum()
        self._cumulative = self.probabilities.cumsum()
        change = np.gradient(1 - abar)
        share = (change - change.min()) / (change.max() - change.min())
        low, high = 1 - speed.lam, speed.lam
        self.weights = np.where(t < speed.tau, low + (high - low) * share, 1.0).astype(np.float32)
        self.pivot = 1 + int(np.argmax(np.gradient(np.sqrt(1 - abar)) < 1e-4))
        self.whole = (lo, hi) == (0, diffusion.timesteps)
        self.independent = self.whole and not speed.dual

    def draw(self, rng: np.random.Generator, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps (batch,) int64 and loss weights (batch,) float32."""
        count = batch if self.independent else batch // 2 + 1
        t = np.searchsorted(self._cumulative, rng.random(count) * self._cumulative[-1], side="right")
        if self.whole and not self.independent:
            t = np.concatenate([t, np.abs(self.pivot - t)])
        elif not self.whole:
            t = np.concatenate([t, self.lo + self.hi - 1 - t])
        t = t[:batch]
        return t, self.weights[t]
