"""The paper's Figures 1 to 5 with our numbers."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator

from ebdiff.cost.accounting import Speedups
from ebdiff.diffusion.schedule import alphas_bar
from ebdiff.experiment.experiment import Experiment
from ebdiff.report import heatmaps, needs, protocol, style, text
from ebdiff.report.facts import RunFacts
from ebdiff.report.needs import FIGURES, milestone
from ebdiff.report.results import Results

__all__ = ["CAPTIONS", "FIGURES", "draw", "losses", "save", "write_figure"]

CAPTIONS = {
    "figure1": "Quality against relative training time, as the paper counts it: the search is left out and "
    "experts train side by side. Lower left is good.",
    "figure1b": "Quality against relative device time: the search and all experts are summed.",
    "figure2": "Distances between the masks of the full-range searches; lighter is closer. The box marks the "
    "queue of masks that made the ticket.",
    "figure2b": "Ticket or slow average? A learned mask settles (solid line falls below the threshold, dot) "
    "while it is far from the initial mask (dashed line near chance). Masks that settle close to the "
    "initial mask only show that the weights have not moved yet.",
    "figure3": "(a) How fast noise grows with the timestep, and the spans of the experts. "
    "(b) Where the training seconds went, from the ledgers; experts side by side, one device each.",
    "figure4": "Distances between the masks that timestep-aware tickets are drawn from; lighter is closer.",
    "figure5": "Samples. The same place in every grid started from the same noise.",
}  # fmt: skip
_MARKERS = {"none": "o", "magnitude": "s", "taylor": "^", "diff-pruning": "D", "random": "X"}
_GRID = 5  # samples per side of a grid


def write_figure(experiment: Experiment, figure: str, folder: Path, *, partial: bool = False) -> list[Path]:
    """Write `{figure}.pdf` and `{figure}.png` into a folder, each atomically.

    Args:
        experiment: the experiment.
        figure: one of `FIGURES`.
        folder: where to write.
        partial: draw what is there, or say in the figure that nothing is.

    Returns:
        The two paths.

    Raises:
        UserError: no such figure; a file is damaged, or missing while `partial` is false.
    """
    needs.figure_needs(experiment, figure)  # refuses unknown names
    return save(Results(experiment, partial=partial), figure, folder)


def save(results: Results, figure: str, folder: Path) -> list[Path]:
    """Draw a figure and write it, as `write_figure`."""
    with style.theme():
        return style.save(draw(results, figure), folder, figure)


def draw(results: Results, figure: str) -> Figure:
    """Draw a figure; call it within `style.theme()`."""
    drawers: dict[str, Callable[[Results], Figure | None]] = {
        "figure1": figure1, "figure1b": figure1b, "figure2": heatmaps.figure2,
        "figure2b": heatmaps.figure2b, "figure3": figure3, "figure4": heatmaps.figure4, "figure5": figure5,
    }  # fmt: skip
    drawn = drawers[figure](results)
    if drawn is not None:
        return drawn
    wanted = needs.paths(results.experiment, needs.figure_needs(results.experiment, figure))
    if not wanted:
        return style.sentence(f"{figure}: no run of experiment {results.experiment.name!r} has this.")
    return style.sentence(f"{figure}: nothing to draw yet; it reads {wanted[0]} and files like it.")


# --- Figure 1: quality against cost -------------------------------------------------------------------


def figure1(results: Results) -> Figure | None:
    """Quality against training time relative to the unpruned run, as the paper counts it."""
    label = "training time relative to the unpruned run\n(as the paper counts: 1 / speed-up)"
    return _quality(results, lambda s: 1 / s.as_paper, label)


def figure1b(results: Results) -> Figure | None:
    """Quality against total device time relative to the unpruned run, search included."""
    label = "device time relative to the unpruned run\n(search and all experts summed)"
    return _quality(results, lambda s: 1 / s.device_time, label)


def _quality(results: Results, time: Callable[[Speedups], float], label: str) -> Figure | None:
    drawn = []
    for name in needs.plotted_runs(results.experiment):
        facts = RunFacts(results, name)
        if facts.quality and facts.speedups:
            drawn.append((facts, statistics.fmean(map(time, facts.speedups))))
    if not drawn:
        return None
    height = max(3.6, 0.5 + 0.22 * len(drawn))
    figure = Figure(figsize=(6.6, height), layout="constrained")
    axes = figure.subplots()
    for number, (facts, x) in enumerate(drawn, 1):
        _point(axes, facts, x, number)
    axes.axvline(1, color="#cccccc", linewidth=0.8, zorder=0)
    axes.set(xlabel=label, ylabel=_distance(results.experiment))
    axes.margins(x=0.08, y=0.15)
    axes.set_xlim(left=0)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _distance(experiment: Experiment) -> str:
    name = protocol.shown(experiment).name
    return f"classifier Fréchet distance ({name})" if name == "cFD" else name


def _point(axes: Axes, facts: RunFacts, x: float, number: int) -> None:
    """A run: colour by method, marker by criterion, numbered as in the legend."""
    colour = style.METHOD_COLOURS[facts.run.method]
    marker = _MARKERS.get(facts.criterion.removeprefix("iterwise-"), "P")
    y = statistics.fmean(facts.quality)
    if len(facts.quality) > 1:
        axes.errorbar(x, y, statistics.stdev(facts.quality), color=colour, capsize=2, linewidth=1, alpha=0.7)
    dagger = " †" if facts.unsettled else ""
    title = textwrap.shorten(facts.run.title, 42, placeholder="…")
    axes.plot(
        x, y, marker, color=colour, markersize=8, markeredgecolor="white", label=f"{number}  {title}{dagger}"
    )
    outline = [withStroke(linewidth=2, foreground="white")]
    axes.annotate(
        str(number),
        (x, y),
        (6, 5),
        textcoords="offset points",
        fontsize=8,
        color=colour,
        path_effects=outline,
    )


# --- Figure 3: spans and timelines --------------------------------------------------------------------


def figure3(results: Results) -> Figure | None:
    """Noise against t with the spans of the timestep-aware run, and where training time went."""
    name = needs.timestep_aware_run(results.experiment)
    if name is None:
        return None
    facts = RunFacts(results, name)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    _noise(left, facts)
    bars = results.attempt(_timeline, facts, facts.seeds[0])
    if bars is None:
        right.text(0.5, 0.5, "(b) not measured yet", ha="center", color="#555555")
        right.set_axis_off()
    else:
        _gantt(right, bars)
    return figure


def _noise(axes: Axes, facts: RunFacts) -> None:
    rate = -np.gradient(alphas_bar(facts.results.experiment.diffusion))
    axes.plot(rate, color="#333333")
    for i, expert in enumerate(facts.experts):
        colour = style.SPAN_COLOURS[i % len(style.SPAN_COLOURS)]
        axes.axvspan(*expert.span, color=colour, alpha=0.15, linewidth=0)
        label = f"{text.percent(facts.rates[i])} %"
        axes.text(sum(expert.serve) / 2, rate.max() * 1.06, label, ha="center", color=colour, fontsize=9)
        if expert.serve[0]:
            axes.axvline(expert.serve[0], color="#777777", linewidth=0.8, linestyle="--")
    axes.set(xlim=(0, len(rate)), ylim=(0, rate.max() * 1.18), xlabel="timestep t")
    axes.set_ylabel("rate of change of the noise level\nd(1 - ᾱ) / dt")
    axes.set_title("(a) spans and their pruning rates")


def _timeline(facts: RunFacts, seed: int) -> list[tuple[str, float, float, object]]:
    """(label, begin, seconds, colour) of each bar: unpruned training, searches, experts after their own."""
    results, bars = facts.results, []
    final = results.experiment.final_expert
    if final is not None:
        seconds = results.ledger(seed, final.key, milestone(final))["seconds"]
        bars.append(("unpruned", 0.0, seconds, style.METHOD_COLOURS["unpruned"]))
    searches = facts.search_seconds(seed)
    bars += [(f"search {name}", 0.0, seconds, "#b0b0b0") for name, seconds in searches.items()]
    for i, expert in enumerate(facts.experts):
        seconds = results.ledger(seed, expert.key, milestone(expert))["seconds"]
        label = f"expert {expert.span[0]}-{expert.span[1]}, {text.percent(facts.rates[i])} %"
        begin = searches.get(expert.search, 0.0) if expert.needs_ticket else 0.0
        bars.append((label, begin, seconds, style.SPAN_COLOURS[i % len(style.SPAN_COLOURS)]))
    return bars


def _gantt(axes: Axes, bars: list[tuple[str, float, float, object]]) -> None:
    for row, (_, begin, seconds, colour) in enumerate(bars):
        axes.barh(row, seconds, left=begin, color=colour, height=0.65)
        shown = f" {text.number(seconds)} s"
        axes.text(begin + seconds, row, shown, va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(begin + seconds for _, begin, seconds, _ in bars))
    axes.set_xlabel("seconds of training")
    axes.set_title("(b) plain and timestep-aware training")


# --- Figure 5: samples --------------------------------------------------------------------------------


def figure5(results: Results) -> Figure | None:
    """A grid of samples per run, the same noise in the same place, beside real images."""
    grids = []
    real = results.attempt(results.images)
    for name, run in results.experiment.runs.items():
        samples = results.attempt(results.samples, name, results.experiment.seeds_of(name)[0])
        if samples is not None:
            grids.append((run.title, samples))
    if not grids:
        return None
    if real is not None:
        grids.append((f"real images ({results.experiment.dataset.name})", real))
    figure, panels = style.panels(len(grids), columns=7, width=1.9, height=2.0)
    for axes, (title, images) in zip(panels, grids, strict=True):
        axes.imshow(tile(images[: _GRID**2], _GRID), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title("\n".join(textwrap.wrap(title, 26)[:2]), fontsize=7.5)
        axes.set_axis_off()
    return figure


def tile(images: np.ndarray, side: int, gap: int = 1) -> np.ndarray:
    """Images uint8 (N, H, W, C), N <= side^2, in a white-gapped grid: (.., ..) grey or (.., .., 3)."""
    _, height, width, channels = images.shape
    canvas = np.full((side * (height + gap) - gap, side * (width + gap) - gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // side * (height + gap), i % side * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas[..., 0] if channels == 1 else canvas[..., :3]


# --- losses (report only) -----------------------------------------------------------------------------


def losses(results: Results) -> Figure | None:
    """Training losses of the experts of the first run of each method; None if none was recorded."""
    figure = Figure(figsize=(7.4, 3.2), layout="constrained")
    axes = figure.subplots()
    drawn: set[tuple[str, str]] = set()
    first_of = {run.method: name for name, run in reversed(results.experiment.runs.items())}
    for method, name in reversed(first_of.items()):
        facts = RunFacts(results, name)
        for i, expert in enumerate(facts.experts):
            curve, key = results.losses(facts.seeds[0], expert), (expert.key, milestone(expert))
            if len(curve) and key not in drawn:
                line, label = ("-", "--", ":", "-.")[i % 4], facts.run.title if not i else None
                axes.plot(*curve.T, line, color=style.METHOD_COLOURS[method], linewidth=1, label=label)
                drawn.add(key)
    if not drawn:
        return None
    axes.set(xlabel="step of this network's training", ylabel="loss", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
