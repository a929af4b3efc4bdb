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

from ebdiff.errors import UserError

_leases: list[TextIO] = []  # open for as long as the process lives: closing one lets its GPU go


def pick_device(asked: str, own: bool = False) -> torch.device:
    """`auto` leases a GPU of this machine where there is one, else takes the CPU.

    Args:
        asked: a device, or `auto`.
        own: wait for a GPU that no other job uses (`compute.gpus` of 1 or more), or share one.

    Raises:
        UserError: there is no such device here.
    """
    if asked == "auto":
        count = torch.cuda.device_count()
        asked = f"cuda:{lease(visible_gpus(count), own)}" if count else "cpu"
    try:
        device = torch.empty(0, device=asked).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"compute.device: {asked!r} can't be used here ({reason}); try auto or cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def visible_gpus(count: int) -> list[str]:
    """A machine-wide name of each GPU this process may use, in CUDA's order."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def lease(gpus: list[str], own: bool, wait: float = 2.0) -> int:
    """Take the first GPU that no other job of this machine holds; wait for one, or else share.

    Snakemake counts GPUs but assigns none. The lease is a `flock` on a file of the temporary folder
    and ends with the process, however that ends.

    Args:
        gpus: their machine-wide names.
        own: whether to wait rather than to share.
        wait: seconds between two looks.

    Returns:
        the position in `gpus` of the leased one.
    """
    # Of each allocation its own: a cluster that confines its jobs calls the first GPU of every job 0.
    allocation = os.environ.get("SLURM_JOB_ID", "none")
    folder = Path(tempfile.gettempdir()) / f"ebdiff-gpus-{os.getuid()}-{allocation}"
    folder.mkdir(exist_ok=True)
    told = False
    while True:
        for position, gpu in enumerate(gpus):
            file = (folder / f"{gpu.replace('/', '_')}.lock").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _leases.append(file)
            return position
        if not own:
            return os.getpid() % len(gpus)
        if not told:
            print(f"waiting: all {len(gpus)} GPUs are in use by other jobs", flush=True)
            told = True
        time.sleep(wait)


def device_name(device: torch.device) -> str:
    """The device in words: a GPU's name, or the CPU's model and core count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name()


@cache
def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        lines = []
    return f"{lines[0]} ({len(lines)} cores)" if lines else platform.processor() or platform.machine()
