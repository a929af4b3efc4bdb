"""The plain-language reading: from numbers to claims, each with its evidence and a verdict.

A difference in quality is called one only beyond twice its standard error, which takes at least
two seeds on each side. Tickets that had not settled support no claim.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ebdiff.accounting import LEARNED
from ebdiff.config import FINAL, Expert
from ebdiff.report import text
from ebdiff.report.facts import RunFacts, network
from ebdiff.report.results import Missing, Results

Verdict = Literal["supported", "not supported", "undecided at this scale"]
# How a rival is called, and whether a run with its only expert is that rival.
Rival = tuple[str, Callable[[RunFacts, Expert], bool]]
UNDECIDED: Verdict = "undecided at this scale"
EARLY = 0.5  # of the unpruned training, before which a ticket counts as early
TWICE = 2.0  # a 50 % network's step should be this many times shorter than a dense one


@dataclass(frozen=True)
class Claim:
    """One sentence, the numbers behind it, and whether they support it."""

    text: str
    evidence: str
    verdict: Verdict


def read(results: Results) -> list[Claim]:
    """Every claim that the experiment's runs can speak to, in order of reading."""
    runs = [RunFacts(results, name) for name in results.experiment.runs]
    settled = [facts for facts in runs if not facts.unsettled]
    claims = [
        *_tickets(results, runs),
        *_step_times(results, runs),
        *_against_controls(settled),
        *_timestep_aware(settled),
    ]
    left_out = [facts.run.title for facts in runs if facts.unsettled]
    if left_out:
        evidence = f"Their masks were still moving when the search ended: {'; '.join(left_out)}."
        claims.append(Claim("Some runs are left out of this reading", evidence, UNDECIDED))
    return claims


def compare(subject: str, a: RunFacts, b_name: str, b: RunFacts) -> Claim | None:
    """Whether run a has a lower cFD than run b; None while one of them has no metrics."""
    x, y = a.quality, b.quality
    if not x or not y:
        return None
    numbers = f"cFD {_shown(a)} against {_shown(b)}"
    if min(len(x), len(y)) < 2:
        why = "one seed on at least one side, so there is no spread to judge the difference by"
        return Claim(f"{subject} against {b_name}", f"{numbers}; {why}.", UNDECIDED)
    difference = statistics.fmean(x) - statistics.fmean(y)
    twice = 2 * math.sqrt(statistics.variance(x) / len(x) + statistics.variance(y) / len(y))
    evidence = f"{numbers}; difference {difference:+.2f}, twice its standard error {twice:.2f}."
    verdict: Verdict = UNDECIDED
    if abs(difference) > twice:
        verdict = "supported" if difference < 0 else "not supported"
    return Claim(f"{subject} gives a lower cFD than {b_name}", evidence, verdict)


def _shown(facts: RunFacts) -> str:
    seeds = text.plural(len(facts.quality), "seed")
    return f"{text.over_seeds(text.two)(facts.quality)} ({facts.run.title}, {seeds})"


def _tickets(results: Results, runs: list[RunFacts]) -> Iterator[Claim]:
    """Do tickets appear early, and are they learned?"""
    stories = {
        (s["search"], s["criterion"], s["weights"], s["rate"], s["seed"]): s
        for facts in runs
        for s in facts.tickets
        if s["search"] != FINAL and s["criterion"] != "random"
    }
    found = [s for s in stories.values() if s["settled"]]
    if not stories:
        return
    count = f"{len(found)} of {text.plural(len(stories), 'ticket')} settled within the search"
    total = results.experiment.dense.iterations
    shares = [s["step"] / total for s in found]
    evidence = count
    if found:
        steps = text.span(s["step"] for s in found)
        evidence += (
            f", after {steps} steps: {text.span(shares, text.percent)} % of the unpruned run's {total}"
        )
    verdict: Verdict = "supported" if found and max(shares) < EARLY else "not supported"
    yield Claim("Tickets appear before half of the unpruned training is over", f"{evidence}.", verdict)

    far = [s["to_initial"] / s["chance"] for s in found if s["to_initial"] is not None]
    if far:
        evidence = (
            f"Their distance to the initial mask is {text.span(far, text.percent)} % of chance "
            f"(0 %: the initial mask itself; from {text.percent(LEARNED)} % a ticket counts as learned); "
            f"{sum(x >= LEARNED for x in far)} of {len(far)} are that far."
        )
        verdict = "supported" if min(far) >= LEARNED else "not supported"
        yield Claim(
            "Tickets are learned, not the initial mask seen through slow averaging", evidence, verdict
        )


def _step_times(results: Results, runs: list[RunFacts]) -> Iterator[Claim]:
    """What a training step of the early-bird networks costs, for the rates from 50 % on."""
    rates = {rate for facts in runs if facts.run.method == "eb" for rate in facts.rates}
    for rate in sorted(r for r in rates if r >= 0.5):
        try:
            dense, pruned = results.network("dense"), results.network(str(rate))
        except Missing:
            if not results.partial:
                raise
            return
        ratio = dense["step_ms"] / pruned["step_ms"]
        evidence = (
            f"{pruned['step_ms']:.1f} ms against {dense['step_ms']:.1f} ms per step: {ratio:.2f} times; "
            f"its MACs are {dense['macs'] / pruned['macs']:.2f} times fewer."
        )
        name = (
            f"A training step of the {text.percent(rate)} % network takes at most half of a dense one's time"
        )
        yield Claim(name, evidence, "supported" if ratio >= TWICE else "not supported")


def _against_controls(runs: list[RunFacts]) -> Iterator[Claim]:
    """Every magnitude early-bird run against what could replace its ticket."""
    for facts in runs:
        if facts.run.method == "eb" and facts.criterion == "magnitude":
            subject = f"The early-bird ticket at {text.percent(facts.rate)} %"
            yield from _versus(subject, facts, runs, _rivals(facts))


def _rivals(facts: RunFacts) -> list[Rival]:
    """What an early-bird run is measured against."""
    expert = facts.experts[0]
    at_random = expert.model_copy(update={"criterion": "random"})
    alike = (expert.rate, expert.criterion)
    return [
        ("a random ticket trained alike", lambda f, e: f.run.method == "control" and e == at_random),
        (
            "pruning the finished network and finetuning",
            lambda f, e: f.run.method == "finetune" and (e.rate, e.criterion) == alike,
        ),
        (
            "the same network trained from scratch",
            lambda f, e: f.run.method == "scratch" and e.rate == expert.rate,
        ),
        *_equal_time(facts),
    ]


def _equal_time(facts: RunFacts) -> list[Rival]:
    """Rivals that spend the same device time: fresh narrow weights, or the unpruned network cut short."""
    like, rate = f"like-{facts.name}", facts.experts[0].rate
    return [
        (
            "a narrow network from new weights in the same device time",
            lambda _, e: (e.init, e.rate, e.iterations) == ("fresh", rate, like),
        ),
        (
            "the unpruned network in the same device time",
            lambda _, e: (e.init, e.iterations) == ("dense", like),
        ),
    ]


def _versus(subject: str, facts: RunFacts, runs: list[RunFacts], rivals: list[Rival]) -> Iterator[Claim]:
    """A run against the first other single-network run that fits each description."""
    for name, fits in rivals:
        for other in runs:
            if other is not facts and len(other.experts) == 1 and fits(other, other.experts[0]):
                claim = compare(subject, facts, name, other)
                if claim is not None:
                    yield claim
                break


def _timestep_aware(runs: list[RunFacts]) -> Iterator[Claim]:
    """The first timestep-aware run: its speed, its quality, and what pruning has to do with it."""
    aware = next((f for f in runs if f.run.method == "ta-eb"), None)
    if aware is None:
        return
    if aware.speedups:
        paper, search, device = (
            statistics.fmean(getattr(s, key) for s in aware.speedups)
            for key in ("as_paper", "with_search", "device_time")
        )
        evidence = (
            f"{aware.run.title}: {text.times(paper)} as the paper counts, {text.times(search)} with its "
            f"search, {text.times(device)} in device time with all experts summed."
        )
        verdict: Verdict = "supported" if device > 1 else "not supported"
        yield Claim(
            "Timestep-aware training takes less device time than unpruned training", evidence, verdict
        )
    for other in runs:
        if other.run.method == "unpruned":
            claim = compare("Timestep-aware training", aware, "unpruned training", other)
            if claim is not None:
                yield claim
            break
    yield from _versus("Timestep-aware training", aware, runs, _equal_time(aware)[1:])
    for other in runs:
        if _same_but_unpruned(aware, other):
            claim = compare(
                "Pruning the timestep-aware experts", aware, "leaving the same experts unpruned", other
            )
            if claim is not None:
                yield claim


def _same_but_unpruned(aware: RunFacts, other: RunFacts) -> bool:
    """Whether a run has the same searches, spans and iterations, with unpruned networks."""
    same = [(e.search, e.span, e.serve, e.iterations) for e in aware.experts]
    return (
        other is not aware
        and all(e.init == "snapshot" and network(e) == "dense" for e in other.experts)
        and [(e.search, e.span, e.serve, e.iterations) for e in other.experts] == same
    )
