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

from ebdiff.config import Network, Training
from ebdiff.errors import Unusable, UserError
from ebdiff.nets import store
from ebdiff.nets.execution import Runtime
from ebdiff.nets.unet import UNet


@dataclass
class State:
    """Everything training needs to go on.

    Attributes:
        network: the raw weights, in training.
        ema: the moving average of every parameter, by name.
        optimizer: Adam over the network's parameters.
        step: optimiser steps done.
        processes: one entry per process that trained: when it started, its steps and seconds.
        extra: further arrays that travel along (the masks of a search).
    """

    network: UNet
    ema: dict[str, Tensor]
    optimizer: torch.optim.Adam
    step: int = 0
    processes: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(cls, network: UNet, training: Training, runtime: Runtime) -> State:
        """State at step 0: the average equals the weights, no moments."""
        network = runtime.place(network)
        ema = {n: p.detach().clone() for n, p in network.named_parameters()}
        # Fused Adam: one kernel over all parameters instead of a dozen per tensor.
        adam = torch.optim.Adam(network.parameters(), lr=training.learning_rate, fused=True)
        return cls(network, ema, adam)

    @property
    def seconds(self) -> float:
        """Seconds inside training so far, over all processes."""
        return sum(p["seconds"] for p in self.processes)

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors: raw., ema., m., v. and extra."""
        found = {f"extra.{n}": t for n, t in self.extra.items()}
        for name, parameter in self.network.named_parameters():
            found[f"raw.{name}"], found[f"ema.{name}"] = parameter.detach(), self.ema[name]
            moments = self.optimizer.state.get(parameter)
            if moments:
                found[f"m.{name}"], found[f"v.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        return found

    def save(self, path: Path, network: Network, story: dict[str, Any]) -> None:
        """Write the state atomically.

        Args:
            path: where to.
            network: config of the dense network.
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
        store.save(path, tensors, network, {**story, "step": self.step, "processes": self.processes})

    @classmethod
    def load(cls, path: Path, training: Training, runtime: Runtime) -> State:
        """Read a state written by `save`.

        Raises:
            UserError: unreadable, or not a training state.
        """
        tensors, config, story = store.load(path)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, rest = name.split(".", 1)
            parts.setdefault(kind, {})[rest] = tensor
        if not {"raw", "ema"} <= parts.keys() or "step" not in story:
            raise Unusable(path, "holds no training state")
        state = cls.start(store.build(config, parts["raw"]), training, runtime)

        def like(parameter: Tensor, value: Tensor) -> Tensor:
            """On the parameter's device and in its memory format: fused kernels walk raw memory."""
            return torch.empty_like(parameter).copy_(value)

        # In the network's order, which the file doesn't keep: the average is updated by position.
        state.ema = {n: like(average, parts["ema"][n]) for n, average in state.ema.items()}
        state.step, state.processes = story["step"], story["processes"]
        state.extra = parts.get("extra", {})
        for name, parameter in state.network.named_parameters():
            if name in parts.get("m", {}):
                state.optimizer.state[parameter] = {
                    "step": torch.tensor(float(state.step), device=runtime.device),
                    "exp_avg": like(parameter.detach(), parts["m"][name]),
                    "exp_avg_sq": like(parameter.detach(), parts["v"][name]),
                }
        return state

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
