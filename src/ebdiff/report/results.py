"""Reads what is on disk for an experiment. The only place of the report that opens result files."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from ebdiff.cost.accounting import every_network
from ebdiff.data.encoded import Encoded, open_images
from ebdiff.experiment import layout, places
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.jobs import Job, jobs
from ebdiff.experiment.records import Records, opened
from ebdiff.experiment.runs import Expert
from ebdiff.report.render import Table, from_markdown
from ebdiff.system.errors import Missing, Unusable, UserError, damaged
from ebdiff.system.files import load_memmap, read_arrays, read_json, reading, sha256
from ebdiff.tickets.history import load_history

Value = TypeVar("Value")


@dataclass(frozen=True)
class Hamming:
    """The mask distances of one search, criterion, kind of weights and rate, over n intervals."""

    intervals: np.ndarray  # 0-based ones after which a mask was taken, (n,)
    matrix: np.ndarray  # share of differing mask entries, (n, n), in [0, 1]
    initial: np.ndarray  # distance of each mask to that of the initial weights, (n,)
    chance: float  # distance of two independent masks
    window: int  # masks in the queue
    threshold: float  # largest distance in the queue of a settled mask
    interval: str  # what an interval is, in words

    @property
    def queue(self) -> np.ndarray:
        """Largest distance of each mask to the others in its queue, (n,); NaN until it is full."""
        reach, n = self.window - 1, len(self.matrix)
        return np.array([self.matrix[i, i - reach : i].max() if i >= reach else np.nan for i in range(n)])

    @property
    def ticket(self) -> int | None:
        """Position of the first mask that obeys the early-bird rule; None if none does."""
        settled = self.queue <= np.float32(self.threshold)  # the matrix is float32
        return int(settled.argmax()) if settled.any() else None


class Results:
    """The result files of an experiment, read when asked for.

    With `partial`, files may be missing: `attempt` then gives None for them, and for those that can't be
    used: damaged, made for other settings, or just being written.
    """

    def __init__(self, experiment: Experiment, *, partial: bool = False) -> None:
        self.experiment, self.partial = experiment, partial
        self.left_out: list[str] = []  # what is there but can't be used, one line each
        self._read: dict[Path, Any] = {}
        self._records = Records(experiment)

    def attempt(self, read: Callable[..., Value], *args: Any, **parts: Any) -> Value | None:
        """What `read` gives, or None if a file of a partial report isn't there yet or can't be used."""
        try:
            return read(*args, **parts)
        except Unusable as error:
            if not self.partial:
                raise
            if not isinstance(error, Missing) and str(error) not in self.left_out:
                self.left_out.append(str(error))
                print(f"left out: {error}", file=sys.stderr)
            return None

    def path(self, template: str, **parts: object) -> Path:
        """Where a file of this experiment lies."""
        names = dict(experiment=self.experiment.name, dataset=self.experiment.dataset.name)
        return layout.path(template, **names, **parts)

    def file(self, template: str, **parts: object) -> dict:
        """A JSON file of this experiment."""
        return self._once(self.path(template, **parts), read_json)

    def metrics(self, run: str, seed: int) -> dict:
        """The quality of a run's samples."""
        return self.file(layout.METRICS, run=run, seed=seed)

    def story(self, seed: int, expert: Expert) -> dict:
        """How the ticket of an expert was found."""
        return self._once(places.ticket_of(self.experiment, expert, layout.STORY, seed), read_json)

    def to_final(self, story: dict) -> float | None:
        """Distance of a ticket's mask to that of the finished network; None where there is none."""
        ticket = {key: story[key] for key in ("seed", "search", "criterion", "weights")}
        read = partial(load_history, weights=story["weights"])
        found = [self._once(path, read) for path in places.masks_beside(self.experiment, **ticket)]
        if not found:
            return None
        own, final = (h.mask(story["rate"], at) for h, at in zip(found, (story["interval"], 0), strict=True))
        return float((own != final).mean())

    def ledger(self, seed: int, expert: Expert) -> dict:
        """What an expert's training cost up to its milestone."""
        return self.file(layout.LEDGER, seed=seed, expert=expert.key, milestone=expert.iterations)

    def network(self, name: str) -> dict:
        """The cost of one network: `dense`, the asked rate as text, or `Expert.costs` of a sparse one."""
        networks = every_network(self.file(layout.COST))
        if name not in networks:
            raise Unusable(self.path(layout.COST), f"has no network {name!r}")
        return networks[name]

    def plan(self) -> dict | None:
        """What `ebdiff plan` predicted, if it was asked, of the experiment as it is now."""
        if not self.path(layout.PLAN).exists():
            return None
        try:
            plan = opened(self.path(layout.PLAN))
        except Unusable as error:  # no rule makes it
            again = f"make it again with `ebdiff plan {self.experiment.name}`"
            raise UserError(f"{error.path}: {error.reason}; {again}") from None
        return plan if plan.get("digest") == Job.of(self.experiment, "tabulate").digest else None

    @cached_property
    def linked(self) -> dict[str, tuple[Job, str]]:
        """The jobs whose results were taken over, and from which folder, by their benchmark files."""
        found = {}
        for job in jobs(self.experiment):
            with suppress(Unusable):
                if place := opened(job.note("records", "json")).get("adopted"):
                    found[str(job.note("benchmarks", "tsv"))] = job, str(place).partition("/records/")[0]
        return found

    def job_seconds(self, benchmark: str) -> float | None:
        """The wall time of a job by Snakemake's benchmark file.

        None if it hasn't run under Snakemake, or only linked what another experiment's had made.
        """
        if benchmark in self.linked:
            return None
        path = Path(benchmark)
        if path.parts[:1] not in (("results",), ("resources",)) or ".." in path.parts or not path.is_file():
            return None  # not begun, or plan.json names a file that is none of ours
        try:
            with path.open(newline="") as file:
                return float(next(csv.DictReader(file, delimiter="\t"))["s"])
        except (KeyError, ValueError, StopIteration, csv.Error):
            return None  # unfinished, or of another Snakemake

    def hamming(self, seed: int, search: str, criterion: str, weights: str, rate: float) -> Hamming:
        """Mask distances of a search at a rate."""
        path = self.path(layout.HAMMING, seed=seed, search=search, criterion=criterion, weights=weights)
        arrays = self._once(path, read_arrays)
        found = np.isclose(arrays["rates"], rate)
        if not found.any():
            raise Unusable(path, f"has no rate {rate:g}")
        unit, row = str(arrays["unit"]), int(found.argmax())
        return Hamming(
            intervals=arrays["intervals"],
            **{name: arrays[name][row] for name in ("matrix", "initial", "chance")},
            window=int(arrays["window"]),
            threshold=float(arrays["threshold"]),
            interval=unit if unit == "epoch" else f"interval of {arrays['interval_steps']} steps",
        )

    def samples(self, run: str, seed: int) -> np.ndarray:
        """A run's samples, uint8 (N, H, W, C)."""
        return self._once(self.path(layout.SAMPLES, run=run, seed=seed), load_memmap)

    def svg(self, run: str, seed: int) -> bytes | None:
        """A run's first samples as SVG; None where its codec doesn't draw."""
        told = self.file(layout.SAMPLE_LEDGER, run=run, seed=seed)
        path = self.path(layout.SAMPLES_SVG, run=run, seed=seed)
        if "svg_sha256" not in told:
            return None
        if sha256(path) != told["svg_sha256"]:
            raise damaged(path, "it isn't what was drawn")
        return path.read_bytes()

    def images(self) -> np.ndarray | Encoded:
        """The real images, uint8 (N, H, W, C)."""
        return self._once(self.path(layout.IMAGES), open_images)

    def png(self, path: Path) -> bytes:
        """A finished figure."""
        return self._once(path, Path.read_bytes)

    def losses(self, seed: int, expert: Expert) -> np.ndarray:
        """Training loss of an expert, (n, 2): step, loss; n = 0 where none was recorded.

        The unpruned network's begins with the loss of the search that it continues.
        """
        parts = dict(seed=seed, expert=expert.key, milestone=expert.iterations, search=expert.search)
        went_on = places.goes_on(self.experiment, expert)
        kinds = (layout.STATS, layout.DENSE_STATS) if went_on else (layout.STATS,)
        readings: dict[int, float] = {}
        for path in (self.path(kind, **parts) for kind in kinds):
            if path.is_file():
                told = self.attempt(self._once, path, Path.read_text) or ""
                readings |= {line["step"]: line["loss"] for line in map(json.loads, told.splitlines())}
        return np.array(sorted(readings.items()), float).reshape(-1, 2)

    def _once(self, path: Path, read: Callable[[Path], Any]) -> Any:
        """Read a file the first time it is asked for, if its record vouches for it."""
        if path not in self._read:
            self._records.check(path)
            self._read[path] = read(path)
        return self._read[path]


class Earlier(Results):
    """Results of an experiment at an earlier date, in a folder: a copy of results/{experiment}.

    The experiment's file may have changed since, so nothing is worked out anew. There are the metrics of
    runs, as the records of then vouch for them; and the tables and figures that were written then.

    Attributes:
        changed: runs, of those read, that were made for other settings than those of now.
    """

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        super().__init__(experiment, partial=True)
        self.folder, self.changed = folder, set[str]()

    def attempt(self, read: Callable[..., Value], *args: Any, **parts: Any) -> Value | None:
        """As of results of now; but what can't be used can't be remade either."""
        try:
            return read(*args, **parts)
        except Unusable as error:
            line = f"{error.path}: {error.reason}"
            if not isinstance(error, Missing) and line not in self.left_out:
                self.left_out.append(line)
            return None

    def metrics(self, run: str, seed: int) -> dict:
        """The quality of a run's samples then, by the measure of now."""
        job = Job.of(self.experiment, "fid", run=run, seed=seed)
        own = layout.path(layout.EXPERIMENT, experiment=self.experiment.name)
        files = (job.path(layout.METRICS), job.note("records", "json"))
        path, note = (self.folder / file.relative_to(own) for file in files)
        metrics, record = read_json(path), opened(note)
        if record["where"] != job.where or sha256(path) != record["made"][str(files[0])]["sha256"]:
            raise damaged(path, "it isn't what its record tells")
        if metrics["protocol"] != self.experiment.evaluation.protocols[0]:
            raise Unusable(path, f"measured by {metrics['protocol']} first")
        if record["settings"] != self._records.settings(job):
            self.changed.add(run)
        return metrics

    @property
    def whose(self) -> set[str]:
        """The experiments whose records lie there."""
        return {record["where"]["experiment"] for record in _measured(self.folder)}

    def pictures(self, figures: Iterable[str]) -> dict[str, bytes]:
        """Figures as they were drawn then, those that were."""
        found = {name: self.attempt(_whole_png, self.folder / f"figures/{name}.png") for name in figures}
        return {name: png for name, png in found.items() if png is not None}

    def tables(self) -> list[Table]:
        """The tables as they were written then."""
        found = [self.attempt(_table, path) for path in sorted(self.folder.glob("tables/*.md"))]
        return [table for table in found if table is not None]

    def _once(self, path: Path, read: Callable[[Path], Any]) -> Any:
        raise Missing(path)


def _measured(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of metrics in a folder of results, those that are whole."""
    for path in folder.glob("records/seed*/fid.*.json"):
        with suppress(Unusable):
            yield opened(path)


def dated(title: str, folder: Path) -> str:
    """A title with the date at which the newest metrics in a folder were made, by their records."""
    times = [made["time"] for record in _measured(folder) for made in record["made"].values()]
    return f"{title}, {datetime.fromtimestamp(max(times) / 1e9):%Y-%m-%d %H:%M}" if times else title


def _table(path: Path) -> Table:
    """A table from its Markdown."""
    with reading(path, ValueError, IndexError):
        return from_markdown(path.read_text(encoding="utf-8"))


def _whole_png(path: Path) -> bytes:
    """The bytes of a PNG whose checksums are right."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
        return path.read_bytes()
    except FileNotFoundError:
        raise Missing(path) from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
        raise damaged(path, error) from None


def curve(path: Path) -> Iterator[tuple[int, float, float]]:
    """Step, loss and seconds of a `stats.jsonl` that may be just being written; no other line counts.

    Raises:
        OSError, ValueError: it can't be read, or isn't text.
    """
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            told = json.loads(line)
            step, loss, seconds = int(told["step"]), float(told["loss"]), float(told["seconds"])
            if math.isfinite(seconds):
                yield step, loss, seconds
