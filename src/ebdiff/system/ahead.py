"""Work done ahead of need by other threads, where NumPy and Pillow let go of the interpreter."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

A, B = TypeVar("A"), TypeVar("B")


def ahead(function: Callable[[A], B], items: Iterable[A], threads: int, most: int) -> Iterator[B]:
    """`map(function, items)` by some threads, in order, with at most so many items in memory at a time."""
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque(pool.submit(function, item) for item in islice(items, most))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(items, 1))
        finally:
            pool.shutdown(cancel_futures=True)
