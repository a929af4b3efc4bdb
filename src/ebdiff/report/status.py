"""How far an experiment is: its jobs that are done, running and waiting, and when the whole will be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.jobs import Job, jobs
from ebdiff.experiment.records import Records, opened
from ebdiff.report import text
from ebdiff.report.results import Results, curve
from ebdiff.system.errors import Missing, Unusable
from ebdiff.system.files import held


def lines(experiment: Experiment) -> Iterator[str]:
    """What people read: a line for each kind of job, for each that runs, and for the whole."""
    records, found = Records(experiment), jobs(experiment)
    done = {job.name: _done(records, job) for job in found}
    running = [job for job in found if not done[job.name] and held(job.state)]
    there, all_of = Counter(j.stage.verb for j in found if done[j.name]), Counter(j.stage.verb for j in found)
    for verb, count in all_of.items():
        now = sum(job.stage.verb == verb for job in running)
        yield f"{verb:16} {there[verb]:4} of {count:4} done" + (f", {now} running" if now else "")
    for job in running:
        where = " ".join(value for key, value in job.where.items() if key != "experiment")
        yield f"running: {job.stage.verb} {where}{_so_far(job)}; log: {job.note('logs', 'log')}"
    yield f"{sum(done.values())} of {len(found)} jobs done" + _left(experiment, found, done, len(running))


def _done(records: Records, job: Job) -> bool:
    """Whether its outputs are there, and recorded for the settings of now; their content isn't read."""
    try:
        settings = opened(job.note("records", "json"))["settings"]
    except (Missing, Unusable):
        return False
    return settings == records.settings(job) and all(path.exists() for path in job.makes)


def _so_far(job: Job) -> str:
    """How far a training or a sampling is, by what it keeps beside its output."""
    folder = job.state
    if job.stage.verb == "sample" and (batches := list(folder.glob("*.npz"))):
        images, batch = job.experiment.sampling.images, job.experiment.sampling.batch
        return f", {min(images, len(batches) * batch)} of {images} images"
    try:
        *_, (step, loss, seconds) = curve(folder / "stats.jsonl")
    except (OSError, ValueError):  # none yet
        return ""
    until = job.where.get("milestone", "")
    told = f", step {step}" + (f" of {until}" if until.isdecimal() else "") + f", loss {loss:.4g}"
    if until.isdecimal() and step:
        told += f", {text.duration((int(until) - step) * seconds / step)} left"
    return told


def _left(experiment: Experiment, found: list[Job], done: dict[str, bool], running: int) -> str:
    """When the whole will be done: the plan's jobs to come, at the pace of those that were made here."""
    results = Results(experiment, partial=True)
    plan = results.plan()
    if plan is None:
        return f"; `ebdiff plan {experiment.name}` tells how long all takes"
    planned = {job["benchmark"]: job["seconds"] for job in plan["jobs"]}
    ours = [(job, b) for job in found if (b := str(job.note("benchmarks", "tsv"))) in planned]
    took = [(planned[b], s) for job, b in ours if done[job.name] and (s := results.job_seconds(b))]
    pace = sum(s for _, s in took) / sum(p for p, _ in took) if took else 1.0
    left = pace * sum(planned[b] for job, b in ours if not done[job.name])
    at_once = max(1, running or plan["devices"])
    if not left:
        return ""
    return f"; about {text.duration(left / at_once)} left with {text.plural(at_once, 'job')} at a time"
