"""A look at what is being trained: a small grid of samples every so many steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ebdiff.codecs.codec import open_codec
from ebdiff.data.dataset import conditions
from ebdiff.diffusion.ensemble import generate
from ebdiff.diffusion.sample import write_grid
from ebdiff.diffusion.sampling import Router
from ebdiff.experiment.experiment import Experiment
from ebdiff.nets import store
from ebdiff.nets.denoiser import Denoiser
from ebdiff.nets.execution import Runtime
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

    def __init__(self, experiment: Experiment, job: Job, network: str, folder: Path):
        self.experiment, self.job, self.network, self.folder = experiment, job, network, folder
        self.every = experiment.training.sample_every
        self._eps: Denoiser | None = None

    def interval(self, state: State) -> bool:
        if parallel.first():
            write_grid(self._images(state), self.folder / f"{state.step:08}.png")
        return False

    def _images(self, state: State) -> np.ndarray:
        e, seed, device = self.experiment, self.job.seed, self.job.runtime.device
        average = {**dict(state.network.named_buffers()), **state.view("ema")}
        if self._eps is None:  # once: a GPU's graph reads weights where they lie
            self._eps = store.build(e.architecture, average)
            ready = Runtime.of(e, "sampling", self.network, device).denoiser(self._eps)
            self._router = Router([(0, e.diffusion.timesteps)], [ready], self._eps.null)
            self._codec = open_codec(e, device)
            lengths = self.job.dataset.lengths if e.items.variable else None
            self._cond = conditions(e.items, lengths, seed, range(SAMPLES)).to(device)
        for name, parameter in self._eps.named_parameters():
            parameter.copy_(average[name])
        items = generate(e, self._router, list(range(SAMPLES)), seed, device, self._cond)
        return self._codec.decode(items, self._cond)
