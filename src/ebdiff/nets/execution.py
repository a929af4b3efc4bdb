"""Where and how a network's arithmetic runs: device, precision, memory format, compilation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ebdiff.data.dataset import UNCONDITIONAL, Cond
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.schema import Execution
from ebdiff.system.errors import first_line

Eps = Callable[[Tensor, Tensor, Cond], Tensor]

CPU = Execution()
# Matrix units want bf16 with channels innermost; a compiler's minutes must be asked for (`ebdiff tune`).
GPU = Execution(precision="bf16", channels_last=True)


@dataclass(frozen=True)
class Runtime:
    """Where a network trains or samples, and how.

    Attributes:
        device: where.
        how: precision, memory format, compilation.
        micro_batch: images whose activations are held at a time; None: all.
        deterministic: on a GPU, only kernels that repeat their bits.
        uncompiled: why networks that were to be compiled weren't.
    """

    device: torch.device
    how: Execution = CPU
    micro_batch: int | None = None
    deterministic: bool = False
    uncompiled: list[str] = field(default_factory=list, init=False, compare=False)

    @classmethod
    def of(cls, experiment: Experiment, use: str, network: str, device: torch.device) -> Runtime:
        """As the experiment's tuning says, else the device's default.

        Args:
            experiment: with its tuning and `compute` section.
            use: `training` or `sampling`.
            network: `dense` or an asked rate.
            device: where.
        """
        default = GPU if device.type == "cuda" else CPU
        how = getattr(experiment.tuning, use).get(network, default)
        return cls(device, how, experiment.compute.micro_batch, experiment.compute.deterministic)

    def told(self) -> dict[str, Any]:
        """How networks really ran, for ledgers: the default depends on the device, and compiling may fail."""
        return {
            **self.how.model_dump(),
            "compile": self.how.compile and not self.uncompiled,
            "micro_batch": self.micro_batch,
            "deterministic": self.deterministic,
        }

    def set_arithmetic(self) -> None:
        """Set torch's switches: TF32 exactly where asked, and kernels that repeat their bits.

        Deterministic cuBLAS also needs CUBLAS_WORKSPACE_CONFIG, which the command line sets.
        """
        if self.device.type == "cuda":
            strict = self.how.precision == "fp32"
            torch.set_float32_matmul_precision("highest" if strict else "high")
            torch.backends.cudnn.allow_tf32 = not strict
            torch.backends.cudnn.benchmark = not self.deterministic
            torch.use_deterministic_algorithms(self.deterministic)

    def place(self, network: nn.Module) -> nn.Module:
        """The network on its device, in its memory format, in place."""
        layout = torch.channels_last if self.how.channels_last else torch.contiguous_format
        return network.to(self.device, memory_format=layout)

    def autocast(self) -> AbstractContextManager:
        """The context of a training step's forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.how.precision == "bf16")

    def compiled(self, network: nn.Module) -> Eps:
        """The network, compiled if asked; where that fails it says why and runs eagerly.

        The backward pass is compiled when it first runs; an error there is not caught.
        """
        if not self.how.compile:
            return network
        # All networks share one forward function, which would be compiled for 8 widths at most.
        torch._dynamo.config.cache_size_limit = 64
        run: Eps = torch.compile(network)

        def call(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            nonlocal run
            try:
                return run(x, t, cond)
            except torch._dynamo.exc.TorchDynamoException as error:
                self.uncompiled.append(first_line(error))
                print(f"torch.compile failed, running without it: {self.uncompiled[-1]}", flush=True)
                run = network
                return network(x, t, cond)

        return call

    def denoiser(self, network: nn.Module) -> Eps:
        """A network that only predicts: no gradients, its weights in the precision it computes in."""
        network = self.place(network.eval().requires_grad_(False))
        run = self.compiled(network.to(torch.bfloat16) if self.how.precision == "bf16" else network)

        def predict(x: Tensor, t: Tensor, cond: Cond = UNCONDITIONAL) -> Tensor:
            self.set_arithmetic()  # each time: the experts of a run may differ
            return run(x, t, cond)

        return predict
