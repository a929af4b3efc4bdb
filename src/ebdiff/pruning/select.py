"""The channel rule: rate -> mask, exactly as the paper's networks were cut.

Groups are walked in order, earlier ones already thinned: the importance of a later group sums only
the weights that are still there. `left @ W` does that on the cached scores without cutting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ebdiff.pruning.graph import Group, Member, Side, mask_length, positions, split
from ebdiff.pruning.importance import Scores


@dataclass(frozen=True)
class _Step:
    """One group of the walk.

    Attributes:
        members: those that count, with their channels. Members of another length (a residual stream
            that feeds one concatenation twice) are dropped, as in the reference.
        across: mask positions of the channels that their importances are summed over, one member after
            the other.
        sizes: how many of them belong to each member.
        kept: which ranks are kept, (R, norm groups, channels of each).
    """

    members: list[tuple[Member, slice | Tensor]]
    across: Tensor
    sizes: list[int]
    kept: Tensor


class Selector:
    """The masks of several rates at once, from scores on any device.

    What doesn't change from mask to mask is worked out once, here. A call runs on the device of the
    scores and hands over nothing but the masks. Sums are taken in float64: a rate's mask doesn't depend
    on the other rates, and neither TF32 nor autocast touches it.

    Args:
        groups: from `graph.trace`.
        rates: asked pruning rates in [0, 1), R of them.
        device: where the scores will be.
    """

    def __init__(self, groups: tuple[Group, ...], rates: Sequence[float], device: torch.device | str = "cpu"):
        self.device, self.rates, self.length = torch.device(device), len(rates), mask_length(groups)
        where = positions(groups)
        self._steps = []
        for group in groups:
            members = [m for m in group.members if len(m.roots) == group.width]
            across = [self._across(m, where) for m in members]
            kept = np.stack([_kept_ranks(group, rate) for rate in rates])
            self._steps.append(
                _Step(
                    [(m, self._on_device(m.channels)) for m in members],
                    torch.from_numpy(np.concatenate(across)).to(self.device),
                    [len(a) for a in across],
                    torch.from_numpy(kept).to(self.device),
                )
            )

    def _on_device(self, channels: slice | np.ndarray) -> slice | Tensor:
        return channels if isinstance(channels, slice) else torch.from_numpy(channels).to(self.device)

    def _across(self, m: Member, where: dict[tuple[str, str], np.ndarray]) -> np.ndarray:
        """Mask positions along the other side of a member's layer; none for a norm."""
        other = (m.weight, "in" if m.side == "out" else "out")
        return where.get(other, np.full(m.across, self.length))

    def __call__(self, scores: Scores) -> np.ndarray:
        """The masks of given scores: bool (R, channels of all groups in order), True = kept."""
        scores = {weight: score.double() for weight, score in scores.items()}
        # One more column, for the channels that no group prunes.
        masks = torch.ones(self.rates, self.length + 1, dtype=torch.float64, device=self.device)
        first = 0
        for step in self._steps:
            blocks, size = step.kept.shape[1:]
            importance = masks.new_zeros(self.rates, blocks * size)
            left = masks[:, step.across].split(step.sizes, dim=1)
            for (member, channels), channels_left in zip(step.members, left, strict=True):
                if member.weight in scores:
                    _add_importance(importance, member.side, channels, scores[member.weight], channels_left)
            order = importance.view(step.kept.shape).argsort(dim=2, stable=True)
            mask = torch.empty_like(step.kept).scatter_(2, order, step.kept)
            masks[:, first : first + blocks * size] = mask.flatten(1)
            first += blocks * size
        return masks[:, :-1].bool().cpu().numpy()


def _add_importance(
    importance: Tensor, side: Side, channels: slice | Tensor, score: Tensor, left: Tensor
) -> None:
    """Add what a member makes its channels worth (R, C), summed over what is `left` (R, across) of it."""
    if side == "norm":
        importance += score[channels]
    else:
        importance.addmm_(left, score[channels].T if side == "out" else score[:, channels])


def pruned_count(width: int, rate: float, norm_groups: int | None, factors: int = 1) -> int:
    """Channels a group loses: n = C - int(C (1 - r)), in whole norm groups where there are any.

    At 128 channels and 32 norm groups a rate of 0.3 takes 25 %, 0.6 takes 50 %. Of products (`factors`)
    (1 - r)^factors stay: the reference ranks the halves of a GEGLU apart, and a pair goes with either.
    """
    n = width - int(width * (1 - rate) ** factors)
    return n if norm_groups is None else n // norm_groups * norm_groups


def _kept_ranks(group: Group, rate: float) -> np.ndarray:
    """Which ranks are kept in each of G consecutive blocks, least important first: bool (G, C / G)."""
    blocks = group.norm_groups or 1
    n = pruned_count(group.width, rate, group.norm_groups, group.factors) // blocks
    return np.tile(np.arange(group.width // blocks) >= n, (blocks, 1))


def select(groups: tuple[Group, ...], scores: Scores, rate: float) -> np.ndarray:
    """The mask of one rate under given scores on the CPU; `Selector` takes many.

    Args:
        groups: from `graph.trace`.
        scores: per-layer scores from `importance`.
        rate: asked pruning rate in [0, 1).

    Returns:
        bool array over all groups' channels in order, True = kept.
    """
    return Selector(groups, [rate])(scores)[0]


def select_random(groups: tuple[Group, ...], rng: np.random.Generator, rate: float) -> np.ndarray:
    """A mask of the same sizes whose channels are drawn uniformly."""
    masks = []
    for group in groups:
        kept = _kept_ranks(group, rate)
        order = np.argsort(rng.random(kept.size).reshape(kept.shape), axis=1, kind="stable")
        mask = np.empty_like(kept)
        np.put_along_axis(mask, order, kept, axis=1)
        masks.append(mask.ravel())
    return np.concatenate(masks)


def realised_rate(mask: np.ndarray) -> float:
    """Share of channels pruned, which the norm groups may hold below the asked rate."""
    return float(1 - mask.mean())


def widths(groups: tuple[Group, ...], mask: np.ndarray) -> dict[str, int]:
    """Kept channels of each group by its root's name."""
    return {g.name: int(part.sum()) for g, part in zip(groups, split(groups, mask), strict=True)}
