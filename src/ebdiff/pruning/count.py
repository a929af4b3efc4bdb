"""Parameters and MACs by torch-pruning's counter, and activations (convolutions, linear layers, norms)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ebdiff.experiment.members import Architecture
from ebdiff.nets import denoiser
from ebdiff.nets.store import CONVOLUTIONS, build
from ebdiff.pruning.graph import trace
from ebdiff.pruning.select import select_random
from ebdiff.pruning.surgery import cut

COUNTER = "torch-pruning count_ops_and_params"


def meta_tensors(architecture: Architecture, rate: float) -> dict[str, Tensor]:
    """Shapes of the network pruned at a rate (0: dense), without storage.

    Which channels go doesn't matter to a shape, so the mask is any of the rule's.
    """
    with torch.device("meta"):
        tensors: dict[str, Tensor] = denoiser.build(*architecture).state_dict()
    if rate == 0:
        return tensors
    return cut(architecture, tensors, select_random(trace(architecture), np.random.default_rng(0), rate))


class Counted(NamedTuple):
    """What a network holds, and what it computes and moves while it predicts one item."""

    params: int
    macs: int  # without attention's own matrix products, as in the paper's figures
    activations: int  # elements of all inputs and outputs of layers with parameters


def count(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Counted:
    """Count a network of these shapes while it predicts one item."""
    import torch_pruning as tp

    # On the CPU: on the meta device some operations import torch's compiler, a second per job.
    network = build(architecture, {name: torch.zeros(t.shape) for name, t in tensors.items()})
    activations = watch(network)
    tp.utils.op_counter.MODULES_MAPPING[nn.GRU] = _gru_macs  # its own takes a drawing's features for points
    macs, params = tp.utils.count_ops_and_params(network, network.example(1))  # runs a copy, watched alike
    return Counted(int(params), int(macs), sum(activations))


def _gru_macs(layer: nn.GRU, read: tuple, _: object) -> None:
    """Every weight once a point, of padded or of packed sequences."""
    points = read[0].data.shape[:-1].numel()
    layer.__flops__ += points * sum(p.numel() for p in layer.parameters() if p.dim() > 1)


def watch(network: nn.Module) -> list[int]:
    """Elements of input and output of each layer with parameters, appended whenever it is called."""
    found: list[int] = []

    def note(layer: nn.Module, read: tuple, written: object) -> None:
        found.append(sum(x.numel() for x in tree_leaves((read, written)) if isinstance(x, Tensor)))

    for layer in network.modules():
        if next(layer.parameters(recurse=False), None) is not None:
            layer.register_forward_hook(note)
    return found


def weight_macs(network: nn.Module) -> dict[str, int]:
    """MACs of every layer's weights by name while a network predicts one item."""
    found: dict[str, int] = {}

    def note(layer: nn.Module, read: tuple, written: object) -> None:
        out = tree_leaves(written)[0].data  # of a packed sequence too
        places = out.numel() // out.shape[1 if isinstance(layer, CONVOLUTIONS) else -1]
        for key, weight in layer.named_parameters(recurse=False):
            if weight.dim() > 1 and not isinstance(layer, nn.Embedding):
                name = f"{names[layer]}.{key}"
                found[name] = found.get(name, 0) + places * weight.numel()

    names = {layer: name for name, layer in network.named_modules()}
    hooks = [layer.register_forward_hook(note) for layer in names]
    with torch.no_grad():
        network(*network.example(1))
    for hook in hooks:
        hook.remove()
    return found
