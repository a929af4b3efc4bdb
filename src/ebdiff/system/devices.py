"""Which device a job computes on, and what it is called."""

from __future__ import annotations

import fcntl
import os
import platform
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import TextIO

import torch

from ebdiff.system.errors import UserError, first_line

_leases: list[TextIO] = []  # open for as long as the process lives: closing one lets its GPU go


def pick_device(asked: str, own: bool = False) -> torch.device:
    """`auto` leases a GPU of this machine where there is one, else takes the CPU.

    Of several processes of one job each takes its own of those that were leased for all.

    Args:
        asked: a device, or `auto`.
        own: wait for a GPU that no other job uses (`compute.gpus` of 1 or more), or share one.

    Raises:
        UserError: there is no such device here.
    """
    if asked == "auto":
        gpus = visible_gpus()
        if "LOCAL_RANK" in os.environ and gpus:
            asked = f"cuda:{os.environ['LOCAL_RANK']}"
        else:
            asked = f"cuda:{lease(gpus, 1, own)[0]}" if gpus else "cpu"
    try:
        device = torch.empty(0, device=asked).device
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"compute.device: {asked!r} can't be used here ({reason}); try auto or cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def visible_gpus() -> list[str]:
    """A machine-wide name of each GPU this process may use, in CUDA's order."""
    named, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def lease(gpus: list[str], count: int, own: bool, wait: float = 2.0) -> list[int]:
    """Take the first GPUs that no other job of this machine holds; wait for them, or else share.

    Snakemake counts GPUs but assigns none. A lease is a `flock` on a file of the temporary folder and
    ends with the process, however that ends; a program that replaces it (`exec`) keeps it. Who waits
    keeps others from beginning to, so that no two jobs hold half of what each needs.

    Args:
        gpus: their machine-wide names.
        count: how many are needed, at most all.
        own: whether to wait rather than to share.
        wait: seconds between two looks.

    Returns:
        the positions in `gpus` of the leased ones.
    """
    folder = Path(tempfile.gettempdir()) / f"ebdiff-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    # Of each allocation its own: a cluster that confines its jobs calls the first GPU of every job 0.
    allocation = os.environ.get("SLURM_JOB_ID", "any")
    taken: list[int] = []
    told = False
    with (folder / f"{allocation}-queue.lock").open("w") as queue:
        if own:
            fcntl.flock(queue, fcntl.LOCK_EX)
        while True:
            for position, gpu in enumerate(gpus):
                if position in taken or len(taken) == count:
                    continue
                file = (folder / f"{allocation}-{gpu.replace('/', '_')}.lock").open("w")
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.close()
                    continue
                os.set_inheritable(file.fileno(), True)
                _leases.append(file)
                taken.append(position)
            if len(taken) == count:
                return taken
            if not own:
                return [os.getpid() % len(gpus)]
            if not told:
                print(f"waiting for {count} of {len(gpus)} GPUs: other jobs use them", flush=True)
                told = True
            time.sleep(wait)


@cache
def device_name(device: torch.device) -> str:
    """The device in words: a GPU's name, or the CPU's model and core count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        lines = []
    return f"{lines[0]} ({len(lines)} cores)" if lines else platform.processor() or platform.machine()
