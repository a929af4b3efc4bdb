"""How long does a mask of the CIFAR-10 network (35.7 M parameters, 50 groups) take?

    python benchmarks/masks.py

Against the plain way: trace the dependencies, then rank and really prune group after group. Both give
the same mask, on one CPU core or on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paired
import plain_pruning
import torch

from ebdiff.cost.measure import interleaved
from ebdiff.nets.execution import Runtime
from ebdiff.nets.store import fresh
from ebdiff.pruning.graph import trace
from ebdiff.pruning.importance import magnitude
from ebdiff.pruning.select import Selector

RATES = (0.3, 0.5, 0.6, 0.8)


def main(argv: Sequence[str] | None = None) -> None:
    args = paired.arguments(__doc__, argv, rounds=15)
    torch.set_num_threads(1)
    architecture = paired.experiment(1, args.tiny).architecture
    network = Runtime(args.device).place(fresh(architecture, 0, "benchmark"))
    tensors, groups = dict(network.named_parameters()), trace(architecture)
    one, all_rates = (Selector(groups, rates, args.device) for rates in ((0.5,), RATES))

    np.testing.assert_array_equal(one(magnitude(tensors))[0], plain_pruning.prune(network, 0.5)[0])
    work = {
        "rebuilt": lambda: plain_pruning.prune(network, 0.5),
        "one": lambda: one(magnitude(tensors)),
        "all": lambda: all_rates(magnitude(tensors)),
    }
    s = interleaved(work, args.rounds)
    rows = [
        paired.compare(
            f"one mask, {len(groups)} groups, structure cached", "trace, rank and prune", "≥ 10",
            s["rebuilt"], s["one"],
        ),
        paired.difference("a further rate of the same weights", s["all"], s["one"], len(RATES) - 1, "≤ 15"),
    ]  # fmt: skip
    paired.write("masks", rows, args.device, args.out)


if __name__ == "__main__":
    main()
