"""What stands in another experiment's folder with equal settings is linked; a longer training goes on."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import write_experiment
from stages import EB, EXPERT, SAMPLE, run
from test_training import CPU, eb_at, milestone, same, tensors_of, ticket

from ebdiff.experiment import layout, load
from ebdiff.experiment.jobs import Job
from ebdiff.experiment.records import Records
from ebdiff.training.train import finetune_region


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    """A copy of the finished tiny experiment, to add others to."""
    shutil.copytree(made, tmp_path / "project", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def of(stage, name):
    return [name if word == "tiny" else word for word in stage]


@pytest.mark.slow
def test_equal_stages_of_another_experiment_are_linked_with_a_word(project, capsys):
    write_experiment(project, {"about": "Another."}, name="twin")
    twin = load.load("twin")
    (project / "results/My notes {x}").mkdir()  # no experiment's
    cut = [("prune-per-epoch", "tiny"), ("select-eb-epoch", "tiny", "--rate", "0.5")]
    for stage in (("train-dense", "tiny"), *cut, EB, SAMPLE):
        assert run(*of(stage, "twin")) == 0
        said = capsys.readouterr().out
        assert f"taken over from results/tiny/records/seed0/{stage[0]}." in said
    job = Job.of(twin, "finetune-region", seed=0, expert=EXPERT, milestone=40)
    for path in (*job.makes, *Job.of(twin, "sample", seed=0, run="eb-50").makes):
        theirs = Path(str(path).replace("twin", "tiny"))
        assert path.samefile(theirs)
        assert Records(twin, deep=True).check(path)
    # Snapshots are a folder; each file of it is linked.
    snapshots = layout.path(layout.SNAPSHOTS, experiment="twin", seed=0, search="full")
    assert snapshots.is_dir() and all(p.stat().st_nlink > 1 for p in snapshots.iterdir())


@pytest.mark.slow
def test_what_differs_or_is_damaged_is_made_again(project, capsys):
    write_experiment(project, {"training.learning_rate": 1e-3}, name="twin")
    assert run("train-dense", "twin") == 0 and "taken over" not in capsys.readouterr().out
    write_experiment(project, name="third")
    path = layout.path(layout.DENSE_LAST, experiment="tiny", seed=0, search="full")
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run("train-dense", "third") == 0 and "taken over" not in capsys.readouterr().out
    assert (
        layout.path(layout.DENSE_LAST, experiment="third", seed=0, search="full").read_bytes()
        != path.read_bytes()
    )


@pytest.mark.slow
def test_what_lay_there_before_goes(project):
    """A snapshot and a kept state of another making."""
    write_experiment(project, {"about": "Another."}, name="twin")
    twin = load.load("twin")
    snapshots = layout.path(layout.SNAPSHOTS, experiment="twin", seed=0, search="full")
    snapshots.mkdir(parents=True)
    (snapshots / "99.safetensors").write_bytes(b"old")
    state = layout.state_of(layout.path(layout.DENSE_LAST, experiment="twin", seed=0, search="full"))
    state.mkdir(parents=True)
    (state / "7.json").write_text("{}")
    assert run("train-dense", "twin") == 0
    assert Records(twin, deep=True).check(snapshots) and not state.exists()
    assert not (snapshots / "99.safetensors").exists()


@pytest.mark.slow
def test_measured_times_are_not_taken_over(project, capsys):
    write_experiment(project, {"about": "Another."}, name="twin")
    assert run("measure-cost", "twin") == 0 and "taken over" not in capsys.readouterr().out


@pytest.mark.slow
def test_raising_iterations_trains_the_difference_with_the_same_bits(workspace, vary):
    """Of a milestone that the file lists no more; one of other settings doesn't serve."""
    short, longer = vary(eb_at(12)), vary(eb_at(40))
    ticket(short)
    finetune_region(short, EXPERT, "12", 0, CPU)
    finetune_region(longer, EXPERT, "40", 0, CPU)
    raised = tensors_of(milestone(EXPERT, 40))
    where = dict(experiment="tiny", seed=0, expert=EXPERT, milestone=40)
    told = json.loads(layout.path(layout.LEDGER, **where).read_text())
    assert [p["steps"] for p in told["processes"]] == [12, 28]
    shutil.rmtree(milestone(EXPERT, 40).parent)
    finetune_region(longer, EXPERT, "40", 0, CPU)
    assert same(tensors_of(milestone(EXPERT, 40)), raised)

    shutil.rmtree(milestone(EXPERT, 40).parent)
    finetune_region(short, EXPERT, "12", 0, CPU)
    other = vary({**eb_at(40), "training.clip": 0.5})
    ticket(other)
    finetune_region(other, EXPERT, "40", 0, CPU)
    told = json.loads(layout.path(layout.LEDGER, **where).read_text())
    assert [p["steps"] for p in told["processes"]] == [40]
