"""Averages over spans, and speed-ups: pure arithmetic, no torch.

Speed-ups follow the rules derived from the paper's tables: with `c(r)` the time per step of a
network pruned at rate r divided by the dense one's, and D the steps of the unpruned run,

    unpruned, control, EB   S = D / (I c)                  (search not counted by the paper)
    scratch, finetune       S = D / (D + I c)              (the dense network comes first)
    TA-EB                   S = D / max_k(I_k c_k)         (experts trained side by side)

With search, each expert waits for its own search and, where its criterion needs gradients, for their
masks; searches run side by side too. By device time everything is summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.runs import Expert
from ebdiff.experiment.schema import AFTER_DENSE, FINAL, GRADIENT, Span

# A ticket at least this share of chance away from the initial mask was learned, not averaged into.
LEARNED = 0.8


def average(values: Sequence[float], serves: Sequence[Span]) -> float:
    """Mean over timesteps of a per-expert value: weights are the serve-spans' lengths.

    With serve-spans 0-240, 240-440, 440-1000 these are the paper's 0.24, 0.20, 0.56.
    """
    lengths = [hi - lo for lo, hi in serves]
    return sum(v * n for v, n in zip(values, lengths, strict=True)) / sum(lengths)


def average_visited(values: Sequence[float], serves: Sequence[Span], visited: Sequence[int]) -> float:
    """Mean over the timesteps a sampler really visits: the true cost per network evaluation."""
    total = sum(
        value * sum(lo <= t < hi for t in visited) for value, (lo, hi) in zip(values, serves, strict=True)
    )
    return total / len(visited)


def training_flops(sparse: float, dense: float, dense_gradients: float = 0.0) -> float:
    """FLOPs of training on one item, as RigL's authors count them (Evci et al. 2020, Appendix H).

    3 f_S; where gradients are also taken of masked weights (3 f_S * dT + 2 f_S + f_D) / (dT + 1). Masks and
    the optimiser aren't counted.

    Args:
        sparse: f_S, FLOPs of a forward pass: those of each layer times its density.
        dense: f_D, those of the dense network.
        dense_gradients: share of steps with dense gradients, 1 / (dT + 1) of RigL.
    """
    return 3 * sparse + dense_gradients * (dense - sparse)


def every_network(cost: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What cost.json tells of each network by name and, by `Expert.costs`, of those trained sparse."""
    networks = {**cost["networks"], **cost.get("sparse", {})}
    return {k: {"training_flops": training_flops(2 * n["macs"], 0), **n} for k, n in networks.items()}


class Speedups(NamedTuple):
    """How many times cheaper than the unpruned run, counted three ways."""

    as_paper: float
    with_search: float
    device_time: float


def waits(
    experts: Sequence[Expert],
    searched: Mapping[str, int],
    masked: Mapping[tuple[str, str, str], float],
    dense_ms: float,
) -> tuple[list[float], float]:
    """Dense steps that each expert waits for its own search and masks; what all of these took together.

    Args:
        experts: of a run.
        searched: `search_steps` of their tickets.
        masked: `mask_seconds` of their tickets.
        dense_ms: measured time of a dense step.
    """
    masks = {ticket: 1e3 * seconds / dense_ms for ticket, seconds in masked.items()}
    own = [
        searched.get(e.search, 0) + masks.get((e.search, e.criterion, e.weights), 0) if e.needs_ticket else 0
        for e in experts
    ]
    return own, sum(searched.values()) + sum(masks.values())


def speedups(
    method: str, dense_iterations: int, costs: Sequence[float], waits: Sequence[float], together: float
) -> Speedups:
    """Speed-ups of a run over the unpruned one.

    Args:
        method: the run's method; `scratch` and `finetune` are charged the dense training.
        dense_iterations: D, steps of the unpruned run.
        costs: I c, what each expert's training costs, in dense steps.
        waits, together: as `waits` gives them.
    """
    before = dense_iterations if method in AFTER_DENSE else 0
    return Speedups(
        as_paper=dense_iterations / (before + max(costs)),
        with_search=dense_iterations / (before + max(map(sum, zip(waits, costs, strict=True)))),
        device_time=dense_iterations / (before + sum(costs) + together),
    )


def search_steps(stories: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Dense steps charged to each search: once, up to the last of the given tickets' own intervals.

    `final` tickets need no search. Searches never share a training, so several add up.

    Args:
        stories: ticket stories with `search` and `step`.
    """
    charged: dict[str, int] = {}
    for story in stories:
        if story["search"] != FINAL:
            charged[story["search"]] = max(charged.get(story["search"], 0), story["step"])
    return charged


def mask_seconds(
    experiment: Experiment, stories: Iterable[Mapping[str, Any]], ledger: Callable[..., Mapping[str, Any]]
) -> dict[tuple[str, str, str], float]:
    """Device seconds charged to the masks of gradient criteria, by search, criterion and weights.

    As a search is, once: the share of what all intervals took. Magnitude masks are taken while training.

    Args:
        experiment: whose rates masks were taken at.
        stories: ticket stories with `search`, `criterion`, `weights` and `interval` (0-based).
        ledger: (search, criterion, weights) -> `seconds`, jobs that `share` the GPU and number of `masks`,
            over all intervals and rates.
    """
    intervals: dict[tuple[str, str, str], int] = {}
    for story in stories:
        if story["criterion"] in GRADIENT:
            ticket = story["search"], story["criterion"], story["weights"]
            intervals[ticket] = max(intervals.get(ticket, 0), story["interval"] + 1)
    seconds = {}
    for ticket, n in intervals.items():
        spent, rates = ledger(*ticket), len(experiment.rates_of(ticket[0]))
        seconds[ticket] = spent["seconds"] / spent.get("share", 1) * n * rates / spent["masks"]
    return seconds
