import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import write_experiment
from safetensors.torch import save_file

from ebdiff import cli
from ebdiff.data.dataset import open_dataset
from ebdiff.diffusion.ensemble import Ensemble
from ebdiff.diffusion.process import Process
from ebdiff.diffusion.sample import write_grid
from ebdiff.diffusion.schedule import alphas_bar
from ebdiff.diffusion.timesteps import Antithetic
from ebdiff.experiment import layout
from ebdiff.experiment.records import Work
from ebdiff.nets import store
from ebdiff.nets.execution import Runtime
from ebdiff.pruning.count import meta_tensors
from ebdiff.system.draws import generator
from ebdiff.system.errors import UserError
from ebdiff.system.files import write_json
from ebdiff.tickets import stages
from ebdiff.training import preview
from ebdiff.training.loop import Job, train
from ebdiff.training.state import State
from ebdiff.training.train import finetune_region, milestone_steps, train_dense

CPU = torch.device("cpu")
DENSE = dict(experiment="tiny", seed=0, search="full")
TICKET = dict(search="full", criterion="magnitude", weights="ema")
EB = "full-magnitude-ema-0.5-t0-1000"


def job(e, **changes):
    settings = dict(
        name="test",
        seed=0,
        dataset=open_dataset(e),
        law=Antithetic(0, 1000),
        process=Process(e.diffusion),
        training=e.training,
        runtime=Runtime(CPU),
    )
    return Job(**(settings | changes))


def start(e):
    return State.start(store.fresh(e.architecture, 0, "test"), Runtime(CPU))


def run(e, steps, state=None, **changes):
    state = state or start(e)
    train(state, job(e, **changes), steps, save=lambda s: None)
    return state


def same(a, b):
    """Whether two dictionaries of tensors are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def tensors_of(path):
    return store.load(path)[0]


def milestone(key, steps, root="."):
    return layout.path(layout.MILESTONE, experiment="tiny", seed=0, expert=key, milestone=steps)


# --- the loop against a literal one ---------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_loop_is_a_plain_loop_with_adam_clipping_and_warmup(workspace, vary, clip):
    # Without attention: the gradient of k's bias is rounding alone, which Adam blows up.
    e = vary({"network.dropout": 0.0, "network.middle_attention": False,
              "training.clip": clip, "training.warmup": 3})  # fmt: skip
    network, steps, norms = store.fresh(e.architecture, 0, "test"), 5, []
    parameters = list(network.parameters())
    m, v = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
    work, abar = job(e), alphas_bar(e.diffusion)
    for i in range(steps):
        x0 = work.dataset.batch(work.dataset.draw(16, 0, "test", i), CPU).x0
        t = work.law.draw(generator(0, "test/timestep", i), 16)[0]
        eps = torch.from_numpy(generator(0, "test/noise", i).standard_normal(x0.shape, np.float32))
        total = 0.0
        predicted = network(
            torch.stack([abar[n] ** 0.5 * x for n, x in zip(t, x0, strict=True)]).float()
            + torch.stack([(1 - abar[n]) ** 0.5 * x for n, x in zip(t, eps, strict=True)]).float(),
            torch.from_numpy(t),
        )
        for image in range(16):  # summed over pixels and channels, averaged over the batch
            total = total + ((predicted[image] - eps[image]) ** 2).sum() / 16
        network.zero_grad()
        total.backward()
        gradients = [p.grad for p in parameters]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        if clip and norms[-1] > clip:
            gradients = [g * clip / norms[-1] for g in gradients]
        rate = e.training.learning_rate * min(1, (i + 1) / 3)
        for p, g, mean, square in zip(parameters, gradients, m, v, strict=True):
            mean.mul_(0.9).add_(0.1 * g)
            square.mul_(0.999).add_(0.001 * g**2)
            corrected = mean / (1 - 0.9 ** (i + 1)), square / (1 - 0.999 ** (i + 1))
            p.data -= rate * corrected[0] / (corrected[1].sqrt() + 1e-8)
    assert max(norms) > 1  # clipping mattered
    state = run(e, steps)
    # Rounding alone: 1 % of one full Adam step.
    for p, literal in zip(state.network.parameters(), parameters, strict=True):
        torch.testing.assert_close(p, literal, rtol=0, atol=0.01 * e.training.learning_rate)


@pytest.mark.parametrize("warm", [False, True])
def test_the_average_follows_its_closed_form(workspace, vary, warm):
    e = vary({"training.ema_warmup": warm, "training.ema_decay": 0.8})
    history = [{n: p.detach().clone() for n, p in start(e).network.named_parameters()}]
    state = start(e)
    for step in range(1, 9):
        run(e, step, state)
        history.append({n: p.detach().clone() for n, p in state.network.named_parameters()})
    # Weight of the i-th step's parameters: (1 - d_i) times all later decays.
    decays = [min(0.8, (1 + i) / (10 + i)) if warm else 0.8 for i in range(8)]
    shares = [np.prod(decays)] + [(1 - d) * np.prod(decays[i + 1 :]) for i, d in enumerate(decays)]
    assert sum(shares) == pytest.approx(1)
    for name, average in state.view("ema").items():
        expected = sum(share * h[name] for share, h in zip(shares, history, strict=True))
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)


def test_training_lowers_the_loss(workspace, vary, tmp_path):
    e = vary({"training.learning_rate": 5e-3, "training.log_every": 2})
    run(e, 60, stats=tmp_path / "stats.jsonl")
    readings = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [r["step"] for r in readings] == list(range(2, 61, 2))
    losses = [r["loss"] for r in readings]
    # At first the network knows nothing: 64 pixels of noise of variance 1, and a little of its own.
    assert 50 < losses[0] < 120
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def test_timesteps_come_from_the_span(workspace, tiny):
    seen = []

    class Spy(Antithetic):
        def draw(self, rng, batch):
            t, weight = super().draw(rng, batch)
            seen.extend(t)
            return t, weight

    run(tiny, 3, law=Spy(240, 460))
    assert len(seen) == 48
    assert min(seen) >= 240
    assert max(seen) < 460


def test_seeds_and_names_give_other_trainings(workspace, tiny):
    first = run(tiny, 2).view("raw")
    assert same(first, run(tiny, 2).view("raw"))
    assert not same(first, run(tiny, 2, seed=1).view("raw"))
    assert not same(first, run(tiny, 2, name="other").view("raw"))


# --- resuming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 7])
def test_a_saved_state_goes_on_with_the_same_bits(workspace, tiny, stop):
    through = run(tiny, 12)
    run(tiny, stop).save(workspace / "state.safetensors", tiny.architecture, {})
    state = State.load(workspace / "state.safetensors", Runtime(CPU))
    assert state.step == stop
    run(tiny, 12, state)
    assert same(state.tensors(), through.tensors())
    assert {n.split(".")[0] for n in state.tensors()} == {"raw", "ema", "m", "v"}


def interrupted(e, monkeypatch, at, work):
    """Do some work whose training dies after step `at`, having saved its state there."""
    original = State.update_average

    def dying(state, cfg):
        if state.step == at:
            raise KeyboardInterrupt
        original(state, cfg)

    with monkeypatch.context() as patch:
        patch.setattr(State, "update_average", dying)
        with pytest.raises(KeyboardInterrupt):
            work(e.model_copy(update={"training": e.training.model_copy(update={"save_minutes": 1e-9})}))


def search(e):
    train_dense(e, "full", 0, CPU)


def artefacts():
    """All tensors and masks of the search."""
    found = {"last": tensors_of(layout.path(layout.DENSE_LAST, **DENSE))}
    for path in layout.path(layout.SNAPSHOTS, **DENSE).iterdir():
        found[path.name] = tensors_of(path)
    with np.load(layout.path(layout.DENSE_MASKS, **DENSE)) as file:
        found["masks"] = {n: torch.from_numpy(file[n]) for n in file.files if file[n].dtype.kind in "uif"}
    return found


@pytest.mark.parametrize(
    "at", [20, pytest.param(3, marks=pytest.mark.slow), pytest.param(47, marks=pytest.mark.slow)]
)
def test_an_interrupted_search_ends_as_an_undisturbed_one(workspace, vary, monkeypatch, capsys, at):
    tiny = vary({"searches.full.tickets_at": [0, 2]})
    search(tiny)
    expected = artefacts()
    assert {"initial.safetensors", "1.safetensors"} < expected.keys()
    shutil.rmtree("results")
    interrupted(tiny, monkeypatch, at, search)
    assert not layout.path(layout.DENSE_LAST, **DENSE).exists()
    assert not layout.path(layout.SNAPSHOTS, **DENSE).exists()
    search(tiny)
    found = artefacts()
    assert found.keys() == expected.keys()
    assert all(same(found[n], expected[n]) for n in expected)
    assert f"going on from step {at}" in capsys.readouterr().out
    ledger = json.loads(layout.path(layout.DENSE_LEDGER, **DENSE).read_text())
    assert len(ledger["processes"]) == 2
    for process in ledger["processes"]:  # each may run elsewhere and otherwise
        assert process["device"] == ledger["device"]
        assert process["execution"] == Runtime.of(tiny, "training", "dense", torch.device("cpu")).told()
    stats = layout.path(layout.DENSE_STATS, **DENSE).read_text().splitlines()
    steps = [json.loads(line)["step"] for line in stats]
    assert steps == sorted(set(steps))


def test_a_state_of_other_settings_is_set_aside_with_a_word(workspace, vary, monkeypatch, capsys):
    other = vary({"training.learning_rate": 1e-3})
    search(other)
    expected = artefacts()
    shutil.rmtree("results")
    interrupted(vary({}), monkeypatch, 20, search)
    search(other)
    assert "not used (its settings changed)" in capsys.readouterr().out
    found = artefacts()
    assert found.keys() == expected.keys()
    assert all(same(found[n], expected[n]) for n in expected)


@pytest.mark.slow
def test_snapshots_of_a_set_aside_state_are_not_taken_over(workspace, vary, monkeypatch):
    gradient = {"searches.full.criteria": ["magnitude", "taylor"]}  # keeps every snapshot
    interrupted(vary({**gradient, "searches.full.horizon": 8}), monkeypatch, 67, search)
    search(vary({**gradient, "searches.full.horizon": 5}))
    kept = sorted(p.stem for p in layout.path(layout.SNAPSHOTS, **DENSE).iterdir())
    assert kept == ["0", "1", "2", "3", "4"]


@pytest.mark.slow
def test_a_damaged_state_is_set_aside(workspace, tiny, monkeypatch, capsys):
    search(tiny)
    expected = artefacts()
    shutil.rmtree("results")
    interrupted(tiny, monkeypatch, 20, search)
    for state in workspace.rglob("state/last/*.safetensors"):
        state.write_bytes(state.read_bytes()[:1000])
    search(tiny)
    assert "not used (damaged" in capsys.readouterr().out
    found = artefacts()
    assert all(same(found[n], expected[n]) for n in expected)


def killed_at(command, cwd, step):
    """Start a process, SIGKILL it once its state has reached a step; whether it had to be killed."""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        with contextlib.suppress(UserError, FileNotFoundError):  # it comes and goes while we look
            for path in cwd.rglob("state/*/*.json"):
                if int(path.stem) >= step:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    return True
        time.sleep(0.005)
    assert process.returncode == 0, process.stderr.read().decode()
    return False


@pytest.mark.long
def test_killed_processes_end_with_the_bits_of_undisturbed_ones(workspace, vary):
    """Both long trainings, as real processes, each killed at two steps and started again."""
    changes = {"training.save_minutes": 1e-6, "training.log_every": 1, "searches.full.tickets_at": [0, 2]}
    write_experiment(workspace, changes)
    verbs = [
        ("train-dense", "tiny"),
        ("finetune-region", "tiny", "--expert", "dense-full", "--milestone", "80"),
    ]

    def all_tensors():
        return {**artefacts(), "expert": tensors_of(milestone("dense-full", 80))}

    kills = 0
    for verb, steps in zip(verbs, [(4, 33), (62, 66)], strict=True):
        command = [sys.executable, "-m", "ebdiff.cli", *verb]
        for step in steps:
            kills += killed_at(command, workspace, step)
        subprocess.run(command, cwd=workspace, check=True, capture_output=True)
    assert kills == 4
    disturbed = all_tensors()

    shutil.rmtree("results")
    e = vary(changes)
    train_dense(e, "full", 0, CPU)
    finetune_region(e, "dense-full", "80", 0, CPU)
    undisturbed = all_tensors()
    assert disturbed.keys() == undisturbed.keys()
    assert all(same(disturbed[n], undisturbed[n]) for n in undisturbed)


# --- bad losses -----------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_is_one_line_and_leaves_nothing(workspace, monkeypatch, capsys):
    # Weights of 1e19 overflow when they are squared.
    write_experiment(workspace, {"training.learning_rate": 1e19, "training.clip": None})
    monkeypatch.setattr(sys, "argv", ["ebdiff", "train-dense", "tiny"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ebdiff:")]
    assert len(errors) == 1
    assert "loss is" in errors[0]
    assert "training.learning_rate" in errors[0]
    folder = layout.path(layout.DENSE, **DENSE)
    assert not [p for p in folder.rglob("*") if p.is_file() and "state" not in p.parts]


def test_weights_that_are_no_numbers_are_never_saved(workspace, tiny):
    state = start(tiny)
    next(state.network.parameters()).data[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        state.save(workspace / "state.safetensors", tiny.architecture, {})
    assert not list(workspace.glob("*.safetensors"))


# --- experts --------------------------------------------------------------------------------------------


def ticket(e, rate=0.5):
    search(e)
    stages.prune_per_epoch(e, **TICKET, seed=0, device=CPU)
    return stages.select_eb_epoch(e, **TICKET, rate=rate, seed=0)


def eb_at(*steps):
    """Runs that train the same expert to several milestones."""
    one = {"title": "EB", "method": "eb", "rate": 0.5}
    return {"runs.eb-50": ..., "tables": {}, **{f"runs.eb-{n}": {**one, "iterations": n} for n in steps}}


@pytest.mark.slow
def test_looks_at_samples_change_no_bit_and_show_the_averaged_weights(workspace, vary, monkeypatch):
    """Every 20 steps, with dropout; the last grid is what `sample` would draw of the milestone."""
    plain, looked = vary(eb_at(40)), vary({**eb_at(40), "training.sample_every": 20})
    ticket(plain)
    finetune_region(plain, EB, "40", 0, CPU)
    without = tensors_of(milestone(EB, 40))
    milestone(EB, 40).unlink()
    began = time.perf_counter()
    monkeypatch.setattr(preview, "write_grid", lambda *a: (time.sleep(1), write_grid(*a)))
    finetune_region(looked, EB, "40", 0, CPU)
    ledger = json.loads(
        layout.path(layout.LEDGER, experiment="tiny", seed=0, expert=EB, milestone=40).read_text()
    )
    assert ledger["seconds"] < time.perf_counter() - began - 2  # looks are no training
    assert same(tensors_of(milestone(EB, 40)), without)
    folder = layout.path(layout.PREVIEWS, experiment="tiny", seed=0, of=EB)
    assert sorted(p.name for p in folder.iterdir()) == ["00000020.png", "00000040.png"]
    experiment = looked.model_copy(update={"runs": {"it": looked.runs["eb-40"]}})
    images = Ensemble.of(Work(experiment, "sample", run="it", seed=0), CPU).draw(list(range(20)), 0).images
    write_grid(images, workspace / "grid.png")
    assert (workspace / "grid.png").read_bytes() == (folder / "00000040.png").read_bytes()


def test_two_milestones_are_one_long_training(workspace, vary):
    both, one = vary(eb_at(12, 40)), vary(eb_at(40))
    ticket(both)
    finetune_region(both, EB, "12", 0, CPU)
    finetune_region(both, EB, "40", 0, CPU)
    chained = tensors_of(milestone(EB, 40))
    ledger = json.loads(
        layout.path(layout.LEDGER, experiment="tiny", seed=0, expert=EB, milestone=40).read_text()
    )
    assert (ledger["steps"], ledger["images"]) == (40, 640)
    assert [p["steps"] for p in ledger["processes"]] == [12, 28]
    shutil.rmtree(milestone(EB, 40).parent)
    finetune_region(one, EB, "40", 0, CPU)
    assert same(tensors_of(milestone(EB, 40)), chained)


def test_the_unpruned_network_goes_on_from_its_search_with_the_same_bits(workspace, tiny):
    search(tiny)
    finetune_region(tiny, "dense-full", "80", 0, CPU)
    state = State.start(store.fresh(tiny.architecture, 0, "dense/full"), Runtime(CPU))
    run(tiny, 80, state, name="dense/full")
    assert same(tensors_of(milestone("dense-full", 80)), state.tensors())
    processes = store.story(milestone("dense-full", 80))["processes"]
    assert [p["steps"] for p in processes] == [60, 20]


@pytest.mark.parametrize("warmup", [0, 4])
def test_a_public_checkpoints_first_updates_are_adams(workspace, vary, warmup):
    """From zero moments Adam's first update is the learning rate, whatever the gradient's size."""
    longer = {"title": "L", "method": "control", "init": "dense"}
    e = vary({
        "dense.from": "public.safetensors", "dense.iterations": 800_000, "training.warmup": warmup,
        "runs.one": {**longer, "iterations": 800_001}, "runs.two": {**longer, "iterations": 800_002},
    })  # fmt: skip
    given = {n: p.detach() for n, p in store.fresh(e.architecture, 3, "public").named_parameters()}
    save_file(given, "public.safetensors")
    weights = [given]
    for steps in (800_000, 800_001, 800_002):
        finetune_region(e, "dense-full", str(steps), 0, CPU)
        weights.append(store.load(milestone("dense-full", steps), "raw.")[0])
    assert same(weights[0], weights[1])
    for update, (before, after) in enumerate(pairwise(weights[1:]), 1):
        moved = torch.cat([(after[n] - before[n]).abs().flatten() for n in given])
        rate = e.training.learning_rate * min(1, update / max(1, warmup))
        assert moved.max() < 1.01 * rate
        if update == 1:
            assert moved.median() == pytest.approx(rate, rel=0.01)


def test_a_milestone_below_the_searchs_end_starts_from_nothing(workspace, vary):
    short = {"title": "S", "method": "control", "init": "dense", "iterations": 30}
    e = vary({"runs.short": short})
    search(e)
    finetune_region(e, "dense-full", "30", 0, CPU)
    state = State.start(store.fresh(e.architecture, 0, "dense/full"), Runtime(CPU))
    run(e, 30, state, name="dense/full")
    assert same(tensors_of(milestone("dense-full", 30)), state.tensors())


def test_an_expert_starts_from_its_tickets_weights_and_keeps_its_shapes(workspace, tiny):
    ticket(tiny)
    weights, config, _ = store.load(layout.path(layout.TICKET, experiment="tiny", seed=0, rate=0.5, **TICKET))
    finetune_region(tiny, EB, "40", 0, CPU)
    literal = State.start(store.build(config, weights), Runtime(CPU))
    run(tiny, 40, literal, name=f"expert/{EB}")
    assert same(tensors_of(milestone(EB, 40)), literal.tensors())


def test_a_fresh_expert_differs_from_the_ticket_by_its_weights_alone(workspace, vary):
    scratch = {"title": "S", "method": "scratch", "init": "fresh", "rate": 0.5, "iterations": 1}
    e = vary({"runs.scratch": scratch})
    ticket(e)
    inherited = store.load(layout.path(layout.TICKET, experiment="tiny", seed=0, rate=0.5, **TICKET))[0]
    finetune_region(e, "fresh-0.5-t0-1000", "1", 0, CPU)
    fresh = store.load(milestone("fresh-0.5-t0-1000", 1), "raw.")[0]
    assert {n: t.shape for n, t in fresh.items()} == {n: t.shape for n, t in inherited.items()}
    matrices = [n for n in fresh if fresh[n].dim() > 1]
    assert all((fresh[n] != inherited[n]).float().mean() > 0.99 for n in matrices)


def test_a_snapshot_expert_starts_from_the_weights_before_surgery(workspace, vary):
    part = {"title": "D", "method": "control", "init": "snapshot", "rate": 0.5, "iterations": 1}
    e = vary({"runs.dense-eb": part, "training.learning_rate": 1e-12})
    story = ticket(e)
    finetune_region(e, f"snapshot-{EB}", "1", 0, CPU)
    path = layout.path(layout.SNAPSHOT, **DENSE, interval=story["interval"])
    found = store.load(milestone(f"snapshot-{EB}", 1), "raw.")[0]
    for name, before in store.load(path, "ema.")[0].items():
        torch.testing.assert_close(found[name], before, rtol=0, atol=1e-10)


def test_like_a_run_counts_its_device_time_and_its_search(workspace, vary):
    control = {"method": "control", "rate": 0.5, "init": "fresh"}
    e = vary({
        "runs.narrow": {"title": "N", **control, "iterations": "like-ta-eb"},
        "runs.short": {"title": "S", "method": "control", "init": "dense", "iterations": "like-ta-eb"},
        "runs.like-scratch": {"title": "L", **control, "iterations": "like-scratch"},
        "runs.scratch": {"title": "C", **control, "method": "scratch", "iterations": 30},
        "runs.flops": {"title": "F", **control, "iterations": "like-ta-eb-flops"},
        "runs.minutes": {"title": "M", **control, "iterations": "2min"},
        "runs.eb-minutes": {"title": "E", "method": "eb", "rate": 0.8, "iterations": "2min"},
    })  # fmt: skip
    step_ms = {"dense": 10.0, "0.3": 7.0, "0.5": 4.0, "0.8": 2.5}
    macs = {"dense": 100, "0.3": 50, "0.5": 25, "0.8": 4}
    networks = {k: {"step_ms": ms, "macs": macs[k]} for k, ms in step_ms.items()}
    write_json(layout.path(layout.COST, experiment="tiny"), {"networks": networks})
    for rate, step in ((0.3, 50), (0.8, 60)):
        path = layout.path(layout.STORY, experiment="tiny", seed=0, rate=rate, **TICKET)
        write_json(path, {"search": "full", "criterion": "magnitude", "step": step})

    def steps(run):
        (expert,) = e.runs[run].experts
        return milestone_steps(e, expert, expert.iterations, 0)

    # TA-EB: 20 steps at 0.7 and 20 at 0.25 of a dense step, and one search of 60 dense steps: 79.
    assert steps("short") == 79
    assert steps("narrow") == round(79 / 0.4)
    # Scratch needs the dense network first: 80 dense steps, and 30 at 0.4.
    assert steps("like-scratch") == round((80 + 12) / 0.4)
    # Training FLOPs of TA-EB: 20 at 0.5, 20 at 0.04, and the search.
    assert steps("flops") == round((10 + 0.8 + 60) / 0.25)
    # Two minutes are 12,000 dense steps, or 30,000 at 0.4; a ticket at 0.25 spends 60 on its search first.
    assert steps("minutes") == 30_000
    assert steps("eb-minutes") == round((12_000 - 60) / 0.25)
    path = layout.path(layout.STORY, experiment="tiny", seed=0, rate=0.8, **TICKET)
    write_json(path, {"search": "full", "criterion": "magnitude", "step": 12_000})
    with pytest.raises(UserError, match=r"2min are over before full-magnitude-ema-0.8-t0-1000 begins"):
        steps("eb-minutes")
    assert milestone_steps(e, e.runs["scratch"].experts[0], "30", 0) == 30


def test_shapes_of_a_fresh_network_follow_from_config_and_rate(tiny):
    shapes = meta_tensors(tiny.architecture, 0.5)
    assert shapes["conv_in.weight"].shape == (4, 1, 3, 3)
    assert shapes["temb.dense.0.weight"].shape == (16, 8)
    assert shapes["conv_out.weight"].shape == (1, 4, 3, 3)
    assert os.environ["OMP_NUM_THREADS"] == "1"
