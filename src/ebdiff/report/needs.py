"""Which files a table or a figure reads. Cheap to import, because the Snakefile asks it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ebdiff.cost.accounting import AFTER_DENSE
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.runs import Expert, Run
from ebdiff.experiment.schema import FINAL
from ebdiff.system.errors import UserError, unknown

FIGURES = ("figure1", "figure1b", "figure2", "figure2b", "figure3", "figure4", "figure5")


@dataclass
class Needs:
    """What a table or figure reads, by kind; `paths` turns it into file paths.

    Attributes:
        metrics: (run, seed).
        tickets: (seed, search, criterion, weights) of Hamming matrices.
        stories: (seed, search, criterion, weights, rate) of ticket stories.
        ledgers: (seed, expert key, milestone).
        searches: (seed, search) of the ledgers of dense trainings.
        samples: (run, seed).
        cost: whether the measured costs are read.
        images: whether the real images are read.
    """

    metrics: list[tuple[str, int]] = field(default_factory=list)
    tickets: list[tuple[int, str, str, str]] = field(default_factory=list)
    stories: list[tuple[int, str, str, str, float]] = field(default_factory=list)
    ledgers: list[tuple[int, str, str]] = field(default_factory=list)
    searches: list[tuple[int, str]] = field(default_factory=list)
    samples: list[tuple[str, int]] = field(default_factory=list)
    cost: bool = False
    images: bool = False


def rows(experiment: Experiment, table: str) -> tuple[str, ...]:
    """The runs of a table, in order.

    Raises:
        UserError: the experiment has no such table.
    """
    _known("table", table, experiment.tables, experiment.name)
    return next(runs for name, runs in experiment.tables.items() if name == table)


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


def shown_searches(experiment: Experiment) -> list[tuple[str, str, str, float]]:
    """The panels of Figure 2, (search, criterion, weights, rate): searches over all timesteps."""
    full = (0, experiment.diffusion.timesteps)
    return [
        (name, criterion, weights, rate)
        for name, search in experiment.searches.items()
        if search.span == full
        for criterion in search.criteria
        if criterion != "random"
        for weights in search.weights
        for rate in search.rates
    ]


def expert_searches(experiment: Experiment) -> list[tuple[str, str, str, float]]:
    """The panels of Figure 4, (search, criterion, weights, rate): tickets of timestep-aware runs."""
    return sorted(
        {
            _ticket(e)
            for run in experiment.runs.values()
            if run.method == "ta-eb"
            for e in run.experts
            if e.needs_ticket and e.search != FINAL and e.criterion != "random"
        }
    )


def timestep_aware_run(experiment: Experiment) -> str | None:
    """The timestep-aware run that Figure 3 draws: the first, in Figure 1's order."""
    for name in (*plotted_runs(experiment), *experiment.runs):
        if experiment.runs[name].method == "ta-eb":
            return name
    return None


def table_needs(experiment: Experiment, table: str) -> Needs:
    """What a table reads.

    Raises:
        UserError: the experiment has no such table.
    """
    return _run_needs(experiment, rows(experiment, table))


def figure_needs(experiment: Experiment, figure: str) -> Needs:
    """What a figure reads. Heat maps, timelines and samples show the first seed.

    Raises:
        UserError: there is no such figure.
    """
    _known("figure", figure, FIGURES, experiment.name)
    seed = experiment.seeds[0]
    if figure in ("figure1", "figure1b"):
        return _run_needs(experiment, plotted_runs(experiment))
    if figure == "figure2b":
        both = [(seed, s, "magnitude", w) for s in experiment.searches for w in ("ema", "raw")]
        return Needs(tickets=both)
    if figure in ("figure2", "figure4"):
        panels = shown_searches(experiment) if figure == "figure2" else expert_searches(experiment)
        return Needs(tickets=_unique((seed, *panel[:3]) for panel in panels))
    if figure == "figure5":
        samples = [(name, experiment.seeds_of(name)[0]) for name in experiment.runs]
        return Needs(samples=samples, images=True)
    needs, name = Needs(), timestep_aware_run(experiment)
    if name is not None:
        final = experiment.final_expert
        _add_training(needs, experiment.runs[name], experiment.seeds_of(name)[0], final)
        _add_unpruned(needs, experiment.seeds_of(name)[0], final)
    return needs


def report_needs(experiment: Experiment) -> Needs:
    """What the report reads beside the figures: everything about every run."""
    return _run_needs(experiment, experiment.runs)


def paths(experiment: Experiment, needs: Needs) -> list[str]:
    """The files of some needs, without repetition."""

    def at(template: str, **parts: object) -> str:
        return str(layout.path(template, experiment=experiment.name, **parts))

    ticket = ("seed", "search", "criterion", "weights", "rate")
    found = [at(layout.METRICS, run=run, seed=seed) for run, seed in needs.metrics]
    found += [at(layout.HAMMING, **dict(zip(ticket, t, strict=False))) for t in needs.tickets]
    found += [at(layout.STORY, **dict(zip(ticket, t, strict=True))) for t in needs.stories]
    found += [at(layout.LEDGER, seed=s, expert=e, milestone=m) for s, e, m in needs.ledgers]
    found += [at(layout.DENSE_LEDGER, seed=seed, search=search) for seed, search in needs.searches]
    drawn = (layout.SAMPLES, layout.SAMPLE_LEDGER)
    found += [at(template, run=run, seed=seed) for run, seed in needs.samples for template in drawn]
    if needs.cost:
        found.append(at(layout.COST))
    if needs.images:
        images = (layout.IMAGES, layout.MANIFEST)
        found += [at(template, dataset=experiment.dataset.name) for template in images]
    return _unique(found)


def milestone(expert: Expert) -> str:
    """The name of the milestone at which a run takes an expert."""
    return str(expert.iterations)


def _ticket(expert: Expert) -> tuple[str, str, str, float]:
    assert expert.rate is not None  # the configuration sees to it
    return expert.search, expert.criterion, expert.weights, expert.rate


def _run_needs(experiment: Experiment, names: Iterable[str]) -> Needs:
    needs, names = Needs(cost=True), tuple(names)
    reference = unpruned(experiment, names)
    for name in names:
        run = experiment.runs[name]
        for seed in experiment.seeds_of(name):
            needs.metrics.append((name, seed))
            _add_training(needs, run, seed, reference)
    return needs


def _add_training(needs: Needs, run: Run, seed: int, reference: Expert | None) -> None:
    """Add what tells how a run was trained: its ledgers, tickets and searches."""
    for e in run.experts:
        needs.ledgers.append((seed, e.key, milestone(e)))
        if e.needs_ticket:
            needs.stories.append((seed, *_ticket(e)))
        if e.needs_ticket and e.search != FINAL:
            needs.searches.append((seed, e.search))
    if run.method in AFTER_DENSE:
        _add_unpruned(needs, seed, reference)


def _add_unpruned(needs: Needs, seed: int, reference: Expert | None) -> None:
    if reference is not None:
        needs.ledgers.append((seed, reference.key, milestone(reference)))


def _unique(items: Iterable) -> list:
    return list(dict.fromkeys(items))


def _known(kind: str, name: str, known: Iterable[str], experiment: str) -> None:
    if name not in known:
        raise UserError(f"experiment {experiment!r}, {kind}: {unknown(name, known)}")
