"""The paper's tables with our numbers, published ones beside them. `tables.yaml` says what each shows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from ebdiff.experiment import layout, places
from ebdiff.experiment.experiment import Experiment
from ebdiff.report import notes, published, text
from ebdiff.report.facts import RunFacts, baseline, of_table, paired, ratios
from ebdiff.report.render import Column, Table, to_csv, to_markdown, to_tex
from ebdiff.report.results import Results
from ebdiff.report.significance import SEEDS, Mean
from ebdiff.system.files import write_json, write_text

_BLOCKS = {
    "unpruned": "Unpruned", "scratch": "Baseline", "finetune": "Baseline",
    "eb": "EB", "ta-eb": "TA-EB", "sparse": "Sparse", "control": "Control",
}  # fmt: skip
_Blank = partial(Column, absent="")
_Beside = partial(_Blank, beside=True)
_PAPER_MACS = {"table6": "macs_g_per_sample", "table8": "average_macs_g"}  # else macs_g


def write(results: Results, tables: Iterable[str], folder: Path) -> list[Path]:
    """Write `.csv`, `.md` and `.tex` of some tables, and `protocol.json`: how their numbers were measured."""
    written = []
    for table in tables:
        built = build(results, table)
        for extension, render in (("csv", to_csv), ("md", to_markdown), ("tex", to_tex)):
            written.append(folder / f"{table}.{extension}")
            write_text(written[-1], render(built))
    written.append(folder / "protocol.json")
    write_json(written[-1], notes.protocols(RunFacts(results, name) for name in results.experiment.runs))
    return written


def build(results: Results, table: str) -> Table:
    """Fill a table of the experiment: from the seeds that all its rows have, where there are such.

    The rows of `sparse` keep theirs: each is compared with the unpruned one alone, seed by seed.
    Bold is the lowest mean of the rows whose tickets settled, where all of these have as many seeds.
    """
    rows, told = of_table(results, table), notes.data("tables.yaml")
    common = [seed for seed in rows[0].seeds if all(seed in facts.seeds for facts in rows)]
    if common and table != "sparse":
        rows = [facts.of_seeds(*common) for facts in rows]
    offered = {column.key: column for column in _columns(results, table, rows)}
    quality = notes.measure(results.experiment).key
    order = told["columns"][table].replace("quality", quality).split()
    columns = tuple(c for word in order for key, c in offered.items() if fnmatch(key, word))
    values = [[results.attempt(column.value, facts) for column in columns] for facts in rows]
    bold = set()
    for k in (k for k, column in enumerate(columns) if column.key in (quality, "kid")):
        settled = {i: row[k] for i, row in enumerate(values) if row[k] and not rows[i].unsettled}
        means = {i: statistics.fmean(seeds) for i, seeds in settled.items()}
        if len(means) > 1 and len(set(map(len, settled.values()))) == 1:
            bold |= {(i, k) for i, mean in means.items() if mean == min(means.values())}
    below = notes.of_table(results, table, rows, [column.key for column in columns], bool(bold))
    if results.partial:
        target = results.path(layout.TABLE, table=table, ext="csv")
        below.append(f"So far: what shows {text.MISSING} is filled by `snakemake --cores all {target}`.")
    below += [f"Left out: {line}." for line in results.left_out]
    caption = f"{told['captions'][table]} ({results.experiment.dataset.name})"
    marks = [notes.marks(facts, rows) for facts in rows]
    return Table(caption, columns, values, marks, below, columns[0].key == "block", frozenset(bold))


def _columns(results: Results, table: str, rows: list[RunFacts]) -> Iterator[Column]:
    """Every column that a table of these runs may have."""
    measure, dense = notes.measure(results.experiment), results.attempt(results.network, "dense")
    # In G as in the paper, or in M where the unpruned network has less than 0.1 G.
    unit, macs = ("M", text.mega) if dense and dense["macs"] < 1e8 else ("G", text.giga)
    block = _rate_block if table == "table7" else lambda f: _BLOCKS[f.run.method]
    yield Column("block", "", block, left=True)
    yield Column("run", "Run", lambda f: f.run.title, left=True, marked=True)
    yield Column("criterion", "Criterion", lambda f: f.criterion, left=True, marked=True)
    yield Column("law", "Timesteps\ndrawn by", lambda f: "SpeeD" if f.law == "speed" else f.law, left=True)
    yield Column("rate", "Pruning\nrate (%)", lambda f: f.rate, text.percent)
    if any(f.sparsity for f in rows):
        yield Column("sparsity", "Sparsity\n(%)", lambda f: f.sparsity, text.percent)
    yield Column("realised_rate", "Realised\nrate (%)", lambda f: f.average("realised"), text.percent)
    yield Column("params", "Params\n(M)", lambda f: f.average("params"), text.mega)
    yield Column("macs", f"MACs\n({unit})", lambda f: f.average("macs"), macs)
    yield Column("flops", f"Inference\nFLOPs ({unit})", lambda f: 2 * f.average("macs"), macs)
    yield Column("training_flops", f"Training\nFLOPs ({unit})", lambda f: f.average("training_flops"), macs)
    yield Column("step_ms", "Training\nstep (ms)", lambda f: f.average("step_ms"), text.number)
    yield Column("macs_visited", f"MACs ({unit})\nas sampled", lambda f: f.macs_visited, macs)
    if any(f.run.sampling for f in rows):
        yield Column("evaluations", "Sampling\nsteps", lambda f: len(f.visited))
        yield Column(
            "image_macs", f"MACs per\nimage ({unit})", lambda f: f.evaluations * f.macs_visited, macs
        )
    yield Column(measure.key, measure.name, lambda f: f.quality, text.over_seeds(text.two))
    yield Column(
        f"{measure.key}_at_floor",
        f"{measure.name} at\nfloor's size",
        lambda f: tuple(end["fd"] for end in f.metric("at_floor")),
        text.over_seeds(text.two),
    )
    if unpruned := next((f for f in rows if f.run.method == "unpruned"), None):
        yield Column("vs_unpruned", "Minus\nunpruned's", partial(_minus, b=unpruned), difference, absent="")
    yield Column("kid", "KID", lambda f: f.metric("kid"), text.over_seeds(text.number))
    if results.experiment.items.classes and "classifier" in results.experiment.evaluation.protocols:
        yield Column(
            "agreement", "Class\nagreement", lambda f: f.metric("agreement"), text.over_seeds(text.three)
        )
    yield Column("ticket_at", "Ticket\nfound at", _ticket_at)
    if places.finished(results.experiment):
        yield Column(
            "to_final", "Distance to\nfinished mask", lambda f: f.to_final, text.over_seeds(text.three)
        )
    yield Column("iterations", "Training\niterations", _iterations)
    yield Column("overlap", "Regions\noverlap", lambda f: "yes" if f.overlaps else "no")
    yield Column("seconds", "Training\nseconds", lambda f: f.seconds, text.over_seeds(text.whole))
    for key, how, way, unit in (
        ("speedup", "as in paper", "as_paper", "step_ms"),
        ("speedup_with_search", "with search", "with_search", "step_ms"),
        ("speedup_device_time", "in device time", "device_time", "step_ms"),
        ("speedup_macs", "by MACs", "as_paper", "training_flops"),
    ):
        value = partial(_speedup, way=way, unit=unit)
        yield Column(key, f"Speed-up\n{how}", value, text.over_seeds(text.two))
    for method in ("scratch", "finetune"):
        if base := baseline(rows, method):
            ours, theirs = partial(_over, base=base), partial(_said_over, table=table, method=method)
            yield _Beside(f"vs_{method}", f"Speed-up\nover {method}", ours, text.over_seeds(text.two))
            yield _Beside(f"paper_vs_{method}", f"Paper's\nover {method}", theirs, text.two)
    for i in range(max(len(f.experts) for f in rows)):
        yield from _of_expert(i, rows)
    if any(published.row(results.experiment, table, f.name) for f in rows):
        yield from _published(results.experiment, table)


def _speedup(facts: RunFacts, way: str, unit: str) -> tuple[float, ...]:
    return tuple(getattr(found, way) for found in facts.speedups(unit))


def _over(facts: RunFacts, base: RunFacts) -> tuple[float, ...] | None:
    """How many times faster an early-bird run is than a baseline, as the paper counts."""
    return ratios(facts, base, "as_paper") if facts.run.method in ("eb", "ta-eb") else None


def _said_over(facts: RunFacts, table: str, method: str) -> float | None:
    """What the paper's text says of that."""
    said = published.ratio(facts.results.experiment, table, facts.name, method)
    return published.number(said, "printed")


def _of_expert(i: int, rows: list[RunFacts]) -> Iterator[Column]:
    """The i-th expert's span and rate, and, as in the paper, the iterations of the i-th most pruned one."""

    def of(read: Callable[[RunFacts], Any]) -> Callable[[RunFacts], Any]:
        return lambda f: read(f) if i < len(f.experts) else None

    n, rates = i + 1, sorted({f.rates[-1 - i] for f in rows if i < len(f.rates)})
    span = of(lambda f: "{}-{}".format(*f.experts[i].span))
    steps = of(lambda f: text.span(each[-1 - i] for each in f.iterations))
    yield _Blank(f"region{n}", f"Region {n}\n(timesteps)", span)
    yield _Blank(f"rate{n}", f"Rate of\nregion {n} (%)", of(lambda f: f.rates[i]), text.percent)
    yield _Blank(f"iterations{n}", f"Iterations\nat {text.span(rates, text.percent)} %", steps)


def _published(experiment: Experiment, table: str) -> Iterator[Column]:
    """Values of the cells that runs stand beside, blank where there is none; and ours minus those."""

    def row(facts: RunFacts) -> published.Row:
        return published.row(experiment, table, facts.name)

    def printed(key: str, heading: str, of: str, show: Callable[[float], str]) -> Column:
        return _Beside(key, heading, lambda f: published.both(row(f), of), lambda both: both.text(show))

    def apart(key: str, heading: str, of: str, ours: Callable[[RunFacts], Iterable[float]]) -> Column:
        def minus(facts: RunFacts) -> tuple[float, ...] | None:
            theirs = published.number(row(facts), of)
            return None if theirs is None else tuple(value - theirs for value in ours(facts))

        return _Beside(key, heading, minus, text.over_seeds(text.signed))

    def ticket_at(facts: RunFacts) -> str | None:
        return "{ticket_at} ({ticket_unit})".format(**found) if (found := row(facts)) else None

    def iterations(facts: RunFacts) -> str:
        """The most pruned expert first, as Table 9 prints them."""
        counts = published.iterations(row(facts), len(facts.experts))
        return _per_network([f"{n // 1000}K" for n in reversed(counts)])

    yield printed("paper_macs", "Paper\nMACs (G)", _PAPER_MACS.get(table, "macs_g"), text.number)
    name = published.NAMES[experiment.published.dataset]
    yield printed("paper_fid", f"Paper FID\n({name})", "fid", text.two)
    deviation = partial(published.number, column="fid_std")
    yield _Beside("paper_fid_std", "Paper FID's\ndeviation", lambda f: deviation(row(f)), text.two)
    yield printed("paper_speedup", "Paper\nspeed-up", "speedup", text.two)
    yield _Beside("paper_ticket_at", "Paper\nticket at", ticket_at)
    if published.scale(experiment) != 1:
        yield _Beside("paper_iterations", "Paper\niterations", iterations)
    if notes.comparable(experiment):
        yield apart("fid_difference", "FID minus\npaper's", "fid", lambda f: f.quality)
        speedup = partial(_speedup, way="as_paper", unit="step_ms")
        yield apart("speedup_difference", "Speed-up\nminus paper's", "speedup", speedup)


def _minus(a: RunFacts, b: RunFacts) -> tuple[float, ...] | None:
    """The differences of two runs' distances, for each seed that both have; None of a run to itself."""
    return None if a is b else tuple(x - y for x, y in paired(a, b, lambda facts: facts.quality))


def difference(values: Sequence[float]) -> str:
    """A mean difference with its 95 % interval, where there are seeds enough to decide something."""
    if len(values) < SEEDS:
        return text.over_seeds(text.signed)(values)
    mean = Mean.of(values)
    return f"{text.signed(mean.value)} ({' to '.join(map(text.signed, mean.interval))})"


def _per_network(counts: list[str]) -> str:
    """Something of each of a run's experts, once if it is the same for all."""
    return f"{len(counts)} × {counts[0]}" if len(counts) > len(set(counts)) == 1 else " / ".join(counts)


def _iterations(facts: RunFacts) -> str | None:
    """Iterations of each of a run's experts; a range where seeds differ."""
    return _per_network([text.span(steps) for steps in zip(*facts.iterations, strict=True)]) or None


def _ticket_at(facts: RunFacts) -> str | None:
    """When the tickets were found: 0-based epochs, as the paper prints them, the iteration, or as asked."""
    if not facts.tickets:
        return None
    unit, asked = facts.tickets[0]["unit"], facts.tickets[0]["settled"] is None
    key = "step" if unit == "iteration" else "intervals_completed" if asked else "interval"
    return f"{'after ' if asked else ''}{text.span(s[key] for s in facts.tickets)} ({unit})"


def _rate_block(facts: RunFacts) -> str:
    """The block of Table 7."""
    average = " on average" if len(facts.experts) > 1 else ""
    return f"{text.percent(facts.rate)} %{average}" if facts.rate else "Unpruned"
