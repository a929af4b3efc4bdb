"""How long does a mask of the CIFAR-10 network (35.7 M parameters, 50 groups) take on one core?

    python benchmarks/masks.py

The structure is traced once. Compared, in one process: one mask from the weights, further rates
from the same scores, and tracing the structure anew for every mask.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import time
from collections.abc import Callable
from statistics import median

from ebdiff.config import Network
from ebdiff.nets.store import fresh
from ebdiff.pruning.graph import trace
from ebdiff.pruning.importance import magnitude
from ebdiff.pruning.select import select


def milliseconds(work: Callable[[], object], times: int = 15) -> float:
    """Median time of a call."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken) * 1e3


def main() -> None:
    """Print the three times and their ratio."""
    config = Network()
    tensors = {name: p.detach() for name, p in fresh(config, 0, "benchmark").named_parameters()}
    groups, scores = trace(config), magnitude(tensors)
    one = milliseconds(lambda: select(groups, magnitude(tensors), 0.5))
    further = milliseconds(lambda: select(groups, scores, 0.3))
    rebuilt = milliseconds(lambda: select(trace.__wrapped__(config), magnitude(tensors), 0.5), times=5)
    print(f"one mask {one:.1f} ms, a further rate {further:.1f} ms")
    print(f"tracing the structure every time {rebuilt:.0f} ms: {rebuilt / one:.1f} times as long")


if __name__ == "__main__":
    main()
