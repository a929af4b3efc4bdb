"""Precision and recall of generated images (Kynkäänniemi et al. 2019), block by block."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ebdiff.errors import UserError
from ebdiff.metrics.kid import CPU, blocks

NEIGHBOUR = 3  # k of the paper's Section 3


def radii(x: np.ndarray, device: torch.device = CPU, k: int = NEIGHBOUR) -> list[Tensor]:
    """Distance of each row of x (n, d) to its k-th nearest other row, as blocks of `blocks(x)`.

    Raises:
        UserError: x has no k other rows.
    """
    if len(x) <= k:
        raise UserError(f"precision and recall need more than {k} images on each side, not {len(x)}")
    found = []
    for i, a in enumerate(blocks(x, device)):
        nearest = torch.full((len(a), k), torch.inf, dtype=a.dtype, device=device)
        for j, b in enumerate(blocks(x, device)):
            apart = torch.cdist(a, b)
            if i == j:
                apart.fill_diagonal_(torch.inf)  # a row is not its own neighbour
            nearest = torch.cat([nearest, apart], dim=1).topk(k, largest=False).values
        found.append(nearest[:, -1])
    return found


def share_covered(x: np.ndarray, y: np.ndarray, reach: list[Tensor], device: torch.device = CPU) -> float:
    """Share of the rows of x (n, d) that lie within reach of some row of y (m, d): equation (1)."""
    covered = 0
    for a in blocks(x, device):
        inside = torch.zeros(len(a), dtype=torch.bool, device=device)
        for b, radius in zip(blocks(y, device), reach, strict=True):
            inside |= (torch.cdist(a, b) <= radius).any(dim=1)
        covered += int(inside.sum())
    return covered / len(x)


def precision_recall(
    generated: np.ndarray, real: np.ndarray, device: torch.device = CPU
) -> tuple[float, float]:
    """Precision and recall of features (n, d) and (m, d): equation (2), k = 3, over all images.

    Precision is the share of generated images within the real manifold, recall the share of real ones
    within the generated manifold. Both depend on n and m: compare equal counts only.

    Raises:
        UserError: three images or fewer on a side.
    """
    precision = share_covered(generated, real, radii(real, device), device)
    return precision, share_covered(real, generated, radii(generated, device), device)
