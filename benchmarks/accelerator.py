"""What a GPU does while we train: share of the bf16 rate it reaches, and share of the time it is busy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import paired
import torch

from ebdiff.cost.measure import peaks


def busy_share(piece: Callable[[], object]) -> float:
    """Share of a piece of work's wall time in which some kernel runs (one stream)."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        piece()
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = sorted((e.time_range.start, e.time_range.end) for e in on_gpu)
    busy, until = 0.0, kernels[0][0]
    for start, end in kernels:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / (until - kernels[0][0])


def rows(
    measure: str, operations: float, seconds: Sequence[float], piece: Callable, device: torch.device
) -> list[paired.Row]:
    """Achieved share of a large matrix product's rate and busy share of a piece of work.

    Args:
        measure: what it is, in words.
        operations: FLOP of one call.
        seconds: of the calls timed.
        piece: the call, once more, to be profiled.
        device: the GPU.
    """
    busy, peak = 100 * busy_share(piece), peaks(device, ["bf16"])["flops"]["bf16"]
    shares = [100 * operations / s / peak for s in seconds]
    note = f"of {peak / 1e12:.0f} TFLOP/s, a large product's; 2 FLOP per MAC, backward twice the forward pass"
    return [
        paired.row(f"{measure}: GPU busy", [busy], "%", goal="≥ 90", note="kernels, by the profiler"),
        paired.row(f"{measure}: share of the bf16 peak", shares, "%", note=note),
    ]
