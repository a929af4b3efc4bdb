"""Mask -> smaller network: cutting the pruned channels out of every coupled tensor."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ebdiff.experiment.schema import Network
from ebdiff.pruning.graph import mask_length, positions, trace


def cut(config: Network, tensors: Mapping[str, Tensor], mask: np.ndarray) -> dict[str, Tensor]:
    """The tensors of the subnetwork that a mask keeps.

    Args:
        config: the dense network's config.
        tensors: its parameters and buffers by name.
        mask: bool over all groups' channels, True = kept.

    Raises:
        ValueError: the mask is of another network.
    """
    groups = trace(config)
    if mask.shape != (mask_length(groups),):
        raise ValueError(f"mask has shape {mask.shape}, this network needs ({mask_length(groups)},)")
    stays = np.append(mask, True)  # the channels that no group prunes
    left = {key: np.flatnonzero(stays[where]) for key, where in positions(groups).items()}
    smaller = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if tensor.dim() == 1 and (layer, "norm") in left:
            smaller[name] = tensor[left[layer, "norm"]]
            continue
        if (layer, "out") in left:
            tensor = tensor[left[layer, "out"]]
        if kind == "weight" and (layer, "in") in left:
            tensor = tensor[:, left[layer, "in"]]
        smaller[name] = tensor
    return smaller
