"""Going on after a kill: a kept state is used only if it is whole and of the same settings and inputs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebdiff.experiment import layout
from ebdiff.experiment.members import Architecture
from ebdiff.experiment.records import opened, sealed
from ebdiff.nets.execution import Runtime
from ebdiff.system import parallel
from ebdiff.system.errors import Unusable, UserError, damaged
from ebdiff.system.files import holding, linked, sha256, write_json, write_text
from ebdiff.training.state import State

ASIDE = "set-aside.safetensors"
KEPT = 2  # states: the newest, and the one before in case that is damaged


@dataclass
class Place:
    """Where an unfinished training keeps itself.

    A kept state is `{step}.safetensors`; `{step}.json` tells what it belongs to, the readings so far, and the
    hashes of the state and of the snapshots.

    Attributes:
        folder: the undeclared folder beside the output.
        architecture: of the dense network.
        stamp: what a state belongs to: the settings, and the hashes of all inputs.
        state: the state to go on from, or None to begin.
    """

    folder: Path
    architecture: Architecture
    stamp: dict[str, Any]
    state: State | None = None
    _hashes: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def stats(self) -> Path:
        """The readings so far (JSON lines)."""
        return self.folder / "stats.jsonl"

    @property
    def snapshots(self) -> Path:
        """Where a search keeps its snapshots."""
        return self.folder / "snapshots"

    def keep(self, state: State) -> None:
        """Keep a state; of several processes the first does."""
        if not parallel.first():
            return
        path = self.folder / f"{state.step}.safetensors"
        state.save(path, self.architecture, {})
        files = {str(f.relative_to(self.folder)): self._hash(f) for f in (path, *self._snapshots())}
        readings = self.stats.read_text(encoding="utf-8") if self.stats.exists() else ""
        record = {**self.stamp, "files": files, "readings": readings}
        write_json(path.with_suffix(".json"), sealed(record))
        for old in self.kept()[KEPT:]:
            _forget(old)

    def kept(self) -> list[Path]:
        """The records of the kept states, newest first."""
        return _newest_first(p for p in self.folder.glob("*.json") if p.stem.isdecimal())

    def resume(self, output: Path, runtime: Runtime, others: Iterable[Path] = ()) -> None:
        """Find the newest whole state of this stamp; what isn't is told, and never used.

        Args:
            output: what the messages name.
            runtime: how it is loaded.
            others: records of states that other trainings keep and this one would come by; one of them that
                is newer is taken over, and stays where it is.
        """
        aside = False
        for record in _newest_first([*self.kept(), *others]):
            path, own = record.with_suffix(".safetensors"), record.parent == self.folder
            if own and aside:
                continue
            try:
                found = opened(record)
                changed = next((k for k in self.stamp if own and found[k] != self.stamp[k]), None)
                if changed is not None:
                    print(f"{path}: not used (its {changed} changed); set aside as {ASIDE}", flush=True)
                    os.replace(path, self.folder / ASIDE)
                    aside = True
                    continue
                self._check(path, found)
                self.state = State.load(path, runtime)
                break
            except (UserError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
                reason = error.reason if isinstance(error, Unusable) else f"damaged: {error}"
                if isinstance(error, Unusable) and error.path != path:  # its record, or a snapshot
                    reason = f"{error.path}: {reason}"
                print(f"{path}: not used ({reason})", flush=True)
        if self.state is None:
            if any(self.folder.glob("[!.]*")):
                print(f"{output}: starting again", flush=True)
            self._clear({ASIDE})
        else:
            where = "" if own else f" of {path}"
            print(f"{output}: going on from step {self.state.step}{where}", flush=True)
            if not own:
                linked(path, self.folder / path.name)
                write_json(self.folder / record.name, sealed({**found, **self.stamp}))
            for newer in self.kept():
                if int(newer.stem) > self.state.step:
                    _forget(newer)
            for state in self.folder.glob("[0-9]*.safetensors"):
                if not state.with_suffix(".json").exists():  # a kill came between the two
                    state.unlink()
            write_text(self.stats, found["readings"])  # those after this step will be taken again
            for snapshot in self._snapshots():
                if str(snapshot.relative_to(self.folder)) not in found["files"]:
                    snapshot.unlink()

    def clear(self) -> None:
        """Remove everything; the states first: killed on the way, none lacks its readings and snapshots."""
        for record in self.kept():
            _forget(record)
        shutil.rmtree(self.folder)

    def _check(self, state: Path, record: dict[str, Any]) -> None:
        """Compare what a record vouches for, a state among it, with what is there.

        Raises:
            Unusable: something differs, or is missing.
        """
        if state.name not in record["files"]:
            raise damaged(state, "its record is another state's")
        for name, expected in record["files"].items():
            if sha256(state.parent / name) != expected:
                raise damaged(state.parent / name, "it isn't what was kept")

    def _snapshots(self) -> list[Path]:
        return sorted(self.snapshots.glob("[!.]*"))

    def _hash(self, path: Path) -> str:
        """The hash of a file, taken once: a snapshot never changes."""
        key = (str(path), path.stat().st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = sha256(path)
        return self._hashes[key]

    def _clear(self, spared: set[str]) -> None:
        for leftover in self.folder.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name not in spared:
                leftover.unlink()


def _newest_first(records: Iterable[Path]) -> list[Path]:
    return sorted(records, key=lambda p: int(p.stem), reverse=True)


def _forget(record: Path) -> None:
    """Remove a kept state, its record first."""
    record.unlink()
    record.with_suffix(".safetensors").unlink(missing_ok=True)


@contextmanager
def resumable(
    output: Path,
    architecture: Architecture,
    stamp: dict[str, Any],
    runtime: Runtime,
    others: Iterable[Path] = (),
) -> Iterator[Place]:
    """The place of an unfinished output, locked; it goes when the block succeeds.

    Of several processes of one job the first holds the lock and writes; the others read what it kept.

    Args:
        output: the declared output that the state belongs to.
        architecture: of the dense network.
        stamp: what a state must belong to (`Work.stamp`).
        runtime: how a state is loaded.
        others: as of `Place.resume`.

    Raises:
        UserError: another process is at work on the same output.
    """
    folder = layout.state_of(output)
    place = Place(folder, architecture, stamp)
    if not parallel.first():
        parallel.barrier()  # the first process has decided what is kept
        if kept := place.kept():
            place.state = State.load(kept[0].with_suffix(".safetensors"), runtime)
        parallel.barrier()
        yield place
        return
    with holding(folder):
        place.resume(output, runtime, others)
        parallel.barrier()
        parallel.barrier()  # the others have read it
        yield place
        place.clear()
