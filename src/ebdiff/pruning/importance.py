"""How channels are ranked: per-weight scores from which every group's importances are summed.

A score is kept per weight with the kernel already summed: a matrix (out, in), a vector for norms.
Magnitude, Taylor and Diff-Pruning differ in the scores alone. Scores stay on the weights' device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ebdiff.data.dataset import Batch
from ebdiff.diffusion.process import Process
from ebdiff.experiment.schema import Pruning

Scores = dict[str, Tensor]


def magnitude(tensors: Mapping[str, Tensor]) -> Scores:
    """Squared weights, summed over the kernel; biases and norms count for nothing.

    Args:
        tensors: a network's parameters by name.

    Returns:
        matrices (out, in) by weight, on the parameters' device.
    """
    return {name: _over_kernel(w.detach().square()) for name, w in tensors.items() if w.dim() > 1}


def first_order(network: nn.Module, gradients: Mapping[str, Tensor]) -> Scores:
    """(w dL/dw)^2 summed over the kernel, and |w dL/dw| of norm gains (Taylor, Diff-Pruning).

    Args:
        network: the dense network.
        gradients: accumulated loss gradients by parameter name.
    """

    def score(product: Tensor) -> Tensor:
        return _over_kernel(product.square()) if product.dim() > 1 else product.abs()

    return {name: score(p.detach() * gradients[name]) for name, p in network.named_parameters()}


def _over_kernel(squares: Tensor) -> Tensor:
    """(out, in, ...) summed over the kernel; on a CPU a matrix product takes half the time of `sum`.

    Not on a GPU, where a product may be rounded to TF32.
    """
    if squares.dim() == 2:
        return squares
    if squares.device.type == "cpu" and squares.is_contiguous():
        flat = squares.flatten(2)
        return flat @ flat.new_ones(flat.shape[2])
    return squares.sum(dim=tuple(range(2, squares.dim())))


def accumulate_gradients(
    network: nn.Module,
    items: Batch,
    noise: Tensor,
    process: Process,
    pruning: Pruning,
    *,
    stop_early: bool,
    micro_batch: int | None = None,
) -> tuple[dict[str, Tensor], int]:
    """Loss gradients summed over timesteps 0, stride, 2 stride, ... on one fixed batch and noise.

    With `stop_early` this is Diff-Pruning (Fang et al. 2023): the first t whose loss falls below
    threshold x the largest loss so far ends the sum. Without, it is Taylor over all timesteps.

    Args:
        network: the dense network; put into eval mode (no dropout).
        items: what is noised, fixed over timesteps.
        noise: of the shape of x0, fixed too.
        process: noising and loss.
        pruning: threshold and stride.
        stop_early: whether the threshold ends the sum.
        micro_batch: items whose activations are held at a time; None: all. Changes rounding only.

    Returns:
        gradients by parameter name, and the number of timesteps used.
    """
    network.eval().zero_grad(set_to_none=True)
    size = micro_batch or len(noise)
    parts = [slice(first, first + size) for first in range(0, len(noise), size)]

    def loss(part: slice, t: int) -> Tensor:
        x0, cond, eps = items.x0[part], items.cond.rows(part), noise[part]
        steps = torch.full((len(x0),), t, device=x0.device)
        predicted = network(process.noised(x0, steps, eps), steps, cond)
        return process.loss(predicted, eps, cond.mask).sum() / len(noise)

    largest, used = 0.0, 0
    for t in range(0, process.diffusion.timesteps, pruning.stride):
        # Whether t counts is known from the loss of the whole batch: of a cut one it is taken first.
        with torch.set_grad_enabled(len(parts) == 1):
            losses = [loss(part, t) for part in parts]
        value = sum(x.item() for x in losses)
        largest = max(largest, value)
        if stop_early and value < pruning.threshold * largest:
            break
        if len(parts) == 1:
            losses[0].backward()
        else:
            for part in parts:
                loss(part, t).backward()
        used += 1
    gradients = {n: p.grad for n, p in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    return gradients, used
