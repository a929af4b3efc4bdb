"""What README and docs say to type can be typed: verbs, options and experiments are there."""

import re
import shlex

import pytest
from conftest import ROOT
from typer.main import get_command

from ebdiff import cli
from ebdiff.experiment import load

PAGES = [ROOT / "README.md", ROOT / "config/README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    b for page in PAGES for b in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]
TYPED = sorted(
    {
        shlex.join(words)
        for b in BLOCKS
        for line in b.splitlines()
        if (words := shlex.split(line, comments=True))
    }
)
EXPERIMENTS = set(load.names(ROOT / "config/experiments")) | {"mine"}


@pytest.mark.parametrize("line", [line for line in TYPED if line.startswith("ebdiff ")])
def test_a_command_of_ours_is_parsed(line):
    """Click itself reads it; nothing runs."""
    verb, *words = shlex.split(line)[1:]
    known = get_command(cli.app).commands
    assert verb in known
    known[verb].make_context(verb, words)


@pytest.mark.parametrize("line", [line for line in TYPED if "experiments=" in line])
def test_an_experiment_that_is_named_is_there(line):
    (names,) = re.findall(r"experiments=([\w,-]+)", line)
    assert set(names.split(",")) <= EXPERIMENTS


def test_enough_is_typed_and_every_link_leads_somewhere():
    assert len(TYPED) > 30
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500
