"""Two at once: kept apart by a lock that says so, or harmless."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import write_experiment
from stages import EB, SAMPLE, WHERE

from ebdiff.experiment import layout
from ebdiff.system import files
from ebdiff.system.errors import UserError

# --- the lock -----------------------------------------------------------------------------------------------


def test_a_lock_says_who_holds_it_and_leaves_nothing(tmp_path):
    state = tmp_path / "out/state/last"
    words = rf"another process is at work on it \(process {os.getpid()} on "
    with files.holding(state):
        with pytest.raises(UserError, match=words), files.holding(state):
            pass
        assert state.is_dir()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_lock_goes_when_its_work_fails_and_what_was_kept_stays(tmp_path):
    state = tmp_path / "state/last"
    with pytest.raises(ZeroDivisionError), files.holding(state):
        (state / "kept").write_text("x")
        raise ZeroDivisionError
    assert sorted(p.name for p in state.parent.rglob("*")) == ["kept", "last"]
    with pytest.raises(ZeroDivisionError), files.holding(tmp_path / "other/last"):
        raise ZeroDivisionError
    assert not (tmp_path / "other").exists()


def test_asking_whether_a_lock_is_held_leaves_no_trace(tmp_path):
    """Not even beside somebody who takes it and lets it go all the time."""
    state, over = tmp_path / "out/state/last", threading.Event()

    def ask():
        while not over.is_set():
            files.held(state)

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(100):
        with files.holding(state):
            assert files.held(state)
    over.set()
    asking.join()
    assert not files.held(state) and list(tmp_path.iterdir()) == [tmp_path / "out"]
    state.parent.mkdir()
    lock = state.with_name("last.lock")  # of a killed job, and not ours to write
    lock.write_text("1 on nowhere")
    lock.chmod(0o444)
    before = lock.stat()
    assert not files.held(state) and lock.read_text() == "1 on nowhere"
    assert (lock.stat().st_mtime_ns, lock.stat().st_mode) == (before.st_mtime_ns, before.st_mode)


@pytest.mark.slow
def test_many_processes_never_hold_a_lock_together(tmp_path):
    """Each takes the lock again and again, and would see another's mark within."""
    code = (
        "import sys, time; from pathlib import Path; from ebdiff.system import files, errors\n"
        "state, until, held = Path(sys.argv[1]), time.time() + 5, 0\n"
        "mark = state.parent.parent / 'mark'\n"
        "while time.time() < until:\n"
        "    try:\n"
        "        with files.holding(state):\n"
        "            mark.touch(exist_ok=False); held += 1; mark.unlink()\n"
        "    except errors.UserError: pass\n"
        "print(held)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "state/last")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    held = [int(p.communicate(timeout=300)[0]) for p in processes]
    assert [p.returncode for p in processes] == [0] * 4
    assert sum(held) > 20
    assert list(tmp_path.iterdir()) == []


# --- verbs ----------------------------------------------------------------------------------------------


def start(folder, *arguments):
    """A verb as a process of its own."""
    command = [sys.executable, "-m", "ebdiff.cli", *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(path, process):
    """Until a file is there, which a process is about to write."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.fixture
def project(tmp_path, made):
    """A copy of the finished tiny project, for writing."""
    for part in ("resources", "results"):
        shutil.copytree(made / part, tmp_path / part)
    write_experiment(tmp_path)
    return tmp_path


LONG = {"dense.iterations": 200_000, "searches.full.horizon": 20_000, "searches.full.window": 19_000}


@pytest.mark.slow
def test_a_successor_of_an_orphan_is_kept_out_and_goes_on_after_its_end(tmp_path, digits, verb):
    """A job outlives its killed Snakemake: the next one says so, and after the orphan's end continues."""
    shutil.copytree(digits / "resources", tmp_path / "resources")
    write_experiment(tmp_path, {**LONG, "training.save_minutes": 1e-9})
    state = tmp_path / layout.state_of(
        layout.path(layout.DENSE_LAST, experiment="tiny", seed=0, search="full")
    )
    orphan = start(tmp_path, "train-dense", "tiny")
    try:
        while not list(state.glob("*.json")):
            assert orphan.poll() is None
            time.sleep(0.02)
        second = verb("train-dense", "tiny")
        assert second.returncode == 1
        lines = second.stderr.strip().splitlines()
        assert len(lines) == 1, lines
        assert f"another process is at work on it (process {orphan.pid} on " in lines[0]
        assert orphan.poll() is None
    finally:
        orphan.kill()
        orphan.communicate()
    third = start(tmp_path, "train-dense", "tiny")
    try:
        assert "going on from step" in third.stdout.readline()
    finally:
        third.kill()
        third.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [EB, SAMPLE, ("prepare-data", "digits")], ids=lambda s: s[0])
def test_a_stage_that_another_process_holds_is_refused_in_one_line(project, verb, stage):
    output = {
        "finetune-region": layout.path(layout.MILESTONE, **WHERE),
        "sample": layout.path(layout.SAMPLES, **WHERE),
        "prepare-data": layout.path(layout.IMAGES, dataset="digits"),
    }[stage[0]]
    before = {p: p.stat().st_mtime_ns for p in project.rglob("*") if p.is_file()}
    with files.holding(project / layout.state_of(output)):
        done = verb(*stage)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"{layout.state_of(output)}: another process is at work on it" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in project.rglob("*") if p.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "outputs"),
    [
        (("prepare-data", "digits"), layout.DATA_FILES),
        pytest.param(("train-classifier", "digits"), (layout.CLASSIFIER,), marks=pytest.mark.long),
        (("reference-stats", "digits"), (layout.REFERENCE, layout.REFERENCE_FEATURES)),
        (("select-eb-epoch", "tiny", "--rate", "0.5"), (layout.TICKET, layout.STORY)),
    ],
    ids=lambda v: v[0] if "/" not in v[0] else "",
)
def test_two_of_a_stage_at_once_leave_the_same_files_as_one(project, stage, outputs):
    paths = [project / layout.path(t, **WHERE) for t in outputs]
    before = [p.read_bytes() for p in paths]
    for path in paths:
        path.unlink()
    two = [start(project, *stage) for _ in range(2)]
    said = [p.communicate(timeout=300)[1] for p in two]
    status = sorted(p.returncode for p in two)
    assert status in ([0, 0], [0, 1]), said
    if status == [0, 1]:  # they met
        assert "another process is at work on it" in said[0] + said[1]
    assert [p.read_bytes() for p in paths] == before
    assert not [p for p in project.rglob(".*") if p.is_file()]


@pytest.mark.slow
def test_a_report_so_far_while_results_are_being_replaced(project, monkeypatch):
    """Written again and again, removed in between as Snakemake does: every report is whole."""
    from ebdiff.experiment import load
    from ebdiff.report.page import write_page
    from ebdiff.report.results import Results

    monkeypatch.chdir(project)
    experiment = load.load("tiny")
    metrics, samples = layout.path(layout.METRICS, **WHERE), layout.path(layout.SAMPLES, **WHERE)
    ledger = layout.path(layout.SAMPLE_LEDGER, **WHERE)
    value, entry, pixels = files.read_json(metrics), files.read_json(ledger), np.load(samples)
    ended, errors = threading.Event(), []

    def write():
        try:
            turn = 0
            while not ended.is_set():
                turn += 1
                metrics.unlink()
                files.write_json(metrics, value)
                files.write_array(samples, pixels ^ np.uint8(turn % 2))
                files.write_json(ledger, entry)
        except OSError as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        page = layout.path(layout.SO_FAR, experiment="tiny") / "report.html"
        for _ in range(2):
            write_page(Results(experiment, partial=True), page)
            assert page.read_text().rstrip().endswith("</html>")
        for _ in range(300):
            results = Results(experiment, partial=True)
            found = results.attempt(results.metrics, "eb-50", 0)
            assert found in (None, value)
            results.attempt(results.samples, "eb-50", 0)
            assert all("eb-50/samples.npy: damaged" in line for line in results.left_out)
    finally:
        ended.set()
        writer.join()
    assert not errors


# --- two workflows --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_snakemake_on_the_same_targets_is_refused_until_the_first_ends(tmp_path):
    from test_workflow import copied, snakemake

    folder = copied(tmp_path)
    write_experiment(folder, LONG)
    target = "results/tiny/seed0/dense/full/last.safetensors"
    plain = ("--workflow-profile", "none")  # Snakemake's own words, which tell when a job begins
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *plain, target]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    first = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        for line in first.stdout:
            if "rule train_dense" in line or "rule prepare_data" in line:
                break
        second = snakemake(folder, target, cores=1)
        assert second.returncode != 0
        said = second.stdout + second.stderr
        assert "Directory cannot be locked" in said and "no other Snakemake process" in said
        assert "Traceback" not in said
        assert first.poll() is None
    finally:
        os.killpg(first.pid, signal.SIGKILL)  # the group of this test's own Snakemake and its job
        first.communicate(timeout=300)
