"""What looks in on training: when it is called, what it may do, and that it survives a kill."""

import shutil

import numpy as np
import pytest
import torch
from test_training import interrupted, job, milestone, run, same, start, tensors_of

from ebdiff.experiment.runs import HOOKS
from ebdiff.experiment.schema import Strict
from ebdiff.nets import store
from ebdiff.system.draws import generator
from ebdiff.system.errors import UserError
from ebdiff.training.hooks import Hook
from ebdiff.training.loop import train
from ebdiff.training.train import finetune_region

CPU = torch.device("cpu")


class Thin(Strict):
    """The section of the hook below."""

    every: int = 4


class Thinning(Hook):
    """Every few steps a random fifth of all weights, and what had small gradients so far, goes to zero."""

    def __init__(self, config, job):
        self.config, self.job = config, job

    def begin(self, state):
        self.seen = state.extra.get("thin.seen", torch.zeros_like(state.grad))
        self.mask = state.extra.get("thin.mask", torch.ones_like(state.grad, dtype=torch.bool))

    def graded(self, state):
        self.seen += state.grad.abs()

    def due(self, step):
        return step % self.config.every == self.config.every - 1

    def update(self, state):
        draws = generator(self.job.seed, f"{self.job.name}/thin", state.step).random(len(state.raw))
        self.mask = torch.from_numpy(draws > 0.2) & (self.seen > self.seen.median() / 10)
        return True

    def stepped(self, state):
        for tensor in (state.raw, state.ema, state.m, state.v):
            tensor.mul_(self.mask)

    def carry(self):
        return {"thin.seen": self.seen, "thin.mask": self.mask}


HOOKS.register("thin", Thin, "test_hooks:Thinning")


class Spy(Hook):
    """Notes what it is called for, with the step it is called at, and the gradient's norm."""

    def __init__(self, every=None, at=(), until=None):
        self.every, self.at, self.until, self.calls, self.norms = every, at, until, [], []

    def note(self, name, state):
        self.calls.append((name, state.step))
        self.norms.append(state.grad.norm().item())

    def begin(self, state):
        self.note("begin", state)

    def graded(self, state):
        self.note("graded", state)

    def due(self, step):
        return step in self.at

    def update(self, state):
        self.note("update", state)
        return True

    def stepped(self, state):
        self.note("stepped", state)

    def interval(self, state):
        self.note("interval", state)
        return state.step == self.until


def hooked(e, steps, *hooks, state=None):
    state = state or start(e)
    train(state, job(e), steps, hooks=hooks, save=lambda s: None)
    return state


def test_hooks_are_called_between_backward_and_update_and_after_intervals(workspace, vary):
    e = vary({"training.clip": 1e-3})
    spy = Spy(every=2, at=[1])
    hooked(e, 3, spy)
    first = [("graded", 0), ("stepped", 0)]
    second = [("graded", 1), ("update", 1), ("stepped", 1), ("interval", 2)]
    assert spy.calls == [("begin", 0), *first, *second, ("graded", 2), ("stepped", 2)]
    norms = dict(zip(spy.calls, spy.norms, strict=True))
    assert norms["graded", 0] > 1e-2  # before clipping
    assert norms["stepped", 0] == pytest.approx(1e-3, rel=1e-3)
    assert norms["update", 1] == norms["graded", 1] > 1e-2


def test_a_hook_that_does_nothing_changes_no_bit(workspace, tiny):
    assert same(hooked(tiny, 4, Hook()).tensors(), run(tiny, 4).tensors())


def test_intervals_are_each_hooks_own_and_any_may_end_training(workspace, tiny):
    often, seldom = Spy(every=2), Spy(every=3, until=6)
    state = hooked(tiny, 50, often, seldom)
    assert state.step == 6
    assert [step for name, step in often.calls if name == "interval"] == [2, 4, 6]
    assert [step for name, step in seldom.calls if name == "interval"] == [3, 6]


def test_a_replaced_step_leaves_the_optimiser_out_but_counter_and_average_go_on(workspace, vary):
    """Replayed by torch.optim.Adam from the gradients, which never saw the replaced steps."""
    e = vary({"training.warmup": 0, "training.ema_decay": 0.9})
    replaced, gradients, averages = [1, 4], [], []

    class Recorder(Spy):
        def stepped(self, state):
            gradients.append({n: g.clone() for n, g in state.view("grad").items()})
            averages.append({n: a.clone() for n, a in state.view("ema").items()})

    state = hooked(e, 6, Recorder(at=replaced))
    assert (state.step, state.updates) == (6, 4)

    literal = store.fresh(e.architecture, 0, "test")
    adam = torch.optim.Adam(literal.parameters(), lr=e.training.learning_rate, fused=True)
    average = {n: p.detach().clone() for n, p in literal.named_parameters()}
    for step in range(6):
        if step not in replaced:
            for name, p in literal.named_parameters():
                p.grad = gradients[step][name]
            adam.step()
        for name, p in literal.named_parameters():
            average[name].lerp_(p.detach(), 1 - 0.9)
        assert same(averages[step], average)
    for name, p in literal.named_parameters():
        assert torch.equal(state.view("raw")[name], p)
        assert torch.equal(state.view("m")[name], adam.state[p]["exp_avg"])


# --- hooks that an experiment asks for ----------------------------------------------------------------------


def thinned(vary, *steps):
    """An experiment whose fresh expert, at several milestones, has the hook above; and its key."""
    run = {"title": "S", "method": "control", "init": "fresh", "rate": 0.5, "hooks": {"thin": {}}}
    e = vary({f"runs.thin-{n}": {**run, "iterations": n} for n in steps})
    return e, e.runs[f"thin-{steps[0]}"].experts[0].key


@pytest.mark.parametrize("at", [2, 9])
def test_a_killed_training_with_a_hook_ends_with_the_same_bits(workspace, vary, monkeypatch, capsys, at):
    e, key = thinned(vary, 14)
    finetune_region(e, key, "14", 0, CPU)
    through = tensors_of(milestone(key, 14))
    assert {n for n in through if n.startswith("extra.")} == {"extra.thin.mask", "extra.thin.seen"}
    matrices = [t for n, t in through.items() if n.startswith("raw.") and t.dim() > 1]
    assert 0.1 < np.mean([(t == 0).float().mean() for t in matrices]) < 0.4
    shutil.rmtree("results")
    interrupted(e, monkeypatch, at, lambda cut: finetune_region(cut, key, "14", 0, CPU))
    finetune_region(e, key, "14", 0, CPU)
    assert f"going on from step {at}" in capsys.readouterr().out
    assert same(tensors_of(milestone(key, 14)), through)


def test_two_milestones_with_a_hook_are_one_long_training(workspace, vary):
    both, key = thinned(vary, 6, 14)
    finetune_region(both, key, "6", 0, CPU)
    finetune_region(both, key, "14", 0, CPU)
    chained = tensors_of(milestone(key, 14))
    shutil.rmtree("results")
    one, _ = thinned(vary, 14)
    finetune_region(one, key, "14", 0, CPU)
    assert same(tensors_of(milestone(key, 14)), chained)


def test_hooks_make_an_expert_another_one(vary):
    run = {"title": "S", "method": "control", "init": "dense"}

    def expert(**hooks):
        return vary({"runs.s": {**run, "hooks": hooks}}).runs["s"].experts[0]

    plain, hooked = expert(), expert(thin={})
    assert plain == vary({"runs.s": run}).runs["s"].experts[0]
    assert plain.key == "dense-full"
    assert hooked.key.startswith("dense-full-thin")
    assert hooked.key == expert(thin={"every": 4}).key  # the default, written out
    assert hooked.key != expert(thin={"every": 3}).key
    assert hooked.model_dump(mode="json")["hooks"] == {"thin": {"every": 4}}
    assert plain.continues_search
    assert not hooked.continues_search


@pytest.mark.parametrize(
    ("hooks", "named"),
    [
        ({"thn": {}}, "hook 'thn' is not known; did you mean 'thin'"),
        ({"thin": {"evry": 3}}, "thin.evry: unknown key; 'evry' is not known; did you mean 'every'"),
        ({"thin": {"every": "often"}}, "thin.every: Input should be a valid integer"),
        ({"thin": {"every": True}}, "thin.every: can't be true or false"),
        ({"thin": None}, "thin: "),
        (["thin"], "must be a mapping"),
    ],
)
def test_bad_hooks_are_one_line(vary, hooks, named):
    with pytest.raises(UserError, match=r"tiny\.yaml: runs\.eb-50\.experts\.0\.hooks: ") as error:
        vary({"runs.eb-50.hooks": hooks})
    assert named in str(error.value)
    assert "\n" not in str(error.value)
