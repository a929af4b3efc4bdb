"""The plan of an experiment: time, memory, disk and what can't work (verb `plan`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ebdiff.cost import measure
from ebdiff.experiment import layout
from ebdiff.experiment.digests import report_digest
from ebdiff.experiment.experiment import Experiment
from ebdiff.nets.execution import Runtime
from ebdiff.nets.memory import Footprint, available_bytes, footprint
from ebdiff.plan import pace
from ebdiff.plan.expected import Expected
from ebdiff.plan.times import Times
from ebdiff.pruning.count import meta_tensors
from ebdiff.report import text
from ebdiff.report.facts import RunFacts
from ebdiff.system.devices import device_name
from ebdiff.system.errors import UserError
from ebdiff.system.files import read_json, write_json

FAR = 0.05  # a realised rate this far from the asked one is told


@dataclass(frozen=True)
class Plan:
    """What an experiment is expected to take.

    Attributes:
        times: of its jobs, with steps, networks and pace.
        device: where.
    """

    times: Times
    device: torch.device

    @property
    def experiment(self) -> Experiment:
        """What is planned."""
        return self.times.experiment

    @property
    def networks(self) -> dict[str, dict[str, Any]]:
        """Rates, parameters, MACs and step times, by name."""
        return self.times.expected.networks

    @cached_property
    def facts(self) -> dict[str, RunFacts]:
        """Every run as the report's tables see it."""
        return {name: RunFacts(self.times.expected, name) for name in self.experiment.runs}

    # --- memory ----------------------------------------------------------------------------------

    @cached_property
    def memory(self) -> dict[str, int]:
        """Peak bytes of a job that trains each network, on the GPU or in all."""
        return {name: self._process + needs.bytes(self._images) for name, needs in self._needs.items()}

    @cached_property
    def _needs(self) -> dict[str, Footprint]:
        """What a training step of each network needs, executed as it will be."""
        found = {}
        for name, network in self.networks.items():
            how = Runtime.of(self.experiment, "training", name, self.device).how
            shapes = meta_tensors(self.experiment.architecture, network["rate"])
            found[name] = footprint(self.experiment.architecture, shapes, how.precision == "bf16")
        return found

    @property
    def _process(self) -> int:
        return self.times.pace.process if self.device.type == "cpu" else 0

    @cached_property
    def available(self) -> int:
        """Bytes that jobs may take on this device."""
        return available_bytes(self.device)

    @property
    def _images(self) -> int:
        """Images whose activations a process holds at a time."""
        compute = self.experiment.compute
        share = -(-self.experiment.training.batch // max(1, compute.gpus))
        return min(share, compute.micro_batch or share)

    # --- disk ------------------------------------------------------------------------------------

    @cached_property
    def disk(self) -> dict[str, int]:
        """Bytes that each verb's jobs leave, at most; `running`: the states of the jobs at work."""
        expected, found = self.times.expected, {}
        for job in self.times.jobs:
            found[job.verb] = found.get(job.verb, 0) + expected.bytes_of(job)
        found["running"] = self.times.devices * expected.state_bytes("dense")
        return {verb: size for verb, size in found.items() if size}

    @cached_property
    def disk_to_come(self) -> int:
        """Bytes that are not there yet."""
        there = (j for j in self.times.jobs if all(path.exists() for path in j.makes))
        return sum(self.disk.values()) - sum(map(self.times.expected.bytes_of, there))

    @cached_property
    def disk_free(self) -> int:
        """Bytes free where results go."""
        return shutil.disk_usage(Path.cwd()).free

    # --- what can't work -------------------------------------------------------------------------

    @cached_property
    def warnings(self) -> list[str]:
        """What will fail or disappoint, a sentence each."""
        return [*self._memory_warnings(), *self._other_warnings(), *self._rate_warnings()]

    def _memory_warnings(self) -> Iterator[str]:
        compute, pruning = self.experiment.compute, self.experiment.pruning
        name, most = max(self.memory.items(), key=lambda item: item[1])
        told = f"{text.size(most)} for training the {name} network"
        if most > self.available:
            batch, room = self.experiment.training.batch, self.available - self._process
            fit = self._needs[name].micro_batch(batch, room)
            advice = f"compute.micro_batch: {fit} fits" if fit else "not even one image at a time fits"
            yield f"memory: {told}, but {text.size(self.available)} are available here; {advice}"
        elif self.device.type == "cpu" and most * self.times.devices > self.available:
            yield (
                f"memory: {told}, {self.times.devices} times at once, but {text.size(self.available)} are "
                f"available; run with --cores {compute.threads * (self.available // most)}"
            )
        if any(search.gradient_criteria for search in self.experiment.searches.values()):
            images = min(pruning.images, compute.micro_batch or pruning.images)
            masks = self._process + self._needs["dense"].bytes(images)
            if masks > self.available:
                yield f"memory: {text.size(masks)} for gradient masks, {images} images at a time"
        if self.device.type == "cpu" and most > compute.mem_mb * 2**20:
            yield f"memory: {told}, but compute.mem_mb asks a cluster for {compute.mem_mb} MB only"

    def _other_warnings(self) -> Iterator[str]:
        times, compute = self.times, self.experiment.compute
        count, batch = times.expected.count, self.experiment.training.batch
        count = min(count, self.experiment.dataset.subset or count)
        if self.disk_to_come > self.disk_free:
            yield f"disk: {text.size(self.disk_to_come)} to come, {text.size(self.disk_free)} free"
        if batch > count:
            yield f"training.batch: {batch} images a step, but there are {count}: an epoch is one step"
        longest = max((j for j in times.jobs if "seed" in j.where), key=times.seconds.__getitem__)
        if times.seconds[longest] > 60 * compute.runtime:
            yield (
                f"compute.runtime: {longest.verb} takes {text.duration(times.seconds[longest])}, but asks a "
                f"cluster for {compute.runtime} minutes"
            )

    def _rate_warnings(self) -> Iterator[str]:
        asked = sorted((n for n in self.networks.values() if n["rate"]), key=lambda n: n["rate"])
        for network in asked:
            if abs(network["realised"] - network["rate"]) > FAR:
                yield f"rate {network['rate']}: the norm groups allow {network['realised']:.2f}"
        for low, high in pairwise(asked):
            if high["realised"] - low["realised"] < (high["rate"] - low["rate"]) / 2:
                yield (
                    f"rates {low['rate']} and {high['rate']}: nearly the same network, "
                    f"{low['realised']:.2f} and {high['realised']:.2f} of the channels go"
                )

    # --- in a file -------------------------------------------------------------------------------

    def write(self) -> Path:
        """Write plan.json, which the report sets against what really happened."""
        times, path = self.times, layout.path(layout.PLAN, experiment=self.experiment.name)
        write_json(
            path,
            {
                "experiment": self.experiment.name,
                "device": device_name(self.device),
                "devices": times.devices,
                "pace": times.pace.told,
                "job_seconds": round(sum(times.seconds.values()), 1),
                "wall_seconds": round(times.wall, 1),
                "disk_bytes": sum(self.disk.values()),
                "memory_bytes": self.memory,
                "networks": self.networks,
                "run_seconds": {run: round(times.of_run(run), 1) for run in self.experiment.runs},
                "warnings": self.warnings,
                "jobs": [
                    {"benchmark": str(j.benchmark), "kind": times.kind(j), "seconds": round(s, 2)}
                    for j, s in times.seconds.items()
                ],
                "digest": report_digest(self.experiment),
            },
        )
        return path


def make(
    experiment: Experiment,
    device: torch.device,
    devices: int | None = None,
    step_ms: float | None = None,
    images: int | None = None,
) -> Plan:
    """Predict what an experiment takes.

    Args:
        experiment: what is planned.
        device: measured on, unless `step_ms` is given.
        devices: jobs at a time; None: as many as this machine has GPUs, or cores for their threads.
        step_ms: milliseconds of the unpruned network's training step on some other device.
        images: images of the dataset, where they aren't prepared yet.

    Raises:
        UserError: how many images there are isn't known.
    """
    count, networks = images or _count(experiment), measure.counts(experiment)
    if step_ms is None:
        speed = pace.measured(experiment, device)
    else:
        speed = pace.stated(experiment, networks, step_ms, device)
    for name, network in networks.items():
        network["step_ms"] = round(1e3 * speed.step[name], 3)
    if devices is None:
        devices = _jobs_at_a_time(experiment, device)
    return Plan(Times(Expected(experiment, networks, count), speed, devices), device)


def _jobs_at_a_time(experiment: Experiment, device: torch.device) -> int:
    """As many as this machine has GPUs, or cores for their threads."""
    if device.type == "cuda":
        return max(1, torch.cuda.device_count() // max(1, experiment.compute.gpus))
    return max(1, len(os.sched_getaffinity(0)) // experiment.compute.threads)


def _count(experiment: Experiment) -> int:
    """Images of the dataset: of its manifest, or known from elsewhere."""
    manifest = layout.path(layout.MANIFEST, dataset=experiment.dataset.name)
    if manifest.exists():
        return read_json(manifest)["count"]
    if experiment.dataset.known_count:
        return experiment.dataset.known_count
    raise UserError(
        f"{manifest}: missing, so the number of images isn't known; give --images, or prepare them with "
        f"`snakemake --cores all {manifest}`"
    )
