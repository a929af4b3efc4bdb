"""How much memory a training step needs, and how much there is: known before it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebdiff.experiment.members import Architecture
from ebdiff.nets.denoiser import Denoiser
from ebdiff.nets.execution import Runtime
from ebdiff.nets.store import build
from ebdiff.system import parallel
from ebdiff.system.errors import UserError, out_of_memory

PER_PARAMETER = 20  # bytes: fp32 weight, gradient, Adam's two moments, moving average
TEMPORARIES = 4  # tensors of the largest size that the backward pass of one layer works with
# What an allocator leaves unused between tensors: glibc 16-25 % of what is asked of it, by measured
# peaks of the CIFAR-10 network (dense and 50 %, batch 16 and 64); taken for CUDA's too.
FRAGMENTED = 1.2


@dataclass(frozen=True)
class Footprint:
    """What a network's training step needs of memory, as a function of its images.

    Attributes:
        parameters: how many.
        fixed: bytes of every storage that autograd keeps for the backward pass, at no images.
        growing: bytes that each of them takes per image.
    """

    parameters: int
    fixed: np.ndarray
    growing: np.ndarray

    @classmethod
    def of(cls, network: Denoiser, bf16: bool = False) -> Footprint:
        """Measured by forward passes of two and of three images: of one, what is transposed isn't copied.

        Args:
            network: dense or pruned, on its device.
            bf16: under autocast to bfloat16; a network in bf16 needs none.
        """
        # For so few no algorithm is searched.
        searched, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
        try:
            two, three = (_kept_for_backward(network, images, bf16) for images in (2, 3))
        finally:
            torch.backends.cudnn.benchmark = searched
        return cls(sum(p.numel() for p in network.parameters()), 3 * two - 2 * three, three - two)

    def bytes(self, images: int) -> int:
        """Peak memory of a step, beside what the process holds after its imports.

        To what autograd keeps come weights, optimiser and average, and one layer's temporaries.

        Args:
            images: in the (micro-)batch of one process.

        Returns:
            bytes; within 10 % of measured peaks of the CIFAR-10 network in fp32 on the CPU.
        """
        kept = self.fixed + images * self.growing
        return int(FRAGMENTED * (PER_PARAMETER * self.parameters + kept.sum() + TEMPORARIES * kept.max()))

    def micro_batch(self, batch: int, available: int) -> int | None:
        """The largest divisor of `batch` whose step fits in `available` bytes; None if not one image does."""
        divisors = (n for n in range(batch, 0, -1) if batch % n == 0)
        return next((n for n in divisors if self.bytes(n) <= available), None)


def footprint(architecture: Architecture, shapes: Mapping[str, Tensor], bf16: bool = False) -> Footprint:
    """The footprint of a network of these shapes; meta tensors will do."""
    return Footprint.of(build(architecture, {name: torch.zeros(t.shape) for name, t in shapes.items()}), bf16)


def _kept_for_backward(network: Denoiser, images: int, bf16: bool) -> np.ndarray:
    """Bytes of every storage that autograd keeps, but for the parameters' own; views count once."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> None:
        # Nodes keep nothing, and `kept` is emptied at the end: the pass would keep itself alive for ever, and
        # with it nodes of this stream, which no CUDA graph of another one can capture.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # held, so that no address is used again

    x, t, cond = network.example(images)
    with (
        torch.autocast(x.device.type, torch.bfloat16, enabled=bf16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing),
    ):
        network(x, t, cond)
    sizes = np.array([tensor.untyped_storage().nbytes() for tensor in kept.values()])
    kept.clear()
    return sizes


@contextmanager
def enough(network: Denoiser, images: int, runtime: Runtime) -> Iterator[None]:
    """Warn before training where memory looks too small, and explain if it runs out.

    Args:
        network: what is trained, on its device.
        images: a process's share of the batch.
        runtime: its precision and micro-batch.

    Raises:
        UserError: the memory ran out inside the block; names the micro-batch that would fit.
    """
    needs = Footprint.of(network, runtime.how.precision == "bf16" and not runtime.halves)
    size = min(images, runtime.micro_batch or images)
    there = PER_PARAMETER * needs.parameters  # the training state is made before the first step
    available = available_bytes(runtime.device) + there
    wanted = (
        f"a step of {size} images needs about {needs.bytes(size) / 1e9:.2g} GB, "
        f"{available / 1e9:.2g} GB are free"
    )

    def remedy(limit: int) -> str:
        fits = needs.micro_batch(images, limit)
        return f"set compute.micro_batch: {fits}" if fits else "not one image fits: take a smaller network"

    if needs.bytes(size) > available and parallel.first():
        print(f"warning: {wanted}; {remedy(available)}", flush=True)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        limit = min(available, needs.bytes(size) - 1)  # this size did not fit, whatever was estimated
        raise UserError(f"out of memory on {runtime.device}: {wanted}; {remedy(limit)}") from None


def available_bytes(device: torch.device) -> int:
    """Memory that a new tensor may take: free on the GPU, or available to this process."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return max(
        0, min(_available_here(), *_left_in_cgroups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))
    )


def _available_here() -> int:
    """Bytes the kernel can give without swapping; where it doesn't tell, all there are."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_in_cgroups(root: Path, own: Path) -> Iterator[int]:
    """Bytes left in every memory-limited control group (v1 or v2) that holds this process.

    A container or a SLURM job is such a group. Pages cached of files count as free.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group, or `max`: no limit
                continue
            yield limit - used + int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
