"""Latent Diffusion's U-Nets (Rombach et al. 2022): diffusers' layers under its names, computed as the pixel
U-Net is, from whatever widths are left of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebdiff.data.dataset import UNCONDITIONAL, Cond
from ebdiff.experiment.members import ConvolutionalConfig, Items, LatentConditionalConfig, LatentUNetConfig
from ebdiff.nets.denoiser import Denoiser, Group
from ebdiff.nets.diffusers_ import diffusers_for
from ebdiff.nets.fused import added, attend, fuses, innermost, norm_silu, normed, residual, shifts

# Names of attention's layers in checkpoints from before diffusers 0.14, such as CompVis/ldm-celebahq-256.
RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def model(config: ConvolutionalConfig, items: Items, name: str, attending: str, **own: Any) -> nn.Module:
    """diffusers' model of a config; its own `forward` serves dense networks alone."""
    channels, side, _ = items.shape
    prefixes = [attending if side >> i in config.attention else "" for i in range(len(config.multipliers))]
    return getattr(diffusers_for(f"network.kind {config.kind}"), name)(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.widths,
        layers_per_block=config.blocks,
        down_block_types=[f"{prefix}DownBlock2D" for prefix in prefixes],
        up_block_types=[f"{prefix}UpBlock2D" for prefix in reversed(prefixes)],
        norm_num_groups=config.norm_groups,
        dropout=config.dropout,
        **own,
    )


class LatentUNet(Denoiser):
    """The unconditional denoiser of latents (C, H, W); 274,056,163 parameters for LSUN bedroom and CelebA-HQ.

    Groups are walked as they are traced, which is the order of the reference's own network: `forward` writes
    sums and products as that does. What the reference calls `out` is kept whole there, its norm too.

    Args:
        config: widths, depth, attention resolutions and head size; the middle always attends.
        items: H and W are divisible by 2**(levels - 1).
    """

    kept = ("unet.conv_norm_out", "unet.conv_out")
    ends = ("unet.conv_in", "unet.conv_out")

    def __init__(self, config: LatentUNetConfig | LatentConditionalConfig, items: Items):
        super().__init__(config, items)
        self.unet = self.model(config, items)

    @staticmethod
    def model(config: LatentUNetConfig, items: Items) -> nn.Module:
        """diffusers' model."""
        return model(config, items, "UNet2DModel", "Attn", attention_head_dim=config.head_dim)

    def told(self, cond: Cond) -> Tensor | None:
        """What the condition gives attention to read: (B, tokens, context)."""
        return None

    def attended(self, block: nn.Module, x: Tensor, told: Tensor | None) -> Tensor:
        """x and the self-attention of all its pixels."""
        h, x = norm_silu(x, block.group_norm, silu=False)
        h = h.flatten(2).transpose(1, 2)
        return x + attention(block, h, h).transpose(1, 2).unflatten(2, x.shape[2:])

    def forward(self, x: Tensor, t: Tensor, cond: Cond = UNCONDITIONAL) -> Tensor:
        unet, told = self.unet, self.told(cond)
        dtype = unet.conv_in.weight.dtype  # bf16 weights while sampling; the result is as precise as x
        temb = unet.time_embedding(unet.time_proj(t).to(dtype))

        laid = innermost(x.to(dtype)) if fuses(unet.conv_in.weight) else x.to(dtype)
        h = added(laid, unet.conv_in)
        blocks = [b for level in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) for b in level.resnets]
        shift = iter(shifts(temb, [(block.time_emb_proj, block.conv1) for block in blocks], h))

        def step(h: Tensor, block: nn.Module, attending: nn.Module | None) -> Tensor:
            norms, convs = (block.norm1, block.norm2), (block.conv1, block.conv2)
            h = residual(h, next(shift), norms, convs, block.dropout, block.conv_shortcut)
            return h if attending is None else self.attended(attending, h, told)

        skips = [h]
        for level in unet.down_blocks:
            for pair in steps(level):
                h = step(h, *pair)
                skips.append(h)
            for down in level.downsamplers or ():
                h = added(h, down.conv)
                skips.append(h)
        for pair in steps(unet.mid_block):
            h = step(h, *pair)
        for level in unet.up_blocks:
            for pair in steps(level):
                h = step(torch.cat([h, skips.pop()], dim=1), *pair)
            for up in level.upsamplers or ():
                h = added(F.interpolate(h, scale_factor=2.0, mode="nearest"), up.conv)
        return added(norm_silu(h, unet.conv_norm_out)[0], unet.conv_out).to(x.dtype)

    def thinned(self, group: Group) -> Group:
        layer = self.get_submodule(group.name.rpartition(".")[0])
        if isinstance(layer, Gated):
            return replace(group, factors=2)
        heads = getattr(layer, "heads", 1)
        return replace(group, norm_groups=heads) if heads > 1 else group

    def maskable(self) -> list[str]:
        return [n for n in super().maskable() if not n.startswith(("unet.time_embedding.", "classes."))]

    def multiplied(self) -> list[str]:
        return [name for name, _ in self.named_modules() if name.endswith(".to_k")]

    def example(self, n: int, smallest: bool = False) -> tuple[Tensor, Tensor, Cond]:
        x, t, cond = super().example(n)
        if smallest:  # groups don't depend on the size of latents
            side = 2 ** len(self.config.multipliers)
            x = x.new_zeros(n, x.shape[1], side, side)
        return x, t, cond

    def imported(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """diffusers' own files, of a `unet` folder; with `classes.weight` where classes are told."""
        found = {}
        for name, tensor in tensors.items():
            for old, new in RENAMED.items():
                name = name.replace(old, new)
            if ".ff.net.0.proj." in name:
                pair = zip((".value.", ".gate."), tensor.chunk(2), strict=True)
                found |= {f"unet.{name.replace('.proj.', layer)}": half for layer, half in pair}
            else:
                found[name if name.startswith("classes.") else f"unet.{name}"] = tensor
        return found


class LatentConditional(LatentUNet):
    """The class-conditional one, whose transformers read one token, the class's embedding.

    ImageNet's has 400,920,579 parameters and 1001 x 512 of embeddings, of which the last stands for no class.
    """

    def __init__(self, config: LatentConditionalConfig, items: Items):
        super().__init__(config, items)
        self.classes = nn.Embedding(items.classes + 1, config.context)
        for name, layer in list(self.unet.named_modules()):
            if name.endswith(".ff.net"):
                layer[0] = Gated(layer[2].out_features, layer[2].in_features)

    @staticmethod
    def model(config: LatentConditionalConfig, items: Items) -> nn.Module:
        # diffusers means heads where it says head_dim.
        own = {"attention_head_dim": config.heads, "cross_attention_dim": config.context}
        return model(config, items, "UNet2DConditionModel", "CrossAttn", **own)

    def told(self, cond: Cond) -> Tensor:
        return self.classes(cond.label)[:, None]

    def attended(self, block: nn.Module, x: Tensor, told: Tensor | None) -> Tensor:
        """x and a transformer of its pixels, which read each other, then what they are told."""
        h, x = norm_silu(x, block.norm, silu=False)
        rows = block.proj_in(h).flatten(2).transpose(1, 2)
        for layer in block.transformer_blocks:
            h = normed(rows, layer.norm1)
            rows = attention(layer.attn1, h, h) + rows
            rows = attention(layer.attn2, normed(rows, layer.norm2), told) + rows
            rows = layer.ff(normed(rows, layer.norm3)) + rows
        return block.proj_out(rows.transpose(1, 2).unflatten(2, x.shape[2:])) + x


class Gated(nn.Module):
    """GEGLU (Shazeer 2020), value * gelu(gate), whose halves are layers of their own: channels of theirs that
    are multiplied are pruned together."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.value, self.gate = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, h: Tensor) -> Tensor:
        return self.value(h) * F.gelu(self.gate(h))


def steps(level: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """The residual blocks of a level, each with the attention that follows it."""
    return zip_longest(level.resnets, getattr(level, "attentions", ()))


def attention(block: nn.Module, rows: Tensor, read: Tensor) -> Tensor:
    """out(softmax(scale q k^T) v) by heads, q of `rows` (B, n, C), k and v of what they `read` (B, m, C').

    The scale is the dense network's 1 / sqrt(head size), pruned or not, as in the reference's transformers:
    channels that give nothing go without a change of the output.
    """
    products = (block.to_q(rows), block.to_k(read), block.to_v(read))
    q, k, v = (product.unflatten(2, (block.heads, -1)).transpose(1, 2) for product in products)
    return block.to_out[0](attend(q, k, v, block.scale).transpose(1, 2).flatten(2))
