"""What Snakemake says on the console through our logger."""

import io
import logging
import re
from types import SimpleNamespace

import pytest
from snakemake_interface_logger_plugins.common import LogEvent
from test_workflow import copied, snakemake

from snakemake_logger_plugin_ebdiff import LogHandler

LINE = re.compile(r"\d\d:\d\d:\d\d +(\d+) of (\d+)  (.*)  \d+ s")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def console(monkeypatch):
    """A handler as Snakemake makes it, and what it has written."""

    def open_console(stream, **settings):
        monkeypatch.setattr("sys.stderr", stream)
        usual = dict(stdout=False, dryrun=False, verbose=False)
        handler = LogHandler(SimpleNamespace(**{**usual, **settings}), None)

        def say(event=None, message=None, level=logging.INFO, **told):
            record = logging.LogRecord("snakemake", level, "", 0, message, None, None)
            record.__dict__.update(told, event=event)
            handler.emit(record)

        return handler, say

    return open_console


def a_job(say, number, rule, **wildcards):
    say(LogEvent.JOB_INFO, jobid=number, rule_name=rule, wildcards=wildcards)
    say(LogEvent.SHELLCMD, cmd="ebdiff ...")


def test_a_job_is_one_line_when_it_ends(console):
    out = io.StringIO()
    _, say = console(out)
    say(message="Building DAG of jobs...")
    say(LogEvent.RUN_INFO, message="Job stats: ...", stats={"fid": 2, "total": 2})
    a_job(say, 7, "fid", experiment="digits", seed="0", run="eb-50")
    a_job(say, 8, "fid", experiment="digits", seed="1", run="eb-50")
    say(LogEvent.JOB_FINISHED, job_id=8)
    say(LogEvent.PROGRESS, done=1, total=2)
    say(message="Trying to restart job 7.")
    say(LogEvent.JOB_FINISHED, job_id=7)
    say(LogEvent.PROGRESS, done=2, total=2)
    first, *rest = out.getvalue().splitlines()
    assert first.endswith("jobs: 2")
    assert LINE.fullmatch(rest[0]).groups() == ("1", "2", "fid digits seed1 eb-50")
    assert rest[1] == "Trying to restart job 7."
    assert LINE.fullmatch(rest[2]).groups() == ("2", "2", "fid digits seed0 eb-50")
    assert len(rest) == 3


def test_a_failed_job_ends_with_its_log(console, tmp_path):
    out, log = io.StringIO(), tmp_path / "fid.log"
    long = "ebdiff: " + "x" * 300  # never wrapped: people copy commands from it
    log.write_text("\n".join([*map(str, range(20)), long]))
    _, say = console(out)
    a_job(say, 7, "fid", seed="0")
    ended, died = "returned non-zero exit status 1.", "died with <Signals.SIGKILL: 9>."
    say(LogEvent.ERROR, message=f"RuleException:\nCommand ... {ended}", level=logging.ERROR)
    say(LogEvent.JOB_ERROR, jobid=7, rule_name="fid", log=[str(log)], level=logging.ERROR)
    failed, where, *tail = out.getvalue().splitlines()
    assert "FAILED  fid seed0  0 s" in failed
    assert where.strip() == f"{log}:"
    assert [line.strip() for line in tail] == ["16", "17", "18", "19", long]
    say(LogEvent.ERROR, message=f"RuleException:\nCommand ... {died}", level=logging.ERROR)
    assert out.getvalue().endswith(f"{died}\n")  # as of lack of memory: no log tells


def test_what_runs_stands_below_on_a_terminal_only(console):
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        handler, say = console(stream)
        a_job(say, 7, "fid", seed="0")
        assert ("running: fid seed0" in stream.getvalue()) is shown
        handler.close()


def test_a_dry_run_and_other_errors_are_snakemakes_text(console):
    out = io.StringIO()
    _, say = console(out, dryrun=True)
    say(message="Building DAG of jobs...")
    _, say = console(out)
    say(LogEvent.ERROR, message="MissingInputException in rule fid", level=logging.ERROR)
    assert out.getvalue() == "Building DAG of jobs...\nMissingInputException in rule fid\n"


def test_nobody_listening_stops_nothing(console, capsys):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    _, say = console(Closed())
    say(message="hello")
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_snakemake_uses_it(tmp_path):
    """A verb's error is there as the verb said it, and all that isn't said is kept in a file."""
    folder = copied(tmp_path)
    manifest = "resources/data/digits/manifest.json"
    done = snakemake(folder, manifest)
    assert [m.groups() for m in LINE.finditer(done.stderr)] == [("1", "1", "prepare_data digits")]
    assert len(done.stderr.splitlines()) <= 6
    (log,) = folder.glob(".snakemake/log/*.log")
    assert "Shell command: ebdiff prepare-data" in log.read_text()
    (folder / "resources/data/digits/images.npy").write_bytes(b"")
    done = snakemake(folder, "resources/data/digits/classifier.safetensors")
    assert done.returncode == 1
    assert done.stderr.count("FAILED") == done.stderr.count("ebdiff: resources/data/digits/images.npy: ") == 1
