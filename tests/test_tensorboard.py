"""What TensorBoard itself reads of what `ebdiff tensorboard` wrote, from hand-made readings."""

import json
import sys

import pytest
from conftest import vouch, write_experiment
from PIL import Image
from stages import run

from ebdiff.experiment import layout
from ebdiff.experiment.jobs import Job
from ebdiff.system.files import write_text

accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator",
    reason="needs tensorboard: pip install -c envs/constraints.txt -e .[tensorboard]",
)


def lines(*readings):
    keys = ("step", "loss", "seconds")
    return "".join(json.dumps(dict(zip(keys, r, strict=True))) + "\n" for r in readings)


def seen(folder):
    """The runs that TensorBoard finds there."""
    found = {}
    for path in folder.rglob("*tfevents*"):
        found[str(path.parent.relative_to(folder))] = run_of = accumulator.EventAccumulator(str(path.parent))
        run_of.Reload()
    return found


def scalars(run_of, tag):
    return [(e.step, round(e.value, 5)) for e in run_of.Scalars(tag)]


def test_it_reads_finished_and_running_trainings_and_previews(workspace, tiny, capsys):
    write_experiment(workspace)
    key = tiny.runs["eb-50"].experts[0].key
    write_text(
        layout.path(layout.DENSE_STATS, experiment="tiny", seed=0, search="full"),
        lines((10, 0.5, 2.0), (20, 0.25, 3.0)),
    )
    vouch(tiny, "train-dense", seed=0, search="full")
    job = Job.of(tiny, "finetune-region", seed=0, expert=key, milestone=40)
    running = job.state / "stats.jsonl"
    write_text(running, lines((10, 0.5, 4.0)) + '{"step": 20, "lo')
    grids = layout.path(layout.PREVIEWS, experiment="tiny", seed=0, of=key)
    grids.mkdir(parents=True)
    Image.new("L", (30, 20), 7).save(grids / "00000020.png")
    folder = layout.path(layout.TENSORBOARD, experiment="tiny")

    assert run("tensorboard", "tiny") == 0
    assert capsys.readouterr().out == "tensorboard --logdir results/tiny/tensorboard\n"
    found = seen(folder)
    search, expert, samples = "seed0/dense/full", f"seed0/experts/{key}", f"previews/seed0/{key}"
    assert found.keys() == {search, expert, samples}
    assert scalars(found[search], "loss") == [(10, 0.5), (20, 0.25)]
    assert scalars(found[search], "steps per second") == [(10, 5.0), (20, 10.0)]
    assert [e.wall_time for e in found[search].Scalars("loss")] == [2.0, 3.0]
    assert scalars(found[expert], "loss") == [(10, 0.5)]
    (grid,) = found[samples].Images("samples")
    assert (grid.step, grid.width, grid.height) == (20, 30, 20)
    assert grid.encoded_image_string == (grids / "00000020.png").read_bytes()

    before = {p: p.read_bytes() for p in folder.rglob("*tfevents*")}
    live = found[expert]  # as TensorBoard follows it
    write_text(running, lines((10, 0.5, 4.0), (20, 0.125, 6.0)))
    for _ in range(2):  # again, nothing is added
        assert run("tensorboard", "tiny") == 0
        live.Reload()
        assert scalars(live, "loss") == [(10, 0.5), (20, 0.125)]
    after = {p: p.read_bytes() for p in folder.rglob("*tfevents*")}
    grown = {p for p in after if after[p] != before[p]}
    assert {p.parent for p in grown} == {folder / expert}
    assert all(after[p].startswith(before[p]) for p in grown)

    write_text(running, lines((10, 0.5, 5.0)))  # killed, and gone on from step 0
    assert run("tensorboard", "tiny") == 0
    again = seen(folder)[expert]
    assert [(e.step, e.wall_time) for e in again.Scalars("loss")] == [(10, 5.0)]


def test_readings_of_other_settings_are_left_out(workspace, tiny):
    write_text(
        layout.path(layout.DENSE_STATS, experiment="tiny", seed=0, search="full"), lines((10, 0.5, 2.0))
    )
    vouch(tiny, "train-dense", seed=0, search="full")
    write_experiment(workspace, {"training.learning_rate": 1e-3})
    assert run("tensorboard", "tiny") == 0
    assert seen(layout.path(layout.TENSORBOARD, experiment="tiny")) == {}


def test_without_the_library_it_says_what_to_install(workspace, monkeypatch, capsys):
    write_experiment(workspace)
    monkeypatch.delitem(sys.modules, "ebdiff.report.tensorboard", raising=False)
    monkeypatch.delattr("ebdiff.report.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    assert run("tensorboard", "tiny") == 1
    assert "needs tensorboard: pip install 'ebdiff[tensorboard]'" in capsys.readouterr().err
