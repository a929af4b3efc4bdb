"""Kernel distance: the unbiased MMD with a cubic kernel (Bińkowski et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

BLOCK = 2048  # rows per block, so that memory stays bounded
CPU = torch.device("cpu")


def blocks(features: np.ndarray, device: torch.device = CPU) -> Iterator[Tensor]:
    """Features (n, d), in memory or memory-mapped, as float64 blocks on the device."""
    for first in range(0, len(features), BLOCK):
        yield torch.tensor(features[first : first + BLOCK], dtype=torch.float64, device=device)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """k(x, y) = (x.y / d + 1)^3 of rows (n, d) and (m, d): (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def across(x: np.ndarray, y: np.ndarray, device: torch.device = CPU) -> float:
    """Mean kernel over all pairs of a row of x (n, d) and one of y (m, d)."""
    total = sum(float(_kernel(a, b).sum()) for a in blocks(x, device) for b in blocks(y, device))
    return total / (len(x) * len(y))


def within(x: np.ndarray, device: torch.device = CPU) -> float:
    """Mean kernel over all pairs of different rows of x (n, d), n >= 2.

    The kernel is symmetric: a block meets itself and the ones after it.
    """
    total, n = 0.0, len(x)
    for first, a in zip(range(0, n, BLOCK), blocks(x, device), strict=True):
        square = _kernel(a, a)
        total += float(square.sum() - square.trace())
        total += 2 * sum(float(_kernel(a, b).sum()) for b in blocks(x[first + BLOCK :], device))
    return total / (n * (n - 1))


def kernel_distance(
    x: np.ndarray, y: np.ndarray, device: torch.device = CPU, *, within_y: float | None = None
) -> float:
    """KID of features x (n, d) and y (m, d), n, m >= 2, over all pairs (no random subsets), in float64.

    Args:
        x, y: features, in memory or memory-mapped; read block by block.
        device: where the products are taken.
        within_y: `within(y)` where it is known already.

    Returns:
        the distance; slightly negative at times for equal distributions, being unbiased.
    """
    known = within(y, device) if within_y is None else within_y
    return within(x, device) + known - 2 * across(x, y, device)
