"""Fused forms against torch's layers in float64: interpreted on the CPU, or on a GPU where there is one.

And each of its kernels compiled for the A100 and the H100, for which no GPU is needed.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from copy import deepcopy
from functools import cache
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, unet
from torch import nn

from ebdiff.experiment import load
from ebdiff.nets import fused, store
from ebdiff.pruning.graph import trace
from ebdiff.pruning.select import pruned_count

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton: pip install -c envs/constraints.txt -e .[gpu-tests]", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = {"TRITON_INTERPRET": str(int(DEVICE == "cpu"))}
with patch.dict(os.environ, INTERPRET):  # read where kernels are defined, and when the first one runs
    from ebdiff.nets import kernels

FORMS = [  # shift, dropout, SiLU: of norm1 and norm_out, of norm2, of norm2 without dropout, of attention
    (False, 0.0, True),
    (True, 0.1, True),
    (True, 0.0, True),
    (False, 0.0, False),
]
PRESETS = sorted(path.stem for path in (ROOT / "config/experiments").glob("*.yaml"))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels as chosen above; products of a GPU as exact as a CPU's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with patch.dict(os.environ, INTERPRET):
        yield


@cache
def norms_of_presets():
    """(channels, groups, pixels) of every norm of every preset at every rate it asks for."""
    found = set()
    for preset in PRESETS:
        experiment = load.load(preset, ROOT / "config/experiments")
        network, groups = experiment.network, trace(experiment.architecture)
        sides = {experiment.dataset.items.shape[1] >> level for level in range(len(network.multipliers))}
        for rate in (0.0, *experiment.rates()):
            widths = Counter()
            for group in groups:
                kept = group.width - pruned_count(group.width, rate, group.norm_groups)
                for member in group.members:
                    if member.side == "norm":
                        widths[member.weight] += len(member.roots) * kept // group.width
            found |= {(width, network.norm_groups, s * s) for width in widths.values() for s in sides}
    return found


WIDTHS = sorted({(channels, groups) for channels, groups, _ in norms_of_presets()})
SIZES = sorted({channels // groups for channels, groups in WIDTHS})


def example(channels, groups, size=(3, 5), images=2, dtype=torch.float32, shift=True, mean=0.0):
    """Inputs of a norm, and a gradient of its output."""
    draw = torch.Generator().manual_seed(channels + groups)
    x, dy = torch.randn(2, images, channels, *size, generator=draw)
    gain, bias = torch.randn(2, channels, generator=draw)
    moved = torch.randn(images, channels, generator=draw)
    x, dy = ((v + m).to(dtype).to(memory_format=torch.channels_last) for v, m in ((x, mean), (dy, 0)))
    tensors = [x, gain, bias, *([moved.to(dtype)] if shift else [])]
    return [t.to(DEVICE).requires_grad_() for t in tensors], dy.to(DEVICE)


def normed(tensors, groups, silu=True, p=0.0, seed=0):
    """The output, and x to be used around the norm."""
    x, gain, bias, *shift = tensors
    seed = torch.tensor(seed, device=DEVICE) if p else None
    return fused.Norm.apply(x, gain, bias, *(shift or [None]), seed, groups, 1e-6, silu, p)


def factors(like, groups, p, seed=0):
    """What dropout multiplies with: the output of gain 0 and bias 1."""
    x = like.detach()
    zeros = torch.zeros(x.shape[1], device=DEVICE)
    return normed([x, zeros, zeros + 1], groups, silu=False, p=p, seed=seed)[0]


def plain(tensors, groups, silu, factor):
    x, gain, bias, *shift = tensors
    h = F.group_norm(x + shift[0][:, :, None, None] if shift else x, groups, gain, bias, 1e-6)
    return (F.silu(h) if silu else h) * factor


def check(channels, groups, form, close=2e-6, **how):
    shift, p, silu = form
    tensors, dy = example(channels, groups, shift=shift, **how)
    y, around = normed(tensors, groups, silu, p)
    assert torch.equal(around, tensors[0])
    assert y.dtype == tensors[0].dtype and y.is_contiguous(memory_format=torch.channels_last)
    found = [y, *torch.autograd.grad(y, tensors, dy)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    factor = factors(tensors[0], groups, p) if p else torch.ones(1, device=DEVICE)
    y = plain(exact, groups, silu, factor.double())
    for name, ours, theirs in zip(
        ("y", "dx", "dgain", "dbias", "dshift"), found, [y, *torch.autograd.grad(y, exact, dy.double())],
        strict=False,
    ):  # fmt: skip
        error = (ours.double() - theirs).norm() / (1 + theirs.norm())  # dshift is 0 under groups of 1
        assert error < close, (name, error.item())


def test_widths_of_the_presets_reach_from_one_channel_a_group_to_32():
    assert {(96, 32), (160, 32), (192, 32), (224, 32), (288, 32), (1024, 32), (12, 4)} <= set(WIDTHS)
    assert SIZES[0] == 1 and SIZES[-1] == 32


@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_are_those_of_the_layers(size):
    groups = max(g for c, g in WIDTHS if c == size * g)
    check(size * min(groups, 8), min(groups, 8), FORMS[size % 4])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("channels", "groups"), WIDTHS)
def test_every_width_of_a_preset_in_every_form(channels, groups, form):
    check(channels, groups, form)


@pytest.mark.parametrize("form", FORMS)
def test_bf16_activations_lose_their_own_rounding_only(form):
    check(96, 32, form, dtype=torch.bfloat16, close=4e-3)


@pytest.mark.parametrize(
    "size", [(1, 1), (4, 4), (12, 11), (70, 61)]
)  # the last: two programs share an image
def test_any_number_of_pixels(size):
    parts = kernels.plan(size[0] * size[1], 4)["PARTS"]
    assert parts == (2 if size == (70, 61) else 1)
    check(32, 8, FORMS[1], size=size, images=1)


@pytest.mark.filterwarnings("ignore:overflow")  # of the exponential where a tile's pixels end
def test_a_large_mean_costs_no_more_than_its_own_rounding():
    tensors, _ = example(32, 8, mean=3000.0, shift=False)  # rounded to 1.2e-4; sums of squares to 1
    exact = plain([t.double() for t in tensors], 8, True, 1)
    torch.testing.assert_close(normed(tensors, 8)[0].double(), exact, rtol=0, atol=2e-3)


def test_a_gradient_may_lie_in_memory_as_it_likes():
    tensors, dy = example(32, 8)
    expected = torch.autograd.grad(normed(tensors, 8)[0], tensors, dy)
    found = torch.autograd.grad(normed(tensors, 8)[0], tensors, dy.contiguous())
    assert all(map(torch.equal, found, expected))


def test_dropout_drops_a_share_independently_and_scales_the_rest():
    x = torch.zeros(4, 96, 16, 17, device=DEVICE).to(memory_format=torch.channels_last)
    kept = factors(x, 32, 0.1)
    gone, n = kept == 0, x.numel()
    assert gone.float().mean().item() == pytest.approx(0.1, abs=4 * (0.09 / n) ** 0.5)
    torch.testing.assert_close(kept[~gone], torch.full_like(kept[~gone], 1 / 0.9), rtol=1e-4, atol=0)
    for dim in range(4):
        a, b = gone.narrow(dim, 0, x.shape[dim] - 1), gone.narrow(dim, 1, x.shape[dim] - 1)
        assert (a & b).float().mean().item() == pytest.approx(0.01, abs=5 * (0.01 / n) ** 0.5)
    other = factors(x, 32, 0.1, seed=2**62) == 0
    assert (gone & other).float().mean().item() == pytest.approx(0.01, abs=5 * (0.01 / n) ** 0.5)
    assert torch.equal(factors(x, 32, 0.1), kept)


def test_the_backward_pass_draws_the_same_mask():
    tensors, dy = example(32, 8, shift=False)
    y, _ = normed(tensors, 8, silu=False, p=0.5, seed=3)
    (dbias,) = torch.autograd.grad(y, tensors[2:], torch.ones_like(dy))
    torch.testing.assert_close(dbias, factors(tensors[0], 8, 0.5, seed=3).sum((0, 2, 3)))


def test_the_gradient_of_the_way_around_joins_that_of_the_norm():
    tensors, dy = example(32, 8)
    y, around = normed(tensors, 8)
    found = torch.autograd.grad([y, around], tensors, [dy, 3 * dy.contiguous()])
    expected = torch.autograd.grad(normed(tensors, 8)[0], tensors, dy)
    torch.testing.assert_close(found[0], expected[0] + 3 * dy)
    assert all(map(torch.equal, found[1:], expected[1:]))
    (alone,) = torch.autograd.grad(normed(tensors, 8)[1], tensors[:1], dy)
    assert torch.equal(alone, dy)


def test_a_shift_may_lie_among_others():
    (x, gain, bias, shift), _ = example(32, 8)
    among = torch.cat([shift, shift + 1, shift], 1)[:, 32:64]
    found, expected = (normed([x, gain, bias, s], 8)[0] for s in (among, among.contiguous()))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 96, 8, 8), (1, 130, 70, 33)])
def test_sums_of_activations_biases_and_pixels(shape, dtype):
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-2)
    h, x, dy = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    h, x, dy = (t.to(memory_format=torch.channels_last).requires_grad_() for t in (h, x, dy))
    bias = torch.arange(shape[1], device=DEVICE, dtype=dtype).requires_grad_()
    exact = bias.double()[:, None, None]
    for residual in (x, None):
        y = fused.Sum.apply(h, residual, bias)
        total = h.double() + exact + (0 if residual is None else residual.double())
        torch.testing.assert_close(y.double(), total, **close)
    inputs = [h, x, bias]
    dh, dx, dbias = torch.autograd.grad(fused.Sum.apply(*inputs), inputs, dy.detach().contiguous())
    assert torch.equal(dh, dy) and torch.equal(dx, dy)
    torch.testing.assert_close(dbias.double(), dy.double().sum((0, 2, 3)), rtol=close["rtol"], atol=1e-2)


def test_torch_accepts_the_operators():
    """Their schema, and their shapes without data."""
    tensors, dy = example(32, 8)
    x, gain, bias, shift = (t.detach() for t in tensors)
    seed = torch.tensor(0, device=DEVICE)
    tests = ("test_schema", "test_faketensor")
    for optional in ((shift, seed), (None, None)):
        inputs = (x, gain, bias, *optional)
        how = 8, 1e-6, True, 0.1
        torch.library.opcheck(fused.norm_forward, (*inputs, *how), test_utils=tests)
        _, mean, rstd = fused.norm_forward(*inputs, *how)
        for around in (dy, None):
            gradient = (dy, around, *inputs, mean, rstd, True, 0.1)
            torch.library.opcheck(fused.norm_backward, gradient, test_utils=tests)
    torch.library.opcheck(fused.add, (x, dy, bias), test_utils=tests)
    torch.library.opcheck(fused.channel_sums, (x,), test_utils=tests)


@pytest.fixture
def everywhere(monkeypatch):
    """Let the CPU take the fused form too."""
    last = torch.channels_last
    monkeypatch.setattr(fused, "fuses", lambda x: x.stride(1) == 1 and x.is_contiguous(memory_format=last))


def test_a_networks_two_forms_agree(everywhere):
    network = store.fresh(
        unet(8, width=8, multipliers=(1, 2), attention=(4,), norm_groups=4), 0, "test"
    ).eval()
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 900])

    def run(layout):
        network.to(DEVICE, memory_format=layout).zero_grad()
        y = network(x.to(DEVICE, memory_format=layout), t.to(DEVICE))
        y.square().sum().backward()
        return {"y": y.detach(), **{name: p.grad.clone() for name, p in network.named_parameters()}}

    ours, theirs = run(torch.channels_last), run(torch.contiguous_format)
    scale = max(theirs[name].abs().max() for name in theirs if name != "y")
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5 * scale.item(), msg=name)


def agree(function, layers, *inputs):
    """A function's fused form in fp32 against its plain one in float64: values, and the gradients of all."""
    layers = nn.ModuleList(layers).to(DEVICE)
    given, draw = [], torch.Generator().manual_seed(1)
    for kind, layout in ((torch.float32, torch.channels_last), (torch.float64, torch.contiguous_format)):
        of = [x.detach().to(DEVICE, kind) for x in inputs]
        of = [(x.contiguous(memory_format=layout) if x.dim() == 4 else x).requires_grad_() for x in of]
        network = deepcopy(layers).to(kind)
        y = function(*network, *of)
        dy = torch.randn(y.shape, generator=draw.manual_seed(1)).to(DEVICE, kind)
        given.append([y, *torch.autograd.grad(y, [*of, *network.parameters()], dy, materialize_grads=True)])
    for ours, theirs in zip(*given, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "value"), [(5, 7), (16, 16), (9, 3)])
def test_attention_of_any_widths(everywhere, width, value):
    torch.manual_seed(0)
    q, k, v = (nn.Conv2d(16, n, 1) for n in (width, width, value))
    x, h = torch.randn(2, 2, 16, 3, 4)
    agree(lambda *all: fused.attended(all[3], *all[:3])[:, :value], [q, k, v], x)
    agree(
        lambda q, k, v, proj, h, x: fused.added(fused.attended(h, q, k, v), proj, x),
        [q, k, v, nn.Conv2d(value, 16, 1)], h, x,
    )  # fmt: skip


@pytest.mark.parametrize("shortcut", [nn.Conv2d(11, 6, 1), None])
def test_residual_sums_with_and_without_a_shortcut(everywhere, shortcut):
    torch.manual_seed(0)
    h, x = torch.randn(2, 9, 5, 4), torch.randn(2, 11 if shortcut else 6, 5, 4)
    layers, conv = ([shortcut] if shortcut else []), nn.Conv2d(9, 6, 3, padding=1)
    agree(lambda conv, *rest: fused.added(rest[-2], conv, rest[-1], *rest[:-2]), [conv, *layers], h, x)
    agree(lambda conv, h: fused.added(h, conv), [nn.Conv2d(9, 6, 3, stride=2)], h)


def test_shifts_of_all_blocks_are_one_product_with_the_biases_of_their_convolutions(everywhere):
    torch.manual_seed(0)
    layers = [layer for n in (3, 8, 5) for layer in (nn.Linear(12, n), nn.Conv2d(2, n, 3))]

    def moved(*all):
        blocks, (temb, like) = list(zip(all[:6:2], all[1:6:2], strict=True)), all[6:]
        found = fused.shifts(temb, blocks, like)
        assert {shift.biased for shift in found} == {temb.dtype == torch.float32}
        bias = [0 if shift.biased else conv.bias for shift, (_, conv) in zip(found, blocks, strict=True)]
        return torch.cat([shift.value + b for shift, b in zip(found, bias, strict=True)], 1)

    agree(moved, layers, torch.randn(2, 12), torch.randn(2, 2, 4, 4))


def test_dropout_is_seeded_by_torch_and_rests_in_evaluation(everywhere):
    layer, dropout = nn.GroupNorm(8, 32).to(DEVICE), nn.Dropout(0.5)
    (x, *_), _ = example(32, 8)

    def run(seed):
        torch.manual_seed(seed)
        return fused.norm_silu(x, layer, None, dropout)[0]

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert (run(0) == 0).float().mean().item() == pytest.approx(0.5, abs=4 * (0.25 / x.numel()) ** 0.5)
    dropout.eval()
    assert torch.equal(run(0), fused.norm_silu(x, layer)[0])


def used(architecture, forms, shapes):
    """What the kernels for some (pixels, channels of a group) use of a GPU, compiled in another process."""
    command = [
        sys.executable,
        ROOT / "tests/compiled.py",
        architecture,
        forms,
        *(f"{p}:{s}" for p, s in shapes),
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"}
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def within_limits(kernels):
    """No more shared memory than any GPU gives unasked; under the cap of registers hardly one spilled."""
    assert kernels
    assert [k for k in kernels if k["shared"] > 48 * 1024 or k["STACK"] > 64] == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_for_gpus(architecture):
    within_limits(used(architecture, 4, [(1024, 4), (16, 9)]))


@pytest.mark.long
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_kernel_of_every_preset_compiles(architecture):
    plans = {}
    for channels, groups, pixels in norms_of_presets():
        plan = kernels.plan(pixels, channels // groups)
        plan["PARTS"] = min(plan["PARTS"], 2)  # in how many launches; more of them only moves addresses
        plans[str(plan)] = pixels, channels // groups
    within_limits(used(architecture, 1, sorted(plans.values())))
