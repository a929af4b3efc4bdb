"""Sparse training from the first step to the last: masks that stay or move, and channels begun anew.

Static, RigL (Evci et al. 2020) and MagRan (SET, Mocanu et al. 2018) are one update of masks with two scores:
by what weights go, and by what others come. Recycling does the same to whole channels of a small network,
whose step is as short as a pruned network's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebdiff.experiment.members import Architecture
from ebdiff.experiment.sparsity import Masked, Moving
from ebdiff.experiment.sparsity import RigL as RigLConfig
from ebdiff.nets import store
from ebdiff.nets.denoiser import Denoiser, Group, Member
from ebdiff.pruning.importance import Scores, magnitude
from ebdiff.pruning.surgery import groups_left
from ebdiff.system.draws import generator
from ebdiff.system.errors import UserError
from ebdiff.training.hooks import Hook
from ebdiff.training.loop import Job
from ebdiff.training.state import SAVED, State


def densities(shapes: Mapping[str, tuple[int, ...]], sparsity: float, distribution: str) -> dict[str, float]:
    """The share of weights that each layer keeps, together 1 - sparsity of all.

    Erdős-Rényi-Kernel: density = eps * sum(dims) / prod(dims) with dims such as (out, in, kh, kw); a layer
    that this would fill more than once is dense, and eps solved again for the others (Evci et al. 2020).

    Args:
        shapes: of the masked weights.
        sparsity: share of zeros, in [0, 1).
        distribution: `erk` or `uniform`.
    """
    if distribution == "uniform":
        return dict.fromkeys(shapes, 1 - sparsity)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / size[name] for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        rest = raw.keys() - dense
        room = (1 - sparsity) * sum(size.values()) - sum(size[name] for name in dense)
        eps = room / sum(raw[name] * size[name] for name in rest) if rest else 0.0
        full = {name for name in rest if eps * raw[name] > 1}
        if not full:
            return {name: 1.0 if name in dense else eps * raw[name] for name in shapes}
        dense |= full


def exchanged(on: Tensor, count: int, share: float, drop: Tensor, grow: Tensor) -> Tensor:
    """A layer's mask after an update.

    Of its `count` weights `int(share * count)` go, those lowest in `drop`; as many come, those highest in
    `grow` of all that didn't stay: what just went may come back, as in RigL's code.

    Args:
        on: the mask, True = there; `drop` and `grow` have its shape.
    """
    n = int(share * count)
    stays = _highest(drop.masked_fill(~on, -math.inf), count - n)
    return stays | _highest(grow.masked_fill(stays, -math.inf), n)


def _highest(scores: Tensor, n: int) -> Tensor:
    """True at the n highest; of equal ones, the first."""
    if n == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    least = flat.topk(n, sorted=False).values.min()
    above, equal = flat > least, flat == least
    return (above | equal & (equal.cumsum(0) <= n - above.sum())).view(scores.shape)


class Masks(Hook):
    """Masks drawn at random with exact counts, which never change (Static-DM).

    What is masked has no gradient. So clipping doesn't see it, and zeros in weights, moments and average stay
    zeros under Adam and decay: a step costs one more kernel, and masks are applied where they change.
    """

    def __init__(self, config: Masked, job: Job):
        self.config, self.job = config, job

    @staticmethod
    def nonzeros(config: Masked, network: Denoiser) -> dict[str, int]:
        """How many weights each masked layer keeps.

        Raises:
            UserError: a layer would be empty.
        """
        ends = {f"{layer}.weight" for layer in network.ends if config.ends == "dense"}
        own = {name: network.get_parameter(name) for name in network.maskable() if name not in ends}
        shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
        found = densities(shapes, config.sparsity, config.distribution)
        counts = {name: round(density * own[name].numel()) for name, density in found.items()}
        for name, count in counts.items():
            if count == 0:
                raise UserError(
                    f"sparse.sparsity {config.sparsity:g} with distribution {config.distribution} leaves "
                    f"nothing of {name} ({own[name].numel()} weights); lower it, or take another distribution"
                )
        return counts

    def begin(self, state: State) -> None:
        self.counts = self.nonzeros(self.config, state.network)
        self.on = torch.ones_like(state.raw, dtype=torch.bool)  # also where nothing is ever masked
        views, draws = state.named(self.on), self._draws(0)
        self._layers = {name: views[name] for name in self.counts}
        for name, on in self._layers.items():
            drawn = torch.from_numpy(draws.random(tuple(on.shape), np.float32))
            on.copy_(_highest(drawn, self.counts[name]))
        self._first = self.on.clone()
        for name, on in self._layers.items():
            on.copy_(state.extra.get(f"sparse.{name}", on))
        self._overlap = state.extra.get("sparse.overlap", torch.zeros(0, 3, dtype=torch.float64))
        self._silence(state)

    def graded(self, state: State) -> None:
        state.grad.mul_(self.on)

    def carry(self) -> Mapping[str, Tensor]:
        return {"sparse.overlap": self._overlap} | {f"sparse.{name}": on for name, on in self._layers.items()}

    def told(self) -> Mapping[str, Any]:
        """With the `overlap` at each update: its step, and the kept weights' shares that were kept at first
        and just before."""
        kept, size = sum(self.counts.values()), sum(on.numel() for on in self._layers.values())
        masked = {"zeros": size - kept, "nonzeros": self.counts, "overlap": self._overlap.tolist()}
        return {"sparse": {**self.config.model_dump(), **masked}}

    def _draws(self, step: int) -> np.random.Generator:
        return generator(self.job.seed, f"{self.job.name}/sparse", step)

    def _silence(self, state: State) -> None:
        for kind in SAVED:
            getattr(state, kind).mul_(self.on)

    def _exchange(self, state: State, grow: Iterator[Tensor]) -> None:
        """The update of all masks; `grow`: scores of each layer in turn. What comes has been zero."""
        weights, share, before = state.view("raw"), self.config.share(state.step), self.on.clone()
        for (name, on), scores in zip(self._layers.items(), grow, strict=True):
            on.copy_(exchanged(on, self.counts[name], share, weights[name].abs(), scores))
        kept = sum(self.counts.values())
        unmasked = int(self.on.sum()) - kept
        common = (int((self.on & other).sum()) - unmasked for other in (self._first, before))
        row = torch.tensor([[state.step, *(count / kept for count in common)]], dtype=torch.float64)
        self._overlap = torch.cat([self._overlap, row])
        self._silence(state)


class After(Hook):
    """What moves after a due step, once Adam has moved the weights."""

    config: Moving
    _moving = False

    def due(self, step: int) -> bool:
        return self.config.due(step)

    def update(self, state: State) -> bool:
        """Only says that something moves in this step: it does when it is `stepped`."""
        self._moving = True
        return False

    def stepped(self, state: State) -> None:
        if self._moving:
            self.move(state)
            self._moving = False

    def move(self, state: State) -> None:
        """What a member does."""
        raise NotImplementedError


class MagRan(After, Masks):
    """After a due step, once Adam has moved the weights, the smallest go and others come at random."""

    def move(self, state: State) -> None:
        draws = self._draws(state.step)
        drawn = (draws.random(tuple(on.shape), np.float32) for on in self._layers.values())
        self._exchange(state, (torch.from_numpy(scores).to(self.on.device) for scores in drawn))


class RigL(Masks):
    """Instead of a due step the smallest weights go, and those with the largest gradients come.

    The gradients are dense, of the whole batch and not clipped, summed over `accumulate` steps.
    """

    config: RigLConfig

    def begin(self, state: State) -> None:
        super().begin(state)
        self._seen = torch.zeros_like(state.grad)
        views = state.named(self._seen)
        self._gradients = {name: views[name] for name in self._layers}
        for name, seen in self._gradients.items():
            if f"sparse.seen.{name}" in state.extra:
                seen.copy_(state.extra[f"sparse.seen.{name}"])

    def graded(self, state: State) -> None:
        if self.config.gathers(state.step):
            self._seen += state.grad
        super().graded(state)

    def due(self, step: int) -> bool:
        return self.config.due(step)

    def update(self, state: State) -> bool:
        self._exchange(state, (gradient.abs() for gradient in self._gradients.values()))
        self._seen.zero_()
        return True

    def carry(self) -> Mapping[str, Tensor]:
        """With the gradients seen so far, where a state may be kept between two of them."""
        seen = self._gradients if self.config.accumulate > 1 else {}
        return {**super().carry(), **{f"sparse.seen.{name}": g for name, g in seen.items()}}


class Recycling(After):
    """After a due step the least important channels of every pruning group begin anew.

    What makes a channel is drawn afresh by its layer's own law, what reads it goes to zero, and so do the
    moments of both; the average takes the new values. Channels go in whole norm groups: at that moment the
    network computes what it would without them, but where a norm of a concatenation straddles their groups.
    """

    def __init__(self, config: Moving, job: Job):
        self.config, self.job = config, job

    @staticmethod
    def nonzeros(config: Moving, network: Denoiser) -> dict[str, int]:
        """No weight is masked."""
        return {}

    def begin(self, state: State) -> None:
        network = state.network
        self._architecture = Architecture(network.config, network.items)
        self.groups = groups_left(self._architecture, state.view("raw"))

    def move(self, state: State) -> None:
        scores, share = magnitude(state.view("raw")), self.config.share(state.step)
        self.recycle(state, [least_important(group, scores, share) for group in self.groups])

    def told(self) -> Mapping[str, Any]:
        return {"sparse": self.config.model_dump()}

    def recycle(self, state: State, chosen: list[Tensor]) -> None:
        """Begin the chosen channels anew: for each group bool (C,), on the CPU."""
        weights, stream = state.view("raw"), f"{self.job.name}/recycle{state.step}"
        network = store.fresh(self._architecture, self.job.seed, stream, weights)
        fresh = {name: parameter.detach() for name, parameter in network.named_parameters()}
        for layer in network.multiplied():  # zero, or its channels would be heard at once
            for parameter in network.get_submodule(layer).parameters():
                parameter.detach().zero_()
        touched = torch.zeros_like(state.raw, dtype=torch.bool)
        touch = state.named(touched)
        pairs = [(m, gone) for g, gone in zip(self.groups, chosen, strict=True) for m in g.members]
        for member, gone in pairs:
            channels = _channels(member, gone)
            if member.side != "in":
                for name in (member.weight, "bias".join(member.weight.rsplit("weight", 1))):
                    if name in weights:
                        weights[name][channels] = fresh[name][channels].to(state.raw.device)
                        touch[name][channels] = True
        for member, gone in pairs:  # what reads a channel last: between two new ones nothing is heard either
            if member.side == "in":
                weights[member.weight][:, _channels(member, gone)] = 0
                touch[member.weight][:, _channels(member, gone)] = True
        state.m.masked_fill_(touched, 0)
        state.v.masked_fill_(touched, 0)
        state.ema.copy_(torch.where(touched, state.raw, state.ema))


def least_important(group: Group, scores: Scores, share: float) -> Tensor:
    """A share of a group's channels, rounded down to whole norm groups: bool (C,), on the CPU.

    Importance is the sum of squares of all weights that make or read a channel.
    """
    importance = torch.zeros(group.width, dtype=torch.float64)
    for m in group.members:
        if m.weight in scores:
            score = scores[m.weight].double().cpu()
            own = score[m.channels].sum(1) if m.side == "out" else score[:, m.channels].sum(0)
            importance.index_add_(0, torch.from_numpy(m.roots), own)
    blocks = importance.view(group.norm_groups or group.width, -1)
    least = blocks.sum(1).argsort(stable=True)[: int(share * len(blocks))]
    return torch.zeros_like(blocks, dtype=torch.bool).index_fill_(0, least, True).flatten()


def _channels(member: Member, gone: Tensor) -> Tensor:
    """Where along a member's dimension the channels of its group lie that are `gone`."""
    return torch.arange(member.width)[member.channels][gone[torch.from_numpy(member.roots)]]
