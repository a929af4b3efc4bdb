"""GroupNorm with what stands around it: a shift before, SiLU and dropout after, at the price of a norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 128  # channels of a group that the kernels are made for


def norm_silu(
    x: Tensor,
    norm: nn.GroupNorm,
    shift: Tensor | None = None,
    dropout: nn.Dropout | None = None,
    silu: bool = True,
) -> Tensor:
    """dropout(silu(norm(x + shift))): layer after layer, or where `fuses(x)` in one kernel.

    The kernel keeps x's type and computes in fp32, whatever the others' types, under autocast too. Its
    dropout takes one draw of torch's generator on x's device, which a CUDA graph repeats from the seed set
    before a replay, and rounds p to a multiple of 2**-16.

    Args:
        x: activations (B, C, H, W).
        norm: with gain and bias.
        shift: (B, C), added to every pixel; None: nothing.
        dropout: None: none.
        silu: without it the norm stands alone.

    Returns:
        (B, C, H, W).
    """
    if fuses(x) and norm.num_channels <= LARGEST * norm.num_groups:
        p = dropout.p if dropout is not None and dropout.training else 0.0
        seed = torch.randint(2**63 - 1, (), device=x.device) if p else None
        shift = None if shift is None else shift.contiguous()
        return fused(x, norm.weight, norm.bias, shift, seed, norm.num_groups, norm.eps, silu, p)[0]
    h = norm(x if shift is None else x + shift[:, :, None, None])
    if silu:
        h = F.silu(h)
    return h if dropout is None else dropout(h)


def fuses(x: Tensor) -> bool:
    """Whether the norm of these activations runs fused: on CUDA, with channels innermost."""
    # The only place that chooses. torch 2.15 brings a channels-last norm of its own for CUDA: once that is
    # the oldest torch allowed, and the plain form as fast with it, the kernels can go.
    return x.is_cuda and x.is_contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("ebdiff::norm_silu", mutates_args=())
def fused(
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
    """The fused form, with gradients.

    Args:
        x: (B, C, H, W), channels innermost.
        gain: (C,), as is the bias.
        bias: of the norm.
        shift: (B, C), contiguous, or None.
        seed: of dropout, int64 () on the device; None: no dropout.
        groups: G.
        eps: of the norm.
        silu: whether SiLU follows.
        p: dropout's probability.

    Returns:
        the output, like x; of x + shift the channels' means (B, C) and the groups' 1 / std (B, G), fp32.
    """
    from ebdiff.nets import norm_kernels

    return norm_kernels.forward(x, gain, bias, shift, seed, groups, eps, silu, p)


@fused.register_fake
def _(x, gain, bias, shift, seed, groups, eps, silu, p):
    mean, rstd = (x.new_empty(x.shape[0], n, dtype=torch.float32) for n in (x.shape[1], groups))
    return torch.empty_like(x), mean, rstd


@torch.library.custom_op("ebdiff::norm_silu_backward", mutates_args=())
def fused_backward(
    dy: Tensor,
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
    """The gradients of x, of the shift (empty without one), and of bias and gain together, fp32 (2, C)."""
    from ebdiff.nets import norm_kernels

    dy = dy.contiguous(memory_format=torch.channels_last)
    return norm_kernels.backward(dy, x, gain, bias, shift, seed, mean, rstd, silu, p)


@fused_backward.register_fake
def _(dy, x, gain, bias, shift, seed, mean, rstd, silu, p):
    dshift = x.new_empty(0) if shift is None else torch.empty_like(shift)
    return torch.empty_like(x), dshift, x.new_empty(2, x.shape[1], dtype=torch.float32)


def _remember(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    x, gain, bias, shift, seed, _, _, ctx.silu, ctx.p = inputs
    ctx.save_for_backward(x, gain, bias, shift, seed, *output[1:])
    ctx.set_materialize_grads(False)  # of mean and 1 / std there are none


def _differentiate(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x, gain, bias, shift, seed, mean, rstd = ctx.saved_tensors
    dx, dshift, (dbias, dgain) = fused_backward(dy, x, gain, bias, shift, seed, mean, rstd, ctx.silu, ctx.p)
    dshift = None if shift is None else dshift
    return dx, dgain.to(gain.dtype), dbias.to(bias.dtype), dshift, None, None, None, None, None


fused.register_autograd(_differentiate, setup_context=_remember)
