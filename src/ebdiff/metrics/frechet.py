"""Fréchet distance between Gaussians fitted to features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ebdiff.errors import UserError

BLOCK = 1024  # rows read at a time, so that memory holds the statistics and little more


@dataclass(frozen=True)
class Gaussian:
    """Mean (d,), covariance (d, d), both float64, and the number of features they came from."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int

    @classmethod
    def fit(cls, features: np.ndarray, block: int = BLOCK) -> Gaussian:
        """Statistics of features (n, d), n >= 2, in memory or memory-mapped; see `stream`."""
        return cls.stream(features[i : i + block] for i in range(0, len(features), block))

    @classmethod
    def stream(cls, blocks: Iterable[np.ndarray]) -> Gaussian:
        """Mean and unbiased covariance of features that come in blocks (b, d) of any sizes.

        Blocks are merged by the pairwise update of Chan, Golub and LeVeque (1983): no cancellation,
        whatever the mean, and every row counts.

        Raises:
            UserError: fewer than two rows.
        """
        count, mean, scatter = 0, np.zeros(()), np.zeros(())
        for block in blocks:
            block = np.asarray(block, np.float64)
            here = block.mean(axis=0)
            centred, apart = block - here, here - mean
            scatter = scatter + centred.T @ centred
            scatter += np.outer(apart, apart) * (count * len(block) / (count + len(block)))
            count += len(block)
            mean = mean + apart * (len(block) / count)
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
