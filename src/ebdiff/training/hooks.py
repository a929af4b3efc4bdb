"""What looks in on training: between backward pass and update, and after intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:  # a state knows its hooks
    from ebdiff.training.state import State


class Hook:
    """Does nothing; a member spells what it does.

    Several hooks act in the order in which they are listed, and in all processes of a job alike.

    Attributes:
        every: steps between two calls of `interval`; None: it is never called.
        aside: whether the time of `interval` is no part of the training's.
    """

    every: int | None = None
    aside: bool = False

    def begin(self, state: State) -> None:
        """Before the first step of every job; `state.extra` holds what `carry` gave, or nothing yet."""

    def graded(self, state: State) -> None:
        """At every step, `state.grad` being the whole batch's: work of the device alone, no look at it."""

    def due(self, step: int) -> bool:
        """Whether `update` is wanted at a step (0-based): a function of the step alone."""
        return False

    def update(self, state: State) -> bool:
        """At a due step, before clipping; whether this replaces the optimiser's step.

        The counter of steps and the average go on in any case.
        """
        return False

    def stepped(self, state: State) -> None:
        """At every step, once weights, moments and average have moved: work of the device alone."""

    def interval(self, state: State) -> bool:
        """After every `every` steps; whether training is over."""
        return False

    def carry(self) -> Mapping[str, Tensor]:
        """What is saved with the state, by names that no other hook uses."""
        return {}

    def told(self) -> Mapping[str, Any]:
        """What the training's ledger says of it."""
        return {}
