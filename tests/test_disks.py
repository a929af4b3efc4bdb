"""Full and read-only disks: one line that says so, nothing half-written, and the same command goes on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_experiment
from stages import EB, FID, SAMPLE, WHERE

from ebdiff.experiment import layout

pytestmark = pytest.mark.slow
MB = 2**20


class Disk:
    """A small disk of its own, filled to leave some room."""

    def __init__(self, folder, size):
        self.folder, self.ballast = folder, folder / "ballast"
        self._mount("-o", f"size={size}", "-t", "tmpfs", "tmpfs")

    def _mount(self, *options):
        subprocess.run(["mount", *options, str(self.folder)], check=True, capture_output=True)

    def leave(self, room):
        """Fill it but for some bytes."""
        free = shutil.disk_usage(self.folder).free
        with self.ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free - room))

    def make_room(self):
        self.ballast.unlink()

    def make_read_only(self):
        self._mount("-o", "remount,ro")

    def make_writable(self):
        self._mount("-o", "remount,rw")


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a small disk at a folder of the test's; needs root, and a machine that allows it."""
    mounted = []

    def mount(folder, size=64 * MB):
        folder = tmp_path / folder
        folder.mkdir(parents=True, exist_ok=True)
        try:
            mounted.append(Disk(folder, size))
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"a small disk can't be mounted here ({error})")
        return mounted[-1]

    yield mount
    for disk in mounted:
        subprocess.run(["umount", "-l", str(disk.folder)], check=True)


@pytest.fixture
def project(tmp_path, made, small_disk):
    """The finished tiny project with its results on a small disk."""
    disk = small_disk("results")
    shutil.copytree(made / "resources", tmp_path / "resources")
    shutil.copytree(made / "results", tmp_path / "results", dirs_exist_ok=True)
    write_experiment(tmp_path, {"training.save_minutes": 1e-9})  # a state is kept at every step
    return disk


def hidden(folder):
    return [p for p in folder.rglob("*") if any(part.startswith(".") for part in p.relative_to(folder).parts)]


def refused(done, *words):
    """A verb ended with one line that holds these words."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("ebdiff: ")]
    assert len(said) == 1, done.stderr
    for word in words:
        assert word in said[0]


FULL = "the disk is full; make room, then run the same command again"


@pytest.mark.parametrize(
    ("stage", "outputs", "room"),
    [
        (("train-dense", "tiny"), (layout.DENSE_LAST, layout.DENSE_MASKS, layout.DENSE_LEDGER), 650_000),
        (EB, (layout.MILESTONE, layout.LEDGER), 150_000),
    ],
    ids=["train-dense", "finetune-region"],
)
def test_a_training_on_a_full_disk_ends_in_one_line_and_goes_on(
    tmp_path, project, verb, stage, outputs, room
):
    paths = [tmp_path / layout.path(t, **WHERE) for t in outputs]
    shutil.rmtree(paths[0].parent)
    project.leave(room)
    refused(verb(*stage), "results/tiny/", FULL)
    assert not any(p.exists() for p in paths)
    assert not hidden(tmp_path / "results")
    state = layout.state_of(paths[0])
    assert list(state.glob("*.json"))  # there was room for the first ones
    project.make_room()
    done = verb(*stage)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout
    assert all(p.exists() for p in paths)
    assert not state.exists()


@pytest.mark.parametrize(
    ("stage", "outputs"),
    [
        (SAMPLE, (layout.SAMPLES, layout.SAMPLE_LEDGER, layout.SAMPLES_PNG)),
        (FID, (layout.METRICS,)),
        (("hamming-matrix", "tiny"), (layout.HAMMING,)),
        (("select-eb-epoch", "tiny", "--rate", "0.5"), (layout.TICKET, layout.STORY)),
        (("report", "tiny", "--so-far"), ()),
    ],
    ids=lambda v: v[0] if isinstance(v[0] if v else None, str) and "/" not in v[0] else "",
)
def test_any_other_stage_on_a_full_disk_ends_in_one_line_and_runs_once_there_is_room(
    tmp_path, project, verb, stage, outputs
):
    paths = [tmp_path / layout.path(t, **WHERE) for t in outputs]
    for path in paths:
        path.unlink()
    project.leave(0)
    refused(verb(*stage), "results/tiny/", FULL)
    assert not any(p.exists() for p in paths)
    assert not hidden(tmp_path / "results")
    project.make_room()
    assert verb(*stage).returncode == 0
    assert all(p.exists() for p in paths)


def test_images_on_a_full_disk_end_in_one_line(tmp_path, small_disk, verb):
    write_experiment(tmp_path)
    disk = small_disk("resources")
    disk.leave(50_000)
    refused(verb("prepare-data", "digits"), "resources/data/digits", "the disk has", "make room")
    assert not [p for p in (tmp_path / "resources/data/digits").rglob("*") if p.is_file()]
    disk.make_room()
    assert verb("prepare-data", "digits").returncode == 0


def test_a_disk_that_fills_while_images_are_written(tmp_path, small_disk, monkeypatch, tiny):
    """Somebody else takes the room that was there at the beginning."""
    from ebdiff.data import sources
    from ebdiff.system.errors import explained

    monkeypatch.chdir(tmp_path)
    small_disk("resources").leave(50_000)
    monkeypatch.setattr(sources, "check_room", lambda path, needed: None)
    outputs = [layout.path(t, dataset="digits") for t in layout.DATA_FILES]
    with pytest.raises(OSError) as caught:
        sources.write(tiny, *outputs)
    assert explained(caught.value) == f"resources/data/digits/images.npy: {FULL}"
    assert not [p for p in Path("resources").rglob("*") if p.is_file() and p.name != "ballast"]


def test_a_memory_map_takes_its_room_at_once(tmp_path, small_disk):
    """Else a full disk is a SIGBUS at some later write."""
    small_disk("here").leave(MB)
    code = (
        "from pathlib import Path; from ebdiff.system import errors\n"
        "from ebdiff.metrics.features import scratch\n"
        "try:\n"
        "    with scratch(Path('here'), 10_000, 100) as array: array[:] = 1\n"
        "except OSError as error: print(errors.explained(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"here: {FULL}"), done.stderr


@pytest.mark.parametrize("stage", [("train-dense", "tiny"), SAMPLE, FID], ids=lambda s: s[0])
def test_read_only_results_are_one_line(tmp_path, project, verb, stage):
    project.make_read_only()
    try:
        refused(verb(*stage), "results/tiny/", "Read-only file system")
    finally:
        project.make_writable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where nobody may")
def test_results_of_somebody_else_are_one_line(tmp_path, made, verb):
    shutil.copytree(made / "resources", tmp_path / "resources")
    write_experiment(tmp_path)
    (tmp_path / "results").mkdir(mode=0o555)
    refused(verb("train-dense", "tiny"), "results", "Permission denied")
