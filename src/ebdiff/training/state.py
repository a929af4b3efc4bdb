"""Training state: weights, moving average, Adam's moments and the step, as one safetensors file.

The same file is a milestone (what `sample` reads the averaged weights of) and the state a killed
job goes on from. In memory each of them is one flat tensor: what treats all parameters alike is one
kernel, and so is the sum over processes. Where a network computes in bf16 its parameters are copies of the
weights, which lie in one tensor too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from ebdiff.training.hooks import Hook

KINDS = ("raw", "ema", "m", "v", "grad")
SAVED = KINDS[:4]
# Every parameter begins at a multiple of so many elements: matrix units and vector loads want addresses
# of 16 bytes or more, and a copy in bf16 has half as many. Between parameters all kinds stay 0.
ALIGNED = 64


@dataclass
class State:
    """Everything training needs to go on.

    Attributes:
        network: in training: its parameters are views of `raw`, their gradients of `grad`; but those that
            compute in bf16 (`Runtime.halved`) are views of `half`, and the gradients of all are `gather`ed.
        raw, ema, m, v, grad: weights, moving average, Adam's first and second moments and the gradient of
            all parameters, float32 (n,) each.
        half: the first of `raw` in bf16; None: the network computes on `raw`.
        step: training steps done.
        updates: optimiser steps since the moments were zero; less than `step` where weights came from
            elsewhere or a hook replaced a step.
        processes: one entry per job that trained: when, on what and how, its steps and seconds.
        hooks: what looks in on training; their arrays are saved along.
        extra: the arrays that hooks had saved in the state that was loaded.
    """

    network: Denoiser
    raw: Tensor
    ema: Tensor
    m: Tensor
    v: Tensor
    grad: Tensor
    half: Tensor | None
    _views: dict[str, dict[str, Tensor]]
    step: int = 0
    updates: int = 0
    processes: list[dict[str, Any]] = field(default_factory=list)
    hooks: Sequence[Hook] = ()
    extra: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(cls, network: Denoiser, runtime: Runtime) -> State:
        """State at step 0: the average equals the weights, moments are zero.

        The network moves into the state. It is placed first, which moves weights of its own accord
        (a GRU's into one piece for cuDNN), and must leave its parameters where they are from then on.
        """
        parameters, places, end = dict(runtime.place(network).named_parameters()), {}, 0
        halved, halfway = runtime.halved(network), 0
        for name in sorted(parameters, key=lambda name: name not in halved):
            # In its own memory format: the network computes on weights as they lie.
            parameter = parameters[name]
            places[name] = parameter.shape, parameter.stride(), end
            end += -(-parameter.numel() // ALIGNED) * ALIGNED
            halfway = end if name in halved else halfway
        flat = {kind: torch.zeros(end, device=runtime.device) for kind in KINDS}
        views = {
            kind: {name: whole.as_strided(*places[name]) for name in parameters}
            for kind, whole in flat.items()
        }
        for name, parameter in parameters.items():
            views["raw"][name].copy_(parameter.detach())
        half = flat["raw"][:halfway].bfloat16() if halved else None
        for name, parameter in parameters.items():
            parameter.data = half.as_strided(*places[name]) if name in halved else views["raw"][name]
            parameter.grad = None if halved else views["grad"][name]
        flat["ema"].copy_(flat["raw"])
        return cls(network, **flat, half=half, _views=views)

    def view(self, kind: str) -> dict[str, Tensor]:
        """One of `KINDS` by parameter name: views in the parameters' order, shapes and memory format."""
        return self._views[kind]

    def named(self, whole: Tensor) -> dict[str, Tensor]:
        """A tensor (n,) of all parameters by name, as `view` gives the state's own."""
        own = self.view("raw").items()
        return {name: whole.as_strided(v.shape, v.stride(), v.storage_offset()) for name, v in own}

    @property
    def seconds(self) -> float:
        """Seconds inside training so far, over all jobs."""
        return sum(p["seconds"] for p in self.processes)

    @property
    def device_seconds(self) -> float:
        """The same on each job's devices, summed; of a GPU that jobs share a part."""
        return sum(p["seconds"] * p["world"] / p.get("share", 1) for p in self.processes)

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors: raw., ema., m., v., the network's buffer. and the hooks' extra."""
        found = {f"extra.{n}": t for hook in self.hooks for n, t in hook.carry().items()}
        found |= store.buffers(self.network)
        return found | {f"{kind}.{n}": t for kind in SAVED for n, t in self.view(kind).items()}

    def save(self, path: Path, architecture: Architecture, story: dict[str, Any]) -> None:
        """Write the state atomically.

        Args:
            path: where to.
            architecture: of the dense network.
            story: what the file is; step, updates and processes are added.

        Raises:
            UserError: a weight isn't finite.
        """
        wholes = {whole.untyped_storage().data_ptr() for whole in (self.raw, self.half) if whole is not None}
        for name, parameter in self.network.named_parameters():
            if parameter.untyped_storage().data_ptr() not in wholes:
                raise RuntimeError(f"{name} has left the state: its network moved it, and nothing trained it")
        tensors = self.tensors()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(
                    f"{path}: {name} is not finite at step {self.step}; "
                    "lower training.learning_rate or set training.clip"
                )
        counts = {"step": self.step, "updates": self.updates, "processes": self.processes}
        store.save(path, tensors, architecture, {**story, **counts})

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
        if not parts.keys() >= set(SAVED) or not story.keys() >= {"step", "updates", "processes"}:
            raise Unusable(path, "holds no training state")
        state = cls.start(store.build(architecture, parts["raw"] | parts.get("buffer", {})), runtime)
        for kind in SAVED[1:]:
            for name, view in state.view(kind).items():
                view.copy_(parts[kind][name])
        state.step, state.updates, state.processes = (story[k] for k in ("step", "updates", "processes"))
        state.extra = parts.get("extra", {})
        return state

    def begin_step(self) -> None:
        """Nothing is learned yet, and what computes is what was trained."""
        self.grad.zero_()
        if self.half is not None:
            self.half.copy_(self.raw[: len(self.half)])

    def forget(self) -> None:
        """Drop what a pass that came to no end left at the parameters for `gather`."""
        if self.half is not None:
            self.network.zero_grad()

    def gather(self) -> None:
        """Add to `grad` what a backward pass left at the parameters; nothing where it went there by itself.

        Left at each it costs no addition; two concatenations bring all together.
        """
        if self.half is None:
            return
        for whole, into in (
            (self.half, self.grad[: len(self.half)]),
            (self.raw, self.grad[len(self.half) :]),
        ):
            pieces, zeros = [], whole.new_zeros(ALIGNED)
            for parameter in self.network.parameters():
                if parameter.dtype == whole.dtype:
                    pieces += [_as_it_lies(parameter), zeros[: -parameter.numel() % ALIGNED]]
                    parameter.grad = None
            if pieces:
                into.add_(torch.cat(pieces))

    def _parts(self, *kinds: str) -> list[list[Tensor]]:
        """What optimisers treat one by one: on a GPU the whole, on a CPU every parameter.

        There the last few elements of each are computed one by one, which rounds otherwise than vectors.
        """
        flat = self.raw.is_cuda
        return [[getattr(self, kind)] if flat else list(self.view(kind).values()) for kind in kinds]

    def clip(self, largest: float) -> None:
        """Scale the gradient down to a norm of `largest` at most, as torch's `clip_grad_norm_`."""
        (parts,) = self._parts("grad")
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parts)))
        self.grad.mul_((largest / (norm + 1e-6)).clamp(max=1.0))

    def descend(self, training: Training, epoch: int = 0) -> None:
        """One step of AdamW along the gradient, at the warmed-up learning rate of an epoch (0-based).

        Warm-up and Adam's bias corrections go by the updates of these moments, not by the steps that
        the weights have seen: a public checkpoint comes without moments.

        Fused: one kernel over all parameters. Torch's function rather than its class, which imports the
        compiler: a second per job.
        """
        rate = training.learning_rate * min(1.0, (self.updates + 1) / max(1, training.warmup))
        rate *= training.decay_per_epoch**epoch
        raw, grad, m, v = self._parts("raw", "grad", "m", "v")
        steps = torch.full((len(raw),), float(self.updates), device=self.raw.device)
        with torch.no_grad():
            adam(
                raw,
                grad,
                m,
                v,
                [],
                list(steps.unbind()),
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=0.9,
                beta2=0.999,
                lr=rate,
                weight_decay=training.weight_decay,
                eps=1e-8,
                **({"decoupled_weight_decay": True} if training.weight_decay else {}),  # new in torch 2.7
            )
        self.updates += 1

    def update_average(self, training: Training) -> None:
        """EMA step after step `step` (0-based i): decay, or min(decay, (1+i)/(10+i))."""
        i = self.step
        decay = training.ema_decay
        if training.ema_warmup:
            decay = min(decay, (1 + i) / (10 + i))
        self.ema.lerp_(self.raw, 1 - decay)


def _as_it_lies(parameter: Tensor) -> Tensor:
    """A parameter's gradient in the order of the parameter in memory: (elements,)."""
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    strides = zip(grad.stride(), parameter.stride(), grad.shape, strict=True)
    if any(a != b for a, b, n in strides if n > 1):
        grad = torch.empty_like(parameter).copy_(grad)
    return grad.as_strided((grad.numel(),), (1,))


def check_finite(loss: float, step: int, where: str) -> None:
    """Stop on a loss that is no number.

    Raises:
        UserError: NaN or infinity.
    """
    if not math.isfinite(loss):
        raise UserError(
            f"{where}: loss is {loss} at step {step}; lower training.learning_rate or set training.clip"
        )
