"""Told its classes, a network draws what it is asked for; guided, more surely."""

import pytest
from conftest import write_experiment
from stages import run

from ebdiff.experiment import layout
from ebdiff.system.files import read_json

ASKED = {
    "dataset.classes": 10, "dataset.subset": None, "training.label_dropout": 0.1, "training.batch": 64,
    "training.ema_decay": 0.98, "network.width": 16, "network.dropout": 0, "dense.iterations": 500,
    "searches.full.horizon": 5, "sampling.images": 200, "sampling.batch": 200, "sampling.steps": 20,
    "runs.ta-eb": ..., "tables": {},
}  # fmt: skip


@pytest.mark.slow
def test_digits_are_those_that_were_asked_for(workspace):
    found = {}
    for guidance in (None, 2.0):
        write_experiment(workspace, {**ASKED, "sampling.guidance": guidance})
        verbs = [("sample", "tiny", "--run", "unpruned"), ("fid", "tiny", "--run", "unpruned")]
        if guidance is None:
            training = ("finetune-region", "tiny", "--expert", "dense-full", "--milestone", "500")
            verbs = [("train-classifier", "digits"), ("reference-stats", "digits"), ("train-dense", "tiny"),
                     training, *verbs]  # fmt: skip
        for verb in verbs:
            assert run(*verb) == 0, verb
        at = dict(experiment="tiny", seed=0, run="unpruned")
        found[guidance] = read_json(layout.path(layout.METRICS, **at))["agreement"]
        assert read_json(layout.path(layout.SAMPLE_LEDGER, **at))["evaluations"] == (40 if guidance else 20)
    assert found[None] > 0.35  # chance: 0.1
    assert found[2.0] > found[None]
