"""Predicted time, memory and disk against small cases worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import write_experiment
from stages import run

from ebdiff.nets.memory import footprint
from ebdiff.plan import pace, page, prediction
from ebdiff.plan.expected import Expected
from ebdiff.plan.jobs import Job, jobs, needed_by, wall_seconds
from ebdiff.plan.pace import Pace
from ebdiff.plan.times import Times
from ebdiff.pruning.count import meta_tensors
from ebdiff.system.errors import UserError

CPU = torch.device("cpu")
# Made-up networks and times that are easy to add up.
NETWORKS = {
    name: {"rate": rate, "realised": rate, "params": params, "macs": macs, "step_ms": ms}
    for name, rate, params, macs, ms in [
        ("dense", 0.0, 1000, 8 * 10**9, 2000.0), ("0.3", 0.3, 600, 5 * 10**9, 1500.0),
        ("0.5", 0.5, 300, 2 * 10**9, 800.0), ("0.8", 0.8, 100, 10**9 // 2, 500.0),
    ]
}  # fmt: skip
PACE = Pace(
    step={"dense": 2.0, "0.3": 1.5, "0.5": 0.8, "0.8": 0.5},
    image={"dense": 0.04, "0.3": 0.03, "0.5": 0.02, "0.8": 0.01},
    mask=0.0,
    at_once=2,
    start={"training": 3.0, "predicting": 2.0, "pages": 1.5, "light": 0.5},
    process=3 * 10**8,
    told="made up",
)


# --- several devices ----------------------------------------------------------------------------------


def made(name, *reads, verb="figure"):
    return Job(verb, {}, tuple(map(Path, reads)), (Path(name),))


def wall(devices, *timed):
    return wall_seconds([job for job, _ in timed], dict(timed), devices)


def test_jobs_wait_for_what_they_read_and_share_the_devices():
    """a 3 s, then b 2 s; c 4 s beside them."""
    a, b, c = made("a"), made("b", "a"), made("c", "from outside")
    timed = (a, 3), (b, 2), (c, 4)
    assert wall(1, *timed) == 9
    assert wall(2, *timed) == 5  # c ends at 4, b at 3 + 2
    assert wall(9, *timed) == 5


def test_what_measures_is_alone():
    measuring = made("cost", verb="measure-cost")
    assert wall(2, (made("a"), 3), (measuring, 2), (made("b"), 4)) == 2 + 4


def test_the_longest_way_goes_first():
    """Two metrics of 5 s, a search of 4 s with 4 s of sampling behind it: by priority, not by order."""
    first, second = made("m1", verb="fid"), made("m2", verb="fid")
    search, sampled = made("s", verb="train-dense"), made("x", "s", verb="sample")
    # Device 1: search 0-4, samples 4-8. Device 2: a metric 0-5, the other 5-10.
    assert wall(2, (first, 5), (second, 5), (search, 4), (sampled, 4)) == 10


def test_every_job_comes_after_those_it_needs(tiny):
    found = jobs(tiny)
    makers = {path: job for job in found for path in job.makes}
    assert found[-1].verb == "report"
    assert all(found.index(needed) < found.index(job) for job in found for needed in needed_by(job, makers))


# --- steps, seconds, bytes ----------------------------------------------------------------------------


def expected(e, count=1797):
    return Expected(e, {k: NETWORKS[k] for k in ("dense", *map(str, e.rates()))}, count)


def times(e, devices=2):
    return Times(expected(e), PACE, devices)


def test_the_unpruned_network_goes_on_from_its_searchs_horizon(vary):
    found = expected(vary({}))  # 160 images in batches of 16, 6 epochs
    assert found.horizon("full") == 60
    assert found.begun("dense-full", "80") == 60
    assert expected(vary({"dense.iterations": 50})).begun("dense-full", "50") == 0
    assert expected(vary({"dense.from": "public.ckpt"})).begun("dense-full", "80") == 80  # not trained at all
    assert expected(vary({"dataset.subset": None}), count=33).horizon("full") == 6 * 3


def test_equal_time_is_counted_to_the_horizon(vary):
    narrow = {"title": "Narrow", "method": "control", "init": "fresh", "rate": 0.5}
    found = expected(vary({"runs.narrow": {**narrow, "iterations": "like-eb-50"}}))
    # eb-50: 40 steps at 0.4 of a dense one's time and 60 dense ones of search: 76, in steps of 0.4.
    assert found.steps("fresh-0.5-t0-1000", "like-eb-50") == 190


def test_seconds_of_every_kind_of_job_by_hand(vary):
    e = vary({"sampling.spacing": "uniform"})  # visits 0, 100, ..., 900
    found = times(e)
    by_name = {job.benchmark.name: seconds for job, seconds in found.seconds.items()}
    assert by_name["train-dense.full.tsv"] == pytest.approx(3 + 60 * 2.0)
    assert by_name["finetune-region.dense-full.80.tsv"] == pytest.approx(3 + 20 * 2.0)
    assert by_name["finetune-region.full-magnitude-ema-0.5-t0-1000.40.tsv"] == pytest.approx(3 + 40 * 0.8)
    assert by_name["sample.eb-50.tsv"] == pytest.approx(2 + 23 * 10 * 0.02)
    assert by_name["sample.ta-eb.tsv"] == pytest.approx(2 + 23 * (3 * 0.03 + 7 * 0.01))
    assert by_name["select-eb-epoch.full.magnitude.ema.0.5.tsv"] == 3
    assert by_name["prune-per-epoch.full.magnitude.ema.tsv"] == 0.5  # taken while training
    assert by_name["measure-cost.tsv"] == pytest.approx(3 + 13 * 2 * (2 + 1.5 + 0.8 + 0.5))
    assert by_name["table4.tsv"] == 0.5
    # Its search, masks, ticket, training, samples and metrics.
    alone = sum(s for n, s in by_name.items() if "eb-50" in n or "ema-0.5" in n or "ema.0.5" in n)
    alone += by_name["train-dense.full.tsv"] + by_name["prune-per-epoch.full.magnitude.ema.tsv"]
    assert found.of_run("eb-50") == pytest.approx(alone)


def test_gradient_masks_take_a_step_at_every_timestep(vary):
    e = vary({"searches.full.criteria": ["magnitude", "taylor"], "runs.eb-50.criterion": "taylor"})
    by_name = {job.benchmark.name: seconds for job, seconds in times(e).seconds.items()}
    # 6 intervals of 10 timesteps (stride 100) on 32 images, twice a batch of 16.
    assert by_name["prune-per-epoch.full.taylor.ema.tsv"] == pytest.approx(3 + 60 * 2 * 2.0)


def test_two_gpus_halve_a_jobs_work_and_not_its_device_time(vary):
    e = vary({"sampling.spacing": "uniform", "compute.gpus": 2})
    found = times(e, devices=1)
    by_name = {job.benchmark.name: job for job in found.seconds}
    for name, start, work in (
        ("train-dense.full.tsv", 3, 60 * 2.0),
        ("finetune-region.full-magnitude-ema-0.5-t0-1000.40.tsv", 3, 40 * 0.8),
        ("sample.eb-50.tsv", 2, 23 * 10 * 0.02),
    ):
        assert found.seconds[by_name[name]] == pytest.approx(start + work / 2)
        assert found.device_seconds(by_name[name]) == pytest.approx(2 * start + work)
    ticket = by_name["select-eb-epoch.full.magnitude.ema.0.5.tsv"]  # computes on one of them
    assert found.device_seconds(ticket) == found.seconds[ticket] == 3


def test_several_seeds_are_counted_each_and_data_once(vary):
    one, three = times(vary({})), times(vary({"seeds": [0, 1, 2]}))
    assert three.of_run("ta-eb") == pytest.approx(3 * one.of_run("ta-eb"))
    verbs = [job.verb for job in three.jobs]
    assert verbs.count("train-dense") == 3
    assert verbs.count("train-classifier") == verbs.count("measure-cost") == 1


def test_speed_ups_are_the_reports_own(tiny):
    facts = prediction.Plan(times(tiny), CPU).facts
    eb, (three,) = facts["eb-50"].speedups()[0], facts["ta-eb"].speedups()
    assert eb.as_paper == pytest.approx(80 / (40 * 0.4))
    assert eb.device_time == pytest.approx(80 / (40 * 0.4 + 60))
    assert three.as_paper == pytest.approx(80 / (20 * 0.75))
    assert facts["eb-50"].speedups("macs")[0].as_paper == pytest.approx(80 / (40 * 0.25))


def test_a_stated_step_time_is_shared_out_by_macs(tiny, monkeypatch):
    monkeypatch.setattr(pace, "_starts", lambda device: (PACE.start, 1))
    found = pace.stated(tiny, NETWORKS, 160.0, CPU)
    assert found.step == pytest.approx({"dense": 0.16, "0.3": 0.1, "0.5": 0.04, "0.8": 0.01})
    assert found.image["dense"] == pytest.approx(0.16 / 16 / 3)


# --- what can't work ----------------------------------------------------------------------------------


@pytest.fixture
def plenty(monkeypatch):
    """A machine with room for everything; its figures can be changed."""
    room = SimpleNamespace(memory=10**12, disk=10**12)
    monkeypatch.setattr(prediction, "available_bytes", lambda device: room.memory)
    monkeypatch.setattr(prediction.shutil, "disk_usage", lambda path: SimpleNamespace(free=room.disk))
    return room


def warned(e, devices=1):
    return prediction.Plan(times(e, devices), CPU).warnings


def test_nothing_is_said_against_what_works(vary, plenty):
    assert warned(vary({"compute": {"mem_mb": 4000}})) == []


def test_too_little_memory_names_the_micro_batch_that_fits(vary, plenty):
    e = vary({"compute": {"mem_mb": 4000}})
    quarter = footprint(e.network, meta_tensors(e.network, 0)).bytes(4)
    plenty.memory = PACE.process + quarter
    (warning,) = warned(e)
    assert "dense network" in warning and "compute.micro_batch: 4 fits" in warning
    assert not warned(vary({"compute": {"mem_mb": 4000, "micro_batch": 4}}))
    plenty.memory = PACE.process
    assert "not even one image" in warned(e)[0]


def test_too_little_memory_for_all_cores_names_how_many(vary, plenty):
    e = vary({"compute": {"mem_mb": 4000}})
    most = max(prediction.Plan(times(e), CPU).memory.values())
    plenty.memory = int(3.5 * most)
    assert not warned(e, devices=3)
    (warning,) = warned(e, devices=4)
    assert "--cores 3" in warning


def test_small_disks_short_times_and_large_batches_are_told(vary, plenty):
    plenty.disk = 100_000
    (warning,) = warned(vary({"compute": {"mem_mb": 4000}}))
    assert warning.startswith("disk: ") and "0.1 MB free" in warning
    plenty.disk = 10**12
    (warning,) = warned(vary({"compute": {"mem_mb": 4000, "runtime": 2}}))
    assert "compute.runtime: train-dense takes 2.05 min" in warning  # 3 s and 60 steps of 2 s
    (warning,) = warned(vary({"compute": {"mem_mb": 4000}, "training.batch": 256}))
    assert "training.batch: 256 images a step, but there are 160" in warning
    (warning,) = warned(vary({"compute": {"mem_mb": 200}}))
    assert "compute.mem_mb asks a cluster for 200 MB only" in warning


def test_rates_that_the_norm_groups_cant_give_are_told(vary, plenty):
    plan = prediction.Plan(times(vary({"compute": {"mem_mb": 4000}})), CPU)
    networks = {**NETWORKS, "0.5": {**NETWORKS["0.5"], "realised": 0.32}}
    other = Expected(plan.experiment, networks, 1797)
    found = prediction.Plan(replace(plan.times, expected=other), CPU).warnings
    assert found == [
        "rate 0.5: the norm groups allow 0.32",
        "rates 0.3 and 0.5: nearly the same network, 0.30 and 0.32 of the channels go",
    ]


# --- the verb -----------------------------------------------------------------------------------------


def test_disk_is_what_is_not_there_yet(tiny, plenty, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = prediction.Plan(times(tiny), CPU)
    assert plan.disk_to_come == sum(plan.disk.values())
    images = plan.times.jobs[0]
    assert images.verb == "prepare-data"
    for path in images.makes:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    # 1797 digits of 8 x 8 and a label of 8 bytes each.
    later = prediction.Plan(times(tiny), CPU)
    assert sum(later.disk.values()) - later.disk_to_come == 1797 * (64 + 8)


def test_a_plan_waits_for_no_gpu(tmp_path, monkeypatch):
    """A training may hold the only one for days."""
    write_experiment(tmp_path, {"compute.gpus": 1})
    monkeypatch.chdir(tmp_path)
    asked = []

    def pick_device(name, own):
        asked.append(own)
        return CPU

    monkeypatch.setattr("ebdiff.system.devices.pick_device", pick_device)
    monkeypatch.setattr(pace, "_starts", lambda device: (PACE.start, 1))
    assert run("plan", "tiny", "--step-ms", "5", "--devices", "1") == 0
    assert asked == [False]


@pytest.mark.slow
def test_the_plan_is_printed_and_written(verb, tmp_path):
    write_experiment(tmp_path)
    done = verb("plan", "tiny", "--step-ms", 5, "--devices", 3)
    assert done.returncode == 0, done.stderr
    assert "3 jobs at a time" in done.stdout and "5 ms per unpruned step" in done.stdout
    for word in ("unpruned", "eb-50", "ta-eb", "full 60 steps"):
        assert word in done.stdout
    plan = json.loads((tmp_path / "results/tiny/plan.json").read_text())
    assert plan["networks"]["dense"]["step_ms"] == 5
    assert plan["job_seconds"] == pytest.approx(sum(job["seconds"] for job in plan["jobs"]), abs=1)
    assert plan["job_seconds"] / 3 <= plan["wall_seconds"] <= plan["job_seconds"]


@pytest.mark.slow
def test_without_a_stated_time_every_network_is_measured(verb, tmp_path):
    write_experiment(tmp_path)
    done = verb("plan", "tiny")
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "results/tiny/plan.json").read_text())
    assert "measured" in plan["pace"]
    steps = {name: network["step_ms"] for name, network in plan["networks"].items()}
    assert set(steps) == {"dense", "0.3", "0.5", "0.8"}
    assert all(0 < ms < 10_000 for ms in steps.values())


def test_unknown_numbers_of_images_are_asked_for(vary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pace, "_starts", lambda device: (PACE.start, 1))
    e = vary({"dataset.source": "images", "dataset.path": "nowhere", "dataset.name": "mine"})
    with pytest.raises(UserError, match=r"resources/data/mine/manifest.json.*--images"):
        prediction.make(e, CPU, 1, step_ms=5)
    assert prediction.make(e, CPU, 1, step_ms=5, images=40).times.expected.count == 40


def test_a_run_needs_the_memory_of_its_search_too(tiny, plenty):
    plan = prediction.Plan(times(tiny), CPU)
    rows = page._runs(plan).cells()
    dense = page.text.size(plan.memory["dense"])
    assert plan.memory["dense"] > plan.memory["0.5"] > plan.memory["0.8"] > PACE.process
    assert [row[3] for row in rows] == [dense, dense, dense]


def test_the_page_says_at_most_where_it_doesnt_know(vary, plenty):
    narrow = {"title": "Narrow", "method": "control", "init": "fresh", "rate": 0.5}
    e = vary({"runs.narrow": {**narrow, "iterations": "like-eb-50"}, "compute": {"mem_mb": 4000}})
    text = "\n".join(page.page(prediction.Plan(times(e), CPU)))
    assert "at most 190" in text
    assert "device time is at most" in text
    assert "Nothing speaks against it." in text
