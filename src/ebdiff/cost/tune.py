"""Which execution of each network is fastest on this device (verb `tune`)."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
import yaml

from ebdiff.cost.measure import interleaved, network_of, rates, training_step
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.schema import Execution, Tuning
from ebdiff.nets.denoiser import Denoiser
from ebdiff.nets.execution import EAGER, Runtime
from ebdiff.system.devices import device_name
from ebdiff.system.errors import UserError, first_line
from ebdiff.system.files import write_text

ROUNDS = 5
WORTH = 1.03  # a plainer candidate is kept unless another is this many times as fast


def candidates() -> list[Execution]:
    """What is tried, plain ones first."""
    return [
        Execution(precision=precision, channels_last=last)
        for precision in ("fp32", "bf16")
        for last in (False, True)
    ]


def tune(experiment: Experiment, device: torch.device) -> Tuning:
    """Time every candidate on every network, training and sampling, and write the fastest down.

    The file is configuration from then on: results depend on it, never on a later timing. Nothing
    else may run on the machine. A candidate that can't run is left out, with a word.

    Raises:
        UserError: the device is a GPU, where one execution is the fastest; or no candidate of a network runs.
    """
    if device.type == "cuda":
        raise UserError(f"{experiment.name}: nothing to tune on a GPU, which computes in bf16 and in graphs")
    chosen: dict[str, dict[str, Execution]] = {}
    told = []
    for use, piece in (("training", training_step), ("sampling", sampling_step)):
        for name, rate in rates(experiment).items():
            print(f"{use}, {name}", flush=True)
            work = {}
            for how in candidates():
                runtime = Runtime(device, how, experiment.compute.micro_batch)
                try:
                    candidate = piece(experiment, network_of(experiment, rate), runtime)
                    candidate()
                    work[how] = candidate
                except (MemoryError, RuntimeError) as error:  # of memory that ran out
                    print(f"{words(how)}: left out ({first_line(error)})", flush=True)
            if not work:
                raise UserError(f"{experiment.name}: no {use} step of {name} runs on {device_name(device)}")
            times = {how: median(seconds) for how, seconds in interleaved(work, ROUNDS).items()}
            work.clear()
            best = next(how for how in times if times[how] <= WORTH * min(times.values()))
            chosen.setdefault(use, {})[name] = best
            told.append(
                f"{use} {name}: " + ", ".join(f"{words(h)} {t * 1e3:.1f} ms" for h, t in times.items())
            )
    tuning = Tuning(device=device_name(device), **chosen)
    head = f"Written by `ebdiff tune {experiment.name}`; results depend on it. Delete it for the defaults."
    text = "".join(f"# {line}\n" for line in [head, *told])
    text += yaml.safe_dump(tuning.model_dump(mode="json"), sort_keys=False, default_flow_style=None)
    write_text(layout.path(layout.TUNING, experiment=experiment.name), text)
    return tuning


def words(how: Execution) -> str:
    """`bf16 channels_last`, as far as it holds."""
    return f"{how.precision} channels_last" if how.channels_last else how.precision


def sampling_step(experiment: Experiment, network: Denoiser, runtime: Runtime) -> Callable[[], None]:
    """A function that predicts one sampling batch and waits for it."""
    denoiser = runtime.denoiser(network)
    x, t, cond = network.example(experiment.sampling.batch)

    @torch.inference_mode()
    def predict() -> None:
        denoiser(x, t, cond)[(0,) * x.dim()].item()  # waits for the device

    for _ in range(EAGER if runtime.captures else 0):
        predict()
    return predict
