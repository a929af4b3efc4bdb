"""Our own small first stage, where no other is to be had: an autoencoder trained on the data by one rule.

1. Widths: 32 channels at the images' size, twice as many at each halving, 128 at most; a residual block per
   size in the encoder and in the decoder, and as many sizes as `codec.factor` has halvings.
2. Latents: each channel has mean 0 and variance 1 over the training images, of the batch while training, of
   all images once trained (stored with the weights). No other prior, no discriminator, no perceptual loss.
3. Loss: the mean squared error of pixels in [-1, 1]. The decoder sees latents with noise of `NOISE` times
   their deviation, so that near latents mean near images, and small errors of a diffusion model small ones.
4. Steps: 250 times the images' size in pixels (8,000 for 32x32), of 64 images each, but none seen more than
   `PASSES` times; Adam, its rate falling from 1e-3 to 0 along half a cosine. Held-out images are never seen.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebdiff.codecs.first_stage import PIXELS, FirstStage, statistics
from ebdiff.data.dataset import batch_indices, open_pixels, to_float
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.records import Work
from ebdiff.experiment.stages import digest
from ebdiff.nets import store
from ebdiff.system import interrupts
from ebdiff.system.draws import generator
from ebdiff.system.errors import Missing, Unusable, UserError
from ebdiff.system.files import holding, read_arrays, write_arrays, write_json
from ebdiff.system.ledger import ledger
from ebdiff.system.progress import progress

WIDTH, WIDEST, GROUPS = 32, 128, 8
NOISE = 0.1
STEPS, BATCH, RATE = 250, 64, 1e-3  # steps per pixel of an image's side
PASSES = 50  # over the images, at most: more only made held-out digits worse
BLOCK = 256  # images encoded at a time
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, as torch calls them


class Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Autoencoder(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to latents (B, c, H / factor, W / factor), and back."""

    def __init__(self, channels: int, latent: int, factor: int):
        super().__init__()
        widths = [min(WIDTH * 2**level, WIDEST) for level in range(factor.bit_length())]
        down, up = [nn.Conv2d(channels, WIDTH, 3, padding=1)], [nn.Conv2d(WIDTH, channels, 3, padding=1)]
        for wide, wider in pairwise(widths):
            down += [Block(wide), nn.Conv2d(wide, wider, 3, stride=2, padding=1)]
            up += [Block(wide), nn.Conv2d(wider, wide, 3, padding=1), nn.Upsample(scale_factor=2)]
        self.encoder = nn.Sequential(*down, Block(widths[-1]), nn.Conv2d(widths[-1], latent, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, widths[-1], 3, padding=1), Block(widths[-1]), *reversed(up)
        )
        self.register_buffer("mean", torch.zeros(latent, 1, 1))
        self.register_buffer("std", torch.ones(latent, 1, 1))

    def encode(self, x: Tensor) -> Tensor:
        """Latents of mean 0 and variance 1 over the training images."""
        return (self.encoder(x) - self.mean) / self.std

    def decode(self, z: Tensor) -> Tensor:
        """Images of such latents: the decoder has seen no others."""
        return self.decoder(z)

    @classmethod
    def of(cls, experiment: Experiment) -> Autoencoder:
        """The network of an experiment, its weights left open."""
        codec = experiment.codec
        return cls(experiment.dataset.items.shape[0], codec.channels, codec.factor)


class SmallAutoencoder(FirstStage):
    """The one that `train_first_stage` trained."""

    DECODES = ("decoder",)

    @classmethod
    def built(cls, experiment: Experiment, config: Mapping[str, Any]) -> nn.Module:
        return Autoencoder.of(experiment)

    def opened(self) -> nn.Module:
        path = layout.path(layout.FIRST_STAGE, experiment=self.experiment.name)
        network = Autoencoder.of(self.experiment)
        network.load_state_dict(store.read(path)[0])
        return network

    def latents(self, x: Tensor) -> Tensor:
        return self.network.encode(x)

    def images(self, z: Tensor) -> Tensor:
        return self.network.decode(z)


def train_first_stage(experiment: Experiment, device: torch.device) -> None:
    """Train the small autoencoder on the dataset's images and store it (verb `train-first-stage`).

    Killed and called again, it goes on and ends with the same bits.

    Raises:
        UserError: the codec isn't trained on the data, or its training diverged.
        Interrupted: SIGTERM or SIGINT came; the steps so far are kept.
    """
    if not experiment.codec.TRAINED:
        raise UserError(f"{experiment.name}: codec.kind {experiment.codec.kind} isn't trained on the data")
    work = Work(experiment, "train-first-stage")
    output, pixels = work.path(layout.FIRST_STAGE), open_pixels(experiment.dataset.name)
    network, steps = Autoencoder.of(experiment), steps_of(*pixels.shape[:2])
    store.initialise(network, 0, "first-stage")
    network.to(device)
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    with holding(layout.state_of(output)):
        state = State(layout.state_of(output) / "last.npz", digest(work.stamp), network, optimizer)
        done, seconds = state.restore()
        began = saved = time.perf_counter()
        with interrupts.noted() as signalled:
            for step in progress(range(done, steps), total=steps, initial=done, desc="train-first-stage"):
                optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
                learn(network, optimizer, pixels, step, device)
                now = time.perf_counter()
                if signalled() or now - saved > 60 * experiment.training.save_minutes:
                    state.save(step + 1, seconds + now - began)
                    saved = now
                if signalled():
                    raise interrupts.Interrupted(
                        signalled(), f"step {step + 1} of {steps} is saved; the same command goes on from it"
                    )
        normalise(network, pixels, device)
        seconds += time.perf_counter() - began
        store.write(output, network.state_dict(), {"codec": experiment.codec.model_dump(mode="json")})
        params = sum(p.numel() for p in network.parameters())
        entry = ledger(device, steps=steps, images=steps * BATCH, params=params, seconds=round(seconds, 3))
        write_json(work.path(layout.FIRST_STAGE_LEDGER), entry)
        work.end()
        shutil.rmtree(state.path.parent)
    print(f"first stage of {params:,} parameters: {steps} steps in {seconds:.0f} s")


def steps_of(count: int, side: int) -> int:
    """Steps of the rule for so many images of a size."""
    return min(STEPS * side, PASSES * math.ceil(count / BATCH))


def learn(
    network: Autoencoder, optimizer: torch.optim.Adam, pixels: np.ndarray, step: int, device: torch.device
) -> None:
    """A step: what it sees, and the noise in the latents, are functions of its number."""
    x = _on(device, pixels[batch_indices(len(pixels), BATCH, 0, "first-stage", step)])
    z = network.encoder(x)
    z = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True)
    noise = generator(0, "first-stage/noise", step).standard_normal(tuple(z.shape), np.float32)
    loss = F.mse_loss(network.decoder(z + NOISE * torch.from_numpy(noise).to(device)), x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.inference_mode()
def normalise(network: Autoencoder, pixels: np.ndarray, device: torch.device) -> None:
    """Have latents of all images mean 0 and variance 1 in each channel.

    Raises:
        UserError: they aren't finite, or all alike.
    """
    size = max(1, PIXELS // math.prod(pixels.shape[1:3]))
    blocks = (pixels[first : first + size] for first in range(0, len(pixels), size))
    found = statistics(network.encoder(_on(device, block)).cpu().numpy() for block in blocks)
    if not (np.isfinite(found).all() and np.all(found[1])):
        raise UserError(
            "train-first-stage: the training diverged, or a channel tells nothing; "
            "take a first stage of codec.kind vq or kl"
        )
    for buffer, values in zip((network.mean, network.std), found, strict=True):
        buffer.copy_(torch.from_numpy(values).view_as(buffer))


def _on(device: torch.device, images: np.ndarray) -> Tensor:
    return to_float(torch.from_numpy(np.array(images)).to(device))


@dataclass
class State:
    """What a killed training goes on from.

    Attributes:
        path: where it is kept.
        stamp: what it belongs to.
        network, optimizer: whose state.
    """

    path: Path
    stamp: str
    network: Autoencoder
    optimizer: torch.optim.Adam

    def save(self, step: int, seconds: float) -> None:
        """Keep everything after so many steps, and the seconds that they took."""
        flat = torch.nn.utils.parameters_to_vector
        moments = [self.optimizer.state[p] for p in self.network.parameters()]
        arrays = {
            "weights": flat(self.network.parameters()).detach(),
            **{key: flat([m[key] for m in moments]) for key in MOMENTS},
        }
        told = dict(step=np.array(step), seconds=np.array(seconds), stamp=np.array(self.stamp))
        write_arrays(self.path, **{key: a.cpu().numpy() for key, a in arrays.items()}, **told)

    def restore(self) -> tuple[int, float]:
        """Steps and seconds so far; 0 where nothing is kept, or it belongs to another training."""
        try:
            kept = read_arrays(self.path)
            if str(kept["stamp"]) != self.stamp:
                raise Unusable(self.path, "of another training")
        except Missing:
            return 0, 0.0
        except (Unusable, KeyError) as error:
            print(f"{self.path}: not used ({error}); training begins again", flush=True)
            return 0, 0.0
        fill = torch.nn.utils.vector_to_parameters
        parameters, step = list(self.network.parameters()), int(kept["step"])
        device = parameters[0].device
        fill(torch.from_numpy(kept["weights"]).to(device), parameters)
        for p in parameters:
            self.optimizer.state[p] = {
                "step": torch.tensor(float(step)),
                **{k: torch.empty_like(p) for k in MOMENTS},
            }
        for key in MOMENTS:
            fill(torch.from_numpy(kept[key]).to(device), [self.optimizer.state[p][key] for p in parameters])
        print(f"going on from step {step}", flush=True)
        return step, float(kept["seconds"])
