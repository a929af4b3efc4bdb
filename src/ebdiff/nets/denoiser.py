"""What every network that denoises is, and the pruning groups that it may name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ebdiff.data.dataset import UNCONDITIONAL, Cond
from ebdiff.experiment.members import NETWORKS, Items, NetworkConfig

Side = Literal["out", "in", "norm"]


@dataclass(frozen=True)
class Member:
    """One dimension of one layer's weight that a group couples.

    Attributes:
        weight: its name, such as `conv_in.weight` or `gru.weight_hh_l0`; the bias goes with its outputs.
        side: `out` or `in` channels of it, or the channels of a `norm`.
        channels: indices along that dimension; a slice where they are consecutive.
        roots: for each of them, the root's channel it follows.
        width: size of the whole dimension in the dense network.
        across: size of the weight's other dimension; 0 for a norm.
    """

    weight: str
    side: Side
    channels: slice | np.ndarray
    roots: np.ndarray
    width: int
    across: int


@dataclass(frozen=True)
class Group:
    """Channels that must be pruned together; `mask` entries stand for the root's out-channels.

    Attributes:
        name: the root layer.
        width: C, out-channels of the root in the dense network.
        norm_groups: blocks of consecutive channels that lose equally many: G of the GroupNorms among the
            members, or attention heads; None: there are neither.
        members: every coupled dimension, the root first.
        factors: how many layers' outputs are multiplied to make a channel (GEGLU: 2). Each would lose its
            share, and a product goes with any of its factors: (1 - rate)^factors of the channels stay.
    """

    name: str
    width: int
    norm_groups: int | None
    members: tuple[Member, ...]
    factors: int = 1


class Denoiser(nn.Module):
    """eps(x_t, t, cond), dense or pruned: widths are read from the layers, never from the configuration.

    Buffers are functions of the arguments alone; they are stored with the weights.

    Attributes:
        kept: layers whose output channels are never pruned.
        ends: the first and the last layer, which sparse training may leave dense.

    Args:
        config: the network's section of the experiment.
        items: what is denoised.
    """

    kept: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()

    def __init__(self, config: NetworkConfig, items: Items):
        super().__init__()
        self.config, self.items = config, items

    def forward(self, x: Tensor, t: Tensor, cond: Cond = UNCONDITIONAL) -> Tensor:
        """The noise in x, of its shape and type.

        Args:
            x: noisy items (B, *items.shape); padding may hold anything and must change nothing.
            t: raw timestep indices (B,).
            cond: labels and masks.
        """
        raise NotImplementedError

    def example(self, n: int, smallest: bool = False) -> tuple[Tensor, Tensor, Cond]:
        """Arguments of `forward` for n items, on the network's device.

        Args:
            n: how many.
            smallest: as small as pruning groups can be traced on, instead of as large as the data.
        """
        return blank_inputs(self.items, n, next(self.parameters()).device)

    def null(self, cond: Cond) -> Cond:
        """The condition without its label, for guidance: the class after the last one."""
        if cond.label is None:
            return cond
        return cond._replace(label=torch.full_like(cond.label, self.items.classes))

    def groups(self) -> tuple[Group, ...] | None:
        """The pruning groups in the order of the walk; None: they are traced (`pruning.graph`)."""
        return None

    def walk(self) -> Sequence[nn.Module]:
        """Layers in the order in which traced groups are thinned; those it doesn't name follow as traced.

        A group comes where the first of its layers does, which is its root; naming more of them changes
        nothing. The order decides masks: earlier groups are already thinned when later ones are ranked.
        """
        return ()

    def thinned(self, group: Group) -> Group:
        """A traced group as the rule takes it: couplings don't tell attention heads, nor `factors`."""
        return group

    def maskable(self) -> list[str]:
        """The parameters that sparse training may mask: all weights but those of norms."""
        return [name for name, parameter in self.named_parameters() if parameter.dim() > 1]

    def multiplied(self) -> list[str]:
        """Layers whose channels are heard where those of another layer multiply them, such as keys.

        No weight reads such a channel: one that begins anew is silent only while the layer gives zero.
        """
        return []

    def imported(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a public checkpoint under this network's names."""
        return dict(tensors)


def blank_inputs(items: Items, n: int, device: torch.device) -> tuple[Tensor, Tensor, Cond]:
    """Arguments of `Denoiser.forward`: n items of zeros, of full length, of the first class, at t = 0."""
    with device:
        label = torch.zeros(n, dtype=torch.long) if items.classes else None
        mask = torch.ones(n, items.shape[0], dtype=torch.bool) if items.variable else None
        return torch.zeros(n, *items.shape), torch.zeros(n, dtype=torch.long), Cond(label, mask)


def build(config: NetworkConfig, items: Items) -> Denoiser:
    """The dense network of a config for some items, with torch's default weights."""
    return NETWORKS.member(config.kind)(config, items)
