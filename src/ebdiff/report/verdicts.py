"""What a claim is, and when numbers of two runs support one.

A difference in quality is called one only beyond twice its standard error, which takes at least
two seeds on each side.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Literal

from ebdiff.report import protocol, text
from ebdiff.report.facts import RunFacts

Verdict = Literal["supported", "not supported", "undecided at this scale"]
UNDECIDED: Verdict = "undecided at this scale"
COMPARABLE = 0.1  # of the other's distance, up to which a higher distance counts as comparable
_NO_SPREAD = "one seed on at least one side, so there is no spread to judge the difference by"


@dataclass(frozen=True)
class Claim:
    """One sentence, the numbers behind it, and whether they support it."""

    text: str
    evidence: str
    verdict: Verdict


def verdict(holds: bool) -> Verdict:
    """The verdict of what can be told without a doubt."""
    return "supported" if holds else "not supported"


@dataclass(frozen=True)
class Difference:
    """How far run a's Fréchet distance is above run b's.

    Attributes:
        numbers: both, in words.
        value: mean of a minus mean of b.
        twice: twice the standard error of that; None with one seed on a side.
        other: mean of b.
    """

    numbers: str
    value: float
    twice: float | None
    other: float

    @classmethod
    def of(cls, a: RunFacts, b: RunFacts) -> Difference | None:
        """The difference of two runs; None while one of them has no metrics."""
        x, y = a.quality, b.quality
        if not x or not y:
            return None
        numbers = f"{_name(a)} {_shown(a)} against {_shown(b)}"
        value, twice = statistics.fmean(x) - statistics.fmean(y), None
        if min(len(x), len(y)) >= 2:
            twice = 2 * math.sqrt(statistics.variance(x) / len(x) + statistics.variance(y) / len(y))
        return cls(numbers, value, twice, statistics.fmean(y))

    @property
    def evidence(self) -> str:
        """The numbers and their uncertainty, as a sentence."""
        if self.twice is None:
            return f"{self.numbers}; {_NO_SPREAD}."
        return f"{self.numbers}; difference {self.value:+.2f}, twice its standard error {self.twice:.2f}."


def compare(subject: str, a: RunFacts, b_name: str, b: RunFacts) -> Claim | None:
    """Whether run a has a lower Fréchet distance than run b; None while one of them has no metrics."""
    found = Difference.of(a, b)
    if found is None:
        return None
    if found.twice is None:
        return Claim(f"{subject} against {b_name}", found.evidence, UNDECIDED)
    decided = verdict(found.value < 0) if abs(found.value) > found.twice else UNDECIDED
    return Claim(f"{subject} gives a lower {_name(a)} than {b_name}", found.evidence, decided)


def comparable(found: Difference) -> Verdict:
    """Whether a distance is at most a tenth above the other, whatever its uncertainty."""
    if found.twice is None:
        return UNDECIDED
    margin = COMPARABLE * found.other
    if found.value + found.twice <= margin:
        return "supported"
    return "not supported" if found.value - found.twice > margin else UNDECIDED


def _name(facts: RunFacts) -> str:
    return protocol.shown(facts.results.experiment).name


def _shown(facts: RunFacts) -> str:
    seeds = text.plural(len(facts.quality), "seed")
    return f"{text.over_seeds(text.two)(facts.quality)} ({facts.run.title}, {seeds})"
