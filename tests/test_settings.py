"""Verbs read nothing that was made under other settings; reports so far leave it out."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, changed, vouch, write_experiment
from stages import DENSE, EB, FID, RANDOM, SAMPLE, TABLE, WHERE, path_of, run

from ebdiff.experiment import layout, load, records, stages
from ebdiff.experiment.jobs import Job, jobs, maker
from ebdiff.experiment.members import Items
from ebdiff.experiment.records import Records
from ebdiff.system import files
from ebdiff.system.errors import Unusable

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


def test_masks_and_tickets_depend_on_the_walk_and_searches_too(tiny, monkeypatch):
    """Masks stop a search. Files and kept states from before the present walk are of other settings."""
    verbs = ("prepare-data", "measure-cost", "train-dense", "prune-per-epoch", "select-eb-epoch")
    digests = []
    for walk in (stages.WALK, "another"):
        monkeypatch.setattr(stages, "WALK", walk)
        digests.append([Job.of(verb=verb, **{**WHERE, "experiment": tiny}).digest for verb in verbs])
    assert [a == b for a, b in zip(*digests, strict=True)] == [True, True, False, False, False]


def test_a_ticket_at_a_searched_rate_changes_nothing_of_the_others(vary):
    """The finished network's masks are taken at all rates of its search: tickets stand beside them."""
    more = {"title": "EB 30 %", "method": "eb", "rate": 0.3, "iterations": 10}
    final = {"title": "F", "method": "finetune", "search": "final", "rate": 0.5, "iterations": 10}
    one, two = vary({"runs.cut": final}), vary({"runs.cut": final, "runs.eb-30": more})
    known, now = ({job.name: Records(e).settings(job) for job in jobs(e)} for e in (one, two))
    assert len(now) > len(known)
    changed_ones = {name for name, value in known.items() if now[name] != value}
    assert {Path(name).name for name in changed_ones} == {"tabulate", "report"}


def test_gradient_masks_are_asked_for_only_where_a_run_has_such_a_ticket(vary):
    searched = {"searches.full.criteria": ["magnitude", "taylor"], "searches.full.weights": ["ema", "raw"]}
    eb = {
        "title": "EB",
        "method": "eb",
        "criterion": "taylor",
        "weights": "raw",
        "rate": 0.3,
        "iterations": 10,
    }
    for runs, asked in (({}, {"ema"}), ({"runs.taylor": eb}, {"raw"})):
        found = [job.where for job in jobs(vary({**searched, **runs})) if job.stage.verb == "hamming-matrix"]
        assert {where["weights"] for where in found if where["criterion"] == "taylor"} == asked
        assert {where["weights"] for where in found if where["criterion"] == "magnitude"} == {"ema", "raw"}


@pytest.mark.parametrize(
    "changes",
    [{"dense.iterations": 100}, {"runs.scratch.method": "control"}, {"runs.scratch.iterations": 50}],
)
def test_a_milestone_like_a_run_depends_on_what_that_run_is_charged(vary, changes):
    """Trained from scratch after the unpruned network, a run costs that one, too."""
    fresh = {"init": "fresh", "iterations": 40, "rate": 0.5}
    runs = {
        "runs.scratch": {"title": "Scratch", "method": "scratch", **fresh},
        "runs.like": {"title": "Like", "method": "control", **fresh, "iterations": "like-scratch"},
    }
    before, after = (
        Job.of(e, "finetune-region", seed=0, expert="fresh-0.5-t0-1000", milestone="like-scratch").digest
        for e in (vary(runs), vary({**runs, **changes}))
    )
    assert before != after


def test_a_milestone_after_a_public_checkpoint_depends_on_it(vary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    longer = {"title": "Longer", "method": "control", "init": "dense", "iterations": 120}
    changes = {"dense.from": "public.safetensors", "runs.longer": longer}
    experiment = vary(changes)
    given, after = (
        Job.of(experiment, "finetune-region", seed=0, expert="dense-full", milestone=m) for m in (80, 120)
    )
    assert given.path(layout.MILESTONE) in after.reads
    Path("public.safetensors").write_bytes(b"one")
    given.path(layout.MILESTONE).parent.mkdir(parents=True)
    given.path(layout.MILESTONE).write_bytes(b"trained")
    vouch(experiment, "finetune-region", seed=0, expert="dense-full", milestone=80)
    record = files.read_json(given.note("records", "json"))
    del record["record"]
    records._write(
        given, {**record, "read": {"public.safetensors": files.sha256(Path("public.safetensors"))}}
    )
    Records(experiment).check(given.path(layout.MILESTONE))
    Path("public.safetensors").write_bytes(b"two")
    with pytest.raises(Unusable, match=r"made from another public\.safetensors"):
        Records(experiment).check(given.path(layout.MILESTONE))


def test_labels_are_read_by_whatever_sees_them(tiny, monkeypatch):
    def jobs_reads():
        jobs = (("train-dense", {"search": "full"}), ("sample", {"run": "eb-50"}))
        return [Job.of(tiny, verb, seed=0, **where).reads for verb, where in jobs]

    labels = layout.path(layout.LABELS, dataset="digits")
    assert not any(labels in reads for reads in jobs_reads())
    monkeypatch.setattr(type(tiny.dataset), "items", Items((1, 8, 8), classes=10))
    assert all(labels in reads for reads in jobs_reads())


def settings(experiment, path):
    return Records(experiment).settings(maker(experiment, path))


@pytest.mark.slow
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


def test_a_checkpoint_of_another_experiment_is_a_file_from_outside(vary):
    e = vary({"dense.from": "results/other/seed0/experts/dense-full/800.safetensors"})
    assert maker(e, Path(e.dense.source)) is None
    where = dict(seed=0, expert="dense-full", milestone=80)
    assert len(Records(e).settings(Job.of(e, "finetune-region", **where))) == 16
