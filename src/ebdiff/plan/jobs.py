"""The workflow's jobs as data: what each reads and makes, and how long K devices take over them.

The rules say the same to Snakemake; a test holds the two together. No torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebdiff.experiment import inputs, layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.schema import FINAL
from ebdiff.report import shown

SEED = "seed{seed}/"
# Where Snakemake notes each verb's wall time, and which verb goes first where several could start.
BENCHMARKS = {
    "prepare-data": layout.benchmark("prepare-data", layout.DATA),
    "train-classifier": layout.benchmark("train-classifier", layout.DATA),
    "reference-stats": layout.benchmark("reference-{protocol}-{number}", layout.DATA),
    "measure-cost": layout.benchmark("measure-cost"),
    "train-dense": layout.benchmark(SEED + "train-dense.{search}"),
    "prune-per-epoch": layout.benchmark(SEED + "prune-per-epoch.{search}.{criterion}.{weights}"),
    "hamming-matrix": layout.benchmark(SEED + "hamming-matrix.{search}.{criterion}.{weights}"),
    "select-eb-epoch": layout.benchmark(SEED + "select-eb-epoch.{search}.{criterion}.{weights}.{rate}"),
    "finetune-region": layout.benchmark(SEED + "finetune-region.{expert}.{milestone}"),
    "sample": layout.benchmark(SEED + "sample.{run}"),
    "fid": layout.benchmark(SEED + "fid.{run}"),
    "table": layout.benchmark("{table}"),
    "figure": layout.benchmark("{figure}"),
    "report": layout.benchmark("report"),
}
PRIORITIES = {
    "measure-cost": 100, "train-dense": 50, "prune-per-epoch": 40, "select-eb-epoch": 40,
    "finetune-region": 30, "sample": 20, "fid": 10,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Job:
    """One job of the workflow.

    Attributes:
        verb: its command.
        where: what fills in the wildcards of its paths.
        reads, makes: files; a folder of snapshots is one.
    """

    verb: str
    where: Mapping[str, Any]
    reads: tuple[Path, ...]
    makes: tuple[Path, ...]

    @classmethod
    def of(cls, verb: str, reads: Iterable[Path | str], makes: Iterable[str], **where: Any) -> Job:
        """A job; `makes` are templates."""
        return cls(verb, where, tuple(map(Path, reads)), tuple(layout.path(t, **where) for t in makes))

    @property
    def benchmark(self) -> Path:
        """Where Snakemake notes its wall time."""
        return layout.path(BENCHMARKS[self.verb], **self.where)

    @property
    def alone(self) -> bool:
        """Whether nothing else may run beside it."""
        return self.verb == "measure-cost"


def jobs(experiment: Experiment) -> list[Job]:
    """Every job from the images to the report, each after those it needs."""
    makers = {path: job for job in _candidates(experiment) for path in job.makes}
    report = makers[layout.path(layout.REPORT, experiment=experiment.name)]
    return list(closure([report], makers))


def closure(wanted: Iterable[Job], makers: Mapping[Path, Job]) -> dict[Job, None]:
    """The given jobs and all they need, each after those it needs."""
    found: dict[Job, None] = {}

    def add(job: Job) -> None:
        if job not in found:
            for needed in needed_by(job, makers):
                add(needed)
            found[job] = None

    for job in wanted:
        add(job)
    return found


def needed_by(job: Job, makers: Mapping[Path, Job]) -> list[Job]:
    """The jobs that make what a job reads; files from outside have none."""
    return list(dict.fromkeys(makers[path] for path in job.reads if path in makers))


def wall_seconds(jobs: Sequence[Job], seconds: Mapping[Job, float], devices: int) -> float:
    """How long `devices` devices take, one job at a time on each.

    Whenever one is free, the job of highest priority that has all it needs starts there, as
    Snakemake's greedy scheduler does; a job that must be alone waits for all of them.
    """
    makers = {path: job for job in jobs for path in job.makes}
    waits = {job: set(needed_by(job, makers)) for job in jobs}
    waiting = sorted(jobs, key=lambda job: -PRIORITIES.get(job.verb, 0))  # stable: else in order
    running: list[tuple[float, int, Job]] = []  # end, order of starting
    now, free, started = 0.0, devices, 0
    while waiting or running:
        for job in [job for job in waiting if not waits[job]]:
            width = devices if job.alone else 1
            if width <= free:
                waiting.remove(job)
                free -= width
                started += 1
                heapq.heappush(running, (now + seconds[job], started, job))
        now, _, done = heapq.heappop(running)
        free += devices if done.alone else 1
        for others in waits.values():
            others.discard(done)
    return now


def _candidates(experiment: Experiment) -> Iterator[Job]:
    """The jobs that could be asked for; the report needs most of them."""
    e, data = experiment, dict(dataset=experiment.dataset.name)
    images = [layout.path(t, **data) for t in (layout.IMAGES, layout.MANIFEST)]
    yield Job.of("prepare-data", [], layout.DATA_FILES, **data)
    classifier = (layout.CLASSIFIER, layout.CLASSIFIER_LEDGER)
    yield Job.of("train-classifier", (layout.path(t, **data) for t in layout.DATA_FILES), classifier, **data)
    for protocol in e.evaluation.protocols:
        where = dict(**data, protocol=protocol, number=e.evaluation.reference_count)
        made = (layout.REFERENCE, layout.REFERENCE_FEATURES)
        yield Job.of("reference-stats", inputs.reference(e.dataset.name, protocol), made, **where)
    yield Job.of("measure-cost", [], [layout.COST], experiment=e.name)
    for seed in sorted({seed for run in e.runs for seed in e.seeds_of(run)}):
        yield from _of_seed(e, seed, images)
    read, pages = reported(e), []
    for name in e.tables:
        made = [layout.TABLE.replace("{ext}", ext) for ext in layout.TABLE_EXTENSIONS]
        pages.append(Job.of("table", read, made, experiment=e.name, table=name))
    for name in shown.FIGURES:
        made = [layout.FIGURE.replace("{ext}", ext) for ext in layout.FIGURE_EXTENSIONS]
        pages.append(Job.of("figure", read, made, experiment=e.name, figure=name))
    yield from pages
    made = [path for job in pages for path in job.makes]
    yield Job.of("report", [*read, *made], [layout.REPORT], experiment=e.name)


def reported(experiment: Experiment) -> list[Path]:
    """What tables, figures and the page read."""
    e, where = experiment, dict(experiment=experiment.name, dataset=experiment.dataset.name)
    found = [layout.path(t, **where) for t in (layout.IMAGES, layout.MANIFEST, layout.COST)]
    for search, criterion, weights in shown.matrices(e):
        ticket = dict(search=search, criterion=criterion, weights=weights)
        found.append(layout.path(layout.HAMMING, seed=e.seeds[0], **ticket, **where))
    for name, run in e.runs.items():
        drawn = (layout.SAMPLES, layout.SAMPLE_LEDGER)
        found += [layout.path(t, run=name, seed=e.seeds_of(name)[0], **where) for t in drawn]
        for seed in e.seeds_of(name):
            found.append(layout.path(layout.METRICS, run=name, seed=seed, **where))
            for x in run.experts:
                parts = dict(expert=x.key, milestone=x.iterations, **inputs.ticket_parts(x), **where)
                found.append(layout.path(layout.LEDGER, seed=seed, **parts))
                found += [layout.path(layout.STORY, seed=seed, **parts)] if x.needs_ticket else []
                if x.needs_ticket and x.search != FINAL:
                    found.append(layout.path(layout.DENSE_LEDGER, seed=seed, **parts))
    return list(dict.fromkeys(found))


def _of_seed(e: Experiment, seed: int, images: list[Path]) -> Iterator[Job]:
    """The jobs of one seed."""
    where = dict(experiment=e.name, seed=seed)
    dense = (
        layout.SNAPSHOTS,
        layout.DENSE_MASKS,
        layout.DENSE_LAST,
        layout.DENSE_LEDGER,
        layout.DENSE_STATS,
    )
    for search in e.searches:
        yield Job.of("train-dense", images, dense, search=search, **where)
    for search in (*e.searches, *([FINAL] if e.final_expert else [])):
        yield from _of_search(e, search, images, where)
    expert = (layout.MILESTONE, layout.LEDGER, layout.STATS)
    for key in e.experts():
        for milestone in map(str, e.all_milestones(key)):
            read = [*inputs.expert(e, key, milestone, seed), *images]
            yield Job.of("finetune-region", read, expert, expert=key, milestone=milestone, **where)
    for run in e.runs:
        sampled = (layout.SAMPLES, layout.SAMPLES_PNG, layout.SAMPLE_LEDGER)
        yield Job.of("sample", inputs.experts(e, run, seed), sampled, run=run, **where)
        read = [*inputs.references(e), layout.path(layout.SAMPLES, run=run, **where)]
        yield Job.of("fid", read, [layout.METRICS], run=run, **where)


def _of_search(e: Experiment, search: str, images: list[Path], where: dict[str, Any]) -> Iterator[Job]:
    """Masks, distances and tickets of a search, under every criterion it knows."""
    criteria = ("magnitude", "taylor", "diff-pruning") if search == FINAL else e.searches[search].criteria
    for weights in ("raw", "ema"):
        for criterion in (*criteria, "random"):
            ticket = dict(search=search, criterion=criterion, weights=weights)
            if criterion != "random":
                read = inputs.masks(e, **ticket, seed=where["seed"])
                made = (layout.MASKS, layout.MASKS_LEDGER)
                yield Job.of("prune-per-epoch", read, made, **ticket, **where)
                read = [layout.path(layout.MASKS, **ticket, **where), *images]
                yield Job.of("hamming-matrix", read, [layout.HAMMING], **ticket, **where)
            for rate in e.rates_of(search):
                read = inputs.ticket(e, **ticket, rate=rate, seed=where["seed"])
                made = (layout.TICKET, layout.STORY)
                yield Job.of("select-eb-epoch", read, made, rate=rate, **ticket, **where)
