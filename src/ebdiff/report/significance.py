"""What decides a claim: Student's t on paired differences, and Holm's correction for several claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import stdtr, stdtrit  # the distribution and quantiles of t; scipy.stats takes a second

LEVEL = 0.05  # p-values below it decide
SEEDS = 3  # fewer decide nothing


class Mean(NamedTuple):
    """The mean of n independent values, such as the differences between two runs, one for each seed."""

    value: float
    error: float  # standard error
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of at least two values."""
        n = len(values)
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(n), n)

    def below(self, bound: float) -> float:
        """One-sided p: how likely a mean as low as this is, if the true one is `bound`."""
        return float(stdtr(self.n - 1, self._t(bound)))

    def above(self, bound: float) -> float:
        """One-sided p: how likely a mean as high as this is, if the true one is `bound`."""
        return float(stdtr(self.n - 1, -self._t(bound)))

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true mean lies, with 95 % confidence."""
        half = float(stdtrit(self.n - 1, 0.975)) * self.error
        return self.value - half, self.value + half

    def _t(self, bound: float) -> float:
        away = self.value - bound
        if self.error == 0:  # all values are equal
            return math.copysign(math.inf, away) if away else 0.0
        return away / self.error


class PValues(NamedTuple):
    """Two-sided p-values: how likely such numbers are if a claim is wrong, and if it is right.

    A claim may be decided either way, so each side is a one-sided p-value doubled: together they err at
    `LEVEL`, and decide where the 95 % interval lies beyond the bound.
    """

    supports: float  # small: hardly, if it were wrong
    opposes: float  # small: hardly, if it were right

    @property
    def p(self) -> float:
        """The p-value of whichever way the numbers point."""
        return min(self)

    def both(self, other: PValues) -> PValues:
        """Of the claim that this and another hold together.

        It is supported if both are (intersection-union test), and opposed if either is: the smaller of two,
        doubled (Bonferroni).
        """
        return PValues(max(self.supports, other.supports), min(1.0, 2 * min(self.opposes, other.opposes)))


def above(values: Sequence[float], bound: float = 0, margin: float = 0) -> PValues:
    """t-test on whether values are above a bound on average, by more than a margin either way."""
    mean = Mean.of(values)
    return PValues(min(1.0, 2 * mean.above(bound + margin)), min(1.0, 2 * mean.below(bound - margin)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given: Holm's step-down procedure (Scand. J. Statist. 1979)."""
    adjusted, so_far = list(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = so_far
    return adjusted
