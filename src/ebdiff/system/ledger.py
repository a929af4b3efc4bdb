"""What a stage really cost, and on what: written beside every long verb's output."""

from __future__ import annotations

import platform
import resource
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ebdiff
from ebdiff.system import parallel
from ebdiff.system.devices import device_name, shared_by


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
    try:  # what getrusage tells is inherited from a larger parent process
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def ledger(device: torch.device, **entries: Any) -> dict[str, Any]:
    """A ledger entry: the given figures, the device, its share, processes, threads, memory and versions."""
    return {
        **entries,
        "peak_mb": round(peak_mb(device), 1),
        "device": device_name(device),
        "world": parallel.world(),
        "share": shared_by(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
