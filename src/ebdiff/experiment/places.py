"""Which file a thing of an experiment is: snapshots, tickets, checkpoints, paths given by the user."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.runs import Budget, Expert
from ebdiff.experiment.schema import FINAL, GRADIENT
from ebdiff.system.errors import UserError


def final_path(e: Experiment, seed: int | str) -> Path:
    """The finished unpruned network, which the search `final` reads."""
    where = dict(experiment=e.name, seed=seed, milestone=e.dense.iterations)
    return layout.path(layout.MILESTONE, expert=e.final_expert.key, **where)


def snapshots(e: Experiment, search: str, seed: int | str) -> Path:
    """The snapshots of a search: a folder, or for `final` the unpruned network's last milestone."""
    if search == FINAL:
        return final_path(e, seed)
    return layout.path(layout.SNAPSHOTS, experiment=e.name, seed=seed, search=search)


def snapshot(e: Experiment, search: str, seed: int | str, interval: int) -> Path:
    """Weights at the end of an interval (0-based) of a search, or before the first (`INITIAL`)."""
    if search == FINAL:
        return final_path(e, seed)
    where = dict(experiment=e.name, seed=seed, search=search)
    return layout.path(layout.SNAPSHOT, interval=layout.weights_at(interval), **where)


def ticket_of(e: Experiment, expert: Expert, template: str, seed: int | str) -> Path:
    """A file of the ticket that an expert starts from."""
    ticket = {k: getattr(expert, k) for k in ("search", "criterion", "weights")}
    return layout.path(template, experiment=e.name, seed=seed, rate=expert.ticket, **ticket)


def charged(e: Experiment, expert: Expert, budget: Budget) -> tuple[Expert, ...]:
    """Those whose tickets' searches a budget is charged: the other run's experts, or the expert itself."""
    return e.runs[budget.run].experts if budget.run else (expert,)


def stories(e: Experiment, experts: Iterable[Expert], seed: int | str) -> list[Path]:
    """The stories of the tickets that experts start from."""
    return [ticket_of(e, x, layout.STORY, seed) for x in experts if x.needs_ticket]


def mask_ledgers(e: Experiment, experts: Iterable[Expert], seed: int | str) -> list[Path]:
    """What the masks of experts' tickets cost beside the searches' training: those of gradient criteria."""
    ranked = [x for x in experts if x.needs_ticket and x.criterion in GRADIENT]
    return [ticket_of(e, x, layout.MASKS_LEDGER, seed) for x in ranked]


def finished(e: Experiment) -> Expert | None:
    """The finished unpruned network where it is its search, trained on: no public checkpoint."""
    final = e.final_expert
    return final if final is not None and goes_on(e, final) else None


def masks_beside(e: Experiment, seed: int, search: str, criterion: str, weights: str) -> list[Path]:
    """The file of masks that a ticket's is among, and that of the finished network's own.

    Neither where a ticket has no finished network to be compared with: it is drawn at random, its search is
    another than the one that the unpruned network goes on from, or its seed isn't trained to the end.
    """
    final = finished(e)
    trained = any(final in run.experts and seed in e.seeds_of(name) for name, run in e.runs.items())
    if not trained or search != e.dense.search or criterion == "random":
        return []
    ticket = dict(experiment=e.name, seed=seed, criterion=criterion, weights=weights)
    return [layout.path(layout.MASKS, search=s, **ticket) for s in (search, FINAL)]


def is_given(e: Experiment, key: str, milestone: str) -> bool:
    """Whether a milestone is the public checkpoint of `dense.from`, with nothing to train."""
    unpruned = e.experts()[key].continues_search
    return bool(e.dense.source) and unpruned and milestone == str(e.dense.iterations)


def goes_on(e: Experiment, expert: Expert) -> bool:
    """Whether an expert goes on where its search stopped, rather than from a public checkpoint or afresh."""
    return expert.continues_search and not e.dense.source


def unpruned(e: Experiment, names: Iterable[str]) -> Expert | None:
    """The unpruned network that the speed-ups of a table's runs are over.

    It is the first among them, or else the experiment's: Table 7 counts over a shorter one than Table 4.
    """
    for name in names:
        run = e.runs[name]
        if run.method == "unpruned" and isinstance(run.experts[0].iterations, int):
            return run.experts[0]
    return e.final_expert


def checkpoint(e: Experiment) -> Path:
    """The public checkpoint of `dense.from`.

    Raises:
        UserError: nothing is left of it, or the workflow can't take its name.
    """
    found = given(e.dense.source, "dense.from")
    if found is None:
        raise UserError(f"dense.from: nothing is left of {e.dense.source!r}")
    if {"{", "}"} & set(str(found)):
        raise UserError(f"dense.from: {str(found)!r}: rename it, the workflow takes braces for wildcards")
    return found


def given(path: str, key: str) -> Path | None:
    """A path of the experiment, `~`, `${VARIABLE}` and `${VARIABLE:-default}` filled in; None if empty.

    Messages name the `key` at which it stands.

    Raises:
        UserError: a variable without default isn't set, there is no such home, or it is a pipe, which would
            be waited for, or a device, which never ends.
    """

    def value(match: re.Match) -> str:
        found = os.environ.get(match["name"]) or match["default"]
        if found is None:
            raise UserError(
                f"{key}: the environment variable {match['name']} is not set; "
                f"export {match['name']}=/where/it/is, or write the path itself"
            )
        return found

    filled = re.sub(r"\$\{(?P<name>\w+)(:-(?P<default>[^}]*))?\}", value, path)
    try:
        found = Path(filled).expanduser() if filled else None
    except RuntimeError as error:
        raise UserError(f"{key}: {path!r}: {error}") from None
    if found and found.exists() and not (found.is_file() or found.is_dir()):
        raise UserError(f"{key}: {path!r} is neither a file nor a folder")
    return found
