"""The plain way to a mask: the dependency graph traced anew, every group ranked and really pruned."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from ebdiff.experiment.members import Architecture
from ebdiff.nets.unet import UNet
from ebdiff.pruning.graph import trace

PRUNABLE = [nn.Conv2d, nn.Linear]


def importance(graph: tp.DependencyGraph, group: tp.Group) -> Tensor:
    """Squared weights per channel, summed over the group's layers of the root's length."""
    found = []
    for dependency, channels in group:
        layer = dependency.target.module
        if isinstance(layer, tuple(PRUNABLE)):
            out = graph.is_out_channel_pruning_fn(dependency.handler)
            squares = layer.weight.data.transpose(0, 0 if out else 1).flatten(1).square().sum(1)
            found.append(squares[channels])
    return torch.stack([f for f in found if len(f) == len(found[0])]).sum(0)


def prune(network: UNet, rate: float) -> tuple[np.ndarray, UNet]:
    """The mask (True = kept) and the pruned copy of a network, group after group.

    The number of channels a group loses is the paper's: n = C - int(C (1 - rate)), in whole norm groups.
    Groups come in the official code's order, as in `graph.trace`.
    """
    roots = [group.name for group in trace(Architecture(network.config, network.items))]
    network = copy.deepcopy(network)
    device, example = network.conv_in.weight.device, network.example(1)
    graph = tp.DependencyGraph().build_dependency(network, example)
    masks = []
    for root in map(network.get_submodule, roots):
        handler = graph.get_pruner_of_module(root).prune_out_channels
        group = graph.get_pruning_group(root, handler, range(root.weight.shape[0]))
        norms = [d.target.module.num_groups for d, _ in group if isinstance(d.target.module, nn.GroupNorm)]
        blocks = norms[0] if norms else 1
        channels = root.weight.shape[0]
        lost = (channels - int(channels * (1 - rate))) // blocks
        order = importance(graph, group).view(blocks, -1).argsort(dim=1)[:, :lost]
        pruned = (order + torch.arange(0, channels, channels // blocks, device=device)[:, None]).flatten()
        mask = np.ones(channels, bool)
        mask[pruned.cpu().numpy()] = False
        masks.append(mask)
        if lost:
            graph.get_pruning_group(root, handler, sorted(pruned.tolist())).prune()
    return np.concatenate(masks), network
