"""Mask -> smaller network: cutting the pruned channels out of every coupled tensor."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ebdiff.experiment.members import Architecture
from ebdiff.pruning.graph import mask_length, positions, trace


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
