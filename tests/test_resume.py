"""What a kill, an orphan or an edit may leave behind."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import stages
import torch
from conftest import write_experiment

from ebdiff.data.dataset import Images
from ebdiff.experiment import layout
from ebdiff.nets import store
from ebdiff.nets.execution import Runtime
from ebdiff.system import files
from ebdiff.system.errors import UserError
from ebdiff.training import resume
from ebdiff.training.resume import resumable
from ebdiff.training.state import State
from ebdiff.training.train import train_dense

CPU = torch.device("cpu")


def test_a_lock_keeps_a_second_process_out_and_dies_with_the_first(tmp_path):
    hold = (
        "import sys, time; from pathlib import Path; from ebdiff.system.files import holding\n"
        f"with holding(Path({str(tmp_path / 'state')!r})): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is at work"), files.holding(tmp_path / "state"):
            pass
    finally:
        other.kill()
        other.wait()
    with files.holding(tmp_path / "state"):
        pass


def test_what_a_killed_write_left_goes_with_the_next_and_what_is_being_written_stays(tmp_path):
    write = (
        "import sys, time; from pathlib import Path; from ebdiff.system.files import replacing\n"
        f"with replacing(Path({str(tmp_path / 'table.csv')!r})) as temporary:\n"
        "    temporary.write_text('half'); print('writing', flush=True); time.sleep(60)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", write], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"writing\n"
        writers[0].kill()
        writers[0].wait()
        (tmp_path / ".other.csv.n-1").mkdir()  # of another file
        assert len(list(tmp_path.iterdir())) == 3
        files.write_text(tmp_path / "table.csv", "whole")
        kept = {path.name.rpartition("-")[2] for path in tmp_path.glob(".*")}
        assert kept == {"1", str(writers[1].pid)}
    finally:
        writers[1].kill()
        writers[1].wait()
    files.write_text(tmp_path / "table.csv", "whole again")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.csv.n-1", "table.csv"]


def test_others_may_read_what_they_may_by_the_users_mask(tmp_path, tiny):
    from ebdiff.nets import store

    (tmp_path / "plain").touch()
    store.save(
        tmp_path / "x.safetensors", store.fresh(tiny.architecture, 0, "t").state_dict(), tiny.architecture, {}
    )
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_a_kill_left_half_written_is_no_snapshot(workspace, vary):
    e = vary({"searches.full.criteria": ["magnitude", "taylor"], "searches.full.horizon": 5})
    snapshots = layout.path(layout.SNAPSHOTS, experiment="tiny", seed=0, search="full")
    leftover = layout.state_of(snapshots.with_name("last")) / "snapshots/.3.safetensors.n-77"
    leftover.mkdir(parents=True)
    (leftover / "3.safetensors").write_bytes(b"half")
    train_dense(e, "full", 0, CPU)
    assert sorted(p.name for p in snapshots.iterdir()) == [f"{i}.safetensors" for i in range(5)]
    assert not layout.state_of(snapshots.with_name("last")).exists()


@pytest.mark.slow
def test_a_signal_that_is_sent_twice_still_leaves_a_saved_state(workspace, tiny):
    """SLURM signals a job's processes and their launcher, which passes it on."""
    write_experiment(workspace, {"searches.full.horizon": 5000, "searches.full.threshold": 1e-9})
    command = [sys.executable, "-m", "ebdiff.cli", "train-dense", "tiny"]
    training = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = workspace / layout.state_of(
        layout.path(layout.DENSE_LAST, experiment="tiny", seed=0, search="full")
    )
    while not (folder / "stats.jsonl").exists() or not (folder / "stats.jsonl").read_text():
        assert training.poll() is None
        time.sleep(0.02)
    for _ in range(3):
        training.send_signal(signal.SIGTERM)
        time.sleep(0.002)
    errors = training.communicate(timeout=60)[1]
    assert training.returncode == 128 + signal.SIGTERM
    saved = max(int(p.stem) for p in folder.glob("[0-9]*.json"))
    assert saved >= 10
    assert f"SIGTERM: dense/full: step {saved} of" in errors
    assert "Traceback" not in errors


@pytest.fixture
def place(tmp_path, tiny):
    """The place of an unfinished training of some settings."""
    return lambda settings="a": resumable(
        tmp_path / "x.safetensors", tiny.architecture, {"settings": settings, "inputs": {}}, Runtime(CPU)
    )


def keep(kept, tiny, step, readings):
    """Keep a state after a step, with these readings so far, and be killed."""
    state = kept.state or State.start(store.fresh(tiny.architecture, 0, "t"), Runtime(CPU))
    state.step = step
    kept.stats.write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in readings))
    kept.keep(state)
    return state


def test_readings_after_the_kept_state_and_half_lines_are_dropped(place, tiny):
    with pytest.raises(KeyboardInterrupt), place() as kept:
        keep(kept, tiny, 10, (5, 10))
        with kept.stats.open("a") as stats:
            stats.write('{"step": 15, "loss": 1.0}\n{"step": 2')
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), place() as kept:
        assert kept.state.step == 10
        assert [json.loads(line)["step"] for line in kept.stats.read_text().splitlines()] == [5, 10]
        raise KeyboardInterrupt
    with place("b") as kept:  # other settings begin anew, without readings
        assert kept.state is None and not kept.stats.exists()


@pytest.mark.parametrize("damaged", ["20.safetensors", "20.json", "snapshots/1.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_a_damaged_kept_state_falls_back_to_the_one_before(place, tiny, capsys, damaged, how):
    with pytest.raises(KeyboardInterrupt), place() as kept:
        kept.snapshots.mkdir()
        (kept.snapshots / "0.safetensors").write_bytes(b"zero")
        keep(kept, tiny, 10, (5, 10))
        (kept.snapshots / "1.safetensors").write_bytes(b"one")
        keep(kept, tiny, 20, (5, 10, 15, 20))
        raise KeyboardInterrupt
    path = kept.folder / damaged
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-3] + (b"xyz" if how == "flipped" else b""))
    with pytest.raises(KeyboardInterrupt), place() as kept:
        assert kept.state.step == 10
        assert [json.loads(line)["step"] for line in kept.stats.read_text().splitlines()] == [5, 10]
        assert [p.name for p in kept.snapshots.iterdir()] == ["0.safetensors"]
        raise KeyboardInterrupt
    said = capsys.readouterr().out
    if damaged != "20.json" or how != "missing":  # a state without its record was never kept
        assert "20.safetensors: not used (" in said and f"{damaged}: " in said
    assert "going on from step 10" in said


def test_another_states_record_vouches_for_no_state(place, tiny, capsys):
    with pytest.raises(KeyboardInterrupt), place() as kept:
        keep(kept, tiny, 10, (5, 10))
        keep(kept, tiny, 20, (5, 10, 15, 20))
        raise KeyboardInterrupt
    (kept.folder / "20.json").write_bytes((kept.folder / "10.json").read_bytes())
    with place() as kept:
        assert kept.state.step == 10
    assert "20.safetensors: not used (damaged (" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_readings_travel_with_the_kept_state(place, tiny, how):
    with pytest.raises(KeyboardInterrupt), place() as kept:
        keep(kept, tiny, 10, (5, 10))
        raise KeyboardInterrupt
    readings = kept.stats.read_text()
    kept.stats.write_text("[" + readings[1:]) if how == "damaged" else kept.stats.unlink()
    with place() as kept:
        assert kept.state.step == 10 and kept.stats.read_text() == readings


def test_damage_of_all_that_is_kept_begins_anew_with_a_word(place, tiny, capsys):
    with pytest.raises(KeyboardInterrupt), place() as kept:
        keep(kept, tiny, 10, (5, 10))
        raise KeyboardInterrupt
    (kept.folder / "10.safetensors").write_bytes(b"")
    with place() as kept:
        assert kept.state is None and not kept.stats.exists()
    said = capsys.readouterr().out
    assert "10.safetensors: not used (damaged (it isn't what was kept))" in said and "starting again" in said


def test_two_states_are_kept_and_no_more(place, tiny):
    with pytest.raises(KeyboardInterrupt), place() as kept:
        for step in (1, 2, 3, 4):
            keep(kept, tiny, step, range(step))
        raise KeyboardInterrupt
    assert sorted(p.name for p in kept.folder.glob("[0-9]*")) == [
        "3.json", "3.safetensors", "4.json", "4.safetensors",
    ]  # fmt: skip


def test_a_state_without_its_record_goes_when_training_goes_on(place, tiny):
    with pytest.raises(KeyboardInterrupt), place() as kept:
        for step in (1, 2):
            keep(kept, tiny, step, range(step))
        raise KeyboardInterrupt
    (kept.folder / "2.json").unlink()  # killed before it was written
    with pytest.raises(KeyboardInterrupt), place() as kept:
        raise KeyboardInterrupt
    assert sorted(p.name for p in kept.folder.glob("[0-9]*")) == ["1.json", "1.safetensors"]


def test_killed_while_its_state_is_removed_a_training_goes_on_from_nothing(place, tiny, monkeypatch):
    """Readings or snapshots may be gone already: a state without them would lose them for good."""

    def killed(folder):
        (folder / "stats.jsonl").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), place() as kept:
        keep(kept, tiny, 0, (0,))
        patch.setattr(resume.shutil, "rmtree", killed)
    with place() as kept:
        assert kept.state is None


@pytest.mark.slow
def test_a_finished_milestone_asked_for_again_keeps_its_readings(made, tmp_path, monkeypatch):
    """As by who was killed when all was written, but the state not yet gone."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "project"))
    path = stages.path_of(layout.STATS)
    before = path.read_text()
    assert before and stages.run(*stages.EB) == 0
    assert path.read_text() == before


def test_images_of_another_size_than_the_networks_are_refused(workspace, vary):
    with pytest.raises(UserError, match=r"holds images of \(8, 8, 1\).*\(16, 16, 1\)"):
        Images.of(vary({"dataset.image_size": 16}))
