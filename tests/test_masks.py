"""Masks against a slow literal implementation that really prunes, group after group."""

import copy
import json
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from conftest import ROOT, unet
from torch import nn

from ebdiff.data.dataset import UNCONDITIONAL, Batch, Cond
from ebdiff.diffusion.process import Process
from ebdiff.experiment import load
from ebdiff.experiment.members import Architecture
from ebdiff.experiment.schema import Diffusion, Pruning
from ebdiff.nets import store
from ebdiff.nets.unet import UNet, timestep_embedding
from ebdiff.pruning.graph import mask_length, trace
from ebdiff.pruning.importance import accumulate_gradients, first_order, magnitude
from ebdiff.pruning.select import Selector, pruned_count, realised_rate, select, select_random, widths
from ebdiff.pruning.surgery import cut

RATES = (0.3, 0.5, 0.6, 0.8)
EARLY = 0.993  # threshold under which the sum of Diff-Pruning ends on the way here
CRITERIA = ("magnitude", "taylor", "diff-pruning")
SMALL = unet(16, width=32, multipliers=(1, 2, 2), attention=(8,), norm_groups=8, dropout=0)
# The roots of the groups in the order in which the official code thins them, measured with it.
OFFICIAL = json.loads((Path(__file__).parent / "group_order.json").read_text())


def official_block(block, x, temb):
    h = block.conv1(F.silu(block.norm1(x)))
    h = h + block.temb_proj(F.silu(temb))[:, :, None, None]
    h = block.conv2(F.silu(block.norm2(h)))
    shortcut = block.nin_shortcut(x) if hasattr(block, "nin_shortcut") else x
    return shortcut + h


def official_attention(attn, x):
    b, c, height, width = x.shape
    h = attn.norm(x)
    q, k, v = (layer(h).reshape(b, c, height * width) for layer in (attn.q, attn.k, attn.v))
    weights = F.softmax(torch.bmm(q.permute(0, 2, 1), k) * c**-0.5, dim=2)
    h = torch.bmm(v, weights.permute(0, 2, 1)).reshape(b, c, height, width)
    return x + attn.proj_out(h)


def official_forward(network, x, t, cond=None):
    """The U-Net as the official code writes it; its graph decides the order of the groups."""

    def step(level, i, x):
        x = official_block(level.block[i], x, temb)
        return official_attention(level.attn[i], x) if len(level.attn) else x

    temb = timestep_embedding(t, network.config.width).to(x.dtype)
    temb = network.temb.dense[1](F.silu(network.temb.dense[0](temb)))
    skips = [network.conv_in(x)]
    for level in network.down:
        for i in range(len(level.block)):
            skips.append(step(level, i, skips[-1]))
        if hasattr(level, "downsample"):
            skips.append(level.downsample(skips[-1]))
    h = official_block(network.mid.block_1, skips[-1], temb)
    if hasattr(network.mid, "attn_1"):
        h = official_attention(network.mid.attn_1, h)
    h = official_block(network.mid.block_2, h, temb)
    for level in reversed(network.up):
        for i in range(len(level.block)):
            h = step(level, i, torch.cat([h, skips.pop()], dim=1))
        if hasattr(level, "upsample"):
            h = level.upsample(h)
    return network.conv_out(F.silu(network.norm_out(h)))


def official_graph(network):
    """The dependencies of the official form of a network, and its groups one after the other."""
    side = 2 ** len(network.config.multipliers)  # groups don't depend on it
    example = torch.zeros(1, network.items.shape[0], side, side), torch.zeros(1)
    graph = tp.DependencyGraph().build_dependency(
        network, example, forward_fn=lambda network, example: official_forward(network, *example)
    )
    types = [nn.Conv2d, nn.Linear]
    return graph, graph.get_all_groups(ignored_layers=[network.conv_out], root_module_types=types)


def magnitudes(layer, dimension):
    """Sum of squared weights of each channel; norms count for nothing."""
    if isinstance(layer, nn.GroupNorm):
        return None
    return layer.weight.data.transpose(0, dimension).flatten(1).square().sum(1)


def taylor(layer, dimension):
    """Sum of (w dw)^2 of each channel, and |w dw| of norm gains."""
    product = layer.weight.data * layer.weight.grad
    if isinstance(layer, nn.GroupNorm):
        return product.abs()
    return product.transpose(0, dimension).flatten(1).square().sum(1)


def literal(network, rate, score, norm_groups, gradients=None):
    """Walk the groups, rank channels on the weights still there, prune, go on. Returns mask, network."""
    network = copy.deepcopy(network)
    graph, groups = official_graph(network)
    network.double()
    for name, gradient in (gradients or {}).items():
        network.get_parameter(name).grad = gradient.clone()
    masks = []
    for group in groups:
        root = group[0].dep.target.module
        channels = root.weight.shape[0]
        vectors, has_norm = [], False
        for item in group:
            layer = item.dep.target.module
            has_norm |= isinstance(layer, nn.GroupNorm)
            if not isinstance(layer, nn.Conv2d | nn.Linear | nn.GroupNorm):
                continue
            out = isinstance(layer, nn.GroupNorm) or graph.is_out_channel_pruning_fn(item.dep.handler)
            vector = score(layer, 0 if out else 1)
            if vector is not None:
                vectors.append(vector[item.idxs])
        same = [v for v in vectors if len(v) == len(vectors[0])]
        importance = torch.stack(same).sum(0).numpy()

        n = channels - int(channels * (1 - rate))
        blocks = norm_groups if has_norm else 1
        k, block = n // blocks, channels // blocks
        pruned = [
            b * block + int(i) for b in range(blocks) for i in np.argsort(importance[b * block :][:block])[:k]
        ]
        mask = np.ones(channels, bool)
        mask[pruned] = False
        masks.append(mask)
        if pruned:
            graph.get_pruning_group(root, group[0].dep.handler, sorted(pruned)).prune()
    return np.concatenate(masks), network.float()


def trained_like(architecture, seed):
    """Weights whose channels differ in size as trained ones do, and some gradients."""
    network = store.fresh(architecture, seed, "test")
    rng = np.random.default_rng(seed)
    for parameter in network.parameters():
        scale = rng.uniform(0.5, 1.5, parameter.shape)
        parameter.data *= torch.from_numpy(scale).float()
    return network


def noisy_images(architecture, count=2):
    shape = (count, *architecture.items.shape)
    return torch.from_numpy(np.random.default_rng(5).standard_normal(shape, np.float32))


@pytest.fixture(scope="module")
def small():
    return trained_like(SMALL, 0)


def described(groups):
    """Names and couplings of torch-pruning's groups: {(layer, outputs?, its channel, the root's)}."""
    found = []
    for group in groups:
        names = group._DG._module2name
        found.append((names[group[0].dep.target.module], {
            (names[module], group._DG.is_out_channel_pruning_fn(item.dep.handler), channel, root)
            for item in group
            if isinstance(module := item.dep.target.module, nn.Conv2d | nn.Linear | nn.GroupNorm)
            for channel, root in zip(item.idxs, item.root_idxs, strict=True)
        }))  # fmt: skip
    return found


def ours_described(groups):
    return [
        (group.name, {
            (m.weight.removesuffix(".weight"), m.side != "in", channel, root)
            for m in group.members
            for channel, root in zip(np.arange(m.width)[m.channels], m.roots, strict=True)
        })
        for group in groups
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "order"),
    [("cifar10", "cifar10"), ("celeba", "celeba"), ("lsun_bedroom", "lsun"), ("lsun_church", "lsun")],
)
def test_groups_of_the_presets_come_in_the_official_order(preset, order):
    groups = trace(load.load(preset, ROOT / "config/experiments").architecture)
    assert [group.name for group in groups] == OFFICIAL[order]


@pytest.mark.parametrize("seed", range(10))
def test_groups_of_any_network_are_those_of_the_official_form_in_its_order(seed):
    architecture = any_unet(random.Random(seed))
    _, groups = official_graph(UNet(*architecture))
    assert ours_described(trace(architecture)) == described(groups)


def any_unet(draw):
    smallest, levels = draw.choice([2, 4]), draw.randint(1, 4)
    sides = [smallest << level for level in reversed(range(levels))]
    return unet(
        sides[0],
        draw.choice([1, 3]),
        width=draw.choice([8, 16]),
        multipliers=tuple(draw.randint(1, 4) for _ in sides),
        blocks=draw.randint(1, 3),
        attention=tuple(side for side in sides if draw.random() < 0.4),
        middle_attention=draw.random() < 0.6,
        norm_groups=draw.choice([4, 8]),
    )


def test_neither_another_way_of_writing_forward_nor_of_tracing_moves_the_order(monkeypatch):
    traced = tp.DependencyGraph._trace

    def backwards(*args, **kwargs):
        return dict(reversed(traced(*args, **kwargs).items()))

    monkeypatch.setattr(UNet, "forward", official_forward)
    monkeypatch.setattr(tp.DependencyGraph, "_trace", backwards)
    again = trace.__wrapped__(SMALL)
    monkeypatch.undo()
    assert ours_described(again) == ours_described(trace(SMALL))


@pytest.fixture(scope="module")
def gradients(small):
    """Of each gradient criterion: ours, and those summed literally through the official form."""
    x0, noise = torch.from_numpy(np.random.default_rng(5).standard_normal((2, 4, *SMALL.items.shape)))
    network, process = copy.deepcopy(small).double(), Process(Diffusion())
    found = {}
    for criterion, threshold in (("taylor", 0.0), ("diff-pruning", EARLY)):
        official, used = literal_gradients(
            network, partial(official_forward, network), x0, noise, process.abar, 100, threshold
        )
        ours, steps = accumulate_gradients(
            network, Batch(x0, UNCONDITIONAL), noise, process, Pruning(stride=100, threshold=EARLY),
            stop_early=criterion == "diff-pruning",
        )  # fmt: skip
        assert steps == used == (10 if criterion == "taylor" else 4)
        found[criterion] = ours, official
    return found


def same_outputs(architecture, network, mask, pruned):
    tensors = {n: p.detach() for n, p in network.named_parameters()}
    smaller = store.build(architecture, cut(architecture, tensors, mask)).eval()
    x, t = noisy_images(architecture), torch.tensor([0, 990])
    with torch.no_grad():
        ours, theirs = smaller(x, t), pruned.eval()(x, t)
    assert theirs.abs().mean() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_masks_and_surgery_are_those_of_the_literal_walk(small, gradients, criterion, rate):
    if criterion == "magnitude":
        scores, official, literal_score = magnitude(dict(small.named_parameters())), None, magnitudes
    else:
        ours, official = gradients[criterion]
        scores, literal_score = first_order(small, ours), taylor
    mask = select(trace(SMALL), scores, rate)
    expected, pruned = literal(small, rate, literal_score, SMALL.config.norm_groups, official)
    np.testing.assert_array_equal(mask, expected)
    same_outputs(SMALL, small, mask, pruned)


@pytest.mark.parametrize("rate", RATES)
def test_classes_are_pruned_with_the_time_embedding(rate):
    """Told one class, a network computes what one without classes does, and so do both pruned alike."""
    told = Architecture(SMALL.config, SMALL.items._replace(classes=1))
    network, label = trained_like(told, 0), Cond(torch.zeros(2, dtype=torch.long))
    groups, plain = trace(told), trace(SMALL)
    assert [(g.name, g.width, g.norm_groups) for g in groups] == [
        (g.name, g.width, g.norm_groups) for g in plain
    ]
    mask = select(groups, magnitude(dict(network.named_parameters())), rate)
    tensors = {n: p.detach() for n, p in network.named_parameters()}
    folded = {n: p.clone() for n, p in tensors.items() if n != "temb.label.weight"}
    folded["temb.dense.1.bias"] += tensors["temb.label.weight"][:, 0]
    ours = store.build(told, cut(told, tensors, mask)).eval()
    theirs = store.build(SMALL, cut(SMALL, folded, mask)).eval()
    x, t = noisy_images(SMALL), torch.tensor([0, 990])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, label), theirs(x, t), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.5, 0.3])
def test_masks_of_the_cifar_network_are_those_of_the_literal_walk(rate):
    large = unet(dropout=0)
    network = trained_like(large, 1)
    mask = select(trace(large), magnitude(dict(network.named_parameters())), rate)
    expected, pruned = literal(network, rate, magnitudes, 32)
    np.testing.assert_array_equal(mask, expected)
    same_outputs(large, network, mask, pruned)


def test_masks_of_several_rates_at_once_are_those_of_one_after_the_other(small):
    groups, scores = trace(SMALL), magnitude(dict(small.named_parameters()))
    together = Selector(groups, RATES)(scores)
    assert together.shape == (len(RATES), mask_length(groups))
    for mask, rate in zip(together, RATES, strict=True):
        np.testing.assert_array_equal(mask, select(groups, scores, rate))


def test_masks_do_not_depend_on_how_weights_lie_in_memory(small):
    tensors = dict(small.named_parameters())
    inner = {n: p.to(memory_format=torch.channels_last) if p.dim() == 4 else p for n, p in tensors.items()}
    assert any(not p.is_contiguous() for p in inner.values())
    selector = Selector(trace(SMALL), RATES)
    np.testing.assert_array_equal(selector(magnitude(inner)), selector(magnitude(tensors)))


def test_earlier_groups_thin_the_importances_of_later_ones(small):
    """The walk matters: ranking every group on the dense weights gives another mask."""
    groups, scores = trace(SMALL), magnitude(dict(small.named_parameters()))
    alone = np.concatenate([select((group,), scores, 0.5) for group in groups])
    assert (alone != select(groups, scores, 0.5)).any()


@pytest.mark.parametrize(
    ("width", "percents"),
    [(128, (25, 25, 50, 50, 50, 75, 75)), (256, (25, 37.5, 50, 50, 62.5, 75, 87.5))],
)
def test_realised_rates_under_32_norm_groups(width, percents):
    rates = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert [100 * pruned_count(width, r, 32) / width for r in rates] == list(percents)


def test_realised_rates_without_a_norm():
    assert [pruned_count(256, 0.3, None), pruned_count(512, 0.3, None)] == [77, 154]


def test_random_masks_have_the_sizes_of_any_other_and_differ(small):
    groups, scores = trace(SMALL), magnitude(dict(small.named_parameters()))
    for rate in RATES:
        first = select_random(groups, np.random.default_rng(0), rate)
        again = select_random(groups, np.random.default_rng(0), rate)
        other = select_random(groups, np.random.default_rng(1), rate)
        np.testing.assert_array_equal(first, again)
        assert (first != other).mean() > 0.1
        assert widths(groups, first) == widths(groups, other) == widths(groups, select(groups, scores, rate))


def test_masks_of_differently_initialised_networks_differ():
    masks = []
    for seed in (0, 1):
        tensors = dict(store.fresh(SMALL, seed, "test").named_parameters())
        masks.append(select(trace(SMALL), magnitude(tensors), 0.5))
    assert (masks[0] != masks[1]).mean() > 0.3
    assert realised_rate(masks[0]) == pytest.approx(1 - masks[0].sum() / len(masks[0]))


def test_a_mask_of_another_network_is_refused(small):
    tensors = {n: p.detach() for n, p in small.named_parameters()}
    with pytest.raises(ValueError, match=str(mask_length(trace(SMALL)))):
        cut(SMALL, tensors, np.ones(7, bool))


def literal_gradients(network, forward, x0, noise, abar, stride, threshold):
    """Diff-Pruning's sum of gradients, timestep by timestep; threshold 0 never stops."""
    total, largest, used = {n: torch.zeros_like(p) for n, p in network.named_parameters()}, 0.0, 0
    for t in range(0, len(abar), stride):
        network.zero_grad()
        x = np.sqrt(abar[t]) * x0 + np.sqrt(1 - abar[t]) * noise
        loss = ((forward(x.to(x0), torch.full((len(x0),), t)) - noise) ** 2).sum() / len(x0)
        largest = max(largest, loss.item())
        if loss.item() < threshold * largest:
            break
        loss.backward()
        used += 1
        for n, p in network.named_parameters():
            total[n] += p.grad
    return total, used


class Echo(nn.Module):
    """Predicts a multiple of its input: the more of it is noise, the smaller the loss."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.9, 0.8])[:, None, None])

    def forward(self, x, t, cond=None):
        return self.weight * x


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("stop_early", [False, True])
def test_gradients_are_summed_over_strided_timesteps_until_the_loss_has_fallen(stop_early, micro_batch):
    draws = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 4, 2, 8, 8), np.float32))
    x0, noise = draws
    pruning, process = Pruning(stride=100, threshold=0.3), Process(Diffusion())
    echo = Echo()
    expected, used = literal_gradients(echo, echo, x0, noise, process.abar, 100, 0.3 if stop_early else 0)
    found, steps = accumulate_gradients(
        Echo(), Batch(x0, UNCONDITIONAL), noise, process, pruning,
        stop_early=stop_early, micro_batch=micro_batch,
    )  # fmt: skip
    assert steps == used
    assert 1 < steps < 9 if stop_early else steps == 10
    torch.testing.assert_close(found["weight"], expected["weight"], rtol=1e-4, atol=1e-4)
