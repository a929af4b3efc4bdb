"""Several processes for one job, and GPUs for jobs side by side."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_experiment
from stages import EXPERT, STAGES, run
from test_training import EB, same, tensors_of

from ebdiff import cli
from ebdiff.experiment.jobs import Job
from ebdiff.system import devices, parallel
from ebdiff.system.errors import UserError
from ebdiff.system.files import read_json
from ebdiff.training import train

CPU = torch.device("cpu")
# Without attention: the gradient of k's bias is rounding alone, which Adam blows up.
PLAIN = {"network.dropout": 0.0, "network.middle_attention": False}
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]
VERB = [*TORCHRUN, "--no-python", "--", sys.executable, "-m", "ebdiff.cli"]


def together(*arguments):
    """Run a verb as two gloo processes."""
    done = subprocess.run([*VERB, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def alone(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "ebdiff.cli", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_train_and_sample_as_one(workspace):
    write_experiment(workspace, PLAIN)
    results = workspace / "results/tiny/seed0"

    alone("train-dense", "tiny")
    one = results.rename(workspace / "one")
    told = together("train-dense", "tiny")
    assert told.count("settled at interval") == len(set(told.splitlines()))  # only one process speaks
    a, b = (
        tensors_of(one / "dense/full/last.safetensors"),
        tensors_of(results / "dense/full/last.safetensors"),
    )
    assert a.keys() == b.keys()
    # The same draws and updates; Adam turns rounding into up to a percent of what 60 steps move.
    for kind in ("raw", "ema"):
        names = [n for n in a if n.startswith(kind)]
        apart = torch.cat([(a[n] - b[n]).flatten() for n in names]).norm()
        assert apart < 0.01 * torch.cat([a[n].flatten() for n in names]).norm()
    ledger = read_json(results / "dense/full/ledger.json")
    assert ledger["world"] == 2
    assert ledger["device_seconds"] == pytest.approx(2 * ledger["seconds"], rel=1e-3)
    assert ledger["steps"] == read_json(one / "dense/full/ledger.json")["steps"]
    assert not (results / "dense/full/state").exists()

    for verb in (["prune-per-epoch", "tiny"], ["select-eb-epoch", "tiny", "--rate", "0.5"]):
        alone(*verb)
    together("finetune-region", "tiny", "--expert", EB, "--milestone", 40)
    assert read_json(results / f"experts/{EB}/40.json")["steps"] == 40

    # An image depends on its number alone, so the very same bits come from two processes and from one.
    together("sample", "tiny", "--run", "eb-50")
    path = results / "runs/eb-50/samples.npy"
    two = np.load(path)
    path.unlink()
    alone("sample", "tiny", "--run", "eb-50")
    assert np.array_equal(two, np.load(path))
    assert two.shape == (23, 8, 8, 1)


@pytest.mark.long
def test_two_processes_stop_together_and_go_on_to_the_same_bits(workspace):
    write_experiment(workspace, PLAIN | {"training.log_every": 1, "searches.full.horizon": 40})
    together("train-dense", "tiny")
    last = workspace / "results/tiny/seed0/dense/full/last.safetensors"
    whole = tensors_of(last)
    steps = read_json(last.with_name("ledger.json"))["steps"]
    shutil.rmtree(workspace / "results")

    process = subprocess.Popen(
        [*VERB, "train-dense", "tiny"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stats = last.parent / "state/last/stats.jsonl"
    while not stats.exists() or stats.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert list(last.parent.glob("state/last/*.json"))
    assert not last.exists()

    told = together("train-dense", "tiny")
    assert told.count("going on from step") == 1
    assert same(whole, tensors_of(last))
    assert read_json(last.with_name("ledger.json"))["steps"] == steps


def test_shares_cut_a_batch_without_gap_or_overlap(monkeypatch):
    for world in (1, 2, 3, 7):
        monkeypatch.setattr(parallel, "world", lambda world=world: world)
        cut = []
        for rank in range(world):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            cut.append(list(range(100)[parallel.share(100)]))
        assert [i for part in cut for i in part] == list(range(100))
        assert max(map(len, cut)) - min(map(len, cut)) <= 1


# --- GPUs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "verb", "where"), [
    (2, "train-dense", {"search": "full"}), (2, "finetune-region", {"expert": EXPERT, "milestone": 40}),
    (2, "sample", {"run": "eb-50"}), (1, "measure-cost", {}), (0, "tabulate", {}), (0, "report", {}),
    (1, "prune-per-epoch", {"search": "final", "criterion": "taylor", "weights": "ema"}),
    (0, "prune-per-epoch", {"search": "final", "criterion": "magnitude", "weights": "ema"}),
    (0, "select-eb-epoch", {"search": "full", "criterion": "magnitude", "weights": "ema", "rate": 0.5}),
    (0, "hamming-matrix", {"search": "full", "criterion": "magnitude", "weights": "ema"}),
    (1, "reference-stats", {"protocol": "clean", "number": "all"}),
    (0, "reference-stats", {"protocol": "classifier", "number": "all"}),
    (1, "fid", {"run": "eb-50"}), (0, "prepare-data", {}), (0, "train-classifier", {}),
])  # fmt: skip
def test_a_job_takes_gpus_only_where_they_are_faster_than_their_start(vary, gpus, verb, where):
    several = vary({"compute.gpus": 2, "evaluation.protocols": ["classifier", "clean"]})
    assert Job.of(several, verb, seed=0, **where).gpus == gpus
    assert Job.of(vary({}), verb, seed=0, **where).gpus == 0
    small = vary({"compute.gpus": 2, "evaluation.protocols": ["classifier"]})
    assert verb != "fid" or Job.of(small, verb, seed=0, **where).gpus == 0


@pytest.mark.slow
def test_what_takes_milliseconds_leaves_cuda_alone(made, tmp_path, monkeypatch):
    """On a machine with two GPUs, free for `compute.device: auto`; training would take one."""

    def touched(*_):
        raise AssertionError("CUDA was touched")

    monkeypatch.chdir(shutil.copytree(made, tmp_path / "project"))
    for name in ("device_count", "is_available", "set_device", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, touched)
    random = ("select-eb-epoch", "tiny", "--rate", "0.5", "--criterion", "random")
    for small in [*STAGES, random]:
        if small[0] in ("measure-cost", "train-dense", "finetune-region", "sample"):
            with pytest.raises(AssertionError, match="CUDA was touched"):
                run(*small)
        else:
            assert run(*small) == 0, small


def leasing(folder, gpus, own, count=1, share=1, **environment):
    """A process that leases a GPU, prints it and keeps it until its input closes."""
    program = (
        "import sys; from ebdiff.system.devices import lease; "
        f"print(*lease({gpus}, {count}, {own}, {share}, 0.05), flush=True); sys.stdin.read()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "TMPDIR": str(folder), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_jobs_side_by_side_lease_different_gpus_and_wait_for_one(tmp_path):
    gpus = ["GPU-a", "GPU-b"]
    first = leasing(tmp_path, gpus, True)
    assert first.stdout.readline() == "0\n"
    second = leasing(tmp_path, gpus, True)
    assert second.stdout.readline() == "1\n"
    third = leasing(tmp_path, gpus, True)
    assert third.stdout.readline() == "waiting for 1 of 2 GPUs: other jobs use them\n"
    sharing = leasing(tmp_path, gpus, False)
    assert sharing.stdout.readline() in ("0\n", "1\n")
    second.kill()  # however a process ends, its GPU is free
    assert third.stdout.readline() == "1\n"
    for process in (first, second, third, sharing):
        process.stdin.close()
        process.wait(timeout=20)


@pytest.mark.slow
def test_jobs_that_share_gpus_spread_evenly_and_one_that_wants_its_own_waits_for_all(tmp_path):
    gpus, at = ["a", "b"], []

    def start(**how):
        process = leasing(tmp_path, gpus, True, **how)
        return process, process.stdout.readline()

    def end(process):
        process.stdin.close()
        process.wait(timeout=20)

    for _ in range(4):
        at.append(start(share=2))
    assert [told for _, told in at] == ["0\n", "1\n", "0\n", "1\n"]
    fifth, told = start(share=2)
    assert told == "waiting for 1 of 2 GPUs: other jobs use them\n"
    end(at[1][0])
    assert fifth.stdout.readline() == "1\n"
    end(at[0][0])
    end(at[3][0])  # left: the second slot of the first GPU, the first of the other
    alone, told = start()
    assert told.startswith("waiting for 1")
    later = leasing(tmp_path, gpus, True, share=2)  # stands in line, although there is room
    end(fifth)
    assert alone.stdout.readline() == "1\n"
    assert later.stdout.readline() == "0\n"
    for process in (at[2][0], alone, later):
        end(process)


@pytest.mark.slow
def test_jobs_of_different_shares_use_one_gpu_up_to_the_larger(tmp_path):
    jobs = []
    for share, told in ((2, "0\n"), (3, "0\n"), (3, "0\n"), (3, "waiting for 1 of 1")):
        jobs.append(leasing(tmp_path, ["a"], True, share=share))
        assert jobs[-1].stdout.readline().startswith(told)
    for job in jobs:
        job.kill()
        job.wait()


def test_a_job_is_charged_its_part_of_a_gpu_that_others_share(workspace, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(workspace))
    monkeypatch.setattr(devices, "_leases", [])
    monkeypatch.setattr(devices, "_shared_by", 1)
    assert devices.lease(["a"], 1, True, 4) == [0]
    write_experiment(workspace)  # on the CPU, as if it were that GPU
    assert run("train-dense", "tiny") == 0
    ledger = read_json(Path("results/tiny/seed0/dense/full/ledger.json"))
    assert (ledger["share"], ledger["processes"][0]["share"]) == (4, 4)
    assert ledger["device_seconds"] == pytest.approx(ledger["seconds"] / 4, abs=1e-3)


def test_networks_are_timed_on_a_gpu_of_their_own(workspace, monkeypatch):
    write_experiment(workspace, {"compute": {"gpus": 1, "share": 3}})
    asked = []
    monkeypatch.setattr(devices, "visible_gpus", lambda: ["a"])
    monkeypatch.setattr(devices, "lease", lambda gpus, count, own, share: asked.append((own, share)) or [0])
    assert [run(verb, "tiny") for verb in ("train-dense", "measure-cost", "tune", "plan")] == [1] * 4
    assert asked == [(True, 3), (True, 1), (True, 1), (False, 1)]


@pytest.mark.slow
def test_allocations_of_a_cluster_that_each_call_their_gpu_0_do_not_wait_for_each_other(tmp_path):
    jobs = [leasing(tmp_path, ["0"], True, SLURM_JOB_ID=job) for job in ("7", "8")]
    assert [job.stdout.readline() for job in jobs] == ["0\n", "0\n"]
    within = leasing(tmp_path, ["0"], True, SLURM_JOB_ID="8")
    assert within.stdout.readline().startswith("waiting for 1 of 1")
    for job in (*jobs, within):
        job.stdin.close()
        job.kill()
        job.wait()


def test_a_schedulers_choice_of_gpus_is_kept(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-77")
    assert devices.visible_gpus() == ["3", "GPU-77"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert devices.visible_gpus() == ["0", "1"]


@pytest.mark.slow
def test_two_jobs_of_several_gpus_never_hold_half_of_what_each_needs(tmp_path):
    """One holds two of three; who wants two waits for both, and who comes later waits behind it."""
    gpus = ["a", "b", "c"]
    first = leasing(tmp_path, gpus, True, 2)
    assert first.stdout.readline() == "0 1\n"
    second = leasing(tmp_path, gpus, True, 2)
    assert second.stdout.readline() == "waiting for 2 of 3 GPUs: other jobs use them\n"
    third = leasing(tmp_path, gpus, True, 2)
    first.stdin.close()
    first.wait(timeout=20)
    assert sorted(second.stdout.readline().split()) in (["0", "2"], ["1", "2"])
    second.stdin.close()
    assert sorted(third.stdout.readline().split()) in (["0", "1"], ["0", "2"], ["1", "2"])
    for process in (second, third):
        process.kill()
        process.wait()


def test_a_job_of_two_gpus_starts_itself_under_torchrun(workspace, monkeypatch):
    write_experiment(workspace, {"compute.gpus": 2})
    started = []

    def execv(file, command):
        started.append((command, os.environ["CUDA_VISIBLE_DEVICES"]))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "argv", ["ebdiff", "train-dense", "tiny"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(devices, "lease", lambda gpus, count, own: [3, 1][:count])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    with pytest.raises(SystemExit):
        cli.train_dense("tiny")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    verb = ["--no-python", "--", sys.executable, "-m", "ebdiff.cli", "train-dense", "tiny"]
    assert started == [([*torchrun, *verb], "7,5")]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # a machine without GPUs: one process
    monkeypatch.setattr(train, "train_dense", lambda *a: started.append("here"))
    cli.train_dense("tiny")
    assert started[-1] == "here"


def test_processes_of_a_job_take_the_gpus_leased_for_it_and_share_its_threads(workspace, monkeypatch):
    write_experiment(workspace)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(devices, "visible_gpus", lambda: ["5", "7"])
    with pytest.raises(UserError, match="'cuda:1' can't be used here"):
        devices.pick_device("auto", own=True)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    cli._begin("tiny", 8)
    assert os.environ["OMP_NUM_THREADS"] == "4"
