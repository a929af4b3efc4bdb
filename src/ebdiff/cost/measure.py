"""What networks cost: sizes, and measured and least time per training step (verb `measure-cost`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ebdiff.cost.accounting import training_flops
from ebdiff.cost.roofline import bounded
from ebdiff.data.dataset import Batch, Dataset
from ebdiff.diffusion.process import Process
from ebdiff.diffusion.timesteps import Antithetic
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.members import Items
from ebdiff.experiment.records import Work
from ebdiff.experiment.runs import Expert
from ebdiff.experiment.schema import Execution
from ebdiff.experiment.sparsity import METHODS, Sparse
from ebdiff.nets import store
from ebdiff.nets.denoiser import Denoiser, blank_inputs
from ebdiff.nets.execution import Runtime
from ebdiff.pruning.count import COUNTER, count, meta_tensors, weight_macs
from ebdiff.pruning.graph import trace
from ebdiff.pruning.select import realised_rate, select_random
from ebdiff.system.files import write_json
from ebdiff.system.ledger import ledger
from ebdiff.system.progress import progress
from ebdiff.training.loop import Job, learner, train
from ebdiff.training.state import State

# Calls before timing, and interleaved rounds of one call per subject: on a GPU of `steps_at_once`, which
# scatter little.
WARMUP, ROUNDS = 2, {"cpu": 11, "cuda": 5}

Key = TypeVar("Key")


def measure_cost(experiment: Experiment, device: torch.device) -> dict[str, Any]:
    """Time one training step of the dense network and of every asked rate, and count both.

    The networks take turns step by step, so that a slow moment of the machine hits all of them
    alike; medians are reported. Timed is the real training loop on items of the right shape, each
    network executed as it will be: nothing else may run on the machine.
    """
    work, networks = Work(experiment, "measure-cost"), counts(experiment)
    sparse = sparse_counts(experiment, networks)
    timed = {name: (name, rate, None) for name, rate in rates(experiment).items()}
    for x in experiment.sparse().values():
        timed.setdefault(timed_as(x), (x.network, x.rate or 0, x.sparse))
    steps = {}
    for name, (network, rate, masks) in timed.items():
        runtime = Runtime.of(experiment, "training", network, device)
        steps[name] = training_step(experiment, network_of(experiment, rate), runtime, masks)

    began = time.perf_counter()
    times = {}
    for name, seconds in interleaved(steps, ROUNDS[device.type]).items():
        low, middle, high = np.percentile(seconds, [25, 50, 75]) * 1e3 / steps_at_once(device)
        times[name] = {"step_ms": round(middle, 3), "spread_ms": round(high - low, 3)}
    steps.clear()  # their memory goes to the peaks
    for name, network in networks.items():
        network |= times[name]
    for name, x in experiment.sparse().items():
        sparse[name] |= times[timed_as(x)]
    result = {
        "experiment": experiment.name,
        "batch": experiment.training.batch,
        "counter": COUNTER,
        "peaks": bound(experiment, networks, device),
        "networks": networks,
        **({"sparse": sparse} if sparse else {}),
        **ledger(device, seconds=round(time.perf_counter() - began, 3)),
    }
    write_json(work.path(layout.COST), result)
    work.end()
    return result


def rates(experiment: Experiment) -> dict[str, float]:
    """The networks of an experiment by name, with their asked rates: `dense`, then every rate."""
    return {"dense": 0.0, **{str(rate): rate for rate in experiment.rates()}}


def counts(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Asked and realised rate, parameters, MACs and activations of every network, by name."""
    architecture, found = experiment.architecture, {}
    groups = trace(architecture)
    for name, rate in rates(experiment).items():
        counted = count(architecture, meta_tensors(architecture, rate))
        realised = realised_rate(select_random(groups, np.random.default_rng(0), rate))
        found[name] = {"rate": rate, "realised": realised, **counted._asdict()}
    return found


def sparse_counts(
    experiment: Experiment, networks: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What networks trained sparse hold and compute, by `Expert.costs`: zeros count for nothing.

    Args:
        experiment: whose.
        networks: from `counts`.

    Raises:
        UserError: a sparsity leaves nothing of a layer.
    """
    built, found = dict[str, tuple[Denoiser, dict[str, int]]](), {}
    for name, x in experiment.sparse().items():
        if x.network not in built:
            network = network_of(experiment, x.rate or 0)
            built[x.network] = network, weight_macs(network)
        network, applied = built[x.network]
        dense = networks[x.network]
        macs, params = dense["macs"], dense["params"]
        for weight, kept in METHODS.member(x.sparse.method).nonzeros(x.sparse, network).items():
            size = network.get_parameter(weight).numel()
            params -= size - kept
            macs -= applied[weight] * (size - kept) // size
        flops = training_flops(2 * macs, 2 * dense["macs"], x.sparse.dense_gradients)
        told = {"network": x.network, "method": x.sparse.method, "sparsity": x.sparse.zeros}
        counted = {"params": params, "macs": macs, "training_flops": flops}
        found[name] = {**told, "rate": dense["rate"], "realised": dense["realised"], **counted}
    return found


def timed_as(expert: Expert) -> tuple[str, str]:
    """What the time of a sparse step depends on: not on how many weights are masked; updates are rare."""
    return expert.network, expert.sparse.method


def bound(
    experiment: Experiment, networks: Mapping[str, dict[str, Any]], device: torch.device
) -> dict[str, Any]:
    """Add to every network what its training step takes at least on this device; give the device's peaks."""
    executed = {name: Runtime.of(experiment, "training", name, device).how.precision for name in networks}
    found = peaks(device, set(executed.values()))
    for name, network in networks.items():
        network |= bounded(network, experiment.training.batch, executed[name], found)
    return found


def peaks(device: torch.device, precisions: Iterable[str]) -> dict[str, Any]:
    """The best that a device reaches, with this job's threads.

    Returns:
        `flops`: FLOP/s of a large matrix product, by precision; `bytes`: bytes/s that a large copy reads
        and writes.
    """
    gpu = device.type == "cuda"
    side, length = (8192, 2**28) if gpu else (1024, 2**24)
    wait = torch.cuda.synchronize if gpu else lambda: None
    source = torch.ones(length, device=device)  # not zeros: pages never written are all the same one
    target = torch.empty_like(source)

    def product(precision: str) -> Callable[[], object]:
        kind = torch.bfloat16 if precision == "bf16" else torch.float32
        a = torch.randn(side, side, device=device).to(kind)  # zeros would need less power and clock higher
        out, runtime = torch.empty_like(a), Runtime(device, Execution(precision=precision))
        return lambda: (runtime.set_arithmetic(), torch.mm(a, a, out=out), wait())

    work = {precision: product(precision) for precision in sorted(precisions)}
    work["copy"] = lambda: (target.copy_(source), wait())
    best = {name: min(seconds) for name, seconds in interleaved(work, rounds=5).items()}
    moved = 2 * source.nbytes / best.pop("copy")
    return {"flops": {k: round(2 * side**3 / s) for k, s in best.items()}, "bytes": round(moved)}


def network_of(experiment: Experiment, rate: float) -> Denoiser:
    """A network of a rate's widths with fresh weights: what it computes costs the same as a ticket's."""
    architecture = experiment.architecture
    return store.fresh(architecture, 0, "cost", meta_tensors(architecture, rate))


def interleaved(
    work: Mapping[Key, Callable[[], object]], rounds: int, warmup: int = WARMUP, settle: int = 0
) -> dict[Key, list[float]]:
    """Seconds of each piece of work, one entry per round; the pieces take turns.

    Each is called `warmup` times before: allocators and kernels settle. Where pieces are large
    each finds the last one's memory at its turn; `settle` untimed calls then make it as in a row of its own.
    """
    for piece in work.values():
        for _ in range(warmup):
            piece()
    seconds: dict[Key, list[float]] = {name: [] for name in work}
    for _ in progress(range(rounds), desc="timing", unit="round"):
        for name, piece in work.items():
            for _ in range(settle):
                piece()
            began = time.perf_counter()
            piece()
            seconds[name].append(time.perf_counter() - began)
    return seconds


@dataclass(frozen=True)
class Blanks(Dataset):
    """Items that are all zero, of full length and of the first class: a step on them costs what any costs."""

    items: Items

    def __len__(self) -> int:
        return 1

    def at(self, indices: np.ndarray) -> list[np.ndarray]:
        return [indices]

    def batch(self, arrays: Sequence[np.ndarray | Tensor], device: torch.device) -> Batch:
        x0, _, cond = blank_inputs(self.items, len(arrays[0]), device)
        return Batch(x0, cond)


def timing_job(experiment: Experiment, runtime: Runtime) -> Job:
    """The real training on blank items, silent."""
    return Job(
        name="cost",
        seed=0,
        dataset=Blanks(experiment.items),
        law=Antithetic(0, experiment.diffusion.timesteps),
        process=Process(experiment.diffusion),
        training=experiment.training.model_copy(update={"log_every": 10**9, "save_minutes": 1e9}),
        runtime=runtime,
    )


def steps_at_once(device: torch.device) -> int:
    """Training steps between two looks at the clock; on a GPU many, so that starting isn't timed too."""
    return 50 if device.type == "cuda" else 1


def training_step(
    experiment: Experiment, network: Denoiser, runtime: Runtime, sparse: Sparse | None = None
) -> Callable[[], None]:
    """A function that does `steps_at_once` steps of the real training loop and waits for their loss."""
    job, state = timing_job(experiment, runtime), State.start(network, runtime)
    steps, learn = steps_at_once(runtime.device), learner(state, job)
    hooks = [METHODS.member(sparse.method)(sparse, job)] if sparse else []
    for hook in hooks:
        hook.begin(state)
        hook.begin = lambda state: None  # which is timed with no step
    return lambda: train(state, job, state.step + steps, hooks=hooks, save=lambda s: None, learn=learn)
