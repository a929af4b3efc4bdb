"""Sampling a run: N images from its experts, exactly (verb `sample`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ebdiff.codecs.codec import Codec, open_codec
from ebdiff.data.dataset import UNCONDITIONAL, Cond, open_dataset
from ebdiff.diffusion.process import Process
from ebdiff.diffusion.sampling import SAMPLERS, Router, guided
from ebdiff.diffusion.schedule import visited
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.records import Work
from ebdiff.experiment.stages import digest
from ebdiff.nets import store
from ebdiff.nets.execution import Runtime
from ebdiff.system import parallel
from ebdiff.system.batches import Batches
from ebdiff.system.draws import item_noise
from ebdiff.system.files import replacing, sha256, write_json, write_text
from ebdiff.system.ledger import ledger

GRID = 10  # rows and columns of the preview
SIDE = 4  # rows and columns of the drawings as SVG


@torch.inference_mode()
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
        return torch.from_numpy(item_noise(seed, indices, t, experiment.items.shape)).to(device)

    return SAMPLERS[sampling.sampler](
        lambda x, t: router(x, t, cond),
        noise(diffusion.timesteps),  # x_T
        visited(diffusion, sampling),
        Process(diffusion).abar,
        lambda t: sampling.strength * noise(t),
        sampling.clamp,
    )


def sample(experiment: Experiment, run: str, seed: int, device: torch.device) -> None:
    """Draw exactly N images of a run, in batches that a killed job needn't draw again.

    Several processes (`torchrun`) take turns at the batches; an image depends on its number alone.
    Writes samples.npy (uint8, N x H x W x C), where the codec keeps them items.npy (float32), a grid of
    the first 100, as SVG of the first 16 where the codec draws, and a ledger.

    Raises:
        UserError: another process draws this run, or an expert is missing or damaged.
        Interrupted: SIGTERM or SIGINT came; the batches drawn so far are kept.
    """
    experiment = experiment.model_copy(update={"sampling": experiment.sampling_of(run)})
    work = Work(experiment, "sample", seed=seed, run=run)
    output, experts = work.path(layout.SAMPLES), experiment.runs[run].experts
    networks, runtimes, guidance = [], {}, experiment.sampling.guidance
    for expert in experts:
        path = work.path(layout.MILESTONE, expert=expert.key, milestone=expert.iterations)
        tensors, architecture, _ = store.load(path, "ema.")
        runtimes[expert.network] = Runtime.of(experiment, "sampling", expert.network, device)
        network = store.build(architecture, tensors)
        eps = runtimes[expert.network].denoiser(network)
        networks.append(eps if guidance is None else guided(eps, network.null, guidance))
    router, codec = Router([e.serve for e in experts], networks), open_codec(experiment, device)
    dataset = open_dataset(experiment) if experiment.items.conditional else None

    def conditions(indices: Sequence[int]) -> Cond:
        return UNCONDITIONAL if dataset is None else dataset.conditions(seed, indices).to(device)

    @torch.inference_mode()
    def draw(indices: list[int]) -> dict[str, np.ndarray]:
        cond = conditions(indices)
        items = generate(experiment, router, indices, seed, device, cond)
        images = {"images": codec.decode(items, cond)}
        return {**images, "items": items.cpu().numpy()} if codec.keeps_items else images

    count, batch = experiment.sampling.images, experiment.sampling.batch
    batches = Batches(layout.state_of(output), digest(work.stamp, batch))
    with batches.holding():
        batches.fill(count, batch, draw, f"sample {run}")
        if not parallel.first():
            return
        seconds, kept = _join(work, batches, codec, conditions, device)
        entry = ledger(
            device,
            run=run,
            seed=seed,
            images=count,
            seconds=round(seconds, 3),
            images_per_second=round(count / seconds, 2),
            evaluations=experiment.sampling.passes * len(visited(experiment.diffusion, experiment.sampling)),
            execution={network: runtime.told() for network, runtime in runtimes.items()},
            **kept,
        )
        write_json(work.path(layout.SAMPLE_LEDGER), entry)
        work.end()
        batches.forget()
        print(f"{count} images, {entry['images_per_second']} images per second", flush=True)


def _join(
    work: Work, batches: Batches, codec: Codec, conditions: Callable[..., Cond], device: torch.device
) -> tuple[float, dict[str, str]]:
    """Write what all batches hold: the seconds of drawing, and hashes for the ledger."""
    output, count, kept = work.path(layout.SAMPLES), work.job.experiment.sampling.images, {}
    if codec.keeps_items:
        batches.join("items", work.path(layout.SAMPLE_ITEMS), count)
        kept["items_sha256"] = sha256(work.path(layout.SAMPLE_ITEMS))
        first = np.array(np.load(work.path(layout.SAMPLE_ITEMS), mmap_mode="r")[: SIDE * SIDE])
        drawings = codec.vector(torch.from_numpy(first).to(device), conditions(range(len(first))))
        if drawings is not None:
            write_text(work.path(layout.SAMPLES_SVG), svg_grid(drawings))
            kept["svg_sha256"] = sha256(work.path(layout.SAMPLES_SVG))
    seconds = batches.join("images", output, count)
    write_grid(np.asarray(np.load(output, mmap_mode="r")[: GRID * GRID]), work.path(layout.SAMPLES_PNG))
    return seconds, kept


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


def svg_grid(drawings: list[str], unit: int = 256, gap: int = 16) -> str:
    """SVG documents, each `unit` wide and high, as one, four a row."""
    side = SIDE * (unit + gap)
    places = ((i % SIDE * (unit + gap), i // SIDE * (unit + gap)) for i in range(len(drawings)))
    moved = (f'<g transform="translate({x} {y})">{d}</g>' for (x, y), d in zip(places, drawings, strict=True))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">'
    return "\n".join([head, *moved, "</svg>"])
