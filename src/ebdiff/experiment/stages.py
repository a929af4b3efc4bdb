"""The stages of the workflow, each spelt once: what it makes, reads, may continue, and depends on.

Rules, verbs, records, the plan and the report ask here. A job is a stage with its wildcards filled in; its
log, its record and Snakemake's benchmark are called alike. Imports no torch: the Snakefile reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, get_args

from ebdiff.experiment import layout, places
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.runs import Budget, Expert
from ebdiff.experiment.schema import AFTER_DENSE, FINAL, GRADIENT, Weights

FIGURES = ("figure1", "figure1b", "figure2", "figure2b", "figure3", "figure4", "figure5", "losses")
BOOKKEEPING = {"log_every", "save_minutes", "sample_every"}  # keys that change no result
WALK = "the official code's"  # the order in which groups are thinned, `UNet.walk`: in another, other masks
PAIRS = "by quantile"  # how SpeeD pairs timesteps within a span
FLOOR = "disjoint draws"  # what the floor is averaged over


@dataclass(frozen=True)
class Stage:
    """One kind of job.

    Attributes:
        verb: its command.
        makes: layout templates of its outputs.
        reads: (experiment, **wildcards) -> the files it needs, which its result depends on.
        depends: (experiment, **wildcards) -> the part of the configuration that its result depends on.
        continues: (experiment, **wildcards) -> earlier states that it may go on from, with the same result
            as without them.
        large: outputs that readers trust by size and date; `ebdiff verify` reads them whole.
        priority: among jobs that could start, the highest goes first.
        gpu: (experiment, **wildcards) -> whether it computes on a GPU where there is one. What trains,
            samples, times, takes gradients or runs Inception does; all else ends before CUDA would start.
        spread: over all GPUs of a job (`compute.gpus`), a process for each.
        alone: nothing else may run on the machine, because it times.
        beside: templates of what it may leave beside its outputs.
    """

    verb: str
    makes: tuple[str, ...]
    reads: Callable[..., Iterable[Path]]
    depends: Callable[..., Any]
    continues: Callable[..., Iterable[Path]] = lambda e, **_: ()
    large: tuple[str, ...] = ()
    priority: int = 0
    gpu: Callable[..., bool] = lambda e, **_: False
    spread: bool = False
    alone: bool = False
    beside: tuple[str, ...] = ()

    @property
    def wildcards(self) -> tuple[str, ...]:
        """What tells its jobs apart, in the order of their paths."""
        listed = [[name for _, name, _, _ in Formatter().parse(t) if name] for t in self.makes]
        return tuple(name for name in listed[0] if all(name in other for other in listed) and name != "ext")

    def outputs(self, e: Experiment, **where: object) -> list[Path]:
        """What a job of it makes."""
        return [layout.path(t, **where, **more) for t in self.makes for more in _several(e, t)]

    def note(self, kind: str, extension: str) -> str:
        """The template of a file about a job: its log, its benchmark or its record."""
        of = layout.DATA if "dataset" in self.wildcards else layout.EXPERIMENT
        folder = "seed{seed}/" if "seed" in self.wildcards else ""
        own = (f".{{{w}}}" for w in self.wildcards if w not in ("experiment", "dataset", "seed"))
        return f"{of}/{kind}/{folder}{self.verb}{''.join(own)}.{extension}"


def _several(e: Experiment, template: str) -> Iterator[dict[str, str]]:
    """The fillings of a template's wildcards that are no job's: the files of `tabulate`."""
    if template == layout.TABLE:
        yield from ({"table": t, "ext": x} for t in e.tables for x in layout.TABLE_EXTENSIONS)
    elif template == layout.FIGURE:
        yield from ({"figure": f, "ext": x} for f in figures(e) for x in layout.FIGURE_EXTENSIONS)
    else:
        yield {}


def figures(e: Experiment) -> tuple[str, ...]:
    """The figures of an experiment: of sparse training and of sampling only where it has such runs."""
    sparse = ("sparsity", "overlap") if e.sparse() else ()
    return (*FIGURES, *sparse, *(("sampling",) if any(run.sampling for run in e.runs.values()) else ()))


def digest(*parts: Any) -> str:
    """A short hash of configuration values, sections among them; equal values give equal digests."""
    text = json.dumps(parts, sort_keys=True, default=lambda x: x.model_dump(mode="json", exclude=BOOKKEEPING))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- data ---------------------------------------------------------------------------------------------------


def _of_dataset(e: Experiment, *templates: str, **where: str) -> list[Path]:
    return [layout.path(t, dataset=e.dataset.name, **where) for t in templates]


def _images(e: Experiment, **_: str) -> list[Path]:
    """What metrics and figures see."""
    return _of_dataset(e, layout.IMAGES, layout.MANIFEST)


def _items(e: Experiment, **_: str) -> list[Path]:
    """What training sees: images or their latents; labels only where a denoiser is told them."""
    own = [*_latents(e), *_of_dataset(e, layout.MANIFEST)] if e.codec.ENCODED else _images(e)
    return [*own, *(_of_dataset(e, layout.LABELS) if e.items.classes else [])]


def _first_stage(e: Experiment, **_: str) -> list[Path]:
    """The codec's network: trained on the data, or files from outside; the hub's are checked by hash."""
    own = [layout.path(layout.FIRST_STAGE, experiment=e.name)] if e.codec.TRAINED else []
    return own + places.codec_weights(e)


def _latents(e: Experiment, **_: str) -> list[Path]:
    return [layout.path(t, experiment=e.name) for t in (layout.LATENTS, layout.LATENTS_MANIFEST)]


def _features_of(e: Experiment, protocol: str) -> list[Path]:
    """The network of a protocol, where a stage makes it; Inception's weights are checked by hash."""
    return _of_dataset(e, layout.CLASSIFIER) if protocol == "classifier" else []


# --- dense training and tickets -----------------------------------------------------------------------------


def _trained(e: Experiment) -> list[Any]:
    """What every training depends on; with dropout each process and micro-batch draws masks of its own."""
    data = [e.dataset.content, e.dataset.model_dump(include=e.dataset.SEEN)]
    seen = [*data, e.network, e.diffusion, e.training]
    if e.network.dropout:
        seen += [e.compute.micro_batch] if e.compute.micro_batch else []
        seen += [f"gpus {e.compute.gpus}"] if e.compute.gpus > 1 else []
    return seen


def _tuned(e: Experiment, use: str, *networks: str) -> list[Any]:
    """How networks are executed where a tuning says so; the device's default is no configuration."""
    chosen = getattr(e.tuning, use)
    return [(n, chosen[n]) for n in networks if n in chosen]


def taken_while_training(search: str, criterion: str) -> bool:
    """Whether `train-dense` recorded the masks itself, so that nothing needs computing."""
    return search != FINAL and criterion == "magnitude"


def _masks_reads(e: Experiment, seed: str, search: str, criterion: str, **_: str) -> Iterator[Path]:
    if search != FINAL:
        yield layout.path(layout.DENSE_MASKS, experiment=e.name, seed=seed, search=search)
    if search == FINAL or criterion in GRADIENT:
        yield places.snapshots(e, search, seed)
    if criterion in GRADIENT:
        yield from _items(e)


def _masks(e: Experiment, search: str, criterion: str, weights: str, **_: str) -> list[Any]:
    taken = [search, criterion, weights, e.rates_of(search), e.architecture, WALK]
    return [*taken, e.pruning, e.diffusion] if criterion in GRADIENT else taken


def _rule(e: Experiment, search: str) -> list[Any]:
    return [] if search == FINAL else [e.searches[search].window, e.searches[search].threshold]


def _ticket_reads(e: Experiment, search: str, criterion: str, **where: str) -> Iterator[Path]:
    """A random ticket has no masks, but stands where the magnitude ticket does unless it is told where."""
    yield places.snapshots(e, search, where["seed"])
    yield from _of_dataset(e, layout.MANIFEST)  # tells an epoch's steps
    if criterion != "random":
        yield layout.path(layout.MASKS, search=search, criterion=criterion, **where)
    elif search != FINAL and layout.asked(where["rate"])[1] is None:
        yield layout.path(layout.STORY, search=search, criterion="magnitude", **where)


# --- experts ------------------------------------------------------------------------------------------------


def _expert_reads(e: Experiment, seed: str, expert: str, milestone: str, **_: str) -> Iterator[Path]:
    """Items, a ticket or a checkpoint; for a budget costs, and the tickets and masks' time it is charged."""
    spec = e.experts()[expert]
    yield from _items(e)
    if places.is_given(e, expert, milestone):
        yield places.checkpoint(e)
    elif e.dense.source and spec.continues_search:  # without the one before it would begin elsewhere
        yield from _expert_continues(e, expert=expert, milestone=milestone, seed=seed)
    if spec.needs_ticket:
        yield places.ticket_of(e, spec, layout.TICKET if spec.init == "inherit" else layout.STORY, seed)
    if spec.init == "snapshot":
        yield places.snapshots(e, spec.search, seed)
    if budget := Budget.of(milestone):
        charged = places.charged(e, spec, budget)
        yield layout.path(layout.COST, experiment=e.name)
        yield from places.stories(e, charged, seed)
        yield from places.mask_ledgers(e, charged, seed)


def _expert_continues(e: Experiment, seed: str, expert: str, milestone: str, **_: str) -> Iterator[Path]:
    """The milestone before and, unpruned, where the search stopped."""
    if places.is_given(e, expert, milestone):
        return
    before, spec = e.previous_milestone(expert, milestone), e.experts()[expert]
    where = dict(experiment=e.name, seed=seed)
    if before is not None:
        yield layout.path(layout.MILESTONE, expert=expert, milestone=before, **where)
    if places.goes_on(e, spec):
        yield layout.path(layout.DENSE_LAST, search=spec.search, **where)


def _expert(e: Experiment, expert: str, milestone: str, **_: str) -> list[Any]:
    spec = e.experts()[expert]
    target: Any = milestone
    if (budget := Budget.of(milestone)) and budget.run:
        # What, beside measured times and its tickets, tells what that run costs.
        like = e.runs[budget.run]
        before = e.dense.iterations if like.method in AFTER_DENSE else None
        target = [before, *((x.key, x.iterations) for x in like.experts)]
        target += [] if budget.unit == "step_ms" else [budget.unit]
    law = [e.speed, PAIRS] if spec.law == "speed" else None
    source = e.dense.source if spec.continues_search else None
    return [_trained(e), expert, spec.span, target, law, source, _tuned(e, "training", spec.network)]


# --- samples, metrics, report -------------------------------------------------------------------------------


def _sample_reads(e: Experiment, run: str, **where: str) -> Iterator[Path]:
    """The experts; the data, where these say what is asked of a sample; and what decodes it."""
    for x in e.runs[run].experts:
        yield layout.path(layout.MILESTONE, expert=x.key, milestone=x.iterations, **where)
    if e.items.conditional:
        yield from _items(e)
    if e.codec.ENCODED:
        yield from (*_first_stage(e), layout.path(layout.LATENTS_MANIFEST, experiment=e.name))


def _sample(e: Experiment, run: str, **_: str) -> list[Any]:
    """Batch size changes no image beyond rounding, so it is left out."""
    sampling = e.sampling_of(run).model_dump(mode="json", exclude={"batch"})
    experts = e.runs[run].experts
    how = _tuned(e, "sampling", *(x.network for x in experts))
    return [sampling, e.diffusion, e.codec, [(x.key, x.serve, x.iterations) for x in experts], how]


def _fid_reads(e: Experiment, **where: str) -> Iterator[Path]:
    """Samples and the real images' features."""
    yield from (layout.path(t, **where) for t in (layout.SAMPLES, layout.SAMPLE_LEDGER))
    yield from references(e)


def references(e: Experiment) -> Iterator[Path]:
    """What images are measured against: the real ones' statistics and features, and whose features."""
    yield from _of_dataset(e, layout.MANIFEST)
    for protocol in e.evaluation.protocols:
        which = dict(protocol=protocol, number=e.evaluation.reference_count)
        made = (layout.REFERENCE, layout.REFERENCE_FEATURES, layout.HELD_OUT_FEATURES)
        yield from _of_dataset(e, *made, **which)
        yield from _features_of(e, protocol)


def _reconstruction_reads(e: Experiment, **_: str) -> Iterator[Path]:
    """What it is measured on: latents, and the images that they were made of."""
    yield from (*_latents(e), *_first_stage(e), *_images(e), *_of_dataset(e, layout.HELD_OUT))
    yield from references(e)


def _cost(e: Experiment, **_: str) -> list[Any]:
    c = e.compute
    how = [c.threads, c.device, c.micro_batch, c.deterministic, e.tuning.training]
    return [e.architecture, e.training.batch, e.training.clip, e.rates(), how, *e.sparse()]


def _whole(e: Experiment, **_: str) -> dict[str, Any]:
    """The whole experiment, but for what changes no result."""
    none = {"compute": True, "training": BOOKKEEPING, "sampling": {"batch"}}
    return e.model_dump(mode="json", exclude=none)


def _all_results(e: Experiment, **_: str) -> Iterator[Path]:
    """Everything about every run, the distances of all masks, and the first seed's samples."""
    yield layout.path(layout.COST, experiment=e.name)
    yield from _images(e)
    if e.codec.ENCODED:
        yield layout.path(layout.RECONSTRUCTION, experiment=e.name)
    for name, run in e.runs.items():
        for seed in e.seeds_of(name):
            where = dict(experiment=e.name, seed=seed)
            yield from (layout.path(t, run=name, **where) for t in (layout.METRICS, layout.SAMPLE_LEDGER))
            for x in (*run.experts, *_charged(e, name)):
                at = dict(expert=x.key, milestone=x.iterations, **where)
                yield from (layout.path(t, **at) for t in (layout.LEDGER, layout.STATS))
            yield from places.stories(e, run.experts, seed)
            yield from places.mask_ledgers(e, run.experts, seed)
            for x in run.experts:
                if places.goes_on(e, x):
                    yield layout.path(layout.DENSE_STATS, search=x.search, **where)
                if x.needs_ticket and x.search != FINAL:
                    yield layout.path(layout.DENSE_LEDGER, search=x.search, **where)
                    yield from places.masks_beside(e, seed, x.search, x.criterion, x.weights)
        yield layout.path(layout.SAMPLES, experiment=e.name, seed=e.seeds_of(name)[0], run=name)
    for name, search in e.searches.items():
        for criterion in ("magnitude", *search.gradient_criteria):
            for weights in get_args(Weights) if criterion == "magnitude" else e.weights_of(name, criterion):
                ticket = dict(search=name, criterion=criterion, weights=weights)
                yield layout.path(layout.HAMMING, experiment=e.name, seed=e.seeds[0], **ticket)


def _charged(e: Experiment, run: str) -> list[Expert]:
    """The unpruned trainings whose time a run is shown beside, or charged with."""
    method = e.runs[run].method
    found = [e.final_expert] if method == "ta-eb" else []
    if method in AFTER_DENSE:
        found = [places.unpruned(e, rows) for rows in (e.runs, *(r for r in e.tables.values() if run in r))]
    return [x for x in found if x is not None]


def _always(e: Experiment, **_: str) -> bool:
    return True


STAGES = {stage.verb: stage for stage in (
    Stage(
        "prepare-data", layout.DATA_FILES, lambda e, **_: (), lambda e, **_: e.prepared,
        large=(layout.IMAGES, layout.LABELS, layout.HELD_OUT),
    ),
    Stage(
        "train-classifier", (layout.CLASSIFIER, layout.CLASSIFIER_LEDGER),
        lambda e, **_: _of_dataset(e, *layout.DATA_FILES), lambda e, **_: "classifier",
    ),
    Stage(
        "reference-stats", (layout.REFERENCE, layout.REFERENCE_FEATURES, layout.HELD_OUT_FEATURES),
        lambda e, protocol, **_: [
            *_images(e), *_of_dataset(e, layout.HELD_OUT), *_features_of(e, protocol),
        ],
        lambda e, protocol, number, **_: [protocol, number],
        large=(layout.REFERENCE_FEATURES, layout.HELD_OUT_FEATURES),
        gpu=lambda e, protocol, **_: protocol != "classifier",
    ),
    Stage(
        "train-first-stage", (layout.FIRST_STAGE, layout.FIRST_STAGE_LEDGER), _images,
        lambda e, **_: e.codec, priority=60, gpu=_always,
    ),
    Stage(
        "encode-latents", (layout.LATENTS, layout.LATENTS_MANIFEST),
        lambda e, **_: [*_first_stage(e), *_images(e)], lambda e, **_: e.codec,
        large=(layout.LATENTS,), priority=60, gpu=_always, spread=True,
    ),
    Stage(
        "measure-first-stage", (layout.RECONSTRUCTION,), _reconstruction_reads,
        lambda e, **_: [e.codec, e.evaluation.protocols, e.evaluation.reference_count], gpu=_always,
    ),
    Stage("measure-cost", (layout.COST,), lambda e, **_: (), _cost, priority=100, gpu=_always, alone=True),
    Stage(
        "train-dense", layout.DENSE_FILES, _items,
        lambda e, search, **_: [_trained(e), e.searches[search], WALK, _tuned(e, "training", "dense")],
        priority=50, gpu=_always, spread=True,
    ),
    Stage(
        "prune-per-epoch", (layout.MASKS, layout.MASKS_LEDGER), _masks_reads, _masks, priority=40,
        gpu=lambda e, criterion, **_: criterion in GRADIENT,
    ),
    Stage(
        "hamming-matrix", (layout.HAMMING,),
        lambda e, **w: [layout.path(layout.MASKS, **w), *_of_dataset(e, layout.MANIFEST)],
        lambda e, search, **w: [_masks(e, search, **w), _rule(e, search)],
    ),
    Stage(
        "select-eb-epoch", (layout.TICKET, layout.STORY), _ticket_reads,
        lambda e, search, criterion, weights, rate, **_: [
            search, criterion, weights, rate, _rule(e, search), e.architecture, WALK,
        ],
        priority=40,
    ),
    Stage(
        "finetune-region", (layout.MILESTONE, layout.LEDGER, layout.STATS), _expert_reads, _expert,
        continues=_expert_continues, priority=30, gpu=_always, spread=True,
    ),
    Stage(
        "sample", (layout.SAMPLES, layout.SAMPLES_PNG, layout.SAMPLE_LEDGER), _sample_reads, _sample,
        large=(layout.SAMPLES,), priority=20, gpu=_always, spread=True,
        beside=(layout.SAMPLE_ITEMS, layout.SAMPLES_SVG),
    ),
    Stage(
        "fid", (layout.METRICS,), _fid_reads,
        # Where the weights lie and how many images go in at once change nothing.
        lambda e, **_: [FLOOR, e.evaluation.model_dump(mode="json", exclude={"weights", "batch"})],
        priority=10, gpu=lambda e, **_: set(e.evaluation.protocols) != {"classifier"},
    ),
    Stage("tabulate", (layout.TABLE, layout.FIGURE, layout.PROTOCOLS), _all_results, _whole),
    Stage(
        "report", (layout.REPORT,),
        lambda e, **w: [*_all_results(e), *STAGES["tabulate"].outputs(e, **w)], _whole,
    ),
)}  # fmt: skip
