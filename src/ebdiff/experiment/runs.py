"""Experts and runs: what is trained from which beginning, and which experts make a run."""

from __future__ import annotations

import hashlib
import re
from typing import Any, NamedTuple

from pydantic import BaseModel, Field, SerializeAsAny, field_validator, model_validator

from ebdiff.experiment import layout
from ebdiff.experiment.registry import Registry
from ebdiff.experiment.schema import (
    Criterion,
    Distinct,
    Init,
    Law,
    Method,
    Name,
    Rate,
    Sampler,
    Seed,
    Span,
    Strict,
    Weights,
)
from ebdiff.experiment.sparsity import METHODS, Sparse


class Budget(NamedTuple):
    """What a milestone that isn't counted in steps may cost.

    Attributes:
        run: as much as that run, its search included; None: `minutes`, the expert's own search included.
        minutes: of device time.
        unit: the key of cost.json that steps are weighed by.
    """

    run: str | None
    minutes: int
    unit: str

    @classmethod
    def of(cls, milestone: int | str) -> Budget | None:
        """That of ``like-RUN``, ``like-RUN-flops`` or ``20min``; None for a number of steps.

        Raises:
            ValueError: it is none of these.
        """
        known = r"(\d+)|like-(?P<run>.*?)(?P<flops>-flops)?|(?P<n>[1-9]\d{,5})min"
        found = re.fullmatch(known, str(milestone))
        if found is None:
            raise ValueError(
                f"iterations must be a number, like-RUN, like-RUN-flops or such as 20min, not {milestone!r}"
            )
        if found[1]:
            return None
        return cls(found["run"], int(found["n"] or 0), "training_flops" if found["flops"] else "step_ms")


HOOKS = Registry("hook")  # members: a callable (config, job) that gives a `training.hooks.Hook`


class Expert(Strict):
    """A network trained on a span of timesteps and serving one."""

    init: Init = Field(
        "inherit",
        description="inherit: a ticket's weights; fresh: new weights of the same widths; "
        "dense: the unpruned network; snapshot: the ticket's weights before surgery.",
    )
    search: Name = Field("full", description="The ticket's search, or `final`.")
    criterion: Criterion = "magnitude"
    weights: Weights = "ema"
    rate: Rate | None = Field(
        None, description="Asked pruning rate; none for `dense`, nor for sparse networks of the dense widths."
    )
    after: int | None = Field(
        None,
        ge=0,
        description="After how many intervals of its search the ticket is cut, one of the search's "
        "`tickets_at`; left out: where the early-bird rule fires.",
    )
    law: Law = Field("uniform", description="Timesteps: uniform in antithetic pairs, or SpeeD.")
    span: Span = Field(None, description="Timesteps trained on, [lo, hi); left out: all.")
    serve: Span = Field(None, description="Timesteps served; left out: the span.")
    iterations: int | str = Field(
        description="Optimiser steps; like-RUN: of equal device time; like-RUN-flops: of equal training "
        "FLOPs; 20min: of so much device time, its search included."
    )
    hooks: dict[Name, SerializeAsAny[BaseModel]] = Field(
        {}, description="What looks in on the training, by name, each with its own keys."
    )
    sparse: SerializeAsAny[Sparse] | None = Field(
        None,
        exclude_if=lambda value: value is None,  # no part of what other experts' results depend on
        description="Sparse training from the first step to the last, by its method.",
    )

    @field_validator("hooks", mode="before")
    @classmethod
    def _known_hooks(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: HOOKS.validate(name, raw) for name, raw in value.items()}

    @field_validator("sparse", mode="before")
    @classmethod
    def _known_method(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "method" not in value:
            raise ValueError(f"give its `method`: {', '.join(METHODS)}")
        return METHODS.validate(str(value["method"]), value)

    @field_validator("iterations")
    @classmethod
    def _milestone(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value <= 0:
            raise ValueError("iterations must be positive")
        if isinstance(value, str) and Budget.of(value) is None:
            raise ValueError(f"iterations {value} must be a number, not text")
        return value

    @model_validator(mode="after")
    def _rate_given(self) -> Expert:
        masked = self.init == "fresh" and self.sparse is not None and self.sparse.zeros > 0
        if self.init == "dense" and self.sparse:
            raise ValueError("a sparse network isn't the unpruned one; give `init: fresh`")
        if (self.rate is None) != (self.init == "dense") and not masked:
            raise ValueError("give a rate to every expert except `init: dense`, which has none")
        return self

    @property
    def key(self) -> str:
        """The expert's name: runs that list the same expert share it."""
        span = f"t{self.span[0]}-{self.span[1]}"
        how = "" if self.law == "uniform" else f"-{self.law}"
        for name, config in self.hooks.items():
            how += f"-{name}{hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:6]}"
        how += f"-{self.sparse.name}" if self.sparse else ""
        if self.init == "dense":
            return f"dense-{self.search}{how}"
        if self.init == "fresh":
            return f"fresh-{self.network}-{span}{how}"
        prefix = "snapshot-" if self.init == "snapshot" else ""
        return f"{prefix}{self.search}-{self.criterion}-{self.weights}-{self.ticket}-{span}{how}"

    @property
    def ticket(self) -> str:
        """Which of the tickets of its search, criterion and weights it starts from, as paths spell it."""
        return layout.ticket(self.rate, self.after)

    @property
    def network(self) -> str:
        """Which widths it has, as cost.json and the tuning call them: `dense` or its rate."""
        return "dense" if self.init in ("dense", "snapshot") or self.rate is None else str(self.rate)

    @property
    def costs(self) -> str:
        """What its training costs, as cost.json calls it: a network, or one trained sparse."""
        return f"{self.network}-{self.sparse.name}" if self.sparse else self.network

    @property
    def continues_search(self) -> bool:
        """Whether this is the unpruned network that goes on where its search stopped."""
        return self.init == "dense" and self.law == "uniform" and not self.hooks

    @property
    def needs_ticket(self) -> bool:
        """Whether the expert starts from a ticket's file (inherit) or story (snapshot)."""
        return self.init in ("inherit", "snapshot")


class Run(Strict):
    """A list of experts whose serve-spans tile [0, T): one row of a table.

    Keys of an expert written on the run itself are defaults for all its experts.
    """

    title: str = Field(min_length=1, pattern=r"^[^\n\t]*$", description="How tables and figures call it.")
    paper: str | None = Field(
        None,
        description="The published cell it stands beside, such as eb-50-magnitude (first column of "
        "src/ebdiff/report/paper/table*.csv): every table that prints the cell shows its values.",
    )
    method: Method = Field(description="Which accounting rule holds and which block it is in.")
    seeds: Distinct[Seed] | None = Field(None, description="Seeds; null: the experiment's.")
    note: str | None = Field(None, description="Footnote wherever the run appears.")
    sampling: Sampler | None = Field(
        None,
        exclude_if=lambda value: value is None,  # no part of what tables without it depend on
        description="Where its images are drawn otherwise than the experiment's: such as {steps: 10}. Its "
        "method is `control`; experts that other runs have, too, are trained once.",
    )
    experts: tuple[Expert, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _spread_defaults(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        shared = {k: raw[k] for k in raw if k in Expert.model_fields}
        rest = {k: raw[k] for k in raw if k not in Expert.model_fields}
        experts = rest.get("experts", [{}])
        if isinstance(experts, list | tuple) and all(isinstance(e, dict) for e in experts):
            rest["experts"] = [{**shared, **e} for e in experts]
        return rest
