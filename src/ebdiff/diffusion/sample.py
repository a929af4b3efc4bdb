"""Sampling a run: N images from its experts, exactly (verb `sample`), or any number of them (`draw`)."""

from __future__ import annotations

import math
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ebdiff.diffusion.ensemble import Ensemble
from ebdiff.diffusion.schedule import visited
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.records import Work
from ebdiff.experiment.stages import digest
from ebdiff.system import interrupts, parallel
from ebdiff.system.errors import Unusable, UserError
from ebdiff.system.files import holding, read_arrays, replacing, sha256, write_arrays, write_json, write_text
from ebdiff.system.ledger import ledger
from ebdiff.system.progress import progress

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
    with holding(batches.folder) if parallel.first() else nullcontext():
        if parallel.first():
            batches.forget_others()
        parallel.barrier()
        drawn, all_batches = batches.drawn(), range(math.ceil(count / batch))
        parallel.barrier()  # before anybody adds to it
        todo = [b for b in all_batches if b not in drawn][parallel.rank() :: parallel.world()]
        if drawn and parallel.first():
            print(f"{output}: going on, {len(drawn)} batches are drawn", flush=True)

        bar = progress(todo, desc=f"sample {run}", unit="batch", disable=not parallel.first())
        with interrupts.noted() as signalled:
            for b in bar:
                began = time.perf_counter()
                indices = list(range(b * batch, min((b + 1) * batch, count)))
                batches.write(b, draw(indices), time.perf_counter() - began)
                if signalled():
                    raise interrupts.Interrupted(
                        signalled(), f"sample {run}: images so far are kept; the same command goes on"
                    )
        if not parallel.first():
            return
        while len(batches.drawn()) < len(all_batches):  # by others; a signal can end this, but no barrier
            time.sleep(0.1)

        seconds, kept = _join(work, batches, ensemble, seed)
        entry = ledger(
            device,
            run=run,
            seed=seed,
            images=count,
            seconds=round(seconds, 3),
            images_per_second=round(count / seconds, 2),
            evaluations=len(visited(experiment.diffusion, sampling)),
            execution={network: runtime.told() for network, runtime in ensemble.runtimes.items()},
            **kept,
        )
        write_json(work.path(layout.SAMPLE_LEDGER), entry)
        work.end()
        shutil.rmtree(batches.folder)
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


def draw(ensemble: Ensemble, n: int, seed: int, folder: Path, label: int | None = None) -> None:
    """Write samples into `images/` of a new folder, beside grids of the first.

    Each is a PNG, and where the codec draws an SVG too.

    Args:
        ensemble: whose.
        n, seed, label: as for `Ensemble.sample`.
        folder: empty, or not there yet.

    Raises:
        UserError: there is something in the folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: isn't an empty folder; name a new one with --out")
    first: list[np.ndarray] = []
    curves: list[str] = []
    number = 0
    for drawn in ensemble.batches(n, seed, label):
        vectors = ensemble.codec.vector(drawn.items, drawn.cond) or []
        for i, image in enumerate(drawn.images):
            _save(image, folder / f"images/{number:05d}.png")
            if vectors:
                write_text(folder / f"images/{number:05d}.svg", vectors[i])
            number += 1
        first += list(drawn.images[: GRID * GRID - len(first)])
        curves += vectors[: SIDE * SIDE - len(curves)]
    write_grid(np.stack(first), folder / "grid.png")
    if curves:
        write_text(folder / "grid.svg", svg_grid(curves))


@dataclass(frozen=True)
class Batches:
    """Samples in the making: an npz per batch, whose zip notices damage.

    Attributes:
        folder: where.
        stamp: what the samples depend on; a batch of another stamp doesn't count.
    """

    folder: Path
    stamp: str

    def path(self, batch: int) -> Path:
        """Where a batch lies."""
        return self.folder / f"{batch}.npz"

    def write(self, batch: int, arrays: dict[str, np.ndarray], seconds: float) -> None:
        """Keep a batch, with the process that drew it and the seconds it took."""
        drawn = dict(rank=np.array(parallel.rank()), seconds=np.array(seconds))
        write_arrays(self.path(batch), **arrays, **drawn, stamp=np.array(self._stamp(batch)))

    def _stamp(self, batch: int) -> str:
        """What a batch belongs to: its number, too, so that none is taken for another one."""
        return f"{self.stamp} {batch}"

    def drawn(self) -> set[int]:
        """The batches that are there."""
        return {int(path.stem) for path in self.folder.glob("*.npz")}

    def forget_others(self) -> None:
        """Remove what isn't a whole batch of this stamp, with a word."""
        for path in self.folder.iterdir():
            try:
                batch = int(path.stem)
                if path == self.path(batch) and str(read_arrays(path)["stamp"]) == self._stamp(batch):
                    continue
                reason = "another batch, drawn for other settings or from other experts"
            except (Unusable, KeyError, ValueError) as error:
                reason = error.reason if isinstance(error, Unusable) else "no batch"
            print(f"{path}: not used ({reason}); its images are drawn again", flush=True)
            path.unlink()

    def join(self, name: str, output: Path, count: int) -> float:
        """Write one array of all batches as an npy file of `count` rows, batch by batch.

        Returns:
            seconds of drawing: processes work side by side, so the longest one's.
        """
        spent: dict[int, float] = {}
        with replacing(output) as temporary, temporary.open("wb") as file:
            for batch in sorted(self.drawn()):
                found = read_arrays(self.path(batch))
                rows = np.ascontiguousarray(found[name])
                if not spent:
                    shape = (count, *rows.shape[1:])
                    header = {"descr": rows.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(rows.data)
                rank = int(found["rank"])
                spent[rank] = spent.get(rank, 0.0) + float(found["seconds"])
        return max(spent.values())


def write_grid(images: np.ndarray, path: Path) -> None:
    """Write up to 100 uint8 images (n, H, W, C) as one PNG, ten a row, small ones enlarged."""
    factor = max(1, 64 // images.shape[2])
    large = images.repeat(factor, axis=1).repeat(factor, axis=2)
    large = np.pad(large, ((0, -len(images) % GRID), (2, 2), (2, 2), (0, 0)), constant_values=255)
    rows, (height, width, channels) = len(large) // GRID, large.shape[1:]
    grid = large.reshape(rows, GRID, height, width, channels).swapaxes(1, 2)
    _save(grid.reshape(rows * height, GRID * width, channels), path)


def _save(image: np.ndarray, path: Path) -> None:
    """Write an image uint8 (H, W, C) atomically."""
    with replacing(path) as temporary:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary)


def svg_grid(drawings: list[str], unit: int = 256, gap: int = 16) -> str:
    """SVG documents, each `unit` wide and high, as one, four a row."""
    side = SIDE * (unit + gap)
    places = ((i % SIDE * (unit + gap), i // SIDE * (unit + gap)) for i in range(len(drawings)))
    moved = (f'<g transform="translate({x} {y})">{d}</g>' for (x, y), d in zip(places, drawings, strict=True))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">'
    return "\n".join([head, *moved, "</svg>"])
