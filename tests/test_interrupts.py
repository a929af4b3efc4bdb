"""Signals that come while a library runs which catches what it shouldn't."""

import os
import signal
from contextlib import suppress

import pytest

from ebdiff.system import interrupts


@pytest.fixture(autouse=True)
def restored():
    """The handlers as they were: after a signal they are left to a process that is about to end."""
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_signal_that_a_library_made_an_error_of_is_a_signal(number):
    with pytest.raises(interrupts.Interrupted) as caught, interrupts.unwinding():
        try:
            os.kill(os.getpid(), number)
        except BaseException as error:
            raise ValueError("as pydantic does while its models are built") from error
    assert caught.value.number == number


def test_a_signal_that_a_library_swallowed_is_noted_by_the_next_loop():
    with interrupts.unwinding():
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        with interrupts.noted() as signalled:
            assert signalled() == signal.SIGTERM


def test_an_error_without_a_signal_stays_itself_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    with pytest.raises(ValueError, match="mine"), interrupts.unwinding():
        raise ValueError("mine")
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before
    with interrupts.unwinding(), interrupts.noted() as signalled:
        assert signalled() is None  # nothing is remembered of the signals before
