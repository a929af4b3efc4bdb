"""SpeeD's timestep law and weights against its formulas."""

import numpy as np
import pytest

from ebdiff.diffusion.timesteps import SpeeD
from ebdiff.experiment.schema import Diffusion, Speed


def law(lo=0, hi=1000, **settings):
    return SpeeD(lo, hi, Diffusion(), Speed(**settings))


def draws(law, count=2000, batch=128):
    rng = np.random.default_rng(0)
    return np.concatenate([law.draw(rng, batch)[0] for _ in range(count)])


def chi_square(t, expected):
    found = np.bincount(t, minlength=len(expected)).astype(float)
    used = expected > 0
    assert not found[~used].any()
    wanted = expected[used] / expected.sum() * len(t)
    return ((found[used] - wanted) ** 2 / wanted).sum(), used.sum() - 1


def plausible(statistic, degrees):
    return abs(statistic - degrees) < 5 * np.sqrt(2 * degrees)


def test_weights_at_named_timesteps():
    weights = law().weights
    assert weights[[0, 219, 699, 700, 999]] == pytest.approx([0.409, 0.6, 0.407, 1, 1], abs=5e-4)
    assert weights[:700].argmax() == 219


def test_pivot_of_ddpm_schedule_is_642():
    assert law().pivot == 642


def test_independent_draws_follow_the_asymmetric_law():
    expected = np.where(np.arange(1000) < 700, 5.0, 1.0)
    t = draws(law(dual=False))
    assert plausible(*chi_square(t, expected))
    assert (t >= 700).mean() == pytest.approx(0.079, abs=0.002)


def test_dual_halves_the_mass_of_the_tail():
    # Half of the batch is drawn; no partner lies at 700 or above.
    assert (draws(law(), batch=1000, count=300) >= 700).mean() == pytest.approx(0.0395, abs=0.0015)


def test_dual_pairs_add_up_to_the_pivot():
    t, _ = law().draw(np.random.default_rng(1), 10)
    first, second = t[:6], t[6:]
    assert np.array_equal(second, np.where(first < 642, 642 - first, first - 642)[:4])


def test_inside_a_span_below_tau_only_the_weights_act():
    span = law(240, 460)
    t = draws(span)
    assert t.min() == 240 and t.max() == 459
    assert plausible(
        *chi_square(t[::2], np.where((np.arange(1000) >= 240) & (np.arange(1000) < 460), 1.0, 0))
    )
    assert np.array_equal(span.weights, law().weights)


def test_inside_a_span_partners_are_antithetic():
    t, weights = law(440, 1000).draw(np.random.default_rng(2), 8)
    assert np.array_equal(t[:3] + t[5:], [1439] * 3)
    assert np.array_equal(weights, law().weights[t])


def test_span_across_tau_keeps_the_ratio_before_pairing():
    p = law(440, 1000).probabilities
    assert p[699] / p[700] == pytest.approx(5) and p.sum() == pytest.approx(1) and p[439] == 0
