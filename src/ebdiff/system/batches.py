"""A large result made batch by batch, each kept: what a killed job has done needn't be done again."""

from __future__ import annotations

import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ebdiff.system import interrupts, parallel
from ebdiff.system.errors import Unusable
from ebdiff.system.files import holding, read_arrays, write_arrays, write_rows
from ebdiff.system.progress import progress


@dataclass(frozen=True)
class Batches:
    """A large result in the making in a folder: an npz per batch, whose zip notices damage.

    `stamp` is what the result depends on; a batch of another stamp doesn't count.
    """

    folder: Path
    stamp: str

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Have the folder for this job's processes alone; UserError if another job is at work on it."""
        with holding(self.folder) if parallel.first() else nullcontext():
            yield

    def fill(
        self, count: int, size: int, make: Callable[[list[int]], dict[str, np.ndarray]], what: str
    ) -> None:
        """Make the batches of `size` of `count` rows that aren't there yet, and wait for those of others.

        Several processes (`torchrun`) take turns. Called while `holding`; `make` gives the arrays of the rows
        of given numbers, `what` says whose they are.

        Raises:
            Interrupted: SIGTERM or SIGINT came; the batches so far are kept.
        """
        if parallel.first():
            self.forget_others()
        parallel.barrier()
        found, batches = self.there(), range(math.ceil(count / size))
        parallel.barrier()  # before anybody adds to it
        todo = [b for b in batches if b not in found][parallel.rank() :: parallel.world()]
        if found and parallel.first():
            print(f"{what}: going on, {len(found)} batches are there", flush=True)
        bar = progress(todo, desc=what, unit="batch", disable=not parallel.first())
        with interrupts.noted() as signalled:
            for b in bar:
                began = time.perf_counter()
                arrays = make(list(range(b * size, min((b + 1) * size, count))))
                told = {"rank": parallel.rank(), "seconds": time.perf_counter() - began}
                write_arrays(self.path(b), **arrays, **told, stamp=self._stamp(b))
                if signalled():
                    raise interrupts.Interrupted(
                        signalled(), f"{what}: batches so far are kept; the same command goes on"
                    )
        if not parallel.first():
            return
        while len(self.there()) < len(batches):  # by others; a signal can end this, but no barrier
            time.sleep(0.1)

    def forget(self) -> None:
        """Remove all, once the result is whole."""
        shutil.rmtree(self.folder)

    def path(self, batch: int) -> Path:
        """Where a batch lies."""
        return self.folder / f"{batch}.npz"

    def _stamp(self, batch: int) -> str:
        """What a batch belongs to: its number, too, so that none is taken for another one."""
        return f"{self.stamp} {batch}"

    def there(self) -> set[int]:
        """The batches that are there."""
        return {int(path.stem) for path in self.folder.glob("*.npz")}

    def forget_others(self) -> None:
        """Remove what isn't a whole batch of this stamp, with a word."""
        for path in self.folder.iterdir():
            try:
                batch = int(path.stem)
                if path == self.path(batch) and str(read_arrays(path)["stamp"]) == self._stamp(batch):
                    continue
                reason = "another batch, made for other settings or from something else"
            except (Unusable, KeyError, ValueError) as error:
                reason = error.reason if isinstance(error, Unusable) else "no batch"
            print(f"{path}: not used ({reason}); it is made again", flush=True)
            path.unlink()

    def join(self, name: str, output: Path, count: int) -> float:
        """Write one array of all batches as an npy file of `count` rows, batch by batch.

        Returns:
            seconds of making them: processes work side by side, so the longest one's.
        """
        paths = [self.path(batch) for batch in sorted(self.there())]
        first = read_arrays(paths[0])[name]
        seconds: defaultdict[int, float] = defaultdict(float)

        def parts() -> Iterator[np.ndarray]:
            for path in paths:
                found = read_arrays(path)
                seconds[int(found["rank"])] += float(found["seconds"])
                yield found[name]

        write_rows(output, first.dtype, (count, *first.shape[1:]), parts())
        return max(seconds.values())
