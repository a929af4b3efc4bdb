"""Published values of the paper (CVPR 2025, arXiv 2504.09606), and which of our rows they belong to.

The numbers stand in `paper/table*.csv` as printed; where the paper contradicts itself a corrected
value stands beside, and `SLIPS` says why.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources

from ebdiff.report.facts import RunFacts

SLIPS = {
    "table4": (
        "The paper's Table 4 prints 3.4 G MACs in all rows; at 50 % its Table 1, and counting, give 1.5 G, "
        "which is shown.",
        "For its timestep-aware row at 30/60/80 % the paper's Table 4 prints FID 7.29; its Tables 3, 8 and 9 "
        "give 7.69, which is shown (7.29 is the 30/40/70 % row of Table 8). It prints 7.2 M parameters; "
        "the average over timesteps is 7.69 M.",
    ),
    "table8": (
        "The paper's Table 8 prints 1.57 G MACs for 30/40/90 %, repeating the row above; "
        "counting gives 1.47 G, which is shown.",
    ),
}  # fmt: skip

_REGIONS = ((0, 260), (240, 460), (440, 1000))
_SERVED = ((0, 240), (240, 440), (440, 1000))
_RATES = (0.3, 0.6, 0.8)
_BLOCKS = {
    "unpruned": "unpruned", "scratch": "baseline", "finetune": "baseline", "eb": "eb", "ta-eb": "ta-eb",
}  # fmt: skip


@cache
def rows(table: str) -> tuple[dict[str, str], ...]:
    """The rows of a published table, every value as text."""
    file = resources.files("ebdiff.report") / "paper" / f"{table}.csv"
    return tuple(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def published(table: str, facts: RunFacts) -> dict[str, str]:
    """The published row that is the same cell as a run; empty if there is none.

    A row is the same where method, criterion, pruning rates and spans agree, and, in Tables 3, 8
    and 9, the iterations that the experiment says stand for the paper's.
    """
    matchers = {
        "table1": _table1, "table3": _table3, "table4": _table4, "table8": _table8, "table9": _table9,
    }  # fmt: skip
    wanted = matchers[table](facts) if table in matchers else None
    if wanted is None:
        return {}
    found = [row for row in rows(table) if all(_same(row[k], v) for k, v in wanted.items())]
    return _corrected(table, found[0]) if found else {}


def iterations(facts: RunFacts) -> tuple[int, ...] | None:
    """The paper's iterations that each expert's stand for; None if the experiment doesn't say."""
    stand_for = facts.results.experiment.published.expert_iterations
    counts = [stand_for.get(n) if isinstance(n := e.iterations, int) else None for e in facts.experts]
    known = tuple(n for n in counts if n is not None)
    return known if len(known) == len(counts) else None


def _corrected(table: str, row: dict[str, str]) -> dict[str, str]:
    if table == "table4" and row["method"] == "magnitude" and row["block"] == "ta-eb":
        (same,) = (r for r in rows("table8") if _same(r["average_rate"], 0.64))
        return {**row, "fid": same["fid"]}
    return row


def _same(printed: str, wanted: str | float) -> bool:
    return printed == wanted if isinstance(wanted, str) else float(printed) == round(wanted, 6)


def _scaled(facts: RunFacts, spans: tuple) -> bool:
    """Whether the experts' spans are these of the paper, scaled to our number of timesteps."""
    share = facts.results.experiment.diffusion.timesteps / 1000
    return [e.span for e in facts.experts] == [(round(lo * share), round(hi * share)) for lo, hi in spans]


def _timestep_aware(facts: RunFacts, spans: tuple = _REGIONS) -> bool:
    """Whether a run is the paper's TA-EB: three magnitude tickets on its regions."""
    return facts.run.method == "ta-eb" and facts.criterion == "magnitude" and _scaled(facts, spans)


def _trained_200k(facts: RunFacts) -> bool:
    return iterations(facts) in (None, (200_000,) * 3)


def _table1(facts: RunFacts) -> dict | None:
    if facts.run.method != "eb":
        return None
    return {"nominal_rate": facts.rate, "criterion": facts.criterion}


def _table3(facts: RunFacts) -> dict | None:
    for overlap, spans in (("yes", _REGIONS), ("no", _SERVED)):
        if _timestep_aware(facts, spans) and facts.rates == _RATES and _trained_200k(facts):
            return {"overlap": overlap}
    return None


def _table4(facts: RunFacts) -> dict | None:
    method = facts.run.method
    if method not in _BLOCKS:
        return None
    if method == "ta-eb":
        whole = _timestep_aware(facts) and facts.rates == _RATES and _trained_200k(facts)
        return {"block": "ta-eb"} if whole else None
    kind = method if method in ("unpruned", "scratch") else facts.criterion
    return {"block": _BLOCKS[method], "method": kind, "nominal_rate": facts.rate}


def _table8(facts: RunFacts) -> dict | None:
    if not (_timestep_aware(facts) and _trained_200k(facts)):
        return None
    return dict(zip(("rate1", "rate2", "rate3"), facts.rates, strict=True))


def _table9(facts: RunFacts) -> dict | None:
    counts = iterations(facts)
    if counts is None or not _timestep_aware(facts) or facts.rates != _RATES:
        return None
    keys = ("iterations_rate30", "iterations_rate60", "iterations_rate80")
    return dict(zip(keys, counts, strict=True))
