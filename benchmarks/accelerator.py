"""What a GPU does while we train: rates it reaches, kernels it runs, memory it holds, and how busy it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import paired
import torch

from ebdiff.cost.measure import network_of, timing_job
from ebdiff.cost.roofline import moved, operations
from ebdiff.experiment.experiment import Experiment
from ebdiff.nets import unet
from ebdiff.nets.execution import GPU, Runtime
from ebdiff.pruning.count import count, meta_tensors
from ebdiff.training.loop import learner, train
from ebdiff.training.state import State


def kernels(piece: Callable[[], object]) -> list[tuple[float, float]]:
    """Begin and end of every kernel of a piece of work, by the profiler: microseconds, in order."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        piece()
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sorted((e.time_range.start, e.time_range.end) for e in on_gpu)


def busy_share(ran: Sequence[tuple[float, float]]) -> float:
    """Share of the time from the first kernel's begin to the last one's end in which some kernel runs."""
    if not ran:
        return float("nan")
    busy, until = 0.0, ran[0][0]
    for start, end in ran:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / (until - ran[0][0])


def memory(piece: Callable[[], object]) -> list[paired.Row]:
    """What a step reserves, before anything else ran."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    piece()
    held = torch.cuda.max_memory_reserved() / 2**30
    return [paired.row("dense step: GPU memory", [held], "GiB", goal="≤ 3.5", note="reserved at most")]


def floor() -> AbstractContextManager:
    """Where norms, SiLU and dropout are left out of a network."""
    return patch.object(unet, "norm_silu", lambda x, *_, **__: (x, x))


def rows(
    experiment: Experiment,
    rate: float,
    seconds: Sequence[float],
    piece: Callable[[], object],
    steps: int,
    device: torch.device,
    found: Mapping[str, Any],
) -> list[paired.Row]:
    """What a training step reaches of the device's peaks, its kernels, and what the loop adds to them.

    Args:
        experiment: whose.
        rate: of the network.
        seconds: of a step, as timed.
        piece: `steps` steps, once more, to be profiled.
        steps: in a piece.
        device: the GPU.
        found: its `peaks`.
    """
    name, batch = f"{paired.named(rate)} step", experiment.training.batch
    network = count(experiment.architecture, meta_tensors(experiment.architecture, rate))
    flop = operations(network.macs, batch) / found["flops"]["bf16"]
    size = moved(network.params, network.activations, batch, "bf16") / found["bytes"]
    ran = kernels(piece)
    bare = graph_seconds(experiment, rate, device)
    products = (
        f"of {found['flops']['bf16'] / 1e12:.0f} TFLOP/s, a large product's; backward twice the forward pass"
    )
    copies = f"of {found['bytes'] / 1e12:.2f} TB/s, a large copy's; what must be moved"
    busy, apart = [100 * busy_share(ran)], [100 * (s / bare - 1) for s in seconds]
    alone = f"{1e3 * bare:.4g} ms: graph and update on inputs that lie ready"
    return [
        paired.row(f"{name}: GPU busy", busy, "%", goal="≥ 90", note="kernels, by the profiler"),
        paired.row(f"{name}: kernels", [len(ran) / steps], "", note="of a step, update included"),
        paired.row(f"{name}: share of the bf16 peak", [100 * flop / s for s in seconds], "%", note=products),
        paired.row(f"{name}: share of the bandwidth", [100 * size / s for s in seconds], "%", note=copies),
        paired.row(f"{name}: the loop around it", apart, "%", goal="≤ 5", note=alone),
    ]


def graph_seconds(experiment: Experiment, rate: float, device: torch.device, steps: int = 50) -> float:
    """Seconds of a step whose inputs lie ready: its graph and the update."""
    runtime = Runtime(device, GPU)
    job, state = timing_job(experiment, runtime), State.start(network_of(experiment, rate), runtime)
    learn = learner(state, job)
    train(state, job, 10, save=lambda s: None, learn=learn)
    ((graph, *_),) = learn.graphs.values()

    def step() -> None:
        state.begin_step()
        graph.replay()
        state.clip(job.training.clip)
        state.descend(job.training)
        state.update_average(job.training)

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / steps
