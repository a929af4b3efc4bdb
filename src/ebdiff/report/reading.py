"""The plain-language reading: from numbers to claims, each with its evidence and a verdict.

Runs are found by structure, never by name. Tickets that had not settled support no claim.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator

from ebdiff.cost.accounting import LEARNED
from ebdiff.experiment.runs import Expert
from ebdiff.experiment.schema import FINAL
from ebdiff.report import needs, text
from ebdiff.report.facts import RunFacts, network
from ebdiff.report.results import Results
from ebdiff.report.verdicts import COMPARABLE, UNDECIDED, Claim, Difference, comparable, compare, verdict

# How a rival is called, and whether a run with its only expert is that rival.
Rival = tuple[str, Callable[[RunFacts, Expert], bool]]
EARLY = 0.5  # of the unpruned training, before which a ticket counts as early
TWICE = 2.0  # a 50 % network's step should be this many times shorter than a dense one


def read(results: Results) -> list[Claim]:
    """Every claim that the experiment's runs can speak to, in order of reading."""
    runs = [RunFacts(results, name) for name in results.experiment.runs]
    settled = [facts for facts in runs if not facts.unsettled]
    claims = [
        *_tickets(results, runs),
        *_step_times(results, runs),
        *_against_controls(settled),
        *_timestep_aware(results, settled),
        *_overlap(settled),
        *_speed(settled),
    ]
    left_out = [facts.run.title for facts in runs if facts.unsettled]
    if left_out:
        evidence = f"Their masks were still moving when the search ended: {'; '.join(left_out)}."
        claims.append(Claim("Some runs are left out of this reading", evidence, UNDECIDED))
    return claims


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
    early = verdict(bool(found) and max(shares) < EARLY)
    yield Claim("Tickets appear before half of the unpruned training is over", f"{evidence}.", early)

    far = [s["to_initial"] / s["chance"] for s in found if s["to_initial"] is not None]
    if far:
        evidence = (
            f"Their distance to the initial mask is {text.span(far, text.percent)} % of chance "
            f"(0 %: the initial mask itself; from {text.percent(LEARNED)} % a ticket counts as learned); "
            f"{sum(x >= LEARNED for x in far)} of {len(far)} are that far."
        )
        name = "Tickets are learned, not the initial mask seen through slow averaging"
        yield Claim(name, evidence, verdict(min(far) >= LEARNED))


def _step_times(results: Results, runs: list[RunFacts]) -> Iterator[Claim]:
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
        name = (
            f"A training step of the {text.percent(rate)} % network takes at most half of a dense one's time"
        )
        yield Claim(name, evidence, verdict(ratio >= TWICE))


def _against_controls(runs: list[RunFacts]) -> Iterator[Claim]:
    """Every magnitude early-bird run against what could replace its ticket."""
    early = [
        facts
        for facts in runs
        if facts.run.method == "eb" and facts.criterion == "magnitude" and facts.law == "uniform"
    ]
    for facts in early:
        subject = f"The early-bird ticket at {text.percent(facts.rate)} %"
        if sum(other.rate == facts.rate for other in early) > 1:
            subject += f" trained for {facts.experts[0].iterations} steps"
        yield from _versus(subject, facts, runs, _rivals(facts))


def _rivals(facts: RunFacts) -> list[Rival]:
    """What an early-bird run is measured against."""
    expert = facts.experts[0]
    at_random = expert.model_copy(update={"criterion": "random"})
    alike = (expert.rate, expert.criterion, expert.law)
    trained = (expert.rate, expert.iterations, expert.law)
    return [
        ("a random ticket trained alike", lambda f, e: f.run.method == "control" and e == at_random),
        (
            "pruning the finished network and finetuning",
            lambda f, e: f.run.method == "finetune" and (e.rate, e.criterion, e.law) == alike,
        ),
        (
            "the same network trained from scratch",
            lambda f, e: f.run.method == "scratch" and (e.rate, e.iterations, e.law) == trained,
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
        fitting = (f for f in runs if f is not facts and len(f.experts) == 1 and fits(f, f.experts[0]))
        yield from _against(subject, facts, name, next(fitting, None))


def _against(subject: str, facts: RunFacts, name: str, other: RunFacts | None) -> Iterable[Claim]:
    """The claim of one comparison, if there is a run to compare with and both have metrics."""
    claim = compare(subject, facts, name, other) if other else None
    return [claim] if claim else []


# --- timestep-aware training --------------------------------------------------------------------------


def _timestep_aware(results: Results, runs: list[RunFacts]) -> Iterator[Claim]:
    """The first timestep-aware run: its speed, its quality, and what pruning has to do with it."""
    shown = needs.timestep_aware_run(results.experiment)
    ordered = sorted(runs, key=lambda f: f.name != shown)
    aware = next((f for f in ordered if f.run.method == "ta-eb" and f.law == "uniform"), None)
    if aware is None:
        return
    subject, unpruned = "Timestep-aware training", _unpruned(results, runs)
    if aware.speedups:
        yield from _speed_claims(aware, unpruned)
    yield from _against(subject, aware, "unpruned training", unpruned)
    yield from _versus(subject, aware, runs, _equal_time(aware)[1:])
    for other in runs:
        if _same_but_unpruned(aware, other):
            name = "leaving the same experts unpruned"
            yield from _against("Pruning the timestep-aware experts", aware, name, other)


def _unpruned(results: Results, runs: list[RunFacts]) -> RunFacts | None:
    """The run of the finished unpruned network, or else the first unpruned one."""
    unpruned = [f for f in runs if f.run.method == "unpruned" and f.law == "uniform"]
    finished = [f for f in unpruned if f.experts == (results.experiment.final_expert,)]
    return next(iter(finished + unpruned), None)


def _speed_claims(aware: RunFacts, unpruned: RunFacts | None) -> Iterator[Claim]:
    """Timestep-aware training's time, by itself and together with its quality."""
    paper, search, device = (
        statistics.fmean(getattr(s, key) for s in aware.speedups)
        for key in ("as_paper", "with_search", "device_time")
    )
    evidence = (
        f"{aware.run.title}: {text.times(paper)} as the paper counts, {text.times(search)} with its "
        f"search, {text.times(device)} in device time with all experts summed."
    )
    name = "Timestep-aware training takes less device time than unpruned training"
    yield Claim(name, evidence, verdict(device > 1))

    name = (
        "Timestep-aware training, timed as in the paper, is faster than unpruned training "
        "at comparable quality"
    )
    found = Difference.of(aware, unpruned) if unpruned else None
    if paper <= 1:
        yield Claim(name, evidence, verdict(False))
    elif found is not None:
        margin = f"Comparable: at most {text.percent(COMPARABLE)} % above."
        yield Claim(name, f"{text.times(paper)}; {found.evidence} {margin}", comparable(found))


def _same_but_unpruned(aware: RunFacts, other: RunFacts) -> bool:
    """Whether a run has the same searches, spans and iterations, with unpruned networks."""
    same = [(e.search, e.span, e.serve, e.iterations) for e in aware.experts]
    return (
        other is not aware
        and all(e.init == "snapshot" and network(e) == "dense" for e in other.experts)
        and [(e.search, e.span, e.serve, e.iterations) for e in other.experts] == same
    )


def _overlap(runs: list[RunFacts]) -> Iterator[Claim]:
    """Does training on a little more than an expert serves help? The first pair that differs in it alone."""
    aware = [f for f in runs if f.run.method == "ta-eb"]
    for facts in (f for f in aware if f.overlaps):
        plain = next((f for f in aware if not f.overlaps and _regions(f) == _regions(facts)), None)
        if plain is not None:
            yield from _against(
                "Training experts on overlapping regions", facts, "training them on what they serve", plain
            )
            return


def _regions(facts: RunFacts) -> list[tuple]:
    """What the experts of a run are, but for the timesteps they and their searches train on."""
    searches = facts.results.experiment.searches
    own = [e.search in searches and searches[e.search].span == e.span for e in facts.experts]
    same = {"span": None, "search": ""}
    return [(e.model_copy(update=same), o) for e, o in zip(facts.experts, own, strict=True)]


# --- SpeeD --------------------------------------------------------------------------------------------


def _speed(runs: list[RunFacts]) -> Iterator[Claim]:
    """Every run with SpeeD against the same experts without it."""
    for facts in runs:
        if facts.law != "speed":
            continue
        plain = tuple(e.model_copy(update={"law": "uniform"}) for e in facts.experts)
        other = next((f for f in runs if f.experts == plain), None)
        yield from _against(f"Adding SpeeD to {_training(facts)}", facts, "the same without it", other)


def _training(facts: RunFacts) -> str:
    """What a run trains, in words."""
    rate = f"{text.percent(facts.rate)} %"
    if {e.init for e in facts.experts} == {"fresh"}:
        return f"a network pruned by {rate} from new weights"
    words = {"unpruned": "unpruned training", "eb": f"the early-bird ticket at {rate}"}
    words["ta-eb"] = f"timestep-aware training at {rate} on average"
    return words.get(facts.run.method, facts.run.title)
