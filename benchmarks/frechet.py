"""How fast is the Fréchet distance of 2,048-d features, against the general matrix root?

    python benchmarks/frechet.py

From statistics of 4 x 2,048 features a side; both give the same number to 1e-9.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paired
import plain
import torch

from ebdiff.cost.measure import interleaved
from ebdiff.metrics.distances import Gaussian, frechet_distance


def features(rng: np.random.Generator, d: int) -> np.ndarray:
    """4d correlated features whose scales span three decades, as a network's do."""
    mixing = rng.standard_normal((d, d)) * np.logspace(0, -3, d) / d**0.5
    return rng.standard_normal((4 * d, d)) @ mixing.T + rng.random(d)


def main(argv: Sequence[str] | None = None) -> None:
    args = paired.arguments(__doc__, argv, rounds=3)
    d, rng = 32 if args.tiny else 2048, np.random.default_rng(0)
    a, b = Gaussian.fit(features(rng, d)), Gaussian.fit(features(rng, d))
    found = {}

    def ours() -> None:
        found["ours"] = frechet_distance(a, b)

    def theirs() -> None:
        found["theirs"] = plain.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)

    s = interleaved({"theirs": theirs, "ours": ours}, args.rounds, warmup=1)
    apart = abs(found["ours"] / found["theirs"] - 1)
    assert apart <= 1e-9, f"the distances differ by {apart}"
    note = f"relative difference {apart:.0e}"
    rows = [paired.compare(f"Fréchet distance, {d:,}-d", "`sqrtm`", "≥ 4", s["theirs"], s["ours"], note)]
    paired.write("frechet", rows, torch.device("cpu"), args.out)


if __name__ == "__main__":
    main()
