"""Verbs read nothing that was made under other settings; reports so far leave it out."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import TINY, changed, write_experiment
from stages import DENSE, EB, FID, RANDOM, SAMPLE, TABLE, WHERE, path_of, run

from ebdiff.experiment import digests, layout, load
from ebdiff.system import files

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
    ("training.learning_rate", 1e-3, layout.HAMMING, ("figure", "tiny", "figure2", "--final")),
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
    if "--final" not in verb:  # which of many files of one search is the first is no matter
        assert Path(named[1]).parent == path_of(template).parent


@pytest.mark.slow
def test_keys_that_change_no_result_refuse_nothing(edited, capsys):
    edited(
        {"training.log_every": 3, "sampling.batch": 7, "compute.mem_mb": 900, "about": "Another sentence."}
    )
    for verb in (FID, TABLE, ("hamming-matrix", "tiny")):
        assert run(*verb) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_a_report_so_far_leaves_out_what_was_made_for_other_settings_and_says_so(edited, capsys, monkeypatch):
    edited({"runs.eb-50.iterations": 40, "sampling.steps": 9})
    assert run("table", "tiny", "table4") == 0
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
            same = digests.settings(tiny, path) == digests.settings(other, path)
            assert same == (i < after.index(first)), (key, template)


def test_every_file_that_carries_settings_has_a_digest_and_others_have_none(tiny):
    for template in (
        layout.COST,
        layout.HAMMING,
        layout.STORY,
        layout.LEDGER,
        layout.DENSE_MASKS,
        layout.SNAPSHOT,
    ):
        assert len(digests.settings(tiny, layout.path(template, interval=3, **WHERE))) == 16
    for template in (layout.IMAGES, layout.SAMPLES, layout.REPORT, layout.CLASSIFIER):
        assert digests.settings(tiny, layout.path(template, **WHERE)) is None


def test_a_file_of_no_known_settings_is_read(tmp_path, monkeypatch, tiny):
    """Such as one written before files carried any."""
    from ebdiff.experiment import inputs

    monkeypatch.chdir(tmp_path)
    path = layout.path(layout.METRICS, **WHERE)
    files.write_json(path, {"fd": 1.0})
    inputs.check(tiny, [path])
