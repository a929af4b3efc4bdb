"""Digests: what each stage's result depends on in the configuration, and nothing else.

Every rule carries the digest of its verb's slice, so that editing a key of the YAML runs exactly
the stages that use it again; artefacts and resumable states carry it too.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel

from ebdiff.config import FINAL, Experiment

# Keys that change no result.
BOOKKEEPING = {"log_every", "save_minutes"}


def digest(*parts: Any) -> str:
    """A short hash of configuration values; equal values give equal digests."""

    def plain(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value.model_dump(mode="json", exclude=BOOKKEEPING)
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value if not isinstance(value, tuple) else [plain(v) for v in value]

    text = json.dumps([plain(p) for p in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def data_digest(e: Experiment) -> str:
    """`prepare-data` and `train-classifier`: the source alone."""
    d = e.dataset  # where a local copy lies changes nothing; what it is made into does
    return digest(d.name, d.source, d.hub, d.crop, d.broken, e.network.image_size, e.network.channels)


def _trained_on(e: Experiment) -> str:
    """What every training depends on; where a local copy of the data lies is no part of it."""
    seen = (e.dataset.flip, e.dataset.subset)
    return digest(data_digest(e), seen, e.network, e.diffusion, e.training)


def _tuned(e: Experiment, use: str, *networks: str) -> list[Any]:
    """How networks are executed where a tuning says so; the device's default is no configuration."""
    chosen = getattr(e.tuning, use)
    return [(n, chosen[n]) for n in networks if n in chosen]


def dense_digest(e: Experiment, search: str) -> str:
    """`train-dense`."""
    return digest(_trained_on(e), e.searches[search], *_tuned(e, "training", "dense"))


def masks_digest(e: Experiment, search: str, criterion: str, weights: str) -> str:
    """`prune-per-epoch` and `hamming-matrix`: criterion settings only where gradients are taken."""
    gradient = criterion in ("taylor", "diff-pruning")
    rates = e.rates_of(search)
    return digest(
        search, criterion, weights, rates, e.network, *([e.pruning, e.diffusion] if gradient else [])
    )


def ticket_digest(e: Experiment, search: str, criterion: str, weights: str, rate: float) -> str:
    """`select-eb-epoch`."""
    rule = None if search == FINAL else (e.searches[search].window, e.searches[search].threshold)
    return digest(search, criterion, weights, float(rate), rule, e.network)


def expert_digest(e: Experiment, key: str, milestone: str) -> str:
    """`finetune-region`."""
    expert = e.experts()[key]
    what = (key, expert.span)  # the key tells the origin
    like = e.runs.get(milestone.removeprefix("like-"))
    target = [(x.key, x.iterations) for x in like.experts] if like else milestone
    law = e.speed if expert.law == "speed" else None
    return digest(_trained_on(e), what, target, law, *_tuned(e, "training", expert.network))


def sample_digest(e: Experiment, run: str) -> str:
    """`sample`: batch size changes no image beyond rounding, so it is left out."""
    sampling = e.sampling.model_dump(mode="json", exclude={"batch"})
    experts = e.runs[run].experts
    how = _tuned(e, "sampling", *(x.network for x in experts))
    return digest(sampling, e.diffusion, [(x.key, x.serve, x.iterations) for x in experts], *how)


def cost_digest(e: Experiment) -> str:
    """`measure-cost`."""
    timed = (e.training.batch, e.training.clip, e.dataset.flip)
    how = (e.compute.threads, e.compute.device, e.compute.micro_batch, e.tuning.training)
    return digest(e.network, timed, e.rates(), *how)


def report_digest(e: Experiment) -> str:
    """`table`, `figure` and `report` read the whole experiment, but for what changes no result."""
    return digest(
        e.model_dump(mode="json", exclude={"compute": True, "training": BOOKKEEPING, "sampling": {"batch"}})
    )


def hamming_digest(e: Experiment, search: str, criterion: str, weights: str) -> str:
    """`hamming-matrix`: the masks and the rule drawn into the figures."""
    rule = e.searches[search]
    return digest(masks_digest(e, search, criterion, weights), rule.window, rule.threshold)


def metrics_digest(e: Experiment) -> str:
    """`fid`: where the weights lie and how many images go in at once change nothing."""
    evaluation = e.evaluation.model_dump(mode="json", exclude={"weights", "batch"})
    return digest(data_digest(e), evaluation)


def reference_digest(e: Experiment, protocol: str, count: str) -> str:
    """`reference-stats`."""
    return digest(data_digest(e), protocol, count)
