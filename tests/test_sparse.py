"""Sparse training: densities, masks against literal updates, exact counts, recycling, what it costs."""

import math
import shutil
from copy import deepcopy
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import unet
from test_training import CPU, interrupted, job, milestone, same, start, tensors_of

from ebdiff.cost.accounting import training_flops
from ebdiff.cost.measure import counts, measure_cost, sparse_counts
from ebdiff.experiment.schema import Execution
from ebdiff.experiment.sparsity import MagRan as MagRanConfig
from ebdiff.experiment.sparsity import Recycle, Static
from ebdiff.experiment.sparsity import RigL as RigLConfig
from ebdiff.nets import store
from ebdiff.nets.execution import Runtime
from ebdiff.pruning.count import meta_tensors
from ebdiff.pruning.importance import magnitude
from ebdiff.sparse import MagRan, Masks, Recycling, RigL, densities, exchanged, least_important
from ebdiff.system.errors import UserError
from ebdiff.training.hooks import Hook
from ebdiff.training.loop import train
from ebdiff.training.state import SAVED, State
from ebdiff.training.train import finetune_region

METHODS = [(Masks, Static, {}), (MagRan, MagRanConfig, {"interval": 3, "end": 100})]
METHODS.append((RigL, RigLConfig, {"interval": 3, "end": 100}))


def hook(kind, config, e, **settings):
    return kind(config(**{"sparsity": 0.75, **settings}), job(e))


def trained(e, steps, *hooks, state=None):
    state = state or start(e)
    train(state, job(e), steps, hooks=hooks, save=lambda s: None)
    return state


class Each(Hook):
    """Calls a function after every step, with the state."""

    def __init__(self, see):
        self.see = see

    def stepped(self, state):
        self.see(state)


# --- densities ----------------------------------------------------------------------------------------------


def test_erk_by_hand():
    """A 3x3 kernel of 4 in 2 and a 10x10 matrix, half of 172 weights.

    Scores (2+4+3+3)/72 = 1/6 and 20/100 = 1/5; sums 12 and 20; eps = 86/32. Neither exceeds 1.
    """
    found = densities({"a": (2, 4, 3, 3), "b": (10, 10)}, 0.5, "erk")
    assert found == {"a": pytest.approx(86 / 32 / 6), "b": pytest.approx(86 / 32 / 5)}


def test_a_layer_that_erk_would_overfill_is_dense_and_the_rest_is_solved_again():
    """At 20 % sparsity of (2, 2) and (20, 20), 404 weights: eps = 323.2/44, (2, 2) would have 7.3 > 1.

    It is dense, and 319.2 non-zeros are left for the other's 400.
    """
    found = densities({"a": (2, 2), "b": (20, 20)}, 0.2, "erk")
    assert found == {"a": 1.0, "b": pytest.approx(319.2 / 400)}


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_erk_keeps_as_many_and_in_proportion_to_the_closed_form(sparsity):
    network = store.fresh(
        unet(8, 1, width=16, multipliers=(1, 2), blocks=1, attention=(), norm_groups=4), 0, "x"
    )
    shapes = {n: tuple(p.shape) for n, p in network.named_parameters() if n in network.maskable()}
    found = densities(shapes, sparsity, "erk")
    size = {n: math.prod(s) for n, s in shapes.items()}
    assert sum(found[n] * size[n] for n in shapes) == pytest.approx((1 - sparsity) * sum(size.values()))
    eps = {found[n] * size[n] / sum(s) for n, s in shapes.items() if found[n] < 1}
    assert max(eps) == pytest.approx(min(eps))  # one eps for all that aren't full
    assert all(min(eps) * sum(s) / size[n] >= 1 - 1e-9 for n, s in shapes.items() if found[n] == 1)


def test_what_a_unet_masks(tiny):
    """No norms, no biases, nothing of the time embedding; by default neither end."""
    network = store.fresh(tiny.architecture, 0, "x")
    masked = Masks.nonzeros(Static(sparsity=0.5), network)
    rest = {n for n, p in network.named_parameters() if p.dim() > 1} - masked.keys()
    time = {"temb.dense.0.weight", "temb.dense.1.weight"}
    assert rest == time | {"conv_in.weight", "conv_out.weight"}
    assert all(network.get_parameter(n).dim() > 1 for n in masked)
    assert Masks.nonzeros(Static(sparsity=0.5, ends="sparse"), network).keys() - masked.keys() == rest - time
    uniform = Masks.nonzeros(Static(sparsity=0.5, distribution="uniform"), network)
    assert all(count == network.get_parameter(n).numel() / 2 for n, count in uniform.items())


# --- the update against a literal one -----------------------------------------------------------------------


def literal(on, share, drop, grow):
    """The indices that an update leaves, element by element (spec G)."""
    kept = [i for i in range(len(on)) if on[i]]
    n = int(share * len(kept))
    for _ in range(n):
        kept.remove(min(kept, key=lambda i: (drop[i], -i)))
    free = [i for i in range(len(on)) if i not in kept]
    for _ in range(n):
        best = max(free, key=lambda i: (grow[i], -i))
        free.remove(best)
        kept.append(best)
    return set(kept)


@pytest.mark.parametrize("seed", range(20))
def test_drop_and_grow_are_the_literal_ones(seed):
    rng = np.random.default_rng(seed)
    shape = (4, 3, 3, 3)
    on = rng.random(shape) < rng.uniform(0.1, 0.9)
    drop, grow = rng.integers(0, 30, (2, *shape)).astype(np.float32)  # with ties
    share = rng.random()
    arrays = [torch.from_numpy(a) for a in (on, drop, grow)]
    found = exchanged(arrays[0], int(on.sum()), share, *arrays[1:])
    assert set(np.flatnonzero(found)) == literal(on.ravel(), share, drop.ravel(), grow.ravel())
    inside_out = [a.to(memory_format=torch.channels_last) for a in arrays]
    assert torch.equal(exchanged(inside_out[0], int(on.sum()), share, *inside_out[1:]), found)


def test_shares_follow_the_cosine():
    config = MagRanConfig(sparsity=0.5, interval=10, end=40, fraction=0.4)
    assert [t for t in range(60) if config.due(t)] == [10, 20, 30, 40]
    assert [config.share(t) for t in (0, 20, 40)] == pytest.approx([0.4, 0.2, 0])
    constant = config.model_copy(update={"schedule": "constant"})
    assert constant.share(20) == constant.share(40) == 0.4
    rigl = RigLConfig(sparsity=0.5, interval=10, end=40, accumulate=3)
    assert [t for t in range(60) if rigl.gathers(t)] == [8, 9, 10, 18, 19, 20, 28, 29, 30, 38, 39, 40]


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "config", "settings"), METHODS)
def test_exactly_as_many_weights_at_every_step_and_nothing_of_the_others(
    workspace, vary, kind, config, settings
):
    e = vary({"training.weight_decay": 0.1, "training.ema_decay": 0.5})
    own, masks = hook(kind, config, e, **settings), []

    def see(state):
        for name, count in own.counts.items():
            off = ~own.carry()[f"sparse.{name}"]
            assert int((~off).sum()) == count
            assert all((state.view(k)[name][off] == 0).all() for k in SAVED)
        masks.append({name: mask.clone() for name, mask in own.carry().items()})

    state = trained(e, 10, own, Each(see))
    moved = [t for t in range(1, 10) if not same(masks[t - 1], masks[t])]
    assert moved == ([] if kind is Masks else [3, 6, 9])
    assert state.updates == (10 if kind is not RigL else 7)
    total, told = sum(state.view("raw")[name].numel() for name in own.counts), own.told()["sparse"]
    assert told["zeros"] + sum(told["nonzeros"].values()) == total
    assert told["zeros"] == pytest.approx(0.75 * total, abs=len(own.counts) / 2)  # rounded layer by layer

    def common(one, other):
        shared = sum(int((one[f"sparse.{n}"] & other[f"sparse.{n}"]).sum()) for n in own.counts)
        return shared / sum(own.counts.values())

    overlap = [[t, common(masks[t], masks[0]), common(masks[t], masks[t - 1])] for t in moved]
    assert told["overlap"] == [pytest.approx(row) for row in overlap]


def test_masks_drawn_anew_have_no_more_in_common_than_chance(workspace, tiny):
    """With fraction 1 all go and come at random: of a layer's n kept weights of N, n^2 / N stay by chance."""
    settings = {"interval": 1, "end": 100, "fraction": 1.0, "schedule": "constant"}
    own = hook(MagRan, MagRanConfig, tiny, **settings)
    state = trained(tiny, 8, own)
    size = {name: state.view("raw")[name].numel() for name in own.counts}
    chance = sum(n * n / size[name] for name, n in own.counts.items()) / sum(own.counts.values())
    found = np.array(own.told()["sparse"]["overlap"])
    assert list(found[:, 0]) == list(range(1, 8))
    assert found[:, 1:].mean(0) == pytest.approx([chance, chance], rel=0.05)


def test_gradients_are_masked_before_they_are_clipped(workspace, vary):
    own, seen = hook(Masks, Static, (e := vary({"training.clip": 1e-3}))), []
    trained(e, 1, own, Each(lambda state: seen.append((state.grad.norm().item(), state.grad[~own.on]))))
    assert seen[0][0] == pytest.approx(1e-3, rel=1e-3)
    assert (seen[0][1] == 0).all()


@pytest.mark.parametrize(("kind", "config", "settings"), METHODS[1:])
def test_an_update_of_the_network_is_the_literal_one(workspace, vary, kind, config, settings):
    """RigL before the step, by the gradients of that step, unclipped; MagRan after it."""
    e = vary({"training.clip": 1e-3})
    own, seen = hook(kind, config, e, **settings), {}

    class Before(Hook):
        """What the update sees: listed first, it does before masks touch anything."""

        def graded(self, state):
            if state.step == 3:
                seen["grad"] = {n: g.clone() for n, g in state.view("grad").items()}
                seen["raw"] = {n: w.clone() for n, w in state.view("raw").items()}
                seen["on"] = {n: own.carry()[f"sparse.{n}"].clone() for n in own.counts}

        def stepped(self, state):
            if state.step == 3 and kind is MagRan:
                seen["raw"] = {n: w.clone() for n, w in state.view("raw").items()}

    def see(state):
        if state.step == 3:
            seen["after"] = {n: w.clone() for n, w in state.view("raw").items()}
            seen["now"] = {n: own.carry()[f"sparse.{n}"].clone() for n in own.counts}

    trained(e, 4, Before(), own, Each(see))
    share, draws = own.config.share(3), own._draws(3)
    for name in own.counts:
        on, before, now = (seen[k][name].numpy().ravel() for k in ("on", "raw", "now"))
        grow = np.abs(seen["grad"][name].numpy().ravel())
        if kind is MagRan:
            grow = draws.random(len(on), np.float32)
        assert set(np.flatnonzero(now)) == literal(on, share, np.abs(before), grow), name
        after = seen["after"][name].numpy().ravel()
        assert (after[~now] == 0).all()
        assert (after[now & ~on] == 0).all()  # those that come begin at zero
        if kind is RigL:  # no step: what stays is what it was
            assert (after[now & on] == before[now & on]).all()
            assert own.config.dense_gradients == 1 / 4


def test_masks_are_the_same_in_every_memory_format(workspace, tiny):
    found = []
    for how in (Execution(), Execution(channels_last=True)):
        runtime, own = Runtime(CPU, how), hook(RigL, RigLConfig, tiny, interval=3, end=100)
        state = State.start(store.fresh(tiny.architecture, 0, "test"), runtime)
        own.begin(state)
        for name, p in store.fresh(tiny.architecture, 1, "test").named_parameters():
            state.view("grad")[name].copy_(p.detach())
        state.step = 3
        own.graded(state)
        own.update(state)
        found.append({n: t.clone() for n, t in {**own.carry(), **state.view("raw")}.items()})
    assert same(*found)


def test_gradients_may_be_summed_over_several_batches(workspace, tiny):
    own, sums = hook(RigL, RigLConfig, tiny, interval=4, end=100, accumulate=3), {}

    class Sum(Hook):
        def graded(self, state):
            if state.step in (2, 3, 4):
                for n, g in state.view("grad").items():
                    sums[n] = sums.get(n, 0) + g
            if state.step == 4:
                sums["on"] = {n: own.carry()[f"sparse.{n}"].clone() for n in own.counts}
                sums["raw"] = {n: w.clone() for n, w in state.view("raw").items()}

    state = trained(tiny, 5, Sum(), own)
    share = own.config.share(4)
    for n in own.counts:
        now = exchanged(sums["on"][n], own.counts[n], share, sums["raw"][n].abs(), sums[n].abs())
        assert torch.equal(own.carry()[f"sparse.{n}"], now)
    assert state.updates == 4


@pytest.mark.parametrize("kind", ["rigl", "magran"])
def test_counts_never_drift_over_a_thousand_updates(kind):
    rng = np.random.default_rng(0)
    on = torch.from_numpy(rng.permutation(6 * 5 * 3 * 3) < 90).view(6, 5, 3, 3)
    for _ in range(1000):
        drop, grow = torch.from_numpy(rng.standard_normal((2, 6, 5, 3, 3)))
        on = exchanged(on, 90, rng.random(), drop.abs(), grow.abs() if kind == "rigl" else grow)
        assert int(on.sum()) == 90


@pytest.mark.parametrize(("kind", "config", "settings"), METHODS[:2])
def test_without_zeros_it_is_dense_training_to_the_bit(workspace, tiny, kind, config, settings):
    none = config.model_construct(**{**config(sparsity=0.5, **settings).model_dump(), "sparsity": 0.0})
    found = trained(tiny, 7, kind(none, job(tiny)))
    plain = trained(tiny, 7).tensors()
    assert same({n: t for n, t in found.tensors().items() if not n.startswith("extra.")}, plain)


def test_weights_decay_and_the_rate_falls_from_epoch_to_epoch_as_torch_does_it(workspace, vary):
    """Against AdamW and StepLR; an epoch of 160 images is 10 steps of 16."""
    e = vary({"training.weight_decay": 0.1, "training.decay_per_epoch": 0.5, "training.warmup": 0})
    gradients = []
    state = trained(
        e, 25, Each(lambda s: gradients.append({n: g.clone() for n, g in s.view("grad").items()}))
    )
    network = store.fresh(e.architecture, 0, "test")
    adam = torch.optim.AdamW(network.parameters(), lr=e.training.learning_rate, weight_decay=0.1, fused=True)
    falls = torch.optim.lr_scheduler.StepLR(adam, step_size=10, gamma=0.5)
    for seen in gradients:
        for name, p in network.named_parameters():
            p.grad = seen[name]
        adam.step()
        falls.step()
    for name, p in network.named_parameters():
        assert torch.equal(state.view("raw")[name], p), name


# --- experts ------------------------------------------------------------------------------------------------


def sparse(vary, *steps, **settings):
    """An experiment with a sparse expert at several milestones; and its key."""
    own = {"method": "rigl", "sparsity": 0.5, "interval": 4, "end": 12, "accumulate": 3}
    expert = {
        "init": "fresh",
        "sparse": settings or own,
        **({} if "sparsity" in (settings or own) else {"rate": 0.5}),
    }
    e = vary({f"runs.s-{n}": {"title": "S", "method": "sparse", **expert, "iterations": n} for n in steps})
    return e, e.runs[f"s-{steps[0]}"].experts[0].key


RECYCLE = {"method": "recycle", "interval": 4, "end": 12, "schedule": "constant"}


@pytest.mark.parametrize(
    ("settings", "at"), [({}, 7), (RECYCLE, 5)]
)  # 7: amid the gradients of the update at 8
def test_a_killed_sparse_training_ends_with_the_same_bits(workspace, vary, monkeypatch, capsys, settings, at):
    e, key = sparse(vary, 14, **settings)
    finetune_region(e, key, "14", 0, CPU)
    through = tensors_of(milestone(key, 14))
    shutil.rmtree("results")
    interrupted(e, monkeypatch, at, lambda cut: finetune_region(cut, key, "14", 0, CPU))
    finetune_region(e, key, "14", 0, CPU)
    assert f"going on from step {at}" in capsys.readouterr().out
    assert same(tensors_of(milestone(key, 14)), through)


def test_two_milestones_of_a_sparse_expert_are_one_long_training(workspace, vary):
    both, key = sparse(vary, 6, 14)
    finetune_region(both, key, "6", 0, CPU)
    finetune_region(both, key, "14", 0, CPU)
    chained = tensors_of(milestone(key, 14))
    shutil.rmtree("results")
    one, _ = sparse(vary, 14)
    finetune_region(one, key, "14", 0, CPU)
    assert same(tensors_of(milestone(key, 14)), chained)


# --- what it costs ------------------------------------------------------------------------------------------


def test_training_flops_by_hand():
    """Of RigL at dT = 100, f_S = 30 and f_D = 100: (3 * 30 * 100 + 2 * 30 + 100) / 101."""
    assert training_flops(30, 100) == 90
    dense = RigLConfig(sparsity=0.7, interval=100, end=400).dense_gradients
    assert training_flops(30, 100, dense) == pytest.approx((3 * 30 * 100 + 2 * 30 + 100) / 101)
    twice = RigLConfig(sparsity=0.7, interval=100, end=400, accumulate=2).dense_gradients
    assert training_flops(30, 100, twice) == pytest.approx((3 * 30 * 99 + 2 * (2 * 30 + 100)) / 101)
    assert MagRanConfig(sparsity=0.7, end=400).dense_gradients == Recycle(end=400).dense_gradients == 0


def test_zeros_are_left_out_of_parameters_and_macs_layer_by_layer(vary):
    """By hand, 8 channels at 8x8 and 4x4: a 3x3 convolution is applied at every pixel, temb_proj once."""
    uniform = {"method": "static", "sparsity": 0.5, "distribution": "uniform"}
    rigl = {"method": "rigl", "sparsity": 0.5, "distribution": "uniform", "interval": 4, "end": 12}
    run = {"title": "S", "method": "sparse", "init": "fresh", "iterations": 20}
    e = vary({
        "network.middle_attention": False,
        "runs.s": {**run, "sparse": uniform}, "runs.r": {**run, "sparse": rigl},
        "runs.c": {**run, "rate": 0.5, "sparse": {**RECYCLE, "end": 12}},
    })  # fmt: skip
    networks = counts(e)
    dense, (s, r, c) = networks["dense"], sparse_counts(e, networks).values()
    square = 8 * 8 * 9
    # Down: a block at 8, a halving to 4 and a block there. Middle: two blocks at 4. Up: two blocks at 4, a
    # doubling to 8, two blocks there. A block has two convolutions and a projection of 32 numbers; on the
    # way up the first convolution has twice the inputs, and there is a 1x1 shortcut.
    at8, at4 = 2 * square, (1 + 2 + 4) * square
    wide, shortcut, proj = 2 * square, 16 * 8, 8 * 32
    at8 += 2 * (wide + square + shortcut) + square
    at4 += 2 * (wide + square + shortcut)
    weights = at8 + at4 + 8 * proj
    assert s["params"] == dense["params"] - weights / 2
    assert s["macs"] == dense["macs"] - (64 * at8 + 16 * at4 + 8 * proj) / 2
    assert s["training_flops"] == 6 * s["macs"]
    assert r["macs"] == s["macs"]
    assert r["training_flops"] == pytest.approx((6 * s["macs"] * 4 + 4 * s["macs"] + 2 * dense["macs"]) / 5)
    assert {k: c[k] for k in ("params", "macs")} == {k: networks["0.5"][k] for k in ("params", "macs")}


@pytest.mark.slow
def test_sparse_steps_are_timed_with_their_masks(workspace, vary):
    run = {"title": "S", "method": "sparse", "init": "fresh", "iterations": 20}
    e = vary({
        f"runs.s{i}": {**run, "sparse": {"method": "static", "sparsity": s}} for i, s in enumerate((0.5, 0.9))
    })  # fmt: skip
    cost = measure_cost(e, CPU)
    one, other = cost["sparse"].values()
    assert one["step_ms"] == other["step_ms"] > 0
    assert one["macs"] > other["macs"]
    assert {x.costs for x in e.experts().values() if x.sparse} == cost["sparse"].keys()


# --- recycling ----------------------------------------------------------------------------------------------

TALL = unet(8, 1, width=16, multipliers=(1, 1), blocks=1, attention=(4,), dropout=0.0, norm_groups=4)


@cache
def template():
    return store.fresh(TALL, 0, "small", meta_tensors(TALL, 0.5))


def small():
    """A pruned network in training, its recycling, and the example it is judged by."""
    state = State.start(deepcopy(template()), Runtime(CPU))
    torch.manual_seed(0)
    for kind in ("m", "v", "ema"):
        getattr(state, kind).copy_(torch.rand_like(state.raw))
    state.raw.mul_(2)  # norms other than the identity too
    own = Recycling(Recycle(interval=1, end=10), SimpleNamespace(seed=0, name="test"))
    own.begin(state)
    x, _, cond = state.network.example(3)
    return state, own, (torch.randn(x.shape), torch.tensor([3, 500, 999]), cond)


def silenced(network, groups, chosen):
    """The network with nothing listening to some channels, in place: columns, and keys' rows."""
    with torch.no_grad():
        for group, gone in zip(groups, chosen, strict=True):
            for m in group.members:
                places = np.arange(m.width)[m.channels][gone.numpy()[m.roots]]
                layer = network.get_submodule(m.weight.removesuffix(".weight"))
                if m.side == "in":
                    layer.weight[:, places] = 0
                if m.side == "out" and m.weight.endswith(".k.weight"):
                    layer.weight[places] = 0
                    layer.bias[places] = 0


def straddled(groups, chosen):
    """Whether some norm's group holds channels that go beside others that stay."""
    gone = {}
    for group, part in zip(groups, chosen, strict=True):
        for m in (m for m in group.members if m.side == "norm"):
            whole = gone.setdefault(m.weight, np.zeros(m.width, bool))
            whole[np.arange(m.width)[m.channels]] |= part.numpy()[m.roots]
    return any(len(set(block)) > 1 for whole in gone.values() for block in whole.reshape(4, -1))


def test_the_groups_of_a_small_network_fit_its_layers():
    state, own, _ = small()
    for group in own.groups:
        assert group.width == 8 or group.width == 32
        for m in group.members:
            shape = state.view("raw")[m.weight].shape
            assert m.width == shape[1 if m.side == "in" else 0]
            assert sorted(set(m.roots)) == list(range(group.width))
    sides = {(m.weight, m.side) for group in own.groups for m in group.members}
    whole = {(m.weight, m.side): set() for group in own.groups for m in group.members}
    for group in own.groups:
        for m in group.members:
            whole[m.weight, m.side] |= set(np.arange(m.width)[m.channels])
    assert len(sides) > 40
    assert all(seen == set(range(max(seen) + 1)) for seen in whole.values())


def outputs(chosen):
    """What a network computes with some channels silenced, and once they are recycled."""
    state, own, example = small()
    silenced(state.network, own.groups, chosen)
    with torch.no_grad():
        expected = state.network(*example)
    state, own, _ = small()
    own.recycle(state, chosen)
    with torch.no_grad():
        return expected, state.network(*example)


def test_recycled_channels_are_silent_exactly_where_no_norm_straddles_them():
    """Of one group after the other its first norm group; then half of all groups at once.

    A norm of a concatenation has twice as large groups: one of the first holds a norm group that stays, too.
    """
    groups, whole = small()[1].groups, []
    first = [least_important(group, {}, 0.25) for group in groups]
    for i, group in enumerate(groups):
        own = [c if j == i else torch.zeros_like(c) for j, c in enumerate(first)]
        whole.append(not straddled(groups, own))
        assert torch.equal(*outputs(own)) == whole[-1], group.name
    assert len(whole) / 2 < sum(whole) < len(whole)
    half = [least_important(group, {}, 0.5) for group in groups]
    assert not straddled(groups, half)
    assert torch.equal(*outputs(half))


def test_what_recycling_touches_and_with_what():
    """Of one group: rows anew by the layer's law, by seed and step; columns, moments zero; the average."""
    state, own, _ = small()
    i = next(k for k, g in enumerate(own.groups) if g.name == "down.0.block.0.conv1")
    before = {kind: {n: t.clone() for n, t in state.view(kind).items()} for kind in SAVED}
    chosen = [torch.zeros(group.width, dtype=torch.bool) for group in own.groups]
    chosen[i][2:4] = True
    state.step = 7
    own.recycle(state, chosen)
    block = "down.0.block.0"
    rows = {f"{block}.{n}" for n in ("conv1.weight", "conv1.bias", "temb_proj.weight", "temb_proj.bias",
                                     "norm2.weight", "norm2.bias")}  # fmt: skip
    for name, raw in state.view("raw").items():
        own_rows, columns = name in rows, name == f"{block}.conv2.weight"
        touched = torch.zeros_like(raw, dtype=torch.bool)
        if own_rows:
            touched[2:4] = True
        if columns:
            touched[:, 2:4] = True
        for kind in SAVED:
            assert torch.equal(state.view(kind)[name][~touched], before[kind][name][~touched])
        assert (state.view("m")[name][touched] == 0).all()
        assert (state.view("v")[name][touched] == 0).all()
        assert torch.equal(state.view("ema")[name][touched], raw[touched])
    view = state.view("raw")
    assert (view[f"{block}.conv2.weight"][:, 2:4] == 0).all()
    assert (view[f"{block}.norm2.weight"][2:4] == 1).all()
    fresh, bound = view[f"{block}.conv1.weight"][2:4], (8 * 9) ** -0.5
    assert fresh.abs().max() <= bound
    assert fresh.std() == pytest.approx(bound / 3**0.5, rel=0.2)
    again, other, _ = small()
    again.step = 7
    other.recycle(again, chosen)
    assert torch.equal(again.raw, state.raw)
    again, other, _ = small()
    other.recycle(again, chosen)
    assert not torch.equal(again.raw, state.raw)  # another step, other draws


def test_the_least_important_norm_groups_go():
    state, own, _ = small()
    group = next(g for g in own.groups if g.name == "down.0.block.0.conv1")
    weights = {n: w.detach().double().numpy() for n, w in state.view("raw").items()}
    worth = [
        sum(
            (
                weights[m.weight].take(np.arange(m.width)[m.channels][m.roots == c], int(m.side == "in")) ** 2
            ).sum()
            for m in group.members
            if m.side != "norm"
        )
        for c in range(8)
    ]
    blocks = np.array(worth).reshape(4, 2).sum(1)
    for share, n in ((0.24, 0), (0.25, 1), (0.5, 2), (0.74, 2)):
        gone = least_important(group, magnitude(state.view("raw")), share).numpy()
        assert set(np.flatnonzero(gone) // 2) == set(np.argsort(blocks)[:n])
        assert gone.sum() == 2 * n


# --- bad input ----------------------------------------------------------------------------------------------

MAGRAN = {"method": "magran", "sparsity": 0.5, "end": 10, "interval": 5}


@pytest.mark.parametrize(
    ("expert", "named"),
    [
        *[({"sparse": {**MAGRAN, "sparsity": s}}, "sparse: magran.sparsity: ") for s in (0, 1, -0.5, True)],
        ({"sparse": {"sparsity": 0.5}}, "sparse: give its `method`: static, magran, rigl, recycle"),
        ({"sparse": {**MAGRAN, "method": "rigle"}}, "method 'rigle' is not known; did you mean 'rigl'"),
        ({"sparse": {**MAGRAN, "intervall": 5}}, "unknown key; 'intervall' is not known; did you"),
        ({"sparse": {**MAGRAN, "interval": 11}}, "interval 11 is longer than training up to end 10"),
        ({"sparse": {**MAGRAN, "interval": 41, "end": 90}},
         "runs.s.sparse.interval 41 is longer than the training of 40 steps"),
        ({"sparse": {**MAGRAN, "method": "rigl", "accumulate": 6}}, "accumulate 6 is longer than interval 5"),
        ({"sparse": {"method": "static", "sparsity": 0.5, "interval": 5}}, "static.interval: unknown key"),
        ({"sparse": RECYCLE}, "give a rate"),
        ({"sparse": MAGRAN, "init": "dense"}, "isn't the unpruned one"),
        ({"rate": 0.5}, "method sparse means experts with `sparse`"),
        ({"sparse": "rigl"}, "runs.s.experts.0.sparse"),
    ],
)  # fmt: skip
def test_bad_sparse_settings_are_one_line(vary, expert, named):
    run = {"title": "S", "method": "sparse", "init": "fresh", "iterations": 40, **expert}
    with pytest.raises(UserError) as error:
        vary({"runs.s": run})
    assert str(error.value).startswith("tiny.yaml: runs.s")
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_layer_is_one_line(tiny):
    network = store.fresh(tiny.architecture, 0, "x")
    with pytest.raises(
        UserError, match=r"^sparse.sparsity 0.999 with distribution uniform leaves nothing of "
    ):
        Masks.nonzeros(Static(sparsity=0.999, distribution="uniform"), network)
