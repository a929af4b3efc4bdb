"""The report's plain tables: tickets, searches, networks, checks on the samples, plan against actual."""

from __future__ import annotations

from collections.abc import Callable

from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.schema import FINAL
from ebdiff.report import notes, protocol, text
from ebdiff.report.facts import RunFacts
from ebdiff.report.render import Column, Table
from ebdiff.report.results import Results


def tables(results: Results) -> list[Table]:
    """Those of the five that have rows."""
    built = (_networks(results), _tickets(results), _searches(results), _samples(results), _plan(results))
    return [table for table in built if table is not None]


def _table(
    caption: str, columns: dict[str, Callable], rows: list, remarks: list[str] | None = None
) -> Table | None:
    """A plain table: heading -> text of a row; None without rows."""
    if not rows:
        return None
    built = tuple(Column(head, head, show, left=not i) for i, (head, show) in enumerate(columns.items()))
    values = [[column.value(row) for column in built] for row in rows]
    return Table(caption, built, values, [""] * len(rows), remarks or [])


def _tickets(results: Results) -> Table | None:
    """Every ticket that some run uses, once."""
    runs = [RunFacts(results, name) for name in results.experiment.runs]
    stories = {
        (s["search"], s["criterion"], s["weights"], s["rate"], s["seed"]): s
        for facts in runs for s in facts.tickets if s["search"] != FINAL
    }  # fmt: skip
    columns = {
        "Search": lambda s: s["search"],
        "Criterion": lambda s: s["criterion"],
        "Weights": lambda s: s["weights"],
        "Rate (%)": lambda s: text.percent(s["rate"]),
        "Realised (%)": lambda s: text.percent(s["realised"]),
        "Seed": lambda s: str(s["seed"]),
        "Ticket at": lambda s: f"{s['unit']} {s['interval']}" + ("" if s["settled"] else " †"),
        "Steps": lambda s: str(s["step"]),
        "To initial mask": lambda s: _distance(s, "to_initial"),
        "Chance": lambda s: f"{s['chance']:.3f}",
        "To last mask": lambda s: _distance(s, "to_last"),
        "Kind": lambda s: "drawn at random" if s["criterion"] == "random" else s["kind"],
    }
    return _table("Tickets", columns, [stories[k] for k in sorted(stories)], notes.unsettled(runs))


def _distance(story: dict, key: str) -> str:
    """A distance of the ticket's mask; a random ticket's story has those of the magnitude ticket."""
    unknown = story[key] is None or story["criterion"] == "random"
    return text.MISSING if unknown else f"{story[key]:.3f}"


def _searches(results: Results) -> Table | None:
    """What every search cost and why it stopped."""
    experiment, rows = results.experiment, []
    for name in experiment.runs:
        for seed in experiment.seeds_of(name):
            facts = RunFacts(results, name)
            rows += [(s, seed) for s in (results.attempt(facts.search_steps, seed) or {})]
    found = [
        (*row, results.attempt(lambda s, n: results.search_ledger(n, s), *row)) for row in sorted(set(rows))
    ]
    columns = {
        "Search": lambda r: r[0],
        "Span": lambda r: "{}-{}".format(*experiment.searches[r[0]].span),
        "Seed": lambda r: str(r[1]),
        "Stopped": lambda r: r[2]["stopped"],
        "Intervals": lambda r: f"{r[2]['intervals']} of {r[2]['horizon']}",
        "Steps": lambda r: str(r[2]["steps"]),
        "Seconds": lambda r: text.number(r[2]["seconds"]),
        "Peak memory (MB)": lambda r: text.number(r[2]["peak_mb"]),
    }
    return _table("Searches", columns, [r for r in found if r[2]])


def _networks(results: Results) -> Table | None:
    """Size and measured step time of every network."""
    cost = results.attempt(results.cost)
    if cost is None:
        return None
    dense = cost["networks"]["dense"]
    columns = {
        "Network": lambda r: "unpruned" if r is dense else f"{text.percent(r['rate'])} % pruned",
        "Realised (%)": lambda r: text.percent(r["realised"]),
        "Parameters": lambda r: f"{r['params']:,}",
        "MACs (M)": lambda r: text.mega(r["macs"]),
        "ms per step": lambda r: f"{r['step_ms']:.1f}",
        "quartile range (ms)": lambda r: f"{r['spread_ms']:.1f}",
        "Step time / unpruned": lambda r: text.two(r["step_ms"] / dense["step_ms"]),
        "MACs / unpruned": lambda r: text.two(r["macs"] / dense["macs"]),
    }
    remark = f"Batch {cost['batch']}, measured alone on the machine; MACs of one image by {cost['counter']}."
    return _table("Networks", columns, list(cost["networks"].values()), [remark])


def _samples(results: Results) -> Table | None:
    """Checks on the samples of every run, first seed; a column only where some run has it."""
    experiment, rows = results.experiment, []
    for name, run in experiment.runs.items():
        metrics = results.attempt(results.metrics, name, experiment.seeds_of(name)[0])
        rows += [(run.title, metrics)] if metrics else []
    name = protocol.shown(experiment).name
    optional = {
        f"{name} / noise's": _value(lambda m: m["fd"] / m["ceiling"]["fd"], "{:.3f}".format),
        "Confidence > 0.9 (%)": _value(lambda m: m["confident"], text.percent),
        "real images (%)": _value(lambda m: m["real_confident"], text.percent),
        "Rarest class (%)": _value(lambda m: min(m["class_shares"]), text.percent),
        **_other_protocols(experiment),
    }
    columns = {
        "Run": lambda r: r[0],
        name: lambda r: text.two(r[1]["fd"]),
        "KID": lambda r: text.number(r[1]["kid"]),
        **{head: show for head, show in optional.items() if any(show(r) != text.MISSING for r in rows)},
        "Images": lambda r: str(r[1]["images"]),
    }
    return _table("Checks on the samples, first seed", columns, rows)


def _plan(results: Results) -> Table | None:
    """Predicted and actual time of the jobs that ran, where a plan was made."""
    plan = results.plan()
    if plan is None:
        return None
    kinds: dict[str, list[tuple[float, float]]] = {}
    for job in plan["jobs"]:
        actual = results.job_seconds(job["benchmark"])
        if actual is not None:
            kinds.setdefault(job["kind"], []).append((job["seconds"], actual))
    rows = [(kind, len(pairs), *map(sum, zip(*pairs, strict=True))) for kind, pairs in kinds.items()]
    if rows:
        rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2, 3))))
    columns = {
        "Stage": lambda r: r[0],
        "Jobs": lambda r: str(r[1]),
        "Predicted": lambda r: text.duration(r[2]),
        "Actual": lambda r: text.duration(r[3]),
        "Predicted / actual": lambda r: text.two(r[2] / r[3]),
    }
    remark = (
        f"Job time as planned for {plan['device']} ({plan['pace']}) and by Snakemake's clock, a job's last "
        f"start alone; wall time was planned as {text.duration(plan['wall_seconds'])} with "
        f"{text.plural(plan['devices'], 'job')} at a time. Searches were planned to their horizon."
    )
    return _table("Plan against actual", columns, rows, [remark])


def _value(read: Callable[[dict], float | None], show: Callable[[float], str]) -> Callable[[tuple], str]:
    """A value of a run's metrics as text, or `–` where they don't hold it."""

    def column(row: tuple[str, dict]) -> str:
        try:
            value = read(row[1])
        except KeyError:
            return text.MISSING
        return text.MISSING if value is None else show(value)

    return column


def _other_protocols(experiment: Experiment) -> dict[str, Callable[[tuple], str]]:
    """Precision and recall of the shown protocol, and the distances of the others."""
    first, *others = experiment.evaluation.protocols
    columns = {
        "Precision": _value(lambda m: m["protocols"][first]["precision"], "{:.3f}".format),
        "Recall": _value(lambda m: m["protocols"][first]["recall"], "{:.3f}".format),
    }
    for other in others:
        name = protocol.MEASURES[other].name
        columns[name] = _value(lambda m, p=other: m["protocols"][p]["fd"], text.two)
        columns[f"KID ({name})"] = _value(lambda m, p=other: m["protocols"][p]["kid"], text.number)
    return columns
