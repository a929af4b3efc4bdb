"""What a user is meant to read when something is wrong."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path
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


class Unusable(UserError):
    """A file that can't be used: the reason, and the command that remakes it and nothing before it."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, " ".join(reason.split())
        # Of snapshots the workflow knows the folder alone.
        output = path.parent if path.parent.name == "snapshots" else path
        super().__init__(f"{path}: {self.reason}; {self.advice(output)}")

    def advice(self, output: Path) -> str:
        return f"remake it with `rm -r {output} && snakemake --cores all {output}`"


class Missing(Unusable):
    """A file that isn't there yet, as opposed to one that is damaged."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "missing")

    def advice(self, output: Path) -> str:
        return f"make it with `snakemake --cores all {output}`"


def damaged(path: Path, error: object) -> Unusable:
    """What to raise for a file whose content isn't what was written."""
    return Unusable(path, f"damaged ({error})")


def explained(error: OSError) -> str:
    """An error of the operating system in one line; of a full disk also what to do."""
    what = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "the disk is full; make room, then run the same command again"
    return f"{os.fsdecode(error.filename)}: {what}" if error.filename else what


def first_line(error: BaseException, otherwise: str = "no reason given") -> str:
    """What a library's error says first (torch's go on for pages), `otherwise` of one without words."""
    return next((line for line in str(error).splitlines() if line.strip()), otherwise)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out.

    Torch tells a full memory, and sizes beyond any, by a RuntimeError's text alone.
    """
    told = "out of memory|allocate memory|overflowed with sizes"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(told, str(error)) is not None
    )


def unknown(word: str, known: Iterable[Any]) -> str:
    """`'x' is not known`, with a did-you-mean or the list of what is."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(word), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
    return f"{str(word)[:80]!r} is not known; {hint}"
