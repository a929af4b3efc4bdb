"""What a kill, an orphan or an edit may leave behind."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import write_experiment

from ebdiff.data.dataset import Images
from ebdiff.experiment import layout
from ebdiff.nets import store
from ebdiff.nets.execution import Runtime
from ebdiff.system import files
from ebdiff.system.errors import UserError
from ebdiff.training.resume import resumable, stamp
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
    saved = store.story(folder / "state.safetensors")["step"]
    assert saved >= 10
    assert f"SIGTERM: dense/full: step {saved} of" in errors
    assert "Traceback" not in errors


def test_readings_of_other_settings_and_half_lines_are_dropped(tmp_path, tiny):
    output = tmp_path / "expert.safetensors"

    def place(digest):
        return resumable(output, {}, {"digest": digest}, Runtime(CPU))

    def interrupted(digest):
        with pytest.raises(KeyboardInterrupt), place(digest) as kept:
            state = kept.state
            if state is None:
                from ebdiff.nets.store import fresh
                from ebdiff.training.state import State

                assert not kept.stats.exists()
                state = State.start(fresh(tiny.architecture, 0, "t"), Runtime(CPU))
                state.step = 10
            lines = [json.dumps({"step": step, "loss": 1.0}) for step in (5, 10, 15)]
            kept.stats.write_text("\n".join(lines) + '\n{"step": 2')
            kept.saver(tiny.architecture)(state)
            raise KeyboardInterrupt

    interrupted("a")
    with pytest.raises(KeyboardInterrupt), place("a") as kept:
        assert kept.state.step == 10
        assert [json.loads(line)["step"] for line in kept.stats.read_text().splitlines()] == [5, 10]
        raise KeyboardInterrupt
    interrupted("b")  # asserts that it begins anew, without readings


def test_killed_while_its_state_is_removed_a_training_goes_on_from_nothing(tmp_path, tiny, monkeypatch):
    """Readings or snapshots may be gone already: a state without them would lose them for good."""
    from ebdiff.nets.store import fresh
    from ebdiff.training import resume
    from ebdiff.training.state import State

    def place():
        return resumable(tmp_path / "x.safetensors", {}, {"digest": "a"}, Runtime(CPU))

    def killed(folder):
        (folder / "stats.jsonl").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), place() as kept:
        kept.stats.write_text('{"step": 0}\n')
        kept.saver(tiny.architecture)(State.start(fresh(tiny.architecture, 0, "t"), Runtime(CPU)))
        patch.setattr(resume.shutil, "rmtree", killed)
    with place() as kept:
        assert kept.state is None


def test_hidden_files_are_no_inputs(tmp_path):
    (tmp_path / "0.safetensors").write_bytes(b"x")
    before = stamp("d", "i", [tmp_path])
    (tmp_path / ".snakemake_timestamp").touch()
    assert stamp("d", "i", [tmp_path]) == before


def test_pixels_that_are_not_the_manifests_are_refused(workspace, tiny):
    path = layout.path(layout.IMAGES, dataset="digits")
    pixels = np.load(path)
    pixels[0, 0, 0] ^= 1  # one flipped bit
    np.save(path, pixels)
    with pytest.raises(UserError, match=r"images\.npy: damaged \(its checksum differs\)"):
        Images.of(tiny)


def test_images_of_another_size_than_the_networks_are_refused(workspace, vary):
    with pytest.raises(UserError, match=r"holds images of \(8, 8, 1\).*\(16, 16, 1\)"):
        Images.of(vary({"dataset.image_size": 16}))
