"""Sampling a run: N images from its experts, exactly (verb `sample`), or any number of them (`draw`)."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ebdiff.diffusion.ensemble import Ensemble
from ebdiff.diffusion.schedule import visited
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.records import Work
from ebdiff.experiment.stages import digest
from ebdiff.system import parallel
from ebdiff.system.batches import Batches
from ebdiff.system.errors import UserError
from ebdiff.system.files import replacing, sha256, write_json, write_text
from ebdiff.system.ledger import ledger

GRID = 10  # rows and columns of the preview
SIDE = 4  # rows and columns of the drawings as SVG


def sample(experiment: Experiment, run: str, seed: int, device: torch.device) -> None:
    """Draw exactly N images of a run, in batches that a killed job needn't draw again.

    Several processes (`torchrun`) take turns at the batches; an image depends on its number alone.
    Writes samples.npy (uint8, N x H x W x C), where the codec keeps them items.npy (float32), a grid of
    the first 100, as SVG of the first 16 where the codec draws, and a ledger.

    Raises:
        UserError: another process draws this run, or an expert is missing or damaged.
        Interrupted: SIGTERM or SIGINT came; the batches drawn so far are kept.
    """
    work = Work(experiment, "sample", seed=seed, run=run)
    output, ensemble = work.path(layout.SAMPLES), Ensemble.of(work, device)
    sampling = ensemble.experiment.sampling
    count, batch = sampling.images, sampling.batch

    def draw(indices: list[int]) -> dict[str, np.ndarray]:
        images, items, _ = ensemble.draw(indices, seed)
        return {"images": images, **({"items": items.cpu().numpy()} if ensemble.codec.keeps_items else {})}

    batches = Batches(layout.state_of(output), digest(work.stamp, batch))
    with batches.holding():
        batches.fill(count, batch, draw, f"sample {run}")
        if not parallel.first():
            return
        seconds, kept = _join(work, batches, ensemble, seed)
        entry = ledger(
            device,
            run=run,
            seed=seed,
            images=count,
            seconds=round(seconds, 3),
            images_per_second=round(count / seconds, 2),
            evaluations=sampling.passes * len(visited(experiment.diffusion, sampling)),
            execution={network: runtime.told() for network, runtime in ensemble.runtimes.items()},
            **kept,
        )
        write_json(work.path(layout.SAMPLE_LEDGER), entry)
        work.end()
        batches.forget()
        print(f"{count} images, {entry['images_per_second']} images per second", flush=True)


def _join(work: Work, batches: Batches, ensemble: Ensemble, seed: int) -> tuple[float, dict[str, str]]:
    """Write what all batches hold: the seconds of drawing, and hashes for the ledger."""
    output, count, kept = work.path(layout.SAMPLES), ensemble.experiment.sampling.images, {}
    if ensemble.codec.keeps_items:
        batches.join("items", work.path(layout.SAMPLE_ITEMS), count)
        kept["items_sha256"] = sha256(work.path(layout.SAMPLE_ITEMS))
        first = np.array(np.load(work.path(layout.SAMPLE_ITEMS), mmap_mode="r")[: SIDE * SIDE])
        cond = ensemble.conditions(seed, range(len(first)))
        drawings = ensemble.codec.vector(torch.from_numpy(first).to(ensemble.device), cond)
        if drawings is not None:
            write_text(work.path(layout.SAMPLES_SVG), svg_grid(drawings))
            kept["svg_sha256"] = sha256(work.path(layout.SAMPLES_SVG))
    seconds = batches.join("images", output, count)
    write_grid(np.asarray(np.load(output, mmap_mode="r")[: GRID * GRID]), work.path(layout.SAMPLES_PNG))
    return seconds, kept


def draw(
    ensemble: Ensemble, n: int, seed: int, folder: Path, label: int | None = None, **sampling: Any
) -> None:
    """Write samples into `images/` of a new folder, beside grids of the first; all of them, or no folder.

    Each is a PNG, and where the codec draws an SVG too.

    Args:
        ensemble: whose.
        n, seed, label, sampling: as for `Ensemble.sample`.
        folder: not there yet.

    Raises:
        UserError: the folder is there, or it can't be sampled so.
    """
    if os.path.lexists(folder):
        raise UserError(f"{folder}: exists already; name a new folder with --out")
    first: list[np.ndarray] = []
    curves: list[str] = []
    number, batches = 0, ensemble.batches(n, seed, label, **sampling)
    begun = next(batches)  # what is refused is refused before anything is written
    with replacing(folder) as temporary:
        (temporary / "images").mkdir(parents=True)
        for drawn in chain([begun], batches):
            vectors = ensemble.codec.vector(drawn.items, drawn.cond) or []
            for i, image in enumerate(drawn.images):
                _image(image).save(temporary / f"images/{number:05d}.png")
                if vectors:
                    (temporary / f"images/{number:05d}.svg").write_text(vectors[i], encoding="utf-8")
                number += 1
            first += list(drawn.images[: GRID * GRID - len(first)])
            curves += vectors[: SIDE * SIDE - len(curves)]
        write_grid(np.stack(first), temporary / "grid.png")
        if curves:
            write_text(temporary / "grid.svg", svg_grid(curves))


def write_grid(images: np.ndarray, path: Path) -> None:
    """Write up to 100 uint8 images (n, H, W, C) as one PNG, ten a row, small ones enlarged."""
    factor = max(1, 64 // images.shape[2])
    large = images.repeat(factor, axis=1).repeat(factor, axis=2)
    large = np.pad(large, ((0, -len(images) % GRID), (2, 2), (2, 2), (0, 0)), constant_values=255)
    rows, (height, width, channels) = len(large) // GRID, large.shape[1:]
    grid = large.reshape(rows, GRID, height, width, channels).swapaxes(1, 2)
    with replacing(path) as temporary:
        _image(grid.reshape(rows * height, GRID * width, channels)).save(temporary)


def _image(pixels: np.ndarray) -> Image.Image:
    """uint8 (H, W, C), to be saved."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def svg_grid(drawings: list[str], unit: int = 256, gap: int = 16) -> str:
    """SVG documents, each `unit` wide and high, as one, four a row."""
    side = SIDE * (unit + gap)
    places = ((i % SIDE * (unit + gap), i // SIDE * (unit + gap)) for i in range(len(drawings)))
    moved = (f'<g transform="translate({x} {y})">{d}</g>' for (x, y), d in zip(places, drawings, strict=True))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">'
    return "\n".join([head, *moved, "</svg>"])
