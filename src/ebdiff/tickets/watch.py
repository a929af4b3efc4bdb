"""What looks in on a search: masks after every interval, and when the tickets have settled."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.schema import INITIAL, Search
from ebdiff.nets import store
from ebdiff.pruning.graph import trace
from ebdiff.pruning.importance import magnitude
from ebdiff.pruning.select import Selector
from ebdiff.system import parallel
from ebdiff.tickets.history import History, settled
from ebdiff.training.hooks import Hook
from ebdiff.training.state import State

KINDS = ("raw", "ema")


class Watch(Hook):
    """Takes the magnitude masks after every interval and says when the search is over.

    Both raw and averaged weights are watched, whichever gives the tickets: together they tell a
    learned ticket from one that a slow average merely hasn't left yet.

    Args:
        experiment: of the network.
        search: the rule, the rates and the horizon.
        every: steps of an interval.
        snapshots: where weights are kept for which a ticket may ask.
        device: where masks are taken.
    """

    def __init__(
        self, experiment: Experiment, search: Search, every: int, snapshots: Path, device: torch.device
    ):
        self.every = every
        self.architecture, self.search, self.snapshots = experiment.architecture, search, snapshots
        groups = trace(experiment.architecture)
        self.selector = Selector(groups, search.rates, device)
        self.histories = {kind: History.empty(search.rates, groups) for kind in KINDS}
        self.first_settled: dict[tuple[str, float], int] = {}

    def masks(self, state: State, kind: str) -> np.ndarray:
        """Packed masks of all rates: (R, bytes)."""
        return np.packbits(self.selector(magnitude(state.view(kind))), axis=1)

    def begin(self, state: State) -> None:
        """Record what is initial, or take up the masks that travelled with a resumed state."""
        for kind, history in self.histories.items():
            if state.step == 0:
                history.initial = self.masks(state, kind)
            else:
                history.initial = state.extra[f"watch.{kind}.initial"].numpy()
                history.masks = list(state.extra[f"watch.{kind}.masks"].numpy())
        if state.step == 0 and 0 in self.search.tickets_at and parallel.first():
            self._save_snapshot(state, INITIAL)
        for interval in range(len(self.histories["raw"].masks)):
            self._settle(interval)

    def carry(self) -> dict[str, Tensor]:
        """The masks so far: (R, bytes) initial ones, and (intervals, R, bytes)."""
        return {
            f"watch.{kind}.{name}": torch.from_numpy(history.arrays()[name])
            for kind, history in self.histories.items()
            for name in ("initial", "masks")
        }

    def _settle(self, interval: int) -> bool:
        """Note which tickets settle at an interval; whether any did."""
        new, window = False, self.search.window
        for kind in self.search.weights:
            history = self.histories[kind]
            for rate in self.search.rates:
                masks = history.of_rate(rate, max(0, interval + 1 - window), interval + 1)
                rule = (history.length, window, self.search.threshold)
                if (kind, rate) not in self.first_settled and settled(masks, *rule):
                    self.first_settled[kind, rate] = interval
                    if parallel.first():
                        print(f"ticket: rate {rate} ({kind}) settled at interval {interval}", flush=True)
                    new = True
        return new

    def interval(self, state: State) -> bool:
        """Masks, a snapshot where a ticket may need one, and whether to stop."""
        for kind, history in self.histories.items():
            history.masks.append(self.masks(state, kind))
        completed, asked = len(self.histories["raw"].masks), self.search.tickets_at
        new = self._settle(completed - 1)
        all_settled = len(self.first_settled) == len(self.search.weights) * len(self.search.rates)
        at_horizon = completed == self.search.horizon
        wanted = self.search.gradient_criteria or new or (at_horizon and not all_settled)
        if (wanted or completed in asked) and parallel.first():
            self._save_snapshot(state, completed - 1)
        if self.search.gradient_criteria or not all_settled:
            return at_horizon
        watched = max(self.first_settled.values()) + 1 + self.search.watch
        return at_horizon or completed >= max([watched, *asked])

    def publish(self, folder: Path) -> None:
        """Put the snapshots under their final name; the kept ones stay until everything is written."""
        shutil.rmtree(folder, ignore_errors=True)
        temporary = folder.with_name(f".{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(self.snapshots, temporary, copy_function=os.link)
        os.replace(temporary, folder)

    def _save_snapshot(self, state: State, interval: int) -> None:
        tensors = {f"{kind}.{n}": t for kind in KINDS for n, t in state.view(kind).items()}
        tensors |= store.buffers(state.network)
        story = {"step": state.step, "interval": interval}
        path = self.snapshots / Path(layout.SNAPSHOT).name.format(interval=layout.weights_at(interval))
        store.save(path, tensors, self.architecture, story)
