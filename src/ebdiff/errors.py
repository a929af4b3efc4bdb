"""What a user is meant to read when something is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def printable(text: object) -> str:
    """Text on one line, with what a terminal would obey (newlines, escapes) spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class UserError(Exception):
    """Bad input. The message is one line that names the file, key or value and says what to do.

    The command line prints it without a traceback and exits with status 1.
    """

    def __init__(self, message: object):
        super().__init__(printable(message))


def unknown(word: str, known: Iterable[Any]) -> str:
    """`'x' is not known`, with a did-you-mean or the list of what is."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(word), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
    return f"{str(word)[:80]!r} is not known; {hint}"
