"""What a stage really cost, and on what: written beside every long verb's output."""

from __future__ import annotations

import platform
import resource
from functools import cache
from typing import Any

import numpy as np
import torch

import ebdiff
from ebdiff.errors import UserError


def pick_device(asked: str) -> torch.device:
    """`auto` takes the first GPU where there is one, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=asked).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"compute.device: {asked!r} can't be used here ({reason}); try auto or cpu") from None


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


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    return {
        "ebdiff": ebdiff.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def peak_mb(device: torch.device) -> float:
    """Peak memory so far, MB: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def ledger(device: torch.device, **entries: Any) -> dict[str, Any]:
    """A ledger entry: the given figures, the device, threads, memory and versions."""
    return {
        **entries,
        "peak_mb": round(peak_mb(device), 1),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
