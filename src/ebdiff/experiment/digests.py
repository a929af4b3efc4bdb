"""Digests: what each stage's result depends on in the configuration, and nothing else.

Every rule and resumable state carries the digest of its verb's slice, so that editing a key of the YAML
runs exactly the stages that use it again. Every file carries its `settings`: that digest and those of
all stages before it, so that a verb run by hand notices what it shouldn't read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.runs import Expert
from ebdiff.experiment.schema import FINAL

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
    return digest(e.dataset.content)


def _trained_on(e: Experiment) -> str:
    """What every training depends on; where a local copy of the data lies is no part of it."""
    seen = e.dataset.model_dump(mode="json", include=e.dataset.SEEN)
    # With dropout each micro-batch draws masks of its own.
    cut = [e.compute.micro_batch] if e.compute.micro_batch and e.network.dropout else []
    return digest(data_digest(e), seen, e.network, e.diffusion, e.training, *cut)


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
        search, criterion, weights, rates, e.architecture, *([e.pruning, e.diffusion] if gradient else [])
    )


def ticket_digest(e: Experiment, search: str, criterion: str, weights: str, rate: float) -> str:
    """`select-eb-epoch`."""
    rule = None if search == FINAL else (e.searches[search].window, e.searches[search].threshold)
    return digest(search, criterion, weights, float(rate), rule, e.architecture)


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
    return digest(sampling, e.diffusion, e.codec, [(x.key, x.serve, x.iterations) for x in experts], *how)


def cost_digest(e: Experiment) -> str:
    """`measure-cost`."""
    timed = (e.training.batch, e.training.clip)
    c = e.compute
    how = (c.threads, c.device, c.micro_batch, c.deterministic, e.tuning.training)
    return digest(e.architecture, timed, e.rates(), *how)


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


# --- settings: a stage's digest with those of every stage before it ---------------------------------------


def settings(e: Experiment, path: Path) -> str | None:
    """The digest of everything in the configuration that a file depends on; None where nothing is known."""
    for template, of in _SETTINGS.items():
        wildcards = layout.parts(template, path)
        if wildcards is not None:
            return of(e, **{k: v for k, v in wildcards.items() if k not in ("experiment", "seed", "dataset")})
    return None


def _weights_settings(e: Experiment, search: str, **_: str) -> str:
    """The weights of a search: its training, or for `final` that of the unpruned network."""
    if search == FINAL:
        return _expert_settings(e, e.final_expert.key, str(e.dense.iterations))
    return dense_digest(e, search)


def _masks_settings(e: Experiment, **mask: str) -> str:
    return digest(masks_digest(e, **mask), _weights_settings(e, **mask))


def _hamming_settings(e: Experiment, **mask: str) -> str:
    return digest(hamming_digest(e, **mask), _masks_settings(e, **mask))


def _ticket_settings(e: Experiment, rate: str, **mask: str) -> str:
    """A random ticket has no masks, but stands where the magnitude ticket of its search does."""
    own = ticket_digest(e, rate=float(rate), **mask)
    if mask["criterion"] != "random":
        return digest(own, _masks_settings(e, **mask))
    if mask["search"] == FINAL:
        return digest(own, _weights_settings(e, **mask))
    return digest(own, _ticket_settings(e, rate, **{**mask, "criterion": "magnitude"}))


def _started_from(e: Experiment, expert: Expert) -> list[str]:
    """The settings of an expert's ticket, if it has one."""
    if not expert.needs_ticket:
        return []
    mask = {k: getattr(expert, k) for k in ("search", "criterion", "weights")}
    return [_ticket_settings(e, str(expert.rate), **mask)]


def _expert_settings(e: Experiment, expert: str, milestone: str) -> str:
    spec = e.experts()[expert]
    before = [e.dense.source] if spec.continues_search else _started_from(e, spec)
    like = e.runs.get(milestone.removeprefix("like-"))
    if like:  # its steps follow from that run's tickets and the measured costs
        before += [cost_digest(e), *(s for x in like.experts for s in _started_from(e, x))]
    return digest(expert_digest(e, expert, milestone), before)


def _sample_settings(e: Experiment, run: str) -> str:
    experts = [_expert_settings(e, x.key, str(x.iterations)) for x in e.runs[run].experts]
    return digest(sample_digest(e, run), experts)


def _metrics_settings(e: Experiment, run: str) -> str:
    return digest(metrics_digest(e), _sample_settings(e, run))


_SETTINGS: dict[str, Callable[..., str]] = {
    layout.MANIFEST: data_digest,
    layout.COST: cost_digest,
    layout.DENSE_LAST: dense_digest,
    layout.DENSE_LEDGER: dense_digest,
    layout.DENSE_MASKS: dense_digest,
    layout.SNAPSHOT: lambda e, search, interval: dense_digest(e, search),
    layout.MASKS: _masks_settings,
    layout.MASKS_LEDGER: _masks_settings,
    layout.HAMMING: _hamming_settings,
    layout.TICKET: _ticket_settings,
    layout.STORY: _ticket_settings,
    layout.MILESTONE: _expert_settings,
    layout.LEDGER: _expert_settings,
    layout.SAMPLE_LEDGER: _sample_settings,
    layout.METRICS: _metrics_settings,
}
