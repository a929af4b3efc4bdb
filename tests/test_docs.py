"""What README and docs say to type can be typed, and is done, in a project where `smoke` has run."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import stages
from conftest import ROOT
from PIL import Image
from test_sketches import wave
from test_workflow import snakemake
from typer.main import get_command

from ebdiff import cli
from ebdiff.experiment import load
from ebdiff.experiment.jobs import jobs
from ebdiff.experiment.records import adopted

PAGES = [ROOT / "README.md", ROOT / "config/README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Of a page in its order: blocks for a shell or Python, and whole commands within the text.
CODE = re.compile(r"```(sh|python)\n(.*?)```|`((?:ebdiff|snakemake) [a-z-]+ [a-z_ -]+)`", re.DOTALL)


def typed(page):
    """What a page says to type: lines of a shell, and Python."""
    for language, block, inline in CODE.findall(page.read_text(encoding="utf-8")):
        lines = [block] if language == "python" else (inline or block).splitlines()
        yield from (line for line in lines if language == "python" or shlex.split(line, comments=True))


TYPED = {page: list(typed(page)) for page in PAGES}
LINES = sorted({line for lines in TYPED.values() for line in lines})
EXPERIMENTS = set(load.names(ROOT / "config/experiments")) | {"mine"}


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("ebdiff ")])
def test_a_command_of_ours_is_parsed(line):
    """Click itself reads it; nothing runs."""
    verb, *words = shlex.split(line, comments=True)[1:]
    known = get_command(cli.app).commands
    assert verb in known
    known[verb].make_context(verb, words)


@pytest.mark.parametrize("line", [line for line in LINES if "experiments=" in line])
def test_an_experiment_that_is_named_is_there(line):
    (names,) = re.findall(r"experiments=([\w,-]+)", line)
    assert set(names.split(",")) <= EXPERIMENTS


def test_enough_is_typed_and_every_link_leads_somewhere():
    assert len(LINES) > 30
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


def test_the_lines_that_add_a_run_can_be_added(tmp_path):
    shutil.copy(ROOT / "config/experiments/digits.yaml", tmp_path)
    (lines,) = re.findall(r"```yaml\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "more.yaml").write_text(f"base: digits\n{lines}")
    before, after = (load.load(name, tmp_path) for name in ("digits", "more"))
    assert after.runs.keys() - before.runs.keys() == {"eb-80"} < set(after.tables["table4"])


# --- typed, in a project where smoke has run ---------------------------------------------------------------

# What isn't executed here, by how the line begins.
ELSEWHERE = {
    "make ": "makes the environment from the network; `make run` is what a person tries",
    "cd ": "the environment likewise", "python3 -m venv": "likewise", "pip ": "likewise",
    "sinfo": "wants a cluster", "$EDITOR": "wants a person", "tmux": "wants a terminal",
    "tensorboard ": "a server, no part of ours",
    "export ": "a setting of the shell",
    "python benchmarks/": "minutes on a quiet machine; test_benchmarks runs parts",
    "snakemake --cores all --config experiments=digits_": "hours; test_workflow plans them by these words",
}  # fmt: skip
# What other words stand for: the default experiment is smoke, another one its twin, images are few and small.
HERE = {
    r"\bdigits_full\b": "twin", r"\bdigits\b": "smoke", r"plan cifar10": "plan smoke",
    r" --follow\b": "",
    r"\bPATH --size 64": "photos --size 8", r"\bFILE.ndjson": "drawings.ndjson --no-estimate",
}  # fmt: skip
# What a line leaves, by a part of it as it is typed here.
LEFT = {
    "draw smoke": "drawn/images/00015.png", "draw ensemble": "received/grid.png",
    "export smoke": "ensemble.md", "compare smoke twin": "results/smoke/compared/twin/compare.html",
    "compare smoke old/smoke": "results/smoke/compared/smoke/compare.html",
    "init mine": "config/experiments/mine.yaml", "init drawings": "config/experiments/drawings.yaml",
    "tabulate smoke table4": "results/smoke/so-far/tables/table4.tex",
    "so-far": "results/smoke/so-far/report.html", " runs=": "results/smoke/so-far/report.html",
    "--report": "results/snakemake-report.html", "tune smoke": "config/tuning/smoke.yaml",
    "plan smoke": "results/smoke/plan.json", "tensorboard smoke": "results/smoke/tensorboard",
}  # fmt: skip


@pytest.fixture
def project(finished, tmp_path, monkeypatch):
    """A copy of the finished project, smoke its default; with images, drawings, a twin, older results."""
    shutil.copytree(finished, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    shutil.copytree("results/smoke", "old/smoke")
    Path("config/config.yaml").write_text("experiments: [smoke]\n")
    Path("config/experiments/twin.yaml").write_text("base: smoke\nabout: Another.\n")
    Path("photos").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)):
        Image.fromarray(pixels).save(f"photos/{i:02}.png")
    Path("drawings.ndjson").write_text("\n".join(map(wave, range(40))))


def link():
    """What smoke made is the twin's, too."""
    for job in jobs(load.load("twin")):
        paged = job.stage.verb in ("tabulate", "report")
        assert adopted(job) or job.stage.alone or paged or "experiment" not in job.where, job.name


def here(line):
    """A line of a page as it is typed here: its words; Snakemake's longer experiments are dry runs."""
    long = "experiments=" in line or "profiles/slurm" in line
    for word, other in {} if long else HERE.items():
        line = re.sub(word, other, line)
    return [*shlex.split(line, comments=True), *(["--dry-run"] if long and "--dry-run" not in line else [])]


def execute(words):
    """A command of ours in this process, of Snakemake in another: it succeeds, and leaves what it should."""
    line = shlex.join(words)
    left = [Path(path) for part, path in LEFT.items() if part in line and "--dry-run" not in line]
    for path in filter(Path.is_file, left):
        path.unlink()
    if words[0] == "ebdiff":
        assert stages.run(*words[1:]) == 0, line
    else:
        done = snakemake(".", *words[1:])
        assert done.returncode == 0 and "Traceback" not in done.stderr, line + done.stderr
    assert all(path.exists() for path in left), line


@pytest.mark.slow
def test_what_pages_say_to_type_is_done(project):
    link()
    done = []
    for line in (line for lines in TYPED.values() for line in lines):
        if "\n" in line:
            names = {}
            exec(line.replace('"digits"', '"smoke"'), names)
            assert names["images"].shape == (16, 8, 8, 1) and names["images"].dtype == np.uint8
        elif not line.startswith(tuple(ELSEWHERE)) and (words := here(line)) not in done:
            execute(words)
            done.append(words)
            shutil.rmtree("config/tuning", ignore_errors=True)  # by `tune`: results would depend on it
