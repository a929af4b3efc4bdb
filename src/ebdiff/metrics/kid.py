"""Kernel distance: the unbiased MMD with a cubic kernel (Bińkowski et al. 2018)."""

from __future__ import annotations

import numpy as np

BLOCK = 2048  # rows per kernel block, so that memory stays bounded


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    """Sum over all pairs of k(x, y) = (x.y / d + 1)^3."""
    return sum(
        float(((x[i : i + BLOCK] @ y[j : j + BLOCK].T / x.shape[1] + 1) ** 3).sum())
        for i in range(0, len(x), BLOCK)
        for j in range(0, len(y), BLOCK)
    )


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """KID of features x (n, d) and y (m, d), n, m >= 2, over all pairs (no random subsets).

    May be slightly negative for equal distributions, being unbiased.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)

    def within(z: np.ndarray) -> float:
        diagonal = ((np.square(z).sum(axis=1) / z.shape[1] + 1) ** 3).sum()
        return (_kernel_sum(z, z) - diagonal) / (len(z) * (len(z) - 1))

    return within(x) + within(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y))
