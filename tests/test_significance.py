"""p-values against closed forms, printed tables and SciPy, and the verdicts that come of them."""

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import reported
from reported import fabricate, make
from scipy import stats

from ebdiff.experiment import layout
from ebdiff.experiment.schema import PrimaryClaim
from ebdiff.report import page, reading, significance
from ebdiff.report.results import Results
from ebdiff.report.significance import Mean
from ebdiff.system.files import read_json, write_json

CDF = {  # Student's t in closed form, by degrees of freedom
    1: lambda t: 0.5 + math.atan(t) / math.pi,
    2: lambda t: 0.5 + t / (2 * math.sqrt(2 + t * t)),
    3: lambda t: 0.5 + (math.atan(t / math.sqrt(3)) + t * math.sqrt(3) / (3 + t * t)) / math.pi,
    4: lambda t: 0.5 + 3 / 8 * t / math.sqrt(1 + t * t / 4) * (1 - t * t / (12 * (1 + t * t / 4))),
}
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262}  # its 97.5 % points, as every textbook prints


# --- Student's t --------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", CDF)
@pytest.mark.parametrize("t", [-7.0, -1.3, 0.0, 0.4, 2.5])
def test_one_sided_p_values_are_the_closed_forms(freedom, t):
    mean = Mean(value=1 + 0.2 * t, error=0.2, n=freedom + 1)
    assert mean.below(1) == pytest.approx(CDF[freedom](t), abs=1e-12)
    assert mean.above(1) == pytest.approx(1 - CDF[freedom](t), abs=1e-12)


@pytest.mark.parametrize("freedom", TABLE)
def test_intervals_use_the_printed_quantiles(freedom):
    low, high = Mean(value=3, error=0.5, n=freedom + 1).interval
    assert (3 - low, high - 3) == pytest.approx([0.5 * TABLE[freedom]] * 2, abs=3e-4)


@pytest.mark.parametrize("n", [3, 5, 12])
def test_paired_tests_are_scipys(n):
    rng = np.random.default_rng(n)
    x, y = rng.normal(0.2, 1, n), rng.normal(0, 1, n)
    found, test = significance.above(list(x - y)), stats.ttest_rel(x, y)
    assert found.p == pytest.approx(test.pvalue)
    assert (found.supports < found.opposes) == (test.statistic > 0)
    assert Mean.of(list(x - y)).interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    sided = significance.above(list(x), 0.1, 0.03)
    greater, less = (
        stats.ttest_1samp(x, 0.13, alternative="greater"),
        stats.ttest_1samp(x, 0.07, alternative="less"),
    )
    assert sided == pytest.approx((min(1, 2 * greater.pvalue), min(1, 2 * less.pvalue)))


def test_equal_values_are_certain():
    assert significance.above([0.1] * 3) == (0, 1) and significance.above([0.0] * 3) == (1, 1)
    assert significance.above([2.0] * 3, 1, 0.5) == (0, 1)
    assert significance.above([1.2] * 3, 1, 0.5).p == 1


def test_two_true_claims_are_seldom_opposed_and_two_true_bounds_seldom_decided():
    """Error rates of a claim of two parts, by simulation: each side at most half of 5 %."""
    rng, wrong = np.random.default_rng(0), np.zeros(2)
    for a, b in rng.normal(0, 1, (4000, 2, 3)):  # both exactly at their bounds
        both = significance.above(list(a)).both(significance.above(list(b)))
        wrong += np.array(both) < significance.LEVEL
    assert (wrong / 4000 < 0.025 + 3 * math.sqrt(0.025 * 0.975 / 4000)).all()


# --- Holm ---------------------------------------------------------------------------------------------


def test_holm_gives_the_values_of_rs_p_adjust():
    assert significance.holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert significance.holm([]) == [] and significance.holm([0.7, 0.9]) == [1, 1]


def test_holm_is_the_closed_bonferroni_test():
    """A hypothesis falls if every intersection with it does (Marcus, Peritz and Gabriel 1976)."""
    for seed in range(20):
        p = np.random.default_rng(seed).uniform(0, 0.3, 4)
        literal = [
            max(
                min(1, size * min(p[list(chosen)]))
                for size in range(1, 5) for chosen in combinations(range(4), size) if i in chosen
            )
            for i in range(4)
        ]  # fmt: skip
        assert significance.holm(list(p)) == pytest.approx(literal)


# --- verdicts -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reported.vouched(monkeypatch)


def read(e, values=None, **options):
    """The claims of an experiment whose runs have distances by seed, 25 + seed where none are given."""
    values = values or {}
    fabricate(e, quality=lambda run, seed: values[run][seed] if run in values else 25.0 + seed, **options)
    return {claim.text: claim for claim in reading.read(Results(e))}


def with_claims(e, *claims):
    return e.model_copy(update={"claims": tuple(PrimaryClaim(**c) for c in claims)})


LEAD = "The early-bird ticket at 50 % gives a lower cFD than "
RANDOM = LEAD + "a random ticket trained alike"
FINETUNE = LEAD + "pruning the finished network and finetuning"
COMPARABLE = (
    "Timestep-aware training, timed as in the paper, is faster than unpruned training at comparable quality"
)


def test_pairing_decides_what_the_spread_between_seeds_would_hide():
    eb, other = [10.0, 20.0, 30.0], [11.0, 21.1, 30.9]  # 1.0, 1.1, 0.9 apart, while seeds are 10 apart
    claims = read(make(seeds=(0, 1, 2)), {"eb-50": eb, "random-50": other, "finetune-50": [9.0, 18.9, 29.1]})
    assert claims[RANDOM].verdict == "supported" and claims[FINETUNE].verdict == "not supported"
    assert claims[RANDOM].kind == "exploratory"
    p = stats.ttest_rel(eb, other).pvalue
    assert claims[RANDOM].evidence == (
        "cFD 20.00 ± 10.00 ("
        + reported.HOSTILE
        + ") against 21.00 ± 9.95 (Random ticket); difference -1.00, "
        f"95 % interval -1.25 to -0.75, paired over 3 seeds. Two-sided p = {p:.3g}, unadjusted."
    )


def test_seeds_that_one_side_lacks_are_left_out_and_fewer_than_three_decide_nothing():
    e = make(seeds=(0, 1, 2, 3))
    runs = {**e.runs, "random-50": e.runs["random-50"].model_copy(update={"seeds": (1, 2, 3, 9)})}
    values = {"eb-50": [5.0, 1.0, 2.0, 3.0], "random-50": {1: 2.0, 2: 3.1, 3: 3.9, 9: 0.0}}
    claims = read(e.model_copy(update={"runs": runs}), values)
    assert claims[RANDOM].verdict == "supported" and "paired over 3 seeds" in claims[RANDOM].evidence
    runs["random-50"] = e.runs["random-50"].model_copy(update={"seeds": (1, 2, 9)})
    claims = read(e.model_copy(update={"runs": runs}), values)
    found = claims["The early-bird ticket at 50 % against a random ticket trained alike"]
    assert found.verdict == reading.UNDECIDED
    assert "2 seeds in common, and fewer than 3 decide nothing" in found.evidence


def test_holm_holds_over_the_primary_claims_alone():
    e = make(seeds=(0, 1, 2))
    apart = {"random-50": [1.0, 1.4, 0.7], "finetune-50": [1.0, 1.45, 0.65], "scratch-50": [1.0, 1.6, 0.4]}
    values = {name: [20 + seed + d for seed, d in enumerate(of)] for name, of in apart.items()}
    values["eb-50"] = [20.0, 21.0, 22.0]
    p, other, third = (stats.ttest_1samp(of, 0).pvalue for of in apart.values())
    assert p < other < 0.05 < 2 * p < third
    before = read(e, values)
    assert before[RANDOM].verdict == before[FINETUNE].verdict == "supported"
    named = with_claims(e, *({"run": "eb-50", "against": name} for name in ("random-50", "finetune-50")))
    claims = read(named, values)
    assert [c.kind for c in claims.values()][:3] == ["primary", "primary", "measured"]
    for text, own in ((RANDOM, p), (FINETUNE, other)):
        assert f"p = {own:.3g}, by Holm over 2 primary claims p = {2 * p:.3g}." in claims[text].evidence
        assert claims[text].verdict == reading.UNDECIDED
    scratch = next(c for name, c in claims.items() if "the same network trained from scratch" in name)
    assert scratch == before[scratch.text]


def test_the_page_tells_primary_claims_from_exploratory_ones(monkeypatch):
    reported.undrawn(monkeypatch)
    e = with_claims(make(seeds=(0, 1, 2)), {"run": "eb-50", "against": "random-50"})
    fabricate(e)
    page.write_page(Results(e, partial=True), Path("page.html"))
    html = Path("page.html").read_text()
    assert html.count("<small>primary</small>") == 1 < html.count("<small>exploratory</small>")
    assert html.index("primary</small>") < html.index("exploratory</small>")


def test_a_primary_claim_that_cant_be_tested_stays_in_sight():
    e = with_claims(make(seeds=(0, 1, 2)), {"run": "ta-eb", "against": "scratch-50"})
    (first, *_) = read(e, {"ta-eb": [1.0, 2.1, 3.2], "scratch-50": [5.0, 6.0, 7.0]}).values()
    assert (first.text, first.verdict) == ("TA-EB gives a lower cFD than Scratch", "supported")
    (first, *_) = read(e, settled=False).values()
    assert (first.text, first.verdict) == ("TA-EB against Scratch (lower)", reading.UNDECIDED)
    assert (
        first.kind == "primary" and first.evidence == "Masks were still moving when the search ended: TA-EB."
    )
    fabricate(e)
    for seed in (0, 1, 2):
        layout.path(layout.METRICS, experiment=e.name, run="ta-eb", seed=seed).unlink()
    first = reading.read(Results(e, partial=True))[0]
    assert (first.verdict, first.evidence) == (reading.UNDECIDED, "Not measured yet.")


def test_comparable_quality_is_a_paired_test_of_non_inferiority():
    e, ours, theirs = make(seeds=(0, 1, 2)), [10.5, 20.9, 31.2], [10.0, 20.0, 30.0]
    found = read(e, {"ta-eb": ours, "unpruned": theirs})[COMPARABLE]
    p = stats.ttest_1samp(1.1 * np.array(theirs) - ours, 0).pvalue
    assert 0.01 < p < 0.1 and f"Two-sided p = {p:.3g}," in found.evidence
    assert found.verdict == ("supported" if p < 0.05 else reading.UNDECIDED)
    found = read(e, {"ta-eb": [14.0, 25.1, 35.9], "unpruned": theirs})[COMPARABLE]
    assert found.verdict == "not supported"
    read(e, {"ta-eb": theirs, "unpruned": theirs})
    paced(e, {"0.3": (250.0, 1.0)})  # of equal quality, but 800 / (400 x 2.5) times faster
    found = {c.text: c for c in reading.read(Results(e))}[COMPARABLE]
    assert found.verdict == "not supported" and "0.80×" in found.evidence


def paced(e, networks):
    """Give some networks other step times and spreads, ms."""
    path = layout.path(layout.COST, experiment=e.name)
    cost = read_json(path)
    for name, (step, spread) in networks.items():
        cost["networks"][name] |= {"step_ms": step, "spread_ms": spread}
    write_json(path, cost)


@pytest.mark.parametrize(
    ("dense", "pruned", "verdict"),
    [
        ((100.0, 2.0), (48.0, 1.0), "supported"),  # 2.08 times, ± 2.08 hypot(1/48, 2/100) = 0.06
        ((100.0, 3.0), (48.0, 1.9), reading.UNDECIDED),  # ± 0.10
        ((100.0, 3.0), (52.0, 1.9), reading.UNDECIDED),  # 1.92 ± 0.09
        ((100.0, 1.0), (52.0, 1.0), "not supported"),  # 1.92 ± 0.04
    ],
)
def test_a_step_time_counts_beyond_its_measured_spread(dense, pruned, verdict):
    e = make()
    fabricate(e)
    paced(e, {"dense": dense, "0.5": pruned})
    (found,) = (c for c in reading.read(Results(e)) if "training step" in c.text)
    ratio = dense[0] / pruned[0]
    margin = ratio * math.sqrt((dense[1] / dense[0]) ** 2 + (pruned[1] / pruned[0]) ** 2)
    assert found.verdict == verdict and f"{ratio:.2f} times, ± {margin:.2f} by" in found.evidence


FASTER = "Timestep-aware training takes less device time than unpruned training"


@pytest.mark.parametrize(
    ("spread", "seconds", "verdict", "words"),
    [
        (0.01, 20.0, "supported", "60 s against 160 s. Two-sided"),
        (0.9, 20.0, reading.UNDECIDED, "60 s against 160 s. Two-sided"),
        (0.01, 100.0, reading.UNDECIDED, "300 s against 160 s, which contradicts it: nothing is decided."),
    ],
)
def test_device_time_counts_beyond_the_spread_unless_ledgers_contradict_it(spread, seconds, verdict, words):
    e = make(seeds=(0, 1, 2))
    fabricate(e)
    # 400 steps each at 0.2, 0.2, 0.2 of 100 ms, and a search of 261, 290, 319 steps: 800 over 501, 530, 559.
    paced(e, {"dense": (100.0, 0.0), **dict.fromkeys(("0.3", "0.6", "0.8"), (20.0, 20 * spread))})
    for seed in e.seeds:
        where = dict(experiment=e.name, seed=seed)
        for x in e.runs["ta-eb"].experts:
            path = layout.path(layout.LEDGER, expert=x.key, milestone=x.iterations, **where)
            write_json(path, {**read_json(path), "device_seconds": seconds})
        path = layout.path(layout.DENSE_LEDGER, search="full", **where)
        write_json(path, {**read_json(path), "device_seconds": 0.0})
    found = {c.text: c for c in reading.read(Results(e))}[FASTER]
    ratios = [800 / n for n in (501, 530, 559)]
    assert found.verdict == verdict and words in found.evidence
    assert f"{np.mean(ratios):.2f}× ± {np.mean(ratios) * spread:.2f} by the spread" in found.evidence
    if verdict == "supported":
        p = stats.ttest_1samp(ratios, 1 + np.mean(ratios) * spread).pvalue
        assert f"Two-sided p = {p:.3g}," in found.evidence
