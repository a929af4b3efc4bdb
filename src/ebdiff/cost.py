"""What networks cost: parameters, MACs and measured time per training step (verb `measure-cost`)."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from ebdiff import layout
from ebdiff.config import Experiment
from ebdiff.data.store import Images
from ebdiff.diffusion.schedule import alphas_bar
from ebdiff.diffusion.timesteps import Antithetic
from ebdiff.digests import cost_digest
from ebdiff.files import write_json
from ebdiff.ledger import ledger
from ebdiff.nets import store
from ebdiff.progress import progress
from ebdiff.pruning.count import COUNTER, count, meta_tensors
from ebdiff.pruning.graph import trace
from ebdiff.pruning.select import realised_rate, select_random
from ebdiff.training.loop import Job, train
from ebdiff.training.state import State

WARMUP, ROUNDS = 2, 11  # steps before timing, and interleaved rounds of one step per network


def measure_cost(experiment: Experiment, device: torch.device) -> dict[str, Any]:
    """Time one training step of the dense network and of every asked rate, and count both.

    The networks take turns step by step, so that a slow moment of the machine hits all of them
    alike; medians are reported. Timed is the real training loop on random images of the right
    size: nothing else may run on the machine.
    """
    config, groups = experiment.network, trace(experiment.network)
    networks, timed = {}, {}
    for name, rate in [("dense", 0.0), *((str(r), r) for r in experiment.rates())]:
        shapes = meta_tensors(config, rate)
        params, macs = count(config, shapes)
        mask = select_random(groups, np.random.default_rng(0), rate)
        networks[name] = {
            "rate": rate,
            "realised": realised_rate(mask),
            "params": params,
            "macs": macs,
        }
        network = store.build(config, {n: torch.empty(t.shape) for n, t in shapes.items()})
        store.initialise(network, 0, "cost")
        timed[name] = State.start(network, experiment.training, device)

    began = time.perf_counter()
    steps = _time_steps(experiment, timed, device)
    for name, seconds in steps.items():
        low, middle, high = np.percentile(seconds, [25, 50, 75]) * 1e3
        networks[name] |= {"step_ms": round(middle, 3), "spread_ms": round(high - low, 3)}
    result = {
        "experiment": experiment.name,
        "batch": experiment.training.batch,
        "counter": COUNTER,
        "networks": networks,
        **ledger(device, seconds=round(time.perf_counter() - began, 3)),
        "torch": torch.__version__,
        "digest": cost_digest(experiment),
    }
    write_json(layout.path(layout.COST, experiment=experiment.name), result)
    return result


def _time_steps(
    experiment: Experiment, states: dict[str, State], device: torch.device
) -> dict[str, list[float]]:
    """Seconds per training step of each network, one list entry per round."""
    network = experiment.network
    shape = (experiment.training.batch, network.image_size, network.image_size, network.channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    quiet = experiment.training.model_copy(update={"log_every": 10**9, "save_minutes": 1e9})
    job = Job(
        name="cost",
        seed=0,
        images=Images(pixels, flip=experiment.dataset.flip, sha256=""),
        law=Antithetic(0, experiment.diffusion.timesteps),
        abar=alphas_bar(experiment.diffusion),
        training=quiet,
    )

    def step(state: State) -> float:
        began = time.perf_counter()
        train(state, job, state.step + 1, save=lambda s: None)  # reads the loss: waits for the device
        return time.perf_counter() - began

    for state in states.values():
        for _ in range(WARMUP):
            step(state)
    seconds: dict[str, list[float]] = {name: [] for name in states}
    for _ in progress(range(ROUNDS), desc="timing", unit="round"):
        for name, state in states.items():
            seconds[name].append(step(state))
    return seconds
