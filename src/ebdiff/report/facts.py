"""What the report knows about one run: its networks, tickets, cost and quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from ebdiff.cost.accounting import (
    AFTER_DENSE,
    Speedups,
    TrainedExpert,
    average,
    average_visited,
    search_steps,
    speedups,
)
from ebdiff.diffusion.schedule import visited
from ebdiff.experiment.runs import Expert, Run
from ebdiff.experiment.schema import FINAL
from ebdiff.report.needs import milestone
from ebdiff.report.results import Results

Value = TypeVar("Value")


@dataclass(frozen=True)
class RunFacts:
    """A run seen through its result files.

    Values that depend on the seed are tuples, one entry per seed; in a partial report they hold
    the seeds that are there. Everything else is one value, and asking for it raises `Missing`
    while its file isn't there.

    Attributes:
        results: the experiment's files.
        name: the run.
        unpruned: the unpruned network that speed-ups are over; None: the experiment's.
    """

    results: Results
    name: str
    unpruned: Expert | None = None

    @property
    def run(self) -> Run:
        """Its configuration."""
        return self.results.experiment.runs[self.name]

    @cached_property
    def experts(self) -> tuple[Expert, ...]:
        """Its experts, lowest timesteps first."""
        return tuple(sorted(self.run.experts, key=lambda e: e.serve))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds it was asked for."""
        return self.results.experiment.seeds_of(self.name)

    @property
    def rates(self) -> tuple[float, ...]:
        """Asked pruning rate of each expert's network; 0 for one that keeps all its channels."""
        return tuple(0.0 if e.rate is None or network(e) == "dense" else e.rate for e in self.experts)

    @property
    def rate(self) -> float:
        """Asked pruning rate, averaged over timesteps."""
        return self._average(self.rates)

    @property
    def overlaps(self) -> bool:
        """Whether an expert trains on more timesteps than it serves."""
        return any(e.span != e.serve for e in self.experts)

    @property
    def law(self) -> str:
        """The timestep law of its experts; `mixed` if they differ."""
        laws = {e.law for e in self.experts}
        return laws.pop() if len(laws) == 1 else "mixed"

    @property
    def criterion(self) -> str:
        """How its tickets were ranked: `iterwise-` if masks were taken between epochs."""
        searches = self.results.experiment.searches
        words = []
        for e in self.experts:
            if not e.needs_ticket:
                words.append("none")
            elif e.search != FINAL and searches[e.search].interval.unit == "iteration":
                words.append(f"iterwise-{e.criterion}")
            else:
                words.append(e.criterion)
        return ", ".join(dict.fromkeys(words))

    # --- networks -------------------------------------------------------------------------------

    @property
    def realised(self) -> float:
        """Share of channels really removed, averaged over timesteps."""
        return self._average(self._networks("realised"))

    @property
    def params(self) -> float:
        """Parameters, averaged over timesteps."""
        return self._average(self._networks("params"))

    @property
    def macs(self) -> float:
        """MACs per network evaluation, averaged over timesteps."""
        return self._average(self._networks("macs"))

    @property
    def macs_visited(self) -> float:
        """MACs per network evaluation, averaged over the timesteps that the sampler visits."""
        experiment = self.results.experiment
        steps = visited(experiment.diffusion, experiment.sampling)
        return average_visited(self._networks("macs"), self._serves, steps)

    # --- per seed -------------------------------------------------------------------------------

    @cached_property
    def quality(self) -> tuple[float, ...]:
        """Fréchet distance of the samples to the real images."""
        return self._per_seed(lambda seed: self.results.metrics(self.name, seed)["fd"])

    @cached_property
    def kid(self) -> tuple[float, ...]:
        """Kernel distance in the same features."""
        return self._per_seed(lambda seed: self.results.metrics(self.name, seed)["kid"])

    @cached_property
    def ill_conditioned(self) -> bool:
        """Whether a seed's Fréchet distance is from too few images."""
        metrics = self._per_seed(lambda seed: self.results.metrics(self.name, seed))
        return any(m.get("ill_conditioned", False) for m in metrics)

    @cached_property
    def iterations(self) -> tuple[tuple[int, ...], ...]:
        """Optimiser steps of each expert."""
        return self._per_seed(self._iterations)

    @cached_property
    def speedups(self) -> tuple[Speedups, ...]:
        """Speed-ups over the unpruned run by measured step times."""
        return self._per_seed(lambda seed: self._speedups(seed, "step_ms"))

    @cached_property
    def macs_speedups(self) -> tuple[Speedups, ...]:
        """What the speed-ups would be if a step's time were proportional to its MACs."""
        return self._per_seed(lambda seed: self._speedups(seed, "macs"))

    @cached_property
    def seconds(self) -> tuple[float, ...]:
        """Seconds really spent in training, on all devices together, search included."""
        return self._per_seed(self._seconds)

    @cached_property
    def tickets(self) -> tuple[dict, ...]:
        """The stories of its tickets, over experts and seeds."""
        return tuple(s for stories in self._per_seed(self._stories) for s in stories)

    @property
    def unsettled(self) -> tuple[dict, ...]:
        """Those of its tickets that were cut before they had settled."""
        return tuple(s for s in self.tickets if not s["settled"])

    def search_steps(self, seed: int) -> dict[str, int]:
        """Dense steps charged to each of its searches: until the last ticket taken from it."""
        return search_steps(self._stories(seed))

    def search_seconds(self, seed: int, kind: str = "seconds") -> dict[str, float]:
        """Seconds charged to each of its searches: the ledger's, in proportion to the steps.

        Args:
            seed: of the run.
            kind: `seconds`, or `device_seconds` to sum over devices.
        """
        ledgers = {name: self.results.search_ledger(seed, name) for name in self.search_steps(seed)}
        return {
            name: ledgers[name][kind] * steps / ledgers[name]["steps"]
            for name, steps in self.search_steps(seed).items()
        }

    # --- how they are found ---------------------------------------------------------------------

    @property
    def _serves(self) -> list[tuple[int, int]]:
        return [e.serve for e in self.experts]

    def _average(self, values: Sequence[float]) -> float:
        return average(values, self._serves)

    def _networks(self, key: str) -> list[float]:
        return [self.results.network(network(e))[key] for e in self.experts]

    def _per_seed(self, read: Callable[[int], Value | None]) -> tuple[Value, ...]:
        values = [self.results.attempt(read, seed) for seed in self.seeds]
        return tuple(v for v in values if v is not None)

    def _stories(self, seed: int) -> list[dict]:
        return [self.results.story(seed, e) for e in self.experts if e.needs_ticket]

    def _iterations(self, seed: int) -> tuple[int, ...]:
        return tuple(
            e.iterations
            if isinstance(e.iterations, int)
            else self.results.ledger(seed, e.key, milestone(e))["steps"]
            for e in self.experts
        )

    def _speedups(self, seed: int, unit: str) -> Speedups:
        dense = self.results.network("dense")[unit]
        searched = self.search_steps(seed)
        trained = [
            TrainedExpert(steps, cost / dense, searched.get(e.search, 0) if e.needs_ticket else 0)
            for e, steps, cost in zip(self.experts, self._iterations(seed), self._networks(unit), strict=True)
        ]
        reference = self._reference
        asked = reference.iterations if reference else self.results.experiment.dense.iterations
        assert isinstance(asked, int)  # `needs.unpruned` sees to it
        return speedups(self.run.method, asked, trained, sum(searched.values()))

    @property
    def _reference(self) -> Expert | None:
        return self.unpruned or self.results.experiment.final_expert

    def _seconds(self, seed: int) -> float | None:
        trainings = {(e.key, milestone(e)) for e in self.experts}
        if self.run.method in AFTER_DENSE:
            if self._reference is None:
                return None  # the dense training it is charged with belongs to no run
            trainings.add((self._reference.key, milestone(self._reference)))
        spent = sum(self.results.ledger(seed, *training)["device_seconds"] for training in trainings)
        return spent + sum(self.search_seconds(seed, "device_seconds").values())


def network(expert: Expert) -> str:
    """The name of an expert's network in the measured costs: `dense`, or its rate."""
    return "dense" if expert.init in ("dense", "snapshot") else str(expert.rate)
