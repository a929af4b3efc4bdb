"""The paper's Figures 1 to 5 with our numbers, training losses, and what sparse training gives."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator

from ebdiff.diffusion.schedule import alphas_bar
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.runs import Budget
from ebdiff.experiment.schema import FINAL
from ebdiff.experiment.sparsity import Moving
from ebdiff.report import notes, style, text
from ebdiff.report.facts import RunFacts, plotted, timestep_aware
from ebdiff.report.results import Hamming, Results
from ebdiff.report.significance import SEEDS, Mean

_MARKERS = {"none": "o", "magnitude": "s", "taylor": "^", "diff-pruning": "D", "random": "X"}
_WEIGHTS = {"ema": "EMA", "raw": "raw"}
_TITLE = 1.12  # inches: what is left for the title of a row of samples
_LONGEST = 8.6  # inches: no figure of samples is longer where that can be helped, to fit a page


def write(results: Results, figures: Iterable[str], folder: Path) -> list[Path]:
    """Write `.pdf` and `.png` of some figures; one without anything to draw says so."""
    drawers: dict[str, Callable[[Results], Figure | None]] = {
        "figure1": lambda r: quality(r, "as_paper", "training time", "as the paper counts: 1 / speed-up"),
        "figure1b": lambda r: quality(r, "device_time", "device time", "search and all experts summed"),
        "figure2": lambda r: matrices(r, full_range(r.experiment)),
        "figure2b": controls,
        "figure3": timelines,
        "figure4": lambda r: matrices(r, of_regions(r.experiment)),
        "figure5": samples,
        "losses": losses,
        "sparsity": sparsity,
        "overlap": overlap,
        "sampling": sampling_steps,
    }
    written = []
    with style.theme():
        for figure in figures:
            drawn = drawers[figure](results)
            if drawn is None:
                runs = "no finished run" if results.partial else "no run"
                drawn = style.sentence(f"{figure}: {runs} of {results.experiment.name!r} has what it shows.")
            written += style.save(drawn, folder, figure)
    return written


def quality(results: Results, counted: str, time: str, how: str) -> Figure | None:
    """Quality against time relative to the unpruned run, counted as one of the speed-ups is."""
    runs = [RunFacts(results, name) for name in plotted(results.experiment)]
    drawn = [facts for facts in runs if facts.quality and facts.speedups()]
    if not drawn:
        return None
    figure = style.canvas(*((style.COLUMN, 2.3) if len(drawn) <= 8 else (style.PAGE, 3.2)))
    axes = figure.subplots()
    for number, facts in enumerate(drawn, 1):
        _point(axes, facts, statistics.fmean(1 / getattr(s, counted) for s in facts.speedups()), number)
    axes.axvline(1, color="#cccccc", linewidth=0.8, zorder=0)
    axes.set(xlabel=f"{time} relative to the unpruned run\n({how})", ylabel=_distance(results))
    axes.margins(x=0.08, y=0.15)
    axes.set_xlim(left=0)
    style.legend(figure, axes)
    _number(axes)
    return figure


def _distance(results: Results) -> str:
    """The measure on an axis."""
    name = notes.measure(results.experiment).name
    return f"classifier Fréchet distance ({name})" if name == "cFD" else name


def _point(axes: Axes, facts: RunFacts, x: float, number: int) -> None:
    """A run: colour by method, marker by criterion, numbered as in the legend."""
    colour, y = style.METHOD_COLOURS[facts.run.method], statistics.fmean(facts.quality)
    marker = _MARKERS.get(facts.criterion.removeprefix("iterwise-"), "P")
    if len(facts.quality) > 1:
        axes.errorbar(x, y, statistics.stdev(facts.quality), color=colour, capsize=2, linewidth=1, alpha=0.7)
    title = textwrap.shorten(facts.run.title, 42, placeholder="…")
    label = f"{number}  {title}{f' {notes.UNSETTLED}' if facts.unsettled else ''}"
    axes.plot(
        x, y, marker, color=colour, markersize=5.5, markeredgewidth=0.5, markeredgecolor="white", label=label
    )


def _number(axes: Axes) -> None:
    """Each point's number, from its label, to its right, with a line where others push it up or down."""
    axes.figure.draw_without_rendering()  # lays out, so that places are known
    points = [line for line in axes.lines if not line.get_label().startswith("_")]
    x, y = axes.transData.transform([line.get_xydata()[0] for line in points]).T * 72 / axes.figure.dpi
    outline = [withStroke(linewidth=0.8, foreground="white")]
    for line, up in zip(points, _apart(x, y) - y, strict=True):
        beside = dict(xytext=(6, up), textcoords="offset points", va="center", in_layout=False)
        look = dict(fontsize=style.SMALL, color=(colour := line.get_color()), path_effects=outline)
        look["arrowprops"] = dict(arrowstyle="-", color=colour, linewidth=0.4, shrinkA=0, shrinkB=0)
        axes.annotate(line.get_label().split()[0], line.get_xydata()[0], **beside, **look)


def _apart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Heights near `y`, in its order, at which labels of 12 by 7 points cover none beside."""
    rank = np.argsort(np.argsort(y, kind="stable"))
    order, near = np.sign(rank[:, None] - rank), np.abs(x[:, None] - x) < 12
    for _ in range(300):
        push = np.clip(7 - order * (y[:, None] - y), 0, None) * near * order
        y = y + push.sum(1) / (2 * np.maximum(1, (push != 0).sum(1)))
    return y


Panel = tuple[str, str, str, float]  # search, criterion, weights, rate


def full_range(e: Experiment) -> list[Panel]:
    """The panels of Figure 2: searches over all timesteps."""
    return [
        (name, criterion, weights, rate)
        for name, search in e.searches.items()
        if search.span == (0, e.diffusion.timesteps)
        for criterion in search.criteria
        for weights in e.weights_of(name, criterion)
        for rate in search.rates
    ]


def of_regions(e: Experiment) -> list[Panel]:
    """The panels of Figure 4: tickets of timestep-aware runs."""
    aware = [x for run in e.runs.values() if run.method == "ta-eb" for x in run.experts]
    drawn = [x for x in aware if x.needs_ticket and x.search != FINAL and x.criterion != "random"]
    return sorted({(x.search, x.criterion, x.weights, x.rate) for x in drawn if x.rate is not None})


def _there(results: Results, panels: Iterable[Panel]) -> list[tuple[Panel, Hamming]]:
    """The mask distances of the first seed that are there."""
    seed, read = results.experiment.seeds[0], results.hamming
    return [(panel, found) for panel in panels if (found := results.attempt(read, seed, *panel)) is not None]


def matrices(results: Results, panels: list[Panel]) -> Figure | None:
    """Heat maps of mask distances, each ticket boxed; None if there is none."""
    drawn = _there(results, panels)
    if not drawn:
        return None
    darkest = max(float(hamming.matrix.max()) for _, hamming in drawn)
    figure, grid = style.panels(len(drawn), 1.8)
    for axes, ((search, criterion, weights, rate), hamming) in zip(grid, drawn, strict=True):
        _matrix(axes, hamming, darkest or 1)
        title = f"{search}, {text.percent(rate)} %\n{criterion}, {_WEIGHTS[weights]}"
        axes.set_title(title, fontsize=style.SMALL)
    bar = figure.colorbar(
        grid[0].collections[0], ax=grid, shrink=min(1, 2 / len(grid) + 0.4), pad=0.02, aspect=25
    )
    bar.set_label("share of mask\nentries that differ")
    bar.outline.set_visible(False)
    return figure


def _matrix(axes: Axes, hamming: Hamming, darkest: float) -> None:
    import seaborn as sns  # here, because the other figures don't need it

    sns.heatmap(
        hamming.matrix, ax=axes, cmap="rocket_r",  # lighter = closer, as in the paper
        vmin=0, vmax=darkest, square=True, cbar=False,
        xticklabels=False, yticklabels=False, rasterized=True,
    )  # fmt: skip
    count, ticket, side = len(hamming.intervals), hamming.ticket, hamming.window
    ticks = np.unique(np.linspace(0, count - 1, min(count, 4)).astype(int))
    axes.set_xticks(ticks + 0.5, hamming.intervals[ticks], rotation=0)
    axes.set_yticks(ticks + 0.5, hamming.intervals[ticks], rotation=0)
    axes.tick_params(length=2, pad=2, labelsize=style.SMALL)
    found = "not settled" if ticket is None else f"ticket: {hamming.intervals[ticket]}"
    axes.set_xlabel(f"{hamming.interval}\n{found}", fontsize=style.SMALL)
    if ticket is not None:
        corner = (ticket - side + 1, ticket - side + 1)
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="#00a0e0", linewidth=1.3))


def controls(results: Results) -> Figure | None:
    """Is it a ticket or a slow average? Raw and EMA masks against their queue, start and chance."""
    searches = results.experiment.searches.items()
    panels = [(s, "magnitude", w, rate) for s, x in searches for rate in x.rates for w in _WEIGHTS]
    drawn: dict[tuple[str, float], dict[str, Hamming]] = {}
    for (search, _, weights, rate), hamming in _there(results, panels):
        drawn.setdefault((search, rate), {})[weights] = hamming
    if not drawn:
        return None
    figure, grid = style.panels(len(drawn), 1.5)
    for i, (axes, ((search, rate), found)) in enumerate(zip(grid, drawn.items(), strict=True)):
        for weights, hamming in found.items():
            x, queue, ticket = hamming.intervals, hamming.queue, hamming.ticket
            colour, name = style.WEIGHTS_COLOURS[weights], _WEIGHTS[weights]
            axes.plot(x, queue, color=colour, label=f"{name}: largest distance in the queue")
            axes.plot(x, hamming.initial, "--", color=colour, label=f"{name}: distance to initial mask")
            if ticket is not None:
                axes.plot(x[ticket], queue[ticket], "o", color=colour, label=f"{name}: ticket")
        hamming = next(iter(found.values()))  # chance and threshold are those of both
        axes.axhline(hamming.chance, color="#999999", linestyle=":", label="chance")
        axes.axhline(hamming.threshold, color="#c03030", linewidth=0.9, label="threshold")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set(ylim=(0, None), xlabel=hamming.interval, ylabel="distance" if i % 4 == 0 else "")
        axes.set_title(f"{search}, {text.percent(rate)} %", fontsize=style.SMALL)
    style.legend(figure, *grid)
    return figure


def timelines(results: Results) -> Figure | None:
    """Noise against t with the spans of the timestep-aware run, and where training time went."""
    name = timestep_aware(results.experiment)
    if name is None:
        return None
    facts = RunFacts(results, name)
    figure = style.canvas(style.PAGE, 2.2)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    _noise(left, facts)
    if bars := results.attempt(_timeline, facts, facts.seeds[0]):
        _gantt(right, bars)
    else:
        right.text(0.5, 0.5, "(b) not measured yet", ha="center", color="#555555")
        right.set_axis_off()
    return figure


def _noise(axes: Axes, facts: RunFacts) -> None:
    rate = -np.gradient(alphas_bar(facts.results.experiment.diffusion))
    axes.plot(rate, color="#333333")
    for i, expert in enumerate(facts.experts):
        axes.axvspan(*expert.span, color=style.span_colour(i), alpha=0.15, linewidth=0)
        middle, label = sum(expert.serve) / 2, f"{text.percent(facts.rates[i])} %"
        axes.text(
            middle, rate.max() * 1.06, label, ha="center", color=style.span_colour(i), fontsize=style.SMALL
        )
        if expert.serve[0]:
            axes.axvline(expert.serve[0], color="#777777", linewidth=0.8, linestyle="--")
    axes.set(xlim=(0, len(rate)), ylim=(0, rate.max() * 1.18), xlabel="timestep t")
    axes.set_ylabel("rate of change of the noise level\nd(1 - ᾱ) / dt")
    axes.set_title("(a) spans and their pruning rates")


Bar = tuple[str, float, float, str]  # label, begin, seconds, colour


def _timeline(facts: RunFacts, seed: int) -> list[Bar]:
    """Unpruned training, searches and what their masks took beside, and experts after their own."""
    results, bars = facts.results, []
    final, searches = results.experiment.final_expert, facts.search_seconds(seed)
    masks = facts.mask_seconds(seed)
    if final is not None:
        seconds = results.ledger(seed, final)["seconds"]
        bars.append(("unpruned", 0.0, seconds, style.METHOD_COLOURS["unpruned"]))
    bars += [(f"search {name}", 0.0, seconds, "#b0b0b0") for name, seconds in searches.items()]
    for (name, criterion, weights), seconds in masks.items():
        label = f"{criterion} masks, {_WEIGHTS[weights]}"
        bars.append((label, searches.get(name, 0.0), seconds, "#b0b0b0"))
    for i, expert in enumerate(facts.experts):
        label = f"expert {expert.span[0]}-{expert.span[1]}, {text.percent(facts.rates[i])} %"
        masked = masks.get((expert.search, expert.criterion, expert.weights), 0.0)
        begin = searches.get(expert.search, 0.0) + masked if expert.needs_ticket else 0.0
        bars.append((label, begin, results.ledger(seed, expert)["seconds"], style.span_colour(i)))
    return bars


def _gantt(axes: Axes, bars: list[Bar]) -> None:
    for row, (_, begin, seconds, colour) in enumerate(bars):
        axes.barh(row, seconds, left=begin, color=colour, height=0.65)
        axes.text(begin + seconds, row, f" {text.number(seconds)} s", va="center", fontsize=style.SMALL)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(begin + seconds for _, begin, seconds, _ in bars))
    axes.set_xlabel("seconds of training")
    axes.set_title("(b) plain and timestep-aware training")


def samples(results: Results) -> Figure | None:
    """A row of samples per run, the same noise in the same column, and of real images; many rows stand in
    two blocks. Small images are drawn smaller than others, and all so that the figure fits a page if it can.
    """
    experiment, real = results.experiment, results.attempt(results.images)
    rows = [
        (run.title, images)
        for name, run in experiment.runs.items()
        if (images := results.attempt(results.samples, name, experiment.seeds_of(name)[0])) is not None
    ]
    if not rows:
        return None
    if real is not None:
        rows.append((f"real images ({experiment.dataset.name})", real))
    blocks = 1 if len(rows) <= 12 else 2
    down, width = math.ceil(len(rows) / blocks), style.PAGE / blocks - _TITLE
    across = (16 if rows[0][1].shape[1] <= 16 else 8) // blocks
    across *= 1 if down * width / across <= _LONGEST else 2
    side, figure = width / across, Figure()
    figure.set_size_inches(style.PAGE, down * side)
    for i, (title, images) in enumerate(rows):
        left, bottom = _TITLE + i // down * style.PAGE / blocks, side * (down - 1 - i % down)
        axes = figure.add_axes((left / style.PAGE, bottom / (down * side), width / style.PAGE, 0.94 / down))
        axes.imshow(strip(images[:across], across), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_axis_off()
        title = "\n".join(textwrap.wrap(title, 22)[:3])
        place = dict(ha="right", va="center", fontsize=style.SMALL, transform=axes.transAxes)
        axes.text(-0.05 / width, 0.5, title, **place)
    return figure


def strip(images: np.ndarray, across: int) -> np.ndarray:
    """Up to so many images uint8 (N, H, W, C) in a row, a white pixel between two: (H, ..) or (H, .., C)."""
    gaps = np.pad(
        np.stack(list(images)), ((0, across - len(images)), (0, 0), (0, 1), (0, 0)), constant_values=255
    )
    row = np.concatenate(list(gaps), axis=1)[:, :-1]
    return row[..., 0] if row.shape[2] == 1 else row


def losses(results: Results) -> Figure | None:
    """Training losses of the experts of the first run of each method; None if none was recorded."""
    figure = style.canvas(style.COLUMN, 2.2)
    axes, drawn = figure.subplots(), set()
    first = {run.method: name for name, run in reversed(results.experiment.runs.items())}
    for method, name in reversed(first.items()):
        facts = RunFacts(results, name)
        for i, expert in enumerate(facts.experts):
            curve, key = results.losses(facts.seeds[0], expert), (expert.key, expert.iterations)
            if len(curve) and key not in drawn:
                label = textwrap.shorten(facts.run.title, 32, placeholder="…")
                label += f", t {expert.span[0]}-{expert.span[1]}" if len(facts.experts) > 1 else ""
                line, colour = ("-", "--", ":", "-.")[i % 4], style.METHOD_COLOURS[method]
                axes.plot(*curve.T, line, color=colour, label=label)
                drawn.add(key)
    if not drawn:
        return None
    axes.set(xlabel="step of this network's training", ylabel="loss", yscale="log")
    _plain(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    style.legend(figure, axes)
    return figure


def _plain(axis: Axis) -> None:
    """A logarithmic axis with plain numbers: Matplotlib's own are mathematics, which we don't parse."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def sparsity(results: Results) -> Figure | None:
    """Quality against what sparse networks lack, and against training FLOPs; None if there is no such run.

    A curve joins the runs of one method, share exchanged and length; the unpruned run is a band.
    """
    runs = [RunFacts(results, name) for name in results.experiment.runs]
    drawn = [f for f in runs if all(e.sparse for e in f.experts) and not f.run.sampling]
    drawn = [f for f in drawn if f.quality and f.speedups("training_flops")]
    if not drawn:
        return None
    unpruned = next((f for f in runs if f.run.method == "unpruned" and f.quality), None)
    curves: dict[tuple[str, str, str], list[RunFacts]] = {}
    for facts in drawn:
        curves.setdefault(_way(facts), []).append(facts)
    dense, methods = results.network("dense"), list(dict.fromkeys(method for method, *_ in curves))
    figure = style.canvas(style.PAGE, 2.3)
    left, right = figure.subplots(1, 2, sharey=True)
    left.set(xlabel="parameters left out (%)", ylabel=_distance(results))
    right.set_xlabel("training FLOPs relative to the unpruned run\n(search and all experts summed)")
    for axes, place in (
        (left, lambda f: 100 * (1 - f.average("params") / dense["params"])),
        (right, lambda f: statistics.fmean(1 / s.device_time for s in f.speedups("training_flops"))),
    ):
        for (method, share, until), facts in curves.items():
            colour, marker = style.span_colour(methods.index(method)), _UNTIL.get(until, "o")
            line = "-" if share == next(s for m, s, _ in curves if m == method) else "--"
            label = ", ".join(filter(None, (method, share, until)))
            _curve(axes, facts, place, color=colour, marker=marker, linestyle=line, label=label)
        if unpruned:
            mean, half = statistics.fmean(unpruned.quality), _half_interval(unpruned.quality)
            axes.axhline(mean, color="#777777", linewidth=0.8, zorder=0, label=unpruned.run.title)
            if not math.isnan(half):
                axes.axhspan(mean - half, mean + half, color="#777777", alpha=0.15, linewidth=0)
    style.legend(figure, left)
    return figure


def _curve(axes: Axes, runs: Iterable[RunFacts], place: Callable[[RunFacts], float], **look: Any) -> None:
    """Quality of some runs over their places, with 95 % intervals of the seeds."""
    points = sorted((place(f), f.quality) for f in runs)
    means, halves = ([of(y) for _, y in points] for of in (statistics.fmean, _half_interval))
    axes.errorbar([x for x, _ in points], means, halves, capsize=2, elinewidth=0.8, **look)


def sampling_steps(results: Results) -> Figure | None:
    """Quality against sampling steps and MACs per image: a curve for each network that is sampled twice."""
    curves: dict[tuple, list[RunFacts]] = {}
    for name in results.experiment.runs:
        facts = RunFacts(results, name)
        if facts.quality:
            key = tuple((e.key, e.serve, e.iterations) for e in facts.experts)
            curves.setdefault(key, []).append(facts)
    drawn = [runs for runs in curves.values() if len(runs) > 1]
    if not drawn:
        return None
    figure = style.canvas(style.PAGE, 2.3)
    left, right = figure.subplots(1, 2, sharey=True)
    left.set(xlabel="sampling steps", ylabel=_distance(results), xscale="log", yscale="log")
    right.set(xlabel="MACs per image (M)", xscale="log")
    for axis in (left.xaxis, left.yaxis, right.xaxis):
        _plain(axis)
    for i, runs in enumerate(drawn):
        label = next((f.run.title for f in runs if not f.run.sampling), runs[0].run.title)
        look = dict(color=style.span_colour(i), marker="o", label=label)
        _curve(left, runs, lambda f: len(f.visited), **look)
        _curve(right, runs, lambda f: f.evaluations * f.macs_visited / 1e6, **look)
    style.legend(figure, left)
    return figure


_UNTIL = {"equal seconds": "s", "equal FLOPs": "D"}  # markers of runs as long as another one costs


def _way(facts: RunFacts) -> tuple[str, str, str]:
    """How a sparse run is trained: its method, the share that updates exchange, and for how long."""
    expert = facts.experts[0]
    share = f"p {expert.sparse.fraction:g}" if isinstance(expert.sparse, Moving) else ""
    budget, until = Budget.of(expert.iterations), f"{expert.iterations} steps"
    if budget is not None:
        equal = "equal seconds" if budget.unit == "step_ms" else "equal FLOPs"
        until = equal if budget.run else str(expert.iterations)
    return expert.sparse.method, share, until


def _half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean; NaN of too few seeds."""
    return Mean.of(values).interval[1] - statistics.fmean(values) if len(values) >= SEEDS else math.nan


def overlap(results: Results) -> Figure | None:
    """What moving masks share with the first ones and with those before, a panel for each method."""
    panels: dict[str, list[tuple[str, np.ndarray]]] = {}
    for name, run in results.experiment.runs.items():
        facts = RunFacts(results, name)
        for expert in facts.experts:
            told = expert.sparse and results.attempt(results.ledger, facts.seeds[0], expert)
            if told and (rows := told.get("sparse", {}).get("overlap")):
                panels.setdefault(expert.sparse.method, []).append((run.title, np.array(rows)))
    if not panels:
        return None
    figure = style.canvas(style.PAGE, 2.3)
    grid = figure.subplots(1, len(panels), squeeze=False).ravel()
    for axes, (method, curves) in zip(grid, panels.items(), strict=True):
        for i, (title, rows) in enumerate(curves):
            step, first, before = rows.T
            axes.plot(step, first, color=f"C{i}", label=textwrap.shorten(title, 26, placeholder="…"))
            axes.plot(step, before, ":", color=f"C{i}")
        axes.set(ylim=(0, 1.02), yticks=(0, 0.5, 1), xlabel="step", ylabel="share in common")
        axes.set_title(method)
    kinds = {"-": "with the first masks", ":": "with those before the update"}
    lines = [Line2D([], [], color="#555555", linestyle=kind) for kind in kinds]
    figure.legend(lines, kinds.values(), loc="outside upper center", ncols=2)
    style.legend(figure, *grid)
    return figure
