"""The typed experiment: one YAML file, checked whole before anything starts.

An experiment names a dataset, a network, how to train it, the *searches* that look for
early-bird tickets, and the *runs*: lists of experts that together cover every timestep.
This module imports no torch, because the Snakefile reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from ebdiff.experiment import paper
from ebdiff.experiment.layout import TAKEN
from ebdiff.experiment.members import (
    Architecture,
    CodecConfig,
    DatasetConfig,
    IdentityConfig,
    Items,
    NetworkConfig,
    config_of,
)
from ebdiff.experiment.runs import Budget, Expert, Run
from ebdiff.experiment.schema import (
    FINAL,
    GRADIENT,
    Compute,
    Dense,
    Diffusion,
    Distinct,
    Evaluation,
    Name,
    PrimaryClaims,
    Pruning,
    Published,
    Sampler,
    Sampling,
    Search,
    Seed,
    Span,
    Speed,
    Strict,
    Table,
    Training,
    Tuning,
    Weights,
)
from ebdiff.system.errors import unknown


class Experiment(Strict):
    """Everything a run of the workflow needs to know."""

    name: Name
    about: str = Field("", description="One sentence, shown on top of the report.")
    scale: float = Field(1.0, gt=0, le=1000, description="Multiplies iterations, pseudo-epochs, warm-up.")
    dataset: SerializeAsAny[DatasetConfig]
    codec: SerializeAsAny[CodecConfig] = IdentityConfig()
    network: SerializeAsAny[NetworkConfig]
    diffusion: Diffusion = Diffusion()
    training: Training
    pruning: Pruning = Pruning()
    searches: dict[Name, Search]
    dense: Dense
    sampling: Sampling
    evaluation: Evaluation = Evaluation()
    speed: Speed = Speed()
    compute: Compute = Compute()
    tuning: Tuning = Field(
        Tuning(), description="Usually in config/tuning/{experiment}.yaml, written by `ebdiff tune`."
    )
    published: Published = Published()
    seeds: Distinct[Seed] = (0,)
    runs: dict[Name, Run] = Field(min_length=1)
    tables: dict[Table, Distinct[Name]] = Field({}, description="Rows of each table, in order.")
    claims: PrimaryClaims = Field(
        (),
        description="The primary claims, at most four: Holm's correction holds over them, all others are "
        "exploratory. Those of a base go with the runs that are removed.",
    )

    @field_validator("dataset", "codec", "network", mode="before")
    @classmethod
    def _of_its_member(cls, raw: Any, info: ValidationInfo) -> BaseModel:
        """A section that a member fills is checked by that member's type."""
        return raw if isinstance(raw, BaseModel) else config_of(info.field_name, raw).model_validate(raw)

    @model_validator(mode="before")
    @classmethod
    def _fill_spans(cls, raw: Any) -> Any:
        """Write the full range where a span is left out, and the span where `serve` is."""
        try:
            full = [0, raw.get("diffusion", {}).get("timesteps", 1000)]
            for search in raw.get("searches", {}).values():
                if search.get("span") is None:
                    search["span"] = full
            for run in raw.get("runs", {}).values():
                if run.get("span") is None:
                    run["span"] = full
                for expert in run.get("experts", [run]):
                    if expert.get("init", run.get("init")) == "dense":
                        expert.setdefault("search", raw["dense"].get("search", "full"))
                        expert.setdefault("iterations", run.get("iterations", raw["dense"]["iterations"]))
                    if expert.get("span") is None:
                        expert["span"] = run["span"]
                    if expert.get("serve") is None:
                        expert["serve"] = run.get("serve") or expert["span"]
        except (AttributeError, KeyError, TypeError):
            pass  # a malformed file: the typed checks below name the key
        return raw

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        self._check_items()
        self.check_count(self.dataset.known_count)
        if self.name in TAKEN:
            raise ValueError(f"name: {self.name!r} is reserved, results/{self.name} holds other things")
        if FINAL in self.searches:
            raise ValueError(f"searches.{FINAL} is reserved for the finished unpruned network")
        for name, search in self.searches.items():
            if name.startswith("snapshot-"):  # an expert's key would mean two networks
                raise ValueError(f"searches.{name}: names that begin with snapshot- are reserved")
            self._check_span(f"searches.{name}.span", search.span)
            for rate in search.rates:
                self._check_rate(f"searches.{name}.rates", rate)
        if self.dense.search not in self.searches:
            raise ValueError(f"dense.search: {unknown(self.dense.search, self.searches)}")
        if self.searches[self.dense.search].span != (0, self.diffusion.timesteps):
            raise ValueError(f"dense.search: {self.dense.search!r} doesn't span all timesteps")
        self.check_sampler("sampling", self.sampling)
        for name, run in self.runs.items():
            self._check_run(name, run)
            self.check_sampler(f"runs.{name}.sampling", self.sampling_of(name))
            if run.sampling and run.method != "control":
                raise ValueError(f"runs.{name}.sampling: sampled in a way of its own, its method is control")
            if run.paper is not None and run.paper not in (cells := paper.cells(self.published.dataset)):
                raise ValueError(f"runs.{name}.paper: {unknown(run.paper, cells)}")
        for table, names in self.tables.items():
            for name in names:
                if name not in self.runs:
                    raise ValueError(f"tables.{table}: {unknown(name, self.runs)}")
        for i, claim in enumerate(self.claims):
            for key, name in (("run", claim.run), ("against", claim.against)):
                if name not in self.runs:
                    raise ValueError(f"claims[{i}].{key}: {unknown(name, self.runs)}")
            if claim.run == claim.against:
                raise ValueError(f"claims[{i}].against: {claim.run!r} is the run itself; name another")
        return self

    def _check_items(self) -> None:
        """The codec must fit the data, and the network what the codec makes of them."""
        self.codec.check(self.dataset.items)
        self.codec.check_source()
        if self.codec.ENCODED and (key := self.dataset.varied):
            raise ValueError(f"dataset.{key}: images are encoded once, as they are; set it to false")
        self.network.check(self.items)
        if self.training.label_dropout and not self.items.classes:
            raise ValueError("training.label_dropout: the network is told no classes; set dataset.classes")

    def check_count(self, count: int | None) -> None:
        """Refuse to train on, or compare with, more items than there are; None: it isn't known yet.

        Raises:
            ValueError: names the key to change.
        """
        asked = {"dataset.subset": self.dataset.subset, "evaluation.reference": self.evaluation.reference}
        for key, number in asked.items():
            if count is not None and number is not None and number > count:
                raise ValueError(f"{key}: {number:,}, but {self.dataset.name} has {count:,} to train on")

    def _check_span(self, where: str, span: Span) -> None:
        lo, hi = span
        if not 0 <= lo < hi <= self.diffusion.timesteps:
            raise ValueError(
                f"{where}: [{lo}, {hi}) is not inside [0, {self.diffusion.timesteps}); "
                "spans are half-open, low end first"
            )

    def check_sampler(self, where: str, sampler: Sampler) -> None:
        """Refuse what the networks, the codec or the schedule can't be sampled with.

        Raises:
            ValueError: names the key to change, which begins with `where`.
        """
        if sampler.sampler == "ddim" and sampler.steps > self.diffusion.timesteps:
            raise ValueError(
                f"{where}.steps: {sampler.steps} exceed the {self.diffusion.timesteps} timesteps"
            )
        if self.codec.ENCODED and sampler.clamp:
            raise ValueError(f"{where}.clamp: latents go beyond [-1, 1]; set it to false")
        if sampler.guidance is None:
            return
        if not self.items.classes:
            raise ValueError(f"{where}.guidance: the network is told no classes; set dataset.classes")
        if not self.training.label_dropout:  # guidance needs the pass without a class
            raise ValueError(
                f"{where}.guidance: the network never learns to do without a class; "
                "set training.label_dropout, such as 0.1"
            )

    def _check_rate(self, where: str, rate: float) -> None:
        if emptied := self.network.emptied(rate):
            raise ValueError(f"{where}: rate {rate} leaves no channel of {emptied}")

    def _check_run(self, name: str, run: Run) -> None:
        if name.endswith("-flops"):  # like-RUN-flops would mean two budgets
            raise ValueError(f"runs.{name}: names that end in -flops are reserved")
        for i, expert in enumerate(run.experts):
            where = f"runs.{name}.experts[{i}]" if len(run.experts) > 1 else f"runs.{name}"
            self._check_span(f"{where}.span", expert.span)
            self._check_span(f"{where}.serve", expert.serve)
            if not (expert.span[0] <= expert.serve[0] and expert.serve[1] <= expert.span[1]):
                raise ValueError(f"{where}.serve: {expert.serve} lies outside the span {expert.span}")
            if expert.rate is not None:
                self._check_rate(f"{where}.rate", expert.rate)
            if expert.sparse and isinstance(expert.iterations, int):
                try:
                    expert.sparse.check(expert.iterations)
                except ValueError as error:
                    raise ValueError(f"{where}.sparse.{error}") from None
            self._check_origin(where, expert)
            self._check_method(where, run.method, expert)
            if expert.law == "speed" and self.speed.tau >= self.diffusion.timesteps:
                raise ValueError(
                    f"speed.tau: {self.speed.tau} is none of {self.diffusion.timesteps} timesteps"
                )
            if (budget := Budget.of(expert.iterations)) and budget.run is not None:
                self._check_like(where, budget.run)
        edges = 0
        for lo, hi in sorted(e.serve for e in run.experts):
            if lo != edges:
                kind = "no expert serves" if lo > edges else "two experts serve"
                raise ValueError(
                    f"runs.{name}: {kind} timesteps [{min(lo, edges)}, {max(lo, edges)}); "
                    "serve-spans must tile all timesteps"
                )
            edges = hi
        if edges != self.diffusion.timesteps:
            raise ValueError(f"runs.{name}: no expert serves timesteps [{edges}, {self.diffusion.timesteps})")

    def _check_origin(self, where: str, expert: Expert) -> None:
        """The ticket an expert starts from must be one that its search looks for."""
        if expert.init == "dense" and expert.search != self.dense.search:
            raise ValueError(f"{where}.search: the unpruned network continues {self.dense.search!r}")
        if expert.init == "dense" and expert.span != (0, self.diffusion.timesteps):
            raise ValueError(f"{where}.span: the unpruned network trains on all timesteps")
        if expert.after is not None and not (expert.needs_ticket and expert.search != FINAL):
            raise ValueError(f"{where}.after: only tickets of a search are cut at an interval")
        if not expert.needs_ticket:
            return
        if expert.search == FINAL:
            if self.final_expert is None:
                raise ValueError(f"{where}.search: `final` needs a run with `init: dense`")
            return
        if expert.search not in self.searches:
            raise ValueError(f"{where}.search: {unknown(expert.search, [*self.searches, FINAL])}")
        search = self.searches[expert.search]
        asked = "magnitude" if expert.criterion == "random" else expert.criterion
        for key, value, offered in (
            ("criterion", asked, search.criteria),
            ("rate", expert.rate, search.rates),
            ("weights", expert.weights, search.weights),
        ):
            if value not in offered:
                raise ValueError(
                    f"{where}.{key}: search {expert.search!r} looks for "
                    f"{', '.join(map(str, offered))}, not {value}; add it there"
                )
        if expert.after is not None and expert.after not in search.tickets_at:
            raise ValueError(
                f"{where}.after: search {expert.search!r} keeps no weights after {expert.after} "
                f"intervals; add {expert.after} to searches.{expert.search}.tickets_at"
            )
        if expert.after == 0 and expert.criterion in GRADIENT:
            raise ValueError(f"{where}.after: there is no {expert.criterion} mask before any training")

    def _check_method(self, where: str, method: str, expert: Expert) -> None:
        """A method's accounting must fit what the expert is."""
        early = expert.init == "inherit" and expert.search != FINAL and expert.after is None
        fits = {
            "unpruned": (expert.init == "dense", "init: dense"),
            "scratch": (expert.init == "fresh", "init: fresh"),
            "finetune": (expert.init == "inherit" and expert.search == FINAL, f"a ticket of search {FINAL}"),
            "eb": (early, "a ticket of a search, cut where the rule fires"),
            "ta-eb": (early, "tickets of searches, cut where the rule fires"),
            "sparse": (expert.sparse is not None, "experts with `sparse`"),
        }
        fit, wanted = fits.get(method, (True, ""))
        if not fit:
            raise ValueError(f"{where}: method {method} means {wanted}; method control fits anything")

    def _check_like(self, where: str, other: str) -> None:
        if other not in self.runs:
            raise ValueError(f"{where}.iterations: {unknown(other, self.runs)}")
        if any(isinstance(e.iterations, str) for e in self.runs[other].experts):
            raise ValueError(f"{where}.iterations: like-{other} refers to a run that is itself like one")

    @property
    def items(self) -> Items:
        """What is denoised: the data's items, or what the codec makes of them."""
        return self.codec.items(self.dataset.items)

    @property
    def architecture(self) -> Architecture:
        """The dense network: its config and the items it denoises."""
        return Architecture(self.network, self.items)

    @property
    def prepared(self) -> Any:
        """What tells which data are prepared: the dataset, and the codec where that draws the images."""
        return [self.dataset.content, self.codec] if self.dataset.DRAWN else self.dataset.content

    @property
    def final_expert(self) -> Expert | None:
        """The unpruned network at N steps, from which `final` tickets are cut."""
        finished = (x for x in self._listed() if x.continues_search and x.iterations == self.dense.iterations)
        return next(finished, None)

    def _listed(self) -> Iterator[Expert]:
        """The experts of all runs; what several runs share comes several times."""
        return (expert for run in self.runs.values() for expert in run.experts)

    def experts(self) -> dict[str, Expert]:
        """Every distinct expert by its key (serve-span and milestone aside)."""
        return {e.key: e for e in self._listed()}

    def all_milestones(self, key: str) -> set[int | str]:
        """The milestones of an expert over all runs, counted ones and budgets."""
        return {e.iterations for e in self._listed() if e.key == key}

    def milestones(self, key: str) -> list[int]:
        """The counted milestones of an expert, ascending."""
        return sorted(m for m in self.all_milestones(key) if isinstance(m, int))

    def previous_milestone(self, key: str, milestone: str) -> int | None:
        """The milestone that the asked one continues, if any (budgets continue none)."""
        if Budget.of(milestone):
            return None
        return max((m for m in self.milestones(key) if m < int(milestone)), default=None)

    def seeds_of(self, run: str) -> tuple[int, ...]:
        """The seeds of a run: its own, or the experiment's."""
        return self.runs[run].seeds or self.seeds

    def sampling_of(self, run: str) -> Sampling:
        """How the images of a run are drawn: as the experiment says, but for what the run says itself."""
        own = self.runs[run].sampling
        return self.sampling.model_copy(
            update={k: getattr(own, k) for k in own.model_fields_set} if own else {}
        )

    def rates_of(self, search: str) -> list[float]:
        """The rates at which a search takes masks.

        For `final` those of tickets cut from it, and those of the search that it ends: its masks stand beside
        that search's tickets.
        """
        if search != FINAL:
            return list(self.searches[search].rates)
        asked = {e.rate for e in self.experts().values() if e.needs_ticket and e.search == FINAL}
        return sorted(asked.union(self.searches[self.dense.search].rates))

    def weights_of(self, search: str, criterion: str) -> tuple[Weights, ...]:
        """Which weights a criterion ranks for some run's tickets; the search's first where none asks."""
        own = self.searches[search].weights
        used = {e.weights for e in self._listed() if (e.search, e.criterion) == (search, criterion)}
        return tuple(weights for weights in own if weights in used) or own[:1]

    def sparse(self) -> dict[str, Expert]:
        """An expert for each way of training sparse, by `Expert.costs`."""
        return {e.costs: e for e in self._listed() if e.sparse}

    def rates(self) -> list[float]:
        """Every rate that some expert uses, ascending."""
        return sorted({e.rate for e in self.experts().values() if e.rate is not None})

    def interval_steps(self, search: str, count: int) -> int:
        """Steps per interval of a search on a dataset of `count` images."""
        return self.searches[search].interval.steps or self.epoch_steps(count)

    def epoch_steps(self, count: int) -> int:
        """Steps per epoch for a dataset of `count` images: ceil(N / batch), every batch full."""
        return math.ceil(min(count, self.dataset.subset or count) / self.training.batch)
