"""Pruning groups: which channels of which layers live and die together.

The coupling comes from torch-pruning's dependency graph, traced once per architecture, where a network
doesn't name its groups. Which channels go is decided in `select.py`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import nn

from ebdiff.experiment.members import Architecture
from ebdiff.nets.denoiser import Group, Member, Side, build


def _span(indices: np.ndarray) -> slice | np.ndarray:
    """Consecutive indices as a slice, which NumPy reads without copying."""
    start = int(indices[0])
    if np.array_equal(indices, np.arange(start, start + len(indices))):
        return slice(start, start + len(indices))
    return indices


@lru_cache(maxsize=8)
def trace(architecture: Architecture) -> tuple[Group, ...]:
    """The pruning groups of the dense network, in the order of its `walk`.

    Of a U-Net everything but `conv_out`'s outputs and the image is prunable: 50 groups and 12,032
    channels for CIFAR-10, 61 and 18,176 for CelebA 64, 71 and 23,296 for LSUN 256.
    """
    with torch.device("meta"):
        network = build(*architecture).eval()
    own = network.groups()
    if own is not None:
        return own
    import torch_pruning as tp

    # Run on the CPU: on the meta device some operations import torch's compiler, a second per job.
    network.to_empty(device="cpu")
    example = network.example(1, smallest=True)
    # Without a function of ours, a bare `except` there swallows the signal that ends a job.
    graph = tp.DependencyGraph().build_dependency(network, example, forward_fn=lambda net, x: net(*x))
    names = {module: name for name, module in network.named_modules()}
    kept, coupled, groups = set(map(network.get_submodule, network.kept)), set(), []
    for layer in (*network.walk(), *graph.module2node):
        if layer in coupled or not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        cuts_outputs = graph.get_pruner_of_module(layer).prune_out_channels
        found = graph.get_pruning_group(layer, cuts_outputs, range(layer.weight.shape[0]))
        outputs = {i.dep.target.module for i in found if graph.is_out_channel_pruning_fn(i.dep.handler)}
        coupled |= outputs
        if outputs & kept:
            continue
        members, norm_groups = [], None
        for item in found:
            module = item.dep.target.module
            if module not in names:  # the graph's own nodes: concatenations, reshapes, sums
                continue
            side: Side
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                side, width, across = "norm", len(module.weight), 0
                norm_groups = getattr(module, "num_groups", norm_groups)
            else:
                side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
                width, across = module.weight.shape[:2] if side == "out" else module.weight.shape[1::-1]
            channels, roots = _span(np.array(item.idxs)), np.array(item.root_idxs)
            members.append(Member(f"{names[module]}.weight", side, channels, roots, width, across))
        root = members[0]
        name = root.weight.removesuffix(".weight")
        groups.append(network.thinned(Group(name, len(root.roots), norm_groups, tuple(members))))
    return tuple(groups)


def mask_length(groups: tuple[Group, ...]) -> int:
    """Entries of a mask: the out-channels of all roots."""
    return sum(group.width for group in groups)


def split(groups: tuple[Group, ...], mask: np.ndarray) -> list[np.ndarray]:
    """The mask's part of each group, as views."""
    return np.split(mask, np.cumsum([group.width for group in groups])[:-1])


def positions(groups: tuple[Group, ...]) -> dict[tuple[str, Side], np.ndarray]:
    """Where in a mask the fate of every channel stands, for both sides of every weight.

    Returns:
        int64 positions along each (weight, side) that some group prunes; `mask_length(groups)` where a
        channel of it stays whatever the mask.
    """
    length, first = mask_length(groups), 0
    found: dict[tuple[str, Side], np.ndarray] = {}
    for group in groups:
        for m in group.members:
            where = found.setdefault((m.weight, m.side), np.full(m.width, length))
            where[m.channels] = first + m.roots
        first += group.width
    return found
