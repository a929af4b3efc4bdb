"""The flat state: where parameters lie, and that each operation on it has the bits of torch's own."""

import numpy as np
import pytest
import torch
from test_training import run, same, start
from torch import nn

from ebdiff.experiment.members import NETWORKS, UNetConfig
from ebdiff.experiment.schema import Execution, Training
from ebdiff.nets import store
from ebdiff.nets.execution import Runtime
from ebdiff.nets.unet import UNet
from ebdiff.pruning.graph import mask_length, trace
from ebdiff.pruning.surgery import cut
from ebdiff.system.draws import generator
from ebdiff.training.loop import _draws_at_random
from ebdiff.training.state import ALIGNED, KINDS, State

CPU = torch.device("cpu")


class Mixed(nn.Module):
    """Layers of many kinds, of odd sizes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 77, 3)
        self.point = nn.Conv2d(77, 5, 1)
        self.norm = nn.LayerNorm(5)
        self.gru = nn.GRU(5, 3, bidirectional=True)
        self.classes = nn.Embedding(7, 6)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        h = self.point(self.conv(x)).flatten(2).permute(2, 0, 1)
        return self.scale * self.gru(self.norm(h))[0] + self.classes(torch.tensor(3))


def mixed(channels_last=False):
    torch.manual_seed(0)
    network, literal = Mixed(), Mixed()
    literal.load_state_dict(network.state_dict())
    return State.start(network, Runtime(CPU, Execution(channels_last=channels_last))), literal


def bits(tensor):
    return tensor.detach().contiguous().view(torch.int32)


def places(state):
    """Positions of every parameter in the flat tensors, by name; overwrites the weights."""
    with torch.no_grad():
        state.raw.copy_(torch.arange(len(state.raw)))
        return {name: p.detach().long().flatten() for name, p in state.network.named_parameters()}


@pytest.mark.parametrize("channels_last", [False, True])
def test_views_follow_the_parameters_order_shape_and_format(channels_last):
    state, literal = mixed(channels_last)
    expected = dict(literal.named_parameters())
    for kind in KINDS:
        views = state.view(kind)
        assert list(views) == list(expected)
        for name, view in views.items():
            assert view.shape == expected[name].shape
            assert view._base is getattr(state, kind)
    for kind in ("raw", "ema"):
        assert all(torch.equal(view, expected[name]) for name, view in state.view(kind).items())
    for kind in ("m", "v", "grad"):
        assert not getattr(state, kind).any()
    form = torch.channels_last if channels_last else torch.contiguous_format
    for view in (state.network.conv.weight, *(state.view(kind)["conv.weight"] for kind in KINDS)):
        assert view.is_contiguous(memory_format=form)
        assert view.is_contiguous() != channels_last


@pytest.mark.parametrize("channels_last", [False, True])
def test_parameters_lie_apart_in_order_and_aligned(channels_last):
    state, literal = mixed(channels_last)
    found = places(state)
    everything = torch.cat(list(found.values()))
    assert len(everything.unique()) == sum(p.numel() for p in literal.parameters())
    firsts = [int(where.min()) for where in found.values()]
    assert firsts == sorted(firsts)
    assert all(first % ALIGNED == 0 for first in firsts)


def test_the_network_computes_on_the_flat_weights_and_its_gradients_gather_in_the_flat_one():
    state, literal = mixed()
    torch.manual_seed(1)
    x = torch.randn(2, 3, 5, 5)
    for _ in range(2):  # the second adds to the first
        for network in (state.network, literal):
            network(x).square().sum().backward()
    for name, p in literal.named_parameters():
        assert torch.equal(bits(state.view("grad")[name]), bits(p.grad)), name
    state.grad.zero_()
    assert not any(p.grad.any() for p in state.network.parameters())
    state.raw.zero_()
    assert not state.network(x).any()


@pytest.mark.parametrize("largest", [1e-3, 1.0, 1e6])
def test_clipping_and_updates_have_the_bits_of_torchs_own(largest):
    """torch.optim.Adam and clip_grad_norm_, on parameters that lie where torch puts them."""
    state, literal = mixed()
    adam = torch.optim.Adam(literal.parameters(), lr=2e-3, fused=True)
    average = [p.detach().clone() for p in literal.parameters()]
    training = Training(learning_rate=2e-3, warmup=0, ema_decay=0.97)
    rng = np.random.default_rng(0)
    for _ in range(6):
        for name, p in literal.named_parameters():
            p.grad = torch.from_numpy(rng.standard_normal(p.shape).astype(np.float32))
            state.view("grad")[name].copy_(p.grad)
        torch.nn.utils.clip_grad_norm_(literal.parameters(), largest)
        adam.step()
        for kept, p in zip(average, literal.parameters(), strict=True):
            kept.lerp_(p.detach(), 1 - 0.97)
        state.clip(largest)
        state.descend(training)
        state.update_average(training)
        state.step += 1
    for (name, p), kept in zip(literal.named_parameters(), average, strict=True):
        truth = {"raw": p, "ema": kept, "grad": p.grad}
        truth |= {"m": adam.state[p]["exp_avg"], "v": adam.state[p]["exp_avg_sq"]}
        for kind, tensor in truth.items():
            assert torch.equal(bits(state.view(kind)[name]), bits(tensor)), (kind, name)
    assert state.updates == 6


def test_what_lies_between_parameters_stays_zero(workspace, tiny):
    state = run(tiny, 3)
    flat = {kind: getattr(state, kind).clone() for kind in KINDS}
    between = torch.ones(len(state.raw), dtype=torch.bool)
    between[torch.cat(list(places(state).values()))] = False
    assert between.any()
    for tensor in flat.values():
        assert not tensor[between].any()
        assert tensor[~between].any()


def test_weights_that_a_network_moves_away_are_noticed(workspace, tiny):
    state = start(tiny)
    parameter = next(state.network.parameters())
    parameter.data = parameter.data.clone()
    with pytest.raises(RuntimeError, match="left the state"):
        state.save(workspace / "state.safetensors", tiny.architecture, {})


# --- buffers ------------------------------------------------------------------------------------------------


class Fourier(UNet):
    """A network with fixed random frequencies."""

    def __init__(self, config, items):
        super().__init__(config, items)
        draws = generator(3, "frequencies").standard_normal(8, np.float32)
        self.register_buffer("frequencies", torch.from_numpy(draws))
        self.register_buffer("scratch", torch.zeros(2, device="cpu"), persistent=False)

    def forward(self, x, t, cond=None):
        return super().forward(x, t) + self.frequencies.mean()


@pytest.fixture
def fourier(monkeypatch):
    """Such a network wherever a U-Net is asked for."""
    monkeypatch.setitem(NETWORKS._members, "unet", (UNetConfig, Fourier))


def test_buffers_are_saved_and_come_back_with_every_kind_of_weights(workspace, tiny, fourier):
    through, state = start(tiny), start(tiny)
    for cut_short in (through, state):
        cut_short.network.frequencies += 1  # not what the constructor draws
    run(tiny, 6, through)
    path = workspace / "state.safetensors"
    run(tiny, 3, state).save(path, tiny.architecture, {})
    assert {n for n in state.tensors() if n.startswith("buffer.")} == {"buffer.frequencies"}

    again = State.load(path, Runtime(CPU))
    assert torch.equal(again.network.frequencies, through.network.frequencies)
    assert "frequencies" not in again.view("raw")
    run(tiny, 6, again)
    assert same(again.tensors(), through.tensors())

    for prefix in ("raw.", "ema."):
        tensors, architecture, _ = store.load(path, prefix)
        network = store.build(architecture, tensors)
        assert torch.equal(network.frequencies, through.network.frequencies)
        mask = np.ones(mask_length(trace(architecture)), bool)
        assert torch.equal(cut(architecture, tensors, mask)["frequencies"], through.network.frequencies)


def test_a_fresh_network_has_the_constructors_buffers_whatever_its_widths(tiny, fourier):
    from ebdiff.pruning.count import meta_tensors

    shapes = meta_tensors(tiny.architecture, 0.5)
    for given in (None, shapes):
        found = store.fresh(tiny.architecture, 0, "s", given).frequencies
        assert torch.equal(found, Fourier(*tiny.architecture).frequencies)


# --- chance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "draws"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.1)), True),
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.0)), False),
        (nn.Sequential(nn.Dropout2d(0.5)), True),
        (nn.ModuleDict({"a": nn.GRU(2, 2, num_layers=2, dropout=0.3)}), True),
        (nn.ModuleDict({"a": nn.GRU(2, 2, num_layers=2)}), False),
        (nn.MultiheadAttention(4, 2, dropout=0.1), True),
        (nn.MultiheadAttention(4, 2), False),
    ],
)
def test_whether_a_network_draws_is_asked_of_its_layers(network, draws):
    assert _draws_at_random(network) == draws


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_torchs_generator_is_seeded_for_who_draws_from_it(workspace, vary, dropout):
    e = vary({"network.dropout": dropout})
    state = start(e)
    before = torch.get_rng_state()
    run(e, 1, state)
    assert torch.equal(before, torch.get_rng_state()) == (dropout == 0)
