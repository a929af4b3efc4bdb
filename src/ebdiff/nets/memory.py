"""How much memory a training step needs, and how much there is: known before it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ebdiff.config import Network
from ebdiff.nets.store import build

PER_PARAMETER = 20  # bytes: fp32 weight, gradient, Adam's two moments, moving average
TEMPORARIES = 4  # tensors of the largest size that the backward pass of one layer works with
# What an allocator leaves unused between tensors: glibc 16-25 % of what is asked of it, by measured
# peaks of the CIFAR-10 network (dense and 50 %, batch 16 and 64); taken for CUDA's too.
FRAGMENTED = 1.2


def step_bytes(config: Network, shapes: Mapping[str, Tensor], images: int, bf16: bool = False) -> int:
    """Peak memory of a training step, beside what the process holds after its imports.

    The forward pass is run on tensors without storage, and what autograd keeps for the backward
    pass is summed; to it come weights, optimiser and average, and one layer's temporaries.

    Args:
        config: the dense network.
        shapes: tensors of its shapes or of a pruned network's, by name; meta tensors will do.
        images: images of one (micro-)batch.
        bf16: under autocast to bfloat16.

    Returns:
        bytes; within 10 % of measured peaks of the CIFAR-10 network in fp32 on the CPU.
    """
    kept = _kept_for_backward(config, shapes, images, bf16)
    parameters = sum(t.numel() for t in shapes.values())
    return int(FRAGMENTED * (PER_PARAMETER * parameters + sum(kept) + TEMPORARIES * max(kept)))


def _kept_for_backward(config: Network, shapes: Mapping[str, Tensor], images: int, bf16: bool) -> list[int]:
    """Bytes of every storage that autograd keeps, but for the parameters' own; views count once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no address is used again
        return tensor

    with FakeTensorMode():
        network = build(config, {name: torch.empty(t.shape) for name, t in shapes.items()})
        own = {p.untyped_storage()._cdata for p in network.parameters()}
        x = torch.empty(images, config.channels, config.image_size, config.image_size)
        t = torch.zeros(images, dtype=torch.long)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            graph = network(x, t)  # noqa: F841 (keeps what is kept alive)
    return [t.untyped_storage().nbytes() for address, t in kept.items() if address not in own]


def largest_micro_batch(
    config: Network, shapes: Mapping[str, Tensor], batch: int, available: int, bf16: bool = False
) -> int | None:
    """The largest divisor of `batch` whose step fits in `available` bytes; None if not one image does."""
    divisors = (n for n in range(batch, 0, -1) if batch % n == 0)
    return next((n for n in divisors if step_bytes(config, shapes, n, bf16) <= available), None)


def available_bytes(device: torch.device) -> int:
    """Memory that a new tensor may take: free on the GPU, or available to this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
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
