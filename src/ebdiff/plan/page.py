"""The plan as people read it."""

from __future__ import annotations

from collections.abc import Iterator

from ebdiff.experiment.runs import Expert
from ebdiff.plan.prediction import Plan
from ebdiff.report import text
from ebdiff.report.facts import RunFacts
from ebdiff.report.render import Column, Table, to_text
from ebdiff.report.tables import SPEEDUPS
from ebdiff.system.devices import device_name

# What jobs leave on disk, in words.
LEFT = {
    "prepare-data": "images", "reference-stats": "reference features", "train-dense": "searches",
    "prune-per-epoch": "masks", "hamming-matrix": "distances", "select-eb-epoch": "tickets",
    "finetune-region": "trained states", "sample": "samples", "running": "states of running jobs",
}  # fmt: skip


def page(plan: Plan) -> Iterator[str]:
    """The plan, paragraph by paragraph."""
    times, experiment = plan.times, plan.experiment
    many = text.plural(times.devices, "job") + " at a time"
    yield f"{experiment.name} on {device_name(plan.device)}, {many}; step times: {times.pace.told}"
    yield to_text(_experts(plan))
    yield to_text(_runs(plan))
    yield to_text(_kinds(plan))
    total, gpus = sum(map(times.device_seconds, times.jobs)), experiment.compute.gpus
    spread = f" A job of {gpus} GPUs is taken to be {gpus} times as fast as one of 1." if gpus > 1 else ""
    yield (
        f"Device time {text.duration(total)} ({total / 3600:.2f} device hours), "
        f"wall time {text.duration(times.wall)} with {many}.{spread}"
    )
    sizes = ", ".join(f"{LEFT[verb]} {text.size(size)}" for verb, size in plan.disk.items())
    free = text.size(plan.disk_free)
    yield f"Disk {text.size(sum(plan.disk.values()))} at most: {sizes}; {free} free."
    yield "\n".join(f"warning: {warning}" for warning in plan.warnings) or "Nothing speaks against it."


def _table(caption: str, columns: list[Column], rows: list, notes: list[str], grouped: bool = False) -> Table:
    values = [[column.value(row) for column in columns] for row in rows]
    return Table(caption, tuple(columns), values, [""] * len(rows), notes, grouped)


def _experts(plan: Plan) -> Table:
    """What every run trains."""
    expected = plan.times.expected

    def network(row: tuple[str, Expert]) -> dict:
        return plan.networks[row[1].network]

    def iterations(row: tuple[str, Expert]) -> str:
        steps = expected.steps(row[1].key, str(row[1].iterations))
        return f"{steps}" if isinstance(row[1].iterations, int) else f"at most {steps}"

    unit, show = ("M", text.mega) if plan.networks["dense"]["macs"] < 1e8 else ("G", text.giga)
    shown = [
        Column("run", "Run", lambda r: r[0], left=True),
        Column("expert", "Expert", lambda r: r[1].key, left=True),
        Column("rate", "Asked (%)", lambda r: network(r)["rate"], text.percent),
        Column("realised", "Realised (%)", lambda r: network(r)["realised"], text.percent),
        Column("params", "Params (M)", lambda r: network(r)["params"], text.mega),
        Column("macs", f"MACs ({unit})", lambda r: network(r)["macs"], show),
        Column("iterations", "Iterations", iterations),
        Column("step", "ms per step", lambda r: network(r)["step_ms"], text.number),
        Column("memory", "Peak memory", lambda r: plan.memory[r[1].network], text.size),
    ]
    rows = [(name, e) for name, facts in plan.facts.items() for e in facts.experts]
    return _table("Experts", shown, rows, [], grouped=True)


def _runs(plan: Plan) -> Table:
    """What every run takes, and the cost columns of Table 4."""
    times = plan.times

    def memory(facts: RunFacts) -> int:
        """Of the largest network that it trains, its searches' included."""
        searched = ["dense" for e in facts.experts if e.needs_ticket]
        return max(plan.memory[name] for name in (*searched, *(e.network for e in facts.experts)))

    shown = [
        Column("run", "Run", lambda f: f.name, left=True),
        Column("seeds", "Seeds", lambda f: len(f.seeds)),
        Column("hours", "Device time", lambda f: times.of_run(f.name), text.duration),
        Column("memory", "Peak memory", memory, text.size),
        *SPEEDUPS,
    ]
    horizons = {n: times.expected.horizon(n) for n in plan.experiment.searches}
    searches = ", ".join(f"{name} {steps} steps" for name, steps in horizons.items())
    note = (
        f"Searches are taken to their horizon ({searches}): device time is at most, speed-ups with search "
        "are at least this. A run's device time counts in full what it shares with others; speed-ups are "
        f"over {plan.experiment.dense.iterations} unpruned steps."
    )
    return _table("Runs", shown, list(plan.facts.values()), [note])


def _kinds(plan: Plan) -> Table:
    """Where the time goes, everything shared counted once."""
    seconds, jobs = {}, {}
    for job in plan.times.jobs:
        kind, taken = plan.times.kind(job), plan.times.device_seconds(job)
        seconds[kind], jobs[kind] = seconds.get(kind, 0) + taken, jobs.get(kind, 0) + 1
    shown = [
        Column("kind", "Stage", lambda k: k, left=True),
        Column("jobs", "Jobs", lambda k: jobs[k]),
        Column("seconds", "Device time", lambda k: seconds[k], text.duration),
    ]
    return _table("Time", shown, list(seconds), [])
