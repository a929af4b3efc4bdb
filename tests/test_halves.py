"""Training on bf16 copies of the weights, as CUDA does it, here on a CPU."""

import shutil
import subprocess
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, unet, write_experiment
from test_execution import trained
from test_parallel import PLAIN, TORCHRUN
from test_state import CPU, Mixed, bits
from test_training import artefacts, interrupted, job, same, search, tensors_of
from torch import nn

from ebdiff.data.dataset import open_held_out, to_float
from ebdiff.data.sources import prepare
from ebdiff.diffusion.process import Process
from ebdiff.experiment import load
from ebdiff.experiment.schema import Execution, Training
from ebdiff.nets import store
from ebdiff.nets.execution import GPU, NORMS, Runtime
from ebdiff.pruning.count import meta_tensors
from ebdiff.system.draws import generator
from ebdiff.training.loop import train
from ebdiff.training.state import KINDS, State

pytestmark = pytest.mark.usefixtures("halves")
HALF = Runtime(CPU, GPU)
UNET = unet(8, width=8, multipliers=(1, 2), attention=(4,), norm_groups=4, dropout=0.0)


class Joined(nn.Module):
    """Layers whose weights meet in one product, as q, k and v do, and one that isn't used."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 7, 1)
        self.norm = nn.GroupNorm(3, 12)
        self.c, self.unused = nn.Conv2d(12, 4, (1, 3)), nn.Linear(2, 2)

    def forward(self, x):
        weight, bias = (
            torch.cat([getattr(layer, key) for layer in (self.a, self.b)]) for key in ("weight", "bias")
        )
        return self.c(self.norm(F.conv2d(x, weight, bias)))


def example(kind):
    """A network, and a function of it to go down."""
    torch.manual_seed(0)
    network = {"unet": lambda: store.fresh(UNET, 0, "test"), "mixed": Mixed, "joined": Joined}[kind]()
    x = [torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last) for _ in range(2)]
    if kind == "unet":
        t = torch.tensor([3, 700])
        return network, [lambda net, x=x: net(x, t).square().sum() for x in x]
    return network, [lambda net, x=x: net(x.bfloat16()).float().square().sum() for x in x]


def halved(network):
    """A literal copy: weights in bf16, but norms'."""
    network = HALF.place(deepcopy(network))
    norms = {id(p) for m in network.modules() if isinstance(m, NORMS) for p in m.parameters()}
    for p in network.parameters():
        p.data = p.data if id(p) in norms else p.data.bfloat16()
    return network


@pytest.mark.parametrize("kind", ["unet", "mixed", "joined"])
def test_gathered_gradients_are_those_that_autograd_leaves(kind):
    network, losses = example(kind)
    literal = halved(network)
    state = State.start(network, HALF)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16, torch.float32}
    expected = {name: torch.zeros(p.shape) for name, p in literal.named_parameters()}
    state.begin_step()
    for loss in losses:  # micro-batches add up in fp32
        literal.zero_grad()
        loss(literal).backward()
        loss(network).backward()
        state.gather()
        for name, p in literal.named_parameters():
            expected[name] += 0 if p.grad is None else p.grad.float()
        assert all(p.grad is None for p in network.parameters())
    assert any(gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.equal(state.view("grad")[name], gradient), name
    state.begin_step()
    assert not state.grad.any()


def test_gradients_may_lie_in_memory_as_they_like():
    state = State.start(example("mixed")[0], HALF)
    torch.manual_seed(0)
    expected = {}
    for i, (name, p) in enumerate(state.network.named_parameters()):
        gradient = torch.randn(2, *p.shape).to(p.dtype)[1]
        if i % 4 == 1:
            gradient = gradient.flatten()[:1].expand(p.numel()).view(p.shape)
        if i % 4 == 2:
            gradient = gradient.movedim(0, -1).contiguous().movedim(-1, 0) if p.dim() else gradient
        p.grad = None if i % 4 == 3 else gradient
        expected[name] = torch.zeros(p.shape) if p.grad is None else gradient.float()
    state.gather()
    assert all(torch.equal(state.view("grad")[name], expected[name]) for name in expected)


def test_steps_are_adams_on_fp32_weights_and_their_copies_follow():
    network, losses = example("unet")
    literal, state = halved(network), State.start(network, HALF)
    masters = {name: p.detach().clone().requires_grad_() for name, p in state.view("raw").items()}
    adam = torch.optim.Adam(masters.values(), lr=2e-3, fused=True)
    training = Training(learning_rate=2e-3, warmup=0)
    for step in range(4):
        for name, p in literal.named_parameters():
            p.data.copy_(masters[name])
        literal.zero_grad()
        loss = losses[step % 2]
        loss(literal).backward()
        for name, p in literal.named_parameters():
            masters[name].grad = p.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        adam.step()

        state.begin_step()
        for name, p in network.named_parameters():
            assert torch.equal(p, state.view("raw")[name].to(p.dtype)), name
        loss(network).backward()
        state.gather()
        state.clip(1.0)
        state.descend(training)
        state.update_average(training)
        state.step += 1
        assert norm > 1
        for name, master in masters.items():
            assert torch.equal(bits(state.view("raw")[name]), bits(master)), (step, name)
    flat = {kind: getattr(state, kind).clone() for kind in KINDS} | {"half": state.half.float()}
    between = torch.ones(len(state.raw), dtype=torch.bool)
    state.raw.copy_(torch.arange(len(state.raw)))
    between[torch.cat([view.flatten().long() for view in state.view("raw").values()])] = False
    assert between.sum() > 100
    for tensor in flat.values():
        assert not tensor[between[: len(tensor)]].any()


@pytest.mark.parametrize("stop", [1, 4])
def test_a_saved_state_goes_on_with_the_same_bits(workspace, tiny, stop):
    through = trained(tiny, 8, HALF)
    trained(tiny, stop, HALF).save(workspace / "state.safetensors", tiny.architecture, {})
    state = State.load(workspace / "state.safetensors", HALF)
    assert state.step == stop and state.half is not None
    trained(tiny, 8, HALF, state)
    assert same(state.tensors(), through.tensors())
    assert {t.dtype for t in state.tensors().values()} == {torch.float32}
    again = State.load(workspace / "state.safetensors", Runtime(CPU))  # nor does the file know
    assert again.half is None and again.step == stop


HALVED = {"tuning.training": {"dense": {"precision": "bf16", "channels_last": True}}}


@pytest.mark.slow
def test_a_killed_search_ends_as_an_undisturbed_one(workspace, vary, monkeypatch, capsys):
    e = vary(HALVED)
    search(e)
    expected = artefacts()
    shutil.rmtree("results")
    interrupted(e, monkeypatch, 20, search)
    search(e)
    assert "going on from step 20" in capsys.readouterr().out
    found = artefacts()
    assert found.keys() == expected.keys()
    assert all(same(found[n], expected[n]) for n in expected)


@pytest.mark.long
def test_two_processes_train_as_one(workspace):
    write_experiment(workspace, PLAIN | HALVED)
    program = workspace / "halved.py"
    program.write_text(
        "from ebdiff.cli import main; from ebdiff.nets.execution import Runtime\n"
        "Runtime.halves = property(lambda runtime: runtime.how.precision == 'bf16')\nmain()\n"
    )
    results, found = workspace / "results/tiny/seed0/dense/full", []
    for processes in (1, 2):
        command = [*TORCHRUN[:-1], f"--nproc-per-node={processes}", str(program), "train-dense", "tiny"]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        found.append(torch.cat([t.flatten() for n, t in tensors_of(results / "last.safetensors").items()
                                if n.startswith("raw")]))  # fmt: skip
        shutil.rmtree("results")
    apart = (found[0] - found[1]).norm() / found[0].norm()
    assert 0 < apart < 0.01


@pytest.mark.long
def test_digits_are_learned_as_well_as_in_fp32(tmp_path, monkeypatch):
    """By the loss on held-out images, of three seeds each: it falls by a quarter from step 100."""
    monkeypatch.chdir(tmp_path)
    e = load.load("digits", ROOT / "config/experiments")
    prepare(e)
    x = to_float(torch.from_numpy(np.array(open_held_out("digits"))))
    process, shapes = Process(e.diffusion), meta_tensors(e.architecture, 0.5)

    @torch.inference_mode()
    def loss(state):
        network, found = store.build(e.architecture, state.view("ema")), []
        for i in range(10):  # the same timesteps and noise for all
            rng = generator(0, "held out", i)
            t = torch.from_numpy(rng.integers(0, 1000, len(x)))
            eps = torch.from_numpy(rng.standard_normal(x.shape, np.float32))
            found.append(process.loss(network(process.noised(x, t, eps), t), eps).mean().item())
        return np.mean(found)

    def losses(how):
        runtime, found = Runtime(CPU, how), []
        for seed in range(3):
            state = State.start(store.fresh(e.architecture, seed, "test", shapes), runtime)
            for steps in (100, 500):
                train(state, job(e, runtime=runtime, seed=seed), steps, save=lambda state: None)
                found.append(loss(state))
        return np.reshape(found, (3, 2)).T

    (early, fp32), (_, bf16) = losses(Execution()), losses(GPU)
    assert fp32.mean() < 0.8 * early.mean()
    assert abs(bf16.mean() - fp32.mean()) < 0.02 * fp32.mean(), (bf16, fp32)
