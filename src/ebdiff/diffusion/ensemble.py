"""Sampling a run: N images from its experts, exactly (verb `sample`)."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ebdiff import layout
from ebdiff.config import Experiment
from ebdiff.data.store import to_uint8
from ebdiff.diffusion.sampling import SAMPLERS, Router
from ebdiff.diffusion.schedule import alphas_bar, visited
from ebdiff.digests import sample_digest
from ebdiff.draws import image_noise
from ebdiff.files import remove_state, replacing, sha256, write_json
from ebdiff.nets import store
from ebdiff.progress import progress

GRID = 10  # rows and columns of the preview


def generate(
    experiment: Experiment, router: Router, indices: list[int], seed: int, device: torch.device
) -> np.ndarray:
    """The images of given indices: uint8 (len(indices), H, W, C).

    Args:
        experiment: schedule and sampling settings.
        router: the experts, on `device`, in eval mode.
        indices: image numbers; noise depends on (seed, number) alone.
    """
    network, sampling = experiment.network, experiment.sampling
    shape = (network.channels, network.image_size, network.image_size)

    def noise(t: int) -> torch.Tensor:
        return torch.from_numpy(image_noise(seed, indices, t, shape)).to(device)

    with torch.inference_mode():
        images = SAMPLERS[sampling.sampler](
            router,
            noise(experiment.diffusion.timesteps),  # x_T
            visited(experiment.diffusion, sampling),
            alphas_bar(experiment.diffusion),
            noise,
            sampling.clamp,
        )
    return to_uint8(images)


def sample(experiment: Experiment, run: str, seed: int, device: torch.device) -> None:
    """Draw exactly N images of a run, in batches that a killed job needn't draw again.

    Writes samples.npy (uint8, N x H x W x C), a grid of the first 100 and a ledger.
    """
    where = dict(experiment=experiment.name, seed=seed, run=run)
    output = layout.path(layout.SAMPLES, **where)
    experts = experiment.runs[run].experts
    paths = [layout.path(layout.MILESTONE, expert=e.key, milestone=e.iterations, **where) for e in experts]
    networks = []
    for path in paths:
        tensors, config, _ = store.load(path, "ema.")
        networks.append(store.build(config, tensors).to(device).eval())
    router = Router([e.serve for e in experts], networks)

    stamp = {"digest": sample_digest(experiment, run), "inputs": [sha256(p) for p in paths]}
    count, size = experiment.sampling.images, experiment.network.image_size
    pixels, done, seconds = _open(output, (count, size, size, experiment.network.channels), stamp)
    folder = layout.state_of(output)
    began, elapsed = time.perf_counter(), seconds
    batches = range(done, count, experiment.sampling.batch)
    for first in progress(batches, desc=f"sample {run}", unit="batch"):
        indices = list(range(first, min(first + experiment.sampling.batch, count)))
        pixels[indices] = generate(experiment, router, indices, seed, device)
        pixels.flush()
        elapsed = seconds + time.perf_counter() - began
        done = indices[-1] + 1
        write_json(folder / "progress.json", {**stamp, "done": done, "seconds": elapsed})
    write_grid(np.asarray(pixels[: GRID * GRID]), layout.path(layout.SAMPLES_PNG, **where))
    write_json(
        layout.path(layout.SAMPLE_LEDGER, **where),
        {
            "run": run,
            "seed": seed,
            "images": done,
            "seconds": round(elapsed, 3),
            "images_per_second": round(done / elapsed, 2),
            "evaluations": len(visited(experiment.diffusion, experiment.sampling)),
        },
    )
    os.replace(folder / "samples.npy", output)
    remove_state(folder)


def _open(output: Path, shape: tuple[int, ...], stamp: dict) -> tuple[np.memmap, int, float]:
    """The unfinished samples to go on with (array, images done, seconds so far), or new ones."""
    folder = layout.state_of(output)
    file = folder / "samples.npy"
    try:
        kept = json.loads((folder / "progress.json").read_text())
        if {k: kept[k] for k in stamp} == stamp:
            print(f"{output}: going on from image {kept['done']}", flush=True)
            pixels = np.lib.format.open_memmap(file, "r+")
            if pixels.shape == shape:
                return pixels, kept["done"], kept["seconds"]
    except (OSError, ValueError, KeyError):
        pass  # nothing usable was kept
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return np.lib.format.open_memmap(file, "w+", np.uint8, shape), 0, 0.0


def write_grid(images: np.ndarray, path: Path) -> None:
    """Write up to 100 uint8 images (n, H, W, C) as one PNG, ten a row, small ones enlarged."""
    factor = max(1, 64 // images.shape[2])
    large = images.repeat(factor, axis=1).repeat(factor, axis=2)
    large = np.pad(large, ((0, -len(images) % GRID), (2, 2), (2, 2), (0, 0)), constant_values=255)
    rows, (height, width, channels) = len(large) // GRID, large.shape[1:]
    grid = large.reshape(rows, GRID, height, width, channels).swapaxes(1, 2)
    grid = grid.reshape(rows * height, GRID * width, channels)
    with replacing(path) as temporary:
        Image.fromarray(grid[..., 0] if channels == 1 else grid).save(temporary)
