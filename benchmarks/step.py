"""How fast is a training step of the CIFAR-10 network, dense and pruned, against a plain loop?

    python benchmarks/step.py             # batch 16 on a CPU, 128 on a GPU

The plain side is the eager fp32 loop with default Adam and an average parameter by parameter; ours is the
package's own loop, in the default execution and in the fastest of those `ebdiff tune` tries. The share
realised is the ratio of step times over the ratio of MACs, our loop on both sides, executed alike. On a GPU
the floor is the same step without norms, SiLU and dropout: convolutions, attention and what updates weights.
A training's steps follow its own: a step that follows another network's is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import accelerator
import paired
import plain
import torch

from ebdiff.cost.measure import interleaved, network_of, peaks, steps_at_once, timing_job, training_step
from ebdiff.cost.tune import words
from ebdiff.diffusion.process import Process
from ebdiff.diffusion.schedule import alphas_bar
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.schema import Execution
from ebdiff.nets.execution import GPU, Runtime
from ebdiff.nets.unet import UNet
from ebdiff.pruning.count import COUNTER, count, meta_tensors
from ebdiff.pruning.graph import trace
from ebdiff.pruning.importance import magnitude
from ebdiff.pruning.select import Selector
from ebdiff.tickets.watch import KINDS
from ebdiff.training.hooks import Hook
from ebdiff.training.loop import learner, train
from ebdiff.training.state import State

RATES = (0.0, 0.3, 0.5, 0.8)  # 0: dense
FLOORS = (0.0, 0.5, 0.8)
Key = tuple[float, Execution]


def plain_step(experiment: Experiment, network: UNet, device: torch.device, steps: int) -> Callable:
    """Some steps of the plain loop, on a batch that lies ready."""
    cfg = experiment.training
    model = plain.network(network).to(device)
    trainer = plain.Trainer(
        model, alphas_bar(experiment.diffusion), cfg.learning_rate, cfg.clip, cfg.ema_decay
    )
    x0 = 2 * torch.rand(cfg.batch, *experiment.dataset.items.shape) - 1
    return lambda: [trainer.step(x0) for _ in range(steps)]


class Masks(Hook):
    """The masks of a search, raw and averaged, after every step."""

    every = 1

    def __init__(self, experiment: Experiment, device: torch.device):
        rates = experiment.searches["iterwise"].rates
        self.selector = Selector(trace(experiment.architecture), rates, device)

    def interval(self, state: State) -> bool:
        for kind in KINDS:
            self.selector(magnitude(state.view(kind)))
        return False


def masked_steps(experiment: Experiment, runtime: Runtime, steps: int) -> Callable:
    """Some steps of our dense loop, each followed by masks."""
    job, hooks = timing_job(experiment, runtime), [Masks(experiment, runtime.device)]
    state = State.start(network_of(experiment, 0.0), runtime)
    learn = learner(state, job)
    return lambda: train(state, job, state.step + steps, hooks=hooks, save=lambda s: None, learn=learn)


def check(experiment: Experiment, network: UNet, device: torch.device) -> None:
    """Both networks predict the same, and both loops count the same loss."""
    torch.manual_seed(0)
    x, eps = torch.randn(2, 2, *experiment.dataset.items.shape, device=device)
    t = torch.tensor([3, 700], device=device)
    network = network.to(device).eval()
    theirs = plain.network(network)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, t), network(x, t), rtol=1e-4, atol=1e-4)
        process = Process(experiment.diffusion)
        loss = plain.Trainer(theirs, process.abar, 1e-4, 1.0, 0.999)
        theirs.eval()
        ours = process.loss(network(process.noised(x, t, eps), t), eps).mean()
        torch.testing.assert_close(loss.loss(x, t, eps), ours, rtol=1e-4, atol=1e-4)


def floor_step(experiment: Experiment, network: UNet, runtime: Runtime) -> Callable[[], None]:
    """Some steps of our loop on a network whose norms, SiLU and dropout are left out."""
    step = training_step(experiment, network, runtime)

    def bare() -> None:
        with accelerator.floor():
            step()

    return bare


def main(argv: Sequence[str] | None = None) -> None:
    args = paired.arguments(__doc__, argv, rounds=5)
    gpu = args.device.type == "cuda"
    experiment = paired.experiment(128 if gpu else 16, args.tiny)
    Runtime(args.device, Execution()).set_arithmetic()
    check(experiment, network_of(experiment, 0.5), args.device)
    hows = paired.executions(args.device)
    first = Runtime(args.device, hows[0])
    work: dict[Key | str, Callable] = {}
    rows = (
        accelerator.memory(lambda: training_step(experiment, network_of(experiment, 0.0), first)())
        if gpu
        else []
    )
    steps = dict.fromkeys([(rate, how) for how in hows for rate in RATES], steps_at_once(args.device))
    for rate, how in steps:
        work[rate, how] = training_step(experiment, network_of(experiment, rate), Runtime(args.device, how))
    if gpu:
        for rate in FLOORS:
            work[f"floor {rate}"] = floor_step(experiment, network_of(experiment, rate), first)
    work["masked"] = masked_steps(experiment, first, steps_at_once(args.device))
    steps["plain"] = 10 if gpu else 1
    work["plain"] = plain_step(experiment, network_of(experiment, 0.0), args.device, steps["plain"])
    calls = interleaved(work, args.rounds, settle=0 if gpu else 1)  # a GPU's memory lies as it lay
    s = {name: [x / steps.get(name, steps_at_once(args.device)) for x in calls[name]] for name in work}

    rows += speeds(s, hows) + shares(experiment, s, hows) + masks(s, (0.0, hows[0]))
    if gpu:
        rows += floors(s, hows[0])
        found = peaks(args.device, ["bf16"])
        for rate in FLOORS:
            at_once = steps[rate, hows[0]]
            rows += accelerator.rows(
                experiment, rate, s[rate, hows[0]], work[rate, hows[0]], at_once, args.device, found
            )
    paired.write("step", rows, args.device, args.out)


def fastest(s: dict, hows: Sequence[Execution], rate: float) -> Execution:
    """The execution of a network with the smallest median."""
    return min(hows, key=lambda how: median(s[rate, how]))


def speeds(s: dict, hows: Sequence[Execution]) -> list[paired.Row]:
    """Dense and pruned steps against the plain dense one, default and fastest execution."""
    goals = {0.0: "≥ 3.1", 0.5: "≥ 5.6", 0.8: "≥ 8"} if hows[0] is GPU else {0.0: "≥ 1.8", 0.5: "≥ 4.5"}
    rows = []
    for rate, goal in goals.items():
        best = fastest(s, hows, rate)
        for how in dict.fromkeys([hows[0], best]):
            measure, hoped = f"{paired.named(rate)} step, {words(how)}", goal if how == best else ""
            rows.append(paired.compare(measure, "plain dense loop", hoped, s["plain"], s[rate, how]))
    return rows


def floors(s: dict, how: Execution) -> list[paired.Row]:
    """How much of every step its floor is."""
    rows = []
    for rate in FLOORS:
        floor, step = s[f"floor {rate}"], s[rate, how]
        values = [100 * a / b for a, b in zip(floor, step, strict=True)]
        note = f"{paired.milliseconds(floor)} of {paired.milliseconds(step)}"
        rows.append(paired.row(f"{paired.named(rate)} step: share of its floor", values, "%", note=note))
    return rows


def shares(experiment: Experiment, s: dict, hows: Sequence[Execution]) -> list[paired.Row]:
    """How much of the MACs ratio the step times realise, per rate and execution.

    The goal is for 50 %, in the default execution and in the one in which the dense network is fastest.
    """
    ours = experiment.architecture
    macs = {rate: count(ours, meta_tensors(ours, rate))[1] for rate in RATES}
    rows = []
    for rate in RATES[1:]:
        for how in hows:
            ratio = macs[0.0] / macs[rate]
            values = [dense / pruned / ratio for dense, pruned in zip(s[0.0, how], s[rate, how], strict=True)]
            hoped = rate == 0.5 and how in (hows[0], fastest(s, hows, 0.0))
            goal = "≥ 0.9" if hoped and hows[0] is not GPU else ""  # a GPU is bound by bytes there
            times = f"{paired.milliseconds(s[0.0, how])} against {paired.milliseconds(s[rate, how])}"
            rows.append(
                paired.row(
                    f"share of the MACs ratio at {rate}, {words(how)}", values, "",
                    against=f"MACs ratio {ratio:.2f} ({COUNTER})", goal=goal, note=times,
                )
            )  # fmt: skip
    return rows


def masks(s: dict, dense: Key) -> list[paired.Row]:
    """What masks after every step cost, as a share of the step."""
    shares = [100 * (m / d - 1) for m, d in zip(s["masked"], s[dense], strict=True)]
    note = f"raw and averaged weights, two rates; {paired.milliseconds(s['masked'])} with masks"
    return [paired.row("masks after every step", shares, "%", against="the dense step", note=note)]


if __name__ == "__main__":
    main()
