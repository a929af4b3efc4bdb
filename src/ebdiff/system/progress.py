"""Progress with time left: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class _Lines:
    """A stream that turns tqdm's carriage returns into lines."""

    def write(self, text: str) -> None:
        line = text.replace("\r", "").rstrip()
        if line:
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def progress(iterable: Any = None, **options: Any) -> tqdm:
    """`tqdm` with these options; every 10 s a line where standard error is no terminal."""
    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    return tqdm(iterable, file=_Lines(), mininterval=10, ncols=80, ascii=True, **options)
