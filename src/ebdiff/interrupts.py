"""SIGTERM and SIGINT: a job that is asked to end keeps its state first, then ends with 128 + signal."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # a scheduler's time limit or preemption; Ctrl-C


class Interrupted(BaseException):
    """A signal ended the work. No `Exception`, so that nothing on the way mistakes it for an error.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int, message: str = "nothing half-written was left; run the command again"):
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.number = number


def _end(number: int, frame: object) -> None:
    raise Interrupted(number)


def unwind() -> None:
    """From now on a signal unwinds the stack, so that temporary files go and locks are let loose."""
    for number in SIGNALS:
        signal.signal(number, _end)


@contextmanager
def noted() -> Iterator[Callable[[], int | None]]:
    """Within the block the first signal is only noted; a second one unwinds at once.

    Yields:
        a function that returns the signal that came, or None; it is asked between two steps.
    """
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        if came:
            _end(number, frame)
        came.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
