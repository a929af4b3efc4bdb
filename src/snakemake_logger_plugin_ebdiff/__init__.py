"""Snakemake's console for people: a line for every finished job (`logger: ebdiff` in the profiles).

Snakemake finds the plugin by the name of this package. Its own text, with the inputs, reasons and commands of
every job, goes to `.snakemake/log/` all the same.
"""

from __future__ import annotations

import re
import sys
import time
from logging import INFO, LogRecord
from pathlib import Path
from typing import NamedTuple

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent
from tqdm import tqdm

# What Snakemake says at every start and before every job.
ROUTINE = re.compile(
    "Using (workflow specific profile|shell)|Assuming unrestricted|Building DAG|Rules claiming|"
    "(Conda|Singularity) .*ignored|Select jobs"
)
TAIL = 5  # lines of a failed job's log: our errors are one, a trace ends with what happened


class Running(NamedTuple):
    """A job that was started, or submitted: its rule and wildcards, and when."""

    name: str
    since: float

    def __str__(self) -> str:
        seconds = round(time.monotonic() - self.since)
        minutes, hours = seconds // 60, seconds // 3600
        took = f"{hours} h {minutes % 60:02} min" if hours else f"{minutes} min {seconds % 60:02} s"
        return f"{self.name}  {took if minutes else f'{seconds} s'}"


class LogHandler(LogHandlerBase):
    """Says what ended and how much is left; dry runs and `--verbose` are Snakemake's own text."""

    writes_to_stream = True
    writes_to_file = has_filter = has_formatter = needs_rulegraph = False

    def __post_init__(self) -> None:
        self.stream = sys.stdout if self.common_settings.stdout else sys.stderr
        self.running: dict[int, Running] = {}
        self.ended: list[Running] = []
        self.bar = tqdm(
            desc="running",
            bar_format="{desc}",  # the jobs that run now, on a terminal only
            file=self.stream,
            leave=False,
            disable=self.common_settings.dryrun or not self.stream.isatty(),
        )

    def emit(self, record: LogRecord) -> None:
        """Say a record, if it is worth a line; called from Snakemake's own thread for it, one at a time."""
        try:
            text = self._lines(record)
            if text:
                tqdm.write(text, file=self.stream)
                self.stream.flush()
            self.bar.set_description_str("running: " + ", ".join(job.name for job in self.running.values()))
        except BrokenPipeError:
            pass  # nobody listens, as after `| head`: the jobs go on
        except Exception:  # as every handler of Python's logging: what can't be said stops no training
            self.handleError(record)

    def close(self) -> None:
        self.bar.close()
        super().close()

    def _lines(self, record: LogRecord) -> str | None:
        if self.common_settings.dryrun or self.common_settings.verbose:
            return self.format(record)
        match getattr(record, "event", None):
            case LogEvent.JOB_INFO:
                where = (f"seed{v}" if k == "seed" else v for k, v in record.wildcards.items())
                self.running[record.jobid] = Running(" ".join([record.rule_name, *where]), time.monotonic())
            case LogEvent.JOB_FINISHED if record.job_id in self.running:
                self.ended.append(self.running.pop(record.job_id))
            case LogEvent.PROGRESS:
                jobs, self.ended = self.ended, []
                return "\n".join(f"{_now()}  {record.done:>4} of {record.total}  {job}" for job in jobs)
            case LogEvent.JOB_ERROR:
                job = self.running.pop(record.jobid, record.rule_name)
                return "\n".join([f"{_now()}  FAILED  {job}", *_tails(record.log)])
            case LogEvent.RUN_INFO:
                return f"{_now()}  jobs: {record.stats['total']}"
            case None if record.levelno > INFO or not ROUTINE.match(str(record.msg)):
                return self.format(record)
            case LogEvent.ERROR if "returned non-zero exit status" in str(record.msg):
                return None  # a verb's own log says why, and is shown; what a signal killed has said nothing
            case LogEvent.ERROR | LogEvent.GROUP_ERROR | LogEvent.DEBUG_DAG:
                return self.format(record)
        return None


def _now() -> str:
    return time.strftime("%H:%M:%S")


def _tails(logs: list[str]) -> list[str]:
    """Where the logs of a failed job are, and how they end."""
    found = []
    for path in logs:
        try:
            lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []  # it never began
        found += [f"          {path}:", *(f"          {line}" for line in lines[-TAIL:])]
    return found
