"""The DDPM U-Net (Ho et al. 2020, Appendix B), with the public PyTorch port's parameter names."""

from __future__ import annotations

import math
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebdiff.data.dataset import UNCONDITIONAL, Cond
from ebdiff.experiment.members import Items, UNetConfig
from ebdiff.nets.denoiser import Denoiser
from ebdiff.nets.fused import Shift, added, attended, fuses, innermost, norm_silu, residual, shifts


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of timesteps (DDPM; `half - 1` in the exponent as in its code).

    Args:
        t: timesteps, shape (B,), raw indices 0..T-1.
        width: size of the embedding, even.

    Returns:
        float32 tensor of shape (B, width): sines, then cosines.
    """
    half = width // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=t.device) * -(math.log(10000) / (half - 1))
    )
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Dropout(nn.Dropout):
    """As torch's; on a CPU an element goes where 16 random bits are small, which draws 4 times as fast.

    There p is rounded to a multiple of 2**-16, and what stays is scaled accordingly.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.training or self.p == 0:
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].as_strided(x.shape, x.stride())
        gone = round(self.p * 2**16)
        return x * (bits >= gone - 2**15).to(x.dtype).mul_(2**16 / (2**16 - gone))


class ResnetBlock(nn.Module):
    """GroupNorm-SiLU-conv twice, the time embedding added in between, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, time_width: int, groups: int, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.temb_proj = nn.Linear(time_width, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, shift: Shift) -> Tensor:
        norms, convs = (self.norm1, self.norm2), (self.conv1, self.conv2)
        return residual(x, shift, norms, convs, self.dropout, getattr(self, "nin_shortcut", None))

    def walk(self) -> list[nn.Module]:
        """Its part of `UNet.walk`: `conv2` goes with the shortcut, `temb_proj` with `conv1`."""
        return [self.nin_shortcut, self.conv1] if hasattr(self, "nin_shortcut") else [self.conv1]


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels, with 1x1 convolutions for q, k, v and output."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, x = norm_silu(x, self.norm, silu=False)
        return added(attended(h, self.q, self.k, self.v), self.proj_out, x)

    def walk(self) -> list[nn.Module]:
        """Its part of `UNet.walk`: q and v go with k."""
        return [self.proj_out, self.k]


class Downsample(nn.Module):
    """Convolution of stride 2 with the asymmetric padding (0, 1, 0, 1) of the original."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return added(F.pad(x, (0, 1, 0, 1)), self.conv)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return added(F.interpolate(x, scale_factor=2.0, mode="nearest"), self.conv)


class Level(nn.Module):
    """The blocks of one resolution; `attn` is empty where the resolution has no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()

    def step(self, i: int, x: Tensor, shift: Shift) -> Tensor:
        x = self.block[i](x, shift)
        return self.attn[i](x) if len(self.attn) else x

    def walk(self, i: int) -> list[nn.Module]:
        """The part of one step in `UNet.walk`."""
        return [*(self.attn[i].walk() if len(self.attn) else []), *self.block[i].walk()]


class UNet(Denoiser):
    """The denoiser of images (C, H, W); of those with classes it is told each one's, or that it isn't.

    A class is a vector added to the time embedding, as in ADM (Dhariwal & Nichol 2021), and the one after the
    last says that there is none. It is a linear layer of the one-hot label (EDM), whose channels are pruned
    with those of the time embedding.

    Args:
        config: widths, depth, attention resolutions, dropout and norm groups.
        items: H and W are divisible by 2**(levels - 1).
    """

    kept = ("conv_out",)
    ends = ("conv_in", "conv_out")

    def __init__(self, config: UNetConfig, items: Items):
        super().__init__(config, items)
        channels, side, _ = items.shape
        widths = [config.width * m for m in config.multipliers]
        time_width, groups = 4 * config.width, config.norm_groups

        def resnet(inputs: int, outputs: int) -> ResnetBlock:
            return ResnetBlock(inputs, outputs, time_width, groups, config.dropout)

        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList(
            [nn.Linear(config.width, time_width), nn.Linear(time_width, time_width)]
        )
        if items.classes:
            self.temb.label = nn.Linear(items.classes + 1, time_width, bias=False)
        self.conv_in = nn.Conv2d(channels, config.width, 3, padding=1)

        current, skips = config.width, [config.width]
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level()
            for _ in range(config.blocks):
                level.block.append(resnet(current, width))
                current = width
                if side >> i in config.attention:
                    level.attn.append(AttnBlock(width, groups))
                skips.append(width)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
                skips.append(width)
            self.down.append(level)

        self.mid = nn.Module()
        self.mid.block_1 = resnet(current, current)
        if config.middle_attention:
            self.mid.attn_1 = AttnBlock(current, groups)
        self.mid.block_2 = resnet(current, current)

        self.up = nn.ModuleList([Level() for _ in widths])
        for i, width in reversed(list(enumerate(widths))):
            level = self.up[i]
            for _ in range(config.blocks + 1):
                level.block.append(resnet(current + skips.pop(), width))
                current = width
                if side >> i in config.attention:
                    level.attn.append(AttnBlock(width, groups))
            if i > 0:
                level.upsample = Upsample(width)

        self.norm_out = nn.GroupNorm(groups, current, eps=1e-6)
        self.conv_out = nn.Conv2d(current, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = UNCONDITIONAL) -> Tensor:
        dtype = self.conv_in.weight.dtype  # bf16 weights while sampling; the result is as precise as x
        temb = timestep_embedding(t, self.config.width).to(dtype)
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](temb)))
        if self.items.classes:
            temb = temb + self.temb.label(F.one_hot(cond.label, self.items.classes + 1).to(dtype))

        laid = innermost(x.to(dtype)) if fuses(self.conv_in.weight) else x.to(dtype)
        h = added(laid, self.conv_in)
        shift = iter(shifts(temb, [(block.temb_proj, block.conv1) for block in self.blocks()], h))
        skips = [h]
        for level in self.down:
            for i in range(len(level.block)):
                h = level.step(i, h, next(shift))
                skips.append(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
                skips.append(h)

        h = self.mid.block_1(h, next(shift))
        if hasattr(self.mid, "attn_1"):
            h = self.mid.attn_1(h)
        h = self.mid.block_2(h, next(shift))

        for level in reversed(self.up):
            for i in range(len(level.block)):
                h = level.step(i, torch.cat([h, skips.pop()], dim=1), next(shift))
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return added(norm_silu(h, self.norm_out)[0], self.conv_out).to(x.dtype)

    def blocks(self) -> list[ResnetBlock]:
        """The residual blocks in the order in which they compute."""
        levels = [*self.down, None, *reversed(self.up)]
        middle = [self.mid.block_1, self.mid.block_2]
        return [block for level in levels for block in (middle if level is None else level.block)]

    def walk(self) -> list[nn.Module]:
        """From the output backwards, depth first: the order in which the official code thins its groups.

        That is the order of its own network, where of a sum `shortcut + h` or `conv1 + temb`, of a
        concatenation `[h, skip]` and of attention's two products, v and weights, q and k, all terms are met
        and then the last one is followed first. How `forward` is written here doesn't matter.
        """
        skips: list[list[nn.Module]] = [[self.conv_in]]
        for level in self.down:
            skips += [level.walk(i) for i in range(len(level.block))]
            if hasattr(level, "downsample"):
                skips.append([level.downsample.conv])

        met: list[nn.Module] = []
        for level, below in zip_longest(self.up, self.up[1:]):
            for i in reversed(range(len(level.block))):
                met += [*level.walk(i), *reversed(self.temb.dense)]  # new in the first block only
                if i == 0 and below is not None:
                    met.append(below.upsample.conv)
                met += skips.pop(0)
        for part in reversed(list(self.mid.children())):
            met += part.walk()
        return met

    def maskable(self) -> list[str]:
        return [name for name in super().maskable() if not name.startswith("temb.")]

    def multiplied(self) -> list[str]:
        return [f"{name}.k" for name, layer in self.named_modules() if isinstance(layer, AttnBlock)]

    def example(self, n: int, smallest: bool = False) -> tuple[Tensor, Tensor, Cond]:
        x, t, cond = super().example(n)
        if smallest:  # groups don't depend on the image size
            side = 2 ** len(self.config.multipliers)
            x = x.new_zeros(n, x.shape[1], side, side)
        return x, t, cond
