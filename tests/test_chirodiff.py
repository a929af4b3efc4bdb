"""ChiroDiff against one `nn.GRU` or `nn.TransformerEncoder` on drawings without padding."""

import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from kills import read_safetensors
from test_doors import EXPERT, TOY, bits, doors
from torch import nn

from ebdiff.data.dataset import Batch, Cond, Dataset, moved
from ebdiff.diffusion import ensemble
from ebdiff.diffusion.process import Process
from ebdiff.diffusion.sampling import Router
from ebdiff.diffusion.timesteps import Antithetic
from ebdiff.experiment.members import Architecture, ChiroDiffConfig, Items
from ebdiff.experiment.schema import Diffusion, Pruning, Training
from ebdiff.nets import store
from ebdiff.nets.execution import Runtime
from ebdiff.nets.memory import Footprint
from ebdiff.pruning.count import count, meta_tensors
from ebdiff.pruning.graph import mask_length, split, trace
from ebdiff.pruning.importance import accumulate_gradients, first_order, magnitude
from ebdiff.pruning.select import select
from ebdiff.pruning.surgery import cut
from ebdiff.system.draws import item_noise
from ebdiff.training.loop import Job, train
from ebdiff.training.state import State

CPU, LENGTH = torch.device("cpu"), 14
BODIES = pytest.mark.parametrize("body", ["gru", "transformer"])


def architecture(body="gru", hidden=8, layers=2, length=LENGTH, **more):
    config = ChiroDiffConfig(body=body, hidden=hidden, layers=layers, **more)
    return Architecture(config, Items((length, 3), variable=True))


def network_of(body="gru", **sizes):
    """Fresh weights, but louder."""
    network = store.fresh(architecture(body, **sizes), 0, "test")
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.5)
    return network


def drawings():
    """Five noisy drawings of 1 to 12 points, and their timesteps."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((5, LENGTH, 3), np.float32))
    inside = torch.arange(LENGTH) < torch.tensor([4, 12, 1, 7, 9])[:, None]
    return x, torch.tensor([0, 999, 500, 3, 20]), Cond(mask=inside)


# --- the same function as without padding -----------------------------------------------------------------


def told(network, t):
    angles = float(t) / 1000 * network.frequencies.double()
    return torch.cat([angles.sin(), angles.cos()]).float()


def points_of(network, x, t):
    """(n, 13): positions, movements and diffusion time of one drawing of n points."""
    positions = torch.stack([x[: i + 1, :2].sum(dim=0) for i in range(len(x))])
    return torch.cat([positions, x, told(network, t).expand(len(x), 8)], dim=1)


def plain_gru(network):
    """One bidirectional GRU, and what follows it."""
    body, (hidden, inputs) = network.body, network.body.widths
    gru = nn.GRU(13, hidden, len(inputs), bidirectional=True)
    for i in range(len(inputs)):
        for side, suffix in ((body.onward, ""), (body.reverse, "_reverse")):
            for name, p in side[i].named_parameters():
                getattr(gru, name.replace("_l0", f"_l{i}{suffix}")).data = p.detach().clone()

    def eps(x, t):
        h = body.mid(gru(points_of(network, x, t))[0])
        return network.out(torch.cat([h, told(network, t).expand(len(x), 8)], dim=1))

    return gru, eps


def plain_transformer(network):
    """Torch's encoder on the origin and all points."""
    body = network.body
    layer = nn.TransformerEncoderLayer(body.width, 4, 2 * body.width, 0.0, F.silu, batch_first=True)
    encoder = nn.TransformerEncoder(layer, len(body.blocks), enable_nested_tensor=False)
    for block, theirs in zip(body.blocks, encoder.layers, strict=True):
        qkv = (block.q, block.k, block.v)
        pairs = [(block.proj, theirs.self_attn.out_proj), (block.up, theirs.linear1)]
        pairs += [(block.down, theirs.linear2), (block.norm1, theirs.norm1), (block.norm2, theirs.norm2)]
        theirs.self_attn.in_proj_weight.data = torch.cat([p.weight for p in qkv]).detach()
        theirs.self_attn.in_proj_bias.data = torch.cat([p.bias for p in qkv]).detach()
        for ours, other in pairs:
            other.load_state_dict(ours.state_dict())

    def eps(x, t):
        n, points = len(x), points_of(network, x, t)
        angles = torch.arange(n + 1)[:, None] / n * network.frequencies
        place = torch.cat([angles.sin(), angles.cos()], dim=1)
        features, time = F.pad(points[:, :5], (0, 0, 1, 0)), told(network, t).expand(n + 1, 8)
        h = encoder(body.embed(torch.cat([features, place, time], dim=1))[None])[0]
        return network.out(torch.cat([h[:-1], h[1:], time[1:]], dim=1))

    return encoder, eps


@BODIES
def test_a_drawing_is_denoised_as_if_it_were_alone_without_padding(body):
    network = network_of(body)
    theirs, eps = (plain_gru if body == "gru" else plain_transformer)(network)
    x, t, cond = drawings()
    found = network(x, t, cond)
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal(x.shape, np.float32))
    (found * weight).sum().backward()
    ours = {n: p.grad.clone() for n, p in network.named_parameters()}
    network.zero_grad()
    for row, n in enumerate(cond.mask.sum(dim=1).tolist()):
        expected = eps(x[row, :n], t[row])
        torch.testing.assert_close(found[row, :n], expected, rtol=1e-4, atol=1e-5)
        assert not found[row, n:].any()
        (expected * weight[row, :n]).sum().backward()
    shared = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    assert {"out.weight", "body.mid.weight" if body == "gru" else "body.embed.weight"} <= shared.keys()
    for name, grad in shared.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-4)
    if body == "gru":
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_hh_l0"):
            for side, suffix in (("onward", ""), ("reverse", "_reverse")):
                for i in range(2):
                    grad = getattr(theirs, name.replace("_l0", f"_l{i}{suffix}")).grad
                    torch.testing.assert_close(ours[f"body.{side}.{i}.{name}"], grad, rtol=1e-3, atol=1e-4)
    else:
        for i, layer in enumerate(theirs.layers):
            grads = [ours[f"body.blocks.{i}.{name}.weight"] for name in ("q", "k", "v")]
            expected = layer.self_attn.in_proj_weight.grad
            torch.testing.assert_close(torch.cat(grads), expected, rtol=1e-3, atol=1e-4)


@BODIES
@pytest.mark.parametrize("anything", [7.0, -1e30, torch.nan])
def test_padding_changes_no_bit_of_values_or_gradients(body, anything):
    network, process = network_of(body), Process(Diffusion(loss="mean"))
    x, t, cond = drawings()
    found = []
    for filled in (x, x.masked_fill(~cond.mask[..., None], anything)):
        filled = filled.clone().requires_grad_()
        network.zero_grad()
        eps = network(filled, t, cond)
        process.loss(eps, torch.ones_like(x), cond.mask).sum().backward()
        assert not filled.grad[~cond.mask].any() and filled.grad[cond.mask].all(dim=1).any()
        found.append([eps, filled.grad, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@BODIES
def test_longer_rows_and_other_drawings_in_the_batch_change_nothing(body):
    network = network_of(body)
    x, t, cond = drawings()
    found = network(x, t, cond)
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], cond.rows(slice(i, i + 1))) for i in range(5)])
    longer = network(F.pad(x, (0, 0, 0, 30)), t, Cond(mask=F.pad(cond.mask, (0, 30))))
    torch.testing.assert_close(alone, found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(longer[:, :LENGTH], found, rtol=1e-4, atol=1e-5)
    assert longer.shape == (5, LENGTH + 30, 3)


@BODIES
def test_in_bf16_it_is_nearly_the_same(body):
    """Under autocast, and cast as a whole with its buffers."""
    network = network_of(body)
    x, t, cond = drawings()
    with torch.no_grad():
        strict = network(x, t, cond)
        with torch.autocast("cpu", torch.bfloat16):
            cast = network(x, t, cond)
        whole = network.to(torch.bfloat16)(x, t, cond)
    for found in (cast, whole):
        assert found.dtype == torch.float32
        assert (found - strict).abs().max() < 0.05 * strict.abs().max()


def test_frequencies_are_the_networks_own_and_travel_with_it():
    network = network_of()
    assert torch.equal(network.frequencies, network_of(hidden=4).frequencies)
    assert torch.equal(network.frequencies, network.frequencies.bfloat16().float())
    assert len(network.frequencies.unique()) == 4
    assert "buffer.frequencies" in store.buffers(network)


# --- sizes ------------------------------------------------------------------------------------------------


def test_parameters_and_macs_are_a_hand_count():
    it = architecture(hidden=96, layers=3, length=50)
    found = count(it, meta_tensors(it, 0))
    assert found.params == 416_859
    a_point = 2 * 3 * 96 * (13 + 96) + 2 * 2 * 3 * 96 * (192 + 96) + 192 * 96 + 104 * 3
    assert found.macs == 50 * a_point + 96 + 3  # biases of linear layers once, as the counter has it
    assert count(it, meta_tensors(it, 0.5)).params == 107_067


@BODIES
def test_memory_grows_with_drawings(body):
    network = network_of(body)
    one, nine = (Footprint.of(network).bytes(n) for n in (1, 9))
    assert 4 * one > nine - one > one / 4


@pytest.mark.parametrize("items", [Items((3, 8, 8)), Items((20, 2), variable=True), Items((20, 3))])
def test_other_items_are_refused(items):
    with pytest.raises(ValueError, match=r"network\.kind chirodiff: denoises drawings"):
        ChiroDiffConfig().check(items)


def test_rates_that_leave_nothing_are_known():
    config = ChiroDiffConfig(hidden=8)
    assert config.emptied(0.87) is None and config.emptied(0.9) == "a layer of width 8"
    it = architecture(hidden=8)
    assert meta_tensors(it, 0.87)["body.onward.0.weight_hh_l0"].shape == (3, 1)


# --- groups -----------------------------------------------------------------------------------------------


def pruned(body, rate=0.5):
    it = architecture(body)
    tensors = {n: t.detach() for n, t in network_of(body).state_dict().items()}
    groups = trace(it)
    mask = select(groups, magnitude(tensors), rate)
    return it, tensors, {g.name: part for g, part in zip(groups, split(groups, mask), strict=True)}, mask


def test_a_gru_is_cut_by_units_in_all_gates_both_directions_and_readers():
    it, tensors, kept, mask = pruned("gru")
    assert list(kept) == [f"body.{s}.{i}" for i in range(2) for s in ("onward", "reverse")] + ["body.mid"]
    assert all(part.sum() == 4 and len(part) == 8 for part in kept.values())
    assert any((kept["body.onward.0"] != part).any() for part in kept.values())
    units = {name: np.flatnonzero(part) for name, part in kept.items()}
    expected = {}
    read = np.arange(13)
    for i in range(2):
        both = np.concatenate([units[f"body.onward.{i}"], 8 + units[f"body.reverse.{i}"]])
        for side in ("onward", "reverse"):
            name = f"body.{side}.{i}"
            rows = np.concatenate([units[name], 8 + units[name], 16 + units[name]])
            columns = {"ih": read, "hh": units[name]}
            for kind in ("ih", "hh"):
                weight = tensors[f"{name}.weight_{kind}_l0"]
                expected[f"{name}.weight_{kind}_l0"] = weight[rows][:, columns[kind]]
                expected[f"{name}.bias_{kind}_l0"] = tensors[f"{name}.bias_{kind}_l0"][rows]
        read = both
    mid = units["body.mid"]
    expected["body.mid.weight"] = tensors["body.mid.weight"][mid][:, read]
    expected["body.mid.bias"] = tensors["body.mid.bias"][mid]
    expected["out.weight"] = tensors["out.weight"][:, np.append(mid, np.arange(8, 16))]
    expected |= {name: tensors[name] for name in ("out.bias", "frequencies")}
    found = cut(it, tensors, mask)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@BODIES
def test_a_pruned_network_is_the_dense_one_with_those_units_silenced(body):
    """Of a GRU: n = tanh(0) = 0, and (1 - z) n + z h stays 0. Norms keep a transformer's stream whole."""
    it, tensors, kept, mask = pruned(body)
    silent = {n: t.clone() for n, t in tensors.items()}
    first = 0
    for name, part in kept.items():
        gone = np.flatnonzero(~part)
        if name == "body.embed":
            mask[first : first + len(part)] = True
        elif name.startswith(("body.onward", "body.reverse")):
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                silent[f"{name}.{kind}_l0"][2 * 8 + gone] = 0
        else:
            for kind in ("weight", "bias"):
                silent[f"{name}.{kind}"][gone] = 0
        first += len(part)
    small, dense, whole = (store.build(it, x) for x in (cut(it, tensors, mask), silent, tensors))
    x, t, cond = drawings()
    with torch.no_grad():
        found = small(x, t, cond)
        torch.testing.assert_close(found, dense(x, t, cond), rtol=1e-4, atol=1e-5)
        assert (found - whole(x, t, cond)).abs().max() > 0.01


def test_every_head_of_a_transformer_loses_as_many_channels():
    it, tensors, kept, mask = pruned("transformer")
    for name in ("q", "v"):
        assert (kept[f"body.blocks.1.{name}"].reshape(4, 2).sum(axis=1) == 1).all()
    small = cut(it, tensors, mask)
    assert small["body.blocks.0.q.weight"].shape == small["body.blocks.0.proj.weight"].shape == (4, 4)
    assert small["body.blocks.0.up.weight"].shape == (8, 4)
    assert small["out.weight"].shape == (3, 2 * 4 + 8)
    network = store.build(it, small)
    assert network(*drawings()).isfinite().all()


@BODIES
def test_gradient_criteria_rank_it(body):
    it, network = architecture(body), network_of(body)
    x, _, cond = drawings()
    process = Process(Diffusion(timesteps=20, loss="mean"))
    gradients, used = accumulate_gradients(
        network, Batch(x, cond), torch.ones_like(x), process, Pruning(stride=10), stop_early=False
    )
    groups = trace(it)
    mask = select(groups, first_order(network, gradients), 0.5)
    assert used == 2 and mask.shape == (mask_length(groups),) and 0.4 < mask.mean() < 0.6


def test_sparse_training_may_mask_every_matrix():
    names = network_of().maskable()
    assert len(names) == 2 * 2 * 2 + 2 and "body.reverse.1.weight_hh_l0" in names
    names = network_of("transformer").maskable()
    assert len(names) == 2 * 6 + 2 and not any("norm" in name for name in names)


# --- training and sampling --------------------------------------------------------------------------------


class Scribbles(Dataset):
    """Forty random drawings of 2 to 14 points."""

    items = Items((LENGTH, 3), variable=True)

    def __init__(self):
        rng = np.random.default_rng(0)
        self.x, self.lengths = rng.standard_normal((40, LENGTH, 3), np.float32), rng.integers(2, 15, 40)

    def __len__(self):
        return 40

    def at(self, indices):
        return [self.x[indices], self.lengths[indices]]

    def batch(self, arrays, device):
        x, lengths = moved(arrays, device)
        return Batch(x, Cond(mask=torch.arange(LENGTH) < lengths[:, None]))


@BODIES
def test_killed_and_resumed_it_ends_with_the_same_bits(body, tmp_path):
    it, path = architecture(body, dropout=0.1), tmp_path / "state.safetensors"
    job = Job(
        "test", 0, Scribbles(), Antithetic(0, 1000), Process(Diffusion(loss="mean")),
        Training(batch=8, learning_rate=1e-2), Runtime(CPU),
    )  # fmt: skip

    def begun():
        return State.start(store.fresh(it, 0, "test"), job.runtime)

    whole, state = begun(), begun()
    train(whole, job, 6, save=lambda _: None)
    train(state, job, 3, save=lambda _: None)
    state.save(path, it, {})
    state = State.load(path, job.runtime)
    train(state, job, 6, save=lambda _: None)
    expected = whole.tensors()
    assert {n: t.shape for n, t in state.tensors().items()} == {n: t.shape for n, t in expected.items()}
    assert all(torch.equal(t, expected[n]) for n, t in state.tensors().items())
    assert not torch.equal(whole.raw, begun().raw)


def test_ddpm_adds_noise_of_the_asked_strength(vary):
    """Against a literal chain whose last step adds none."""
    changes = {
        "sampling.sampler": "ddpm", "sampling.clamp": False, "diffusion": {"timesteps": 3, "beta_end": 0.3},
        "runs.ta-eb": ..., "tables": {},
    }  # fmt: skip
    silent = Router([(0, 3)], [lambda x, t, cond: torch.zeros_like(x)])

    def drawn(strength=None):
        more = {} if strength is None else {"sampling.strength": strength}
        return ensemble.generate(vary(changes | more), silent, [0, 1], 0, CPU)

    def noise(t):
        return torch.from_numpy(item_noise(0, [0, 1], t, (1, 8, 8)))

    betas = [1e-4, 0.15005, 0.3]
    for strength in (1.0, 0.75, 0.0):
        x = noise(3)
        for t in (2, 1, 0):  # the mean of p(x_{t-1} | x_t) is x_t / sqrt(alpha_t) where eps is 0
            x = x / (1 - betas[t]) ** 0.5 + strength * (t > 0) * betas[t] ** 0.5 * noise(t)
        torch.testing.assert_close(drawn(strength), x, rtol=1e-5, atol=1e-5)
    assert torch.equal(drawn(), drawn(1.0))
    dumped = [vary(changes | {"sampling.strength": s}).sampling.model_dump() for s in (1.0, 0.75)]
    assert ["strength" in d for d in dumped] == [False, True]


# --- the whole way ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    def begun(name):
        folder = tmp_path_factory.mktemp(name)
        network = {"kind": "chirodiff", "hidden": 8, "layers": 2}
        sampling = {"sampler": "ddpm", "strength": 0.75, "images": 13, "batch": 5}
        path = folder / "config/experiments/toy.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(yaml.safe_dump({**TOY, "network": network, "sampling": sampling}))
        return folder

    return begun


@pytest.mark.long
def test_tickets_experts_and_samples_come_out_of_the_same_search(project):
    folder, killed = project("whole"), project("killed")
    done = doors(folder, "all")
    assert done.returncode == 0, done.stderr[-3000:]
    results = folder / "results/toy/seed0"
    items = np.load(results / "runs/eb-50/items.npy")
    assert items.shape == (13, 12, 3) and np.isfinite(items).all()
    for criterion in ("magnitude", "taylor"):
        ticket = read_safetensors(results / f"tickets/full/{criterion}/ema/0.5.safetensors")[1]
        shapes = {name.removeprefix("raw."): array[1] for name, array in ticket.items()}
        assert shapes["body.reverse.1.weight_hh_l0"] == (12, 4)
        assert shapes["body.onward.1.weight_ih_l0"] == (12, 8)
        assert (shapes["out.weight"], shapes["frequencies"]) == ((3, 12), (4,))
    for at in ("dense/full:25", f"expert/{EXPERT}:9"):
        assert doors(killed, "all", KILL_AT=at).returncode == -signal.SIGKILL
    done = doors(killed, "all")
    assert done.returncode == 0, done.stderr[-3000:]
    assert bits(killed) == bits(folder)
