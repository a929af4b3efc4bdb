"""Going on after a kill: state is used only if it belongs to the same configuration and inputs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebdiff.experiment import layout
from ebdiff.experiment.members import Architecture
from ebdiff.nets import store
from ebdiff.nets.execution import Runtime
from ebdiff.system import parallel
from ebdiff.system.errors import Unusable, UserError
from ebdiff.system.files import holding, sha256, write_text
from ebdiff.training.state import State

STATE, ASIDE = "state.safetensors", "set-aside.safetensors"


def stamp(digest: str, images: str, inputs: list[Path]) -> dict[str, Any]:
    """What a state and its artefact depend on: config digest and the hash of every input file.

    Of an input folder every file counts but hidden ones (unfinished writes, Snakemake's time stamp).
    """
    files = [f for p in inputs for f in (sorted(p.glob("[!.]*")) if p.is_dir() else [p])]
    return {"digest": digest, "images": images, "inputs": {str(f): sha256(f) for f in files}}


@dataclass
class Place:
    """Where an unfinished training keeps itself.

    Attributes:
        folder: the undeclared folder beside the output.
        state: the state to go on from, or None to begin.
        story: what the output is; the stamp is part of it.
    """

    folder: Path
    state: State | None
    story: dict[str, Any]

    @property
    def stats(self) -> Path:
        """The readings so far (JSON lines)."""
        return self.folder / "stats.jsonl"

    def saver(self, architecture: Architecture) -> Callable[[State], None]:
        """A function that keeps a state here; of several processes the first does."""
        path = self.folder / STATE
        return lambda state: state.save(path, architecture, self.story) if parallel.first() else None


@contextmanager
def resumable(
    output: Path, story: dict[str, Any], expected: dict[str, Any], runtime: Runtime
) -> Iterator[Place]:
    """The place of an unfinished output, locked; it goes when the block succeeds.

    Of several processes of one job the first holds the lock and writes; the others read what it kept.

    Args:
        output: the declared output that the state belongs to.
        story: what the output is.
        expected: its `stamp`.
        runtime: how a state is loaded.

    Raises:
        UserError: another process is at work on the same output.
    """
    folder = layout.state_of(output)
    if not parallel.first():
        parallel.barrier()  # the first process has decided what is kept
        kept = folder / STATE
        state = State.load(kept, runtime) if kept.exists() else None
        parallel.barrier()
        yield Place(folder, state, {**story, **expected})
        return
    with holding(folder):
        place = Place(folder, _resume(folder, output, expected, runtime), {**story, **expected})
        if place.state is None:
            for leftover in folder.iterdir():  # of other settings, or from before the first state
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.name != ASIDE:
                    leftover.unlink()
        else:
            _keep_readings(place.stats, place.state.step)
        parallel.barrier()
        parallel.barrier()  # the others have read it
        yield place
        # The state first: killed on the way, nothing goes on from it without its readings and snapshots.
        (folder / STATE).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _resume(folder: Path, output: Path, expected: dict[str, Any], runtime: Runtime) -> State | None:
    """The saved state, or None.

    A state of another configuration or of other inputs is set aside with a word, never used; so is
    an unreadable one.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        story = store.story(path)
        reason = next((f"its {k} changed" for k in expected if story.get(k) != expected[k]), None)
        if reason is None:
            state = State.load(path, runtime)
            print(f"{output}: going on from step {state.step}", flush=True)
            return state
    except Unusable as error:
        reason = error.reason
    except UserError as error:
        reason = str(error)
    os.replace(path, path.with_name(ASIDE))
    print(f"{path}: not used ({reason}); set aside as {ASIDE}, starting again", flush=True)
    return None


def _keep_readings(stats: Path, step: int) -> None:
    """Drop readings beyond the state's step, which will be taken again, and a half-written last line."""
    if not stats.exists():
        return
    kept = []
    for line in stats.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
        except json.JSONDecodeError:
            break
    write_text(stats, "".join(kept))
