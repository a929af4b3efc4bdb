"""Numbers as people read them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

MISSING = "–"


def number(value: float) -> str:
    """About three figures: 0.0308, 1.32, 35.7, 248."""
    size = abs(value)
    if size >= 100:
        return f"{value:.0f}"
    if size >= 1:
        return f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    return f"{value:.3g}"


def two(value: float) -> str:
    """Two decimals."""
    return f"{value:.2f}"


def signed(value: float) -> str:
    """Two decimals and the sign."""
    return f"{value:+.2f}"


def whole(value: float) -> str:
    """No decimals."""
    return f"{value:.0f}"


def mega(value: float) -> str:
    """In millions."""
    return number(value / 1e6)


def giga(value: float) -> str:
    """In billions."""
    return number(value / 1e9)


def percent(share: float) -> str:
    """A share in percent, with a decimal only where it has one."""
    return f"{round(100 * share, 1):g}"


def times(value: float) -> str:
    """A speed-up."""
    return f"{value:.2f}×"


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{number(seconds)} s"
    return f"{number(seconds / 60)} min" if seconds < 6000 else f"{number(seconds / 3600)} h"


def size(count: float) -> str:
    """Bytes in MB or GB, powers of ten as on disks."""
    return f"{number(count / 1e9)} GB" if count >= 1e9 else f"{number(count / 1e6)} MB"


def over_seeds(show: Callable[[float], str]) -> Callable[[Sequence[float]], str]:
    """Mean ± sample standard deviation, with equal decimals; just the number where all are equal."""

    def text(values: Sequence[float]) -> str:
        if not values:
            return MISSING
        mean = show(statistics.fmean(values))
        if len(set(values)) == 1:
            return mean
        decimals = len(mean.partition(".")[2])
        return f"{mean} ± {statistics.stdev(values):.{decimals}f}"

    return text


def span(values: Iterable[float], show: Callable[[float], str] = str) -> str:
    """One value, or the range from the lowest to the highest."""
    low_to_high = sorted(set(values))
    if not low_to_high:
        return MISSING
    return "-".join(dict.fromkeys(show(v) for v in (low_to_high[0], low_to_high[-1])))


def plural(count: int, word: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
