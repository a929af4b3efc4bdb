"""Sizes of the paper's networks, against counts made with the paper's own pruning code."""

import csv
from functools import cache

import numpy as np
import pytest
import torch
from conftest import ROOT, unet
from torch import nn

from ebdiff.pruning.count import _gru_macs, count, meta_tensors
from ebdiff.pruning.graph import mask_length, trace
from ebdiff.pruning.select import select, select_random

NETWORKS = {
    "cifar10": unet(),
    "celeba64": unet(64, multipliers=(1, 2, 2, 2, 4)),
    "lsun256": unet(256, multipliers=(1, 1, 2, 2, 4, 4), dropout=0),
}
GROUPS = {"cifar10": 50, "celeba64": 61, "lsun256": 71}

# network, rate, parameters in M, MACs in G, entries of a mask, entries pruned
COUNTED = """
cifar10,0.0,35.7463,6.0655,,
cifar10,0.3,19.8512,3.3928,12032,3164
cifar10,0.4,14.3176,2.7368,12032,4434
cifar10,0.5,8.9685,1.5210,12032,6016
cifar10,0.6,8.5944,1.4910,12032,6328
cifar10,0.7,5.1205,1.0766,12032,7598
cifar10,0.8,2.1627,0.3751,12032,9180
celeba64,0.0,78.7008,23.9230,,
celeba64,0.3,43.7350,13.3221,18176,4739
celeba64,0.5,19.7142,5.9979,18176,9088
celeba64,0.6,16.6489,5.7601,18176,9830
celeba64,0.8,4.7582,1.4589,18176,13827
lsun256,0.0,113.6732,248.6912,,
lsun256,0.3,63.2059,138.8734,23296,6091
lsun256,0.4,44.9579,126.4248,23296,8567
lsun256,0.5,28.4636,62.4154,23296,11648
lsun256,0.7,12.5562,52.4286,23296,15329
lsun256,0.8,6.8799,15.3258,23296,17739
"""
ROWS = [line.split(",") for line in COUNTED.split()]
LARGE = [pytest.mark.slow]


@cache
def counted(network, rate):
    return count(NETWORKS[network], meta_tensors(NETWORKS[network], rate))


@pytest.mark.parametrize(
    ("network", "rate", "params", "macs", "length", "pruned"),
    [pytest.param(*row, marks=LARGE if row[0] == "lsun256" else []) for row in ROWS],
)
def test_sizes_are_the_papers(network, rate, params, macs, length, pruned):
    found = counted(network, float(rate))
    assert [f"{found[0] / 1e6:.4f}", f"{found[1] / 1e9:.4f}"] == [params, macs]
    if length:
        groups = trace(NETWORKS[network])
        mask = select(groups, {}, float(rate))  # which channels go doesn't matter here
        assert (len(mask), int((~mask).sum())) == (int(length), int(pruned))
        assert mask_length(groups) == int(length)


@pytest.mark.parametrize("network", NETWORKS)
def test_group_counts(network):
    assert len(trace(NETWORKS[network])) == GROUPS[network]


def test_the_cifar_network_has_the_published_number_of_parameters():
    assert counted("cifar10", 0.0)[0] == 35_746_307


def test_random_masks_take_as_many_channels_as_any_other():
    groups = trace(NETWORKS["cifar10"])
    for _, rate, *_, pruned in ROWS[1:7]:
        mask = select_random(groups, np.random.default_rng(1), float(rate))
        assert int((~mask).sum()) == int(pruned)


def test_average_macs_of_table_8():
    path = ROOT / "src/ebdiff/report/paper/table8.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert len(rows) == 7
    for row in rows:
        macs = [counted("cifar10", float(row[f"rate{i}"]))[1] / 1e9 for i in (1, 2, 3)]
        average = 0.24 * macs[0] + 0.20 * macs[1] + 0.56 * macs[2]
        assert average == pytest.approx(float(row["average_macs_g_corrected"]), abs=0.01)


def test_a_recurrent_layer_computes_with_each_weight_once_a_point():
    gru = nn.GRU(5, 3, num_layers=2, bidirectional=True, batch_first=True)
    gru.__flops__ = 0
    gru.register_forward_hook(_gru_macs)
    a_point = 2 * 3 * (3 * 5 + 3 * 3) + 2 * 3 * (3 * 6 + 3 * 3)
    gru(torch.zeros(2, 4, 5))
    assert gru.__flops__ == 8 * a_point
    gru(nn.utils.rnn.pack_sequence([torch.zeros(4, 5), torch.zeros(3, 5)]))
    assert gru.__flops__ == (8 + 7) * a_point
