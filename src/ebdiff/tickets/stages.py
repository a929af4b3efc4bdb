"""From snapshots to tickets: masks of every interval, their distances, the network cut out.

One function per verb: `prune_per_epoch`, `select_eb_epoch`; what needs no torch is in `history.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ebdiff.cost.accounting import LEARNED
from ebdiff.data.dataset import Batch, open_dataset
from ebdiff.diffusion.process import Process
from ebdiff.experiment import layout, places
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.records import Work
from ebdiff.experiment.schema import FINAL, INITIAL
from ebdiff.experiment.stages import taken_while_training
from ebdiff.nets import store
from ebdiff.pruning.count import count
from ebdiff.pruning.graph import trace
from ebdiff.pruning.importance import Scores, accumulate_gradients, first_order, magnitude
from ebdiff.pruning.select import Selector, realised_rate, select_random, widths
from ebdiff.pruning.surgery import cut
from ebdiff.system.draws import generator
from ebdiff.system.files import read_json, write_json
from ebdiff.system.ledger import ledger
from ebdiff.tickets.history import (
    History,
    chance,
    first_settled,
    interval_steps,
    last_distances,
    load_history,
    save_histories,
    take_masks,
)


def prune_per_epoch(
    experiment: Experiment, search: str, criterion: str, weights: str, seed: int, device: torch.device
) -> None:
    """Masks of all intervals of a search under one criterion (verb `prune-per-epoch`).

    Magnitude masks were taken while training and are only selected here; Taylor and Diff-Pruning
    are computed from the snapshots; `final` is a history of one.
    """
    if taken_while_training(search, criterion):
        return take_masks(experiment, search, weights, seed)
    where = dict(seed=seed, search=search, criterion=criterion, weights=weights)
    work = Work(experiment, "prune-per-epoch", **where)
    groups = trace(experiment.architecture)
    began = time.perf_counter()
    history = History.empty(tuple(experiment.rates_of(search)), groups)
    selector = Selector(groups, history.rates, device)
    for scores in _scores(experiment, search, criterion, weights, seed, device):
        history.masks.append(np.packbits(selector(scores), axis=1))
    save_histories(work.path(layout.MASKS), {weights: history})
    seconds = round(time.perf_counter() - began, 3)
    entry = ledger(device, **where, seconds=seconds, masks=len(history.masks) * len(history.rates))
    write_json(work.path(layout.MASKS_LEDGER), entry)
    work.end()


def _scores(
    experiment: Experiment, search: str, criterion: str, weights: str, seed: int, device: torch.device
) -> Iterator[Scores]:
    """Channel scores of every snapshot of a search, in order."""
    where = dict(experiment=experiment.name, seed=seed, search=search)
    taken = layout.path(layout.DENSE_MASKS, **where)  # one mask an interval, and one snapshot
    intervals = 1 if search == FINAL else len(load_history(taken, weights).masks)
    if criterion != "magnitude":
        items, noise = _fixed_batch(experiment, seed, device)
    for interval in range(intervals):
        path = places.snapshot(experiment, search, seed, interval)
        tensors, architecture, _ = store.load(path, f"{weights}.")
        if criterion == "magnitude":
            yield magnitude({name: t.to(device) for name, t in tensors.items()})
            continue
        network = store.build(architecture, tensors).to(device)
        gradients, used = accumulate_gradients(
            network,
            items,
            noise,
            Process(experiment.diffusion),
            experiment.pruning,
            stop_early=criterion == "diff-pruning",
            micro_batch=experiment.compute.micro_batch,
        )
        print(f"{criterion}: interval {interval + 1} of {intervals}, {used} timesteps", flush=True)
        yield first_order(network, gradients)


def _fixed_batch(experiment: Experiment, seed: int, device: torch.device) -> tuple[Batch, torch.Tensor]:
    """One batch of items and one noise tensor for all timesteps and intervals (Diff-Pruning)."""
    dataset = open_dataset(experiment)
    size = min(experiment.pruning.images, len(dataset))
    chosen = np.sort(generator(seed, "pruning/images").choice(len(dataset), size, replace=False))
    items = dataset.batch(dataset.at(chosen), device)
    noise = generator(seed, "pruning/noise").standard_normal(items.x0.shape, np.float32)
    return items, torch.from_numpy(noise).to(device)


def select_eb_epoch(
    experiment: Experiment,
    search: str,
    criterion: str,
    weights: str,
    rate: float,
    seed: int,
    after: int | None = None,
) -> dict[str, Any]:
    """Draw a ticket: the first settled mask and the network cut from that interval's weights.

    A search that hasn't settled at its horizon gives its last mask, marked `settled: false`. A
    random ticket is cut at the magnitude ticket's interval, with a mask drawn from (seed, rate).
    Where it is told `after` how many intervals a ticket is cut, the rule has no say (`settled: null`):
    the control that tells what waiting for the rule is worth.

    Returns:
        the ticket's story, as written to its JSON.
    """
    where = dict(seed=seed, search=search, criterion=criterion, weights=weights, rate=rate)
    work = Work(experiment, "select-eb-epoch", **{**where, "rate": layout.ticket(rate, after)})
    groups = trace(experiment.architecture)
    if criterion == "random":
        rng = generator(seed, f"ticket/random/{search}/{weights}/{rate}")
        mask, found = select_random(groups, rng, rate), _final_story()
        if after is not None:
            found = _cut_at(experiment, search, after - 1)
        elif search != FINAL:
            magnitude_story = read_json(work.path(layout.STORY, criterion="magnitude"))
            found = {key: magnitude_story[key] for key in found}
        if search != FINAL:
            found |= {"to_initial": None, "to_last": None, "kind": "drawn at random"}
    else:
        history = load_history(work.path(layout.MASKS), weights, groups)
        mask, found = _apply_rule(experiment, search, history, rate, after)

    path = places.snapshot(experiment, search, seed, found["interval"])
    tensors, architecture, source = store.load(path, f"{weights}.")
    smaller = cut(architecture, tensors, mask)
    params, macs, _ = count(architecture, smaller)
    story = {
        **where,
        "realised": realised_rate(mask),
        **found,
        "step": source["step"],
        "chance": chance(mask, [g.width for g in groups]),
        "params": params,
        "macs": macs,
        "widths": widths(groups, mask),
    }
    store.save(work.path(layout.TICKET), smaller, architecture, story)
    write_json(work.path(layout.STORY), story)
    work.end()
    return story


def _final_story() -> dict[str, Any]:
    """What is known of a ticket of the finished network."""
    return {
        "settled": True,
        "interval": 0,
        "intervals_completed": 1,
        "unit": "training",
        "interval_steps": None,
        "window": None,
        "threshold": None,
        "last_distances": [],
        "to_initial": None,
        "to_last": None,
        "kind": "finished network",
    }


def _cut_at(experiment: Experiment, search: str, interval: int) -> dict[str, Any]:
    """What is known of any ticket of a search that is cut at an interval (0-based)."""
    rule = experiment.searches[search]
    return {
        "settled": None,
        "interval": interval,
        "intervals_completed": interval + 1,
        "unit": rule.interval.unit,
        "interval_steps": interval_steps(experiment, search),
        "window": rule.window,
        "threshold": rule.threshold,
        "last_distances": [],
    }


def _apply_rule(
    experiment: Experiment, search: str, history: History, rate: float, after: int | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """The ticket's mask and what the rule, unless it is told where to cut, and its controls say of it."""
    if search == FINAL:
        return history.mask(rate, 0), _final_story()
    rule, masks = experiment.searches[search], history.of_rate(rate)
    found = first_settled(masks, history.length, rule.window, rule.threshold)
    interval = after - 1 if after is not None else len(masks) - 1 if found is None else found
    story = _cut_at(experiment, search, interval)
    if after is None:
        story["settled"] = found is not None
        story["last_distances"] = last_distances(masks[: interval + 1], history.length, rule.window).tolist()
    mask, known = history.mask(rate, interval), history.initial is not None
    to_initial = float(np.mean(mask != history.mask(rate, INITIAL))) if known else None
    learned = known and to_initial >= LEARNED * chance(mask, history.widths)
    return mask, story | {
        "to_initial": to_initial,
        "to_last": float(np.mean(mask != history.mask(rate, len(masks) - 1))),
        "kind": ("learned" if learned else "near its initialisation") if known else "unknown",
    }
