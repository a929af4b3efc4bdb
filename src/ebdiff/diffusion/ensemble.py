"""An ensemble: finished experts, each with the span that it serves, and all that drawing from them takes.

The stage `sample`, `ebdiff draw`, `ebdiff.load` and `ebdiff export` share it. It comes from an experiment's
checkpoints, or from the one file that `write` makes: averaged weights, spans, schedule, codec (of a first
stage what decodes) and story.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

import ebdiff
from ebdiff.codecs.codec import Carried, Codec, open_codec
from ebdiff.data.dataset import UNCONDITIONAL, Cond, conditions, open_dataset
from ebdiff.diffusion.process import Process
from ebdiff.diffusion.sampling import SAMPLERS, Router, guided
from ebdiff.diffusion.schedule import visited
from ebdiff.experiment import layout
from ebdiff.experiment import load as experiments
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.members import ITEMS, Architecture, Items, config_of
from ebdiff.experiment.records import Work
from ebdiff.experiment.registry import first_wrong
from ebdiff.experiment.schema import Diffusion, Sampling, Training
from ebdiff.nets import store
from ebdiff.nets.denoiser import Denoiser
from ebdiff.nets.execution import Runtime
from ebdiff.system.devices import pick_device
from ebdiff.system.draws import item_noise
from ebdiff.system.errors import Unusable, UserError
from ebdiff.system.progress import progress

SUFFIX = ".safetensors"  # of an exported ensemble: no experiment has such a name
SECTIONS = ("diffusion", "sampling", "codec")  # of the experiment, in the file
LENGTHS, CODEC = "lengths", "codec"  # there, beside tensors called `{expert}.{name}`


@torch.inference_mode()
def generate(
    experiment: Experiment,
    router: Router,
    indices: list[int],
    seed: int,
    device: torch.device,
    cond: Cond = UNCONDITIONAL,
) -> Tensor:
    """The items of given numbers: float32 (len(indices), *items.shape).

    Args:
        experiment: process and sampling settings.
        router: the experts, on `device`.
        indices: their numbers; noise depends on (seed, number) alone.
        device: where.
        cond: what they are asked to be.
    """
    diffusion, sampling, w = experiment.diffusion, experiment.sampling, experiment.sampling.guidance
    eps = router if w is None else guided(router, router.null, w)

    def noise(t: int) -> Tensor:
        return torch.from_numpy(item_noise(seed, indices, t, experiment.items.shape)).to(device)

    return SAMPLERS[sampling.sampler](
        lambda x, t: eps(x, t, cond),
        noise(diffusion.timesteps),  # x_T
        visited(diffusion, sampling),
        Process(diffusion).abar,
        lambda t: sampling.strength * noise(t),
        sampling.clamp,
    )


class Trained(NamedTuple):
    """A finished expert.

    Attributes:
        serve: the half-open span of timesteps that it serves.
        network: which widths it has, as `Expert.network`.
        architecture: of the dense network.
        tensors: its averaged weights, and its buffers, by name.
        story: its key, the span that it trained on, and for how many steps.
    """

    serve: tuple[int, int]
    network: str
    architecture: Architecture
    tensors: dict[str, Tensor]
    story: dict[str, Any]

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(t.numel() for t in self.tensors.values())


class Drawn(NamedTuple):
    """Samples: uint8 images (n, H, W, C), the items that they are of, and what these were asked to be."""

    images: np.ndarray
    items: Tensor
    cond: Cond


class Data(NamedTuple):
    """What an exported ensemble remembers of its dataset."""

    items: Items


@dataclass(frozen=True)
class Ensemble:
    """Finished experts that together serve every timestep.

    Attributes:
        experiment: whose `name`, `diffusion`, `sampling`, `codec` and `dataset.items` are used; one that was
            read from a file has no more.
        experts: in the order of the run.
        lengths: of all items of the training set, int64 (N,), where these have lengths of their own.
        story: where it comes from.
        device: where it computes.
        carried: what its codec decodes with, of an ensemble that was read from a file.
    """

    experiment: Experiment
    experts: tuple[Trained, ...]
    lengths: np.ndarray | None
    story: dict[str, Any]
    device: torch.device
    carried: Carried | None = None

    @classmethod
    def of(cls, work: Work, device: torch.device) -> Ensemble:
        """The experts that a `sample` job reads and has checked."""
        experiment, where, experts = work.job.experiment, work.job.where, []
        for x in experiment.runs[run := where["run"]].experts:
            path = work.path(layout.MILESTONE, expert=x.key, milestone=x.iterations)
            tensors, architecture, told = store.load(path, "ema.")
            story = {"expert": x.key, "span": x.span, "steps": told["step"]}
            experts.append(Trained(x.serve, x.network, architecture, tensors, story))
        lengths = open_dataset(experiment).lengths if experiment.items.variable else None
        experiment = experiment.model_copy(update={"sampling": experiment.sampling_of(run)})
        story = {"run": run, "seed": int(where["seed"]), "version": ebdiff.__version__}
        return cls(experiment, tuple(experts), lengths, story, device)

    @classmethod
    @torch.no_grad()
    def read(cls, path: Path, device: torch.device) -> Ensemble:
        """An exported ensemble.

        Raises:
            UserError: the file isn't there, or isn't a whole one that `write` wrote.
        """
        try:
            tensors, told = store.read(path)
            parts: dict[str, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                of, _, own = name.partition(".")
                parts.setdefault(of, {})[own] = tensor
            items, experts = ITEMS.validate_python(told["items"]), []
            codec = config_of("codec", told["codec"]).model_validate(told["codec"])
            codec.check(items)
            for i, x in enumerate(told["experts"]):
                network = config_of("network", x["config"]).model_validate(x["config"])
                architecture = Architecture(network, codec.items(items))
                serve = (int(x["serve"][0]), int(x["serve"][1]))
                network.check(architecture.items)
                experts.append(Trained(serve, str(x["network"]), architecture, parts[str(i)], x["story"]))
            experiment = Experiment.model_construct(
                name=told["experiment"],
                dataset=Data(items),
                codec=codec,
                diffusion=Diffusion.model_validate(told["diffusion"]),
                sampling=Sampling.model_validate(told["sampling"]),
                training=Training.model_construct(label_dropout=float(told["label_dropout"])),
            )
            edges = sorted(x.serve for x in experts)
            lows, highs = [lo for lo, _ in edges], [hi for _, hi in edges]
            if [*lows, experiment.diffusion.timesteps] != [0, *highs]:
                raise ValueError(edges)
            lengths = tensors[LENGTHS].numpy() if items.variable else None
            carried = Carried(parts.get(CODEC, {}), dict(told["decoder"]))
            ensemble = cls(experiment, tuple(experts), lengths, dict(told["story"]), device, carried)
            _ = ensemble.codec  # opened
            for network in ensemble.networks:  # whatever else doesn't fit together
                x, t, cond = network.example(1, smallest=True)
                if not network(x, t, cond).isfinite().all():
                    raise ValueError("weights that are no numbers")
            return ensemble
        except Unusable as error:
            raise UserError(f"{path}: {error.reason}; give a file that `ebdiff export` wrote") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError):
            # Pydantic's errors are ValueErrors, torch's RuntimeErrors.
            raise UserError(f"{path}: holds no ensemble; give a file that `ebdiff export` wrote") from None

    def write(self, path: Path, data: dict[str, str]) -> None:
        """Write the ensemble as one safetensors file, atomically: a quarter of its checkpoints.

        Args:
            path: where to.
            data: of what it is a model: title, origin and licence.
        """
        decoder = self.codec.carried()
        tensors = {f"{i}.{n}": t for i, x in enumerate(self.experts) for n, t in x.tensors.items()}
        if self.lengths is not None:
            tensors[LENGTHS] = torch.from_numpy(self.lengths)
        tensors |= {f"{CODEC}.{n}": t for n, t in decoder.tensors.items()}
        experts = [
            {
                "serve": x.serve,
                "network": x.network,
                "config": x.architecture.config.model_dump(mode="json"),
                "story": x.story,
            }
            for x in self.experts
        ]
        sections = {s: getattr(self.experiment, s).model_dump(mode="json") for s in SECTIONS}
        items = self.experiment.dataset.items._asdict()
        told = {"experiment": self.experiment.name, "story": {**self.story, "data": data}, **sections}
        told["label_dropout"] = self.experiment.training.label_dropout
        store.write(path, tensors, {**told, "items": items, "experts": experts, "decoder": decoder.config})

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The half-open spans of timesteps that the experts serve; they tile [0, T)."""
        return [x.serve for x in self.experts]

    @property
    def widths(self) -> list[dict[str, int]]:
        """Output channels of each expert's layers, by the names of their weights."""
        weights = ([(n, t) for n, t in x.tensors.items() if n.endswith("weight")] for x in self.experts)
        return [{n: len(t) for n, t in own} for own in weights]

    @cached_property
    def runtimes(self) -> dict[str, Runtime]:
        """How each kind of network is executed."""
        networks = {x.network for x in self.experts}
        return {n: Runtime.of(self.experiment, "sampling", n, self.device) for n in sorted(networks)}

    @cached_property
    def networks(self) -> list[Denoiser]:
        """The experts' networks, which predict where they lie once the router has placed them."""
        return [store.build(x.architecture, x.tensors) for x in self.experts]

    @cached_property
    def router(self) -> Router:
        """The experts' networks, on the device."""
        pairs = zip(self.experts, self.networks, strict=True)
        ready = [self.runtimes[x.network].denoiser(network) for x, network in pairs]
        return Router(self.spans, ready, self.networks[0].null)

    @cached_property
    def codec(self) -> Codec:
        """What makes images of items."""
        return open_codec(self.experiment, self.device, self.carried)

    @torch.no_grad()
    def denoiser(self, x: Tensor, t: int, cond: Cond = UNCONDITIONAL) -> Tensor:
        """The noise in items x (B, *items.shape) at timestep t, by the expert that serves it.

        Args:
            x: noisy items, float32.
            t: in [0, T), the same for all.
            cond: what they are (`conditions`), where the networks are told.

        Raises:
            UserError: there is no such timestep.
        """
        if not 0 <= t < self.experiment.diffusion.timesteps:
            raise UserError(f"t {t}: timesteps are 0 to {self.experiment.diffusion.timesteps - 1}")
        return self.router(x.to(self.device, torch.float32), int(t), cond)

    def conditions(self, seed: int, indices: Sequence[int], label: int | None = None) -> Cond:
        """What samples of given numbers are asked to be, on the device.

        Args:
            seed, indices: their noise; lengths are drawn from the data, labels go by turns.
            label: the class of all of them.

        Raises:
            UserError: there is no such class.
        """
        items = self.experiment.items
        cond = conditions(items, self.lengths, seed, indices)
        if label is not None:
            if cond.label is None or not 0 <= label < items.classes:
                known = f"classes are 0 to {items.classes - 1}" if items.classes else "it knows no classes"
                raise UserError(f"label {label}: {known}")
            cond = cond._replace(label=torch.full_like(cond.label, label))
        return cond.to(self.device)

    def draw(
        self, indices: list[int], seed: int, label: int | None = None, sampling: Sampling | None = None
    ) -> Drawn:
        """The samples of given numbers, at once.

        Args:
            indices: their numbers; noise depends on (seed, number) alone.
            seed: >= 0.
            label: as for `conditions`.
            sampling: other settings than the ensemble's.
        """
        experiment, cond = self.experiment, self.conditions(seed, indices, label)
        if sampling is not None:
            experiment = experiment.model_copy(update={"sampling": sampling})
        codec = self.codec  # opened, as the networks are, outside of inference mode
        items = generate(experiment, self.router, indices, seed, self.device, cond)
        with torch.inference_mode():
            return Drawn(codec.decode(items, cond), items, cond)

    def batches(self, n: int, seed: int = 0, label: int | None = None, **sampling: Any) -> Iterator[Drawn]:
        """The first n samples of a seed, a batch at a time; arguments as for `sample`."""
        try:
            asked = Sampling.model_validate({**self.experiment.sampling.model_dump(), **sampling})
        except ValidationError as error:
            wrong, message = first_wrong(error)
            raise UserError(f"sampling.{'.'.join(map(str, wrong['loc']))}: {message}") from None
        try:
            self.experiment.check_sampler("sampling", asked)
        except ValueError as error:
            raise UserError(str(error)) from None
        for first in progress(range(0, n, asked.batch), desc="draw", unit="batch", delay=2):
            yield self.draw(list(range(first, min(first + asked.batch, n))), seed, label, asked)

    def sample(self, n: int, seed: int = 0, label: int | None = None, **sampling: Any) -> np.ndarray:
        """Draw images: uint8 (n, H, W, C), for a run's own seed and number those of its samples.npy.

        Args:
            n: how many, at least 1.
            seed: of the noise, >= 0; an image depends on it and on its number.
            label: their class, where the networks are told; None: all classes by turns.
            sampling: keys of the experiment's section of that name, such as ``steps=20``.

        Raises:
            UserError: a key or a class that isn't there, or a value that can't be.
        """
        if n < 1 or seed < 0:
            raise UserError(f"n {n}, seed {seed}: at least one image, and a seed from 0 on")
        return np.concatenate([drawn.images for drawn in self.batches(n, seed, label, **sampling)])


def load(source: str | Path, run: str | None = None, seed: int = 0, device: str | None = None) -> Ensemble:
    """See `ebdiff.load`."""
    if str(source).endswith(SUFFIX):
        if run is not None:
            raise UserError(f"{source}: is one run's already; leave out {run!r}")
        return Ensemble.read(Path(source), pick_device(device or "auto"))
    experiment = experiments.load(str(source))
    if run is None:
        raise UserError(f"{source}: say which run: {', '.join(experiment.runs)}")
    work = Work(experiment, "sample", run=run, seed=seed)
    return Ensemble.of(work, pick_device(device or experiment.compute.device))
