"""Parameters and MACs, by torch-pruning's counter (convolutions, linear layers and norms)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ebdiff.experiment.members import Architecture
from ebdiff.nets import denoiser
from ebdiff.nets.store import build
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


def count(architecture: Architecture, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Parameters and MACs per item of a network, counted while it predicts one.

    Attention's own matrix products are not counted, as in the paper's figures.
    """
    import torch_pruning as tp

    # On the CPU: on the meta device some operations import torch's compiler, a second per job.
    network = build(architecture, {name: torch.zeros(t.shape) for name, t in tensors.items()})
    macs, params = tp.utils.count_ops_and_params(network, network.example(1))
    return int(params), int(macs)
