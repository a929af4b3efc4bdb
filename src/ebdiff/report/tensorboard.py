"""Readings and previews of all trainings, finished or running, as TensorBoard (an extra) reads them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from PIL import Image

from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.jobs import jobs
from ebdiff.experiment.records import Records
from ebdiff.report.results import curve
from ebdiff.system.errors import Unusable, UserError

try:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter
except ModuleNotFoundError:
    raise UserError("`ebdiff tensorboard` needs tensorboard: pip install 'ebdiff[tensorboard]'") from None


def write(experiment: Experiment) -> Path:
    """Bring the event files up to date and give their folder; each folder in it is a run of TensorBoard.

    A run is a search, an expert over its milestones, or the previews of one. Readings are dated by seconds
    inside training, so that TensorBoard's relative time is training time.
    """
    root = layout.path(layout.EXPERIMENT, experiment=experiment.name)
    folder, records = layout.path(layout.TENSORBOARD, experiment=experiment.name), Records(experiment)
    runs: dict[Path, dict[int, tuple[float, float]]] = {}  # by step: loss, seconds
    for job in jobs(experiment):
        for finished in (path for path in job.makes if path.suffix == ".jsonl"):
            for path in (job.state / "stats.jsonl", finished):  # which is there before the other goes
                with suppress(FileNotFoundError, Unusable, ValueError):
                    if path == finished:
                        records.check(path)
                    for step, loss, seconds in curve(path):
                        runs.setdefault(finished.parent, {})[step] = loss, seconds
    for run, readings in runs.items():
        _append(folder / run.relative_to(root), _scalars(readings))
    grids = layout.path(layout.PREVIEWS, experiment=experiment.name, seed="*", of="*")
    for run in sorted(Path().glob(str(grids))):
        _append(folder / run.relative_to(root), _images(run))
    return folder


def _scalars(readings: dict[int, tuple[float, float]]) -> Iterator[Event]:
    before, since = 0, 0.0
    for step, (loss, seconds) in sorted(readings.items()):
        values = [Summary.Value(tag="loss", simple_value=loss)]
        if seconds > since:
            speed = (step - before) / (seconds - since)
            values += [Summary.Value(tag="steps per second", simple_value=speed)]
        before, since = step, seconds
        yield Event(wall_time=seconds, step=step, summary=Summary(value=values))


def _images(folder: Path) -> Iterator[Event]:
    for path in sorted(folder.glob("[0-9]*.png")):
        with Image.open(path, formats=["PNG"]) as image:
            size = dict(width=image.width, height=image.height, colorspace=len(image.getbands()))
            grid = Summary.Image(**size, encoded_image_string=path.read_bytes())
        summary = Summary(value=[Summary.Value(tag="samples", image=grid)])
        yield Event(wall_time=path.stat().st_mtime, step=int(path.stem), summary=summary)


def _append(folder: Path, events: Iterator[Event]) -> None:
    """Add what a run's event file lacks; from where it says something else it is written anew."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "events.out.tfevents.ebdiff").open("a+b") as file:
        file.seek(0)
        for event in events:
            RecordWriter(record := io.BytesIO()).write(event.SerializeToString(deterministic=True))
            there = file.read(len(record.getvalue()))
            if there != record.getvalue():
                file.seek(-len(there), io.SEEK_CUR)
                file.truncate()
                file.write(record.getvalue())
        file.truncate()
