"""What an experiment will take: time, memory, disk, speed-ups, and what can't work (verb `plan`).

Every job gets seconds and bytes by arithmetic on a few numbers: a training and a sampling step of each
network and the start of a job, measured here (in half a minute, on a GPU in ten seconds per network), or
stated. Searches go to their horizon.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch

from ebdiff.codecs import autoencoder
from ebdiff.cost import measure
from ebdiff.cost.accounting import average_visited, every_network, search_steps, speedups, waits
from ebdiff.cost.roofline import in_vain
from ebdiff.cost.tune import sampling_step
from ebdiff.data import sources
from ebdiff.data.dataset import RESIDENT
from ebdiff.diffusion.schedule import visited
from ebdiff.experiment import layout, places
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.jobs import Job, jobs, maker
from ebdiff.experiment.runs import Budget, Expert
from ebdiff.experiment.schema import FINAL, GRADIENT
from ebdiff.experiment.stages import taken_while_training
from ebdiff.metrics import classifier, inception
from ebdiff.metrics.evaluate import RECONSTRUCTED
from ebdiff.nets.execution import Runtime
from ebdiff.nets.memory import available_bytes, footprint
from ebdiff.pruning.count import meta_tensors
from ebdiff.report import text
from ebdiff.system.devices import device_name
from ebdiff.training.train import budget_steps

ROUNDS = 5  # timed steps of each network
MACS = 2e10  # of a timed forward pass on a CPU: of larger batches a part is timed
STATE = 16  # bytes per parameter of a training state: weights, average and Adam's two moments in fp32
# Stated, not measured: seconds per image in Inception, per pixel and epoch in the classifier, of all pages.
INCEPTION, CLASSIFIER, PAGES = {"cpu": 0.2, "cuda": 0.005}, 2e-6, 10.0
# Seconds per pixel: of a step of our own first stage; of encoding or decoding, by the largest (VQ-f4).
FIRST_STAGE, ENCODING = {"cpu": 6e-6, "cuda": 1e-7}, {"cpu": 2e-5, "cuda": 2e-7}
LIGHT = ("prepare-data", "hamming-matrix", "tabulate", "report")  # verbs that import no torch
FAR, SLOWER, SCATTERED = 0.05, 1.05, 0.25  # told are a rate off by so much, times, a quartile range / median


@dataclass(frozen=True)
class Task:
    """A job, the names of those it needs, its seconds on each of its devices, and bytes it leaves at most.

    Its seconds are those on a GPU that it shares with no other.
    """

    job: Job
    needs: frozenset[str]
    seconds: float
    devices: int = 1
    size: int = 0


def schedule(tasks: Sequence[Task], at_once: int, share: int = 1) -> dict[str, tuple[float, float]]:
    """When each of them begins and ends, in seconds, by its job's name: `at_once` at a time.

    Whenever there is room, the one of highest priority that has all it needs starts, as Snakemake's greedy
    scheduler does; what must be `alone` waits until nothing runs, and nothing starts beside it. Where `share`
    jobs use one GPU it is theirs by turns: beside more of them than GPUs each is slower in proportion.
    """
    waiting = sorted(tasks, key=lambda task: -task.job.stage.priority)  # stable: else in order
    running, left = dict[str, Task](), dict[str, float]()  # and their seconds to go
    begun, times = dict[str, float](), dict[str, tuple[float, float]]()
    now, gpus = 0.0, -(-at_once // share)
    while waiting or running:
        for task in list(waiting):
            room = sum(at_once if t.job.stage.alone else 1 for t in (*running.values(), task))
            if task.needs <= times.keys() and room <= at_once:
                waiting.remove(task)
                name = task.job.name
                running[name], left[name], begun[name] = task, task.seconds, now
        turns = max(1.0, sum(t.job.on_gpu for t in running.values()) / gpus)
        slower = {name: turns if task.job.on_gpu else 1.0 for name, task in running.items()}
        ended = min(running, key=lambda name: left[name] * slower[name])
        passed = left[ended] * slower[ended]
        now += passed
        left = {name: left[name] - passed / slower[name] for name in running if name != ended}
        del running[ended]
        times[ended] = begun[ended], now
    return times


@dataclass(frozen=True)
class Forecast:
    """Steps, seconds and bytes of an experiment's jobs."""

    experiment: Experiment
    device: torch.device
    count: int  # images of the dataset
    networks: Mapping[str, dict[str, Any]]  # as in cost.json, sparse too; `image_ms`: an image through one
    start: Mapping[str, float]  # seconds to the first line of work of a job that is `torch` or `light`
    encoded: float | None = None  # bytes of an image that stays encoded

    def horizon(self, search: str) -> int:
        """Steps after which a search ends at the latest; `final` adds none."""
        rule = self.experiment.searches.get(search)
        return rule.horizon * self.experiment.interval_steps(search, self.count) if rule else 0

    def stories(self, experts: Sequence[Expert]) -> list[dict[str, Any]]:
        """What decides the cost of experts' tickets: each is found at its search's horizon or where asked."""
        e, told = self.experiment, []
        for x in (x for x in experts if x.needs_ticket):
            asked = x.after is not None
            step = x.after * e.interval_steps(x.search, self.count) if asked else self.horizon(x.search)
            told.append({"search": x.search, "step": step})
        return told

    def mask_seconds(self, search: str) -> float:
        """A gradient criterion's masks of a search to its horizon: a backward pass at every timestep."""
        e, step = self.experiment, self.networks["dense"]["step_ms"] / 1e3
        intervals = 1 if search == FINAL else e.searches[search].horizon
        passes = intervals * e.diffusion.timesteps / e.pruning.stride
        return passes * min(e.pruning.images, self.count) / e.training.batch * step

    def masked(self, experts: Sequence[Expert]) -> dict[tuple[str, str, str], float]:
        """Seconds of the masks of experts' tickets, by search, criterion and weights."""
        ranked = [x for x in experts if x.needs_ticket and x.criterion in GRADIENT]
        return {(x.search, x.criterion, x.weights): self.mask_seconds(x.search) for x in ranked}

    def end(self, where: Mapping[str, str]) -> int:
        """The step at which a search or an expert's milestone ends, at most."""
        if "milestone" not in where:
            return self.horizon(where["search"])
        budget = Budget.of(where["milestone"])
        if budget is None:
            return int(where["milestone"])
        e, expert = self.experiment, self.experiment.experts()[where["expert"]]
        charged = places.charged(e, expert, budget)
        masks = sum(self.masked(charged).values())
        return budget_steps(e, expert, budget, self.networks, self.stories(charged), masks)

    def steps(self, job: Job) -> int:
        """The steps of an expert's training from the furthest of the states that it may go on from."""
        if places.is_given(self.experiment, job.where["expert"], job.where["milestone"]):
            return 0
        earlier = [self.end(maker(self.experiment, path).where) for path in job.continues]
        return self.end(job.where) - max((n for n in earlier if n <= self.end(job.where)), default=0)

    def tasks(self) -> list[Task]:
        """Every job, each after those it needs; several GPUs divide its work evenly."""
        found = []
        for job in jobs(self.experiment):
            verb, where, (seconds, size) = job.stage.verb, job.where, self.demand(job)
            taken = verb == "prune-per-epoch" and taken_while_training(where["search"], where["criterion"])
            devices = max(1, self.experiment.compute.gpus) if job.stage.spread else 1
            seconds = self.start["light" if taken or verb in LIGHT else "torch"] + seconds / devices
            found.append(Task(job, frozenset(n.name for n in job.needs), seconds, devices, size))
        return found

    def demand(self, job: Job) -> tuple[float, int]:
        """Seconds of a job's work on one device, and bytes that it leaves, at most; small ones left out."""
        e, where, networks = self.experiment, job.where, self.networks
        step = {name: network["step_ms"] / 1e3 for name, network in networks.items()}
        dense, pixels = networks["dense"]["params"], e.codec.image_bytes(e.dataset.items)
        shape, encoded = e.dataset.items.shape, e.codec.ENCODED
        coding = encoded * math.prod(shape[1:]) * ENCODING[self.device.type]
        latent = encoded * 4 * math.prod(e.items.shape)  # bytes, in float32
        search, per_image = e.searches.get(where.get("search", "")), INCEPTION[self.device.type]
        others = sum(protocol != "classifier" for protocol in e.evaluation.protocols)  # by Inception
        match job.stage.verb:
            case "prepare-data":
                return 0, int(self.count * ((self.encoded or pixels) + 8))  # and a label
            case "train-classifier":
                seen = pixels if pixels <= 3 * classifier.SMALL**2 else classifier.LARGE
                return CLASSIFIER * seen * classifier.EPOCHS * min(self.count, classifier.MOST), 0
            case "reference-stats":
                real, inside = min(e.evaluation.reference or self.count, self.count), inception.DIMENSION
                other = where["protocol"] != "classifier"
                return other * real * per_image, other * 4 * inside * (real + 2 * inside)
            case "train-first-stage":
                seen = autoencoder.steps_of(self.count, shape[1]) * autoencoder.BATCH
                return seen * math.prod(shape[1:]) * FIRST_STAGE[self.device.type], 0
            case "encode-latents":
                return self.count * coding, self.count * latent // 2
            case "measure-first-stage":
                return min(self.count, RECONSTRUCTED) * (2 * coding + others * per_image), 0
            case "measure-cost":
                calls = measure.steps_at_once(self.device) * (
                    measure.WARMUP + measure.ROUNDS[self.device.type]
                )
                sparse = {measure.timed_as(x): x.costs for x in e.sparse().values()}
                return calls * sum(step[name] for name in (*measure.rates(e), *sparse.values())), 0
            case "train-dense":
                kept = search.horizon if search.gradient_criteria else len(search.rates) * len(search.weights)
                kept = min(kept, search.horizon) + len(search.tickets_at)
                return self.end(where) * step["dense"], (STATE + 8 * kept) * dense
            case "prune-per-epoch" if where["criterion"] != "magnitude":
                return self.mask_seconds(where["search"]), 0
            case "select-eb-epoch":
                return 0, 4 * networks[str(layout.asked(where["rate"])[0])]["params"]
            case "finetune-region":
                name = e.experts()[where["expert"]].network
                return self.steps(job) * step[name], STATE * networks[name]["params"]
            case "sample":
                experts = e.runs[where["run"]].experts
                sampling = e.sampling_of(where["run"])
                at = visited(e.diffusion, sampling)
                each = [networks[x.network]["image_ms"] / 1e3 for x in experts]
                image = sampling.passes * len(at) * average_visited(each, [x.serve for x in experts], at)
                return e.sampling.images * (image + coding), e.sampling.images * (pixels + latent)
            case "fid":
                return others * e.sampling.images * per_image, 0
            case "tabulate":
                return PAGES, 0
        return 0, 0

    def run(self, name: str, tasks: Sequence[Task]) -> dict[str, Any]:
        """A run's steps, device seconds (what it shares counted in full), speed-ups over dense.iterations."""
        e, wanted, seconds = self.experiment, set[str](), 0.0
        for task in reversed(tasks):  # each before those it needs
            if task.job.name in wanted or (task.job.stage.verb, task.job.where.get("run")) == ("fid", name):
                wanted |= task.needs
                seconds += task.seconds * task.devices if "seed" in task.job.where else 0
        experts, dense = e.runs[name].experts, self.networks["dense"]["step_ms"]
        ends = [self.end({"expert": x.key, "milestone": str(x.iterations)}) for x in experts]
        costs = [n * (self.networks[x.costs]["step_ms"] / dense) for x, n in zip(experts, ends, strict=True)]
        before = search_steps(self.stories(experts)), self.masked(experts), dense
        found = speedups(e.runs[name].method, e.dense.iterations, costs, *waits(experts, *before))
        return {"seeds": len(e.seeds_of(name)), "steps": ends, "device_seconds": seconds, **found._asdict()}


def make(
    e: Experiment, device: torch.device, at_once: int | None, step_ms: float | None, images: int | None
) -> dict[str, Any]:
    """Predict what an experiment takes: what plan.json holds.

    What is None is found out: `at_once`, jobs at a time, as many as this machine has GPUs or cores for;
    `step_ms`, milliseconds of the unpruned network's training step, by measuring; `images` of the dataset.
    """
    count, networks = images or sources.count(e.dataset), measure.counts(e)
    sparse = measure.sparse_counts(e, networks)
    there = device if step_ms is None else torch.device("cuda")  # whose steps are stated is taken for a GPU
    gpu, share = device.type == "cuda", e.compute.share if there.type == "cuda" else 1
    room = available_bytes(device) // (share if gpu else 1)
    part = -(-e.training.batch // max(1, e.compute.gpus))
    start = {"torch": _start("training.train, ebdiff.metrics.evaluate"), "light": _start("tickets.history")}
    process = 0 if gpu else resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    for name, network in networks.items():
        bf16 = Runtime.of(e, "training", name, device).how.precision == "bf16"
        needs = footprint(e.architecture, meta_tensors(e.architecture, network["rate"]), bf16)
        network["peak_bytes"] = process + needs.bytes(min(part, e.compute.micro_batch or part))
        network["fits"] = needs.micro_batch(part, room - process) or 0
    pace = _time(e, networks, device, step_ms)
    own = torch.cuda.device_count() * share if gpu else len(os.sched_getaffinity(0))
    at_once = at_once or own // max(1, e.compute.gpus if gpu else e.compute.threads) or 1
    # Masked kernels are dense ones: a sparse step is planned at its network's own pace.
    sparse = {name: networks[n["network"]] | n for name, n in sparse.items()}
    every = every_network({"networks": networks, "sparse": sparse})
    encoded, decode_s = sources.encoded_image(e.dataset) or (None, 0)
    forecast = Forecast(e, there, count, every, start, encoded)
    tasks = forecast.tasks()
    times = schedule(tasks, at_once, share)
    plan = {
        "experiment": e.name, "device": device_name(device), "devices": at_once, "share": share, "pace": pace,
        "images": count, "searches": {name: forecast.horizon(name) for name in e.searches},
        "networks": networks, "runs": {name: forecast.run(name, tasks) for name in e.runs},
        "jobs": [{
            "benchmark": str(t.job.note("benchmarks", "tsv")), "kind": t.job.stage.verb, "bytes": t.size,
            "seconds": end - begin, "device_seconds": t.seconds * t.devices,
        } for t in tasks for begin, end in [times[t.job.name]]],
        "wall_seconds": max(end for _, end in times.values()), "disk_free": shutil.disk_usage(".").free,
        "disk_to_come": sum(t.size for t in tasks if not all(p.exists() for p in t.job.makes)),
        "memory_free": room, "decode_ms": 1e3 * decode_s, "digest": Job.of(e, "tabulate").digest,
    }  # fmt: skip
    return plan | {"warnings": list(warnings(e, plan, gpu))}


def _start(modules: str) -> float:
    """Seconds from starting a job to its first line of work."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import ebdiff.cli, ebdiff.{modules}"], check=True)
    return time.perf_counter() - began


def _time(e: Experiment, networks: dict[str, dict], device: torch.device, step_ms: float | None) -> str:
    """Add every network's times: by its MACs if `step_ms` is stated, else by some steps; how, in words.

    Where steps are measured, so is what bounds them.
    """
    if step_ms is not None:
        for network in networks.values():
            step = step_ms * network["macs"] / networks["dense"]["macs"]
            # A backward pass costs two forward passes.
            network |= {"step_ms": step, "spread_ms": 0.0, "image_ms": step / e.training.batch / 3}
        return f"stated: {step_ms:g} ms per unpruned step, other networks by their MACs"
    part = networks["dense"]["fits"] or 1
    if device.type == "cpu":
        part = min(part, max(1, int(MACS / networks["dense"]["macs"])))
    size, work = {"training": part, "sampling": min(part, e.sampling.batch)}, {}
    small = e.model_copy(update={u: getattr(e, u).model_copy(update={"batch": size[u]}) for u in size})
    for name, network in networks.items():
        for use, piece in (("training", measure.training_step), ("sampling", sampling_step)):
            built = measure.network_of(e, network["rate"])
            work[use, name] = piece(small, built, Runtime.of(e, use, name, device))
    step = 1e3 / measure.steps_at_once(device) * e.training.batch / part
    for (use, name), seconds in measure.interleaved(work, ROUNDS).items():
        low, middle, high = np.percentile(seconds, [25, 50, 75])
        if use == "training":
            networks[name] |= {"step_ms": step * middle, "spread_ms": step * (high - low)}
        else:
            networks[name]["image_ms"] = 1e3 * middle / size[use]
    measure.bound(e, networks, device)
    return f"measured on {ROUNDS} steps of {part} images"


def warnings(e: Experiment, plan: Mapping[str, Any], gpu: bool) -> Iterator[str]:
    """What will fail or disappoint, a sentence each."""
    networks, room, batch, many = plan["networks"], plan["memory_free"], e.training.batch, plan["devices"]
    name = max(networks, key=lambda n: networks[n]["peak_bytes"])
    most, fits = networks[name]["peak_bytes"], networks[name]["fits"]
    told = f"memory: {text.size(most)} for training the {name} network"
    if most > room:
        advice = f"compute.micro_batch: {fits} fits" if fits else "not even one image at a time fits"
        yield f"{told}, but {text.size(room)} are available here; {advice}"
    elif not gpu and most * many > room:
        fit = room // most
        yield f"{told}; {fit} of {many} at a time fit here, run with --cores {fit * e.compute.threads}"
    if not gpu and most > e.compute.mem_mb * 2**20:
        yield f"{told}, but compute.mem_mb asks a cluster for {e.compute.mem_mb} MB only"
    if plan["disk_to_come"] > plan["disk_free"]:
        yield f"disk: {text.size(plan['disk_to_come'])} to come, {text.size(plan['disk_free'])} free"
    if batch > (count := min(plan["images"], e.dataset.subset or plan["images"])):
        yield f"training.batch: {batch} images a step, but there are {count}: an epoch is one step"
    once = e.codec.ENCODED or (gpu and count * math.prod(e.dataset.items.shape) < RESIDENT * room)
    per_ms = batch * max(1, e.compute.gpus) / min(n["step_ms"] for n in networks.values())
    if (cores := len(os.sched_getaffinity(0)) / many) < per_ms * plan["decode_ms"] and not once:
        asked, decoded = f"{1e3 * per_ms:,.0f} images per second", 1e3 * cores / plan["decode_ms"]
        yield f"dataset.store: the fastest step takes {asked}, {cores:g} cores decode {decoded:,.0f}; try raw"
    longest = max((j for j in plan["jobs"] if "/seed" in j["benchmark"]), key=lambda j: j["seconds"])
    if longest["seconds"] > 60 * e.compute.runtime:
        takes = f"{longest['kind']} takes {text.duration(longest['seconds'])}"
        yield f"compute.runtime: {takes}, but asks a cluster for {e.compute.runtime} minutes"
    if scattered := [n for n, w in networks.items() if w["spread_ms"] > SCATTERED * w["step_ms"]]:
        yield f"step times scatter ({', '.join(scattered)}): what else runs here? Plan again when it is quiet"
    for (less, low), (more, high) in pairwise(networks.items()):  # from the unpruned one, rates ascend
        if abs(high["realised"] - high["rate"]) > FAR:
            yield f"rate {more}: the norm groups allow {high['realised']:.2f}"
        if low["rate"] and high["realised"] - low["realised"] < (high["rate"] - low["rate"]) / 2:
            gone = f"{low['realised']:.2f} and {high['realised']:.2f} of the channels go"
            yield f"rates {less} and {more}: nearly the same network, {gone}"
        if high["image_ms"] > SLOWER * low["image_ms"]:
            times = f"{text.number(high['image_ms'])} against {text.number(low['image_ms'])} ms"
            yield f"rate {more}: sampling is slower than with {less} ({times}), though more is pruned"
    yield from in_vain(networks)


def page(plan: Mapping[str, Any]) -> Iterator[str]:
    """The plan as people read it, paragraph by paragraph."""
    stages = pd.DataFrame(plan["jobs"]).assign(jobs=1).groupby("kind", sort=False).sum(numeric_only=True)
    yield f"{plan['experiment']} on {plan['device']}, {plan['images']:,} images; step times {plan['pace']}"
    bounded = {
        "GFLOP per step": ("operations", text.giga), "moves": ("bytes", text.size),
        "ms at least": ("bound_ms", text.number), "by": ("bound_by", str),
    }  # fmt: skip
    yield _table(plan["networks"], {
        "Rate": ("rate", "{:g}".format), "Realised": ("realised", "{:.3f}".format),
        "Params (M)": ("params", text.mega), "MACs (M)": ("macs", text.mega),
        **(bounded if "bound_ms" in plan["networks"]["dense"] else {}),
        "ms per step": ("step_ms", text.number), "per sampled image": ("image_ms", text.number),
        "Peak memory": ("peak_bytes", text.size), "Images that fit": ("fits", str),
    })  # fmt: skip
    yield _table(plan["runs"], {
        "Seeds": ("seeds", str), "Iterations": ("steps", lambda counts: " / ".join(map(str, counts))),
        "Device time": ("device_seconds", text.duration), "Speed-up as paper": ("as_paper", text.two),
        "with search": ("with_search", text.two), "by device time": ("device_time", text.two),
    })  # fmt: skip
    ends = ", ".join(f"{name} {steps} steps" for name, steps in plan["searches"].items())
    yield f"Searches go to their horizon ({ends}): times are at most, speed-ups with search at least these."
    yield _table(stages.to_dict("index"), {
        "Jobs": ("jobs", str), "Device time": ("device_seconds", text.duration), "Disk": ("bytes", text.size),
    })  # fmt: skip
    all_in, wall = text.duration(stages.device_seconds.sum()), text.duration(plan["wall_seconds"])
    many = text.plural(plan["devices"], "job") + " at a time"
    many += f", {plan['share']} to a GPU by turns" if plan["share"] > 1 else ""
    yield (
        f"Device time {all_in}, wall time {wall} with {many}; "
        f"disk {text.size(stages.bytes.sum())} at most, {text.size(plan['disk_free'])} free."
    )
    yield "\n".join(f"warning: {warning}" for warning in plan["warnings"]) or "Nothing speaks against it."


def _table(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, tuple[str, Callable]]) -> str:
    """Aligned columns, by heading (key of a row, value to text); each row begins with its name."""
    cells = {head: [show(row[key]) for row in rows.values()] for head, (key, show) in columns.items()}
    return pd.DataFrame(cells, index=list(rows)).to_string()
