import math

import pytest
import torch
import torch.nn.functional as F
from conftest import unet

from ebdiff.data.dataset import Cond
from ebdiff.nets.fused import attend, shifts
from ebdiff.nets.unet import AttnBlock, Downsample, Dropout, ResnetBlock, UNet, Upsample, timestep_embedding

CIFAR = unet()


def names(architecture):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in UNet(*architecture).named_parameters()}


def test_parameters_have_the_names_of_the_public_port():
    found = names(CIFAR)
    expected = {
        "conv_in.weight": (128, 3, 3, 3),
        "temb.dense.0.weight": (512, 128),
        "temb.dense.1.bias": (512,),
        "down.0.block.0.norm1.weight": (128,),
        "down.0.block.1.conv2.weight": (128, 128, 3, 3),
        "down.0.downsample.conv.weight": (128, 128, 3, 3),
        "down.1.block.0.temb_proj.weight": (256, 512),
        "down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "down.1.attn.1.proj_out.weight": (256, 256, 1, 1),
        "mid.block_1.conv1.weight": (256, 256, 3, 3),
        "mid.attn_1.q.weight": (256, 256, 1, 1),
        "up.3.block.0.conv1.weight": (256, 512, 3, 3),
        "up.1.attn.2.norm.bias": (256,),
        "up.0.block.2.nin_shortcut.weight": (128, 256, 1, 1),
        "up.1.upsample.conv.weight": (256, 256, 3, 3),
        "norm_out.weight": (128,),
        "conv_out.weight": (3, 128, 3, 3),
    }
    assert {name: found.get(name) for name in expected} == expected
    assert not any("attn" in name for name in found if name.startswith(("down.0", "up.0", "down.2")))
    assert "up.0.upsample.conv.weight" not in found
    assert "down.3.downsample.conv.weight" not in found


def test_the_time_embedding_is_sines_then_cosines():
    found = timestep_embedding(torch.tensor([0, 7, 999]), 8)
    for row, t in zip(found, (0, 7, 999), strict=True):
        angles = [t * 10_000 ** (-i / 3) for i in range(4)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert row.tolist() == pytest.approx(expected, abs=2e-4)


@pytest.fixture
def network():
    small = unet(8, width=8, multipliers=(1, 2), attention=(4,), norm_groups=4, dropout=0.5)
    torch.manual_seed(0)
    return UNet(*small).eval()


def test_attention_is_the_literal_softmax_over_all_pixels(network):
    block, x = network.mid.attn_1, torch.randn(2, 16, 3, 3)
    h = F.group_norm(x, 4, block.norm.weight, block.norm.bias, eps=1e-6)
    q, k, v = (layer(h).flatten(2) for layer in (block.q, block.k, block.v))
    scores = torch.einsum("bci,bcj->bij", q, k) / 16**0.5
    mixed = torch.einsum("bij,bcj->bci", scores.softmax(dim=2), v).reshape(2, 16, 3, 3)
    torch.testing.assert_close(block(x), x + block.proj_out(mixed), rtol=1e-4, atol=1e-5)


def test_a_residual_block_is_norm_silu_conv_twice_with_the_time_between(network):
    block, x, temb = network.down[1].block[0], torch.randn(2, 8, 4, 4), torch.randn(2, 32)

    def silu(v):
        return v * torch.sigmoid(v)

    h = block.conv1(silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias, eps=1e-6)))
    h = h + block.temb_proj(silu(temb))[:, :, None, None]
    h = block.conv2(silu(F.group_norm(h, 4, block.norm2.weight, block.norm2.bias, eps=1e-6)))
    (shift,) = shifts(temb, [(block.temb_proj, block.conv1)], x)
    torch.testing.assert_close(block(x, shift), block.nin_shortcut(x) + h, rtol=1e-4, atol=1e-5)


def test_downsampling_pads_below_and_to_the_right(network):
    layer, x = network.down[0].downsample, torch.randn(1, 8, 6, 6)
    padded = torch.zeros(1, 8, 7, 7)
    padded[:, :, :6, :6] = x
    expected = F.conv2d(padded, layer.conv.weight, layer.conv.bias, stride=2)
    torch.testing.assert_close(layer(x), expected)


def test_the_output_depends_on_every_input(network):
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 900])
    out = network(x, t)
    assert out.shape == x.shape
    assert not torch.allclose(out, network(x, torch.tensor([2, 900])))
    assert not torch.allclose(out, network(x + 0.1, t))
    # One image's output doesn't depend on the others in the batch.
    torch.testing.assert_close(network(x[:1], t[:1]), out[:1], rtol=1e-4, atol=1e-5)


def test_a_class_is_a_vector_added_to_the_time_embedding_and_the_last_one_says_none(network):
    told = UNet(network.config, network.items._replace(classes=3)).eval()
    told.load_state_dict({**network.state_dict(), "temb.label.weight": torch.zeros(32, 4)})
    x, t, label = torch.randn(4, 3, 8, 8), torch.tensor([1, 1, 500, 900]), torch.tensor([0, 2, 1, 3])
    with torch.no_grad():
        assert torch.equal(told(x, t, Cond(label)), network(x, t))
        told.temb.label.weight[:, 1:3] = vectors = torch.randn(32, 2)
        found = told(x, t, Cond(label))
        # As an unconditional network with that vector in its embedding's bias; those of 0 and 3 are zero.
        for row, vector in ((0, 0), (1, vectors[:, 1]), (2, vectors[:, 0]), (3, 0)):
            network.temb.dense[1].bias.copy_(told.temb.dense[1].bias + vector)
            one = slice(row, row + 1)
            torch.testing.assert_close(found[one], network(x[one], t[one]), rtol=1e-4, atol=1e-5)
    assert told.null(Cond(label)).label.tolist() == [3] * 4
    assert told.maskable() == network.maskable()


def test_dropout_works_in_training_only(network):
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 900])
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.equal(network(x, t), network(x, t))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_a_share_and_keeps_the_mean(layout, dtype):
    x = torch.ones(8, 33, 16, 17, dtype=dtype).to(memory_format=layout).requires_grad_()
    torch.manual_seed(0)
    dropped = Dropout(0.1)(x)
    torch.manual_seed(0)
    assert torch.equal(dropped, Dropout(0.1)(x))
    assert dropped.dtype == dtype
    gone, n = dropped == 0, x.numel()
    assert gone.float().mean().item() == pytest.approx(0.1, abs=4 * (0.09 / n) ** 0.5)
    torch.testing.assert_close(dropped[~gone], torch.full_like(dropped[~gone], 1 / 0.9))
    # Neighbours in any direction go independently of each other.
    for dim in range(4):
        a, b = gone.narrow(dim, 0, x.shape[dim] - 1), gone.narrow(dim, 1, x.shape[dim] - 1)
        assert (a & b).float().mean().item() == pytest.approx(0.01, abs=5 * (0.01 / n) ** 0.5)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped.detach())  # of ones: the mask itself
    assert Dropout(0.1).eval()(x) is x or torch.equal(Dropout(0.1).eval()(x), x)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_is_the_softmax_of_scaled_products(dtype, close):
    q, k, v = torch.randn(3, 2, 1, 9, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = torch.einsum("bnic,bnjc->bnij", q.double(), k.double()).div(2).exp()  # sqrt of 4 channels
    expected = torch.einsum("bnij,bnjc->bnic", weights / weights.sum(-1, keepdim=True), v.double())
    found = attend(q, k, v)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=close, rtol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_layer_leaves_activations_as_they_lay(layout):
    """Otherwise all that follow would compute in the other format, at its pace and with its rounding."""
    network = UNet(*unet(8, width=8, multipliers=(1, 1), attention=(8, 4), norm_groups=4)).to(
        memory_format=layout
    )
    layers = [m for m in network.modules() if isinstance(m, ResnetBlock | AttnBlock | Downsample | Upsample)]
    seen = []
    for layer in layers:
        layer.register_forward_hook(
            lambda _, read, given: seen.append(given.is_contiguous(memory_format=layout))
        )
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=layout)
    network(x, torch.tensor([0, 9]))
    assert len(seen) == len(layers) and all(seen)
