"""What tables and figures show of an experiment. Light to import: the stages ask it too."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.runs import Expert
from ebdiff.experiment.schema import FINAL

FIGURES = ("figure1", "figure1b", "figure2", "figure2b", "figure3", "figure4", "figure5", "losses")
DPI = 160
WEIGHTS = ("ema", "raw")  # compared in Figure 2b

Matrix = tuple[str, str, str]  # search, criterion, weights
Panel = tuple[str, str, str, float]  # and rate


@cache
def data(name: str) -> dict[str, Any]:
    """A YAML file of this room."""
    return yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8"))


def plotted_runs(experiment: Experiment) -> tuple[str, ...]:
    """The runs of Figures 1 and 1b: the rows of Table 4, 5 or 6, or every run where none is asked."""
    asked = (experiment.tables.get(table) for table in ("table4", "table5", "table6"))
    return next(filter(None, asked), tuple(experiment.runs))


def unpruned(experiment: Experiment, names: Iterable[str]) -> Expert | None:
    """The unpruned network that the speed-ups of a table's runs are over.

    It is the first among them, or else the experiment's: Table 7 counts over a shorter one than Table 4.
    """
    for name in names:
        run = experiment.runs[name]
        if run.method == "unpruned" and isinstance(run.experts[0].iterations, int):
            return run.experts[0]
    return experiment.final_expert


def timestep_aware_run(experiment: Experiment) -> str | None:
    """The timestep-aware run that Figure 3 draws: the first, in Figure 1's order."""
    names = (*plotted_runs(experiment), *experiment.runs)
    return next((name for name in names if experiment.runs[name].method == "ta-eb"), None)


def shown_searches(experiment: Experiment) -> list[Panel]:
    """The panels of Figure 2: searches over all timesteps."""
    return [
        (name, criterion, weights, rate)
        for name, search in experiment.searches.items()
        if search.span == (0, experiment.diffusion.timesteps)
        for criterion in search.criteria
        for weights in search.weights
        for rate in search.rates
    ]


def expert_searches(experiment: Experiment) -> list[Panel]:
    """The panels of Figure 4: tickets of timestep-aware runs."""
    aware = [e for run in experiment.runs.values() if run.method == "ta-eb" for e in run.experts]
    drawn = [e for e in aware if e.needs_ticket and e.search != FINAL and e.criterion != "random"]
    return sorted({(e.search, e.criterion, e.weights, e.rate) for e in drawn if e.rate is not None})


def matrices(experiment: Experiment) -> list[Matrix]:
    """The distance matrices that Figures 2, 2b and 4 show, of the first seed."""
    both = [(search, "magnitude", weights) for search in experiment.searches for weights in WEIGHTS]
    panels = (*shown_searches(experiment), *expert_searches(experiment))
    return list(dict.fromkeys([*both, *(panel[:3] for panel in panels)]))
