"""How an expert may be sparse from its first step to its last: typed configs of the methods, by name.

Imports no torch. What a method does is `ebdiff.sparse`'s.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Literal

from pydantic import Field, model_validator

from ebdiff.experiment.registry import Registry
from ebdiff.experiment.schema import Strict

METHODS = Registry(
    "method"
)  # members: a `training.hooks.Hook` of (config, job) with `nonzeros`, as `sparse.Masks`


class Sparse(Strict):
    """What every method says of itself."""

    method: str

    @property
    def zeros(self) -> float:
        """The share of zeros among the weights that it masks; 0: it masks none."""
        return 0.0

    @property
    def name(self) -> str:
        """The method with all its settings, as keys of experts spell it."""
        settings = hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:6]
        return f"{self.method}-{self.zeros:g}-{settings}" if self.zeros else f"{self.method}-{settings}"

    @property
    def dense_gradients(self) -> float:
        """The share of steps whose gradient is taken of all weights, masked ones among them."""
        return 0.0

    def check(self, iterations: int) -> None:
        """Refuse a training too short for it.

        Raises:
            ValueError: names the key to change.
        """

    def scaled(self, times: Callable[[int], int]) -> Sparse:
        """The same with its steps multiplied."""
        return self


class Masked(Sparse):
    """Weights are masked one by one, exactly so many in every layer at every step."""

    sparsity: float = Field(gt=0, lt=1, description="Share of zeros among the weights that are masked.")
    distribution: Literal["erk", "uniform"] = Field(
        "erk", description="Over layers. erk: density as the sum over the product of a weight's dimensions."
    )
    ends: Literal["dense", "sparse"] = Field("dense", description="The first and the last layer.")

    @property
    def zeros(self) -> float:
        return self.sparsity


class Moving(Strict):
    """Every `interval` steps a share of what is least important makes room for what begins at zero."""

    interval: int = Field(100, gt=0, description="Steps between two updates; scaled by `scale`.")
    end: int = Field(
        gt=0,
        description="Last step at which an update may come, of the whole training, whatever its milestones; "
        "scaled by `scale`.",
    )
    fraction: float = Field(0.5, gt=0, le=1, description="Share that an update exchanges, at first.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="Of the share, down to 0 at `end`.")

    @model_validator(mode="after")
    def _updates_come(self) -> Moving:
        if self.interval > self.end:
            raise ValueError(f"interval {self.interval} is longer than training up to end {self.end}")
        return self

    def due(self, step: int) -> bool:
        """Whether an update belongs to a step (0-based); never to the first, which has nothing to rank."""
        return 0 < step <= self.end and step % self.interval == 0

    def share(self, step: int) -> float:
        """The share exchanged at a step (Evci et al. 2020, Eq. 1)."""
        cosine = (1 + math.cos(math.pi * step / self.end)) / 2
        return self.fraction * (cosine if self.schedule == "cosine" else 1.0)

    def check(self, iterations: int) -> None:
        if self.interval > iterations:
            raise ValueError(f"interval {self.interval} is longer than the training of {iterations} steps")

    def scaled(self, times: Callable[[int], int]) -> Moving:
        return self.model_copy(update={"interval": times(self.interval), "end": times(self.end)})


class Static(Masked):
    """Static-DM: masks drawn before the first step, which never change."""

    method: Literal["static"] = "static"


class MagRan(Moving, Masked):
    """MagRan-DM (SET): the smallest weights go after a step, others come at random."""

    method: Literal["magran"] = "magran"


class RigL(Moving, Masked):
    """RigL-DM: the smallest weights go instead of a step, those with the largest gradients come."""

    method: Literal["rigl"] = "rigl"
    accumulate: int = Field(
        1, gt=0, description="Steps up to the update whose gradients are summed; 1: its own batch's."
    )

    @model_validator(mode="after")
    def _fits(self) -> RigL:
        if self.accumulate > self.interval:
            raise ValueError(f"accumulate {self.accumulate} is longer than interval {self.interval}")
        return self

    @property
    def dense_gradients(self) -> float:
        return self.accumulate / (self.interval + 1)  # RigL counts the update apart from the interval

    def gathers(self, step: int) -> bool:
        """Whether a step's gradient counts at the update to come."""
        coming = -(-step // self.interval) * self.interval
        return self.due(coming) and coming - step < self.accumulate


class Recycle(Moving, Sparse):
    """Channels of a pruned network: the least important ones begin anew, in whole norm groups."""

    method: Literal["recycle"] = "recycle"


METHODS.register("static", Static, "ebdiff.sparse:Masks")
METHODS.register("magran", MagRan, "ebdiff.sparse:MagRan")
METHODS.register("rigl", RigL, "ebdiff.sparse:RigL")
METHODS.register("recycle", Recycle, "ebdiff.sparse:Recycling")
