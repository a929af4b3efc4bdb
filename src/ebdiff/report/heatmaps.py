"""How masks settle: Figures 2 and 4 (distance matrices) and 2b (the controls)."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ebdiff.report import needs, style, text
from ebdiff.report.results import Hamming, Results

Panel = tuple[str, str, str, float]  # search, criterion, weights, rate
_WEIGHTS = {"ema": "EMA", "raw": "raw"}


def matrices(results: Results, wanted: list[Panel]) -> Figure | None:
    """Heat maps of the mask distances of the first seed, each ticket boxed; None if there is none."""
    seed = results.experiment.seeds[0]
    drawn = []
    for search, criterion, weights, rate in wanted:
        hamming = results.attempt(results.hamming, seed, search, criterion, weights)
        if hamming is not None:
            drawn.append(
                (f"{search}, {text.percent(rate)} %\n{criterion}, {_WEIGHTS[weights]}", hamming, rate)
            )
    if not drawn:
        return None
    darkest = max(float(h.matrix[h.index(rate)].max()) for _, h, rate in drawn)
    figure, grid = style.panels(len(drawn), width=2.4, height=2.5)
    for axes, (title, hamming, rate) in zip(grid, drawn, strict=True):
        _matrix(axes, hamming, rate, darkest)
        axes.set_title(title, fontsize=8)
    bar = figure.colorbar(grid[0].collections[0], ax=grid, shrink=min(1, 2 / len(grid) + 0.4), pad=0.02)
    bar.set_label("share of mask entries that differ")
    bar.outline.set_visible(False)
    return figure


def figure2(results: Results) -> Figure | None:
    """Distances between the masks of the searches over all timesteps."""
    return matrices(results, needs.shown_searches(results.experiment))


def figure4(results: Results) -> Figure | None:
    """Distances between the masks from which the timestep-aware tickets are drawn."""
    return matrices(results, needs.expert_searches(results.experiment))


def _matrix(axes: Axes, hamming: Hamming, rate: float, darkest: float) -> None:
    matrix, last = hamming.matrix[hamming.index(rate)], len(hamming.intervals) - 1
    import seaborn as sns  # here, because the other figures don't need it

    sns.heatmap(
        matrix, ax=axes, cmap="rocket_r",  # lighter = closer, as in the paper
        vmin=0, vmax=darkest or 1, square=True, cbar=False,
        xticklabels=False, yticklabels=False, rasterized=True,
    )  # fmt: skip
    shown = np.unique(np.linspace(0, last, min(last + 1, 4)).astype(int))
    labels = hamming.intervals[shown]
    axes.set_xticks(shown + 0.5, labels, rotation=0)
    axes.set_yticks(shown + 0.5, labels, rotation=0)
    axes.tick_params(length=2, pad=2, labelsize=7)
    ticket = hamming.ticket(rate)
    if ticket is None:
        axes.set_xlabel(f"{hamming.interval} (not settled)", fontsize=8)
        return
    axes.set_xlabel(f"{hamming.interval} (ticket: {hamming.intervals[ticket]})", fontsize=8)
    first = ticket - hamming.window + 1
    side = hamming.window
    axes.add_patch(Rectangle((first, first), side, side, fill=False, edgecolor="#00a0e0", linewidth=2))


def figure2b(results: Results) -> Figure | None:
    """Is it a ticket or a slow average? Raw and EMA masks against their queue, start and chance."""
    seed = results.experiment.seeds[0]
    drawn: list[tuple[str, float, dict[str, Hamming]]] = []
    for name, search in results.experiment.searches.items():
        found: dict[str, Hamming] = {}
        for weights in _WEIGHTS:
            hamming = results.attempt(results.hamming, seed, name, "magnitude", weights)
            if hamming is not None:
                found[weights] = hamming
        drawn += [(name, rate, found) for rate in search.rates if found]
    if not drawn:
        return None
    figure, grid = style.panels(len(drawn), width=2.9, height=2.2)
    for i, (axes, (name, rate, found)) in enumerate(zip(grid, drawn, strict=True)):
        for weights, hamming in found.items():
            _controls(axes, hamming, rate, weights)
        hamming = next(iter(found.values()))
        axes.axhline(hamming.chance[hamming.index(rate)], color="#999999", linestyle=":", label="chance")
        axes.axhline(hamming.threshold, color="#c03030", linewidth=0.9, label="threshold")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set(ylim=(0, None), xlabel=hamming.interval, ylabel="distance" if i % 4 == 0 else "")
        axes.set_title(f"{name}, {text.percent(rate)} %", fontsize=8)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _controls(axes: Axes, hamming: Hamming, rate: float, weights: str) -> None:
    colour, name = style.WEIGHTS_COLOURS[weights], _WEIGHTS[weights]
    queue = hamming.newest_to_window(rate)
    axes.plot(hamming.intervals, queue, color=colour, label=f"{name}: largest distance in the queue")
    start = hamming.initial[hamming.index(rate)]
    axes.plot(
        hamming.intervals, start, color=colour, linestyle="--", label=f"{name}: distance to initial mask"
    )
    ticket = hamming.ticket(rate)
    if ticket is not None:
        axes.plot(hamming.intervals[ticket], queue[ticket], "o", color=colour, markersize=5)
