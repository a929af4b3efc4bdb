"""The plain-language reading: from numbers to claims, each with its evidence and a verdict.

Runs are found by structure, never by name. Tickets that had not settled support no claim. A difference in
quality counts only beyond twice its standard error, which takes at least two seeds on each side.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from ebdiff.cost.accounting import LEARNED
from ebdiff.report import notes, published, shown, text
from ebdiff.report.facts import RunFacts, stories
from ebdiff.report.results import Results

Verdict = Literal["supported", "not supported", "undecided at this scale"]
UNDECIDED: Verdict = "undecided at this scale"
EARLY = 0.5  # of the unpruned training, before which a ticket counts as early
MOST = 0.9  # of all tickets, those that never settled among them, that must be early
TWICE = 2.0  # a 50 % network's step should be this many times shorter than a dense one's
COMPARABLE = 0.1  # of the other's distance, up to which a higher distance counts as comparable


class Claim(NamedTuple):
    """One sentence, the numbers behind it, and whether they support it."""

    text: str
    evidence: str
    verdict: Verdict


Claims = Iterator[Claim | None]  # None: nothing can be said


def read(results: Results) -> list[Claim]:
    """Every claim that the experiment's runs can speak to, in order of reading."""
    runs = [RunFacts(results, name) for name in results.experiment.runs]
    settled = [facts for facts in runs if not facts.unsettled]
    claims = [*_tickets(results, runs), *_step_times(results, runs), *_against_controls(settled)]
    claims += [*_timestep_aware(results, settled), _overlap(settled), *_speed(settled)]
    if moving := "; ".join(facts.run.title for facts in runs if facts.unsettled):
        evidence = f"Their masks were still moving when the search ended: {moving}."
        claims.append(Claim("Some runs are left out of this reading", evidence, UNDECIDED))
    return [claim for claim in claims if claim]


def _verdict(holds: bool) -> Verdict:
    """The verdict of what can be told without a doubt."""
    return "supported" if holds else "not supported"


def _lower(subject: str, a: RunFacts, other: str, b: RunFacts | None) -> Claim | None:
    """Whether run a has a lower Fréchet distance than run b; None while one of them has no metrics."""
    if b is None or not a.quality or not b.quality:
        return None
    evidence, above, twice = _difference(a, b)
    told = "against" if twice is None else f"gives a lower {_name(a)} than"
    return Claim(f"{subject} {told} {other}", evidence, _below(above, twice))


def _difference(a: RunFacts, b: RunFacts) -> tuple[str, float, float | None]:
    """In words; how far a's mean is above b's; twice the standard error of that, if both have two seeds."""
    x, y, mean = a.quality, b.quality, text.over_seeds(text.two)
    ours, theirs = (
        f"{mean(f.quality)} ({f.run.title}, {text.plural(len(f.quality), 'seed')})" for f in (a, b)
    )
    words, above = f"{_name(a)} {ours} against {theirs}; ", statistics.fmean(x) - statistics.fmean(y)
    if min(len(x), len(y)) < 2:
        words += "one seed on at least one side, so there is no spread to judge the difference by."
        return words, above, None
    twice = 2 * math.sqrt(statistics.variance(x) / len(x) + statistics.variance(y) / len(y))
    return f"{words}difference {above:+.2f}, twice its standard error {twice:.2f}.", above, twice


def _name(facts: RunFacts) -> str:
    return notes.measure(facts.results.experiment).name


def _below(above: float, twice: float | None) -> Verdict:
    """Whether a difference is below zero, beyond twice its standard error."""
    return UNDECIDED if twice is None or abs(above) <= twice else _verdict(above < 0)


def _tickets(results: Results, runs: list[RunFacts]) -> Claims:
    """Do tickets appear early, are they learned, and are they what the finished network would keep?"""
    drawn = [s for s in stories(runs) if s["criterion"] != "random"]
    found, total = [s for s in drawn if s["settled"]], results.experiment.dense.iterations
    if not drawn:
        return
    shares = [s["step"] / total for s in found]
    early = sum(share < EARLY for share in shares)  # one that hasn't settled has not appeared
    evidence = f"{early} of {text.plural(len(drawn), 'ticket')} did."
    if moving := len(drawn) - len(found):
        evidence += f" Still moving when the search ended: {moving}."
    if found:
        steps, part = text.span(s["step"] for s in found), text.span(shares, text.percent)
        paper, within = text.span(published.SEARCHED, text.percent), max(published.SEARCHED)
        evidence += (
            f" Settled after {steps} steps: {part} % of the unpruned run's {total}. "
            f"The paper says {paper} %; {sum(share <= within for share in shares)} were as early."
        )
    name = f"{text.percent(MOST)} % of the tickets appear before half of the unpruned training is over"
    yield Claim(name, evidence, _verdict(early >= MOST * len(drawn)))

    if far := [s["to_initial"] / s["chance"] for s in found if s["to_initial"] is not None]:
        evidence = (
            f"Their distance to the initial mask is {text.span(far, text.percent)} % of chance "
            f"(0 %: the initial mask itself; from {text.percent(LEARNED)} % a ticket counts as learned); "
            f"{sum(x >= LEARNED for x in far)} of {len(far)} are that far."
        )
        name = "Tickets are learned, not the initial mask seen through slow averaging"
        yield Claim(name, evidence, _verdict(min(far) >= LEARNED))

    beside = [{**s, "to_final": results.attempt(results.to_final, s)} for s in found]
    if apart := [s for s in beside if s["to_final"] is not None]:
        near = sum(s["to_final"] <= s["threshold"] for s in apart)
        final, last, initial, chance = (
            text.span((s[key] for s in apart if s[key] is not None), text.three)
            for key in ("to_final", "to_last", "to_initial", "chance")
        )
        evidence = (
            f"Once settled, their distance to the finished network's mask is {final}, "
            f"to the search's last mask {last}, to the initial mask {initial}, by chance {chance}; "
            f"{near} of {len(apart)} are within the early-bird rule's threshold."
        )
        if rest := len(found) - len(apart):
            evidence += f" The searches of {text.plural(rest, 'other ticket')} lead to no finished network."
        yield Claim("Tickets are the finished network's masks", evidence, _verdict(near == len(apart)))


def _step_times(results: Results, runs: list[RunFacts]) -> Claims:
    """What a training step of the early-bird networks costs, for the rates from 50 % on."""
    rates = {rate for facts in runs if facts.run.method == "eb" for rate in facts.rates}
    for rate in sorted(r for r in rates if r >= 0.5):
        both = results.attempt(lambda r: (results.network("dense"), results.network(str(r))), rate)
        if both is None:
            return
        dense, pruned = both
        ratio = dense["step_ms"] / pruned["step_ms"]
        evidence = (
            f"{pruned['step_ms']:.1f} ms against {dense['step_ms']:.1f} ms per step: {ratio:.2f} times; "
            f"its MACs are {dense['macs'] / pruned['macs']:.2f} times fewer."
        )
        subject = f"A training step of the {text.percent(rate)} % network"
        yield Claim(f"{subject} takes at most half of a dense one's time", evidence, _verdict(ratio >= TWICE))


_AS_LONG = "the unpruned network in the same device time"


def _against_controls(runs: list[RunFacts]) -> Claims:
    """Every magnitude early-bird run against what could replace its ticket."""
    early = [f for f in runs if (f.run.method, f.criterion, f.law) == ("eb", "magnitude", "uniform")]
    for facts in early:
        subject = f"The early-bird ticket at {text.percent(facts.rate)} %"
        if sum(other.rate == facts.rate for other in early) > 1:
            subject += f" trained for {facts.experts[0].iterations} steps"
        own, like = facts.experts[0].model_dump(), f"like-{facts.name}"
        alike, rate = {key: own[key] for key in ("rate", "law")}, own["rate"]
        rivals = {
            "a random ticket trained alike": {**own, "method": "control", "criterion": "random"},
            "pruning the finished network and finetuning": {
                **alike, "method": "finetune", "criterion": own["criterion"],
            },
            "the same network trained from scratch": {
                **alike, "method": "scratch", "iterations": own["iterations"],
            },
            "a narrow network from new weights in the same device time": {
                "init": "fresh", "rate": rate, "iterations": like,
            },
            _AS_LONG: {"init": "dense", "iterations": like},
        }  # fmt: skip
        for other, traits in rivals.items():
            yield _lower(subject, facts, other, _first(facts, runs, traits))


def _first(facts: RunFacts, runs: list[RunFacts], traits: dict[str, Any]) -> RunFacts | None:
    """The first other run of a single network with these traits of its expert, and its method."""
    for other in runs:
        if other is not facts and len(other.experts) == 1:
            own = {**other.experts[0].model_dump(), "method": other.run.method}
            if traits.items() <= own.items():
                return other
    return None


def _timestep_aware(results: Results, runs: list[RunFacts]) -> Claims:
    """The timestep-aware run of Figure 3: its speed, its quality, and what pruning has to do with it."""
    first, final = shown.timestep_aware_run(results.experiment), (results.experiment.final_expert,)
    uniform = [f for f in runs if f.law == "uniform"]
    aware = [f for f in uniform if f.run.method == "ta-eb"]
    dense = [f for f in uniform if f.run.method == "unpruned"]
    if not aware:
        return
    # The finished unpruned network, or else the first unpruned one.
    unpruned = min(dense, key=lambda f: f.experts != final, default=None)
    facts, subject = min(aware, key=lambda f: f.name != first), "Timestep-aware training"
    if facts.speedups():
        yield from _faster(subject, facts, unpruned)
    yield _lower(subject, facts, "unpruned training", unpruned)
    as_long = _first(facts, runs, {"init": "dense", "iterations": f"like-{facts.name}"})
    yield _lower(subject, facts, _AS_LONG, as_long)
    same = [(e.search, e.span, e.serve, e.iterations) for e in facts.experts]
    for other in runs:
        whole = all((e.init, e.network) == ("snapshot", "dense") for e in other.experts)
        if whole and [(e.search, e.span, e.serve, e.iterations) for e in other.experts] == same:
            pruning = "Pruning the timestep-aware experts"
            yield _lower(pruning, facts, "leaving the same experts unpruned", other)


def _faster(subject: str, aware: RunFacts, unpruned: RunFacts | None) -> Claims:
    """Timestep-aware training's time, by itself and together with its quality."""
    ways = ("as_paper", "with_search", "device_time")
    paper, search, device = (statistics.fmean(getattr(s, way) for s in aware.speedups()) for way in ways)
    evidence = (
        f"{aware.run.title}: {text.times(paper)} as the paper counts, {text.times(search)} with its "
        f"search, {text.times(device)} in device time with all experts summed."
    )
    name = f"{subject} takes less device time than unpruned training"
    yield Claim(name, evidence, _verdict(device > 1))

    name = f"{subject}, timed as in the paper, is faster than unpruned training at comparable quality"
    if paper <= 1:
        yield Claim(name, evidence, _verdict(False))
    elif unpruned and unpruned.quality and aware.quality:
        words, above, twice = _difference(aware, unpruned)
        margin = COMPARABLE * statistics.fmean(unpruned.quality)
        evidence = f"{text.times(paper)}; {words} Comparable: at most {text.percent(COMPARABLE)} % above."
        yield Claim(name, evidence, _below(above - margin, twice))


def _overlap(runs: list[RunFacts]) -> Claim | None:
    """Does training on a little more than an expert serves help? The first pair that differs in it alone."""

    def regions(facts: RunFacts) -> list[tuple]:
        """What the experts are, but for the timesteps that they and their searches train on."""
        searches, other = facts.results.experiment.searches, {"span": None, "search": ""}
        own = [e.search in searches and searches[e.search].span == e.span for e in facts.experts]
        return [(e.model_copy(update=other), o) for e, o in zip(facts.experts, own, strict=True)]

    aware = [f for f in runs if f.run.method == "ta-eb"]
    for wide, plain in ((a, b) for a in aware for b in aware if a.overlaps and not b.overlaps):
        if regions(wide) == regions(plain):
            subject = "Training experts on overlapping regions"
            return _lower(subject, wide, "training them on what they serve", plain)
    return None


def _speed(runs: list[RunFacts]) -> Claims:
    """Every run with SpeeD against the same experts without it."""
    for facts in (f for f in runs if f.law == "speed"):
        plain, rate = tuple(e.model_copy(update={"law": "uniform"}) for e in facts.experts), facts.rate
        words = {
            "unpruned": "unpruned training",
            "eb": f"the early-bird ticket at {text.percent(rate)} %",
            "ta-eb": f"timestep-aware training at {text.percent(rate)} % on average",
        }
        what = words.get(facts.run.method, facts.run.title)
        if {e.init for e in facts.experts} == {"fresh"}:
            what = f"a network pruned by {text.percent(rate)} % from new weights"
        other = next((f for f in runs if f.experts == plain), None)
        yield _lower(f"Adding SpeeD to {what}", facts, "the same without it", other)
