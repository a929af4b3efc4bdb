"""What stands between the large products of a network, at the price of a pass or two over memory.

Every function has a plain form, layer after layer, and a fused one for channels-last activations on CUDA,
where norms, biases and residual sums would take as long as the convolutions. `fuses` alone chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 128  # channels of a group that the kernels are made for
EVEN = 8  # matrix units want widths that are a multiple of it: odd ones are executed zero-padded


def fuses(x: Tensor) -> bool:
    """Whether layers around these activations run fused: on CUDA, with channels innermost."""
    # torch 2.15 brings a channels-last norm of its own for CUDA: once that is the oldest torch allowed, and
    # the plain form as fast with it, the kernels can go.
    # The stride too: of one channel any layout counts as channels-last.
    return x.is_cuda and x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last)


def innermost(x: Tensor) -> Tensor:
    """The same with channels innermost."""
    return x.contiguous(memory_format=torch.channels_last)


# --- norms --------------------------------------------------------------------------------------------------


def norm_silu(
    x: Tensor,
    norm: nn.GroupNorm,
    shift: Tensor | None = None,
    dropout: nn.Dropout | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """dropout(silu(norm(x + shift))), and x for the way around it.

    The kernel keeps x's type and computes in fp32, whatever the others' types. Its dropout takes one draw of
    torch's generator on x's device, which a CUDA graph repeats from the seed set before a replay, and rounds
    p to a multiple of 2**-16. The gradient of the way around joins that of the norm inside the kernel.

    Args:
        x: activations (B, C, H, W).
        norm: with gain and bias.
        shift: (B, C), added to every pixel; None: nothing.
        dropout: None: none.
        silu: without it the norm stands alone.

    Returns:
        (B, C, H, W), and x.
    """
    if fuses(x) and norm.num_channels <= LARGEST * norm.num_groups:
        p = dropout.p if dropout is not None and dropout.training else 0.0
        seed = torch.randint(2**63 - 1, (), device=x.device) if p else None
        return Norm.apply(x, norm.weight, norm.bias, shift, seed, norm.num_groups, norm.eps, silu, p)
    h = x if shift is None else x + shift[:, :, None, None]
    # On CUDA torch's norm wants one type, and weights may be finer than activations.
    h = norm(h.to(norm.weight.dtype)).to(x.dtype) if h.is_cuda else norm(h)
    if silu:
        h = F.silu(h)
    return h if dropout is None else dropout(h), x


def normed(h: Tensor, norm: nn.LayerNorm) -> Tensor:
    """A norm in the precision of its weights, which training in bf16 leaves in fp32."""
    return norm(h.to(norm.weight.dtype)).to(h.dtype)


@torch.library.custom_op("ebdiff::norm_silu", mutates_args=())
def norm_forward(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    seed: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused form.

    Args:
        x: (B, C, H, W), channels innermost.
        gain: (C,), as is the bias.
        bias: of the norm.
        shift: (B, C), its channels next to each other, or None.
        seed: of dropout, int64 () on the device; None: no dropout.
        groups: G.
        eps: of the norm.
        silu: whether SiLU follows.
        p: dropout's probability.

    Returns:
        the output, like x; of x + shift the channels' means (B, C) and the groups' 1 / std (B, G), fp32.
    """
    from ebdiff.nets import kernels

    return kernels.norm_forward(x, gain, bias, shift, seed, groups, eps, silu, p)


@norm_forward.register_fake
def _(x, gain, bias, shift, seed, groups, eps, silu, p):
    mean, rstd = (x.new_empty(x.shape[0], n, dtype=torch.float32) for n in (x.shape[1], groups))
    return torch.empty_like(x), mean, rstd


@torch.library.custom_op("ebdiff::norm_silu_backward", mutates_args=())
def norm_backward(
    dy: Tensor,
    around: Tensor | None,
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, with that of the way `around` added, of the shift (empty without one), and of bias
    and gain together, fp32 (2, C)."""
    from ebdiff.nets import kernels

    return kernels.norm_backward(dy, around, x, gain, bias, shift, seed, mean, rstd, silu, p)


@norm_backward.register_fake
def _(dy, around, x, gain, bias, shift, seed, mean, rstd, silu, p):
    dshift = x.new_empty(0 if shift is None else shift.shape, dtype=x.dtype if shift is None else shift.dtype)
    return torch.empty_like(x), dshift, x.new_empty(2, x.shape[1], dtype=torch.float32)


class Norm(torch.autograd.Function):
    """The two operators as one function of autograd, which also hands x on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, bias: Tensor, shift: Tensor | None, seed: Tensor | None,
                groups: int, eps: float, silu: bool, p: float) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, mean, rstd = norm_forward(x, gain, bias, shift, seed, groups, eps, silu, p)
        ctx.save_for_backward(x, gain, bias, shift, seed, mean, rstd)
        ctx.silu, ctx.p = silu, p
        ctx.set_materialize_grads(False)  # where x isn't used around the norm there is none
        return y, x

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, around: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return around, *[None] * 8
        x, gain, bias, shift, seed, mean, rstd = ctx.saved_tensors
        dy, around = innermost(dy), None if around is None else innermost(around)
        dx, dshift, (dbias, dgain) = norm_backward(
            dy, around, x, gain, bias, shift, seed, mean, rstd, ctx.silu, ctx.p
        )
        dshift = None if shift is None else dshift
        return dx, dgain.to(gain.dtype), dbias.to(bias.dtype), dshift, *[None] * 5


# --- biases and residual sums -------------------------------------------------------------------------------


def added(h: Tensor, layer: nn.Conv2d, x: Tensor | None = None, shortcut: nn.Conv2d | None = None) -> Tensor:
    """layer(h) + shortcut(x): of a residual sum, or of a convolution alone.

    Fused, the convolutions leave their biases out, which come in with the sum.

    Args:
        h: (B, C, H, W).
        layer: what comes last in the residual's branch.
        x: the residual; None: there is none.
        shortcut: what makes its channels those of the sum; None: they are.
    """
    if not fuses(h if x is None else x):  # what comes from attention lies so by chance
        if x is None:
            return layer(h)
        h = layer(h)
        # A sum lies in memory as its first term.
        return (x if shortcut is None else shortcut(x)) + h
    bias = layer.bias if shortcut is None else layer.bias + shortcut.bias
    return Sum.apply(unbiased(h, layer), x if shortcut is None else unbiased(x, shortcut), bias)


def unbiased(h: Tensor, layer: nn.Conv2d) -> Tensor:
    """A convolution without its bias, of h or of its first channels, where zeros follow (`attended`)."""
    more = h.shape[1] - layer.in_channels
    weight = F.pad(layer.weight, (0, 0, 0, 0, 0, more)) if more else layer.weight
    return F.conv2d(h, weight, None, layer.stride, layer.padding)


@torch.library.custom_op("ebdiff::add", mutates_args=())
def add(h: Tensor, x: Tensor | None, bias: Tensor) -> Tensor:
    """h + x + bias, channels innermost: (B, C, H, W), (B, C, H, W) or None, and (C,)."""
    from ebdiff.nets import kernels

    return kernels.add(h, x, bias)


@add.register_fake
def _(h, x, bias):
    return torch.empty_like(h)


@torch.library.custom_op("ebdiff::channel_sums", mutates_args=())
def channel_sums(x: Tensor) -> Tensor:
    """The sum over all but the channels, fp32 (C,), of (B, C, H, W) or (rows, C) with channels innermost."""
    from ebdiff.nets import kernels

    return kernels.channel_sums(x)


@channel_sums.register_fake
def _(x):
    return x.new_empty(x.shape[1], dtype=torch.float32)


class Sum(torch.autograd.Function):
    """h + x + bias, whose bias gradient takes one pass."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor | None, bias: Tensor) -> Tensor:
        ctx.both, ctx.dtype = x is not None, bias.dtype
        return add(innermost(h), None if x is None else innermost(x), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dy = innermost(dy)
        return dy, dy if ctx.both else None, channel_sums(dy).to(ctx.dtype)


def residual(
    x: Tensor,
    shift: Shift,
    norms: tuple[nn.GroupNorm, nn.GroupNorm],
    convs: tuple[nn.Conv2d, nn.Conv2d],
    dropout: nn.Dropout,
    shortcut: nn.Conv2d | None,
) -> Tensor:
    """shortcut(x) + conv(dropout(silu(norm(conv(silu(norm(x))) + shift)))): a residual block."""
    h, x = norm_silu(x, norms[0])
    h = unbiased(h, convs[0]) if shift.biased else convs[0](h)
    h, _ = norm_silu(h, norms[1], shift.value, dropout)
    return added(h, convs[1], x, shortcut)


# --- products -----------------------------------------------------------------------------------------------


class Product(torch.autograd.Function):
    """x weight^T + bias for rows (n, inputs), whose bias gradient takes one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        return dy @ weight, dy.T @ x, channel_sums(dy).to(weight.dtype)


class Shift(NamedTuple):
    """What the time embedding adds to a block's first convolution.

    Attributes:
        value: (B, C).
        biased: whether the convolution's bias is in it.
    """

    value: Tensor
    biased: bool


def shifts(temb: Tensor, blocks: Sequence[tuple[nn.Linear, nn.Conv2d]], like: Tensor) -> list[Shift]:
    """linear(silu(temb)) for every block; fused, all of them and the convolutions' biases are one product.

    Args:
        temb: (B, width).
        blocks: of each its projection, and the convolution before the sum.
        like: activations of the network.
    """
    if not fuses(like):
        return [Shift(linear(F.silu(temb)), False) for linear, _ in blocks]
    weight = torch.cat([linear.weight for linear, _ in blocks])
    bias = torch.cat([linear.bias for linear, _ in blocks]) + torch.cat([conv.bias for _, conv in blocks])
    values = F.linear(F.silu(temb), weight, bias).split([linear.out_features for linear, _ in blocks], 1)
    return [Shift(value, True) for value in values]


def attended(h: Tensor, q: nn.Conv2d, k: nn.Conv2d, v: nn.Conv2d) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over all pixels, single-headed.

    Fused, q, k and v are one product, whose widths are zero-padded to what matrix units want.

    Args:
        h: (B, C, H, W).
        q, k, v: 1x1 convolutions of it.

    Returns:
        (B, C', H, W), where C' is v's width, or when fused zeros after them: `unbiased` takes both.
    """
    height, width = h.shape[2:]
    if not fuses(h):
        rows = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (q, k, v))
        return attend(*rows)[:, 0].transpose(1, 2).unflatten(2, (height, width))
    wide = -(-max(q.out_channels, v.out_channels) // EVEN) * EVEN
    weight = torch.cat([padded(layer.weight.flatten(1), wide) for layer in (q, k, v)])
    bias = torch.cat([padded(layer.bias, wide) for layer in (q, k, v)])
    rows = Product.apply(h.permute(0, 2, 3, 1).flatten(0, 2), weight, bias)
    q_rows, k_rows, v_rows = rows.view(len(h), 1, height * width, 3, wide).unbind(3)
    found = F.scaled_dot_product_attention(q_rows, k_rows, v_rows, scale=q.out_channels**-0.5)
    return innermost(found.squeeze(1).unflatten(1, (height, width)).permute(0, 3, 1, 2))


def padded(weight: Tensor, rows: int) -> Tensor:
    """A weight or bias with rows of zeros after its own."""
    more = rows - len(weight)
    return torch.cat([weight, weight.new_zeros(more, *weight.shape[1:])]) if more else weight


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v, for tensors (B, heads, positions, C); the usual scale is 1 / sqrt(C)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch's own function computes in fp32 there and takes three times as long.
        return (q @ k.mT * (scale or q.shape[-1] ** -0.5)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=scale)
