"""Latent Diffusion's networks against diffusers' own computation and the published sizes."""

import hashlib
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ebdiff.data.dataset import UNCONDITIONAL, Batch, Cond
from ebdiff.diffusion.process import Process
from ebdiff.experiment.members import (
    Architecture,
    Items,
    LatentConditionalConfig,
    LatentUNetConfig,
    UNetConfig,
)
from ebdiff.experiment.schema import Diffusion, Pruning
from ebdiff.experiment.sparsity import Masked
from ebdiff.nets import denoiser, store
from ebdiff.nets.checkpoints import load_checkpoint
from ebdiff.nets.execution import NORMS
from ebdiff.pruning.count import count, meta_tensors
from ebdiff.pruning.graph import mask_length, split, trace
from ebdiff.pruning.importance import accumulate_gradients, first_order, magnitude
from ebdiff.pruning.select import select
from ebdiff.pruning.surgery import cut, groups_left
from ebdiff.sparse import Masks
from ebdiff.system.errors import UserError

CLASSES = 5
SIZES = dict(width=32, multipliers=(1, 2), blocks=1, attention=(4,), norm_groups=8)
PLAIN = Architecture(LatentUNetConfig(head_dim=16, **SIZES), Items((3, 8, 8)))
TOLD = Architecture(LatentConditionalConfig(heads=2, context=12, **SIZES), Items((4, 8, 8), CLASSES))
BEDROOM = Architecture(LatentUNetConfig(), Items((3, 64, 64)))
IMAGENET = Architecture(LatentConditionalConfig(), Items((3, 64, 64), 1000))
EMBEDDED = 1001 * 512  # the class embeddings, which the published counts leave out
BOTH = pytest.mark.parametrize("it", [PLAIN, TOLD], ids=["plain", "told"])


def inputs(it, n=3):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((n, *it.items.shape), np.float32))
    cond = Cond(torch.tensor([0, 3, CLASSES])[:n]) if it.items.classes else UNCONDITIONAL
    return x, torch.tensor([0, 17, 999])[:n], cond


def diffusers_own(network, x, t, cond):
    """As the library computes it, with attention written out: that keeps the scale of the dense network."""
    from diffusers.models.attention_processor import AttnProcessor

    for layer in network.unet.modules():
        if hasattr(layer, "set_processor"):
            layer.set_processor(AttnProcessor())
        if hasattr(layer, "use_conv") and hasattr(layer, "conv"):
            layer.channels = layer.conv.in_channels
    told = [] if cond.label is None else [network.classes.weight[cond.label][:, None]]
    return network.unet(x, t, *told).sample


def pruned(it, rate=0.5):
    tensors = {n: t.detach() for n, t in store.fresh(it, 0, "test").state_dict().items()}
    groups = trace(it)
    return tensors, groups, select(groups, magnitude(tensors), rate)


def removed(member, gone):
    """Where along its dimension a member loses channels."""
    return torch.from_numpy(np.arange(member.width)[member.channels][gone[member.roots]])


# --- what it computes -------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("rate", [0, 0.5])
def test_it_is_diffusers_own_network_dense_and_pruned(it, rate):
    tensors, _, mask = pruned(it)
    network = store.build(it, cut(it, tensors, mask) if rate else tensors).eval()
    x, t, cond = inputs(it)
    with torch.no_grad():
        found = network(x, t, cond)
        torch.testing.assert_close(found, diffusers_own(network, x, t, cond), rtol=1e-4, atol=1e-5)
    assert found.shape == x.shape


@torch.no_grad()
def test_a_class_is_heard_and_the_one_after_the_last_stands_for_none():
    network = store.fresh(TOLD, 0, "test").eval()
    x, t, cond = inputs(TOLD)
    assert network.null(cond).label.tolist() == [CLASSES] * 3
    found, silent = network(x, t, cond), network(x, t, network.null(cond))
    assert torch.equal(found[2], silent[2])
    assert (found[:2] - silent[:2]).abs().amax((1, 2, 3)).min() > 1e-5


@BOTH
def test_no_value_is_read_back(it):
    """Where there are none: a graph can be captured of it."""
    with torch.device("meta"):
        network = denoiser.build(*it)
    assert network(*(network.example(2))).shape == (2, *it.items.shape)


@BOTH
@torch.no_grad()
def test_in_bf16_it_is_nearly_the_same(it):
    """Under autocast, on halves with fp32 norms, and cast as a whole."""
    network = store.fresh(it, 0, "test").eval()
    arguments = inputs(it)
    strict = network(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = [network(*arguments)]
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter if isinstance(module, NORMS) else parameter.bfloat16()
    found += [network(*arguments), network.to(torch.bfloat16)(*arguments)]
    for eps in found:
        assert eps.dtype == torch.float32
        assert (eps - strict).abs().max() < 0.05 * strict.abs().max()


# --- sizes ------------------------------------------------------------------------------------------------


def test_parameters_are_the_published_networks_to_the_last_digit():
    for it, expected in ((BEDROOM, 274_056_163), (IMAGENET, 400_920_579 + EMBEDDED)):
        assert sum(t.numel() for t in meta_tensors(it, 0).values()) == expected


@pytest.mark.slow
def test_imagenets_pruned_sizes_are_the_papers():
    """Measured with the reference's pruning library, whose GEGLUs vary with their weights; and as printed."""
    sizes = {rate: count(IMAGENET, meta_tensors(IMAGENET, rate)) for rate in (0.3, 0.5, 0.6, 0.8)}
    millions = {rate: (size.params - EMBEDDED) / 1e6 for rate, size in sizes.items()}
    giga = {rate: size.macs / 1e9 for rate, size in sizes.items()}
    share = {0.3: 0.24, 0.6: 0.20, 0.8: 0.56}
    experts = [sum(w * of[rate] for rate, w in share.items()) for of in (millions, giga)]
    assert (millions[0.3], giga[0.3]) == pytest.approx((189.307, 52.702), rel=1e-3)
    assert (millions[0.5], giga[0.5]) == pytest.approx((91.226, 23.082), rel=3e-3)
    assert experts == pytest.approx([66.62, 19.39], rel=1e-3)
    assert (millions[0.5], giga[0.5]) == pytest.approx((92.8, 141.7 / 6), rel=0.025)
    assert experts == pytest.approx([67.0, 117.3 / 6], rel=0.025)


@pytest.mark.slow
@pytest.mark.parametrize(("it", "known"), [(BEDROOM, "e2665786d082a882"), (IMAGENET, "247050c55bbc01d5")])
def test_no_library_changes_the_order_of_the_groups(it, known):
    names = "\n".join(group.name for group in trace(it))
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == known


# --- groups -----------------------------------------------------------------------------------------------


@BOTH
def test_a_pruned_network_is_the_dense_one_with_those_channels_silenced(it):
    """Without groups that a norm reads: it would see others' statistics."""
    tensors, groups, mask = pruned(it)
    silent = {n: t.clone() for n, t in tensors.items()}
    count = 0
    for group, part in zip(groups, split(groups, mask), strict=True):
        if any(m.side == "norm" for m in group.members):
            part[:] = True
        for m in group.members:
            gone = removed(m, ~part)
            count += len(gone)
            if m.side == "in":
                silent[m.weight][:, gone] = 0
            else:
                silent[m.weight][gone] = 0
                silent.get(m.weight.replace("weight", "bias"), torch.zeros(m.width))[gone] = 0
    small, dense = (store.build(it, x).eval() for x in (cut(it, tensors, mask), silent))
    with torch.no_grad():
        torch.testing.assert_close(small(*inputs(it)), dense(*inputs(it)), rtol=1e-4, atol=1e-5)
    assert count > 500 and mask.mean() < 0.9


@BOTH
def test_every_head_keeps_as_many_channels_and_none_is_lost(it):
    _, groups, mask = pruned(it, rate=0.8)
    parts = {g.name: (g, part) for g, part in zip(groups, split(groups, mask), strict=True)}
    attending = [pair for name, pair in parts.items() if name.rpartition(".")[2] in ("to_q", "to_k", "to_v")]
    assert len(attending) == (4 if it is PLAIN else 8)
    for group, part in attending:
        heads = 64 // 16 if it is PLAIN else 2
        layers = {m.weight.split(".")[-2] for m in group.members if m.side == "out"}
        assert group.norm_groups == heads and layers == {"to_q", "to_k", "to_v"}
        kept = part.reshape(heads, -1).sum(axis=1)
        assert kept.min() == kept.max() == 64 // heads - 52 // heads  # n = 64 - int(64 * 0.2) = 52


def test_gated_halves_go_together_and_as_often_as_either_would():
    tensors, _, mask = pruned(TOLD, rate=0.3)
    small = cut(TOLD, tensors, mask)
    name = "unet.mid_block.attentions.0.transformer_blocks.0."
    assert small[f"{name}ff.net.0.value.weight"].shape[0] == small[f"{name}ff.net.0.gate.bias"].shape[0]
    assert small[f"{name}ff.net.2.weight"].shape == (44, 125)  # int(64 * 0.7), int(256 * 0.7^2)
    assert [len(small[f"{name}norm{i}.weight"]) for i in (1, 2, 3)] == [44] * 3
    assert small[f"{name}attn2.to_k.weight"].shape[1] == 12
    assert small["classes.weight"].shape == (CLASSES + 1, 12)


@BOTH
def test_groups_of_a_subnetwork_fit_it(it):
    tensors, groups, mask = pruned(it)
    small = cut(it, tensors, mask)
    left = groups_left(it, small)
    assert [g.width for g in left] == [int(part.sum()) for part in split(groups, mask)]
    for group in left:
        for m in group.members:
            assert np.arange(m.width)[m.channels].max() < small[m.weight].shape[m.side == "in"]


@BOTH
def test_gradient_criteria_rank_it(it):
    network = store.fresh(it, 0, "test")
    x, _, cond = inputs(it)
    gradients, used = accumulate_gradients(
        network, Batch(x, cond), torch.ones_like(x), Process(Diffusion(timesteps=20)), Pruning(stride=10),
        stop_early=False,
    )  # fmt: skip
    groups = trace(it)
    mask = select(groups, first_order(network, gradients), 0.5)
    assert used == 2 and mask.shape == (mask_length(groups),) and 0.4 < mask.mean() < 0.6


@BOTH
def test_sparse_training_masks_all_but_tables_norms_and_times(it):
    network = store.fresh(it, 0, "test")
    kept = Masks.nonzeros(Masked(method="static", sparsity=0.5), network)
    outside = {n for n, p in network.named_parameters() if p.dim() > 1} - kept.keys()
    times = {"unet.time_embedding.linear_1.weight", "unet.time_embedding.linear_2.weight"}
    ends = {"unet.conv_in.weight", "unet.conv_out.weight"}
    assert outside == times | ends | ({"classes.weight"} if it is TOLD else set())
    total = sum(network.get_parameter(name).numel() for name in kept)
    assert sum(kept.values()) == pytest.approx(total / 2, rel=1e-3)


# --- files ------------------------------------------------------------------------------------------------


@BOTH
def test_a_stored_subnetwork_comes_back_to_the_bit(it, tmp_path):
    tensors, _, mask = pruned(it)
    small = cut(it, tensors, mask)
    store.save(tmp_path / "ticket.safetensors", small, it, {"rate": 0.5})
    found, architecture, story = store.load(tmp_path / "ticket.safetensors")
    assert architecture == it and story == {"rate": 0.5} and found.keys() == small.keys()
    assert all(torch.equal(found[name], small[name]) for name in small)
    with torch.no_grad():
        eps = [store.build(*pair).eval()(*inputs(it)) for pair in ((it, small), (architecture, found))]
    assert torch.equal(*eps)


@BOTH
def test_files_of_diffusers_load_as_they_are(it, tmp_path):
    import diffusers

    torch.manual_seed(0)
    channels = dict(in_channels=it.items.shape[0], out_channels=it.items.shape[0], norm_num_groups=8)
    sizes = dict(block_out_channels=(32, 64), layers_per_block=1, **channels)
    if it is PLAIN:
        own = diffusers.UNet2DModel(
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=16, **sizes,
        )  # fmt: skip
        told = {}
        old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    else:
        own = diffusers.UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2, cross_attention_dim=12, **sizes,
        )  # fmt: skip
        told, old = {"classes.weight": torch.randn(CLASSES + 1, 12)}, {}
    for renamed in ({}, old):
        tensors = dict(told)
        for name, tensor in own.state_dict().items():
            for new, before in renamed.items():
                name = name.replace(new, before)
            tensors[name] = tensor
        save_file(tensors, tmp_path / "model.safetensors")
        network = store.build(it, load_checkpoint(tmp_path / "model.safetensors", it)).eval()
        x, t, cond = inputs(it)
        with torch.no_grad():
            context = [told["classes.weight"][cond.label][:, None]] if told else []
            expected = own.eval()(x, t, *context).sample
            torch.testing.assert_close(network(x, t, cond), expected, rtol=1e-4, atol=1e-5)


def test_weights_of_another_network_are_one_line(tmp_path):
    other = PLAIN._replace(config=PLAIN.config.model_copy(update={"width": 64}))
    weights = {n.removeprefix("unet."): t for n, t in store.fresh(other, 0, "test").state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: a checkpoint of another network: unet\."):
        load_checkpoint(tmp_path / "model.safetensors", PLAIN)


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "items", "message"),
    [
        (LatentUNetConfig(), Items((3, 64, 64), 10), "kind latent-unet: takes no labels"),
        (LatentConditionalConfig(), Items((3, 64, 64)), "kind latent-unet-conditional: needs labels"),
        (LatentUNetConfig(), Items((3, 12, 12)), "can't be halved 3 times"),
        (LatentUNetConfig(), Items((300, 3), variable=True), "denoises \\(C, H, W\\)"),
        (LatentUNetConfig(attention=(64, 5)), Items((3, 64, 64)), "network.attention \\[5\\]"),
    ],
)
def test_items_that_dont_fit_are_refused(config, items, message):
    with pytest.raises(ValueError, match=message):
        config.check(items)


@pytest.mark.parametrize(
    ("config", "key"),
    [(LatentUNetConfig, {"head_dim": 48}), (LatentConditionalConfig, {"heads": 5}),
     (LatentUNetConfig, {"norm_groups": 30})],
)  # fmt: skip
def test_widths_that_dont_fit_are_refused(config, key):
    with pytest.raises(ValueError, match=f"is not a multiple of {next(iter(key))}"):
        config(**key)


def test_rates_that_leave_nothing_are_known():
    config = LatentConditionalConfig(width=8, multipliers=(1,), norm_groups=4)
    assert config.emptied(0.8) is None and config.emptied(0.85) == "a layer of width 32"
    assert LatentUNetConfig(width=8, multipliers=(1,), norm_groups=4, head_dim=8).emptied(0.85) is None


def test_without_the_library_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "diffusers.utils.import_utils", raising=False)
    with pytest.raises(UserError, match=r"network\.kind latent-unet needs diffusers: pip install 'ebdiff\[l"):
        denoiser.build(*PLAIN)
    denoiser.build(UNetConfig(width=32, multipliers=(1,)), Items((3, 8, 8)))  # others need none
