"""Numbers as people read them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

MISSING = "–"

two = "{:.2f}".format
three = "{:.3f}".format
signed = "{:+.2f}".format
whole = "{:.0f}".format
times = "{:.2f}×".format


def number(value: float) -> str:
    """About three figures: 0.0308, 1.32, 35.7, 248."""
    size = abs(value)
    if size >= 100:
        return f"{value:.0f}"
    if size >= 1:
        return f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    return f"{value:.3g}"


def mega(value: float) -> str:
    """In millions."""
    return number(value / 1e6)


def giga(value: float) -> str:
    """In billions."""
    return number(value / 1e9)


def percent(share: float) -> str:
    """A share in percent, with a decimal only where it has one."""
    return f"{round(100 * share, 1):g}"


def duration(seconds: float) -> str:
    """In the largest unit of which there are two: 45.0 s, 12.0 min, 3.40 h, 17.5 days, 30.5 years."""
    units = (("years", 365.25 * 86400), ("days", 86400), ("h", 3600), ("min", 60))
    unit, length = next(((unit, length) for unit, length in units if seconds >= 2 * length), ("s", 1))
    return f"{number(seconds / length)} {unit}"


def size(count: float) -> str:
    """Bytes in MB or GB, powers of ten as on disks."""
    return f"{number(count / 1e9)} GB" if count >= 1e9 else f"{number(count / 1e6)} MB"


def over_seeds(show: Callable[[float], str]) -> Callable[[Sequence[float]], str]:
    """Mean ± sample standard deviation, with equal decimals; just the number where all are equal."""

    def text(values: Sequence[float]) -> str:
        if not values:
            return MISSING
        mean = show(statistics.fmean(values))
        decimals = len(mean.partition(".")[2])
        return mean if len(set(values)) == 1 else f"{mean} ± {statistics.stdev(values):.{decimals}f}"

    return text


def span(values: Iterable[float | str], show: Callable[..., str] = str, to: str = "-") -> str:
    """One value, or the range from the lowest to the highest."""
    low_to_high = sorted(set(values))
    return to.join(dict.fromkeys(map(show, low_to_high[:: len(low_to_high) - 1 or 1]))) or MISSING


def interval(ends: tuple[float, float], show: Callable[[float], str]) -> str:
    """`95 % interval -0.12 to +0.03`."""
    return f"95 % interval {show(ends[0])} to {show(ends[1])}"


def p_value(p: float) -> str:
    """`p = 0.0496`, or `p < 0.001`."""
    return f"p = {number(p)}" if p >= 0.001 else "p < 0.001"


def plural(count: int, word: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
