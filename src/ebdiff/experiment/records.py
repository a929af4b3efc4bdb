"""One record per job: which files it read and made, under which settings, with their hashes.

Formats notice little: JSON, npy and safetensors nothing at all. So nothing is used whose record doesn't vouch
for it: that it is whole, lies where it was put, and was made from what is there now, for the settings of now.
"""

from __future__ import annotations

import binascii
import os
import shutil
from base64 import urlsafe_b64decode
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ebdiff.experiment import layout, load
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.jobs import Job, maker, makers, of_dataset
from ebdiff.experiment.schema import is_name
from ebdiff.experiment.stages import digest
from ebdiff.system.errors import Missing, Unusable, UserError, damaged, explained
from ebdiff.system.files import holding, linked, read_json, sha256, write_json


class Records:
    """The records of an experiment's jobs.

    Args:
        experiment: whose settings hold.
        deep: read large files whole, too, instead of trusting their size and date.
    """

    def __init__(self, experiment: Experiment, *, deep: bool = False) -> None:
        self.experiment, self.deep = experiment, deep
        self._settings: dict[str, str] = {}
        self._records: dict[str, dict[str, Any]] = {}

    def settings(self, job: Job) -> str:
        """A hash of all configuration that a job's result depends on: its own and that of what it reads."""
        if job.name not in self._settings:
            read = [self.settings(other) for other in makers(self.experiment, job.reads)]
            self._settings[job.name] = digest(job.digest, read)
        return self._settings[job.name]

    def check(self, path: Path) -> str:
        """The hash of a file that is what its job made, for the settings of now; of a folder, of all in it.

        Of a file from outside the workflow it is just the hash.

        Raises:
            Missing: it isn't there.
            Unusable: damaged, foreign, or made for other settings or from something else.
        """
        if path.is_dir():
            return digest([(file.name, self.check(file)) for file in self._files(path)])
        job = maker(self.experiment, path)
        if job is None:
            return sha256(path)
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise Missing(path) from None
        made = self._record(job, path)["made"].get(str(path))
        if made is None:
            raise Unusable(path, "not what its job made")
        trusted = not self.deep and any(job.path(template) == path for template in job.stage.large)
        dated = trusted and stat.st_mtime_ns == made["time"]
        if stat.st_size != made["size"] or not (dated or sha256(path) == made["sha256"]):
            raise damaged(path, "it isn't what its job made")
        if trusted and not dated:  # a copy, or touched by Snakemake: read once, not every time
            made["time"] = stat.st_mtime_ns
            with suppress(OSError):  # somebody else's results
                _write(job, self._records[job.name])
        return made["sha256"]

    def _files(self, folder: Path) -> list[Path]:
        """The files of a folder that is an output, by its record: what is missing is told."""
        job = maker(self.experiment, folder)
        if job is None:
            return sorted(folder.glob("[!.]*"))
        there = {file for file in folder.glob("[!.]*") if not file.is_dir()}
        noted = {Path(p) for p in self._record(job, folder)["made"] if Path(p).parent == folder}
        if not noted:  # a file should be there
            raise Unusable(folder, "not what its job made")
        return sorted(there | noted)

    def _record(self, job: Job, path: Path) -> dict[str, Any]:
        """A job's record, if it is of this job and of the settings of now.

        Raises:
            Unusable: it isn't, for `path`.
        """
        if job.name not in self._records:
            place = job.note("records", "json")
            try:
                record = opened(place)
            except Missing:
                raise Unusable(path, f"its record {place} is missing") from None
            except Unusable:
                raise Unusable(path, f"its record {place} is damaged") from None
            if (record["stage"], record["where"]) != (job.stage.verb, dict(job.where)):
                raise Unusable(path, f"its record {place} is another file's")
            if record["settings"] != self.settings(job):
                raise Unusable(path, "made for other settings")
            for source in job.reads:  # whatever other path it may name
                found = record["read"].get(str(source))
                if found is not None and self._noted(source) not in (None, found):
                    raise Unusable(path, f"made from another {source}")
            self._records[job.name] = record
        return self._records[job.name]

    def _noted(self, path: Path) -> str | None:
        """The hash of a file as its own job's record has it, unchecked, or of one from outside the workflow.

        None if that isn't there.
        """
        job = maker(self.experiment, path)
        try:
            if job is None:
                return sha256(path)
            made = read_json(job.note("records", "json"))["made"]
            inside = sorted(Path(p) for p in made if Path(p).parent == path)
            if inside:
                return digest([(file.name, made[str(file)]["sha256"]) for file in inside])
            return made[str(path)]["sha256"]
        except (Unusable, KeyError, TypeError):
            return None


def sealed(told: dict[str, Any]) -> dict[str, Any]:
    """What JSON is to tell, with a hash of it all."""
    return {**told, "record": digest(told)}


def opened(path: Path) -> dict[str, Any]:
    """What a sealed JSON file tells.

    Raises:
        Missing: it isn't there.
        Unusable: it isn't what was written.
    """
    found = read_json(path)
    with suppress(RecursionError):  # lists in lists in lists: nothing of ours
        if isinstance(found, dict) and found.pop("record", None) == digest(found):
            return found
    raise damaged(path, "it isn't what was written")


def _write(job: Job, record: dict[str, Any]) -> None:
    write_json(job.note("records", "json"), sealed(record))


def _entry(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"sha256": sha256(path), "size": stat.st_size, "time": stat.st_mtime_ns}


class Work:
    """A job at work: what it reads is checked at the beginning, its record is written at the end.

    Attributes:
        job: which.
        settings: hash of the configuration that its result depends on.
        read: hash of every file or folder that it reads, by path.

    Raises:
        UserError: an unknown wildcard.
        Missing, Unusable: as `Records.check`, of what it reads and of what it may go on from.
    """

    def __init__(self, experiment: Experiment, verb: str, **where: object) -> None:
        records = Records(experiment)
        self.job = Job.of(experiment, verb, **where)
        self.settings = records.settings(self.job)
        self.read = {str(path): records.check(path) for path in self.job.reads}
        for path in self.job.continues:
            records.check(path)
        self.path = self.job.path

    @property
    def stamp(self) -> dict[str, Any]:
        """What an unfinished state of the job belongs to: its settings, and everything that it reads.

        Not what it went on from, with which its result is the same as without.
        """
        return {"settings": self.settings, "inputs": self.read}

    def end(self) -> None:
        """Vouch for what the job made: after everything is under its final name, before kept state goes."""
        files = [f for p in self.job.makes for f in (sorted(p.glob("[!.]*")) if p.is_dir() else [p])]
        _write(
            self.job,
            {
                "stage": self.job.stage.verb,
                "where": dict(self.job.where),
                "settings": self.settings,
                "read": self.read,
                "made": {str(path): _entry(path) for path in files},
            },
        )


def adopted(job: Job) -> Path | None:
    """Take over what another experiment's job of equal settings and inputs made; None if there is none.

    Files are linked, not copied, where the file system can; all of ours are replaced, never written into.
    Of what times a device nothing is taken over.

    Returns:
        the other job's record.
    """
    if job.stage.alone or "experiment" not in job.where:
        return None
    records, mine = Records(job.experiment), job.where["experiment"]
    settings, read = records.settings(job), None
    for folder in sorted(layout.path(layout.EXPERIMENT, experiment=mine).parent.glob("*/")):
        if folder.name == mine or not is_name(folder.name):
            continue
        twin = job.experiment.model_copy(update={"name": folder.name})
        other = Job(twin, job.stage, {**job.where, "experiment": folder.name})
        try:
            record = opened(place := other.note("records", "json"))
            if record["settings"] != settings:
                continue
            read = read or {str(path): records.check(path) for path in job.reads}
            if [record["read"].get(str(path)) for path in other.reads] != list(read.values()):
                continue
            pairs = list(zip(other.makes, job.makes, strict=True))
            files = [(a, b) for a, b in pairs if not a.is_dir()]
            files += [(f, b / f.name) for a, b in pairs if a.is_dir() for f in sorted(a.glob("[!.]*"))]
            if {str(a): sha256(a) for a, _ in files} != {p: m["sha256"] for p, m in record["made"].items()}:
                continue
        except (Missing, Unusable, OSError, KeyError):
            continue
        beside = [(other.path(t), job.path(t)) for t in job.stage.beside if other.path(t).exists()]
        with holding(job.state):
            for path in (job.state, *(b for a, b in pairs if a.is_dir())):  # of another making
                shutil.rmtree(path, ignore_errors=True)
            for source, path in (*beside, *files):
                linked(source, path)
            told = {"stage": job.stage.verb, "where": dict(job.where), "settings": settings, "read": read}
            made = {str(path): _entry(path) for _, path in files}
            _write(job, {**told, "made": made, "adopted": str(place)})
        return place
    return None


def verify(experiment: Experiment, jobs: list[Job]) -> Iterator[tuple[Path, str]]:
    """What of some jobs' outputs is there but not what it should be: (path, reason). Reads everything."""
    records = Records(experiment, deep=True)
    for job in jobs:
        for path in job.makes:
            if os.path.lexists(path):
                try:
                    records.check(path)
                except Unusable as error:
                    yield error.path, str(error)
                except OSError as error:
                    yield path, explained(error)


def unnoticed(marks: Path = Path(".snakemake/incomplete")) -> Iterator[Path]:
    """Snakemake's marks of unfinished outputs that are finished, as records vouch: it died before their jobs.

    Snakemake would remove such an output and make it again, which of a training takes days. A mark is
    named after its output, in base64, a long one in folders whose names begin with @; one of another form is
    none of these, and its output is made again.
    """
    for mark in (path for path in marks.rglob("*") if path.is_file()):
        parts = (part.removeprefix("@") for part in mark.relative_to(marks).parts)
        with suppress(binascii.Error, UnicodeDecodeError, IndexError, UserError, OSError):
            path = Path(urlsafe_b64decode("".join(parts)).decode())
            if not path.exists():  # of a job that runs, most of the time: no need to read an experiment
                continue
            of_all = path.parts[0] == "resources"  # experiments that have the dataset
            experiment = of_dataset(path.parts[2]) if of_all else load.load(path.parts[1])
            if maker(experiment, path) is not None:
                Records(experiment).check(path)
                yield mark
