"""What the report knows about one run: its networks, tickets, cost and quality."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

from ebdiff.cost import accounting
from ebdiff.cost.accounting import Speedups, average
from ebdiff.diffusion.schedule import visited
from ebdiff.experiment import layout, places
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.runs import Expert
from ebdiff.experiment.schema import FINAL
from ebdiff.report.results import Results

Value = TypeVar("Value")


class RunFacts:
    """A run seen through its configuration and its result files.

    Values that depend on the seed are tuples, one entry per seed; in a partial report they hold the seeds
    that are there. Everything else is one value, and asking for it raises `Missing` while its file isn't
    there. Speed-ups are over `unpruned`, or else the experiment's unpruned network; `seeds` are those of the
    run, or of these the given ones.
    """

    def __init__(
        self,
        results: Results,
        name: str,
        unpruned: Expert | None = None,
        seeds: tuple[int, ...] | None = None,
    ) -> None:
        experiment = results.experiment
        self.results, self.name = results, name
        self.run, self.seeds = experiment.runs[name], seeds or experiment.seeds_of(name)
        self.experts = tuple(sorted(self.run.experts, key=lambda e: e.serve))  # lowest timesteps first
        # Asked pruning rates, 0 of networks that keep all their channels; and over timesteps.
        self.rates = tuple(0.0 if e.network == "dense" else e.rate or 0.0 for e in self.experts)
        self._serves = [e.serve for e in self.experts]
        self.rate = average(self.rates, self._serves)
        zeros = [e.sparse.zeros if e.sparse else 0.0 for e in self.experts]
        self.sparsity = average(zeros, self._serves)  # share of zeros among the weights that are masked
        self.overlaps = any(e.span != e.serve for e in self.experts)  # trains on more than is served
        self.law = self.experts[0].law if len({e.law for e in self.experts}) == 1 else "mixed"
        self._unpruned = unpruned or experiment.final_expert

    def of_seeds(self, *seeds: int) -> RunFacts:
        """The same of some seeds alone."""
        return RunFacts(self.results, self.name, self._unpruned, seeds)

    @property
    def criterion(self) -> str:
        """How its tickets were ranked: `iterwise-` if masks were taken between epochs."""
        searches, words = self.results.experiment.searches, []
        for e in self.experts:
            between = e.search != FINAL and searches[e.search].interval.unit == "iteration"
            word = f"iterwise-{e.criterion}" if between else e.criterion
            words.append(word if e.needs_ticket else "none")
        return ", ".join(dict.fromkeys(words))

    def average(self, key: str) -> float:
        """`params`, `macs` or the `realised` share of removed channels, averaged over timesteps."""
        return average(self._networks(key), self._serves)

    @property
    def visited(self) -> list[int]:
        """The timesteps that its sampler visits, ascending."""
        experiment = self.results.experiment
        return visited(experiment.diffusion, experiment.sampling_of(self.name))

    @property
    def evaluations(self) -> int:
        """Passes through a network for an image: two a step where it is guided."""
        return self.results.experiment.sampling_of(self.name).passes * len(self.visited)

    @property
    def macs_visited(self) -> float:
        """MACs per network evaluation, averaged over the timesteps that the sampler visits."""
        return accounting.average_visited(self._networks("macs"), self._serves, self.visited)

    def metric(self, key: str) -> tuple[float, ...]:
        """A number of the samples' metrics."""
        return self._per_seed(lambda seed: self.results.metrics(self.name, seed).get(key))

    @property
    def quality(self) -> tuple[float, ...]:
        """Fréchet distance of the samples to the real images."""
        return self.metric("fd")

    @property
    def ill_conditioned(self) -> bool:
        """Whether a seed's Fréchet distance is from too few images."""
        return any(self.metric("ill_conditioned"))

    @cached_property
    def iterations(self) -> tuple[tuple[int, ...], ...]:
        """Optimiser steps of each expert."""
        return self._per_seed(self._iterations)

    def speedups(self, unit: str = "step_ms") -> tuple[Speedups, ...]:
        """Speed-ups over the unpruned run by measured step times, or by `training_flops`."""
        return self._per_seed(lambda seed: self._speedups(seed, unit))

    @property
    def spread(self) -> float:
        """How far off its speed-ups may be, as a share of them, by the spread of the measured step times.

        The interquartile ranges of both step times in a ratio are added in quadrature; no mean over experts
        is further off than the worst of them. The unpruned network's over its own is 1.
        """
        others = {e.costs for e in self.experts} - {"dense"}
        return max((spread_of_ratio(self.results, network) for network in others), default=0.0)

    @cached_property
    def seconds(self) -> tuple[float, ...]:
        """Seconds really spent in training, on all devices together, search and masks included."""
        trained = {(e.key, e.iterations): e for e in self.experts}
        if self.run.method in accounting.AFTER_DENSE:
            if self._unpruned is None:
                return ()  # the dense training it is charged with belongs to no run
            trained[self._unpruned.key, self._unpruned.iterations] = self._unpruned

        def spent(seed: int) -> float:
            experts = sum(self.results.ledger(seed, e)["device_seconds"] for e in trained.values())
            searches = sum(self.search_seconds(seed, "device_seconds").values())
            return experts + searches + sum(self.mask_seconds(seed).values())

        return self._per_seed(spent)

    @cached_property
    def tickets(self) -> tuple[dict, ...]:
        """The stories of its tickets, over experts and seeds."""
        return tuple(s for stories in self._per_seed(self._stories) for s in stories)

    @property
    def to_final(self) -> tuple[float, ...]:
        """Distances of its tickets' masks to the finished network's, where there is one to compare with."""
        found = (self.results.attempt(self.results.to_final, s) for s in self.tickets)
        return tuple(distance for distance in found if distance is not None)

    @property
    def unsettled(self) -> tuple[dict, ...]:
        """Those of its tickets that were cut before they had settled, unasked."""
        return tuple(s for s in self.tickets if s["settled"] is False)

    def executed(self, use: str) -> list[str]:
        """How and on what the `training` of its searches and experts, or its `sampling`, really ran."""

        def ways(seed: int) -> list[str]:
            if use == "sampling":
                ledger = self.results.file(layout.SAMPLE_LEDGER, run=self.name, seed=seed)
                return [_executed(how, ledger) for how in ledger["execution"].values()]
            ledgers = [self._search_ledger(seed, name) for name in self.search_steps(seed)]
            ledgers += [self.results.ledger(seed, e) for e in self.experts]
            jobs = [job for ledger in ledgers for job in ledger["processes"]]
            return [_executed(job["execution"], job) for job in jobs if job["steps"]]

        return list(dict.fromkeys(way for told in self._per_seed(ways) for way in told))

    def search_steps(self, seed: int) -> dict[str, int]:
        """Dense steps charged to each of its searches: until the last ticket taken from it."""
        return accounting.search_steps(self._stories(seed))

    def search_seconds(self, seed: int, kind: str = "seconds") -> dict[str, float]:
        """`seconds` or `device_seconds` charged to each of its searches: in proportion to the steps."""
        charged = self.search_steps(seed)
        ledgers = {name: self._search_ledger(seed, name) for name in charged}
        return {name: ledgers[name][kind] * steps / ledgers[name]["steps"] for name, steps in charged.items()}

    def mask_seconds(self, seed: int) -> dict[tuple[str, str, str], float]:
        """Seconds charged to its gradient criteria's masks, by search, criterion and weights."""

        def ledger(search: str, criterion: str, weights: str) -> dict[str, Any]:
            ticket = dict(search=search, criterion=criterion, weights=weights)
            return self.results.file(layout.MASKS_LEDGER, seed=seed, **ticket)

        return accounting.mask_seconds(self.results.experiment, self._stories(seed), ledger)

    def _networks(self, key: str) -> list[float]:
        return [self.results.network(e.costs)[key] for e in self.experts]

    def _per_seed(self, read: Callable[[int], Value | None]) -> tuple[Value, ...]:
        values = [self.results.attempt(read, seed) for seed in self.seeds]
        return tuple(v for v in values if v is not None)

    def _stories(self, seed: int) -> list[dict]:
        return [self.results.story(seed, e) for e in self.experts if e.needs_ticket]

    def _search_ledger(self, seed: int, search: str) -> dict[str, Any]:
        return self.results.file(layout.DENSE_LEDGER, seed=seed, search=search)

    def _iterations(self, seed: int) -> tuple[int, ...]:
        asked = [(e, e.iterations) for e in self.experts]
        return tuple(n if isinstance(n, int) else self.results.ledger(seed, e)["steps"] for e, n in asked)

    def _speedups(self, seed: int, unit: str) -> Speedups:
        dense = self.results.network("dense")
        times = [cost / dense[unit] for cost in self._networks(unit)]
        costs = [n * time for n, time in zip(self._iterations(seed), times, strict=True)]
        before = self.search_steps(seed), self.mask_seconds(seed), dense["step_ms"]
        asked = self._unpruned.iterations if self._unpruned else self.results.experiment.dense.iterations
        assert isinstance(asked, int)  # `places.unpruned` sees to it
        return accounting.speedups(self.run.method, asked, costs, *accounting.waits(self.experts, *before))


def _executed(how: Mapping[str, Any], where: Mapping[str, Any]) -> str:
    """`bf16, channels last, 3 jobs to a GPU on NVIDIA H100`, by what a ledger tells."""
    kernels = {"channels_last": "channels last", "deterministic": "deterministic"}
    words = [how["precision"], *(word for key, word in kernels.items() if how[key])]
    words += [f"{where['world']} processes"] if where["world"] > 1 else []
    words += [f"{share} jobs to a GPU"] if (share := where.get("share", 1)) > 1 else []
    return f"{', '.join(words)} on {where['device']}"


def spread_of_ratio(results: Results, network: str) -> float:
    """The relative spread of a network's step time over the unpruned one's, by propagation of errors."""
    both = (results.network(name) for name in (network, "dense"))
    return math.hypot(*(n["spread_ms"] / n["step_ms"] for n in both))


def plotted(e: Experiment) -> tuple[str, ...]:
    """The runs of Figures 1 and 1b: the rows of Table 4, 5 or 6; else all that are sampled as usual."""
    asked = (e.tables.get(table) for table in ("table4", "table5", "table6"))
    return next(filter(None, asked), tuple(name for name, run in e.runs.items() if not run.sampling))


def timestep_aware(e: Experiment) -> str | None:
    """The timestep-aware run that Figure 3 draws: the first, in Figure 1's order."""
    return next((name for name in (*plotted(e), *e.runs) if e.runs[name].method == "ta-eb"), None)


def of_table(results: Results, table: str) -> list[RunFacts]:
    """The runs in the rows of a table, with speed-ups over its own unpruned run."""
    names = results.experiment.tables[table]
    return [RunFacts(results, name, places.unpruned(results.experiment, names)) for name in names]


def paired(
    a: RunFacts, b: RunFacts, value: Callable[[RunFacts], tuple[Value, ...]]
) -> list[tuple[Value, Value]]:
    """A value of two runs for each seed that both have: the same sampling noise, and searches in common."""
    both = ((value(a.of_seeds(s)), value(b.of_seeds(s))) for s in a.seeds if s in b.seeds)
    return [(*x, *y) for x, y in both if x and y]


def ratios(a: RunFacts, b: RunFacts, way: str) -> tuple[float, ...]:
    """How many times faster a is than b, for each common seed; `way` is a count of `Speedups`."""
    return tuple(getattr(x, way) / getattr(y, way) for x, y in paired(a, b, RunFacts.speedups))


def baseline(rows: Sequence[RunFacts], method: str) -> RunFacts | None:
    """The row that the paper's text takes for its ratios to a baseline method, if there is one.

    The ends of its ranges (2.57-4.38 in Table 4) are over the fastest prune-and-finetune row and over the
    slowest scratch row, whatever their rates.
    """
    speeds = {f: f.speedups() for f in rows if f.run.method == method}
    means = {f: statistics.fmean(s.as_paper for s in found) for f, found in speeds.items() if found}
    return (min if method == "scratch" else max)(means, key=means.__getitem__, default=None)


def stories(runs: Iterable[RunFacts]) -> list[dict]:
    """The stories of the tickets of some runs that the early-bird rule drew, each once."""
    key = ("search", "criterion", "weights", "rate", "seed")
    drawn = (s for f in runs for s in f.tickets if s["search"] != FINAL and s["settled"] is not None)
    found = {tuple(s[k] for k in key): s for s in drawn}
    return [found[k] for k in sorted(found)]
