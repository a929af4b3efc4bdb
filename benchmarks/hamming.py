"""How fast are mask distances, against loops over the masks?

    python benchmarks/hamming.py

All pairs of 300 masks of 12,032 entries (the matrix of the heat maps), and the newest against the four
before it at every one of 10,000 intervals (the early-bird rule).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paired
import plain
import torch

from ebdiff.cost.measure import interleaved
from ebdiff.tickets.history import History, recent_distances

WINDOW = 5


def main(argv: Sequence[str] | None = None) -> None:
    args = paired.arguments(__doc__, argv, rounds=7)
    pairs, intervals, length = (10, 40, 100) if args.tiny else (300, 10_000, 12_032)
    masks = np.random.default_rng(0).random((intervals, length)) < 0.5
    packed = np.packbits(masks, axis=1)
    history = History((0.5,), ("all",), (length,), masks=list(packed[:pairs, None]))

    np.testing.assert_array_equal(history.distances(0.5), plain.hamming_matrix(masks[:pairs]).astype("f4"))
    ours, theirs = recent_distances(packed, length, WINDOW), plain.newest_distances(masks, WINDOW)
    np.testing.assert_array_equal(ours, theirs)
    work = {
        "matrix by loops": lambda: plain.hamming_matrix(masks[:pairs]),
        "matrix": lambda: history.distances(0.5),
        "newest by loops": lambda: plain.newest_distances(masks, WINDOW),
        "newest": lambda: recent_distances(packed, length, WINDOW),
    }
    s = interleaved(work, args.rounds, warmup=1)
    rows = [
        paired.compare(
            f"Hamming distances, all pairs of {pairs} masks", "double loop over boolean masks", "≥ 50",
            s["matrix by loops"], s["matrix"],
        ),
        paired.compare(
            f"newest mask against {WINDOW - 1}, {intervals:,} intervals", "the same by loops", "≥ 10",
            s["newest by loops"], s["newest"],
        ),
    ]  # fmt: skip
    paired.write("hamming", rows, torch.device("cpu"), args.out)


if __name__ == "__main__":
    main()
