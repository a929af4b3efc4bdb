"""The paper's published speed-ups and averages, recomputed from our formulas."""

import csv

import pytest
from conftest import ROOT

from ebdiff.cost.accounting import (
    average,
    average_visited,
    mask_seconds,
    search_steps,
    speedups,
)

SERVES = ((0, 240), (240, 440), (440, 1000))

# Time per step relative to dense, solved from one row of each table.
STEP_TIME = {
    "table4": {0.3: 0.694, 0.5: 0.363},
    "table5": {0.3: 0.571, 0.5: 0.441},
    "lsun_church": {0.3: 0.746, 0.5: 0.476},
    "lsun_bedroom": {0.3: 0.746, 0.5: 0.476},
    "imagenet": {0.3: 0.690, 0.5: 0.500},
}
DENSE = {"table4": 800_000, "table5": 500_000, "imagenet": 100_000}
TRUNCATED = {("table4", "0.95"): 0.957, ("table5", "0.91"): 0.919}


def published(table):
    path = ROOT / f"src/ebdiff/report/paper/{table}.csv"
    return list(csv.DictReader(path.read_text().splitlines()))


def method_of(row):
    method = row["method"]
    if method in ("unpruned", "scratch", "ta-eb", "eb"):
        return method
    return {"baseline": "finetune", "eb": "eb", "ta-eb": "ta-eb"}[row["block"]]


CASES = [(table, table, row) for table in ("table4", "table5") for row in published(table)]
CASES += [("table6", row["dataset"], row) for row in published("table6")]


@pytest.mark.parametrize(("table", "setting", "row"), CASES)
def test_published_speedups_follow_from_the_formulas(table, setting, row):
    dense, times = DENSE.get(setting, 800_000), STEP_TIME[setting]
    method, iterations = method_of(row), int(row["iterations"])
    if method == "ta-eb":  # 60 and 80 % networks are faster than the 30 % one
        each = (times[0.3], times[0.5], 0.2)
    elif method == "unpruned":
        each = (1.0,)
    else:
        each = (times[float(row.get("nominal_rate") or 0.5)],)
    costs = [iterations * c for c in each]
    found = speedups(method, dense, costs, [0] * len(costs), 0).as_paper
    printed = TRUNCATED.get((table, row["speedup"]), float(row["speedup"]))
    assert found == pytest.approx(printed, abs=0.02)
    if (table, row["speedup"]) in TRUNCATED:
        assert int(found * 100) / 100 == float(row["speedup"])


def test_the_three_ways_of_counting_by_hand():
    # Costs 280, 152 and 150 dense steps; each expert waits for its own search, searches side by side.
    found = speedups("ta-eb", 800, [400 * 0.7, 400 * 0.38, 600 * 0.25], [90, 261, 50], 401)
    assert found.as_paper == pytest.approx(800 / 280)
    assert found.with_search == pytest.approx(800 / (152 + 261))
    assert found.device_time == pytest.approx(800 / (280 + 152 + 150 + 401))


@pytest.mark.parametrize(
    ("method", "before"), [("scratch", 800), ("finetune", 800), ("eb", 0), ("control", 0)]
)
def test_only_scratch_and_finetune_are_charged_the_dense_training(method, before):
    found = speedups(method, 800, [900 * 0.4], [0], 0)
    assert found.as_paper == pytest.approx(800 / (before + 360))


# rates of the three experts, average rate in %, MACs in G
AVERAGES = [
    ((30, 60, 80), 64.0, 1.3225),
    ((30, 40, 70), 54.4, 1.9645),
    ((30, 40, 80), 60.0, 1.5717),
    ((30, 40, 90), 65.6, None),
    ((30, 50, 70), 56.4, 1.7214),
    ((30, 50, 80), 62.0, 1.3285),
    ((30, 60, 70), 58.4, 1.7154),
]
MACS = {30: 3.3928, 40: 2.7368, 50: 1.5210, 60: 1.4910, 70: 1.0766, 80: 0.3751}
PARAMS = {30: 19.8512, 60: 8.5944, 80: 2.1627}


@pytest.mark.parametrize(("rates", "rate", "macs"), AVERAGES)
def test_averages_are_weighted_by_the_spans_served(rates, rate, macs):
    assert average(rates, SERVES) == pytest.approx(rate, abs=0.05)
    if macs:
        assert average([MACS[r] for r in rates], SERVES) == pytest.approx(macs, abs=1e-3)


def test_average_parameters_of_the_main_triple():
    assert average([PARAMS[r] for r in (30, 60, 80)], SERVES) == pytest.approx(7.694, abs=1e-3)


def test_the_order_of_experts_does_not_matter():
    assert average([1, 2, 3], SERVES) == pytest.approx(average([3, 1, 2], [SERVES[i] for i in (2, 0, 1)]))


def test_the_visited_average_counts_what_the_sampler_does():
    visited = [0] * 55 + [300] * 19 + [700] * 26
    found = average_visited([3.3928, 1.4910, 0.3751], SERVES, visited)
    assert found == pytest.approx(2.25, abs=0.005)
    uniform = range(0, 1000, 10)
    assert average_visited([1, 2, 3], SERVES, uniform) == pytest.approx(average([1, 2, 3], SERVES))


def test_a_search_is_charged_once_up_to_its_last_ticket():
    stories = [
        {"search": "full", "step": 145},
        {"search": "full", "step": 261},
        {"search": "full", "step": 203},
    ]
    assert search_steps(stories) == {"full": 261}
    assert search_steps([*stories, {"search": "r1", "step": 100}]) == {"full": 261, "r1": 100}
    assert search_steps([{"search": "final", "step": 800}]) == {}


def test_a_gradient_criterions_masks_are_charged_in_proportion_to_the_intervals(vary):
    e = vary({"searches.full.criteria": ["magnitude", "taylor"]})  # at three rates
    ledgers = {
        ("full", "taylor", "ema"): {"seconds": 120.0, "masks": 3 * 10},
        ("full", "taylor", "raw"): {"seconds": 150.0, "masks": 3 * 10, "share": 3},  # of a GPU that three use
    }
    tickets = [("magnitude", "ema", 9), ("random", "ema", 9), ("taylor", "ema", 3), ("taylor", "ema", 7)]
    tickets.append(("taylor", "raw", 4))
    stories = [{"search": "full", "criterion": c, "weights": w, "interval": i} for c, w, i in tickets]
    found = mask_seconds(e, stories, lambda *ticket: ledgers[ticket])
    # 8 and 5 of 10 intervals.
    assert found == {("full", "taylor", "ema"): pytest.approx(96), ("full", "taylor", "raw"): 25}
    assert mask_seconds(e, stories[:2], lambda *ticket: 1 / 0) == {}
