"""A toy second member of every seam, registered from outside the package as a user would.

`python doors.py all` runs every job of config/experiments/toy.yaml that isn't done yet; anything else is a
command line. With KILL_AT=STREAM:STEP in the environment the process ends at that draw, as by SIGKILL.
"""

import os
import signal
import sys
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel
from torch import nn

from ebdiff import cli
from ebdiff.codecs.codec import Codec
from ebdiff.data.dataset import UNCONDITIONAL, Batch, Cond, Dataset, moved
from ebdiff.experiment import layout, load
from ebdiff.experiment.jobs import jobs
from ebdiff.experiment.members import CODECS, DATASETS, NETWORKS, CodecConfig, DatasetConfig, Items
from ebdiff.experiment.members import NetworkConfig as Config
from ebdiff.experiment.runs import HOOKS
from ebdiff.nets.denoiser import Denoiser, Group, Member
from ebdiff.system.draws import generator
from ebdiff.system.files import write_array, write_json
from ebdiff.training.hooks import Hook

LENGTH, CLASSES, SIDE = 12, 3, 8


# --- data: sequences of variable length, with a class -----------------------------------------------------


def write(experiment, images, labels, held_out, manifest, threads=1):
    """Strokes of three classes, and their pictures for the metrics."""
    rng, n, whole = generator(0, "strokes"), 96, 112
    lengths, classes = rng.integers(4, LENGTH + 1, whole), rng.integers(0, CLASSES, whole)
    x = (0.3 * rng.standard_normal((whole, LENGTH, 3)) + 0.3 * classes[:, None, None]).astype(np.float32)
    inside = np.arange(LENGTH) < lengths[:, None]
    x[~inside] = 0
    cond = Cond(mask=torch.from_numpy(inside))
    pictures = ToyRaster(experiment, torch.device("cpu")).decode(torch.from_numpy(x), cond)
    write_array(images, pictures[:n])
    write_array(held_out, pictures[n:])
    write_array(labels, classes[:n].astype(np.int64))
    write_array(images.with_name("strokes.npy"), x[:n])
    write_array(images.with_name("lengths.npy"), lengths[:n])
    entry = {
        "dataset": experiment.dataset.name, "source": "strokes", "title": "Strokes", "origin": "drawn",
        "licence": "none", "count": n, "held_out": whole - n, "skipped": 0,
        "shape": [SIDE, SIDE, 1], "classes": CLASSES,
    }  # fmt: skip
    write_json(manifest, entry)
    return entry


class ToyStrokesConfig(DatasetConfig):
    WRITE = staticmethod(write)
    source: Literal["strokes"] = "strokes"

    @property
    def items(self):
        return Items((LENGTH, 3), CLASSES, variable=True)


class ToyStrokes(Dataset):
    def __init__(self, items, x, lengths, labels):
        self.items, self.x, self.lengths, self.labels = items, x, lengths, labels

    @classmethod
    def of(cls, experiment):
        folder = layout.path(layout.IMAGES, dataset=experiment.dataset.name).parent
        arrays = (np.load(folder / f"{name}.npy") for name in ("strokes", "lengths", "labels"))
        return cls(experiment.dataset.items, *arrays)

    def __len__(self):
        return len(self.x)

    def at(self, indices):
        return [self.x[indices], self.lengths[indices], self.labels[indices]]

    def draw(self, size, seed, stream, step, share=slice(None)):
        if os.environ.get("KILL_AT") == f"{stream}:{step}":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().draw(size, seed, stream, step, share)

    def batch(self, arrays, device):
        x, lengths, labels = moved(arrays, device)
        return Batch(x, Cond(labels, torch.arange(LENGTH, device=device) < lengths[:, None]))


# --- a denoiser with a recurrent layer, a buffer, an embedding and groups of its own -----------------------


class GRUConfig(Config):
    kind: Literal["toy-gru"] = "toy-gru"
    hidden: int = 8


class GRUNet(Denoiser):
    kept = ("out",)

    def __init__(self, config, items):
        super().__init__(config, items)
        h = config.hidden
        drawn = generator(0, "toy/frequencies").standard_normal(4).astype(np.float32)
        self.register_buffer("frequencies", torch.from_numpy(drawn))
        self.classes = nn.Embedding(items.classes + 1, 4)
        self.gru = nn.GRU(items.shape[1] + 12, h, num_layers=2, bidirectional=True, batch_first=True)
        self.mid = nn.Linear(2 * h, h)
        self.norm = nn.LayerNorm(items.shape[1])
        self.out = nn.Linear(h, items.shape[1])

    def forward(self, x, t, cond=UNCONDITIONAL):
        dtype, length = self.out.weight.dtype, x.shape[1]
        angles = 4e-3 * t.float()[:, None] * self.frequencies.float()
        told = torch.cat([angles.sin(), angles.cos(), self.classes(cond.label).float()], dim=1)
        x = x.masked_fill(~cond.mask[..., None], 0)
        h = torch.cat([x, told[:, None].expand(-1, length, -1)], dim=2).to(dtype)
        lengths = cond.mask.sum(dim=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
        h = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=length)[0]
        return self.norm(self.out(torch.relu(self.mid(h)))).to(x.dtype)

    def groups(self):
        """A group per layer and direction: its three gates, its own recurrence, and who reads it."""
        h, all_units = self.config.hidden, np.arange(self.config.hidden)
        found = []
        for layer in range(2):
            for d, suffix in enumerate(("", "_reverse")):
                key, members = f"l{layer}{suffix}", []
                inputs = 2 * h if layer else self.gru.input_size
                for weight, across in ((f"gru.weight_ih_{key}", inputs), (f"gru.weight_hh_{key}", h)):
                    for gate in range(3):
                        rows = slice(gate * h, (gate + 1) * h)
                        members.append(Member(weight, "out", rows, all_units, 3 * h, across))
                members.append(Member(f"gru.weight_hh_{key}", "in", slice(0, h), all_units, h, 3 * h))
                readers = [("mid.weight", h)]
                if layer == 0:
                    readers = [(f"gru.weight_ih_l1{s}", 3 * h) for s in ("", "_reverse")]
                for weight, across in readers:
                    place = slice(d * h, (d + 1) * h)
                    members.append(Member(weight, "in", place, all_units, 2 * h, across))
                found.append(Group(f"gru_{key}", h, None, tuple(members)))
        own = Member("mid.weight", "out", slice(0, h), all_units, h, 2 * h)
        reader = Member("out.weight", "in", slice(0, h), all_units, h, 3)
        return (*found, Group("mid", h, None, (own, reader)))


# --- a codec that holds weights ----------------------------------------------------------------------------


class ToyRasterConfig(CodecConfig):
    kind: Literal["toy-raster"] = "toy-raster"


class ToyRaster(Codec):
    def __init__(self, experiment, device):
        super().__init__(experiment, device)
        drawn = generator(0, "toy/raster").standard_normal((SIDE * SIDE, LENGTH * 3)).astype(np.float32)
        self.weight = torch.from_numpy(drawn).to(device)

    def decode(self, items, cond):
        x = items.masked_fill(~cond.mask[..., None], 0).flatten(1)
        pixels = (x @ self.weight.T).sigmoid().mul(255).round().to("cpu", torch.uint8)
        return pixels.reshape(-1, SIDE, SIDE, 1).numpy()


# --- a hook that replaces a step ---------------------------------------------------------------------------


class ShrinkConfig(BaseModel):
    every: int


class Shrink(Hook):
    """Every so many steps the weights shrink instead of learning; counts how often."""

    def __init__(self, config, job):
        self.steps, self.count = config.every, torch.zeros(1)

    def begin(self, state):
        self.count = state.extra.get("shrink.count", torch.zeros(1))

    def due(self, step):
        return step % self.steps == self.steps - 1

    def update(self, state):
        state.raw.mul_(0.9)
        self.count += 1
        return True

    def carry(self):
        return {"shrink.count": self.count}


DATASETS.register("strokes", ToyStrokesConfig, ToyStrokes)
NETWORKS.register("toy-gru", GRUConfig, GRUNet)
CODECS.register("toy-raster", ToyRasterConfig, ToyRaster)
HOOKS.register("toy-shrink", ShrinkConfig, Shrink)


def command(job):
    """The command line of a job."""
    own = {k: v for k, v in job.where.items() if k not in ("experiment", "dataset")}
    options = [x for k, v in own.items() for x in (f"--{'images' if k == 'number' else k}", v)]
    return [job.stage.verb, job.where.get("experiment") or job.where["dataset"], *options]


def main():
    if sys.argv[1:] != ["all"]:
        return cli.main()
    for job in jobs(load.load("toy")):
        if not job.note("records", "json").exists():
            sys.argv = ["ebdiff", *command(job)]
            try:
                cli.main()
            except SystemExit as stop:
                if stop.code:
                    sys.exit(f"{sys.argv}: {stop.code}")


if __name__ == "__main__":
    main()
