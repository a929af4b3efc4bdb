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

from ebdiff import inputs, layout
from ebdiff.config import Experiment
from ebdiff.data.store import to_uint8
from ebdiff.diffusion.sampling import SAMPLERS, Router
from ebdiff.diffusion.schedule import alphas_bar, visited
from ebdiff.digests import sample_digest
from ebdiff.draws import image_noise
from ebdiff.files import holding, replacing, sha256, write_json
from ebdiff.ledger import ledger
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
    experts, paths = experiment.runs[run].experts, inputs.experts(experiment, run, seed)
    networks = []
    for path in paths:
        tensors, config, _ = store.load(path, "ema.")
        networks.append(store.build(config, tensors).to(device).eval())
    router = Router([e.serve for e in experts], networks)

    stamp = {"digest": sample_digest(experiment, run), "inputs": [sha256(p) for p in paths]}
    count, size = experiment.sampling.images, experiment.network.image_size
    folder = layout.state_of(output)
    with holding(folder):
        pixels, done, seconds = _open(folder, (count, size, size, experiment.network.channels), stamp)
        began = time.perf_counter()
        batches = range(done, count, experiment.sampling.batch)
        for first in progress(batches, desc=f"sample {run}", unit="batch"):
            indices = list(range(first, min(first + experiment.sampling.batch, count)))
            pixels[indices] = generate(experiment, router, indices, seed, device)
            pixels.flush()
            elapsed = seconds + time.perf_counter() - began
            write_json(folder / "progress.json", {**stamp, "done": indices[-1] + 1, "seconds": elapsed})
        write_grid(np.asarray(pixels[: GRID * GRID]), layout.path(layout.SAMPLES_PNG, **where))
        entry = ledger(
            device,
            run=run,
            seed=seed,
            images=count,
            seconds=round(elapsed, 3),
            images_per_second=round(count / elapsed, 2),
            evaluations=len(visited(experiment.diffusion, experiment.sampling)),
        )
        write_json(layout.path(layout.SAMPLE_LEDGER, **where), entry)
        os.replace(folder / "samples.npy", output)
        shutil.rmtree(folder)


def _open(folder: Path, shape: tuple[int, ...], stamp: dict) -> tuple[np.memmap, int, float]:
    """The unfinished samples to go on with (array, images done, seconds so far), or new ones."""
    file = folder / "samples.npy"
    try:
        kept = json.loads((folder / "progress.json").read_text())
        if {k: kept[k] for k in stamp} == stamp:
            pixels = np.lib.format.open_memmap(file, "r+")
            if pixels.shape == shape and kept["done"] < shape[0]:
                print(f"{folder}: going on from image {kept['done']}", flush=True)
                return pixels, kept["done"], kept["seconds"]
    except (OSError, ValueError, KeyError):
        pass  # nothing usable was kept
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
