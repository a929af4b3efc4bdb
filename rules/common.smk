# The experiments, and one call for each part of a rule. What a stage reads, makes and depends on is spelt in
# ebdiff.experiment.stages, where its files lie in ebdiff.experiment.layout.
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from ebdiff.experiment import jobs, layout, records
from ebdiff.experiment import load as loading
from ebdiff.experiment.stages import STAGES
from ebdiff.system.errors import UserError, unknown

# A verb replaces its shell, so that Snakemake waits for the verb itself: at a SIGTERM of a cluster a
# shell would be gone at once, its job over, and the verb killed while it saves its state.
shell.prefix("set -euo pipefail; exec ")


def stop(message):
    """End with one line: snakemake reports an exception in an input function with a trace."""
    raise SystemExit(f"ebdiff: {message}")


CONDA = str(Path(workflow.basedir) / "envs" / "ebdiff.yaml")
if {"{", "}"} & set(CONDA):
    stop(f"{workflow.basedir}: Snakemake takes braces for wildcards; rename the folder")


def checked(function, *arguments, **named):
    """Call a function of the package; a user error becomes one line."""
    try:
        return function(*arguments, **named)
    except (UserError, OSError) as error:
        stop(error)


@cache
def load(name):
    """An experiment by name; a mistake in its file is one line, before anything starts."""
    return checked(loading.load, name)


# Of jobs that a killed Snakemake left behind and that are done by now.
for mark in records.unnoticed():
    mark.unlink(missing_ok=True)


@cache
def sharing(**wildcards):
    """Some experiment that uses a dataset: which one, all of them are read for."""
    return checked(jobs.of_dataset, **wildcards)


def experiment(w):
    """The experiment of a job; of a stage that several share, one of them."""
    return (
        load(w.experiment) if hasattr(w, "experiment") else sharing(**dict(w.items()))
    )


def job(verb, w):
    """A stage with the wildcards that Snakemake found."""
    own = [
        name for name in STAGES[verb].wildcards if name not in ("experiment", "dataset")
    ]
    where = {name: getattr(w, name) for name in own}
    return checked(jobs.Job.of, experiment(w), verb, **where)


def reads(verb):
    """A rule's input: what its stage reads, and what it may go on from."""

    def paths(w):
        here = job(verb, w)
        found = checked(lambda: here.reads + here.continues)
        return list(dict.fromkeys(map(str, found)))

    return paths


def makes(verb):
    """A rule's output."""
    return [directory(t) if t == layout.SNAPSHOTS else t for t in STAGES[verb].makes]


def digest(verb):
    """A rule's params: a hash of the configuration that its stage depends on."""
    return lambda w: job(verb, w).digest


def log_of(verb):
    return STAGES[verb].note("logs", "log")


def benchmark_of(verb):
    return STAGES[verb].note("benchmarks", "tsv")


def priority_of(verb):
    return STAGES[verb].priority


def names(key):
    """The names that a config key lists: in YAML, or separated by commas as on the command line."""
    value = config[key]
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(n, str) for n in listed):
        stop(f"config {key}: a list, or names separated by commas, not {value!r}")
    return listed


def all_cores(w):
    """Every core of this machine; a cluster's job is made exclusive instead (`slurm_extra`)."""
    return workflow.cores if workflow.local_exec else experiment(w).compute.threads


def compute(key):
    return lambda w: getattr(experiment(w).compute, key)


def job_threads(w):
    """Threads of a job that may be spread over several GPUs, a process for each."""
    return experiment(w).compute.threads * max(1, experiment(w).compute.gpus)


def gpus(verb):
    """The GPUs that a job takes: none for what is done before one would have started."""
    return lambda w: job(verb, w).gpus


def grow(amount):
    """A resource that doubles with every retry: a key of `compute`, or a number."""
    first = compute(amount) if isinstance(amount, str) else lambda w: amount
    return lambda w, attempt: first(w) * 2 ** (attempt - 1)


config = {"experiments": [], "runs": [], **config}
for key in config.keys() - {"experiments", "runs"}:
    stop(f"config: {unknown(key, ['experiments', 'runs'])}")
EXPERIMENTS = names("experiments")
RUNS = names("runs")


def pages_of(name):
    """The tables and figures of an experiment."""
    return [str(path) for path in jobs.Job.of(load(name), "tabulate").makes]


def those_of(name, kind):
    """Its tables, or its figures."""
    return [path for path in pages_of(name) if f"/{kind}/" in path]


def metrics_of(name, runs):
    """Metrics of some runs, over their seeds."""
    for run in runs:
        if run not in load(name).runs:
            stop(f"runs: {unknown(run, load(name).runs)}")
    return [
        layout.METRICS.format(experiment=name, seed=seed, run=run)
        for run in runs
        for seed in load(name).seeds_of(run)
    ]


def reports_of(name):
    """The report; where `--config runs=a,b` names some runs, a page of what is there once these are."""
    if RUNS:
        return [layout.SO_FAR_REPORT.format(experiment=name)]
    return [layout.REPORT.format(experiment=name)]


def of_all(targets):
    """Targets of every chosen experiment, asked when they are needed."""
    return lambda w: [path for name in chosen() for path in targets(name)]


def chosen(w=None):
    """The experiments of `experiments`, each of which there is."""
    if not EXPERIMENTS:
        stop("config experiments: name at least one, as in --config experiments=digits")
    return [load(name).name for name in EXPERIMENTS]


wildcard_constraints:
    experiment="[a-z0-9][a-z0-9_-]*",
    dataset="[a-z0-9][a-z0-9_-]*",
    protocol="classifier|legacy_pytorch|clean",
    number="all|[1-9][0-9]*",
    seed="0|[1-9][0-9]*",
    search="[a-z0-9][a-z0-9_-]*",
    criterion="magnitude|taylor|diff-pruning|random",
    weights="raw|ema",
    rate=r"0\.[0-9]*[1-9](-at[0-9]+)?",
    expert="[a-z0-9][a-z0-9_.-]*",
    milestone="[1-9][0-9]*(min)?|like-[a-z0-9_-]+",
    run="[a-z0-9][a-z0-9_-]*",
