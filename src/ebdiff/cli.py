"""The command line: one verb per stage, each reading files and writing files.

Verbs import what they need when they run, after the number of threads is set, because OpenMP reads
it once.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
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
    "A stage reads files, writes files under results/ and can be run alone; `snakemake --cores all` runs all "
    "that are needed, in order.",
)
PEOPLE, STAGES = "What people ask for", "Stages, which the workflow runs"

FOLLOWED = 10  # seconds between two looks at readings

Name = Annotated[str, typer.Argument(help="Experiment: a file of config/experiments without .yaml.")]
Dataset = Annotated[str, typer.Argument(help="dataset.name of some experiment, such as digits.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed; results go under seed{n}/.")]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, max=os.cpu_count(), help="Torch threads of the job. Default: compute.threads for each process."
    ),
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
    processes = int(os.environ.get("WORLD_SIZE", 1))  # of this job, under torchrun
    _set_threads(max(1, threads // processes) if threads else experiment.compute.threads)
    if experiment.compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
    return experiment


def _set_threads(count: int) -> None:
    """Before torch is imported."""
    os.environ |= {f"{pool}_NUM_THREADS": str(count) for pool in ("OMP", "OPENBLAS", "MKL")}
    # Spinning pools of parallel jobs were seen to slow each other down 70 times.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _stage(verb: str, name: str, threads: int | None = None, **where: object) -> Job:
    """Begin a stage: wildcards are checked before anything slow is imported. Done elsewhere, it is over."""
    from ebdiff.experiment.jobs import Job
    from ebdiff.experiment.records import adopted

    job = Job.of(_begin(name, threads), verb, **where)
    if "WORLD_SIZE" not in os.environ and (place := adopted(job)):
        print(f"taken over from {place}, whose settings and inputs are the same")
        raise typer.Exit
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


@app.command(rich_help_panel=PEOPLE)
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
    estimate: Annotated[
        bool, typer.Option(help="Measure some steps, and say how long all will take.")
    ] = True,
) -> None:
    """Look at a folder of images or drawings and write an experiment for it, config/experiments/{name}.yaml.

    Then measures what it would take on this device, in about a minute.

    Example: ebdiff init flowers --images ~/flowers --size 64
    """
    from ebdiff import starter

    print(*starter.init(name, images, size, force), sep="\n")
    if estimate:
        experiment = _begin(name)
        from ebdiff.cost.plan import make

        print(
            *starter.estimated(make(experiment, _device(experiment, own=False), None, None, None)), sep="\n"
        )


@app.command(rich_help_panel=STAGES)
def prepare_data(
    dataset: Dataset,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=os.cpu_count(), help="Images decoded at a time; changes no result."),
    ] = None,
) -> None:
    """Images of the experiment's source -> resources/data/{dataset}/.

    As pixels, or with `dataset.store: encoded` as the source's own bytes where these are fewer (a tenth, of
    photographs), decoded to the same pixels whenever they are used; `ebdiff plan` warns of too few cores.

    Example: ebdiff prepare-data digits
    """
    experiment = _begin(dataset, threads, dataset=True)
    from ebdiff.data.sources import prepare

    entry = prepare(experiment, threads or experiment.compute.threads)
    skipped = f" ({entry['skipped']} broken ones skipped)" if entry["skipped"] else ""
    classes = f"{entry['classes']} classes" if entry["classes"] else "no labels"
    print(f"{entry['count']} images of {entry['shape']}, {classes}, in resources/data/{dataset}{skipped}")


@app.command(rich_help_panel=STAGES)
def train_classifier(dataset: Dataset, threads: Threads = None) -> None:
    """Train the small classifier whose features stand in for Inception's.

    Example: ebdiff train-classifier digits
    """
    experiment = _begin(dataset, threads, dataset=True)
    from ebdiff.metrics import classifier

    print(f"held-out accuracy {classifier.train_classifier(experiment):.3f}")


@app.command(rich_help_panel=STAGES)
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


@app.command(rich_help_panel=STAGES)
def train_first_stage(name: Name, threads: Threads = None) -> None:
    """Train the small autoencoder of codec.kind autoencoder, whose latents are denoised.

    Example: ebdiff train-first-stage digits_latent
    """
    job = _stage("train-first-stage", name, threads)
    from ebdiff.codecs import autoencoder

    autoencoder.train_first_stage(job.experiment, _device_of(job))


@app.command(rich_help_panel=STAGES)
def encode_latents(name: Name, threads: Threads = None) -> None:
    """Encode all images once, by the first stage that `codec` names.

    Example: ebdiff encode-latents digits_latent
    """
    job = _stage("encode-latents", name, threads)
    from ebdiff.codecs import first_stage

    first_stage.encode_latents(job.experiment, _device_of(job))


@app.command(rich_help_panel=STAGES)
def measure_first_stage(name: Name, threads: Threads = None) -> None:
    """What encoding and decoding loses of the images, as an error of pixels and as distances.

    Example: ebdiff measure-first-stage digits_latent
    """
    job = _stage("measure-first-stage", name, threads)
    from ebdiff.metrics import evaluate

    found = evaluate.measure_first_stage(job.experiment, _device_of(job))
    for protocol in found["protocols"].values():
        print(f"error of pixels {found['rmse']:.2f} of 255, {protocol['distance_name']} {protocol['fd']:.2f}")


@app.command(rich_help_panel=STAGES)
def train_dense(name: Name, search: Search = "full", seed: Seed = 0, threads: Threads = None) -> None:
    """Train the dense network of a search until its tickets settle, or to its horizon.

    Example: ebdiff train-dense digits --search full --seed 0
    """
    job = _stage("train-dense", name, threads, search=search, seed=seed)
    from ebdiff.training import train

    train.train_dense(job.experiment, search, seed, _device_of(job))


@app.command(rich_help_panel=STAGES)
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


@app.command(rich_help_panel=STAGES)
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


@app.command(rich_help_panel=STAGES)
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


@app.command(rich_help_panel=STAGES)
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


@app.command(rich_help_panel=STAGES)
def sample(name: Name, run: RunName, seed: Seed = 0, threads: Threads = None) -> None:
    """Draw the run's images from its experts: exactly sampling.images of them.

    Example: ebdiff sample digits --run eb-50
    """
    job = _stage("sample", name, threads, run=run, seed=seed)
    from ebdiff.diffusion import sample

    sample.sample(job.experiment, run, seed, _device_of(job))


@app.command(rich_help_panel=PEOPLE)
def draw(
    source: Annotated[
        str, typer.Argument(help="Experiment, or a .safetensors file that `ebdiff export` wrote.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the images.")],
    run: Annotated[str | None, typer.Option(help="A finished run of the experiment.")] = None,
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="How many.")] = 16,
    noise_seed: Annotated[int, typer.Option(min=0, help="Seed of their noise.")] = 0,
    label: Annotated[
        int | None, typer.Option(min=0, help="Their class, where the networks are told; default: by turns.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="w of classifier-free guidance; default: the run's sampling.guidance."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the experts.")] = 0,
    threads: Threads = None,
) -> None:
    """Draw any number of images from finished experts: a PNG of each in OUT/images, and a grid; of drawings
    SVG too.

    The noise of an image depends on --noise-seed and its number alone: with the run's own seed these are the
    images of the stage `sample`. Nothing under results/ is written. Interrupted, it leaves no folder.

    Example: ebdiff draw digits --run ta-eb -n 16 --noise-seed 7 --out drawn
    """
    if not source.endswith(".safetensors"):
        _begin(source, threads)
    elif threads:
        _set_threads(threads)
    from ebdiff.diffusion import sample

    asked = {} if guidance is None else {"guidance": guidance}
    sample.draw(ebdiff.load(source, run, seed), number, noise_seed, out, label, **asked)
    print(out / "grid.png")


@app.command(rich_help_panel=PEOPLE)
def export(
    name: Name,
    out: Annotated[Path, typer.Argument(help="The file to write, NAME.safetensors.")],
    run: RunName,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the experts.")] = 0,
) -> None:
    """Hand over a run: one file of averaged weights, a quarter of its checkpoints, and a card beside it.

    The file holds the ensemble, its spans, schedule, codec and story, of a first stage the decoder, and of
    drawings the lengths of the training set's, among which those of samples are drawn: `ebdiff.load` and
    `ebdiff draw` need nothing else.
    The card (NAME.md) tells numbers with their protocol, data and licence, and how to load it.

    Example: ebdiff export digits --run ta-eb ensemble.safetensors
    """
    experiment = _begin(name)
    from ebdiff.report import card

    print(out, card.export(experiment, ebdiff.load(name, run, seed, "cpu"), out), sep="\n")


@app.command(rich_help_panel=STAGES)
def fid(name: Name, run: RunName, seed: Seed = 0, threads: Threads = None) -> None:
    """Distances of a run's samples to the real images.

    Example: ebdiff fid digits --run eb-50
    """
    job = _stage("fid", name, threads, run=run, seed=seed)
    from ebdiff.metrics import evaluate

    metrics = evaluate.evaluate(job.experiment, run, seed, _device_of(job))
    for found in metrics["protocols"].values():
        print(f"{found['distance_name']} {found['fd']:.2f}, kernel distance {found['kid']:.4f}")


@app.command(rich_help_panel=PEOPLE)
def score(
    folder: Annotated[
        Path, typer.Argument(help="Images (png, jpg, webp ...), also in folders below; all are measured.")
    ],
    against: Annotated[str, typer.Option(help="Experiment whose real images and protocols are used.")],
    threads: Threads = None,
) -> None:
    """FID, KID, precision and recall (k = 3) of any folder of images, measured as an experiment's runs are.

    Images must have the size of the experiment's real images, and be resized as these were. Its reference
    statistics are used; nothing is written.

    Example: ebdiff score drawn/images --against digits
    """
    experiment = _begin(against, threads)
    from ebdiff.metrics import evaluate

    for found in evaluate.score(experiment, folder, _device(experiment, own=False)):
        distances = f"{found['distance_name']} {found['fd']:.2f}, kernel distance {found['kid']:.4f}"
        print(f"{distances}, precision {found['precision']:.3f}, recall {found['recall']:.3f}")
        few = "; too few for a well-conditioned Fréchet distance" if found["ill_conditioned"] else ""
        print(f"  {found['images']} images against {found['split']}, {found['mode']}{few}")


@app.command(rich_help_panel=STAGES)
def measure_cost(name: Name, threads: Threads = None) -> None:
    """Parameters, MACs and measured time per training step of every network (keep the machine quiet).

    Example: ebdiff measure-cost digits
    """
    job = _stage("measure-cost", name, threads)
    from ebdiff.cost import measure

    for key, network in measure.measure_cost(job.experiment, _device_of(job))["networks"].items():
        times = f"{network['step_ms']:8.2f} ms per step, {network['bound_ms']:.2f} at least"
        print(f"{key:>6}: {network['params']:>12,} parameters, {times}")


@app.command(rich_help_panel=PEOPLE)
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


@app.command(rich_help_panel=PEOPLE)
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


@app.command(rich_help_panel=STAGES)
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


@app.command(rich_help_panel=STAGES)
def report(name: Name, so_far: SoFar = False) -> None:
    """Write the report page; with --so-far under results/{experiment}/so-far/.

    Example: ebdiff report digits --so-far
    """
    experiment = _begin(name)
    from ebdiff.report.page import report

    print(report(experiment, partial=so_far))


@app.command(rich_help_panel=PEOPLE)
def compare(
    a: Annotated[str, typer.Argument(help="Experiment.")],
    b: Annotated[str, typer.Argument(help="Another one, or a folder with A's results of an earlier date.")],
) -> None:
    """A page on two experiments, or two dates of one: runs of one name, tables, curves, samples.

    Distances are paired by seed and judged as in the report, where they were measured in the same way. What
    is finished is shown; the page goes to results/A/compared/B/.

    An earlier date is a copy of results/A, told by the slash in its path.

    Example: ebdiff compare digits digits_full
    """
    first, second = _begin(a), Path(b) if "/" in b else _begin(b)
    from ebdiff.report.compare import compare

    print(compare(first, second))


@app.command(rich_help_panel=PEOPLE)
def status(
    name: Annotated[str | None, typer.Argument(help="Experiment. Default: all begun.")] = None,
) -> None:
    """How far an experiment is: jobs done, running (step, loss, time left) and waiting, and the whole.

    Jobs that last seconds are told when they are done. Logs are under results/{experiment}/logs/.

    Example: ebdiff status digits
    """
    from ebdiff.experiment import load
    from ebdiff.report.status import lines

    begun = [name] if name else [n for n in load.names() if Path("results", n).is_dir()]
    if not begun:
        print("no experiment is begun")
    for each in begun:
        print(f"{each}:", *lines(_begin(each)), sep="\n  ")


@app.command(rich_help_panel=PEOPLE)
def tensorboard(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes, until Ctrl-C.")] = False,
) -> None:
    """Give TensorBoard the loss and speed of all trainings, finished or running, and the grids of previews.

    Event files go under results/{experiment}/tensorboard/; called again, only what is new is added.

    Example: ebdiff tensorboard digits --follow
    """
    experiment = _begin(name)
    from ebdiff.report import tensorboard

    print("tensorboard --logdir", tensorboard.write(experiment), flush=True)
    with suppress(
        interrupts.Interrupted
    ):  # as it is meant to end; what was cut off is mended by the next call
        while follow:
            time.sleep(FOLLOWED)
            tensorboard.write(experiment)


@app.command(rich_help_panel=PEOPLE)
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


@app.command(rich_help_panel=PEOPLE)
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="As tables for people: docs/keys.md.")] = False,
) -> None:
    """Print the JSON schema of experiment files, for editors.

    Example: ebdiff schema > config/experiment.schema.json
    """
    from ebdiff.experiment import keys, load

    print(keys.markdown() if markdown else json.dumps(load.schema(), indent=2))


@app.command(rich_help_panel=PEOPLE)
def version() -> None:
    """Print the version."""
    print(ebdiff.__version__)


def main() -> None:
    """Entry point: user errors are one line and status 1, signals 128 + their number, never a traceback."""
    status = 1
    os.environ["MPLBACKEND"] = "agg"  # files alone are drawn, whatever a notebook's shell asks for
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (None where it was closed)
    for stream in (sys.stdout, sys.stderr):  # a letter that a console can't show is no reason to fail
        stream.reconfigure(errors="backslashreplace")
    try:
        with interrupts.unwinding():
            try:
                return app()
            finally:  # here, where a full disk is told in a line
                sys.stdout.flush()
    except interrupts.Interrupted as signal:
        message, status = str(signal), 128 + signal.number
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = explained(error)
        try:
            sys.stdout.flush()
        except OSError:  # Python would try again at the end, and say so
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        reason = first_line(error, "no more")
        message = f"not enough memory ({reason}); lower compute.micro_batch, sampling.batch or network"
    print(f"ebdiff: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
