"""Going on after a kill: state is used only if it belongs to the same configuration and inputs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ebdiff import layout
from ebdiff.config import Training
from ebdiff.errors import UserError
from ebdiff.files import sha256
from ebdiff.nets import store
from ebdiff.training.state import State


def stamp(digest: str, images: str, inputs: list[Path]) -> dict[str, Any]:
    """What a state and its artefact depend on: config digest and the hash of every input file."""
    files = [f for p in inputs for f in (sorted(p.iterdir()) if p.is_dir() else [p])]
    return {"digest": digest, "images": images, "inputs": {str(f): sha256(f) for f in files}}


def state_path(output: Path) -> Path:
    """The resumable state of an output; Snakemake doesn't know of it."""
    return layout.state_of(output) / "state.safetensors"


def resume(output: Path, expected: dict[str, Any], training: Training, device: torch.device) -> State | None:
    """The saved state of an unfinished output, or None.

    A state of another configuration or of other inputs is set aside with a word, never used; so is
    an unreadable one.
    """
    path = state_path(output)
    if not path.exists():
        return None
    try:
        story = store.story(path)
        reason = next((f"its {k} changed" for k in expected if story.get(k) != expected[k]), None)
        if reason is None:
            state = State.load(path, training, device)
            print(f"{output}: going on from step {state.step}", flush=True)
            return state
    except UserError as error:
        reason = str(error)
    aside = path.with_name("set-aside.safetensors")
    os.replace(path, aside)
    print(f"{path}: not used ({reason}); set aside as {aside.name}, starting again", flush=True)
    return None


def keep_readings(stats: Path, step: int) -> None:
    """Drop readings beyond the state's step: they will be taken again."""
    if stats.exists():
        lines = [line for line in stats.read_text().splitlines() if json.loads(line)["step"] <= step]
        stats.write_text("".join(f"{line}\n" for line in lines))
