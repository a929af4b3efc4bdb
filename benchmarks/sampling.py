"""How fast does the 50 % network draw images, against a plain sampler?

    python benchmarks/sampling.py         # batch 16 on a CPU, 500 on a GPU

100 quadratic DDIM steps. The plain sampler keeps every x_t in a list, evaluates repeated timesteps and
computes in fp32; ours is `ebdiff sample`'s, in the default execution and in those `ebdiff tune` tries.
In fp32 both draw the same images. On a GPU other widths draw too, each against its floor: the same without
norms and SiLU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median

import accelerator
import numpy as np
import paired
import plain
import torch

from ebdiff.cost.measure import interleaved, network_of
from ebdiff.cost.tune import words
from ebdiff.data.dataset import to_uint8
from ebdiff.diffusion.ensemble import generate
from ebdiff.diffusion.sampling import Router, ddim
from ebdiff.diffusion.schedule import alphas_bar
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.schema import Execution
from ebdiff.nets.execution import GPU, Runtime
from ebdiff.system.draws import item_noise

IMAGES = {0.0: "≥ 200", 0.5: "≥ 400", 0.8: "≥ 700"}  # rates, and images per second hoped for on an H100
CLOSE = 1e-3  # relative difference that 100 steps of fp32 rounding may make


def main(argv: Sequence[str] | None = None) -> None:
    args = paired.arguments(__doc__, argv, rounds=3)
    gpu = args.device.type == "cuda"
    batch = 2 if args.tiny else 500 if gpu else 16
    experiment = paired.experiment(batch, args.tiny)
    abar = alphas_bar(experiment.diffusion)
    steps = plain.quad_steps(experiment.diffusion.timesteps, experiment.sampling.steps)
    span, indices = (0, experiment.diffusion.timesteps), list(range(batch))
    network = network_of(experiment, 0.5).eval()
    model = plain.network(network).to(args.device)

    # Settings are tried on copies: a bf16 denoiser rounds its weights.
    hows = list(dict.fromkeys([*paired.executions(args.device), Execution()]))
    runtimes = {how: Runtime(args.device, how) for how in hows}
    routers = {
        how: Router([span], [runtime.denoiser(network_of(experiment, 0.5))])
        for how, runtime in runtimes.items()
    }

    def x_last() -> torch.Tensor:
        shape = experiment.dataset.items.shape
        return torch.from_numpy(item_noise(0, indices, experiment.diffusion.timesteps, shape)).to(args.device)

    def draw_plainly() -> np.ndarray:
        plain.torch_defaults()
        return to_uint8(plain.sample(model, x_last(), steps, abar))

    def draw(how: Execution) -> np.ndarray:
        return to_uint8(generate(experiment, routers[how], indices, 0, args.device))

    runtimes[Execution()].set_arithmetic()
    theirs, distinct = plain.sample(model, x_last(), steps, abar), sorted(set(steps))
    apart = {}
    for how, router in routers.items():
        with torch.inference_mode():
            ours = ddim(router, x_last(), distinct, abar, lambda t: None, clamp=False).cpu()
        apart[how] = float((ours - theirs).norm() / theirs.norm())
    assert apart[Execution()] < CLOSE, f"fp32 samples differ by {apart[Execution()]}"

    work = {how: partial(draw, how) for how in hows}
    if gpu:
        work |= widths(experiment, indices, args.device)
    s = interleaved({"plain": draw_plainly, **work}, args.rounds, warmup=1)
    best = min(hows, key=lambda how: median(s[how]))
    rows = []
    for how in dict.fromkeys([hows[0], best]):
        per_second = batch / median(s[how])
        note = f"{per_second:.3g} images per second; relative difference {apart[how]:.0e} (random weights)"
        goal = ("≥ 4" if gpu else "≥ 1.7") if how == best else ""
        measure = f"sampling, 50 %, {experiment.sampling.steps} steps, batch {batch}, {words(how)}"
        rows.append(paired.compare(measure, "plain sampler", goal, s["plain"], s[how], note))
    for rate, goal in IMAGES.items() if gpu else ():
        ours, floor = s[rate, "ours"], s[rate, "floor"]
        name = f"sampling, {100 * rate:.0f} %, batch {batch}"
        rows.append(paired.row(f"{name}: images per second", [batch / x for x in ours], "", goal=goal))
        shares = [100 * a / b for a, b in zip(floor, ours, strict=True)]
        note = f"{paired.milliseconds(floor)} of {paired.milliseconds(ours)}"
        rows.append(paired.row(f"{name}: share of its floor", shares, "%", goal="≥ 75", note=note))
    paired.write("sampling", rows, args.device, args.out)


def widths(
    experiment: Experiment, indices: list[int], device: torch.device
) -> dict[tuple[float, str], Callable[[], object]]:
    """Drawing by networks of several widths, in full and without norms and SiLU."""

    def draw(router: Router, within: Callable[[], AbstractContextManager]) -> np.ndarray:
        with within():
            return to_uint8(generate(experiment, router, indices, 0, device))

    found = {}
    for rate in IMAGES:
        for name, within in (("ours", nullcontext), ("floor", accelerator.floor)):
            network = Runtime(device, GPU).denoiser(network_of(experiment, rate))
            router = Router([(0, experiment.diffusion.timesteps)], [network])
            found[rate, name] = partial(draw, router, within)
    return found


if __name__ == "__main__":
    main()
