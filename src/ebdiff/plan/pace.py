"""How fast this device is: measured in about half a minute, or stated."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ebdiff.cost.measure import WARMUP, interleaved, network_of, rates, steps_at_once, training_step
from ebdiff.cost.tune import sampling_step
from ebdiff.experiment import layout
from ebdiff.experiment.digests import cost_digest
from ebdiff.experiment.experiment import Experiment
from ebdiff.nets.execution import Runtime
from ebdiff.nets.memory import available_bytes, footprint
from ebdiff.pruning.count import meta_tensors
from ebdiff.pruning.graph import trace
from ebdiff.pruning.importance import magnitude
from ebdiff.pruning.select import select
from ebdiff.system.devices import device_name
from ebdiff.system.files import read_json

ROUNDS = 3
BUDGET = 20.0  # seconds of timing, about; larger batches are timed in part
# What a job imports, by kind of job.
STARTS = {
    "training": "ebdiff.training.train",
    "predicting": "ebdiff.diffusion.sample, ebdiff.metrics.evaluate",
    "pages": "ebdiff.report.page",
    "light": "ebdiff.tickets.history",
}


@dataclass(frozen=True)
class Pace:
    """Times on one device, in seconds.

    Attributes:
        step: of a training step on a whole batch, by network.
        image: of one network evaluation per sampled image, by network.
        mask: of one magnitude mask.
        at_once: training steps between two looks at the clock of `measure-cost`.
        start: of a job's start-up, by what it imports (`STARTS`).
        process: bytes that a training job's process holds beside its network.
        told: how they are known, in words.
    """

    step: Mapping[str, float]
    image: Mapping[str, float]
    mask: float
    at_once: int
    start: Mapping[str, float]
    process: int
    told: str


def measured(experiment: Experiment, device: torch.device) -> Pace:
    """Time a few steps of every network on this device; step times already in cost.json are taken."""
    known = known_steps(experiment, device)
    batch, images = experiment.training.batch, _images(experiment, device)
    small = _resized(experiment, images)
    work = {}
    for name, rate in rates(experiment).items():
        for use, piece in (("training", training_step), ("sampling", sampling_step)):
            if use == "sampling" or not known:
                runtime = Runtime.of(experiment, use, name, device)
                work[use, name] = piece(small, network_of(experiment, rate), runtime)
    times = {key: median(seconds) for key, seconds in interleaved(work, ROUNDS).items()}
    at_once = steps_at_once(device)
    part = batch / images / at_once
    step = known or {name: times["training", name] * part for name in rates(experiment)}
    image = {name: times["sampling", name] / small.sampling.batch for name in rates(experiment)}
    cut = f", {images} of {batch} images" if images < batch else ""
    source = f"step times of {layout.path(layout.COST, experiment=experiment.name)}, else measured"
    told = source if known else f"measured on {ROUNDS} steps{cut}"
    return Pace(step, image, _mask_seconds(experiment), at_once, *_starts(device), told)


def stated(
    experiment: Experiment, networks: Mapping[str, Mapping[str, Any]], step_ms: float, device: torch.device
) -> Pace:
    """As if the unpruned network's training step took `step_ms` on some device; the others by their MACs."""
    share = {name: network["macs"] / networks["dense"]["macs"] for name, network in networks.items()}
    step = {name: step_ms / 1e3 * s for name, s in share.items()}
    # A backward pass costs two forward passes.
    image = {name: seconds / experiment.training.batch / 3 for name, seconds in step.items()}
    told = f"stated: {step_ms:g} ms per unpruned step, other networks by their MACs"
    return Pace(step, image, _mask_seconds(experiment), steps_at_once(device), *_starts(device), told)


def known_steps(experiment: Experiment, device: torch.device) -> dict[str, float] | None:
    """Seconds per step that `measure-cost` found for this experiment on this device, if it did."""
    path = layout.path(layout.COST, experiment=experiment.name)
    if not path.exists():
        return None
    cost = read_json(path)
    if (cost.get("settings"), cost["device"]) != (cost_digest(experiment), device_name(device)):
        return None
    return {name: network["step_ms"] / 1e3 for name, network in cost["networks"].items()}


def _resized(experiment: Experiment, images: int) -> Experiment:
    """The experiment with batches of up to `images`."""
    training = experiment.training.model_copy(update={"batch": images})
    size = min(images, experiment.sampling.batch)
    sampling = experiment.sampling.model_copy(update={"batch": size})
    return experiment.model_copy(update={"training": training, "sampling": sampling})


def _images(experiment: Experiment, device: torch.device) -> int:
    """Images per timed step: the batch, or as many as fit the memory and, on a CPU, the time."""
    needs = footprint(experiment.architecture, meta_tensors(experiment.architecture, 0))
    fit = needs.micro_batch(experiment.training.batch, available_bytes(device)) or 1
    if device.type == "cuda":
        return fit  # where a step's time isn't proportional to its images, and short
    probe = training_step(_resized(experiment, 1), network_of(experiment, 0), Runtime(device))
    probe()
    began = time.perf_counter()
    probe()
    steps = (WARMUP + ROUNDS) * len(rates(experiment))
    return max(1, min(fit, int(BUDGET / steps / (time.perf_counter() - began))))


def _mask_seconds(experiment: Experiment) -> float:
    """Time of one magnitude mask of the unpruned network."""
    network, groups = network_of(experiment, 0), trace(experiment.architecture)
    weights = {name: p.detach() for name, p in network.named_parameters()}
    began = time.perf_counter()
    select(groups, magnitude(weights), 0.5)
    return time.perf_counter() - began


def _starts(device: torch.device) -> tuple[dict[str, float], int]:
    """Time from starting a job to its first line of work, by what it imports, and a training job's bytes."""
    seconds, kilobytes = {}, {}
    for kind, modules in STARTS.items():
        code = f"import ebdiff.cli, resource, {modules}"
        if kind in ("training", "predicting"):
            code += f"; import torch; torch.zeros(1, device={str(device)!r})"
        code += "; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
        seconds[kind], kilobytes[kind] = time.perf_counter() - began, int(done.stdout)
    return seconds, 1024 * kilobytes["training"]
