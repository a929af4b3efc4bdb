"""ChiroDiff (Das et al. 2023): denoises drawings as sequences of pen movements, without padding's say."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebdiff.data.dataset import UNCONDITIONAL, Cond
from ebdiff.experiment.members import ChiroDiffConfig, Items
from ebdiff.nets.denoiser import Denoiser, Group, Member, Side
from ebdiff.nets.fused import normed
from ebdiff.system.draws import generator

FEATURES = 5  # of a point: its position, and the movement (dx, dy, dpen) that led to it
EMBEDDED = 8  # sines and cosines of a time at four frequencies
SCALE = 4.0  # standard deviation of the frequencies, per unit of time
UNIT = 1000  # timesteps in a unit of diffusion time: the T of the paper
HEADS = 4


def frequencies() -> Tensor:
    """Random Fourier frequencies, in radians per unit of time, float32 (4,).

    As bf16 can write them: a sampled network's buffers are cast along with its weights.
    """
    drawn = generator(0, "chirodiff/frequencies").standard_normal(EMBEDDED // 2)
    return torch.from_numpy(2 * math.pi * SCALE * drawn).bfloat16().float()


def embedded(time: Tensor, frequencies: Tensor) -> Tensor:
    """Sines, then cosines of times (...): float32 (..., 8)."""
    angles = time[..., None] * frequencies.float()
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def member(weight: str, side: Side, width: int, across: int, *, first: int = 0, whole: int = 0) -> Member:
    """`width` consecutive channels of a weight from `first` on, of `whole` (0: that is all of them)."""
    return Member(weight, side, slice(first, first + width), np.arange(width), whole or width, across)


class Recurrent(nn.Module):
    """Bidirectional GRUs, then a linear layer: (B, L, 5 + 8) to (B, L, hidden).

    A direction is a GRU over whole rows. What it reads ends in padding, which later steps alone see; for the
    other direction every drawing is reversed in its place. So no length leaves the device, unlike with packed
    sequences: those can't be part of a CUDA graph, and take three times as long to train on a CPU.
    """

    def __init__(self, hidden: int, layers: int, dropout: float):
        super().__init__()
        inputs = [FEATURES + EMBEDDED, *[2 * hidden] * (layers - 1)]
        self.onward = nn.ModuleList(nn.GRU(n, hidden, batch_first=True) for n in inputs)
        self.reverse = nn.ModuleList(nn.GRU(n, hidden, batch_first=True) for n in inputs)
        self.dropout = nn.Dropout(dropout)
        self.mid = nn.Linear(2 * hidden, hidden)
        self.widths = hidden, inputs

    def train(self, mode: bool = True) -> Recurrent:
        super().train(mode)
        for gru in (*self.onward, *self.reverse):
            gru.training = True  # or cuDNN gives no gradients to criteria; without its own dropout no matter
        return self

    def forward(self, points: Tensor, told: Tensor, own: Tensor) -> Tensor:
        h = torch.cat([points, told], dim=2).to(self.mid.weight.dtype)
        at = torch.arange(own.shape[1], device=own.device)
        turned = torch.where(own, own.sum(dim=1, keepdim=True) - 1 - at, at)[..., None]

        def reversed_(x: Tensor) -> Tensor:
            return x.gather(1, turned.expand(x.shape))

        for i, (onward, reverse) in enumerate(zip(self.onward, self.reverse, strict=True)):
            h = h if i == 0 else self.dropout(h)
            h = torch.cat([onward(h)[0], reversed_(reverse(reversed_(h))[0])], dim=2)
        return self.mid(h)

    def groups(self) -> list[Group]:
        """The units of each GRU: their three gates, their own recurrence, and who reads them."""
        (h, inputs), sides, found = self.widths, ("onward", "reverse"), []
        for i, n in enumerate(inputs):
            readers = {"body.mid.weight": h}
            if i + 1 < len(inputs):
                readers = {f"body.{side}.{i + 1}.weight_ih_l0": 3 * h for side in sides}
            for d, side in enumerate(sides):
                ih, hh = (f"body.{side}.{i}.weight_{kind}_l0" for kind in ("ih", "hh"))
                gates = [
                    member(weight, "out", h, across, first=gate * h, whole=3 * h)
                    for weight, across in ((ih, n), (hh, h))
                    for gate in range(3)
                ]
                read = [
                    member(weight, "in", h, across, first=d * h, whole=2 * h)
                    for weight, across in readers.items()
                ]
                members = (*gates, member(hh, "in", h, 3 * h), *read)
                found.append(Group(f"body.{side}.{i}", h, None, members))
        own = member("body.mid.weight", "out", h, 2 * h)
        reader = member("out.weight", "in", h, 3, whole=h + EMBEDDED)
        return [*found, Group("body.mid", h, None, (own, reader))]


class Block(nn.Module):
    """A layer of `nn.TransformerEncoder` with SiLU; q, k and v are layers of their own."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.scale = (width // HEADS) ** -0.5  # pruned or not

    def forward(self, h: Tensor, own: Tensor) -> Tensor:
        q, k, v = (layer(h).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=own[:, None, None], scale=self.scale)
        h = normed(h + self.dropout(self.proj(seen.transpose(1, 2).flatten(2))), self.norm1)
        return normed(h + self.dropout(self.down(self.dropout(F.silu(self.up(h))))), self.norm2)


class Transformer(nn.Module):
    """Attention among the points and the origin before them: (B, L, 5 + 8) to (B, L, 2 hidden).

    A point is predicted from its own and the previous token. Its place in the drawing, in [0, 1], is embedded
    as a time.
    """

    def __init__(self, hidden: int, layers: int, dropout: float):
        super().__init__()
        self.register_buffer("frequencies", frequencies())
        self.embed = nn.Linear(FEATURES + 2 * EMBEDDED, hidden)
        self.blocks = nn.ModuleList(Block(hidden, dropout) for _ in range(layers))
        self.width = hidden

    def forward(self, points: Tensor, told: Tensor, own: Tensor) -> Tensor:
        own = F.pad(own, (1, 0), value=True)
        place = (own.cumsum(dim=1) - 1) / (own.sum(dim=1, keepdim=True) - 1)
        told = told[:, :1].expand(-1, own.shape[1], -1)
        tokens = [F.pad(points, (0, 0, 1, 0)), embedded(place, self.frequencies), told]
        h = self.embed(torch.cat(tokens, dim=2).to(self.embed.weight.dtype))
        for block in self.blocks:
            h = block(h, own)
        return torch.cat([h[:, :-1], h[:, 1:]], dim=2)

    def groups(self) -> list[Group]:
        """The residual stream, then of each block q with k, v with `proj`, and `up` with `down`.

        Every head loses as many of its channels.
        """
        w, found = self.width, []
        stream = [member("body.embed.weight", "out", w, FEATURES + 2 * EMBEDDED)]

        def add(first: str, second: str, side: Side, n: int, heads: int | None) -> None:
            both = member(f"{first}.weight", "out", n, w), member(f"{second}.weight", side, n, w)
            found.append(Group(first, n, heads, both))

        for i in range(len(self.blocks)):
            name = f"body.blocks.{i}"
            add(f"{name}.q", f"{name}.k", "out", w, HEADS)
            add(f"{name}.v", f"{name}.proj", "in", w, HEADS)
            add(f"{name}.up", f"{name}.down", "in", 2 * w, None)
            stream += [member(f"{name}.{x}.weight", "in", w, w) for x in ("q", "k", "v")]
            stream.append(member(f"{name}.proj.weight", "out", w, w))
            stream.append(member(f"{name}.up.weight", "in", w, 2 * w))
            stream.append(member(f"{name}.down.weight", "out", w, 2 * w))
            stream += [member(f"{name}.norm{n}.weight", "norm", w, 0) for n in (1, 2)]
        whole = 2 * w + EMBEDDED
        stream += [member("out.weight", "in", w, 3, first=first, whole=whole) for first in (0, w)]
        return [Group("body.embed", w, None, tuple(stream)), *found]


class ChiroDiff(Denoiser):
    """The denoiser of drawings: movements (dx, dy, dpen) of variable length, whatever their classes.

    Each point is told its position, which is the sum of the noisy movements so far, and the diffusion time.
    416,859 parameters with three layers of 96 units. The noise in padding is predicted as 0.

    Args:
        config: body, width, layers and dropout.
        items: (L, 3), of variable length.
    """

    kept = ("out",)

    def __init__(self, config: ChiroDiffConfig, items: Items):
        super().__init__(config, items)
        self.register_buffer("frequencies", frequencies())
        body, read = (Recurrent, 1) if config.body == "gru" else (Transformer, 2)
        self.body = body(config.hidden, config.layers, config.dropout)
        self.out = nn.Linear(read * config.hidden + EMBEDDED, 3)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = UNCONDITIONAL) -> Tensor:
        own, length = cond.mask, x.shape[1]
        if not x.is_cuda:  # a GPU would have to be waited for
            own = own[:, : int(own.sum(dim=1).max())]
        moves = x[:, : own.shape[1]].masked_fill(~own[..., None], 0)
        # Sums so far, as a product: CUDA's `cumsum` doesn't repeat its bits.
        positions = moves.new_ones(own.shape[1], own.shape[1]).tril() @ moves[..., :2]
        told = embedded(t / UNIT, self.frequencies)[:, None].expand(-1, own.shape[1], -1)
        h = self.body(torch.cat([positions, moves], dim=2), told, own)
        eps = self.out(torch.cat([h, told.to(h.dtype)], dim=2)).to(x.dtype).masked_fill(~own[..., None], 0)
        return F.pad(eps, (0, 0, 0, length - own.shape[1]))

    def groups(self) -> tuple[Group, ...]:
        return tuple(self.body.groups())
