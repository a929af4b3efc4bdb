"""Where and how a network's arithmetic runs: device, precision, memory format, CUDA graphs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ebdiff.data.dataset import UNCONDITIONAL, Cond
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.schema import Execution
from ebdiff.system.errors import first_line, out_of_memory

Eps = Callable[[Tensor, Tensor, Cond], Tensor]

STRICT = Execution()
GPU = Execution(precision="bf16", channels_last=True)  # as matrix units and fused layers want it
# Values in a batch below which a GPU computes strictly too: compiling kernels and searching algorithms would
# take longer than the training that they make faster (digits: 4,096; CIFAR-10: 393,216).
SMALL = 2**15
NORMS = (nn.GroupNorm, nn.LayerNorm)
EAGER = 3  # calls of a function before it is captured: kernels are compiled and algorithms searched meanwhile


@dataclass(frozen=True)
class Runtime:
    """Where a network trains or samples, and how.

    Attributes:
        device: where.
        how: precision and memory format.
        micro_batch: images whose activations are held at a time; None: all.
        deterministic: on a GPU, only kernels that repeat their bits, launched one by one.
        search: on a GPU, for the fastest convolutions, which takes seconds.
    """

    device: torch.device
    how: Execution = STRICT
    micro_batch: int | None = None
    deterministic: bool = False
    search: bool = True

    @classmethod
    def of(cls, experiment: Experiment, use: str, network: str, device: torch.device) -> Runtime:
        """As the experiment's tuning says, else bf16 on a GPU, where a batch isn't `SMALL`, and strict fp32.

        Args:
            experiment: with its tuning and `compute` section.
            use: `training` or `sampling`.
            network: `dense` or an asked rate.
            device: where.
        """
        values = getattr(experiment, use).batch * math.prod(experiment.items.shape)
        large, compute = values >= SMALL, experiment.compute
        default = GPU if device.type == "cuda" and large else STRICT
        how = getattr(experiment.tuning, use).get(network, default)
        return cls(device, how, compute.micro_batch, compute.deterministic, search=large)

    def told(self) -> dict[str, Any]:
        """How networks really run, for ledgers: the default depends on the device."""
        how = {"micro_batch": self.micro_batch, "deterministic": self.deterministic, "graph": self.captures}
        return {**self.how.model_dump(), **how}

    @property
    def captures(self) -> bool:
        """Whether work is replayed as CUDA graphs; launched kernel by kernel it is bound by launches."""
        return self.device.type == "cuda" and not self.deterministic

    @property
    def halves(self) -> bool:
        """Whether training computes on bf16 copies of the weights; on a CPU autocast casts them instead."""
        return self.device.type == "cuda" and self.how.precision == "bf16"

    def set_arithmetic(self) -> None:
        """Set torch's switches: TF32 exactly where asked, and kernels that repeat their bits.

        Deterministic cuBLAS also needs CUBLAS_WORKSPACE_CONFIG, which the command line sets.
        """
        if self.device.type == "cuda":
            strict = self.how.precision == "fp32"
            torch.set_float32_matmul_precision("highest" if strict else "high")
            torch.backends.cudnn.allow_tf32 = not strict
            torch.backends.cudnn.benchmark = self.search and not self.deterministic
            if torch.are_deterministic_algorithms_enabled() != self.deterministic:  # imports the compiler
                torch.use_deterministic_algorithms(self.deterministic)

    def place(self, network: nn.Module) -> nn.Module:
        """The network on its device, in its memory format, in place."""
        layout = torch.channels_last if self.how.channels_last else torch.contiguous_format
        return network.to(self.device, memory_format=layout)

    def autocast(self) -> AbstractContextManager:
        """The context of a training step's forward pass."""
        enabled = self.how.precision == "bf16" and not self.halves
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def halved(self, network: nn.Module) -> set[str]:
        """The parameters that a network in training has a bf16 copy of: all but norms'."""
        if not self.halves:
            return set()
        norms = {p for m in network.modules() if isinstance(m, NORMS) for p in m.parameters()}
        return {name for name, parameter in network.named_parameters() if parameter not in norms}

    def captured(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function of tensors, replayed as a CUDA graph where this runtime `captures`."""
        return Captured(function) if self.captures else function

    def denoiser(self, network: nn.Module) -> Eps:
        """A network that only predicts: no gradients, its weights in the precision it computes in."""
        network = self.place(network.eval().requires_grad_(False))
        run = self.captured(network.to(torch.bfloat16) if self.how.precision == "bf16" else network)

        def predict(x: Tensor, t: Tensor, cond: Cond = UNCONDITIONAL) -> Tensor:
            self.set_arithmetic()  # each time: the experts of a run may differ
            return run(x, t, cond)

        return predict


class Captured:
    """A function of tensors that becomes a CUDA graph after `EAGER` calls with inputs of equal shapes.

    A replay launches all its kernels at once, on copies of the inputs. What is random in it follows the seed
    of torch's generator at the replay, as it would eagerly. Whatever else it reads must stay where it is.
    What can't be captured goes on eagerly, with a word.

    Args:
        function: its arguments are tensors, or tuples of tensors and None; it returns a tensor.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self.calls: Counter = Counter()
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Any], Tensor] | None] = {}

    def __call__(self, *arguments: Any) -> Tensor:
        inputs, structure = tree_flatten(arguments)
        kind = tuple(None if x is None else (x.shape, x.dtype) for x in inputs)
        self.calls[kind] += 1
        if self.calls[kind] > EAGER and kind not in self.graphs:
            try:
                self.graphs[kind] = self._capture(inputs, structure)
            except RuntimeError as error:
                if out_of_memory(error) or out_of_memory(error.__context__ or error):
                    raise RuntimeError("CUDA out of memory while capturing a graph") from error
                print(f"not captured as a CUDA graph, so slower: {first_line(error)}", flush=True)
                self.graphs[kind] = None
        if self.graphs.get(kind) is None:
            return self._eagerly(*arguments)
        graph, places, output = self.graphs[kind]
        for place, x in zip(places, inputs, strict=True):
            if x is not None:
                place.copy_(x)
        graph.replay()
        return output.clone()

    def _eagerly(self, *arguments: Any) -> Tensor:
        """On the stream of the capture, as torch asks of work that is captured later."""
        stream, _ = _room()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = self.function(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        return output

    def _capture(self, inputs: list[Any], structure: Any) -> tuple[torch.cuda.CUDAGraph, list[Any], Tensor]:
        (stream, first), graph, grad = _room(), torch.cuda.CUDAGraph(), torch.is_grad_enabled()
        # What a graph keeps must outlive the inference mode that it may be captured in; its stream must not
        # stay the current one if it fails; and threads that draw ahead may pin memory meanwhile.
        with torch.inference_mode(False), torch.set_grad_enabled(grad), torch.cuda.stream(stream):
            places = [None if x is None else x.clone() for x in inputs]
            with torch.cuda.graph(graph, first.pool(), stream, capture_error_mode="thread_local"):
                output = self.function(*tree_unflatten(places, structure))
        torch.cuda.current_stream().wait_stream(stream)
        return graph, places, output


@cache
def _room() -> tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]:
    """The stream of all captures, and a graph that holds their memory pool.

    Graphs that share one take the memory of the largest, not of all: they run one after another, and what
    they return is copied.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with (
        torch.inference_mode(False),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        torch.zeros(1, device="cuda")
    return stream, graph
