"""Timestep laws: objects that draw (t, weight) for a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
