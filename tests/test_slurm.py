"""The workflow on a real SLURM of one node; `pytest --durations=0` says what each scenario took."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import slurm_cluster
from conftest import write_experiment
from test_training import same, tensors_of
from test_workflow import BIN, Plan, copied, edit

from ebdiff.experiment import layout

pytestmark = pytest.mark.long
pytest.importorskip("snakemake_executor_plugin_slurm")

# The profile as it is shipped, with what a cluster without accounting needs; jobs are looked at sooner.
SLURM = ["--workflow-profile", "profiles/slurm", "--slurm-status-command", "squeue"]
SLURM += ["--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "10"]
LOCAL = {"prepare_data", "tabulate_smoke", "write_report"}


started = []


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    with ExitStack() as stack:
        try:
            stack.enter_context(slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")))
        except slurm_cluster.Unavailable as reason:
            pytest.skip(f"no SLURM: {reason}")
        yield
        for process in started:
            process.kill()  # a failed test may have left it
            process.wait()


def submit(folder, *arguments):
    """Start Snakemake on SLURM."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "snakemake", *SLURM, *map(str, arguments)]
    with (folder / "snakemake.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    started.append(process)
    return process


def ended(process, folder):
    """Wait for Snakemake; whether it succeeded, and what it said."""
    status = process.wait(timeout=2400)
    return status == 0, (folder / "snakemake.log").read_text()


def until(condition, process):
    """Wait for a condition while Snakemake runs, and return what it gave."""
    end = time.monotonic() + 300
    while not (found := condition()):
        assert process.poll() is None, "Snakemake ended too early"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    return found


def jobs(of):
    """SLURM's jobs of a rule (and its wildcards), oldest first, as dictionaries of what squeue knows."""
    known = {"id": "%A", "state": "%T", "partition": "%P", "limit": "%l", "sharing": "%h", "comment": "%k"}
    text = slurm_cluster.command("squeue", "-h", "-t", "all", "-o", "|".join(known.values()))
    rows = [dict(zip(known, line.split("|"), strict=True)) for line in text.splitlines()]
    return sorted((r for r in rows if r["comment"].startswith(f"rule_{of}_")), key=lambda r: int(r["id"]))


# --- the smoke experiment ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory in which SLURM has run the smoke experiment to its report."""
    folder = copied(tmp_path_factory.mktemp("finished"))
    succeeded, said = ended(submit(folder, "smoke"), folder)
    assert succeeded, said[-3000:]
    return folder


def test_the_smoke_experiment_runs_whole(finished):
    assert "TA-EB 30/60/80 %" in (finished / "results/smoke/report.html").read_text(encoding="utf-8")
    for rule, count in Plan(finished, "smoke", "--forceall").jobs.items():
        submitted = jobs(rule)
        assert len(submitted) == (0 if rule in LOCAL else count), rule
        assert all((j["state"], j["partition"]) == ("COMPLETED", "cpu") for j in submitted), rule
    # Timing is done alone on the node, with the threads of training.
    assert [j["sharing"] for j in jobs("measure_cost")] == ["NO"]
    assert {j["sharing"] for j in jobs("sample")} == {"OK"}
    assert json.loads((finished / "results/smoke/cost.json").read_text())["threads"] == 1


# --- time limits, preemption, cancellation -----------------------------------------------------------------


def last(name):
    return layout.path(layout.DENSE_LAST, experiment=name, seed=0, search="full")


def long_training(folder, name, steps, minutes):
    """A project whose dense training takes so many steps and may take so many minutes at first."""
    horizon = {"interval": {"unit": "iteration", "steps": 100}, "horizon": steps // 100}
    never = {"rates": [0.5], "threshold": 1e-9}  # masks are never that close: no early end
    compute = {"mem_mb": 800, "runtime": minutes}
    others = {"runs.ta-eb": ..., "tables.table4": ["unpruned", "eb-50"]}  # they need more rates
    write_experiment(copied(folder), {"searches.full": horizon | never, "compute": compute, **others}, name)
    return folder


def steps_of_processes(folder, name):
    """Steps of each process that took part in a finished training."""
    ledger = json.loads((folder / last(name)).with_name("ledger.json").read_text())
    return [p["steps"] for p in ledger["processes"]]


def test_a_job_that_runs_out_of_time_comes_back_with_more_and_ends_well(tmp_path):
    """Of its first minute, SLURM lets a job have 30 s at most before it says that the time is nearly over."""
    steps = 7000  # about a minute of training
    folder = long_training(tmp_path, "late", steps, minutes=1)
    succeeded, said = ended(submit(folder, last("late"), "--retries", 4), folder)
    assert succeeded, said[-3000:]

    *early, final = jobs("train_dense_wildcards_late")
    assert early
    limits = ["1:00", "2:00", "4:00", "8:00", "16:00"]
    assert [j["limit"] for j in (*early, final)] == limits[: len(early) + 1]
    assert {j["state"] for j in early} == {"FAILED"}
    assert final["state"] == "COMPLETED"
    assert sum(steps_of_processes(folder, "late")) == steps  # none was taken twice


def trained(folder, name):
    """Steps of an unfinished training, by its last reading."""
    stats = folder / layout.state_of(last(name)) / "stats.jsonl"
    lines = stats.read_text().splitlines() if stats.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def test_a_preempted_and_a_cancelled_job_go_on_to_the_same_bits(tmp_path, verb):
    steps = 1200
    folder = long_training(tmp_path, "cut", steps, minutes=20)
    process = submit(folder, last("cut"), "--retries", "0")
    until(lambda: trained(folder, "cut"), process)

    # Requeued by SLURM, as after a preemption; Snakemake just waits on. SLURM would wait two minutes.
    [job] = jobs("train_dense_wildcards_cut")
    slurm_cluster.command("scontrol", "requeue", job["id"])
    until(lambda: jobs("train_dense_wildcards_cut")[0]["state"] == "PENDING", process)
    slurm_cluster.command("scontrol", "update", f"JobId={job['id']}", "StartTime=now")
    kept = trained(folder, "cut")
    until(lambda: trained(folder, "cut") > kept, process)

    slurm_cluster.command("scancel", job["id"])
    succeeded, said = ended(process, folder)
    assert not succeeded
    assert "SLURM status is: 'CANCELLED'" in said
    assert not (folder / last("cut")).exists()

    succeeded, said = ended(submit(folder, last("cut"), "--retries", "0"), folder)  # the same command
    assert succeeded, said[-3000:]
    assert [j["state"] for j in jobs("train_dense_wildcards_cut")] == ["CANCELLED", "COMPLETED"]
    parts = steps_of_processes(folder, "cut")
    assert len(parts) == 3
    assert sum(parts) == steps

    disturbed = tensors_of(folder / last("cut"))
    shutil.rmtree(folder / "results")
    done = verb("train-dense", "cut")
    assert done.returncode == 0, done.stderr
    assert same(disturbed, tensors_of(folder / last("cut")))


# --- GPUs --------------------------------------------------------------------------------------------------


def gpus_in_use():
    """CUDA_VISIBLE_DEVICES of every expert that is being trained now, by SLURM's job number."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile
            if b"finetune-region" in (process / "cmdline").read_bytes():
                pairs = (entry.partition("=") for entry in (process / "environ").read_text().split("\0"))
                environment = {name: value for name, _, value in pairs}
                found[environment["SLURM_JOB_ID"]] = environment["CUDA_VISIBLE_DEVICES"]
    return found


def test_two_experts_train_on_two_gpus_at_once(finished):
    steps = 1500
    edit(finished, "smoke", "compute.gpus", 1)
    edit(finished, "smoke", "runs.ta-eb.iterations", steps)
    keys = ("full-magnitude-ema-0.3-t0-260", "full-magnitude-ema-0.6-t240-460")
    experts = [
        layout.path(layout.MILESTONE, experiment="smoke", seed=0, expert=k, milestone=steps) for k in keys
    ]
    process = submit(finished, *experts)
    in_use = until(lambda: len(found := gpus_in_use()) == 2 and found, process)
    assert sorted(in_use.values()) == ["0", "1"]
    succeeded, said = ended(process, finished)
    assert succeeded, said[-3000:]
    placed = {j["id"]: j["partition"] for j in jobs("finetune_region_wildcards_smoke")}
    assert {placed[job] for job in in_use} == {"gpu"}
