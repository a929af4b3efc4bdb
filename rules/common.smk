# The experiments, and the input functions that hide the special cases.
# Which files a stage reads is spelt in ebdiff.inputs, where they lie in ebdiff.layout.
from functools import cache
from pathlib import Path

from ebdiff.experiment import digests, inputs, layout
from ebdiff.experiment import load as loading
from ebdiff.system.errors import UserError, unknown
from ebdiff.plan.jobs import reported
from ebdiff.report import shown

CONDA = str(Path(workflow.basedir) / "envs" / "ebdiff.yaml")

# A verb replaces its shell, so that Snakemake waits for the verb itself: at a SIGTERM of a cluster a
# shell would be gone at once, its job over, and the verb killed while it saves its state.
shell.prefix("set -euo pipefail; exec ")


def stop(message):
    """End with one line: snakemake reports an exception in an input function with a trace."""
    raise SystemExit(f"ebdiff: {message}")


@cache
def load(name):
    """An experiment by name; a mistake in its file is one line, before anything starts."""
    return checked(loading.load, name)


@cache
def load_dataset(name):
    """Some experiment that uses a dataset."""
    return checked(loading.of_dataset, name)


@cache
def load_reference(dataset, protocol, count):
    """The experiment that asks for reference statistics."""
    return checked(loading.of_reference, dataset, protocol, count)


def names(key):
    """The names that a config key lists: in YAML, or separated by commas as on the command line."""
    value = config[key]
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(n, str) for n in listed):
        stop(f"config {key}: a list, or names separated by commas, not {value!r}")
    return listed


def experiment(w):
    return load(w.experiment)


def checked(function, *arguments):
    """Call a function of the package; a user error becomes one line."""
    try:
        return function(*arguments)
    except (UserError, OSError) as error:
        stop(error)
    except KeyError as error:
        stop(f"the experiment has no {error}; asked for by a target's name")


def of(function, *wildcards):
    """An input or params function: `function(experiment, *wildcards)`."""
    return lambda w: checked(
        function, experiment(w), *(getattr(w, name) for name in wildcards)
    )


def of_dataset(w):
    return digests.data_digest(load_dataset(w.dataset))


def images(w):
    """The images of an experiment and their manifest."""
    return expand([layout.IMAGES, layout.MANIFEST], dataset=experiment(w).dataset.name)


def all_cores(w):
    """Every core of this machine; a cluster's job is made exclusive instead (`slurm_extra`)."""
    return workflow.cores if workflow.local_exec else experiment(w).compute.threads


def compute_reference(key):
    """As `compute`, for reference statistics."""
    return lambda w: getattr(
        load_reference(w.dataset, w.protocol, w.number).compute, key
    )


def of_reference(w):
    return digests.reference_digest(load_dataset(w.dataset), w.protocol, w.number)


def compute(key):
    return lambda w: getattr(experiment(w).compute, key)


def job_threads(w):
    """Threads of a job that may be spread over several GPUs, a process for each."""
    return experiment(w).compute.threads * max(1, experiment(w).compute.gpus)


def one_gpu(w):
    """A GPU for a verb that uses one, however many trainings take."""
    return min(1, experiment(w).compute.gpus)


def grow(amount, of=compute):
    """A resource that doubles with every retry: a key of `compute`, or a number."""
    first = of(amount) if isinstance(amount, str) else lambda w: amount
    return lambda w, attempt: first(w) * 2 ** (attempt - 1)


def report_inputs(w):
    return [str(path) for path in checked(reported, experiment(w))]


def final(template, extension):
    """A table's or figure's template with its extension filled in."""
    return template.replace("{ext}", extension)


config = {"experiments": [], "runs": [], **config}
for key in config.keys() - {"experiments", "runs"}:
    stop(f"config: {unknown(key, ['experiments', 'runs'])}")
EXPERIMENTS = names("experiments")
RUNS = names("runs")


def tables_of(name):
    return expand(
        layout.TABLE,
        experiment=name,
        table=load(name).tables,
        ext=layout.TABLE_EXTENSIONS,
    )


def figures_of(name):
    return expand(
        layout.FIGURE,
        experiment=name,
        figure=shown.FIGURES,
        ext=layout.FIGURE_EXTENSIONS,
    )


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
    """The report, or only the named runs where `--config runs=a,b` restricts them."""
    if RUNS:
        return metrics_of(name, RUNS)
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
    rate=r"0\.[0-9]*[1-9]",
    expert="[a-z0-9][a-z0-9_.-]*",
    milestone="[1-9][0-9]*|like-[a-z0-9_-]+",
    run="[a-z0-9][a-z0-9_-]*",
    table=r"table\d|controls",
    figure=r"figure\d[a-z]?|losses",
