"""Distances between sets of features: Fréchet, kernel (KID), precision and recall, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ebdiff.system.errors import UserError

ROWS = 1024  # read at a time by the Gaussian fit, so that memory holds the statistics and little more
BLOCK = 2048  # rows per block of the pairwise measures
NEIGHBOUR = 3  # k of precision and recall (Kynkäänniemi et al. 2019, Section 3)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Gaussian:
    """Mean (d,), covariance (d, d), both float64, and the number of features they came from."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int

    @classmethod
    def fit(cls, features: np.ndarray, block: int = ROWS) -> Gaussian:
        """Mean and unbiased covariance of features (n, d), n >= 2, in memory or memory-mapped.

        Blocks are merged by the pairwise update of Chan, Golub and LeVeque (1983): no cancellation,
        whatever the mean, and every row counts.
        """
        count, mean, scatter = 0, np.zeros(()), np.zeros(())
        for first in range(0, len(features), block):
            rows = np.asarray(features[first : first + block], np.float64)
            here = rows.mean(axis=0)
            centred, apart = rows - here, here - mean
            scatter = scatter + centred.T @ centred
            scatter += np.outer(apart, apart) * (count * len(rows) / (count + len(rows)))
            count += len(rows)
            mean = mean + apart * (len(rows) / count)
        if count < 2:
            raise UserError(f"a distance needs at least 2 images on each side, not {count}")
        return cls(mean, scatter / (count - 1), count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Dowson and Landau 1982; Heusel et al. 2017).

    The trace of the root is the sum of the roots of the eigenvalues of F' C2 F, where C1 = F F': a
    symmetric matrix, so no general matrix root and no complex numbers.
    """
    factor = _factor(a.covariance)
    cross = np.linalg.eigvalsh(factor.T @ b.covariance @ factor).clip(0)
    apart = np.square(a.mean - b.mean).sum()
    return float(apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(cross).sum())


def _factor(covariance: np.ndarray) -> np.ndarray:
    """A matrix F with C = F F': Cholesky's, or the scaled eigenvectors (ten times slower) of a singular C."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return vectors * np.sqrt(values.clip(0))


# --- kernel distance: the unbiased MMD with a cubic kernel (Bińkowski et al. 2018) ---


def blocks(features: np.ndarray, device: torch.device = CPU) -> Iterator[Tensor]:
    """Rows (n, ...), in memory or memory-mapped, as float64 blocks on the device."""
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


@dataclass(frozen=True)
class Real:
    """Features of real images (m, d), in memory or memory-mapped, and what every distance from them needs."""

    features: np.ndarray
    fitted: Gaussian
    within: float

    @classmethod
    def of(cls, features: np.ndarray, device: torch.device = CPU) -> Real:
        return cls(features, Gaussian.fit(features), within(features, device))

    def distances(self, x: np.ndarray, device: torch.device = CPU) -> dict[str, float]:
        """Fréchet distance and KID of features x (n, d).

        KID is over all pairs (no random subsets), in float64; being unbiased it is slightly negative at
        times for equal distributions.
        """
        kid = within(x, device) + self.within - 2 * across(x, self.features, device)
        return {"fd": frechet_distance(Gaussian.fit(x), self.fitted), "kid": kid}


# --- nearest neighbours ---


def nearest(x: np.ndarray, y: np.ndarray | None = None, device: torch.device = CPU, k: int = 1) -> np.ndarray:
    """Distance of each row of x (n, d) to its k-th nearest row of y (m, d), or of its other rows: (n,)."""
    found = []
    for i, a in enumerate(blocks(x, device)):
        closest = torch.full((len(a), k), torch.inf, dtype=a.dtype, device=device)
        for j, b in enumerate(blocks(x if y is None else y, device)):
            apart = torch.cdist(a, b)
            if y is None and i == j:
                apart.fill_diagonal_(torch.inf)  # a row is not its own neighbour
            closest = torch.cat([closest, apart], dim=1).topk(k, largest=False).values
        found.append(closest[:, -1].cpu().numpy())
    return np.concatenate(found)


# --- precision and recall (Kynkäänniemi et al. 2019) ---


def share_covered(x: np.ndarray, y: np.ndarray, device: torch.device = CPU) -> float:
    """Share of the rows of x (n, d) as near to some row of y (m, d) as its k-th neighbour: equation (1)."""
    if len(y) <= NEIGHBOUR:
        raise UserError(f"precision and recall need more than {NEIGHBOUR} images on each side, not {len(y)}")
    reach, covered = nearest(y, device=device, k=NEIGHBOUR), 0
    for a in blocks(x, device):
        inside = torch.zeros(len(a), dtype=torch.bool, device=device)
        for b, radius in zip(blocks(y, device), blocks(reach, device), strict=True):
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
    return share_covered(generated, real, device), share_covered(real, generated, device)
