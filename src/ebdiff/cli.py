"""The command line: one verb per stage, each reading files and writing files.

Verbs import what they need when they run, after the number of threads is set, because OpenMP reads
it once.
"""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

import ebdiff
from ebdiff.system import interrupts
from ebdiff.system.errors import UserError, explained, first_line, out_of_memory

if TYPE_CHECKING:
    import torch

    from ebdiff.experiment.experiment import Experiment
    from ebdiff.experiment.jobs import Job

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Early-bird tickets and timestep-aware experts for cheap diffusion training.\n\n"
    "Every verb is one stage of the workflow: it reads files, writes files under results/ and can be "
    "run alone. `snakemake --cores all` runs all that is needed, in order.",
)

Name = Annotated[str, typer.Argument(help="Experiment: a file of config/experiments without .yaml.")]
Dataset = Annotated[str, typer.Argument(help="dataset.name of some experiment, such as digits.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed; results go under seed{n}/.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Torch threads of the job. Default: compute.threads for each process."),
]
Search = Annotated[str, typer.Option(help="A search of the experiment, or `final`.")]
Criterion = Annotated[str, typer.Option(help="magnitude, taylor, diff-pruning or random.")]
Weights = Annotated[str, typer.Option(help="raw or ema.")]
RunName = Annotated[str, typer.Option("--run", help="A run of the experiment.")]
SoFar = Annotated[
    bool, typer.Option("--so-far/--final", help="Read what is finished, or insist on everything.")
]


def _begin(name: str, threads: int | None = None, *, dataset: bool = False) -> Experiment:
    """Load an experiment, or one with a `dataset` so called; set the threads, before torch is imported."""
    from ebdiff.experiment import jobs, load

    experiment = jobs.of_dataset(name) if dataset else load.load(name)
    if threads and threads > (cores := len(os.sched_getaffinity(0))):
        raise UserError(f"--threads {threads}: a job may use {cores} cores here; give at most as many")
    processes = int(os.environ.get("WORLD_SIZE", 1))  # of this job, under torchrun
    count = str(max(1, threads // processes) if threads else experiment.compute.threads)
    os.environ |= {"OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    # Spinning pools of parallel jobs were seen to slow each other down 70 times.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if experiment.compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
    return experiment


def _stage(verb: str, name: str, threads: int | None = None, **where: object) -> Job:
    """Begin a stage: its wildcards are checked before anything slow is imported."""
    from ebdiff.experiment.jobs import Job

    job = Job.of(_begin(name, threads), verb, **where)
    if job.stage.spread:
        _spread(job.experiment)
    return job


def _device_of(job: Job) -> torch.device:
    """The device of a stage: what no GPU would do sooner leaves CUDA, whose start takes seconds, alone."""
    import torch

    if not job.on_gpu:
        return torch.device("cpu")
    return _device(job.experiment, share=1 if job.stage.alone else job.experiment.compute.share)


def _device(experiment: Experiment, own: bool = True, share: int = 1) -> torch.device:
    """A device, `own` or its `share` where `compute.gpus` asks for one; a job's processes meet here."""
    from ebdiff.nets.execution import Runtime
    from ebdiff.system import devices, parallel

    device = devices.pick_device(experiment.compute.device, own and experiment.compute.gpus > 0, share)
    parallel.join(device)
    tuned, here = experiment.tuning.device, devices.device_name(device)
    if tuned not in ("", here) and parallel.first():
        cure = "delete its file" if device.type == "cuda" else f"`ebdiff tune {experiment.name}`"
        print(f"warning: tuned on {tuned}, but this is {here}: {cure}", flush=True)
    # Strict fp32 unless a network's own execution says otherwise.
    Runtime(device, deterministic=experiment.compute.deterministic).set_arithmetic()
    return device


def _spread(experiment: Experiment) -> None:
    """Where a job has several GPUs, start it again with a process for each (torchrun)."""
    compute = experiment.compute
    if compute.gpus < 2 or "WORLD_SIZE" in os.environ:
        return
    from ebdiff.system import devices

    gpus = devices.visible_gpus()
    processes = min(compute.gpus, len(gpus))
    if processes > 1:
        leased = devices.lease(gpus, processes, own=True)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[i] for i in leased)
        # Asked to end, it would kill its processes after 30 s: too soon for a large state.
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        verb = ["--no-python", "--", sys.executable, "-m", "ebdiff.cli", *sys.argv[1:]]
        os.execv(sys.executable, [*torchrun, f"--nproc-per-node={processes}", *verb])


@app.command()
def init(
    name: Annotated[
        str, typer.Argument(help="Name of the new experiment: lower-case letters, digits, - and _.")
    ],
    images: Annotated[
        str, typer.Option(help="Folder, zip or parquet of images; folder or .ndjson of drawings.")
    ],
    size: Annotated[
        int | None,
        typer.Option(help="Height and width, pixels: to train at, 64; of drawings' pictures, 256."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over an experiment of this name.")] = False,
) -> None:
    """Look at a folder of images or drawings and write an experiment for it, config/experiments/{name}.yaml.

    Example: ebdiff init flowers --images ~/flowers --size 64
    """
    from ebdiff import starter

    print(*starter.init(name, images, size, force), sep="\n")


@app.command()
def prepare_data(
    dataset: Dataset,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Images decoded at a time; changes no result.")
    ] = None,
) -> None:
    """Images of the experiment's source -> resources/data/{dataset}/.

    Example: ebdiff prepare-data digits
    """
    experiment = _begin(dataset, threads, dataset=True)
    from ebdiff.data.sources import prepare

    entry = prepare(experiment, threads or experiment.compute.threads)
    skipped = f" ({entry['skipped']} broken ones skipped)" if entry["skipped"] else ""
    classes = f"{entry['classes']} classes" if entry["classes"] else "no labels"
    print(f"{entry['count']} images of {entry['shape']}, {classes}, in resources/data/{dataset}{skipped}")


@app.command()
def train_classifier(dataset: Dataset, threads: Threads = None) -> None:
    """Train the small classifier whose features stand in for Inception's.

    Example: ebdiff train-classifier digits
    """
    experiment = _begin(dataset, threads, dataset=True)
    from ebdiff.metrics import classifier

    print(f"held-out accuracy {classifier.train_classifier(experiment):.3f}")


@app.command()
def reference_stats(
    dataset: Dataset,
    protocol: Annotated[
        str | None, typer.Option(help="classifier, legacy_pytorch or clean. Default: the experiment's first.")
    ] = None,
    images: Annotated[str, typer.Option(help="How many real images, or `all`.")] = "all",
    threads: Threads = None,
) -> None:
    """Features of the real images, with the distances of real halves and of noise.

    Example: ebdiff reference-stats digits
    """
    experiment = _begin(dataset, threads, dataset=True)
    from ebdiff.experiment.jobs import Job, of_dataset

    protocol = protocol or experiment.evaluation.protocols[0]
    where = dict(protocol=protocol, number=images)
    Job.of(experiment, "reference-stats", **where)
    if images == "1" or not re.fullmatch("all|[1-9][0-9]*", images):
        raise UserError(f"--images {images!r} is neither `all` nor a number from 2 on")
    from ebdiff.metrics import evaluate

    job = Job.of(of_dataset(dataset, **where), "reference-stats", **where)
    evaluate.reference_stats(job.experiment, protocol, images, _device_of(job))


@app.command()
def train_dense(name: Name, search: Search = "full", seed: Seed = 0, threads: Threads = None) -> None:
    """Train the dense network of a search until its tickets settle, or to its horizon.

    Example: ebdiff train-dense digits --search full --seed 0
    """
    job = _stage("train-dense", name, threads, search=search, seed=seed)
    from ebdiff.training import train

    train.train_dense(job.experiment, search, seed, _device_of(job))


@app.command()
def prune_per_epoch(
    name: Name,
    search: Search = "full",
    criterion: Criterion = "magnitude",
    weights: Weights = "ema",
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Masks of all intervals of a search, for all its rates.

    Example: ebdiff prune-per-epoch digits --search full --criterion magnitude
    """
    ticket = dict(search=search, criterion=criterion, weights=weights, seed=seed)
    job = _stage("prune-per-epoch", name, threads, **ticket)
    from ebdiff.experiment.stages import taken_while_training

    if taken_while_training(search, criterion):
        from ebdiff.tickets import history

        return history.take_masks(job.experiment, search, weights, seed)
    from ebdiff.tickets import stages

    stages.prune_per_epoch(job.experiment, **ticket, device=_device_of(job))


@app.command()
def hamming_matrix(
    name: Name,
    search: Search = "full",
    criterion: Criterion = "magnitude",
    weights: Weights = "ema",
    seed: Seed = 0,
) -> None:
    """Distances between all masks of a search, to the initial mask, and chance.

    Example: ebdiff hamming-matrix digits --search full
    """
    from ebdiff.tickets import history

    history.hamming_matrix(_begin(name), search, criterion, weights, seed)


@app.command()
def select_eb_epoch(
    name: Name,
    rate: Annotated[
        str,
        typer.Option(help="Asked pruning rate; 0.5-at2: cut after two intervals, whatever the rule says."),
    ],
    search: Search = "full",
    criterion: Criterion = "magnitude",
    weights: Weights = "ema",
    seed: Seed = 0,
) -> None:
    """Draw the early-bird ticket of a rate and cut its network out.

    Example: ebdiff select-eb-epoch digits --rate 0.5
    """
    from ebdiff.experiment import layout

    ticket = dict(search=search, criterion=criterion, weights=weights, seed=seed)
    with suppress(ValueError):  # what is no rate is refused below, by name
        rate = layout.ticket(*layout.asked(rate))  # 0.50 is 0.5
    experiment = _stage("select-eb-epoch", name, rate=rate, **ticket).experiment
    from ebdiff.tickets import stages

    asked, after = layout.asked(rate)
    story = stages.select_eb_epoch(experiment, **ticket, rate=asked, after=after)
    word = {True: "settled", False: "NOT settled by the horizon", None: "cut as asked"}[story["settled"]]
    at = f"{story['unit']} {story['interval']} (step {story['step']})"
    print(f"rate {rate}: {word}, {at}, {story['params']:,} parameters")


@app.command()
def finetune_region(
    name: Name,
    expert: Annotated[str, typer.Option(help="Key of an expert, such as full-magnitude-ema-0.5-t0-1000.")],
    milestone: Annotated[str, typer.Option(help="Steps, like-RUN, like-RUN-flops, or such as 20min.")],
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Train an expert on its span of timesteps up to a milestone.

    Example: ebdiff finetune-region digits --expert full-magnitude-ema-0.5-t0-1000 --milestone 900
    """
    job = _stage("finetune-region", name, threads, expert=expert, milestone=milestone, seed=seed)
    from ebdiff.training import train

    train.finetune_region(job.experiment, expert, milestone, seed, _device_of(job))


@app.command()
def sample(name: Name, run: RunName, seed: Seed = 0, threads: Threads = None) -> None:
    """Draw the run's images from its experts: exactly sampling.images of them.

    Example: ebdiff sample digits --run eb-50
    """
    job = _stage("sample", name, threads, run=run, seed=seed)
    from ebdiff.diffusion import sample

    sample.sample(job.experiment, run, seed, _device_of(job))


@app.command()
def fid(name: Name, run: RunName, seed: Seed = 0, threads: Threads = None) -> None:
    """Distances of a run's samples to the real images.

    Example: ebdiff fid digits --run eb-50
    """
    job = _stage("fid", name, threads, run=run, seed=seed)
    from ebdiff.metrics import evaluate

    metrics = evaluate.evaluate(job.experiment, run, seed, _device_of(job))
    for found in metrics["protocols"].values():
        print(f"{found['distance_name']} {found['fd']:.2f}, kernel distance {found['kid']:.4f}")


@app.command()
def measure_cost(name: Name, threads: Threads = None) -> None:
    """Parameters, MACs and measured time per training step of every network (keep the machine quiet).

    Example: ebdiff measure-cost digits
    """
    job = _stage("measure-cost", name, threads)
    from ebdiff.cost import measure

    for key, network in measure.measure_cost(job.experiment, _device_of(job))["networks"].items():
        times = f"{network['step_ms']:8.2f} ms per step, {network['bound_ms']:.2f} at least"
        print(f"{key:>6}: {network['params']:>12,} parameters, {times}")


@app.command()
def tune(name: Name, threads: Threads = None) -> None:
    """Measure which precision and memory format is fastest on this CPU (keep the machine quiet).

    Writes config/tuning/{name}.yaml, which the workflow reads from then on; without it a CPU computes in
    fp32. On a GPU there is nothing to tune: bf16, channels last and CUDA graphs are the fastest.

    Example: ebdiff tune cifar10
    """
    experiment = _begin(name, threads)
    from ebdiff.cost import tune
    from ebdiff.experiment import layout

    tune.tune(experiment, _device(experiment))
    print(layout.path(layout.TUNING, experiment=name).read_text(encoding="utf-8"), end="")


@app.command()
def plan(
    name: Name,
    devices: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Jobs at a time. Default: GPUs here x compute.share / compute.gpus, or cores / threads.",
        ),
    ] = None,
    step_ms: Annotated[
        float | None,
        typer.Option(min=1e-3, max=1e9, help="Milliseconds of an unpruned training step on another device."),
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images of the dataset, where they aren't prepared yet.")
    ] = None,
    threads: Threads = None,
) -> None:
    """What an experiment will take: time, memory, disk, speed-ups, and what can't work (about a minute).

    Also writes results/{name}/plan.json, which the report sets against what really happened.

    Example: ebdiff plan cifar10 --devices 4
    """
    experiment = _begin(name, threads)
    if step_ms is not None and not step_ms > 0:  # nan passes every range
        raise typer.BadParameter("nan is no number of milliseconds", param_hint="--step-ms")
    from ebdiff.cost.plan import make, page
    from ebdiff.experiment import layout
    from ebdiff.experiment.records import sealed
    from ebdiff.system.files import write_json

    planned = make(experiment, _device(experiment, own=False), devices, step_ms, images)
    path = layout.path(layout.PLAN, experiment=name)
    write_json(path, sealed(planned))
    print(*page(planned), path, sep="\n\n")


@app.command()
def tabulate(
    name: Name,
    what: Annotated[
        list[str] | None, typer.Argument(help="table4, figure2, ...: only these, so far. Default: all.")
    ] = None,
    so_far: SoFar = False,
) -> None:
    """Write all tables (.csv, .md, .tex) and figures (.pdf, .png) of an experiment.

    With --so-far, or names, what is finished is shown, under results/{experiment}/so-far/.

    Example: ebdiff tabulate digits table4 figure2
    """
    experiment = _begin(name)
    from ebdiff.report.page import tabulate

    for path in tabulate(experiment, what or [], partial=so_far or bool(what)):
        print(path.read_text(encoding="utf-8") if path.suffix == ".md" and what else path)


@app.command()
def report(name: Name, so_far: SoFar = False) -> None:
    """Write the report page; with --so-far under results/{experiment}/so-far/.

    Example: ebdiff report digits --so-far
    """
    experiment = _begin(name)
    from ebdiff.report.page import report

    print(report(experiment, partial=so_far))


@app.command()
def verify(name: Name) -> None:
    """Read every result of an experiment whole and say which aren't what their stages made.

    Example: ebdiff verify digits
    """
    experiment = _begin(name)
    from ebdiff.experiment.jobs import jobs
    from ebdiff.experiment.records import verify

    found = dict(verify(experiment, jobs(experiment)))
    print(*found.values(), sep="\n", end="\n" if found else "")
    if found:
        raise UserError(f"{name}: {len(found)} files can't be used")
    print("everything that is there is what its stage made")


@app.command()
def schema() -> None:
    """Print the JSON schema of experiment files, for editors.

    Example: ebdiff schema > config/experiment.schema.json
    """
    from ebdiff.experiment import load

    print(json.dumps(load.schema(), indent=2))


@app.command()
def version() -> None:
    """Print the version."""
    print(ebdiff.__version__)


def main() -> None:
    """Entry point: user errors are one line and status 1, signals 128 + their number, never a traceback."""
    status = 1
    for stream in (sys.stdout, sys.stderr):  # a letter that a console can't show is no reason to fail
        stream.reconfigure(errors="backslashreplace")
    try:
        with interrupts.unwinding():
            return app()
    except interrupts.Interrupted as signal:
        message, status = str(signal), 128 + signal.number
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = explained(error)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        reason = first_line(error, "no more")
        message = f"not enough memory ({reason}); lower compute.micro_batch, sampling.batch or network"
    print(f"ebdiff: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
