"""How fast is a training step of the CIFAR-10 network, dense and pruned, against a plain loop?

    python benchmarks/step.py             # batch 16 on a CPU, 128 on a GPU

The plain side is the eager fp32 loop with default Adam and an average parameter by parameter; ours is the
package's own loop, in the default execution and in the fastest of those `ebdiff tune` tries. The share
realised is the ratio of step times over the ratio of MACs, our loop on both sides, executed alike. A
training's steps follow its own: a step that follows another network's is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import accelerator
import paired
import plain
import torch

from ebdiff.cost.measure import interleaved, network_of, steps_at_once, timing_job, training_step
from ebdiff.cost.roofline import operations
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
from ebdiff.training.loop import train
from ebdiff.training.state import State

RATES = (0.0, 0.3, 0.5, 0.8)  # 0: dense
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
    return lambda: train(state, job, state.step + steps, hooks=hooks, save=lambda s: None)


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


def main(argv: Sequence[str] | None = None) -> None:
    args = paired.arguments(__doc__, argv, rounds=5)
    gpu = args.device.type == "cuda"
    steps = steps_at_once(args.device)
    experiment = paired.experiment(128 if gpu else 16, args.tiny)
    Runtime(args.device, Execution()).set_arithmetic()
    check(experiment, network_of(experiment, 0.5), args.device)
    hows = paired.executions(args.device)
    work: dict[Key | str, Callable] = {
        "plain": plain_step(experiment, network_of(experiment, 0.0), args.device, steps),
        "masked": masked_steps(experiment, Runtime(args.device, hows[0]), steps),
    }
    for how in hows:
        for rate in RATES:
            network = network_of(experiment, rate)
            work[rate, how] = training_step(experiment, network, Runtime(args.device, how))
    s = interleaved(work, args.rounds, settle=1)
    rows = speeds(s, hows) + shares(experiment, s, hows)
    rows += masks(s, (0.0, hows[0]), steps)
    if gpu:
        macs = count(experiment.architecture, meta_tensors(experiment.architecture, 0.0))[1]
        work_done = operations(macs, experiment.training.batch) * steps
        for how in hows[:2]:
            name = f"dense step, {words(how)}"
            rows += accelerator.rows(name, work_done, s[0.0, how], work[0.0, how], args.device)
    paired.write("step", rows, args.device, args.out)


def fastest(s: dict, hows: Sequence[Execution], rate: float) -> Execution:
    """The execution of a network with the smallest median."""
    return min(hows, key=lambda how: median(s[rate, how]))


def speeds(s: dict, hows: Sequence[Execution]) -> list[paired.Row]:
    """Dense and 50 % steps against the plain dense one, default and fastest execution."""
    gpu = hows[0] is GPU
    rows = []
    for rate, name, goal in (
        (0.0, "dense", "≥ 3" if gpu else "≥ 1.8"),
        (0.5, "50 %", "" if gpu else "≥ 4.5"),
    ):
        best = fastest(s, hows, rate)
        for how in dict.fromkeys([hows[0], best]):
            measure, hoped = f"{name} step, {words(how)}", goal if how == best else ""
            rows.append(paired.compare(measure, "plain dense loop", hoped, s["plain"], s[rate, how]))
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
            goal = ("≥ 0.8" if hows[0] is GPU else "≥ 0.9") if hoped else ""
            times = f"{paired.milliseconds(s[0.0, how])} against {paired.milliseconds(s[rate, how])}"
            rows.append(
                paired.row(
                    f"share of the MACs ratio at {rate}, {words(how)}", values, "",
                    against=f"MACs ratio {ratio:.2f} ({COUNTER})", goal=goal, note=times,
                )
            )  # fmt: skip
    return rows


def masks(s: dict, dense: Key, steps: int) -> list[paired.Row]:
    """What masks after every step cost, as a share of the step."""
    shares = [100 * (m / d - 1) for m, d in zip(s["masked"], s[dense], strict=True)]
    note = f"raw and averaged weights, two rates; {milliseconds_each(s['masked'], steps)} with masks"
    goal = "< 10" if dense[1] is GPU else ""
    return [paired.row("masks after every step", shares, "%", against="the dense step", goal=goal, note=note)]


def milliseconds_each(seconds: Sequence[float], steps: int) -> str:
    """The median time of one step, in words."""
    return paired.milliseconds([x / steps for x in seconds])


if __name__ == "__main__":
    main()
