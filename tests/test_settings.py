"""Verbs read nothing that was made under other settings; reports so far leave it out."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, changed, write_experiment
from stages import DENSE, EB, FID, RANDOM, SAMPLE, TABLE, WHERE, path_of, run

from ebdiff.experiment import layout, load
from ebdiff.experiment.jobs import maker
from ebdiff.experiment.records import Records

# A key that only a stage uses, that stage's file, and the verb that would read it.
CHANGES = [
    ("training.learning_rate", 1e-3, layout.DENSE_MASKS, ("prune-per-epoch", "tiny")),
    ("training.learning_rate", 1e-3, layout.MASKS, ("hamming-matrix", "tiny")),
    ("searches.full.threshold", 0.12, layout.SNAPSHOT, ("select-eb-epoch", "tiny", "--rate", "0.5")),
    ("searches.full.window", 4, layout.SNAPSHOT, RANDOM),
    ("searches.full.threshold", 0.12, layout.TICKET, EB),
    ("dataset.flip", False, layout.DENSE_LAST, DENSE),
    ("training.ema_decay", 0.5, layout.MILESTONE, SAMPLE),
    ("sampling.steps", 9, layout.SAMPLE_LEDGER, FID),
    ("searches.full.threshold", 0.12, layout.SAMPLE_LEDGER, FID),
    ("dataset.crop", "centre", layout.MANIFEST, ("train-dense", "tiny")),
    ("training.batch", 8, layout.COST, TABLE),
    ("sampling.steps", 9, layout.METRICS, TABLE),
    ("training.learning_rate", 1e-3, layout.HAMMING, TABLE),
]


@pytest.fixture
def edited(made, monkeypatch):
    """Edit the finished project's experiment; the edit is taken back."""
    monkeypatch.chdir(made)
    yield lambda changes: write_experiment(made, changes)
    write_experiment(made)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value", "template", "verb"), CHANGES)
def test_a_verb_refuses_what_was_made_for_other_settings(edited, capsys, key, value, template, verb):
    edited({key: value})
    capsys.readouterr()
    assert run(*verb) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    named = re.fullmatch(r"ebdiff: (\S+): made for other settings; remake it with `rm -r .*`", lines[0])
    assert named, lines[0]
    if verb != TABLE:  # which of many files of one search is the first is no matter
        assert path_of(template).is_relative_to(Path(named[1]).parent)


@pytest.mark.slow
def test_keys_that_change_no_result_refuse_nothing(made, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(made, tmp_path / "project")
    monkeypatch.chdir(folder)
    write_experiment(
        folder,
        {"training.log_every": 3, "sampling.batch": 7, "compute.mem_mb": 900, "about": "Another sentence."},
    )
    for verb in (FID, TABLE, ("hamming-matrix", "tiny")):
        assert run(*verb) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_a_report_so_far_leaves_out_what_was_made_for_other_settings_and_says_so(edited, capsys, monkeypatch):
    edited({"runs.eb-50.iterations": 40, "sampling.steps": 9})
    assert run("tabulate", "tiny", "table4") == 0
    said = capsys.readouterr()
    text = Path("results/tiny/so-far/tables/table4.md").read_text().replace("\\", "")
    assert "Left out: results/tiny/seed0/runs/eb-50/metrics.json: made for other settings" in text
    assert "left out: results/tiny/seed0/runs/eb-50/metrics.json" in said.err
    csv = Path("results/tiny/so-far/tables/table4.csv").read_text().splitlines()
    column = csv[0].split(",").index("cfd")
    assert {line.split(",")[column] for line in csv[1:]} == {""}
    shutil.rmtree("results/tiny/so-far")


def test_settings_follow_every_stage_before_and_no_other(tiny):
    """One key of each stage: the files whose settings it changes are those of that stage and after it."""
    after = [layout.MANIFEST, layout.DENSE_LAST, layout.MASKS, layout.TICKET, layout.MILESTONE]
    after += [layout.SAMPLE_LEDGER, layout.METRICS]
    places = {
        "dataset.broken": ("skip", layout.MANIFEST),
        "training.ema_decay": (0.5, layout.DENSE_LAST),
        "searches.full.threshold": (0.2, layout.DENSE_LAST),
        "sampling.steps": (5, layout.SAMPLE_LEDGER),
        "evaluation.precision_recall": (True, layout.METRICS),
    }
    for key, (value, first) in places.items():
        other = load.parse(changed(TINY, {key: value}), "tiny.yaml")
        for i, template in enumerate(after):
            path = layout.path(template, **WHERE)
            same = settings(tiny, path) == settings(other, path)
            assert same == (i < after.index(first)), (key, template)


def settings(experiment, path):
    return Records(experiment).settings(maker(experiment, path))


def test_a_file_whose_input_was_made_again_with_another_content_is_refused(made, tmp_path, monkeypatch):
    """By hand, without Snakemake: samples drawn from experts that are not those of now."""
    folder = shutil.copytree(made, tmp_path / "project")
    monkeypatch.chdir(folder)
    path = path_of(layout.MILESTONE)
    shutil.rmtree(path.parent)
    assert run(*EB) == 0  # the same bits, but another start date in its story
    lines = refused(FID)
    assert f"made from another {path}" in lines


def refused(verb):
    out = subprocess.run(
        [sys.executable, "-m", "ebdiff.cli", *verb], capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 1
    return out.stderr
