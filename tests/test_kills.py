"""Killed anywhere, run again: the same bits as never having been disturbed."""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import kills
import numpy as np
import pytest
from conftest import ROOT, write_experiment
from PIL import Image
from test_workflow import copied, edit

EXPERT = "full-magnitude-ema-0.5-t0-1000"
CHANGES = {
    "training.save_minutes": 0.0002,
    "searches.full.criteria": ["magnitude", "taylor"],
    "searches.full.horizon": 24,
    "searches.full.rates": [0.3, 0.5, 0.8],
    "runs.eb-50.iterations": 200,
    "sampling.images": 600,
    "sampling.batch": 20,
}
# 64 images that stay encoded, and the small autoencoder of our own, of 50 steps.
LATENT = {
    "dataset": {"name": "few", "source": "images", "path": "in", "image_size": 8, "store": "encoded",
                "flip": False},
    "codec": {"kind": "autoencoder"}, "sampling.clamp": False, "training.save_minutes": 0.0002,
}  # fmt: skip
# In an order in which each finds what it reads.
STAGES = {
    "prepare-data": ["digits"],
    "train-dense": ["tiny"],
    "prune-per-epoch": ["tiny"],
    "select-eb-epoch": ["tiny", "--rate", "0.5"],
    "finetune-region": ["tiny", "--expert", EXPERT, "--milestone", "200"],
    "sample": ["tiny", "--run", "eb-50"],
    "prune-per-epoch taylor": ["tiny", "--criterion", "taylor"],
    "train-classifier": ["digits"],
    "reference-stats": ["digits"],
    "fid": ["tiny", "--run", "eb-50"],
    "hamming-matrix": ["tiny"],
    "draw": ["tiny", "--run", "eb-50", "-n", "200", "--out", "results/drawn"],
    "score": ["results/drawn/images", "--against", "tiny"],
    "export": ["tiny", "results/handed.safetensors", "--run", "eb-50"],
    "compare": ["tiny", "latent"],
    "prepare-data encoded": ["few"],
    "train-first-stage": ["latent"],
    "encode-latents": ["latent"],
    "init": ["mine", "--images", "in", "--no-estimate"],
}
ENDED = Counter()


@pytest.fixture(scope="module", autouse=True)
def tell():
    yield
    if ENDED:
        print(f"\n{ENDED['kills']} kills, {ENDED['lost']} lost, {ENDED['traces']} traces")


def command(stage):
    return [sys.executable, "-m", "ebdiff.cli", stage.split()[0], *STAGES[stage]]


class Undisturbed:
    """Every stage once, as far as they are asked for: the folder before and after it, and its seconds."""

    def __init__(self, folder):
        self.folder, self.seconds, self.left = folder, {}, list(STAGES)
        here = folder / "now"
        write_experiment(here, CHANGES)
        write_experiment(here, LATENT, "latent")
        shutil.copy(ROOT / "config/experiments/images.yaml", here / "config/experiments")
        (here / "in").mkdir()
        for i in range(64):
            Image.new("RGB", (24, 24), (i, 2 * i, 255 - i)).save(here / f"in/{i}.png")  # in < 192 bytes

    def run(self, wanted):
        """Run all stages up to one."""
        here = self.folder / "now"
        while wanted in self.left:
            stage = self.left.pop(0)
            kills.fresh(here, self.before(stage))
            began = time.monotonic()
            status, said = kills.ended(kills.start(here, *command(stage)), here)
            assert status == 0, said
            self.seconds[stage] = time.monotonic() - began
            kills.fresh(here, self.after(stage))

    def before(self, stage):
        return self.folder / f"before-{stage}"

    def after(self, stage):
        return self.folder / f"after-{stage}"


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.npy", np.array([1.0, np.nextafter(2.0, 3)]), "a.npy: differs"),
        ("a.json", {"fd": 1.5, "seconds": 3.0}, "a.json: differs"),
        ("a.json", {"fd": 1.0, "seconds": 9.0}, None),  # times may differ
        ("a.jsonl", {"step": 1, "loss": 0.5}, "a.jsonl: differs"),
        ("b.npy", np.zeros(1), "b.npy: not there undisturbed"),
        ("state/x/b.npy", np.zeros(1), None),  # what a kill may leave, as long as it is not the end
    ],
)
def test_a_file_that_differs_is_found(tmp_path, name, content, found):
    def write(folder, name, content):
        path = folder / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, content) if path.suffix == ".npy" else path.write_text(json.dumps(content))

    write(tmp_path / "calm", "a.npy", np.array([1.0, 2.0]))
    write(tmp_path / "calm", "a.json", {"fd": 1.0, "seconds": 3.0})
    write(tmp_path / "calm", "a.jsonl", {"step": 1, "loss": 1.0})
    here = kills.fresh(tmp_path / "calm", tmp_path / "here")
    write(here, name, content)
    assert kills.wrong(here, tmp_path / "calm") == ([] if found is None else [f"results/{found}"])
    assert kills.leftovers(here) == (
        ["results/state", "results/state/x", f"results/{name}"] if "/" in name else []
    )


def judge(here, calm, finished=True):
    """What a kill left under final names, and the last run anywhere, is what was made undisturbed."""
    traces = kills.wrong(here, calm) + (kills.leftovers(here) if finished else [])
    ENDED["traces"] += len(traces)
    assert traces == []
    assert not finished or kills.products(here) == kills.products(calm)


def saved_step(folder):
    """The last step of the states that a killed training left; 0 without."""
    states = [p for p in kills.products(folder) if "state" in p.parts and p.suffix == ".json"]
    return max((int(p.stem) for p in states if p.stem.isdecimal()), default=0)


def survive(undisturbed, stage, count, seed, folder):
    """Kill a stage `count` times, up to three times in a row, and let it finish each time.

    Moments are uniform over the stage's life, or the next write or saved state after such a moment. A stage
    that ends before its kill counts as no kill.
    """
    undisturbed.run(stage)
    draw = random.Random(f"{stage} {seed}")
    here, done = folder / "here", []
    while len(done) < count:
        kills.fresh(undisturbed.before(stage), here)
        for _ in range(draw.randint(1, 3)):
            moment = draw.choice(["any moment", "writing", "saved"])
            at = draw.uniform(0, undisturbed.seconds[stage])
            process = kills.start(here, *command(stage))
            then = {"any moment": [], "writing": [kills.writing(here)], "saved": [kills.saved(here)]}[moment]
            if not kills.wait_until(process, kills.clock(at), *then):
                break
            kills.kill(process)
            done.append(f"{moment}, {at:.1f} s")
            ENDED["kills"] += 1
            judge(here, undisturbed.after(stage), finished=False)
        kept = saved_step(here)
        status, said = kills.ended(kills.start(here, *command(stage)), here)
        assert status == 0 or "exists already" in said, said  # the whole of it, and then came the kill
        went_on = re.search(r"going on from step (\d+)", said)
        ENDED["lost"] += kept > int(went_on[1] if went_on else 0)
        judge(here, undisturbed.after(stage))
    print(f"{stage}: {len(done)} of {len(done)} kills survived ({'; '.join(done)})")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train-dense", pytest.param("sample", marks=pytest.mark.long)])
def test_a_killed_stage_goes_on_and_ends_with_the_same_bits(undisturbed, stage, tmp_path):
    survive(undisturbed, stage, 2, "few", tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_survives_kills_at_random_moments(undisturbed, stage, tmp_path):
    survive(undisturbed, stage, 5, "many", tmp_path)


# --- signals ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number"),
    [("train-dense", signal.SIGTERM), ("finetune-region", signal.SIGINT), ("sample", signal.SIGTERM)],
)
def test_a_signal_keeps_the_state_and_the_same_command_goes_on(undisturbed, stage, number, tmp_path):
    undisturbed.run(stage)
    here = kills.fresh(undisturbed.before(stage), tmp_path / "here")
    write_experiment(here, {**CHANGES, "training.save_minutes": 60})  # nothing would be saved for an hour
    process = kills.start(here, *command(stage))
    begun = re.compile(r"/state/[^/]+/(stats\.jsonl|\d+\.npz)$")
    assert kills.wait_until(process, kills.change(here, begun), kills.change(here, begun))
    process.send_signal(number)
    status, said = kills.ended(process, here)
    assert status == 128 + number
    lines = [line for line in said.splitlines() if line.startswith("ebdiff: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"ebdiff: {number.name}: ")
    assert "Traceback" not in said
    if stage == "sample":
        done = len(list(here.rglob("state/*/*.npz")))
        assert 0 < done < 30
        going_on = f"going on, {done} batches"
    else:
        (kept,) = here.rglob("state/*/*.json")
        step = int(kept.stem)
        assert f"step {step} of" in lines[0]
        assert step >= 10
        going_on = f"going on from step {step}"
    assert [name for name in kills.leftovers(here) if "/." in name] == []
    status, said = kills.ended(kills.start(here, *command(stage)), here)
    assert status == 0, said
    assert going_on in said
    write_experiment(here, CHANGES)
    assert kills.wrong(here, undisturbed.after(stage)) == []
    assert kills.products(here) == kills.products(undisturbed.after(stage))
    assert kills.leftovers(here) == []


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_ends_cleanly_on_a_signal(undisturbed, stage, number, tmp_path):
    undisturbed.run(stage)
    here = kills.fresh(undisturbed.before(stage), tmp_path / "here")
    draw = random.Random(f"{stage} {number}")
    for _ in range(20):
        process = kills.start(here, *command(stage))
        if kills.wait_until(process, kills.clock(draw.uniform(0.5, 1) * undisturbed.seconds[stage])):
            break
        kills.fresh(undisturbed.before(stage), here)  # it was faster than its signal
    process.send_signal(number)
    status, said = kills.ended(process, here)
    assert status in (0, 128 + number, -number), said  # nothing was left to do; -n: Python was only starting
    assert status == -number or "Traceback" not in said
    assert [name for name in kills.leftovers(here) if "/." in name] == []
    assert kills.wrong(here, undisturbed.after(stage)) == []
    status, said = kills.ended(kills.start(here, *command(stage)), here)
    assert status == 0, said
    assert kills.wrong(here, undisturbed.after(stage)) == []
    assert kills.products(here) == kills.products(undisturbed.after(stage))


# --- the whole workflow -------------------------------------------------------------------------------------

SNAKEMAKE = [sys.executable, "-m", "snakemake"]
SMOKE = [*SNAKEMAKE, "--cores", "2", "smoke"]
SCHEDULE = 5  # seconds that Snakemake needs at least before its first job


class Workflow:
    """The smoke experiment undisturbed: its folder before and after, and the seconds it took."""

    def __init__(self, folder):
        self.before, self.after = copied(folder / "before"), folder / "after"
        edit(self.before, "smoke", "training.save_minutes", 0.001)
        kills.fresh(self.before, self.after)
        began = time.monotonic()
        status, said = kills.ended(kills.start(self.after, *SMOKE), self.after)
        assert status == 0, said
        self.seconds = time.monotonic() - began

    def assert_equal(self, folder):
        assert kills.wrong(folder, self.after) == []
        assert kills.products(folder) == kills.products(self.after)
        assert kills.leftovers(folder) == []
        status, said = kills.ended(kills.start(folder, *SMOKE, "--dry-run"), folder)
        assert status == 0
        assert "Nothing to be done" in said


@pytest.fixture(scope="session")
def workflow(tmp_path_factory):
    (tmp_path_factory.getbasetemp() / "workflow/before").mkdir(parents=True)
    return Workflow(tmp_path_factory.getbasetemp() / "workflow")


def unlock_if_told(folder):
    """Start the smoke workflow; where its message says so, unlock once and start it again."""
    process, said = kills.start(folder, *SMOKE), folder / "out.txt"
    kills.wait_until(process, lambda: re.search(r"  jobs: \d|Nothing to be done", said.read_text()))
    if process.poll() and "can be removed with the --unlock argument" in said.read_text().replace("\n", " "):
        status, said = kills.ended(kills.start(folder, *SNAKEMAKE, "--unlock"), folder)
        assert status == 0, said
        process = kills.start(folder, *SMOKE)
    return process


def end(pid):
    """What the message advises about a job that outlived its Snakemake."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.1)


def vouched(folder):
    """The files that records vouch for, by what they are: one that is made again is another file."""
    found = {}
    for record in folder.rglob("records/**/*.json"):
        for path in json.loads(record.read_text())["made"]:
            with suppress(FileNotFoundError):
                found[path] = (folder / path).stat().st_ino
    return found


def finish(folder):
    """The same command until it succeeds; in between what its messages say, and only that."""
    while True:
        status, said = kills.ended(unlock_if_told(folder), folder)
        if status == 0:
            return
        orphans = re.findall(r"at work on it \(process (\d+) on .*; wait for it or end it, then run", said)
        assert orphans, said
        for pid in orphans:
            end(int(pid))


@pytest.mark.long
@pytest.mark.parametrize("whole_group", [False, True], ids=["snakemake alone", "the whole group"])
def test_the_workflow_survives_kills_at_random_moments(workflow, whole_group, tmp_path):
    draw = random.Random(f"workflow {whole_group}")
    here, done, killed, at = kills.fresh(workflow.before, tmp_path / "here"), [], [], 0.0
    finished = []
    for until in sorted(draw.uniform(0, workflow.seconds) for _ in range(6)):
        process = unlock_if_told(here)
        then = draw.choice([[], [kills.writing(here)], [kills.saved(here)]])
        if not kills.wait_until(process, kills.clock(until - at + SCHEDULE), *then):
            continue  # finished, or an orphan kept it out
        at = until
        kills.kill(process, whole_group)
        killed.append(process)
        done.append(f"{until:.0f} s, {len(kills.group(process))} orphans")
        ENDED["kills"] += 1
        finished.append(vouched(here))
        judge(here, workflow.after, finished=False)
    try:
        finish(here)
        assert len(done) >= 3  # an orphan may keep one out
        workflow.assert_equal(here)
        now = vouched(here)
        again = {path for there in finished for path in there if there[path] != now[path]}
        ENDED["lost"] += len(again)
        assert not again, "finished, and made again"
    finally:
        for process in killed:
            with suppress(ProcessLookupError):
                kills.kill(process)
    print(f"workflow: {len(done)} of {len(done)} kills survived ({'; '.join(done)})")


@pytest.mark.long
def test_an_orphan_keeps_its_successor_out_which_names_it(workflow, tmp_path):
    here = kills.fresh(workflow.before, tmp_path / "here")
    process = kills.start(here, *SMOKE)
    assert kills.wait_until(process, kills.saved(here))
    kills.kill(process, whole_group=False)
    (lock,) = here.rglob("state/last.lock")
    orphan = int(lock.read_text().split()[0])
    assert orphan in kills.group(process)
    os.kill(orphan, signal.SIGSTOP)  # it lives for as long as this test likes
    try:
        status, said = kills.ended(unlock_if_told(here), here)
        assert status != 0
        assert f"at work on it (process {orphan} on " in said
        assert kills.wrong(here, workflow.after) == []
    finally:
        os.kill(orphan, signal.SIGCONT)
    end(orphan)
    finish(here)
    (log,) = here.rglob("train-dense.full.log")
    assert "going on from step" in log.read_text()
    workflow.assert_equal(here)


@pytest.mark.long
def test_ctrl_c_reaches_the_jobs_and_the_same_command_goes_on(workflow, tmp_path):
    here = kills.fresh(workflow.before, tmp_path / "here")
    process = kills.start(here, *SMOKE)
    assert kills.wait_until(process, kills.saved(here))
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    status, _ = kills.ended(process, here)
    assert status != 0
    assert kills.group(process) == []
    (log,) = here.rglob("train-dense.full.log")
    assert "is saved; the same command goes on from it" in log.read_text()
    status, said = kills.ended(kills.start(here, *SMOKE), here)
    assert status == 0, said
    assert "going on from step" in log.read_text()
    workflow.assert_equal(here)
