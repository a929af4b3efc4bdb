"""Mask -> smaller network: cutting the pruned channels out of every coupled tensor."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ebdiff.config import Network
from ebdiff.pruning.graph import mask_length, split, trace
from ebdiff.pruning.select import Kept


def cut(config: Network, tensors: Mapping[str, Tensor], mask: np.ndarray) -> dict[str, Tensor]:
    """The tensors of the subnetwork that a mask keeps.

    Args:
        config: the dense network's config.
        tensors: its parameters by name.
        mask: bool over all groups' channels, True = kept.

    Raises:
        ValueError: the mask is of another network.
    """
    groups = trace(config)
    if mask.shape != (mask_length(groups),):
        raise ValueError(f"mask has shape {mask.shape}, this network needs ({mask_length(groups)},)")
    kept = Kept()
    for group, part in zip(groups, split(groups, mask), strict=True):
        kept.thin(group, part)
    smaller = {}
    for name, tensor in tensors.items():
        layer, kind = name.rsplit(".", 1)
        if tensor.dim() == 1 and (layer, "norm") in kept:
            smaller[name] = tensor[kept.indices(layer, "norm")]
            continue
        if (layer, "out") in kept:
            tensor = tensor[kept.indices(layer, "out")]
        if kind == "weight" and (layer, "in") in kept:
            tensor = tensor[:, kept.indices(layer, "in")]
        smaller[name] = tensor
    return smaller
