"""What turns items into images: metrics, figures and samples.npy see images and nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ebdiff.data.dataset import Cond, to_uint8
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.members import CODECS


class Carried(NamedTuple):
    """What decoding takes where neither experiment nor first stage is: tensors by name, and their config."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(t.numel() for t in self.tensors.values())


class Codec:
    """Opened once per job; may hold a network. Those that know a way back add `encode(images) -> items`.

    Attributes:
        keeps_items: whether samples are kept as items too, because images don't tell all of them.

    Args:
        experiment: with the section `codec`.
        device: where items come from.
    """

    keeps_items = True

    def __init__(self, experiment: Experiment, device: torch.device):
        self.experiment, self.device = experiment, device

    def decode(self, items: Tensor, cond: Cond) -> np.ndarray:
        """The images of items (B, *items.shape): uint8 (B, H, W, C). Called without gradients.

        Args:
            items: on the codec's device.
            cond: their labels and masks.
        """
        raise NotImplementedError

    def vector(self, items: Tensor, cond: Cond) -> list[str] | None:
        """The items as SVG documents, where they are drawings; arguments as for `decode`."""
        return None

    def carried(self) -> Carried:
        """What goes with an exported ensemble: nothing, unless there is a network."""
        return Carried({}, {})

    @classmethod
    def decoder(cls, experiment: Experiment, device: torch.device, carried: Carried) -> Self:
        """Opened of what another one `carried`: it decodes with the same bits, and may do no more.

        Raises:
            UserError: these tensors don't fit.
        """
        return cls(experiment, device)


class Identity(Codec):
    """Items are images in [-1, 1]."""

    keeps_items = False

    def decode(self, items: Tensor, cond: Cond) -> np.ndarray:
        """Clipped and rounded."""
        return to_uint8(items)


def open_codec(experiment: Experiment, device: torch.device, carried: Carried | None = None) -> Codec:
    """The codec of an experiment, or its `decoder` of what was carried elsewhere."""
    member = CODECS.member(experiment.codec.kind)
    return member(experiment, device) if carried is None else member.decoder(experiment, device, carried)
