"""Comparisons of two runs, seed by seed: words, numbers and what a test makes of them."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from ebdiff.experiment.schema import PrimaryClaim
from ebdiff.report import notes, published, significance, text
from ebdiff.report.facts import RunFacts, paired, ratios
from ebdiff.report.significance import SEEDS, Mean, PValues

COMPARABLE = 0.1  # of the other's distance, up to which a higher distance counts as comparable


class Comparison(NamedTuple):
    """A claim about two runs, before it is known whether it is a primary one."""

    about: PrimaryClaim | None  # what the experiment would call it
    text: str
    evidence: str
    found: PValues | None = None  # None: nothing can be decided


def lower(subject: str, a: RunFacts, other: str, b: RunFacts | None) -> Comparison | None:
    """Whether run a has a lower Fréchet distance than run b; None while one of them has no metrics."""
    if b is None or not a.quality or not b.quality:
        return None
    about, (words, pairs) = PrimaryClaim(run=a.name, against=b.name), _distances(a, b)
    if len(pairs) < SEEDS:
        return Comparison(about, f"{subject} against {other}", words)
    claim = f"{subject} gives a lower {_name(a)} than {other}"
    return Comparison(about, claim, words, significance.above([y - x for x, y in pairs]))


def _distances(a: RunFacts, b: RunFacts) -> tuple[str, list[tuple[float, float]]]:
    """The distances of two runs in words, and in pairs, one for each seed that both have."""
    pairs, mean = paired(a, b, lambda facts: facts.quality), text.over_seeds(text.two)
    x, y = (mean([pair[i] for pair in pairs]) for i in (0, 1))
    words = f"{_name(a)} {x} ({a.run.title}) against {y} ({b.run.title})"
    if len(pairs) < SEEDS:
        return f"{words}; {_too_few(len(pairs))}.", pairs
    difference = Mean.of([x - y for x, y in pairs])
    interval = text.interval(difference.interval, text.signed)
    words += f"; difference {difference.value:+.2f}, {interval}, paired over {len(pairs)} seeds."
    return words, pairs


def _too_few(seeds: int) -> str:
    return f"{text.plural(seeds, 'seed')} in common, and fewer than {SEEDS} decide nothing"


def _name(facts: RunFacts) -> str:
    return notes.measure(facts.results.experiment).name


def timed(a: RunFacts, b: RunFacts, way: str) -> tuple[float, str, PValues | None]:
    """How many times faster a is than b; that in words, with the spread of step times; what it decides."""
    found = ratios(a, b, way)
    ratio = statistics.fmean(found)
    margin = ratio * math.hypot(a.spread, b.spread)
    words = f"{text.times(ratio)} ± {margin:.2f} by the spread of the measured steps"
    if len(found) < SEEDS:
        return ratio, f"{words}; {_too_few(len(found))}.", None
    alike = len(set(found)) == 1
    words += "; alike" if alike else f"; {text.interval(Mean.of(found).interval, text.two)}"
    return ratio, f"{words} over {len(found)} seeds.", significance.above(found, 1, margin)


def faster(subject: str, a: RunFacts, other: str, b: RunFacts | None) -> Comparison | None:
    """Whether run a takes less device time than run b by measured step times, if ledgers don't contradict."""
    if b is None or not ratios(a, b, "device_time"):
        return None
    ratio, words, found = timed(a, b, "device_time")
    ways = (statistics.fmean(getattr(s, way) for s in a.speedups()) for way in ("as_paper", "with_search"))
    paper, search = map(text.times, ways)
    evidence = (
        f"{a.run.title}: {paper} as the paper counts, {search} with its search. "
        f"In device time with all experts summed, over {b.run.title}: {words}"
    )
    if spent := paired(a, b, lambda facts: facts.seconds):
        ours, theirs = (statistics.fmean(pair[i] for pair in spent) for i in (0, 1))
        evidence += f" Really spent, by the ledgers: {ours:.0f} s against {theirs:.0f} s"
        contradicted = (ratio > 1) != (theirs > ours)
        evidence += ", which contradicts it: nothing is decided." if contradicted else "."
        found = None if contradicted else found
    about = PrimaryClaim(run=a.name, kind="faster", against=b.name)
    return Comparison(about, f"{subject} takes less device time than {other}", evidence, found)


def as_good(subject: str, a: RunFacts, other: str, b: RunFacts | None) -> Comparison | None:
    """Whether run a's distance is at most a tenth above that of run b, whatever it takes.

    A test of non-inferiority on the paired 1.1 b - a: the margin is as unsure as b is.
    """
    if b is None or not a.quality or not b.quality:
        return None
    about, (told, pairs) = PrimaryClaim(run=a.name, kind="as-good", against=b.name), _distances(a, b)
    evidence = f"{told} Comparable: at most {text.percent(COMPARABLE)} % above.{_headline(a, b)}"
    found = significance.above([(1 + COMPARABLE) * y - x for x, y in pairs]) if len(pairs) >= SEEDS else None
    return Comparison(about, f"{subject} is of comparable quality to {other}", evidence, found)


def comparable(subject: str, a: RunFacts, other: str, b: RunFacts | None) -> Comparison | None:
    """Whether run a is faster as the paper counts, and as good as run b."""
    good = as_good(subject, a, other, b)
    if b is None or good is None or not ratios(a, b, "as_paper"):
        return None
    _, words, fast = timed(a, b, "as_paper")
    evidence, found = f"{words} {good.evidence}", fast.both(good.found) if fast and good.found else None
    about = PrimaryClaim(run=a.name, kind="comparable", against=b.name)
    claim = f"{subject}, timed as in the paper, is faster than {other} at comparable quality"
    return Comparison(about, claim, evidence, found)


def _headline(a: RunFacts, b: RunFacts) -> str:
    """Whether the paper's own distances would be called comparable."""
    rows = published.headline(a.results.experiment, a.name, b.name)
    if not rows:
        return ""
    x, y = (published.number(row, "fid") for row in rows)
    printed = "" if float(rows[0]["fid"]) == x else f" (printed {rows[0]['fid']})"
    apart = f"{100 * (x / y - 1):+.0f} %"
    held = "keep" if x <= (1 + COMPARABLE) * y else "fail"
    return f" The paper's own {x:g}{printed} against {y:g}, {apart}, would {held} that margin."
