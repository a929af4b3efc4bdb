"""The default experiment, run whole: what a new user gets is checked for what it must show."""

import json

import pytest
from test_workflow import copied, snakemake

from ebdiff.experiment import layout

pytestmark = pytest.mark.long
METHODS = ("unpruned", "eb-50", "ta-eb")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = copied(tmp_path_factory.mktemp("digits"))
    done = snakemake(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def read(folder, template, **parts):
    return json.loads((folder / layout.path(template, experiment="digits", seed=0, **parts)).read_text())


def test_the_tickets_are_learned(digits):
    for rate in (0.3, 0.5, 0.6, 0.8):
        story = read(digits, layout.STORY, search="full", criterion="magnitude", weights="ema", rate=rate)
        assert story["settled"]
        assert story["to_initial"] >= 0.8 * story["chance"]


@pytest.mark.parametrize("run", METHODS)
def test_samples_look_like_digits_of_every_class(digits, run):
    metrics = read(digits, layout.METRICS, run=run)
    assert metrics["images"] == 500
    assert metrics["confident"] >= 0.75
    assert min(metrics["class_shares"]) >= 0.04
    assert metrics["fd"] < 0.15 * metrics["ceiling"]["fd"]
    assert metrics["classifier_accuracy"] > 0.95


def test_the_half_network_trains_twice_as_fast(digits):
    networks = read(digits, layout.COST)["networks"]
    assert networks["dense"]["step_ms"] / networks["0.5"]["step_ms"] >= 2
