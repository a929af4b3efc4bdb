"""Mask -> smaller network: cutting the pruned channels out of every coupled tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from ebdiff.experiment.members import Architecture
from ebdiff.nets.denoiser import Group, Member
from ebdiff.pruning.graph import mask_length, positions, split, trace


def cut(architecture: Architecture, tensors: Mapping[str, Tensor], mask: np.ndarray) -> dict[str, Tensor]:
    """The tensors of the subnetwork that a mask keeps.

    Args:
        architecture: of the dense network.
        tensors: its parameters and buffers by name.
        mask: bool over all groups' channels, True = kept.

    Raises:
        ValueError: the mask is of another network.
    """
    groups = trace(architecture)
    if mask.shape != (mask_length(groups),):
        raise ValueError(f"mask has shape {mask.shape}, this network needs ({mask_length(groups)},)")
    stays = np.append(mask, True)  # the channels that no group prunes
    left = {key: np.flatnonzero(stays[where]) for key, where in positions(groups).items()}
    smaller = {}
    for name, tensor in tensors.items():
        layer, _, key = name.rpartition(".")
        weight = f"{layer}.{key.replace('bias', 'weight')}"
        for side in ("norm", "out"):
            if (weight, side) in left:
                tensor = tensor[left[weight, side]]
        if (name, "in") in left:
            tensor = tensor[:, left[name, "in"]]
        smaller[name] = tensor
    return smaller


def groups_left(architecture: Architecture, tensors: Mapping[str, Tensor]) -> tuple[Group, ...]:
    """The pruning groups of a subnetwork, found by the shapes of its tensors.

    Which channels went doesn't matter: of every norm group as many did.

    Args:
        architecture: of the dense network.
        tensors: the subnetwork's parameters by name.
    """
    groups, parts = trace(architecture), []
    for group in groups:
        root, blocks = group.members[0], group.norm_groups or 1
        width = tensors[root.weight].shape[0] * group.width // root.width
        parts.append(np.tile(np.arange(group.width // blocks) < width // blocks, blocks))
    mask = np.concatenate(parts)
    stays = np.append(mask, True)
    place = {key: np.cumsum(stays[where]) - 1 for key, where in positions(groups).items()}
    found = []
    for group, part in zip(groups, split(groups, mask), strict=True):
        members, root = [], np.cumsum(part) - 1
        for m in group.members:
            left = part[m.roots]
            channels = place[m.weight, m.side][np.arange(m.width)[m.channels][left]]
            width, *across = tensors[m.weight].shape[:2] if m.side != "in" else tensors[m.weight].shape[1::-1]
            members.append(Member(m.weight, m.side, channels, root[m.roots[left]], width, *(across or [0])))
        found.append(replace(group, width=int(part.sum()), members=tuple(members)))
    return tuple(found)
