"""The columns of every table: each says what it shows and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ebdiff.report import paper, text
from ebdiff.report.facts import RunFacts
from ebdiff.report.render import Column

_BLOCKS = {
    "unpruned": "Unpruned", "scratch": "Baseline", "finetune": "Baseline",
    "eb": "EB", "ta-eb": "TA-EB", "control": "Control",
}  # fmt: skip


def columns_of(table: str, rows: list[RunFacts]) -> tuple[Column, ...]:
    """The columns of a table; how many regions it shows depends on its rows."""
    macs = _macs(rows, "macs", "MACs", lambda f: f.macs)
    if table == "table1":
        criterion = replace(CRITERION, marked=True)
        return (RATE, criterion, REALISED, PARAMS, macs, CFD, TICKET, ITERATIONS, _fid(table), PAPER_TICKET)
    if table == "table3":
        return (TITLE, *_regions(rows), OVERLAP, CFD, _fid(table))
    if table == "table8":
        sampled = _macs(rows, "macs_visited", "As sampled", lambda f: f.macs_visited)
        paper_macs = _published(table, "paper_macs", "Paper\nMACs (G)", "average_macs_g_corrected", text.two)
        return (TITLE, RATE, *_rates(rows), macs, sampled, CFD, paper_macs, _fid(table))
    if table == "table9":
        return (TITLE, *_iterations(rows), CFD, PAPER_ITERATIONS, _fid(table))
    shared = (BLOCK, TITLE, CRITERION, RATE, PARAMS, macs, CFD, KID, ITERATIONS, *COSTS)
    if table == "controls":
        return shared
    return (
        *shared,
        _published(table, "paper_macs", "Paper\nMACs (G)", "macs_g_corrected", text.number),
        _fid(table),
        _published(table, "paper_speedup", "Paper\nspeed-up", "speedup", text.two),
    )


def _macs(rows: list[RunFacts], key: str, heading: str, value: Callable) -> Column:
    """MACs, in G as in the paper, or in M where the unpruned network has less than 0.1 G."""
    dense = rows[0].results.attempt(rows[0].results.network, "dense") if rows else None
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


def _fid(table: str) -> Column:
    return _published(table, "paper_fid", "Paper FID\n(CIFAR-10)", "fid", text.two)


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


def _all_iterations(facts: RunFacts) -> str | None:
    """Iterations of each of a run's experts; a range where seeds differ."""
    if not facts.iterations:
        return None
    per_expert = [text.span(steps) for steps in zip(*facts.iterations, strict=True)]
    if len(per_expert) > 1 and len(set(per_expert)) == 1:
        return f"{len(per_expert)} × {per_expert[0]}"
    return " / ".join(per_expert)


def _ticket_at(facts: RunFacts) -> str | None:
    """When the tickets were found: 0-based epochs, as the paper prints them, or the iteration."""
    if not facts.tickets:
        return None
    unit = facts.tickets[0]["unit"]
    return f"{text.span(s['step' if unit == 'iteration' else 'interval'] for s in facts.tickets)} ({unit})"


def _paper_ticket(facts: RunFacts) -> str | None:
    row = paper.published("table1", facts)
    return f"{row['ticket_at']} ({row['ticket_unit']})" if row else None


def _paper_iterations(facts: RunFacts) -> str | None:
    counts = paper.iterations(facts)
    return " / ".join(f"{n // 1000}K" for n in reversed(counts)) if counts else None


BLOCK = Column("block", "", lambda f: _BLOCKS[f.run.method], left=True)
TITLE = Column("run", "Run", lambda f: f.run.title, left=True, marked=True)
CRITERION = Column("criterion", "Criterion", lambda f: f.criterion, left=True)
RATE = Column("rate", "Rate\n(%)", lambda f: f.rate, text.percent)
REALISED = Column("realised_rate", "Realised\nrate (%)", lambda f: f.realised, text.percent)
PARAMS = Column("params", "Params\n(M)", lambda f: f.params, text.mega)
CFD = Column("cfd", "cFD", lambda f: f.quality, text.over_seeds(text.two))
KID = Column("kid", "KID", lambda f: f.kid, text.over_seeds(text.number))
TICKET = Column("ticket_at", "Ticket at", _ticket_at)
ITERATIONS = Column("iterations", "Iterations", _all_iterations)
OVERLAP = Column("overlap", "Overlap", lambda f: "yes" if f.overlaps else "no")
PAPER_TICKET = Column("paper_ticket_at", "Paper\nticket at", _paper_ticket, absent="")
PAPER_ITERATIONS = Column("paper_iterations", "Stands for\nthe paper's", _paper_iterations, absent="")
COSTS = (
    _speedup("speedup", "Speed-up\nas paper", "as_paper"),
    _speedup("speedup_with_search", "Speed-up\nwith search", "with_search"),
    _speedup("speedup_device_time", "Speed-up\ndevice time", "device_time"),
    _speedup("speedup_macs", "Speed-up\nby MACs", "as_paper", "macs_speedups"),
    Column("seconds", "Training\nseconds", lambda f: f.seconds, text.over_seeds(text.whole)),
)
