"""What stands below the tables."""

from __future__ import annotations

from ebdiff.report import paper, protocol, slips, text
from ebdiff.report.facts import RunFacts
from ebdiff.report.results import Results

_COUNTED = "Params and MACs (of one image) are counted by torch-pruning's counter."
_SPEEDUPS = (
    "Speed-ups are over the table's unpruned run and use step times measured alone on this machine. "
    "As paper: the ticket search is not counted and experts train side by side. With search: each expert "
    "waits for its own search, searches side by side. Device time: every search and expert is summed. "
    "By MACs: as paper, if a step's time followed its MACs. Scratch and finetune are charged the unpruned "
    "training. Computing gradient criteria is not counted. "
    "Training seconds are what the ledgers say was really spent on all devices, search included."
)


def marks(facts: RunFacts, rows: list[RunFacts]) -> str:
    """What points from a row to its notes: † unsettled ticket, ‡ too few images, [a] remark."""
    letter = _letters(rows).get(facts.run.note or "", "")
    few = protocol.MARK if facts.ill_conditioned else ""
    return ("†" if facts.unsettled else "") + few + letter


def of_table(results: Results, table: str, rows: list[RunFacts]) -> list[str]:
    """The notes of a table, in order of reading."""
    found = protocol.notes(results, rows)
    found.append(_seeds(rows))
    if table not in ("table3", "table9"):
        found.append(_COUNTED)
    if table in ("table4", "table5", "table6", "table7", "controls"):
        found.append(_SPEEDUPS)
    if table in ("table1", "table2"):
        found.append("Ticket at: intervals count from 0, as in the paper; iterations are optimiser steps.")
    if table == "table8":
        found.append("As sampled: MACs averaged over the timesteps that the sampler really visits.")
    found += [f"{letter} {note}" for note, letter in _letters(rows).items()]
    found += unsettled(rows)
    if table != "controls":
        found += protocol.published_notes(results)
        found += [results.experiment.published.note] if results.experiment.published.note else []
        found += _slips(table, rows)
    return found


def unsettled(rows: list[RunFacts]) -> list[str]:
    """One line for each ticket that was cut before it had settled."""
    return list(dict.fromkeys(_unsettled(story) for facts in rows for story in facts.unsettled))


def _unsettled(story: dict) -> str:
    last = ", ".join(f"{distance:.3f}" for distance in story["last_distances"])
    return (
        f"† Not settled at its horizon: search {story['search']}, {story['criterion']}, "
        f"rate {text.percent(story['rate'])} %, seed {story['seed']}; last distances {last}, "
        f"threshold {story['threshold']:g}."
    )


def _seeds(rows: list[RunFacts]) -> str:
    counts = {len(f.seeds) for f in rows}
    if counts == {1}:
        return "One seed: the numbers carry no spread, so differences between rows may be chance."
    listed = text.plural(max(counts), "seed") if len(counts) == 1 else f"{text.span(counts)} seeds"
    return (
        f"Mean ± sample standard deviation over {listed}; a number without ± is from one seed, "
        "or the same for all."
    )


def _letters(rows: list[RunFacts]) -> dict[str, str]:
    """Run notes in order of appearance and the letter each goes by."""
    remarks = dict.fromkeys(f.run.note for f in rows if f.run.note)
    return {note: f"[{_letter(i)}]" for i, note in enumerate(remarks)}


def _letter(index: int) -> str:
    """a, b, ... z, then a1, b1, ..."""
    return chr(ord("a") + index % 26) + (str(index // 26) if index >= 26 else "")


def _slips(table: str, rows: list[RunFacts]) -> list[str]:
    """The paper's slips, where the published values they concern are shown."""
    shown = any(paper.published(table, facts) for facts in rows)
    return list(slips.SLIPS.get(table, ())) if shown else []
