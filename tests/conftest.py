import os
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: two pools on two cores crawl

from ebdiff.experiment import jobs, load, records
from ebdiff.experiment.members import Architecture, Items, UNetConfig

ROOT = Path(__file__).parents[1]

# 8x8 digits, 160 of them: an epoch is 10 steps, the search 60 at most.
TINY = {
    "name": "tiny",
    "dataset": {"name": "digits", "source": "bundled-digits", "flip": True, "subset": 160,
                "image_size": 8, "channels": 1, "held_out": 0.2},
    "network": {
        "width": 8, "multipliers": [1, 1], "blocks": 1,
        "attention": [], "dropout": 0.1, "norm_groups": 4,
    },
    "training": {
        "batch": 16, "learning_rate": 2e-3, "warmup": 5, "ema_decay": 0.9, "log_every": 10,
        "save_minutes": 60,
    },
    "pruning": {"images": 32, "stride": 100},
    "searches": {"full": {"rates": [0.3, 0.5, 0.8], "weights": ["raw", "ema"], "horizon": 6}},
    "dense": {"iterations": 80},
    "sampling": {"steps": 10, "clamp": True, "images": 23, "batch": 10},
    "runs": {
        "unpruned": {"title": "Unpruned", "method": "unpruned", "init": "dense"},
        "eb-50": {"title": "EB", "method": "eb", "rate": 0.5, "iterations": 40},
        "ta-eb": {
            "title": "TA-EB", "method": "ta-eb", "iterations": 20,
            "experts": [
                {"rate": 0.3, "span": [0, 260], "serve": [0, 240]},
                {"rate": 0.8, "span": [240, 1000]},
            ],
        },
    },
    "tables": {"table4": ["unpruned", "eb-50", "ta-eb"]},
}  # fmt: skip


def unet(side=32, channels=3, classes=0, **config):
    """The architecture of a U-Net for images of a size."""
    return Architecture(UNetConfig(**config), Items((channels, side, side), classes))


def changed(raw, changes):
    """A copy of nested dictionaries with {"training.batch": 8} written in; ... removes the key."""
    raw = deepcopy(raw)
    for path, value in changes.items():
        *folders, key = path.split(".")
        place = raw
        for folder in folders:
            place = place.setdefault(folder, {})
        if value is ...:
            del place[key]
        else:
            place[key] = value
    return raw


def pytest_collection_modifyitems(items):
    """What is long is slow too: `-m "not slow"` leaves both out."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")


@pytest.fixture
def vary():
    """The tiny experiment with some keys changed: vary({"training.batch": 8})."""
    return lambda changes: load.parse(changed(TINY, changes), "tiny.yaml")


@pytest.fixture
def tiny(vary):
    return vary({})


@pytest.fixture
def halves(monkeypatch):
    """Let the CPU train as CUDA does: on bf16 copies of the weights."""
    from ebdiff.nets.execution import Runtime

    monkeypatch.setattr(Runtime, "halves", property(lambda runtime: runtime.how.precision == "bf16"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Prepared digits, made once: the folder that holds resources/."""
    from ebdiff.data.sources import prepare

    folder, before = tmp_path_factory.mktemp("digits"), Path.cwd()
    os.chdir(folder)
    prepare(load.parse(deepcopy(TINY), "tiny.yaml"))
    os.chdir(before)
    return folder


@pytest.fixture
def workspace(tmp_path, monkeypatch, digits):
    """An empty working directory with the prepared digits."""
    shutil.copytree(digits / "resources", tmp_path / "resources")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def made(tmp_path_factory, digits):
    """A project in which every stage of the tiny experiment has run: its folder. Leave it as it is."""
    from stages import STAGES, run
    from test_workflow import copied

    folder = copied(tmp_path_factory.mktemp("made"))
    write_experiment(folder)
    shutil.copytree(digits / "resources", folder / "resources")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for stage in STAGES:
            assert run(*stage) == 0, stage
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A project in which Snakemake has run `smoke` to its report: its folder. Leave it as it is.

    The test processes of a session share one run; each has a copy.
    """
    from test_workflow import copied, snakemake

    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "smoke"
    with FileLock(f"{shared}.lock"):
        if not (shared / "results/smoke/report.html").exists():
            shutil.rmtree(shared, ignore_errors=True)
            shared.mkdir()
            done = snakemake(copied(shared), "smoke")
            assert done.returncode == 0, done.stderr[-3000:]
    return shutil.copytree(shared, tmp_path_factory.mktemp("finished") / "project", symlinks=True)


def vouch(experiment, verb, **where):
    """Record files that a test made by hand, as if their stage had made them."""
    job = jobs.Job.of(experiment, verb, **where)
    there = [f for p in job.makes for f in (p.glob("*") if p.is_dir() else [p]) if f.exists()]
    made = {str(path): records._entry(path) for path in there}
    settings = records.Records(experiment).settings(job)
    told = {"stage": verb, "where": dict(job.where), "settings": settings, "read": {}, "made": made}
    records._write(job, told)


@pytest.fixture
def verb(tmp_path):
    """Run a verb as a user would: a process in tmp_path."""

    def run(*arguments):
        command = [sys.executable, "-m", "ebdiff.cli", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run


def write_experiment(folder, changes=None, name="tiny"):
    """Write the tiny experiment's YAML, with some keys changed, under config/experiments/."""
    path = folder / "config/experiments" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(changed(TINY, {"name": name, **(changes or {})})))
    return path
