"""Training state: weights, moving average, Adam's moments and the step, as one safetensors file.

The same file is a milestone (what `sample` reads the averaged weights of) and the state a killed
job goes on from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from ebdiff.experiment.members import Architecture
from ebdiff.experiment.schema import Training
from ebdiff.nets import store
from ebdiff.nets.denoiser import Denoiser
from ebdiff.nets.execution import Runtime
from ebdiff.system.errors import Unusable, UserError


@dataclass
class State:
    """Everything training needs to go on.

    Attributes:
        network: the raw weights, in training.
        ema: the moving average of every parameter, by name.
        m, v: Adam's first and second moments of every parameter, by name.
        step: optimiser steps done.
        processes: one entry per job that trained: when it started, its processes, steps and seconds.
        extra: further arrays that travel along (the masks of a search).
    """

    network: Denoiser
    ema: dict[str, Tensor]
    m: dict[str, Tensor]
    v: dict[str, Tensor]
    step: int = 0
    processes: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(cls, network: Denoiser, runtime: Runtime) -> State:
        """State at step 0: the average equals the weights, moments are zero."""
        network = runtime.place(network)
        weights = {n: p.detach() for n, p in network.named_parameters()}
        m, v = ({n: torch.zeros_like(w) for n, w in weights.items()} for _ in range(2))
        return cls(network, {n: w.clone() for n, w in weights.items()}, m, v)

    @property
    def seconds(self) -> float:
        """Seconds inside training so far, over all jobs."""
        return sum(p["seconds"] for p in self.processes)

    @property
    def device_seconds(self) -> float:
        """The same on each job's devices, summed."""
        return sum(p["seconds"] * p["world"] for p in self.processes)

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors: raw., ema., m., v. and extra."""
        found = {f"extra.{n}": t for n, t in self.extra.items()}
        for name, parameter in self.network.named_parameters():
            found[f"raw.{name}"], found[f"ema.{name}"] = parameter.detach(), self.ema[name]
            found[f"m.{name}"], found[f"v.{name}"] = self.m[name], self.v[name]
        return found

    def save(self, path: Path, architecture: Architecture, story: dict[str, Any]) -> None:
        """Write the state atomically.

        Args:
            path: where to.
            architecture: of the dense network.
            story: what the file is; step and processes are added.

        Raises:
            UserError: a weight isn't finite.
        """
        tensors = self.tensors()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(
                    f"{path}: {name} is not finite at step {self.step}; "
                    "lower training.learning_rate or set training.clip"
                )
        store.save(path, tensors, architecture, {**story, "step": self.step, "processes": self.processes})

    @classmethod
    def load(cls, path: Path, runtime: Runtime) -> State:
        """Read a state written by `save`.

        Raises:
            UserError: unreadable, or not a training state.
        """
        tensors, architecture, story = store.load(path)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, rest = name.split(".", 1)
            parts.setdefault(kind, {})[rest] = tensor
        if not {"raw", "ema", "m", "v"} <= parts.keys() or "step" not in story:
            raise Unusable(path, "holds no training state")
        state = cls.start(store.build(architecture, parts["raw"]), runtime)

        # In the network's order and memory format, which the file doesn't keep: tensors are updated by
        # position, and fused kernels walk raw memory.
        for mine, stored in ((state.ema, "ema"), (state.m, "m"), (state.v, "v")):
            for name, tensor in mine.items():
                tensor.copy_(parts[stored][name])
        state.step, state.processes = story["step"], story["processes"]
        state.extra = parts.get("extra", {})
        return state

    def descend(self, training: Training) -> None:
        """Adam's step `step` (0-based) along the gradients, at the warmed-up learning rate.

        Fused: one kernel over all parameters. Torch's function rather than its class, which imports the
        compiler: a second per job.
        """
        rate = training.learning_rate * min(1.0, (self.step + 1) / max(1, training.warmup))
        parameters = list(self.network.parameters())
        steps = torch.full((len(parameters),), float(self.step), device=parameters[0].device)
        with torch.no_grad():
            adam(
                parameters,
                [p.grad for p in parameters],
                list(self.m.values()),
                list(self.v.values()),
                [],
                list(steps.unbind()),
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=0.9,
                beta2=0.999,
                lr=rate,
                weight_decay=0.0,
                eps=1e-8,
            )

    def update_average(self, training: Training) -> None:
        """EMA step after optimiser step `step` (0-based i): decay, or min(decay, (1+i)/(10+i))."""
        i = self.step
        decay = training.ema_decay
        if training.ema_warmup:
            decay = min(decay, (1 + i) / (10 + i))
        averages, weights = list(self.ema.values()), [p.detach() for p in self.network.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def weights(self, kind: str) -> dict[str, Tensor]:
        """Raw or averaged parameters by name, detached."""
        if kind == "ema":
            return self.ema
        return {n: p.detach() for n, p in self.network.named_parameters()}


def check_finite(loss: float, step: int, where: str) -> None:
    """Stop on a loss that is no number.

    Raises:
        UserError: NaN or infinity.
    """
    if not math.isfinite(loss):
        raise UserError(
            f"{where}: loss is {loss} at step {step}; lower training.learning_rate or set training.clip"
        )
