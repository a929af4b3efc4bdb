"""What a training step computes and moves, the least time a device takes for it, and which rates pay there.

The roofline model (Williams, Waterman and Patterson, CACM 52(4), 2009): pure arithmetic, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebdiff.report import text

WORTH = 0.95  # a rate pays whose step takes at most so much of the next lower paying one's time
STATE = 2 * 5 * 4  # bytes per parameter: weight, gradient, average, two moments in fp32, read and written


def operations(macs: int, batch: int) -> int:
    """FLOP of a training step: 2 per MAC, and twice as many in the backward pass as in the forward pass."""
    return 6 * macs * batch


def moved(params: int, activations: int, batch: int, precision: str) -> int:
    """Bytes that a training step moves at least, on any device, if nothing but a layer stays in a cache.

    Forward, each layer reads its input and its weights and writes its output, once; the gradients of input
    and of weights each move as much again. The optimiser then reads and writes its state once. Not counted
    are what can be fused into a layer (SiLU, dropout, additions, casts) and attention's products, as in MACs.

    Args:
        params: of the network.
        activations: elements that its layers read and write for one item, weights apart.
        batch: items in a step.
        precision: that layers execute in; `bf16` takes two bytes an element, all others four.
    """
    size = 2 if precision == "bf16" else 4
    return 3 * size * (batch * activations + params) + STATE * params


def bounded(
    network: Mapping[str, Any], batch: int, precision: str, peaks: Mapping[str, Any]
) -> dict[str, Any]:
    """A training step's `operations`, `bytes`, the least time they allow (`bound_ms`) and which binds.

    Args:
        network: its `params`, `macs` and `activations`.
        batch: items in a step.
        precision: that it executes in.
        peaks: of the device: `flops` by precision and `bytes`, both per second.
    """
    flop = operations(network["macs"], batch)
    size = moved(network["params"], network["activations"], batch, precision)
    seconds, by = max((flop / peaks["flops"][precision], "operations"), (size / peaks["bytes"], "bytes"))
    return {"operations": flop, "bytes": size, "bound_ms": round(1e3 * seconds, 3), "bound_by": by}


def in_vain(networks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each rate that gains nothing on the device that timed it: which pay instead.

    Args:
        networks: `step_ms` of each, from `dense` by ascending rate.
    """
    (best, *rates), pay, vain = networks, [], []
    for rate in rates:
        own, less = networks[rate]["step_ms"], networks[best]["step_ms"]
        if own <= WORTH * less:
            pay.append(best := rate)
        else:
            times = f"{text.number(own)} ms a step against {text.number(less)} ms for {best}"
            vain.append(f"rate {rate} gains nothing on this device ({times})")
    return [f"{told}; what pays: {', '.join(pay) or 'none'}" for told in vain]
