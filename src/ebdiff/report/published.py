"""What the paper printed for the cells that our runs stand beside."""

from __future__ import annotations

from ebdiff.experiment import paper
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.paper import Row
from ebdiff.report.render import Corrected

NAMES = {
    "cifar10": "CIFAR-10", "celeba": "CelebA", "lsun_church": "LSUN church", "lsun_bedroom": "LSUN bedroom",
    "imagenet": "ImageNet",
}  # fmt: skip
IMAGES = 50_000  # samples per run
SEARCHED = (0.005, 0.025)  # of all iterations, in which its text says that tickets are found


def row(experiment: Experiment, table: str, run: str) -> Row:
    """The row of one of the paper's tables that a run stands beside; empty where there is none."""
    return paper.rows(table, experiment.published.dataset).get(experiment.runs[run].paper or "", {})


def number(row: Row, column: str) -> float | None:
    """A number of a row, corrected where the paper contradicts itself; None where it prints none."""
    found = row and (row.get(f"{column}_corrected") or row[column])
    return float(found) if found else None


def both(row: Row, column: str) -> Corrected | None:
    """A number of a row as `number` gives it, and as printed; None of an empty row."""
    if not row:
        return None
    return Corrected(number(row, column), float(row.get(f"{column}_printed") or row[column]))


def ratio(experiment: Experiment, table: str, run: str, method: str) -> Row:
    """What the paper's text says of a run's cell against a baseline method; empty where it says nothing."""
    cell = experiment.runs[run].paper or ""
    return paper.ratios(table, experiment.published.dataset).get((cell, method), {})


def headline(experiment: Experiment, run: str, against: str) -> tuple[Row, Row] | None:
    """The rows of the first of the paper's tables that has a distance of both runs' cells."""
    both = ([row(experiment, table, name) for name in (run, against)] for table in paper.TABLES)
    return next(((a, b) for a, b in both if a and b and "fid" in a), None)


def iterations(row: Row, experts: int) -> list[int]:
    """The paper's iterations of each expert of a row, lowest timesteps first; none of an empty row."""
    if "iterations_rate30" in row:
        return [int(row[f"iterations_rate{rate}"]) for rate in (30, 60, 80)]
    return [int(row["iterations"])] * experts if row else []


def scale(experiment: Experiment) -> float | None:
    """Our iterations over the paper's, where that is the same for every run beside a cell; else None."""
    for table in paper.TABLES:
        for name, run in experiment.runs.items():
            ours = [e.iterations for e in sorted(run.experts, key=lambda e: e.serve)]
            theirs = iterations(row(experiment, table, name), len(ours))
            if theirs and ours != [max(1, round(n * experiment.scale)) for n in theirs]:  # as loading does
                return None
    return experiment.scale


def unpruned_params(experiment: Experiment) -> float:
    """Millions of parameters of the paper's unpruned network for the dataset."""
    tables = (paper.rows(table, experiment.published.dataset) for table in ("table4", "table5", "table6"))
    return next(float(rows["unpruned"]["params_m"]) for rows in tables if rows)
