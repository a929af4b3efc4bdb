"""The columns of every table: each says what it shows and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ebdiff.experiment.experiment import Experiment
from ebdiff.report import paper, protocol, text
from ebdiff.report.facts import RunFacts
from ebdiff.report.render import Column
from ebdiff.report.results import Results

_BLOCKS = {
    "unpruned": "Unpruned", "scratch": "Baseline", "finetune": "Baseline",
    "eb": "EB", "ta-eb": "TA-EB", "control": "Control",
}  # fmt: skip


def columns_of(results: Results, table: str, rows: list[RunFacts]) -> tuple[Column, ...]:
    """The columns of a table; how many regions it shows depends on its rows."""
    experiment = results.experiment
    macs = _macs(results, "macs", "MACs", lambda f: f.macs)
    quality, fid = _quality(experiment), _fid(table, experiment)
    stand_for = (PAPER_ITERATIONS,) if paper.shortened(experiment) else ()
    if table in ("table1", "table2"):
        criterion = replace(CRITERION, marked=True)
        shown = (RATE, criterion, REALISED, PARAMS, macs, quality, TICKET, ITERATIONS)
        return (*shown, *(stand_for if table == "table2" else ()), *fid, _paper_ticket(table))
    if table == "table3":
        return (TITLE, *_regions(rows), OVERLAP, quality, *fid)
    if table == "table7":
        speedup = _paper_speedup(table, experiment)
        return (RATE_BLOCK, TITLE, LAW, PARAMS, macs, quality, KID, ITERATIONS, *COSTS, *fid, *speedup)
    if table == "table8":
        sampled = _macs(results, "macs_visited", "As sampled", lambda f: f.macs_visited)
        paper_macs = _published(table, "paper_macs", "Paper\nMACs (G)", "average_macs_g_corrected", text.two)
        return (TITLE, RATE, *_rates(rows), macs, sampled, quality, paper_macs, *fid)
    if table == "table9":
        return (TITLE, *_iterations(rows), quality, *stand_for, *fid)
    shared = (BLOCK, TITLE, CRITERION, RATE, PARAMS, macs, quality, KID, ITERATIONS)
    if table == "controls":
        return (*shared, *COSTS)
    counted = "macs_g_per_sample" if table == "table6" else "macs_g_corrected"
    return (
        *shared,
        *(stand_for if table == "table6" else ()),
        *COSTS,
        _published(table, "paper_macs", "Paper\nMACs (G)", counted, text.number),
        *fid,
        *_paper_speedup(table, experiment),
    )


def _quality(experiment: Experiment) -> Column:
    """The Fréchet distance under its protocol's name."""
    measure = protocol.shown(experiment)
    return Column(measure.key, measure.name, lambda f: f.quality, text.over_seeds(text.two))


def _macs(results: Results, key: str, heading: str, value: Callable) -> Column:
    """MACs, in G as in the paper, or in M where the unpruned network has less than 0.1 G."""
    dense = results.attempt(results.network, "dense")
    if dense and dense["macs"] < 1e8:
        return Column(key, f"{heading}\n(M)", value, text.mega)
    return Column(key, f"{heading}\n(G)", value, text.giga)


def _speedup(key: str, heading: str, which: str, source: str = "speedups") -> Column:
    """One way of counting the speed-up."""

    def value(facts: RunFacts) -> tuple[float, ...]:
        return tuple(getattr(s, which) for s in getattr(facts, source))

    return Column(key, heading, value, text.over_seeds(text.two))


def _published(table: str, key: str, heading: str, column: str, show: Callable) -> Column:
    """A published value of the row that is the same cell; blank where there is none."""

    def value(facts: RunFacts) -> float | None:
        row = paper.published(table, facts)
        return float(row[column]) if row else None

    return Column(key, heading, value, show, absent="")


def _difference(table: str, key: str, heading: str, column: str, ours: Callable) -> Column:
    """Ours minus the published value, seed by seed; blank where there is none."""

    def value(facts: RunFacts) -> tuple[float, ...] | None:
        row = paper.published(table, facts)
        return tuple(v - float(row[column]) for v in ours(facts)) if row else None

    return Column(key, heading, value, text.over_seeds(text.signed), absent="")


def _fid(table: str, experiment: Experiment) -> tuple[Column, ...]:
    """The paper's FID and, where ours is of the same kind, how far ours is from it."""
    name = paper.NAMES[experiment.published.dataset]
    printed = _published(table, "paper_fid", f"Paper FID\n({name})", "fid", text.two)
    if not protocol.comparable(experiment):
        return (printed,)
    return printed, _difference(table, "fid_difference", "Difference\nin FID", "fid", lambda f: f.quality)


def _paper_speedup(table: str, experiment: Experiment) -> tuple[Column, ...]:
    """The paper's speed-up and, where FID is comparable, how far ours is from it."""
    printed = _published(table, "paper_speedup", "Paper\nspeed-up", "speedup", text.two)
    if not protocol.comparable(experiment):
        return (printed,)

    def ours(facts: RunFacts) -> list[float]:
        return [s.as_paper for s in facts.speedups]

    return printed, _difference(table, "speedup_difference", "Difference\nin speed-up", "speedup", ours)


def _per_expert(rows: list[RunFacts], column: Callable[[int], Column]) -> list[Column]:
    return [column(i) for i in range(max((len(f.experts) for f in rows), default=0))]


def _regions(rows: list[RunFacts]) -> list[Column]:
    """The timesteps each expert trains on, as the paper prints them."""

    def region(i: int) -> Column:
        def value(facts: RunFacts) -> str | None:
            return "{}-{}".format(*facts.experts[i].span) if i < len(facts.experts) else None

        return Column(f"region{i + 1}", f"Region {i + 1}", value, absent="")

    return _per_expert(rows, region)


def _rates(rows: list[RunFacts]) -> list[Column]:
    """The asked rate of each expert."""

    def rate(i: int) -> Column:
        def value(facts: RunFacts) -> float | None:
            return facts.rates[i] if i < len(facts.rates) else None

        return Column(f"rate{i + 1}", f"Rate {i + 1}\n(%)", value, text.percent, absent="")

    return _per_expert(rows, rate)


def _iterations(rows: list[RunFacts]) -> list[Column]:
    """Iterations of each expert, the most pruned one first, as the paper prints them."""

    def iterations(i: int) -> Column:
        def value(facts: RunFacts) -> str | None:
            at = len(facts.experts) - 1 - i
            return text.span(steps[at] for steps in facts.iterations) if at >= 0 else None

        rates = {f.rates[-1 - i] for f in rows if i < len(f.rates)}
        heading = f"Iterations\nat {text.span(sorted(rates), text.percent)} %"
        return Column(f"iterations{i + 1}", heading, value, absent="")

    return _per_expert(rows, iterations)


def _per_network(counts: list[str]) -> str:
    """Something of each of a run's experts, once if it is the same for all."""
    if len(counts) > 1 and len(set(counts)) == 1:
        return f"{len(counts)} × {counts[0]}"
    return " / ".join(counts)


def _all_iterations(facts: RunFacts) -> str | None:
    """Iterations of each of a run's experts; a range where seeds differ."""
    if not facts.iterations:
        return None
    return _per_network([text.span(steps) for steps in zip(*facts.iterations, strict=True)])


def _ticket_at(facts: RunFacts) -> str | None:
    """When the tickets were found: 0-based epochs, as the paper prints them, or the iteration."""
    if not facts.tickets:
        return None
    unit = facts.tickets[0]["unit"]
    return f"{text.span(s['step' if unit == 'iteration' else 'interval'] for s in facts.tickets)} ({unit})"


def _paper_ticket(table: str) -> Column:
    """When the paper found the ticket."""

    def value(facts: RunFacts) -> str | None:
        row = paper.published(table, facts)
        return f"{row['ticket_at']} ({row['ticket_unit']})" if row else None

    return Column("paper_ticket_at", "Paper\nticket at", value, absent="")


def _paper_iterations(facts: RunFacts) -> str | None:
    """The paper's iterations, the most pruned expert first, as its Table 9 prints them."""
    counts = paper.iterations(facts)
    return _per_network([f"{round(n / 1000)}K" for n in reversed(counts)]) if counts else None


def _rate_block(facts: RunFacts) -> str:
    if not facts.rate:
        return "Unpruned"
    return f"{text.percent(facts.rate)} %" + (" on average" if len(facts.experts) > 1 else "")


BLOCK = Column("block", "", lambda f: _BLOCKS[f.run.method], left=True)
RATE_BLOCK = Column("block", "", _rate_block, left=True)
LAW = Column("law", "Timesteps", lambda f: {"speed": "SpeeD"}.get(f.law, f.law), left=True)
TITLE = Column("run", "Run", lambda f: f.run.title, left=True, marked=True)
CRITERION = Column("criterion", "Criterion", lambda f: f.criterion, left=True)
RATE = Column("rate", "Rate\n(%)", lambda f: f.rate, text.percent)
REALISED = Column("realised_rate", "Realised\nrate (%)", lambda f: f.realised, text.percent)
PARAMS = Column("params", "Params\n(M)", lambda f: f.params, text.mega)
KID = Column("kid", "KID", lambda f: f.kid, text.over_seeds(text.number))
TICKET = Column("ticket_at", "Ticket at", _ticket_at)
ITERATIONS = Column("iterations", "Iterations", _all_iterations)
OVERLAP = Column("overlap", "Overlap", lambda f: "yes" if f.overlaps else "no")
PAPER_ITERATIONS = Column("paper_iterations", "Stands for\nthe paper's", _paper_iterations, absent="")
SPEEDUPS = (
    _speedup("speedup", "Speed-up\nas paper", "as_paper"),
    _speedup("speedup_with_search", "Speed-up\nwith search", "with_search"),
    _speedup("speedup_device_time", "Speed-up\ndevice time", "device_time"),
    _speedup("speedup_macs", "Speed-up\nby MACs", "as_paper", "macs_speedups"),
)
COSTS = (
    *SPEEDUPS,
    Column("seconds", "Training\nseconds", lambda f: f.seconds, text.over_seeds(text.whole)),
)
