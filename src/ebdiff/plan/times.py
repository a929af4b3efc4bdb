"""How many seconds every job will take, and all of them together on K devices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from ebdiff.cost import measure
from ebdiff.diffusion.schedule import visited
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.inputs import taken_while_training
from ebdiff.experiment.schema import FINAL
from ebdiff.metrics import classifier
from ebdiff.plan.expected import Expected, feature_width
from ebdiff.plan.jobs import Job, closure, jobs, wall_seconds
from ebdiff.plan.pace import Pace

KINDS = {
    "train-dense": "dense training", "finetune-region": "experts", "prune-per-epoch": "masks and tickets",
    "hamming-matrix": "masks and tickets", "select-eb-epoch": "masks and tickets", "sample": "sampling",
    "fid": "metrics", "reference-stats": "metrics", "train-classifier": "metrics",
}  # fmt: skip
# What a verb imports (`pace.STARTS`); the rest is light.
IMPORTS = {
    "measure-cost": "training", "train-dense": "training", "finetune-region": "training",
    "train-classifier": "training", "prune-per-epoch": "training", "select-eb-epoch": "training",
    "sample": "predicting", "fid": "predicting", "reference-stats": "predicting", "figure": "pages",
    "report": "pages",
}  # fmt: skip
SPREAD = ("train-dense", "finetune-region", "sample")  # over all GPUs of a job (`compute.gpus`)
INCEPTION_MACS = 5.7e9  # of one 299x299 image (Szegedy et al. 2016)


@dataclass(frozen=True)
class Times:
    """Predicted seconds of an experiment's jobs.

    Attributes:
        expected: its steps and networks.
        pace: times on the device.
        devices: how many jobs run at a time.
    """

    expected: Expected
    pace: Pace
    devices: int

    @property
    def experiment(self) -> Experiment:
        """What is planned."""
        return self.expected.experiment

    @cached_property
    def jobs(self) -> list[Job]:
        """Every job, each after those it needs."""
        return jobs(self.experiment)

    @cached_property
    def seconds(self) -> dict[Job, float]:
        """Seconds of every job, its start-up included; several GPUs divide its work evenly."""
        return {job: self._start(job) + self._work(job) / self._gpus(job) for job in self.jobs}

    @cached_property
    def wall(self) -> float:
        """Seconds from the first job's start to the last one's end."""
        return wall_seconds(self.jobs, self.seconds, self.devices)

    def device_seconds(self, job: Job) -> float:
        """Seconds of a job on each of its devices, summed."""
        return self.seconds[job] * self._gpus(job)

    def of_run(self, run: str) -> float:
        """Device seconds of a run over its seeds: what it searches, trains, samples and measures."""
        makers = {path: job for job in self.jobs for path in job.makes}
        own = [job for job in self.jobs if job.verb == "fid" and job.where["run"] == run]
        return sum(self.device_seconds(job) for job in closure(own, makers) if "seed" in job.where)

    def kind(self, job: Job) -> str:
        """What a job counts as where seconds are summed."""
        if job.verb == "finetune-region" and self.experiment.experts()[job.where["expert"]].init == "dense":
            return "dense training"
        return KINDS.get(job.verb, "other")

    def _gpus(self, job: Job) -> int:
        return max(1, self.experiment.compute.gpus) if job.verb in SPREAD else 1

    def _start(self, job: Job) -> float:
        selected = job.verb == "prune-per-epoch" and taken_while_training(
            job.where["search"], job.where["criterion"]
        )
        return self.pace.start["light" if selected else IMPORTS.get(job.verb, "light")]

    def _work(self, job: Job) -> float:
        """Seconds inside a job's work; what only handles small files takes none."""
        step, where, expected = self.pace.step, job.where, self.expected
        match job.verb:
            case "measure-cost":
                return (measure.WARMUP + measure.ROUNDS) * self.pace.at_once * sum(step.values())
            case "train-dense":
                rule = self.experiment.searches[where["search"]]
                masks = 2 * rule.horizon * len(rule.rates)  # of raw and of averaged weights
                return expected.horizon(where["search"]) * step["dense"] + masks * self.pace.mask
            case "prune-per-epoch":
                return self._gradient_masks(where["search"], where["criterion"])
            case "finetune-region":
                key, milestone = where["expert"], where["milestone"]
                steps = expected.steps(key, milestone) - expected.begun(key, milestone)
                return steps * step[self.experiment.experts()[key].network]
            case "sample":
                return self._sampling(where["run"])
            case "train-classifier":
                return 3 * classifier.EPOCHS * expected.count * self._features("classifier")
            case "reference-stats":
                return self._distances(where["protocol"], expected.reference_count)
            case "fid":
                images = self.experiment.sampling.images
                return sum(self._distances(p, images) for p in self.experiment.evaluation.protocols)
        return 0.0

    def _gradient_masks(self, search: str, criterion: str) -> float:
        """Taylor and Diff-Pruning masks: a backward pass at every timestep of every interval."""
        if criterion == "magnitude":
            return 0.0
        intervals = 1 if search == FINAL else self.experiment.searches[search].horizon
        settings = self.experiment.pruning
        passes = intervals * math.ceil(self.experiment.diffusion.timesteps / settings.stride)
        images = min(settings.images, self.expected.count)
        return passes * images / self.experiment.training.batch * self.pace.step["dense"]

    def _sampling(self, run: str) -> float:
        """Every visited timestep of every image, by the expert that serves it."""
        experts, per_image = self.experiment.runs[run].experts, 0.0
        for t in visited(self.experiment.diffusion, self.experiment.sampling):
            expert = next(e for e in experts if e.serve[0] <= t < e.serve[1])
            per_image += self.pace.image[expert.network]
        return self.experiment.sampling.images * per_image

    @property
    def _mac(self) -> float:
        """Seconds per multiplication, as the unpruned network does them while sampling."""
        return self.pace.image["dense"] / self.expected.networks["dense"]["macs"]

    def _features(self, protocol: str) -> float:
        """Seconds for the features of one image, by the MACs of their network."""
        channels, *sides = self.experiment.dataset.items.shape
        convolutions = math.prod(sides) * 9 * 32 * (channels + 64)
        small = convolutions + 1024 * classifier.FEATURES
        return self._mac * (small if protocol == "classifier" else INCEPTION_MACS)

    def _distances(self, protocol: str, images: int) -> float:
        """Seconds for the features of some images and all kernels within them and to the reference."""
        pairs = images * (images + self.expected.reference_count)
        if self.experiment.evaluation.precision_recall:
            pairs *= 2
        return images * self._features(protocol) + self._mac * feature_width(protocol) * pairs
