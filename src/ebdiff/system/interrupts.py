"""SIGTERM and SIGINT: a job that is asked to end keeps its state first, then ends with 128 + signal."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # a scheduler's time limit or preemption; Ctrl-C


class Interrupted(BaseException):
    """A signal ended the work. No `Exception`, so that nothing on the way mistakes it for an error."""

    def __init__(self, number: int, message: str = "nothing half-written was left; run the command again"):
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.number = number


_raised: list[int] = []  # signals whose `Interrupted` is, or was, on its way up


def _end(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a repeated one must not disturb the unwinding
    _raised.append(number)
    raise Interrupted(number)


@contextmanager
def unwinding() -> Iterator[None]:
    """Within the block a signal unwinds the stack, so that temporary files go and locks are let loose.

    A signal may come while a library is imported, and be caught there: pydantic makes an error of its own
    of it. Any error after a signal is therefore taken for the signal; if nothing comes of it at all, `noted`
    still tells.

    Raises:
        Interrupted: SIGTERM or SIGINT came.
    """
    before = {number: signal.signal(number, _end) for number in SIGNALS}
    try:
        yield
    except Exception as error:
        if not _raised:
            raise
        raise Interrupted(_raised[0]) from error
    finally:
        if not _raised:  # else the process is about to end, and a repeated signal stays ignored until it has
            for number, handler in before.items():
                signal.signal(number, handler)
        _raised.clear()


@contextmanager
def noted() -> Iterator[Callable[[], int | None]]:
    """Within the block a signal is only noted; an impatient second Ctrl-C unwinds at once.

    A second SIGTERM says nothing new: SLURM and torchrun were seen to send two within a tenth of a
    second. Whoever means it sends SIGKILL.

    Yields:
        a function that returns the signal that came, or None; it is asked between two steps.
    """
    came = _raised.copy()

    def note(number: int, frame: object) -> None:
        if came and number == signal.SIGINT:
            _end(number, frame)
        came.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
