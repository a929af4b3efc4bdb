"""The training loop of dense networks and experts: one function, top to bottom."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from ebdiff.config import Training
from ebdiff.data.store import Images
from ebdiff.diffusion.timesteps import TimestepLaw
from ebdiff.draws import generator
from ebdiff.progress import progress
from ebdiff.training.state import State, check_finite


@dataclass(frozen=True)
class Job:
    """What is trained: fixed from the first step to the last.

    Attributes:
        name: the stream of its randomness, such as ``dense/full``; also shown in progress lines.
        seed: the experiment's seed.
        images: the training set.
        law: draws (t, weight) for a batch.
        abar: cumulative alphas, (T,).
        training: batch, rates, decay.
        stats: where a line per reading goes (JSON lines); None trains silently (timing).
    """

    name: str
    seed: int
    images: Images
    law: TimestepLaw
    abar: np.ndarray
    training: Training
    stats: Path | None = None


def train(
    state: State,
    job: Job,
    until: int,
    *,
    interval: int | None = None,
    at_interval: Callable[[State], bool] = lambda state: False,
    save: Callable[[State], None],
) -> None:
    """Train in place up to step `until`, or until `at_interval` asks to stop.

    The loss is eps-MSE, summed over pixels and channels, weighted, and averaged over the batch
    (DDPM Eq. 14). Every draw is a function of (seed, stream, step): going on from any saved state
    gives the same bits as never having stopped.

    Args:
        state: where training stands; updated in place.
        job: what is trained.
        until: step to stop at.
        interval: steps between calls of `at_interval`.
        at_interval: called after each full interval; True ends training.
        save: keeps a resumable state; called every `training.save_minutes`.

    Raises:
        UserError: the loss is no number.
    """
    cfg, network = job.training, state.network.train()
    device = next(network.parameters()).device
    parameters = list(network.parameters())
    level = torch.from_numpy(np.sqrt([job.abar, 1 - job.abar])).to(device, torch.float32)
    process = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "steps": 0, "seconds": 0.0}
    state.processes.append(process)
    began = saved = time.perf_counter()
    silent = job.stats is None
    bar = progress(initial=state.step, total=until, desc=job.name, unit="step", disable=silent)

    with open(os.devnull if silent else job.stats, "a") as stats, bar:
        while state.step < until:
            step = state.step
            x0 = job.images.batch(cfg.batch, job.seed, job.name, step).to(device)
            t, weight = job.law.draw(generator(job.seed, f"{job.name}/timestep", step), cfg.batch)
            noise = generator(job.seed, f"{job.name}/noise", step).standard_normal(x0.shape, np.float32)
            eps = torch.from_numpy(noise).to(device)
            t = torch.from_numpy(t).to(device)

            signal, sigma = level[:, t, None, None, None]
            if network.config.dropout:
                torch.manual_seed(int(generator(job.seed, f"{job.name}/dropout", step).integers(2**63)))
            predicted = network(signal * x0 + sigma * eps, t)
            squares = (predicted - eps).square().sum(dim=(1, 2, 3))
            loss = (squares * torch.from_numpy(weight).to(device)).mean()

            state.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if cfg.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, cfg.clip, foreach=True)
            for group in state.optimizer.param_groups:
                group["lr"] = cfg.learning_rate * min(1.0, (step + 1) / max(1, cfg.warmup))
            state.optimizer.step()
            state.update_average(cfg)
            state.step += 1
            bar.update()

            process["steps"] += 1
            process["seconds"] = time.perf_counter() - began
            if state.step % cfg.log_every == 0 or state.step == until:
                check_finite(loss.item(), step, job.name)  # the only wait for the device
                line = {"step": state.step, "loss": loss.item(), "seconds": round(state.seconds, 3)}
                stats.write(json.dumps(line) + "\n")
                stats.flush()
            if interval and state.step % interval == 0 and at_interval(state):
                break
            if time.perf_counter() - saved > 60 * cfg.save_minutes:
                save(state)
                saved = time.perf_counter()
