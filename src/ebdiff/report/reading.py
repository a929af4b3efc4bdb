"""The plain-language reading: from numbers to claims, each with its evidence and a verdict.

Runs are found by structure, never by name. Tickets that had not settled support no claim. How comparisons
of two runs are decided stands in the page's "How to read this": paired by seed, Holm over the primary claims,
which the experiment's file names. Claims that are counted or measured once come without a test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple

from ebdiff.cost.accounting import LEARNED
from ebdiff.experiment.runs import Budget, Expert
from ebdiff.experiment.schema import PrimaryClaim
from ebdiff.experiment.sparsity import Moving
from ebdiff.report import published, significance, text
from ebdiff.report.comparison import Comparison, as_good, comparable, faster, lower, timed
from ebdiff.report.facts import RunFacts, of_table, ratios, spread_of_ratio, stories, timestep_aware
from ebdiff.report.results import Results
from ebdiff.report.significance import LEVEL, SEEDS

Verdict = Literal["supported", "not supported", "undecided at this scale"]
Kind = Literal["primary", "exploratory", "measured"]  # the last: seen without a test
UNDECIDED: Verdict = "undecided at this scale"
EARLY = 0.5  # of the unpruned training, before which a ticket counts as early
MOST = 0.9  # of all tickets, those that never settled among them, that must be early
TWICE = 2.0  # a 50 % network's step should be this many times shorter than a dense one's


class Claim(NamedTuple):
    """One sentence, the numbers behind it, and whether they support it."""

    text: str
    evidence: str
    verdict: Verdict
    kind: Kind = "measured"


Claims = Iterator[Claim | None]  # None: nothing can be said
Comparisons = Iterator[Comparison | None]


def read(results: Results) -> list[Claim]:
    """Every claim that the experiment's runs can speak to, the primary ones first."""
    named = results.experiment.runs.items()
    runs = [RunFacts(results, name) for name, run in named if not run.sampling]
    settled = [facts for facts in runs if not facts.unsettled]
    compared = [*_against_controls(settled), *_timestep_aware(results, settled), *_overlap(settled)]
    compared += [*_speed(settled), *_sparse(settled), *_against_baselines(results)]
    compared = list(filter(None, compared))
    claims = [*_primary(results, compared), *_tickets(results, runs), *_step_times(results, runs)]
    for c in (c for c in compared if c.about not in results.experiment.claims):
        claims.append(_judged(c, "exploratory", c.found.p if c.found else 1.0, ", unadjusted"))
    if moving := "; ".join(facts.run.title for facts in runs if facts.unsettled):
        evidence = f"Their masks were still moving when the search ended: {moving}."
        claims.append(Claim("Some runs are left out of this reading", evidence, UNDECIDED))
    return [claim for claim in claims if claim]


def _primary(results: Results, compared: Sequence[Comparison]) -> Claims:
    """The experiment's primary claims, by Holm; what can't be tested counts as p = 1."""
    known = {c.about: c for c in compared}
    named = [known.get(claim) or _named(results, claim) for claim in results.experiment.claims]
    adjusted = significance.holm([c.found.p if c.found else 1.0 for c in named])
    for c, p in zip(named, adjusted, strict=True):
        told = f", by Holm over {text.plural(len(named), 'primary claim')} {text.p_value(p)}"
        yield _judged(c, "primary", p, told)


def _named(results: Results, claim: PrimaryClaim) -> Comparison:
    """A primary claim that the reading doesn't come to by itself, in the words of the runs' titles."""
    a, b = (RunFacts(results, name) for name in (claim.run, claim.against))
    kinds = {"lower": lower, "as-good": as_good, "comparable": comparable, "faster": faster}
    compare = kinds[claim.kind]
    if moving := " and ".join(f.run.title for f in (a, b) if f.unsettled):
        why = f"Masks were still moving when the search ended: {moving}."
    elif found := compare(a.run.title, a, b.run.title, b):
        return found
    else:
        why = "Not measured yet."
    return Comparison(claim, f"{a.run.title} against {b.run.title} ({claim.kind})", why)


def _judged(c: Comparison, kind: Kind, p: float, told: str) -> Claim:
    """A comparison, decided at a p-value, adjusted or not, and what is told of that."""
    if c.found is None:
        return Claim(c.text, c.evidence, UNDECIDED, kind)
    words = f"Two-sided {text.p_value(c.found.p)}{told}."
    if c.found.p == 0:
        words = "All seeds agree exactly, which decides without a p-value."
    verdict = _verdict(c.found.supports < c.found.opposes) if p < LEVEL else UNDECIDED
    return Claim(c.text, f"{c.evidence} {words}", verdict, kind)


def _verdict(holds: bool) -> Verdict:
    """The verdict of what can be told without a doubt."""
    return "supported" if holds else "not supported"


def _tickets(results: Results, runs: list[RunFacts]) -> Claims:
    """Do tickets appear early, are they learned, and are they what the finished network would keep?"""
    drawn = [s for s in stories(runs) if s["criterion"] != "random"]
    found, total = [s for s in drawn if s["settled"]], results.experiment.dense.iterations
    if not drawn:
        return
    shares = [s["step"] / total for s in found]
    early = sum(share < EARLY for share in shares)  # one that hasn't settled has not appeared
    evidence = f"{early} of the runs' {text.plural(len(drawn), 'ticket')} appeared by then."
    if moving := len(drawn) - len(found):
        evidence += f" Still moving when the search ended: {moving}."
    if found:
        steps, part = text.span(s["step"] for s in found), text.span(shares, text.percent)
        paper, within = text.span(published.SEARCHED, text.percent), max(published.SEARCHED)
        evidence += (
            f" Settled after {steps} steps: {part} % of the unpruned run's {total}. "
            f"The paper says {paper} %; {sum(share <= within for share in shares)} were as early"
        )
        first = min(s["window"] * s["interval_steps"] for s in found) / total
        evidence += f", and a queue of masks isn't full before {text.percent(first)} %."
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
        margin = ratio * spread_of_ratio(results, str(rate))
        evidence = (
            f"{pruned['step_ms']:.1f} ms against {dense['step_ms']:.1f} ms per step: {ratio:.2f} times, ± "
            f"{margin:.2f} by their spread; its MACs are {dense['macs'] / pruned['macs']:.2f} times fewer."
        )
        subject = f"A training step of the {text.percent(rate)} % network"
        claim = f"{subject} takes at most half of a dense one's time"
        clear = abs(ratio - TWICE) > margin
        yield Claim(claim, evidence, _verdict(ratio > TWICE) if clear else UNDECIDED)


_AS_LONG = "the unpruned network in the same device time"


def _against_controls(runs: list[RunFacts]) -> Comparisons:
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
            "a ticket of raw weights trained alike": {**own, "method": "control", "weights": "raw"},
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
        search = facts.results.experiment.searches[own["search"]]
        for completed in search.tickets_at:
            when = f"after {text.plural(completed, search.interval.unit)}" if completed else "before training"
            rivals[f"one cut {when}, trained alike"] = {**own, "method": "control", "after": completed}
        for other, traits in rivals.items():
            yield lower(subject, facts, other, _first(facts, runs, traits))


def _first(facts: RunFacts, runs: list[RunFacts], traits: dict[str, Any]) -> RunFacts | None:
    """The first other run of a single plain network with these traits of its expert, and its method."""
    for other in runs:
        if other is not facts and len(other.experts) == 1 and not other.experts[0].sparse:
            own = {**other.experts[0].model_dump(), "method": other.run.method}
            if traits.items() <= own.items():
                return other
    return None


def _changed(facts: RunFacts, runs: list[RunFacts], change: dict[str, Any]) -> RunFacts | None:
    """The first other run of the same experts but for a change."""
    experts = tuple(e.model_copy(update=change) for e in facts.experts)
    return next((f for f in runs if f is not facts and f.experts == experts), None)


def _timestep_aware(results: Results, runs: list[RunFacts]) -> Comparisons:
    """The timestep-aware run of Figure 3: its speed, its quality, and what pruning has to do with it."""
    first, final = timestep_aware(results.experiment), (results.experiment.final_expert,)
    uniform = [f for f in runs if f.law == "uniform"]
    aware = [f for f in uniform if f.run.method == "ta-eb"]
    dense = [f for f in uniform if f.run.method == "unpruned"]
    if not aware:
        return
    # The finished unpruned network, or else the first unpruned one.
    unpruned = min(dense, key=lambda f: f.experts != final, default=None)
    facts, subject = min(aware, key=lambda f: f.name != first), "Timestep-aware training"
    for compare in (faster, comparable, lower):
        yield compare(subject, facts, "unpruned training", unpruned)
    as_long = _first(facts, runs, {"init": "dense", "iterations": f"like-{facts.name}"})
    yield lower(subject, facts, _AS_LONG, as_long)
    same = [(e.search, e.span, e.serve, e.iterations) for e in facts.experts]
    for other in runs:
        whole = all((e.init, e.network) == ("snapshot", "dense") for e in other.experts)
        if whole and [(e.search, e.span, e.serve, e.iterations) for e in other.experts] == same:
            pruning = "Pruning the timestep-aware experts"
            yield lower(pruning, facts, "leaving the same experts unpruned", other)
    for other, change in (
        ("random ones, trained alike", {"criterion": "random"}),
        ("those of the full range", {"search": results.experiment.dense.search}),
    ):
        rival = _changed(facts, runs, change)
        yield lower("Timestep-aware training from its own tickets", facts, f"from {other}", rival)


_BASELINES = {
    "scratch": "training a pruned network from scratch",
    "finetune": "training, pruning and finetuning",
}


def _against_baselines(results: Results) -> Comparisons:
    """The ratios of the paper's text: the runs whose cells it names, over the baselines of their table."""
    for table in results.experiment.tables:
        rows = of_table(results, table)
        cells = {facts.run.paper: facts for facts in rows}
        for facts, method in product(rows, _BASELINES):
            said = published.ratio(results.experiment, table, facts.name, method)
            base = cells.get(said["over"]) if said else None
            # Its 10.32 over train-prune-finetune is a second ratio to a scratch row.
            if base is None or base.run.method != method or facts.unsettled:
                continue
            if ratios(facts, base, "as_paper"):
                _, words, found = timed(facts, base, "as_paper")
                said_there = f"as the paper's text, which says {said['printed']}"
                ours = f"{facts.run.title}, timed as in Table {table[5:]},"
                name = f"{ours} is faster than {_BASELINES[method]}"
                yield Comparison(None, name, f"Over {base.run.title}, {said_there}. {words}", found)


def _overlap(runs: list[RunFacts]) -> Comparisons:
    """Does training on a little more than an expert serves help: with the same tickets, and as in Table 3?"""

    def same(facts: RunFacts) -> list[Expert]:
        """What the experts are, but for the timesteps that they train on."""
        return [e.model_copy(update={"span": None}) for e in facts.experts]

    def own(facts: RunFacts) -> list[Expert]:
        """As `same`, with tickets of searches on just these timesteps."""
        spans = {name: search.span for name, search in facts.results.experiment.searches.items()}
        other = {"span": None, "search": ""}
        return [e.model_copy(update=other) if spans.get(e.search) == e.span else e for e in facts.experts]

    aware = [f for f in runs if f.run.method == "ta-eb"]
    pairs = [(a, b) for a in aware for b in aware if a.overlaps and not b.overlaps]
    for tickets, regions in (("with the same tickets", same), ("with tickets of these (Table 3)", own)):
        if found := next((pair for pair in pairs if regions(pair[0]) == regions(pair[1])), None):
            subject, other = "Training experts on overlapping regions", "training them on what they serve"
            yield lower(subject, found[0], f"{other}, {tickets}", found[1])


def _speed(runs: list[RunFacts]) -> Comparisons:
    """Every run with SpeeD against the same experts without it."""
    for facts in (f for f in runs if f.law == "speed"):
        rate = text.percent(facts.rate)
        words = {
            "unpruned": "unpruned training",
            "eb": f"the early-bird ticket at {rate} %",
            "ta-eb": f"timestep-aware training at {rate} % on average",
        }
        what = words.get(facts.run.method, facts.run.title)
        if {e.init for e in facts.experts} == {"fresh"} and facts.run.method != "sparse":
            what = f"a network pruned by {rate} % from new weights"
        other = _changed(facts, runs, {"law": "uniform"})
        yield lower(f"Adding SpeeD to {what}", facts, "the same without it", other)


def _sparse(runs: list[RunFacts]) -> Comparisons:
    """Sparse runs of enough seeds: against the unpruned one, the run that they cost as much as, and others.

    Those are static masks, updates of another share, and no sparse training at all, alike in all else.
    """
    many = [f for f in runs if len(f.quality) >= SEEDS]
    named = {f.name: f for f in many}
    unpruned = next((f for f in many if f.run.method == "unpruned"), None)

    def traits(facts: RunFacts, *without: str) -> dict[str, Any]:
        expert = facts.experts[0]
        own = expert.sparse.model_dump() if expert.sparse else {}
        own = {key: value for key, value in own.items() if key not in without}
        return {**expert.model_dump(exclude={"sparse"}), "sparse": own}

    sparse = [f for f in many if f.run.method == "sparse" and len(f.experts) == 1]
    for facts in sparse:
        own, title = facts.experts[0], facts.run.title
        if budget := Budget.of(own.iterations):
            if rival := named.get(budget.run or ""):
                yield lower(title, facts, f"{rival.run.title} at equal cost", rival)
        else:
            yield as_good(title, facts, "the unpruned network", unpruned)
        if rival := _changed(facts, many, {"sparse": None}):
            yield lower(title, facts, f"{rival.run.title}, whose channels stay", rival)
        for other in sparse:
            moves = [isinstance(f.experts[0].sparse, Moving) for f in (facts, other)]
            moving = (*Moving.model_fields, "method", "accumulate")
            if moves == [True, False] and traits(facts, *moving) == traits(other, *moving):
                yield lower(title, facts, f"{other.run.title}, whose masks never move", other)
            shares = [getattr(f.experts[0].sparse, "fraction", 0.0) for f in (facts, other)]
            if shares[0] < shares[1] and traits(facts, "fraction") == traits(other, "fraction"):
                yield lower(title, facts, f"{other.run.title}, which exchanges more", other)
