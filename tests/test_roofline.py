"""What a step computes, moves and takes at least, against counts by hand; and which rates pay."""

import pytest
import torch
from conftest import unet, write_experiment
from stages import run
from torch import nn

from ebdiff.cost import measure, roofline
from ebdiff.experiment import layout
from ebdiff.pruning.count import count, meta_tensors, watch
from ebdiff.system.files import read_json

SMALL = unet(4, 1, width=8, multipliers=(1,), blocks=1, attention=(), norm_groups=4)


def test_layers_read_their_input_and_write_their_output_once():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 2)
    )
    found = watch(network)
    network(torch.zeros(1, 3, 4, 4))
    assert found == [48 + 64, 64 + 64, 64 + 2]


def test_the_activations_of_a_u_net_by_hand():
    pixels, kept, joined = 16, 8, 16
    embedding = (8 + 32) + (32 + 32)
    to_block = 32 + 8
    block = 4 * 2 * kept * pixels + to_block  # two norms and two convolutions
    up = 2 * joined * pixels + 2 * (joined + kept) * pixels + 2 * 2 * kept * pixels + to_block  # and shortcut
    attention = 5 * 2 * kept * pixels  # norm, q, k, v, output
    ends = (1 + kept) * pixels + 2 * kept * pixels + (kept + 1) * pixels  # and the last norm
    by_hand = embedding + ends + 3 * block + attention + 2 * up  # one down, two in the middle, two up
    assert count(SMALL, meta_tensors(SMALL, 0.0)).activations == by_hand == 8784


def test_operations_and_bytes_of_a_step():
    assert roofline.operations(7, 5) == 2 * 7 * 5 + 2 * (2 * 7 * 5)  # forward, and backward twice that
    state = 5 * (4 + 4) * 250  # five fp32 tensors, read and written
    assert roofline.moved(250, 306, 5, "fp32") == 4 * 3 * (5 * 306 + 250) + state
    assert roofline.moved(250, 306, 5, "bf16") == 2 * 3 * (5 * 306 + 250) + state


@pytest.mark.parametrize(("flops", "speed", "by", "ms"), [
    (210 / 5e-4, 31360 / 1e-4, "operations", 0.5), (210 / 1e-3, 31360 / 4e-3, "bytes", 4.0),
])  # fmt: skip
def test_the_slower_of_both_binds(flops, speed, by, ms):
    network = {"params": 250, "macs": 7, "activations": 306}
    peaks = {"flops": {"tf32": flops, "bf16": 1e15}, "bytes": speed}
    found = roofline.bounded(network, 5, "tf32", peaks)
    assert found == {"operations": 210, "bytes": 31360, "bound_ms": pytest.approx(ms), "bound_by": by}


H100 = {"dense": 22.1, "0.3": 21.2, "0.5": 12.4, "0.8": 8.8}  # ms, convolutions and optimiser alone


@pytest.mark.parametrize(("times", "vain", "pay"), [
    (H100, {"0.3": "21.2 ms a step against 22.1 ms for dense"}, "0.5, 0.8"),
    ({"dense": 22.1, "0.5": 12.4, "0.6": 13.0}, {"0.6": "13.0 ms a step against 12.4 ms for 0.5"}, "0.5"),
    (H100 | {"0.3": 21.0}, {"0.3": "21.0 ms a step against 22.1 ms for dense"}, "0.5, 0.8"),  # 4.98 % less
    (H100 | {"0.3": 20.99}, {}, ""),  # 5.02 % less
    ({"dense": 5.0, "0.3": 6.0}, {"0.3": "6.00 ms a step against 5.00 ms for dense"}, "none"),
])  # fmt: skip
def test_what_gains_nothing_and_what_pays_is_told(times, vain, pay):
    told = [f"rate {rate} gains nothing on this device ({ms}); what pays: {pay}" for rate, ms in vain.items()]
    assert roofline.in_vain({name: {"step_ms": ms} for name, ms in times.items()}) == told


def test_small_steps_down_add_up():
    times = [22.0, 21.5, 21.0, 20.5, 20.0, 19.5]  # each 2 % faster than the last: every third pays
    networks = {"dense" if not i else str(i / 10): {"step_ms": ms} for i, ms in enumerate(times)}
    assert all(line.endswith("what pays: 0.3") for line in roofline.in_vain(networks))
    assert len(roofline.in_vain(networks)) == 4


def test_the_peaks_of_a_cpu_are_measured_and_bound_its_steps(vary):
    networks = measure.counts(vary({}))
    found = measure.bound(vary({}), networks, torch.device("cpu"))
    assert list(found["flops"]) == ["fp32"]
    assert 1e9 < found["flops"]["fp32"] < 1e14 and 1e8 < found["bytes"] < 1e13
    for network in networks.values():
        assert network["operations"] == 6 * 16 * network["macs"]
        in_each = network["operations"] / found["flops"]["fp32"], network["bytes"] / found["bytes"]
        assert network["bound_ms"] == pytest.approx(1e3 * max(in_each), abs=1e-3)


@pytest.mark.slow
def test_cost_json_says_what_a_step_takes_at_least(tmp_path, monkeypatch):
    write_experiment(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run("measure-cost", "tiny") == 0
    cost = read_json(layout.path(layout.COST, experiment="tiny"))
    for network in cost["networks"].values():
        assert 0 < network["bound_ms"] < network["step_ms"]
        assert network["bound_by"] in ("operations", "bytes")
