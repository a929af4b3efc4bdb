"""Sampling a run: N images from its experts, exactly (verb `sample`)."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ebdiff.codecs.codec import open_codec
from ebdiff.data.dataset import UNCONDITIONAL, Cond, open_dataset
from ebdiff.diffusion.process import Process
from ebdiff.diffusion.sampling import SAMPLERS, Router
from ebdiff.diffusion.schedule import visited
from ebdiff.experiment import inputs, layout
from ebdiff.experiment.digests import sample_digest, settings
from ebdiff.experiment.experiment import Experiment
from ebdiff.nets import store
from ebdiff.nets.execution import Runtime
from ebdiff.system import interrupts, parallel
from ebdiff.system.draws import item_noise
from ebdiff.system.errors import Missing, Unusable, UserError
from ebdiff.system.files import (
    checksum,
    holding,
    load_memmap,
    new_memmap,
    read_json,
    replacing,
    sha256,
    write_array,
    write_json,
)
from ebdiff.system.ledger import ledger
from ebdiff.system.progress import progress

GRID = 10  # rows and columns of the preview


def generate(
    experiment: Experiment,
    router: Router,
    indices: list[int],
    seed: int,
    device: torch.device,
    cond: Cond = UNCONDITIONAL,
) -> torch.Tensor:
    """The items of given numbers: float32 (len(indices), *items.shape).

    Args:
        experiment: process and sampling settings.
        router: the experts, on `device`.
        indices: their numbers; noise depends on (seed, number) alone.
        device: where.
        cond: what they are asked to be.
    """
    diffusion, sampling = experiment.diffusion, experiment.sampling

    def noise(t: int) -> torch.Tensor:
        return torch.from_numpy(item_noise(seed, indices, t, experiment.dataset.items.shape)).to(device)

    with torch.inference_mode():
        return SAMPLERS[sampling.sampler](
            lambda x, t: router(x, t, cond),
            noise(diffusion.timesteps),  # x_T
            visited(diffusion, sampling),
            Process(diffusion).abar,
            noise,
            sampling.clamp,
        )


def sample(experiment: Experiment, run: str, seed: int, device: torch.device) -> None:
    """Draw exactly N images of a run, in batches that a killed job needn't draw again.

    Several processes (`torchrun`) take turns at the batches; an image depends on its number alone.
    Writes samples.npy (uint8, N x H x W x C), where the codec keeps them items.npy (float32), a grid of
    the first 100 and a ledger.

    Raises:
        UserError: another process draws this run, or an expert is missing or damaged.
        Interrupted: SIGTERM or SIGINT came; the batches drawn so far are kept.
    """
    where = dict(experiment=experiment.name, seed=seed, run=run)
    output = layout.path(layout.SAMPLES, **where)
    experts, paths = experiment.runs[run].experts, inputs.experts(experiment, run, seed)
    inputs.check(experiment, paths)
    networks, execution = [], {}
    for expert, path in zip(experts, paths, strict=True):
        tensors, architecture, _ = store.load(path, "ema.")
        runtime = Runtime.of(experiment, "sampling", expert.network, device)
        execution[expert.network] = runtime.how.model_dump()
        networks.append(runtime.denoiser(store.build(architecture, tensors)))
    router = Router([e.serve for e in experts], networks)

    count, batch = experiment.sampling.images, experiment.sampling.batch
    items, codec = experiment.dataset.items, open_codec(experiment, device)
    dataset = open_dataset(experiment) if items.classes or items.variable else None

    def asked(indices: list[int]) -> Cond:
        return UNCONDITIONAL if dataset is None else dataset.conditions(seed, indices).to(device)

    with torch.inference_mode():
        shape = codec.decode(torch.zeros(1, *items.shape, device=device), asked([0])).shape[1:]
    digest = sample_digest(experiment, run)
    stamp = {"digest": digest, "inputs": [sha256(p) for p in paths], "batch": batch}
    with _unfinished(layout.state_of(output), (count, *shape), stamp) as place:
        mine = place.progress(parallel.rank())
        drawn, batches = place.drawn(), math.ceil(count / batch)
        parallel.barrier()  # before anybody adds to it
        todo = [b for b in range(batches) if b not in drawn]
        todo = todo[parallel.rank() :: parallel.world()]
        if drawn and parallel.first():
            print(f"{output}: going on, {len(drawn)} batches are drawn", flush=True)

        before, began = mine["seconds"], time.perf_counter()
        bar = progress(todo, desc=f"sample {run}", unit="batch", disable=not parallel.first())
        with interrupts.noted() as signalled:
            for b in bar:
                indices = list(range(b * batch, min((b + 1) * batch, count)))
                cond = asked(indices)
                x0 = generate(experiment, router, indices, seed, device, cond)
                with torch.inference_mode():
                    images = codec.decode(x0, cond)
                if codec.keeps_items:
                    write_array(place.items(b), x0.cpu().numpy())
                place.write(indices[0], images)
                mine["done"].append([b, checksum([images])])
                mine["seconds"] = before + time.perf_counter() - began
                write_json(place.progress_file(parallel.rank()), mine)
                if signalled():
                    raise interrupts.Interrupted(
                        signalled(), f"sample {run}: images so far are kept; the same command goes on"
                    )
        if not parallel.first():
            return
        while len(place.drawn()) < batches:  # by the other processes; a signal can end this, but no barrier
            time.sleep(0.1)

        seconds = max(kept["seconds"] for kept in place.all_progress())  # processes work side by side
        first = np.load(place.file, mmap_mode="r")[: GRID * GRID]
        write_grid(np.asarray(first), layout.path(layout.SAMPLES_PNG, **where))
        entry = ledger(
            device,
            run=run,
            seed=seed,
            images=count,
            seconds=round(seconds, 3),
            images_per_second=round(count / seconds, 2),
            evaluations=len(visited(experiment.diffusion, experiment.sampling)),
            execution=execution,
            sha256=sha256(place.file),
            settings=settings(experiment, layout.path(layout.SAMPLE_LEDGER, **where)),
        )
        write_json(layout.path(layout.SAMPLE_LEDGER, **where), entry)
        if codec.keeps_items:
            kept = [np.load(place.items(b)) for b in range(batches)]
            write_array(layout.path(layout.SAMPLE_ITEMS, **where), np.concatenate(kept))
        os.replace(place.file, output)
        print(f"{count} images, {entry['images_per_second']} images per second", flush=True)


@dataclass(frozen=True)
class Unfinished:
    """Samples in the making: an array file and, per process, which batches are in it.

    Attributes:
        folder: where.
        shape: of the whole array.
        stamp: what the samples depend on; progress of another stamp doesn't count.
    """

    folder: Path
    shape: tuple[int, ...]
    stamp: dict[str, Any]

    @property
    def file(self) -> Path:
        """The array."""
        return self.folder / "samples.npy"

    def items(self, batch: int) -> Path:
        """The items of a batch, where images don't tell all of them."""
        return self.folder / f"items-{batch}.npy"

    def progress_file(self, rank: int) -> Path:
        """What a process has drawn."""
        return self.folder / f"progress-{rank}.json"

    def progress(self, rank: int) -> dict[str, Any]:
        """A process's batches and seconds so far; none if it hasn't begun."""
        try:
            kept = read_json(self.progress_file(rank))
            if {k: kept[k] for k in self.stamp} == self.stamp:
                return {**self.stamp, "done": list(kept["done"]), "seconds": float(kept["seconds"])}
        except Missing:
            pass
        except (UserError, KeyError, TypeError, ValueError) as error:
            print(f"{self.progress_file(rank)}: not used ({error}); its images are drawn again", flush=True)
        return {**self.stamp, "done": [], "seconds": 0.0}

    def all_progress(self) -> list[dict[str, Any]]:
        """The progress of every process that ever drew for these samples."""
        return [self.progress(rank) for rank in sorted(map(_rank, self.folder.glob("progress-*.json")))]

    def drawn(self) -> set[int]:
        """The batches that some process has drawn."""
        return {b for kept in self.all_progress() for b, _ in kept["done"]}

    def prepare(self) -> None:
        """Make sure that the file is there, and that only batches count as drawn which are whole in it."""
        if any(kept["done"] for kept in self.all_progress()):
            try:
                pixels = load_memmap(self.file)
                if pixels.shape == self.shape:
                    return self._forget_damaged(pixels)
            except Unusable as error:
                print(f"{self.file}: not used ({error.reason}); starting again", flush=True)
        for path in self.folder.iterdir():
            path.unlink()
        new_memmap(self.file, np.uint8, self.shape)

    def _forget_damaged(self, pixels: np.ndarray) -> None:
        size = self.stamp["batch"]
        for path in self.folder.glob("progress-*.json"):
            kept = self.progress(_rank(path))
            whole = [[b, s] for b, s in kept["done"] if checksum([pixels[b * size : (b + 1) * size]]) == s]
            if whole != kept["done"]:
                print(f"{self.file}: damaged batches are drawn again", flush=True)
                write_json(path, {**kept, "done": whole})

    def write(self, first: int, images: np.ndarray) -> None:
        """Put images into the file, from image number `first` on.

        Plain writes: pages of a memory map would count as this process's memory.
        """
        with self.file.open("r+b") as file:
            file.seek(-math.prod(self.shape), os.SEEK_END)  # where the first image begins
            file.seek(first * math.prod(self.shape[1:]), os.SEEK_CUR)
            file.write(np.ascontiguousarray(images).data)


def _rank(progress_file: Path) -> int:
    return int(progress_file.stem.removeprefix("progress-"))


@contextmanager
def _unfinished(folder: Path, shape: tuple[int, ...], stamp: dict[str, Any]) -> Iterator[Unfinished]:
    """The unfinished samples in a folder, which the first process locks and removes when all is done."""
    place = Unfinished(folder, shape, stamp)
    if not parallel.first():
        parallel.barrier()
        yield place
        return
    with holding(folder):
        place.prepare()
        parallel.barrier()
        yield place
        shutil.rmtree(folder)


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
