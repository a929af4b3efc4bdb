"""Jobs: stages with their wildcards filled in, which job makes a file, and all that an experiment takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ebdiff.experiment import layout, load
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.schema import FINAL, GRADIENT, Protocol, Weights
from ebdiff.experiment.stages import STAGES, Stage, digest
from ebdiff.system.errors import UserError, unknown


def _searches(e: Experiment, verb: str, **_: str) -> list[str]:
    """The searches of an experiment; the finished network is one for those that only want weights."""
    final = e.final_expert is not None and verb not in ("train-dense", "hamming-matrix")
    return [*e.searches, *([FINAL] if final else [])]


def _criteria(e: Experiment, verb: str, search: str, **_: str) -> tuple[str, ...]:
    """A search takes masks under its own criteria, and always magnitude; a ticket may be drawn at random."""
    own = GRADIENT if search == FINAL else e.searches[search].gradient_criteria
    return ("magnitude", *own, *(["random"] if verb == "select-eb-epoch" else []))


def _tickets(e: Experiment, search: str, **_: str) -> list[str]:
    """What a search's tickets may be: of each rate the early-bird rule's, and those at chosen intervals."""
    chosen = () if search == FINAL else e.searches[search].tickets_at
    return [layout.ticket(rate, interval) for rate in e.rates_of(search) for interval in (None, *chosen)]


# What a wildcard may be: (experiment, verb, **wildcards) -> values.
KNOWN: dict[str, Callable[..., Iterable[Any]]] = {
    "search": _searches,
    "criterion": _criteria,
    "weights": lambda e, **_: get_args(Weights),
    "rate": _tickets,
    "expert": lambda e, **_: e.experts(),
    "milestone": lambda e, expert, **_: e.all_milestones(expert),
    "run": lambda e, **_: e.runs,
    "protocol": lambda e, **_: get_args(Protocol),
}
_MAKERS = {template: stage for stage in STAGES.values() for template in stage.makes}


@dataclass(frozen=True)
class Job:
    """A stage with its wildcards filled in.

    Attributes:
        experiment: whose; of a stage that several share, one of them.
        stage: which.
        where: its wildcards, as text.
    """

    experiment: Experiment
    stage: Stage
    where: Mapping[str, str]

    @classmethod
    def of(cls, experiment: Experiment, verb: str, **where: object) -> Job:
        """A job by its verb, every wildcard checked.

        Raises:
            UserError: a wildcard that the experiment doesn't know, with a did-you-mean.
        """
        stage = STAGES[verb]
        shared = {"experiment": experiment.name, "dataset": experiment.dataset.name}
        found = {w: str({**shared, **where}[w]) for w in stage.wildcards}
        if int(found.get("seed", 0)) >= 2**63:
            raise UserError(f"--seed {found['seed']}: beyond 63 bits; take a smaller one")
        for wildcard, value in found.items():
            if wildcard in KNOWN:
                known = [str(v) for v in KNOWN[wildcard](experiment, verb=verb, **found)]
                if value not in known:
                    raise UserError(f"--{wildcard} {unknown(value, known)}")
        return cls(experiment, stage, found)

    def path(self, template: str, **more: object) -> Path:
        """A path of the layout with this job's wildcards, and the experiment's dataset."""
        return layout.path(template, **{"dataset": self.experiment.dataset.name, **self.where, **more})

    def note(self, kind: str, extension: str) -> Path:
        """A file about this job: `Stage.note`."""
        return self.path(self.stage.note(kind, extension))

    @property
    def makes(self) -> list[Path]:
        """Its outputs."""
        return self.stage.outputs(self.experiment, **self.where)

    @property
    def state(self) -> Path:
        """The folder where what it has so far lies, beside the network or the array that it makes."""
        networks = (path for path in self.makes if path.suffix == ".safetensors")
        return layout.state_of(next(networks, self.makes[0]))

    @property
    def reads(self) -> list[Path]:
        """The files that its result depends on."""
        return list(dict.fromkeys(self.stage.reads(self.experiment, **self.where)))

    @property
    def continues(self) -> list[Path]:
        """Earlier states that it may go on from."""
        return list(self.stage.continues(self.experiment, **self.where))

    @property
    def digest(self) -> str:
        """A hash of the configuration that the stage itself depends on."""
        return digest(self.stage.depends(self.experiment, **self.where))

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU where there is one."""
        return self.stage.gpu(self.experiment, **self.where)

    @property
    def gpus(self) -> int:
        """GPUs that it asks for: of `compute.gpus` one, or all where it is spread over them."""
        asked = self.experiment.compute.gpus if self.on_gpu else 0
        return asked if self.stage.spread else min(1, asked)

    @property
    def needs(self) -> list[Job]:
        """The jobs that make what it reads or goes on from; files from outside have none."""
        return makers(self.experiment, [*self.reads, *self.continues])

    @property
    def name(self) -> str:
        """What it is called, once among all jobs."""
        return str(self.note("jobs", "")).rstrip(".")


def maker(e: Experiment, path: Path) -> Job | None:
    """The job that makes a file, or the folder it lies in; None for a file from outside."""
    own = {"experiment": e.name, "dataset": e.dataset.name}
    for place in (path, path.parent):
        for template, stage in _MAKERS.items():
            where = layout.parts(template, place)
            if where is not None and all(where.get(k, name) == name for k, name in own.items()):
                return Job(e, stage, {w: where[w] for w in stage.wildcards})
    return None


def makers(e: Experiment, paths: Iterable[Path]) -> list[Job]:
    """The jobs that make some files, each once."""
    found = (maker(e, path) for path in paths)
    return list({job.name: job for job in found if job is not None}.values())


def jobs(e: Experiment) -> list[Job]:
    """Every job from the images to the report, each after those it needs."""
    found: dict[str, Job] = {}

    def add(job: Job) -> None:
        if job.name not in found:
            for needed in job.needs:
                add(needed)
            found[job.name] = job

    add(Job.of(e, "report"))
    return list(found.values())


def of_dataset(
    dataset: str, protocol: str = "", number: str = "", folder: Path = load.EXPERIMENTS
) -> Experiment:
    """An experiment that uses a dataset, for the stages that all of them share.

    One that asks for these reference statistics, if any does: its batch, weights path and resources serve,
    which change no number.

    Raises:
        UserError: none does, or two describe the dataset differently.
    """
    found: list[Experiment] = []
    broken = ""
    for name in load.names(folder):
        try:
            experiment = load.load(name, folder)
        except UserError as error:  # of a file elsewhere, told when nothing else is found
            broken = f"; one can't be read: {error}"
            continue
        if experiment.dataset.name == dataset:
            found.append(experiment)
    if not found:
        raise UserError(f"dataset {dataset!r}: no experiment in {folder} has this dataset.name{broken}")
    for other in found[1:]:
        if other.prepared != found[0].prepared:
            raise UserError(
                f"dataset {dataset!r} means different images in {found[0].name}.yaml and {other.name}.yaml; "
                "rename dataset.name in one of them"
            )
    for experiment in found:
        asked = experiment.evaluation
        if protocol in asked.protocols and number == asked.reference_count:
            return experiment
    return found[0]
