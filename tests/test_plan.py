"""Predicted time, memory and disk against small cases worked out by hand, and jobs against Snakemake's."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, write_experiment
from stages import run
from test_starter import fill
from test_workflow import copied, snakemake

from ebdiff import starter
from ebdiff.cost import plan
from ebdiff.experiment import load
from ebdiff.experiment.jobs import Job
from ebdiff.experiment.stages import STAGES
from ebdiff.nets.memory import footprint
from ebdiff.pruning.count import meta_tensors
from ebdiff.system.errors import UserError

CPU, START = torch.device("cpu"), {"torch": 3.0, "light": 0.5}
SIZES = {"dense": (0.0, 1000, 2e3), "0.3": (0.3, 600, 1.5e3), "0.5": (0.5, 300, 800), "0.8": (0.8, 100, 500)}
NETWORKS = {  # made up: easy to add up
    name: {"rate": rate, "realised": rate, "params": params, "step_ms": ms, "image_ms": ms / 50,
           "spread_ms": 0.1 * ms, "peak_bytes": 10**6 * params, "fits": 8}
    for name, (rate, params, ms) in SIZES.items()
}  # fmt: skip


def forecast(e, count=1797, networks=NETWORKS, device=CPU):
    return plan.Forecast(e, device, count, networks, START)


def tasks(e, **more):
    """By the name of a job's record."""
    return {t.job.name.split("/")[-1]: t for t in forecast(e, **more).tasks()}


@pytest.mark.parametrize(("at_once", "seconds", "jobs"), [
    (1, 9, ["tabulate a 3", "tabulate b 2 a", "tabulate c 4"]),
    (2, 5, ["tabulate a 3", "tabulate b 2 a", "tabulate c 4"]),  # b waits for a, c runs beside both
    (2, 6, ["tabulate a 3", "measure-cost b 2", "tabulate c 4"]),  # alone, and first
    # By priority: a search 0-4 and its samples 4-8 on one, metrics 0-5 and 5-10 on the other.
    (2, 10, ["fid a 5", "fid b 5", "train-dense c 4", "sample d 4 c"]),
])  # fmt: skip
def test_jobs_wait_for_what_they_read_and_share_the_devices(at_once, seconds, jobs):
    assert max(end for _, end in timed(jobs, at_once).values()) == seconds


def timed(jobs, at_once, share=1):
    """When each of some made up jobs, `verb name seconds *needs`, begins and ends."""
    found = []
    for verb, name, takes, *needs in map(str.split, jobs):
        job = SimpleNamespace(name=name, stage=STAGES[verb], on_gpu=verb not in ("tabulate", "fid"))
        found.append(plan.Task(job, frozenset(needs), float(takes)))
    times = plan.schedule(found, at_once, share)
    return {name: tuple(round(time, 6) for time in both) for name, both in times.items()}


def test_jobs_that_share_a_gpu_have_it_by_turns():
    """Timed alone; then a search alone, and three experts whose turns are thirds, halves, then all of it."""
    jobs = ["measure-cost m 1", "train-dense d 10 m", "sample a 1 d", "sample b 2 d", "sample c 4 d"]
    hand = {"m": (0, 1), "d": (1, 11), "a": (11, 14), "b": (11, 16), "c": (11, 18)}
    assert timed(jobs, 3, 3) == hand
    # On two GPUs three jobs have two thirds each, and what needs none isn't slowed down.
    jobs = ["sample a 2", "sample b 4", "sample c 4", "tabulate t 5"]
    hand = {"a": (0, 3), "b": (0, 5), "c": (0, 5), "t": (0, 5)}
    assert timed(jobs, 4, 2) == hand
    assert timed(jobs, 4)["c"] == (0, 4)


def test_a_plan_counts_the_jobs_and_memory_of_a_shared_gpu(vary, alone, monkeypatch):
    shared = vary({"compute": {"gpus": 1, "share": 3}})
    monkeypatch.setattr(plan, "available_bytes", lambda device: 3000)
    found = plan.make(shared, CPU, 3, 160.0, None)  # stated: a GPU's
    assert (found["devices"], found["share"]) == (3, 3)
    assert "with 3 jobs at a time, 3 to a GPU by turns" in "".join(plan.page(found))
    single = plan.make(vary({"compute.gpus": 1}), CPU, 1, 160.0, None)
    device_seconds = [sum(job["device_seconds"] for job in p["jobs"]) for p in (found, single)]
    assert device_seconds[0] == pytest.approx(device_seconds[1])
    assert max(job["seconds"] for job in single["jobs"]) <= found["wall_seconds"] <= single["wall_seconds"]


@pytest.mark.slow
def test_the_planned_jobs_are_those_of_snakemakes_dry_run(tmp_path):
    folder, names = copied(tmp_path), ("digits", "cifar10")
    done = snakemake(folder, "--dry-run", "--config", f"experiments={','.join(names)}")
    assert done.returncode == 0, done.stderr
    theirs = re.findall(r"^ +benchmark: (\S+)$", done.stdout + done.stderr, re.MULTILINE)
    every_rate = {**NETWORKS, **{str(i / 100): NETWORKS["0.5"] for i in range(1, 100)}}
    experiments = [load.load(name, folder / "config/experiments") for name in names]
    planned = [task for e in experiments for task in forecast(e, networks=every_rate).tasks()]
    assert len(theirs) == len(set(theirs)) > 200
    assert sorted(str(task.job.note("benchmarks", "tsv")) for task in planned) == sorted(theirs)


def test_trainings_go_on_from_what_is_there(vary):
    def steps(changes, expert="dense-full", milestone=80):
        job = Job.of(vary(changes), "finetune-region", seed=0, expert=expert, milestone=milestone)
        return forecast(job.experiment).steps(job)

    assert steps({}) == 20  # the search had 60: 160 images in batches of 16, 6 epochs
    assert steps({"dense.iterations": 50}, milestone=50) == 50  # it ends before the search's horizon
    assert steps({"dense.from": "public.ckpt"}) == 0  # nothing to train
    assert forecast(vary({"dataset.subset": None}), count=33).horizon("full") == 6 * 3
    # As eb-50: 40 steps at 0.4 of a dense one's time and 60 dense ones of search are 76, in steps of 0.4.
    like = {"title": "Narrow", "method": "control", "init": "fresh", "rate": 0.5}
    like["iterations"] = "like-eb-50"
    assert steps({"runs.like": like}, "fresh-0.5-t0-1000", "like-eb-50") == 190


def test_latents_are_counted_beside_images(vary):
    codec = {"kind": "autoencoder", "channels": 4, "factor": 4}
    e = vary({"codec": codec, "dataset.flip": False, "sampling.clamp": False, "sampling.spacing": "uniform"})
    found = {name: (task.seconds - 3, task.size) for name, task in tasks(e).items()}
    assert found["encode-latents"] == (pytest.approx(1797 * 64 * 2e-5), 1797 * 2 * 16)  # float16, 4x2x2
    steps = 50 * 29  # 29 batches of 64 hold 1797 images
    assert found["train-first-stage"] == (pytest.approx(steps * 64 * 64 * 6e-6), 0)
    sampled = 23 * (10 * 0.04 + 64 * 2e-5)
    assert found["sample.unpruned"] == (pytest.approx(sampled), 23 * (64 + 4 * 16))
    assert found["prepare-data"][1] == 1797 * (64 + 8)


def test_seconds_and_bytes_of_every_job_by_hand(vary):
    e = vary({"sampling.spacing": "uniform"})  # visits 0, 100, ..., 900
    state, masks = 4 * 4, "full.magnitude"  # weights, average, two moments of four bytes
    hand = {
        "measure-cost": (3 + 13 * (2 + 1.5 + 0.8 + 0.5), 0),
        "prepare-data": (0.5, 1797 * (64 + 8)), "train-classifier": (3 + 2e-6 * 64 * 60 * 1797, 0),
        "reference-stats.classifier.all": (3, 0), "tabulate": (0.5 + 10, 0), "report": (0.5, 0),
        "train-dense.full": (3 + 60 * 2, 1000 * state + 6 * 2 * 4 * 1000),  # at most a snapshot a ticket
        f"prune-per-epoch.{masks}.ema": (0.5, 0), f"prune-per-epoch.{masks}.raw": (0.5, 0),
        "prune-per-epoch.final.magnitude.ema": (3, 0),
        f"hamming-matrix.{masks}.ema": (0.5, 0), f"hamming-matrix.{masks}.raw": (0.5, 0),
        f"select-eb-epoch.{masks}.ema.0.3": (3, 4 * 600), f"select-eb-epoch.{masks}.ema.0.5": (3, 4 * 300),
        f"select-eb-epoch.{masks}.ema.0.8": (3, 4 * 100),
        "finetune-region.dense-full.80": (3 + 20 * 2, 1000 * state),
        "finetune-region.full-magnitude-ema-0.5-t0-1000.40": (3 + 40 * 0.8, 300 * state),
        "finetune-region.full-magnitude-ema-0.3-t0-260.20": (3 + 20 * 1.5, 600 * state),
        "finetune-region.full-magnitude-ema-0.8-t240-1000.20": (3 + 20 * 0.5, 100 * state),
        "sample.unpruned": (3 + 23 * 10 * 0.04, 23 * 64), "sample.eb-50": (3 + 23 * 10 * 0.016, 23 * 64),
        "sample.ta-eb": (3 + 23 * (3 * 0.03 + 7 * 0.01), 23 * 64),
        "fid.unpruned": (3, 0), "fid.eb-50": (3, 0), "fid.ta-eb": (3, 0),
    }  # fmt: skip
    found = tasks(e)
    two = {"dataset.classes": 10, "training.label_dropout": 0.1, "sampling.guidance": 3}  # passes a step
    assert tasks(vary({"sampling.spacing": "uniform", **two}))["sample.eb-50"].seconds == 3 + 23 * 20 * 0.016
    assert found.keys() == hand.keys()
    for name, (seconds, size) in hand.items():
        assert (found[name].seconds, found[name].size) == (pytest.approx(seconds), size), name
    for seeds in ((0,), (0, 1, 2)):  # of the run its search, masks, ticket, training, samples and metrics
        several = forecast(e.model_copy(update={"seeds": seeds}))
        own = 123 + 0.5 + 3 + 35 + (3 + 3.68) + 3
        assert several.run("eb-50", several.tasks())["device_seconds"] == pytest.approx(len(seeds) * own)


def test_gradient_masks_inception_and_several_gpus(vary):
    taylor = {"searches.full.criteria": ["magnitude", "taylor"], "runs.eb-50.criterion": "taylor"}
    # 6 intervals of 10 timesteps (stride 100) on 32 images, twice a batch of 16.
    assert tasks(vary(taylor))["prune-per-epoch.full.taylor.ema"].seconds == 3 + 60 * 2 * 2
    # They are part of its search: 60 steps and as long as 120.
    like = {"title": "L", "method": "control", "init": "fresh", "rate": 0.5, "iterations": "like-eb-50"}
    found = forecast(vary({**taylor, "runs.like": like}))
    eb, alike = (found.run(name, []) for name in ("eb-50", "like"))
    assert eb["as_paper"] == pytest.approx(80 / (40 * 0.4))
    assert eb["with_search"] == eb["device_time"] == pytest.approx(80 / (40 * 0.4 + 60 + 120))
    assert alike["steps"] == [round((40 * 0.4 + 60 + 120) / 0.4)]
    clean = vary({"evaluation": {"protocols": ["clean", "legacy_pytorch"], "reference": 100}})
    assert tasks(clean)["fid.eb-50"].seconds == pytest.approx(3 + 2 * 23 * 0.2)
    on_gpu = tasks(clean, device=torch.device("cuda"))["reference-stats.clean.100"]
    assert on_gpu.seconds == pytest.approx(3 + 100 * 0.005)
    timed = tasks(clean, device=torch.device("cuda"))["measure-cost"]
    assert timed.seconds == pytest.approx(3 + (2 + 5) * 50 * (2 + 1.5 + 0.8 + 0.5))  # 50 steps a round
    found = tasks(vary({"compute.gpus": 2}))
    search, ticket = found["train-dense.full"], found["select-eb-epoch.full.magnitude.ema.0.5"]
    assert (search.seconds, search.devices, ticket.seconds, ticket.devices) == (3 + 60 * 2 / 2, 2, 3, 1)


def test_speed_ups_count_the_search_to_its_horizon(tiny):
    eb, three = (forecast(tiny).run(name, []) for name in ("eb-50", "ta-eb"))
    assert eb["as_paper"] == pytest.approx(80 / (40 * 0.4))
    assert eb["with_search"] == eb["device_time"] == pytest.approx(80 / (40 * 0.4 + 60))
    assert three["as_paper"] == pytest.approx(80 / (20 * 0.75))
    assert three["device_time"] == pytest.approx(80 / (20 * 0.75 + 20 * 0.25 + 60))


ROOM = {
    "memory_free": 10**13, "disk_free": 10**12, "disk_to_come": 10**9, "images": 1797, "devices": 2,
    "decode_ms": 0.0,
}  # fmt: skip
JOB = {"kind": "train-dense", "benchmark": "results/tiny/benchmarks/seed0/x.tsv", "seconds": 123.0}


def of(name, **values):
    return {"networks": {**NETWORKS, name: {**NETWORKS[name], **values}}}


@pytest.mark.parametrize(("changes", "planned", "told"), [
    ({}, {"memory_free": 9 * 10**8}, r"1.00 GB .* dense network, but 900 MB .*micro_batch: 8 fits"),
    ({}, {"memory_free": 9 * 10**8, **of("dense", fits=0)}, "not even one image at a time fits"),
    ({}, {"memory_free": 35 * 10**8, "devices": 4}, "; 3 of 4 at a time fit here, run with --cores 3"),
    ({"compute": {"mem_mb": 900}}, {}, "compute.mem_mb asks a cluster for 900 MB only"),
    ({}, {"disk_to_come": 2 * 10**12}, "disk: 2000 GB to come, 1000 GB free"),
    ({"training.batch": 256}, {}, "training.batch: 256 images a step, but there are 160"),
    ({"compute": {"runtime": 2}}, {}, "compute.runtime: train-dense takes 2.05 min"),
    ({}, of("0.5", spread_ms=300.0), r"step times scatter \(0.5\)"),
    ({}, of("0.5", realised=0.6), "rate 0.5: the norm groups allow 0.60"),
    ({}, of("0.8", rate=0.55, realised=0.52), "rates 0.5 and 0.8: nearly the same network"),
    ({}, of("0.8", step_ms=900.0), r"0.8 gains nothing on this device \(900 .* 800 .* pays: 0.3, 0.5$"),
    ({}, of("0.8", image_ms=22.0), "0.8: sampling is slower than with 0.5"),
    # 16 images in 500 ms, 160 ms each: five cores.
    ({}, {"decode_ms": 160.0}, "dataset.store: the fastest step takes 32 images .* 2 cores decode 12;"),
])  # fmt: skip
def test_what_cant_work_or_disappoints_is_told_once(vary, changes, planned, told, monkeypatch):
    usual = {"networks": NETWORKS, "jobs": [JOB], **ROOM}
    monkeypatch.setattr(plan.os, "sched_getaffinity", lambda pid: range(4))
    assert not list(plan.warnings(vary({}), usual, gpu=False))
    (found,) = plan.warnings(vary(changes), {**usual, **planned}, gpu=False)
    assert re.search(told, found)


def test_images_that_fit_on_the_gpu_are_decoded_once(vary):
    networks = {name: {**network, "peak_bytes": 1} for name, network in NETWORKS.items()}
    slow = {**ROOM, "networks": networks, "jobs": [JOB], "decode_ms": 1e6, "memory_free": 160 * 64 * 4 + 1}
    assert not list(plan.warnings(vary({}), slow, gpu=True))
    (found,) = plan.warnings(vary({}), {**slow, "memory_free": 160 * 64 * 4}, gpu=True)
    assert found.startswith("dataset.store")


def test_trainings_on_latents_decode_no_images(vary):
    slow = {**ROOM, "networks": NETWORKS, "jobs": [JOB], "decode_ms": 1e6}
    latent = {"codec": {"kind": "autoencoder", "channels": 4, "factor": 4}, "dataset.flip": False}
    assert not list(plan.warnings(vary({**latent, "sampling.clamp": False}), slow, gpu=False))
    assert len(list(plan.warnings(vary({}), slow, gpu=False))) == 1


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A project of its own; starting a job takes a second and isn't tried."""
    path = write_experiment(tmp_path, {"compute.gpus": 1})
    shutil.copy(ROOT / "config/experiments/images.yaml", path.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "_start", lambda modules: 1.0)
    return tmp_path


def test_a_stated_step_is_a_gpus_and_shared_out_by_macs(vary, alone, monkeypatch):
    tiny = vary({"evaluation.protocols": ["clean"]})
    monkeypatch.setattr(plan.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=1000))
    quarter = 1000 * 1024 + footprint(tiny.architecture, meta_tensors(tiny.architecture, 0)).bytes(4)
    monkeypatch.setattr(plan, "available_bytes", lambda device: quarter)
    found = plan.make(tiny, CPU, 1, 160.0, None)
    networks, (fid, *_) = found["networks"], [job for job in found["jobs"] if job["kind"] == "fid"]
    assert fid["seconds"] == pytest.approx(1 + 23 * 0.005)
    for network in networks.values():
        assert network["step_ms"] == pytest.approx(160 * network["macs"] / networks["dense"]["macs"])
        assert network["image_ms"] == pytest.approx(network["step_ms"] / 16 / 3)  # backward is two forwards
    assert networks["dense"]["peak_bytes"] > quarter and networks["dense"]["fits"] == 4  # of 16
    assert networks["0.8"]["peak_bytes"] < networks["dense"]["peak_bytes"]


@pytest.mark.parametrize("step_ms", ["inf", "nan", "0", "-3", "1e400", "many"])
def test_a_step_must_take_a_time(alone, capsys, step_ms):
    assert run("plan", "tiny", "--step-ms", step_ms) == 2
    assert "--step-ms" in capsys.readouterr().err
    assert not (alone / "results/tiny/plan.json").exists()


def test_a_plan_waits_for_no_gpu(alone, monkeypatch):  # a training may hold the only one for days
    asked = []
    monkeypatch.setattr(
        "ebdiff.system.devices.pick_device", lambda name, own, share: asked.append(own) or CPU
    )
    assert run("plan", "tiny", "--step-ms", "5", "--devices", "1") == 0
    assert asked == [False]


def test_images_are_counted_straight_after_init_or_asked_for(vary, alone):
    starter.init("mine", str(fill(alone / "photos", 12)), 16, force=False)
    assert run("plan", "mine", "--step-ms", "5") == 0
    assert json.loads((alone / "results/mine/plan.json").read_text())["images"] == 12
    cifar, images = (
        vary({"dataset.source": "cifar10", "dataset.held_out": "test"}),
        {"dataset.source": "images"},
    )
    assert plan.make(cifar, CPU, 1, 5.0, None)["images"] == 50_000  # nothing is fetched
    hub, nowhere = vary({**images, "dataset.hub": "some/thing"}), vary({**images, "dataset.path": "nowhere"})
    for e in (hub, nowhere):
        with pytest.raises(UserError, match=r"(digits: isn't here|nowhere).*--images"):
            plan.make(e, CPU, 1, 5.0, None)
    assert plan.make(hub, CPU, 1, 5.0, 40)["images"] == 40


@pytest.mark.slow
def test_the_plan_is_measured_printed_and_written(verb, tmp_path):
    write_experiment(tmp_path)
    done = verb("plan", "tiny", "--devices", 3)
    assert done.returncode == 0, done.stderr
    for words in (
        "3 jobs at a time",
        "measured on 5 steps of 16 images",
        "full 60 steps",
        "eb-50",
        "at least",
    ):
        assert words in done.stdout
    found = json.loads((tmp_path / "results/tiny/plan.json").read_text())
    assert list(found["networks"]) == list(NETWORKS)
    assert all(0 < network["step_ms"] < 10_000 for network in found["networks"].values())
    total = sum(job["seconds"] for job in found["jobs"])
    assert total / 3 <= found["wall_seconds"] <= total
    e = load.load("tiny", tmp_path / "config/experiments")
    assert found["digest"] == Job.of(e, "tabulate").digest and found["devices"] == 3
