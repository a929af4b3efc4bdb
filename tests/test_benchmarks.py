"""Benchmarks run at small sizes, agree with what they are compared with, and end in the tables."""

import csv
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "frechet": 1, "hamming": 2, "loading": 3, "masks": 2,
    "sampling": 1, "step": 15,
}  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    """Imports a module of benchmarks/ as its scripts see each other."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_runs_and_writes_its_rows(name, script, tmp_path):
    script(name).main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["benchmark"] == name and found["device"] and found["versions"]["torch"]
    assert len(found["rows"]) >= SCRIPTS[name]
    assert all(np.isfinite(row["value"]) for row in found["rows"])
    assert {(row["low"], row["high"]) for row in found["rows"]} == {(None, None)}  # one round is no range


@pytest.mark.slow
def test_two_processes_are_measured_and_count_the_same_losses(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/parallel.py"), "--tiny", "--device", "cpu"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, timeout=300)
    assert json.loads((tmp_path / "parallel.json").read_text())["rows"][0]["value"] > 0


def test_pieces_of_work_take_turns_and_only_settled_calls_are_timed(monkeypatch):
    from ebdiff.cost import measure

    called, clock = [], [0.0]

    def piece(name, first):
        def work():
            clock[0] += first if called[-1:] != [name] else 1.0  # slower after the other one
            called.append(name)

        return work

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    work = {"a": piece("a", 5.0), "b": piece("b", 7.0)}
    assert measure.interleaved(work, 2, warmup=1) == {"a": [5.0, 5.0], "b": [7.0, 7.0]}
    assert "".join(called) == "ab" + "ab" * 2
    called.clear()
    assert measure.interleaved(work, 2, warmup=1, settle=1) == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert "".join(called) == "ab" + "aabb" * 2


def test_one_plain_step_moves_the_weights_as_ours_do(script):
    """The same batch, noise and timesteps through both loops: the same weights and the same average."""
    from ebdiff.cost.measure import network_of, timing_job
    from ebdiff.diffusion.schedule import alphas_bar
    from ebdiff.nets.execution import Runtime
    from ebdiff.training.batches import Draws
    from ebdiff.training.loop import train
    from ebdiff.training.state import State

    paired, plain = script("paired"), script("plain")
    experiment, runtime = paired.experiment(2, tiny=True), Runtime(torch.device("cpu"))
    cfg = experiment.training.model_copy(update={"ema_decay": 0.5})
    experiment = experiment.model_copy(update={"training": cfg})
    network, abar = network_of(experiment, 0.0), alphas_bar(experiment.diffusion)
    trainer = plain.Trainer(plain.network(network), abar, cfg.learning_rate, cfg.clip, cfg.ema_decay)
    job, state = timing_job(experiment, runtime), State.start(network, runtime)
    train(state, job, 1, save=lambda state: None)

    draws = Draws(job.dataset, job.law, cfg.batch, job.seed, job.name, runtime.device)
    x0, _, t, _, eps = next(draws.batches([0]))
    trainer.draw = lambda x: (t, eps)
    trainer.step(x0)
    ours, theirs = dict(state.network.named_parameters()), dict(trainer.model.named_parameters())
    for name, p in ours.items():  # Adam's first step is the learning rate, 2e-4, whatever the gradient
        torch.testing.assert_close(theirs[name], p, rtol=0, atol=1e-5)
        torch.testing.assert_close(trainer.shadow[name], state.view("ema")[name], rtol=0, atol=1e-5)


def test_rows_end_in_the_tables_with_their_verdicts(script, tmp_path, monkeypatch):
    paired, collect = script("paired"), script("collect")
    ratios = [2.0, 3.0, 4.0]
    rows = [
        paired.compare("fast", "slow", "≥ 2.5", ratios, [1.0] * 3),
        paired.row("late", [16.0], "ms", goal="≤ 15"),
        paired.row("only told", [1.0], "%"),
    ]
    paired.write("some", rows, torch.device("cpu"), tmp_path / "out")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    monkeypatch.setattr(collect, "ROOT", tmp_path)
    for _ in range(2):  # written twice, it stands there once
        collect.main(["--out", str(tmp_path / "out")])
    (table,) = tmp_path.glob("results/reference/benchmarks/*/benchmarks.csv")
    with table.open(newline="") as file:
        found = {row["measure"]: row for row in csv.DictReader(file)}
    assert [found[m]["reached"] for m in ("fast", "late", "only told")] == ["yes", "no", ""]
    assert float(found["fast"]["value"]) == 3
    assert np.isclose(float(found["fast"]["low"]), 2.5)
    page = (tmp_path / "docs/benchmarks.md").read_text()
    assert page.count("| fast | slow | ≥ 2.5x | 3x (2.5 to 3.5) | yes |") == 1
    assert "only told" not in page
    assert "only told" in table.with_suffix(".md").read_text()


def test_a_difference_hidden_by_its_scatter_is_told_as_a_bound(script):
    paired = script("paired")
    clear = paired.difference("a part", [1.3, 1.301, 1.299], [1.0, 1.0, 1.0], 3, "≤ 15")
    assert clear.value == pytest.approx(100, abs=0.5) and clear.low < clear.value < clear.high
    hidden = paired.difference("a part", [1.0, 1.1, 0.9], [1.06, 1.0, 0.96], 1, "≤ 15")
    assert hidden.value == pytest.approx(100) and hidden.low is None and "at most" in hidden.note


def test_one_measurement_has_no_range(script, capsys):
    paired, collect = script("paired"), script("collect")
    row = paired.row("whole run", [4.0], "min")
    assert (row.value, row.low, row.high) == (4, None, None)
    assert collect.text({**vars(row), "reached": ""})[3] == "4 min"
