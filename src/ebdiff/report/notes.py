"""What stands below the tables."""

from __future__ import annotations

from ebdiff.report import paper, text
from ebdiff.report.facts import RunFacts
from ebdiff.report.results import Results

_COUNTED = "Params and MACs (of one image) are counted by torch-pruning's counter."
_SPEEDUPS = (
    "Speed-ups are over the unpruned run and use step times measured alone on this machine. "
    "As paper: the ticket search is not counted and experts train side by side. With search: the search is "
    "counted. Device time: the search and every expert are summed. By MACs: as paper, if a step's time "
    "followed its MACs. Scratch and finetune are charged the unpruned training. "
    "Training seconds are what the ledgers say was really spent, search included."
)


def marks(facts: RunFacts, rows: list[RunFacts]) -> str:
    """What points from a row to its notes: † for an unsettled ticket, [a] for a remark."""
    letter = _letters(rows).get(facts.run.note or "", "")
    return ("†" if facts.unsettled else "") + letter


def of_table(results: Results, table: str, rows: list[RunFacts]) -> list[str]:
    """The notes of a table, in order of reading."""
    found = quality(results, rows)
    found.append(_seeds(rows))
    if table in ("table1", "table4", "table8", "controls"):
        found.append(_COUNTED)
    if table in ("table4", "controls"):
        found.append(_SPEEDUPS)
    if table == "table1":
        found.append("Ticket at: intervals count from 0, as in the paper; iterations are optimiser steps.")
    if table == "table8":
        found.append("As sampled: MACs averaged over the timesteps that the sampler really visits.")
    found += [f"{letter} {note}" for note, letter in _letters(rows).items()]
    found += unsettled(rows)
    if table != "controls":
        found.append(
            "Paper FID (CIFAR-10): published values, another dataset and another metric than cFD; "
            "shown where the cell is the same."
        )
        found += [results.experiment.published.note] if results.experiment.published.note else []
        found += _slips(table, rows)
    return found


def quality(results: Results, rows: list[RunFacts]) -> list[str]:
    """What cFD is, with its floor and ceiling; from the first metrics that are there."""
    for facts in rows:
        for seed in facts.seeds:
            metrics = results.attempt(results.metrics, facts.name, seed)
            if metrics is not None:
                return [
                    f"cFD: {metrics['distance_name']} between {metrics['images']} samples and "
                    f"{metrics['reference_images']} real images, in the features of a small classifier "
                    f"(held-out accuracy {metrics['classifier_accuracy']:.3f}); KID in the same features. "
                    "It can't be compared with values of other features. For scale: real images against "
                    f"real images {metrics['floor']['fd']:.2f}, noise {metrics['ceiling']['fd']:.0f}."
                ]
    return []


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
    return list(paper.SLIPS.get(table, ())) if shown else []
