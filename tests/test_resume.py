"""What a kill, an orphan or an edit may leave behind."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from ebdiff import files, layout
from ebdiff.data.store import Images
from ebdiff.errors import UserError
from ebdiff.nets.execution import Runtime
from ebdiff.training.dense import train_dense
from ebdiff.training.resume import resumable, stamp

CPU = torch.device("cpu")


def test_a_lock_keeps_a_second_process_out_and_dies_with_the_first(tmp_path):
    hold = (
        "import sys, time; from pathlib import Path; from ebdiff.files import holding\n"
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


def test_what_a_kill_left_half_written_is_no_snapshot(workspace, vary):
    e = vary({"searches.full.criteria": ["magnitude", "taylor"], "searches.full.horizon": 5})
    snapshots = layout.path(layout.SNAPSHOTS, experiment="tiny", seed=0, search="full")
    leftover = layout.state_of(snapshots.with_name("last")) / "snapshots" / ".3.77.safetensors"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    train_dense(e, "full", 0, CPU)
    assert sorted(p.name for p in snapshots.iterdir()) == [f"{i}.safetensors" for i in range(5)]
    assert not layout.state_of(snapshots.with_name("last")).exists()


def test_readings_of_other_settings_and_half_lines_are_dropped(tmp_path, tiny):
    output = tmp_path / "expert.safetensors"

    def place(digest):
        return resumable(output, {}, {"digest": digest}, tiny.training, Runtime(CPU))

    def interrupted(digest):
        with pytest.raises(KeyboardInterrupt), place(digest) as kept:
            state = kept.state
            if state is None:
                from ebdiff.nets.store import fresh
                from ebdiff.training.state import State

                assert not kept.stats.exists()
                state = State.start(fresh(tiny.network, 0, "t"), tiny.training, Runtime(CPU))
                state.step = 10
            lines = [json.dumps({"step": step, "loss": 1.0}) for step in (5, 10, 15)]
            kept.stats.write_text("\n".join(lines) + '\n{"step": 2')
            kept.saver(tiny.network)(state)
            raise KeyboardInterrupt

    interrupted("a")
    with pytest.raises(KeyboardInterrupt), place("a") as kept:
        assert kept.state.step == 10
        assert [json.loads(line)["step"] for line in kept.stats.read_text().splitlines()] == [5, 10]
        raise KeyboardInterrupt
    interrupted("b")  # asserts that it begins anew, without readings


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
        Images.of(vary({"network.image_size": 16}))
