"""What tables and figures show of an experiment."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.schema import FINAL

DPI = 240
WEIGHTS = ("ema", "raw")  # compared in Figure 2b

Panel = tuple[str, str, str, float]  # search, criterion, weights, rate


@cache
def data(name: str) -> dict[str, Any]:
    """A YAML file of this room."""
    return yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8"))


def plotted_runs(experiment: Experiment) -> tuple[str, ...]:
    """The runs of Figures 1 and 1b: the rows of Table 4, 5 or 6; else all that are sampled as usual."""
    asked = (experiment.tables.get(table) for table in ("table4", "table5", "table6"))
    usual = tuple(name for name, run in experiment.runs.items() if not run.sampling)
    return next(filter(None, asked), usual)


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
        for weights in experiment.weights_of(name, criterion)
        for rate in search.rates
    ]


def expert_searches(experiment: Experiment) -> list[Panel]:
    """The panels of Figure 4: tickets of timestep-aware runs."""
    aware = [e for run in experiment.runs.values() if run.method == "ta-eb" for e in run.experts]
    drawn = [e for e in aware if e.needs_ticket and e.search != FINAL and e.criterion != "random"]
    return sorted({(e.search, e.criterion, e.weights, e.rate) for e in drawn if e.rate is not None})
