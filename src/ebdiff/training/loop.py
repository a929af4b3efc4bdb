"""The training loop of dense networks and experts: one function, top to bottom."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from ebdiff.data.dataset import Cond, Dataset
from ebdiff.diffusion.process import Process
from ebdiff.diffusion.timesteps import TimestepLaw
from ebdiff.experiment.schema import Training
from ebdiff.nets.execution import Runtime
from ebdiff.nets.memory import enough
from ebdiff.system import interrupts, parallel
from ebdiff.system.devices import device_name, shared_by
from ebdiff.system.draws import generator
from ebdiff.system.errors import UserError
from ebdiff.system.progress import progress
from ebdiff.training.batches import Draws
from ebdiff.training.hooks import Hook
from ebdiff.training.state import State, check_finite

AGREE = 10  # steps between two questions whether a signal came to any of several processes


@dataclass(frozen=True)
class Job:
    """What is trained: fixed from the first step to the last.

    Attributes:
        name: the stream of its randomness, such as ``dense/full``; also shown in progress lines.
        seed: the experiment's seed.
        dataset: the training set.
        law: draws (t, weight) for a batch.
        process: noising and loss.
        training: batch, rates, decay.
        runtime: device, precision, micro-batch.
        stats: where a line per reading goes (JSON lines); None trains silently (timing).
    """

    name: str
    seed: int
    dataset: Dataset
    law: TimestepLaw
    process: Process
    training: Training
    runtime: Runtime
    stats: Path | None = None


def learner(state: State, job: Job) -> Callable[..., Tensor]:
    """A function that adds a part of the batch to `state.grad` and gives its part of the loss.

    The loss is the process's, weighted, and averaged over the batch (DDPM Eq. 14). On a GPU noising, forward
    and backward pass become one graph; what follows them are a dozen kernels.
    """
    batch, process, runtime, network = job.training.batch, job.process, job.runtime, state.network

    def learn(x0: Tensor, cond: Cond, t: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
        state.forget()
        with runtime.autocast():
            predicted = network(process.noised(x0, t, eps), t, cond)
        loss = (process.loss(predicted, eps, cond.mask) * weight).sum() / batch
        loss.backward()
        state.gather()
        return loss.detach()

    return runtime.captured(learn)


def train(
    state: State,
    job: Job,
    until: int,
    *,
    hooks: Sequence[Hook] = (),
    save: Callable[[State], None],
    learn: Callable[..., Tensor] | None = None,
) -> None:
    """Train in place up to step `until`, or until a hook says that it is over.

    Every draw is a function of (seed, stream, step): going on from any saved state gives the same bits as
    never having stopped, on a GPU under `compute.deterministic`. Several processes (`torchrun`) and
    micro-batches share the global batch; without dropout they change its gradient by rounding only.

    Args:
        state: where training stands; updated in place.
        job: what is trained.
        until: step to stop at.
        hooks: what looks in on the way.
        save: keeps a resumable state; called every `training.save_minutes` and when a signal ends the job.
        learn: the state's `learner`, where it is called several times.

    Raises:
        UserError: the loss is no number, memory ran out, or there are more processes than images.
        Interrupted: SIGTERM or SIGINT came; the state was kept first.
    """
    cfg, runtime, network = job.training, job.runtime, state.network.train()
    device, random = runtime.device, _draws_at_random(network)
    agree = 1 if parallel.world() == 1 else AGREE
    draws = Draws(job.dataset, job.law, cfg.batch, job.seed, job.name, device, cfg.label_dropout)
    runtime.set_arithmetic()
    learn = learn or learner(state, job)
    state.hooks = hooks
    for hook in hooks:
        hook.begin(state)

    started = datetime.now(UTC).isoformat(timespec="seconds")
    where = {"device": device_name(device), "world": parallel.world(), "share": shared_by()}
    process = {"started": started, **where, "execution": runtime.told(), "steps": 0, "seconds": 0.0}
    state.processes.append(process)
    began = saved = time.perf_counter()
    silent = job.stats is None or not parallel.first()
    bar = progress(initial=state.step, total=until, desc=job.name, unit="step", disable=silent)

    if parallel.world() > cfg.batch:
        raise UserError(f"training.batch: {cfg.batch} images can't be shared by {parallel.world()} processes")
    share = parallel.share(cfg.batch)
    fits = nullcontext() if job.stats is None else enough(network, share.stop - share.start, runtime)

    with open(os.devnull if silent else job.stats, "a") as stats, bar, fits, interrupts.noted() as signalled:
        for batch in draws.batches(range(state.step, until)):
            step, loss = state.step, torch.zeros((), device=device)
            state.begin_step()
            for i, part in enumerate(batch.parts(runtime.micro_batch)):
                if random:
                    rng = generator(job.seed, f"{job.name}/dropout", step, parallel.rank(), i)
                    torch.manual_seed(int(rng.integers(2**63)))
                loss += learn(*part)
            parallel.summed(state.grad)

            for hook in hooks:
                hook.graded(state)
            replaced = [hook.update(state) for hook in hooks if hook.due(step)]
            if not any(replaced):
                if cfg.clip is not None:
                    state.clip(cfg.clip)
                state.descend(cfg, epoch=step * cfg.batch // len(job.dataset))
            state.update_average(cfg)
            for hook in hooks:
                hook.stepped(state)
            state.step += 1
            bar.update()

            process["steps"] += 1
            reading = state.step % cfg.log_every == 0 or state.step == until
            if reading:
                value = parallel.summed(loss).item()  # waits for the device
                check_finite(value, step, job.name)
                bar.set_postfix_str(f"loss {value:.4g}", refresh=False)
            process["seconds"] = time.perf_counter() - began
            if reading:
                line = {"step": state.step, "loss": value, "seconds": round(state.seconds, 3)}
                stats.write(json.dumps(line) + "\n")
                stats.flush()
            over = [hook.interval(state) for hook in hooks if hook.every and state.step % hook.every == 0]
            if any(over):
                break
            # Several processes must stop at the same step.
            if state.step % agree == 0 and parallel.any_of(signalled() is not None, device):
                save(state)
                parallel.barrier()  # torchrun kills the first process soon after another one has ended
                raise interrupts.Interrupted(
                    signalled() or interrupts.SIGNALS[0],
                    f"{job.name}: step {state.step} of {until} is saved; the same command goes on from it",
                )
            if time.perf_counter() - saved > 60 * cfg.save_minutes:
                save(state)
                saved = time.perf_counter()


def _draws_at_random(network: nn.Module) -> bool:
    """Whether a network in training draws from torch's generator: dropout, or that of a GRU or attention."""
    rates = (vars(module).get(key, 0) for module in network.modules() for key in ("p", "dropout"))
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)
