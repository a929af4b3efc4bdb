"""A look at what is being trained: a small grid of samples every so many steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ebdiff.diffusion.ensemble import Ensemble, Trained
from ebdiff.diffusion.sample import write_grid
from ebdiff.experiment.experiment import Experiment
from ebdiff.system import parallel
from ebdiff.training.hooks import Hook
from ebdiff.training.loop import Job
from ebdiff.training.state import State

SAMPLES = 20  # two rows of ten


class Preview(Hook):
    """Samples of the averaged weights, of the same noise each time; they change nothing of the training.

    Args:
        experiment: with `training.sample_every`.
        job: what is trained.
        network: which widths it has, as `Expert.network`.
        folder: gets `{step}.png`.
    """

    aside = True

    def __init__(self, experiment: Experiment, job: Job, network: str, folder: Path):
        self.experiment, self.job, self.network, self.folder = experiment, job, network, folder
        self.every = experiment.training.sample_every
        self._ensemble: Ensemble | None = None

    def interval(self, state: State) -> bool:
        if parallel.first():
            write_grid(self._images(state), self.folder / f"{state.step:08}.png")
            self.job.runtime.set_arithmetic()  # sampling may have set another
        return False

    def _images(self, state: State) -> np.ndarray:
        e, device = self.experiment, self.job.runtime.device
        average = {**dict(state.network.named_buffers()), **state.view("ema")}
        if self._ensemble is None:  # once: a GPU's graph reads weights where they lie
            expert = Trained((0, e.diffusion.timesteps), self.network, e.architecture, average, {})
            lengths = self.job.dataset.lengths if e.items.variable else None
            self._ensemble = Ensemble(e, (expert,), lengths, {}, device)
        for name, parameter in self._ensemble.networks[0].named_parameters():
            parameter.detach().copy_(average[name])
        return self._ensemble.draw(list(range(SAMPLES)), self.job.seed).images
