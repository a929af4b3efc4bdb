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
_shared_by = 1  # as `lease` found


def pick_device(asked: str, own: bool = False, share: int = 1) -> torch.device:
    """`auto` leases a GPU of this machine where there is one, else takes the CPU.

    Of several processes of one job each takes its own of those that were leased for all.

    Args:
        asked: a device, or `auto`; UserError if it isn't here.
        own: wait for a GPU that no other job uses (`compute.gpus` of 1 or more), or use one that others do.
        share: how many jobs may lease it together.
    """
    if asked == "auto":
        gpus = visible_gpus()
        if "LOCAL_RANK" in os.environ and gpus:
            asked = f"cuda:{os.environ['LOCAL_RANK']}"
        else:
            asked = f"cuda:{lease(gpus, 1, own, share)[0]}" if gpus else "cpu"
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


def shared_by() -> int:
    """How many jobs may hold this process's GPU together: its time is theirs in equal parts."""
    return _shared_by


def lease(gpus: list[str], count: int, own: bool, share: int = 1, wait: float = 2.0) -> list[int]:
    """Take the first GPUs that no other job of this machine holds; wait for them, or else use a held one.

    Snakemake counts GPUs but assigns none. A lease is a `flock` on a file of the temporary folder and
    ends with the process, however that ends; a program that replaces it (`exec`) keeps it. Who waits
    keeps others from beginning to, so that no two jobs hold half of what each needs. Jobs that share a GPU
    each hold one of its slots, of the GPU with fewest taken, and all of them its file against whoever wants
    it whole.

    Args:
        gpus: their machine-wide names, of which `count` are needed.
        own: whether to wait, looking every few seconds, rather than to use what others hold.
        share: slots of a GPU, of which one is taken; 1 takes it whole.

    Returns:
        the positions in `gpus` of the leased ones.
    """
    global _shared_by
    folder = Path(tempfile.gettempdir()) / f"ebdiff-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    # Of each allocation its own: a cluster that confines its jobs calls the first GPU of every job 0.
    allocation = os.environ.get("SLURM_JOB_ID", "any")
    places = [folder / f"{allocation}-{gpu.replace('/', '_')}" for gpu in gpus]
    taken: list[int] = []
    told = False
    with (folder / f"{allocation}-queue.lock").open("w") as queue:
        if own:
            fcntl.flock(queue, fcntl.LOCK_EX)
        while True:
            for position in sorted(range(len(gpus)), key=lambda i: _slots_taken(places[i], share)):
                if position not in taken and len(taken) < count and (held := _hold(places[position], share)):
                    _leases.extend(held)
                    taken.append(position)
            if len(taken) == count:
                _shared_by = share
                return taken
            if not own:
                return [os.getpid() % len(gpus)]
            if not told:
                print(f"waiting for {count} of {len(gpus)} GPUs: other jobs use them", flush=True)
                told = True
            time.sleep(wait)


def _hold(gpu: Path, share: int) -> list[TextIO]:
    """Locks of a GPU, or of one of its slots; none where it isn't free."""
    if not (whole := _locked(gpu, "", fcntl.LOCK_EX if share == 1 else fcntl.LOCK_SH)):
        return []
    if share == 1:
        return [whole]
    for i in range(share):
        if slot := _locked(gpu, f"-{i}"):
            return [whole, slot]
    whole.close()
    return []


def _slots_taken(gpu: Path, share: int) -> int:
    """How many of a GPU's slots are held; of one that is taken whole, none."""
    files = [_locked(gpu, f"-{i}") for i in range(share)] if share > 1 else []
    for file in filter(None, files):
        file.close()
    return files.count(None)


def _locked(gpu: Path, slot: str, how: int = fcntl.LOCK_EX) -> TextIO | None:
    """A locked file, kept by a program that replaces this one; None where another process is in the way."""
    file = gpu.with_name(f"{gpu.name}{slot}.lock").open("w")
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    os.set_inheritable(file.fileno(), True)
    return file


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
