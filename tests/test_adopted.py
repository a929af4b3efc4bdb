"""What stands in another experiment's folder with equal settings is linked; a longer training goes on."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import write_experiment
from stages import EB, EXPERT, SAMPLE, run
from test_training import CPU, eb_at, interrupted, milestone, same, tensors_of, ticket

from ebdiff.experiment import layout, load
from ebdiff.experiment.jobs import Job
from ebdiff.experiment.records import Records
from ebdiff.system.files import holding
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


def fresh_at(steps, **more):
    """A run that trains one expert from the first step, without a search."""
    one = {"title": "S", "method": "control", "init": "fresh", "iterations": steps, **more}
    return {"tables": {}, "training.log_every": 1, "runs.scratch": {"rate": 0.5} | one}


def trained(e, steps):
    """Train it; its key."""
    (key,) = (x.key for x in e.runs["scratch"].experts)
    finetune_region(e, key, str(steps), 0, CPU)
    return key


def told(key, steps):
    """The tensors of a milestone, the losses on the way, and how many steps each job did."""
    where = dict(experiment="tiny", seed=0, expert=key, milestone=steps)
    readings = map(json.loads, layout.path(layout.STATS, **where).read_text().splitlines())
    ledger = json.loads(layout.path(layout.LEDGER, **where).read_text())
    losses = {line["step"]: line["loss"] for line in readings}
    return tensors_of(milestone(key, steps)), losses, [p["steps"] for p in ledger["processes"]]


RIGL = {"method": "rigl", "sparsity": 0.5, "interval": 5, "end": 28, "accumulate": 3}


@pytest.mark.parametrize(
    "more",
    [
        {},
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ({"rate": None, "sparse": RIGL}, {"law": "speed"})
        ),
    ],
    ids=["plain", "rigl", "speed"],
)
def test_raising_iterations_goes_on_from_an_unfinished_milestone(workspace, vary, monkeypatch, capsys, more):
    short, longer = vary(fresh_at(30, **more)), vary(fresh_at(34, **more))
    tensors, losses, jobs = told(trained(longer, 34), 34)
    assert jobs == [34] and list(losses) == list(range(1, 35))
    shutil.rmtree("results")
    interrupted(short, monkeypatch, 27, lambda e: trained(e, 30))
    key = trained(longer, 34)
    raised = told(key, 34)
    assert same(raised[0], tensors) and raised[1:] == (losses, [27, 7])
    state = layout.state_of(milestone(key, 30))
    assert f"34.safetensors: going on from step 27 of {state}/27.safetensors" in capsys.readouterr().out
    # What it went on from is left as it was, and still serves: 26 and 27 were kept.
    assert not layout.state_of(milestone(key, 34)).exists()
    assert told(trained(vary(fresh_at(26, **more)), 26), 26)[2] == [26, 0]
    assert told(trained(short, 30), 30)[2] == [27, 3]


@pytest.mark.parametrize(
    "why",
    [
        "held",
        *(pytest.param(w, marks=pytest.mark.slow) for w in ("settings", "further", "damaged", "foreign")),
    ],
)
def test_an_unfinished_milestone_that_does_not_serve_is_left_alone(workspace, vary, monkeypatch, why):
    interrupted(vary(fresh_at(30)), monkeypatch, 12, lambda e: trained(e, 30))
    steps = 10 if why == "further" else 14
    e = vary(fresh_at(steps) | ({"training.clip": 0.5} if why == "settings" else {}))
    (key,) = (x.key for x in e.runs["scratch"].experts)
    state = layout.state_of(milestone(key, 30))
    for path in state.glob("*.safetensors") if why == "damaged" else ():
        path.write_bytes(path.read_bytes()[:-1])
    if why == "foreign":
        state.rename(state.with_name("30x"))
    before = {path: path.read_bytes() for path in state.parent.rglob("*") if path.is_file()}
    with holding(state) if why == "held" else nullcontext():
        trained(e, steps)
    assert told(key, steps)[2] == [steps]
    assert {path: path.read_bytes() for path in state.parent.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_the_furthest_of_finished_and_unfinished_ones_wins(workspace, vary, monkeypatch):
    interrupted(vary(fresh_at(40)), monkeypatch, 8, lambda e: trained(e, 40))
    assert told(trained(vary(fresh_at(20)), 20), 20)[2] == [8, 12]
    key = trained(vary(fresh_at(40)), 40)  # its own is at 8
    tensors, losses, jobs = told(key, 40)
    assert jobs == [8, 12, 20] and list(losses) == list(range(1, 41))
    shutil.rmtree(milestone(key, 40).parent)
    trained(vary(fresh_at(10)), 10)
    interrupted(vary(fresh_at(30)), monkeypatch, 15, lambda e: trained(e, 30))
    interrupted(vary(fresh_at(20)), monkeypatch, 18, lambda e: trained(e, 20))
    trained(vary(fresh_at(40)), 40)
    again = told(key, 40)
    assert same(again[0], tensors) and again[1:] == (losses, [10, 5, 3, 22])


def test_its_own_unfinished_state_serves_whatever_milestones_come_before_it(workspace, vary, monkeypatch):
    """A shorter run of the same expert is added, and taken out of the file again."""
    both = {"runs.short": {**fresh_at(10)["runs.scratch"], "title": "Short"}}
    alone, beside = vary(fresh_at(30)), vary({**fresh_at(30), **both})
    interrupted(alone, monkeypatch, 27, lambda e: trained(e, 30))
    trained(beside, 10)
    assert told(trained(beside, 30), 30)[2] == [27, 3]
    shutil.rmtree("results")
    trained(beside, 10)
    interrupted(beside, monkeypatch, 27, lambda e: trained(e, 30))
    assert told(trained(alone, 30), 30)[2] == [10, 17, 3]
