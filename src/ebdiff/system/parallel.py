"""Several processes for one job, started by `torchrun`; without it every function is trivial.

The global batch is fixed: it is drawn as a whole and cut by rank, so the number of processes
changes results by rounding only (dropout aside).
"""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as dist
from torch import Tensor


def join(device: torch.device) -> None:
    """Meet the other processes of this job, if `torchrun` started several."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        gpu = device.type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
        atexit.register(dist.destroy_process_group)


def world() -> int:
    """How many processes share this job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def share(count: int) -> slice:
    """This process's consecutive share of `count` things; shares differ by one at most."""
    return slice(count * rank() // world(), count * (rank() + 1) // world())


def barrier() -> None:
    """Wait for all."""
    if world() > 1:
        dist.barrier()


def summed(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if world() > 1:
        dist.all_reduce(value)
    return value


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether it holds in some process; all must ask at the same step."""
    return flag if world() == 1 else bool(summed(torch.tensor(float(flag), device=device)) > 0)
