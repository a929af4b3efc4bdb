"""SpeeD's timestep law and weights against its formulas."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ebdiff.data.dataset import Images
from ebdiff.diffusion.timesteps import SpeeD
from ebdiff.experiment.members import Items
from ebdiff.experiment.schema import Diffusion, Speed
from ebdiff.system import parallel
from ebdiff.system.draws import generator
from ebdiff.training.batches import Draws

PRESETS = (Path(__file__).parents[1] / "config/experiments").glob("*.yaml")


def spans(raw):
    """Every `span` of a YAML mapping, however deep."""
    if isinstance(raw, dict):
        yield from [tuple(raw["span"])] if "span" in raw else []
    for part in raw.values() if isinstance(raw, dict) else raw if isinstance(raw, list) else ():
        yield from spans(part)


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


def test_dual_halves_the_mass_of_the_tail():
    # Half of the batch is drawn; no partner lies at 700 or above.
    assert (draws(law(), batch=1000, count=300) >= 700).mean() == pytest.approx(0.0395, abs=0.0015)


def test_dual_pairs_add_up_to_the_pivot():
    t, _ = law().draw(np.random.default_rng(1), 10)
    first, second = t[:6], t[6:]
    assert np.array_equal(second, np.where(first < 642, 642 - first, first - 642)[:4])


# Every span that an expert or a search of the presets trains on, and the whole range without the dual.
SPANS = sorted({(0, 1000), *(span for path in PRESETS for span in spans(yaml.safe_load(path.read_text())))})


def test_the_presets_train_on_the_spans_of_the_paper():
    assert {(0, 260), (240, 460), (440, 1000)} < set(SPANS)


@pytest.mark.parametrize(("lo", "hi"), SPANS)
def test_after_pairing_a_span_keeps_the_law(lo, hi):
    """p_t is k times larger below tau (Wang et al. 2024): in both halves of the batch, and in the tail."""
    t = np.arange(1000)
    expected = np.where(t < 700, 5.0, 1.0) * ((lo <= t) & (t < hi))
    found = draws(law(lo, hi, dual=False)).reshape(-1, 128)
    for half in (found[:, :65], found[:, 65:]):  # within a half draws are independent
        assert plausible(*chi_square(half.ravel(), expected))
    tail = expected[700:].sum() / expected.sum()
    # Partners lie on opposite sides, so that the share scatters less than that of independent draws.
    assert abs((found >= 700).mean() - tail) <= 5 * np.sqrt(tail * (1 - tail) / found.size)


def test_the_tail_of_the_last_span_has_its_published_share():
    assert (draws(law(440, 1000)) >= 700).mean() == pytest.approx(300 / 1600, abs=0.003)  # 0.19, not 0.51
    assert (draws(law(dual=False)) >= 700).mean() == pytest.approx(300 / 3800, abs=0.002)  # 7.9 %


class Given:
    """A generator whose next uniform numbers are given."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def random(self, count):
        assert count == len(self.numbers)
        return np.array(self.numbers)


def test_partners_are_opposite_quantiles():
    # [440, 1000) has 260 timesteps of mass 5 and 300 of mass 1, together 1600.
    u = np.array([0, 7, 160.5, 799, 1301.5, 1599.5]) / 1600
    t, weights = law(440, 1000).draw(Given(*u), 10)
    assert list(t[:6]) == [440, 441, 472, 599, 701, 999]
    assert list(t[6:]) == [999, 992, 839, 600]  # at masses 1600, 1593, 1439.5 and 801
    assert np.array_equal(weights, law().weights[t])


@pytest.mark.parametrize(("lo", "hi"), [(0, 260), (240, 460), (720, 1000)])
def test_where_the_law_is_uniform_partners_mirror_each_other(lo, hi):
    t, _ = law(lo, hi).draw(np.random.default_rng(2), 2000)
    assert np.array_equal(t[:999] + t[1001:], np.full(999, lo + hi - 1))


def test_weights_are_the_same_in_every_span():
    assert np.array_equal(law(240, 460).weights, law().weights)


def test_labels_are_dropped_by_seed_stream_and_step(monkeypatch):
    """The dropped ones become the class after the last; processes share the draw of the whole batch."""
    images = Images(Items((1, 4, 4), 2), np.zeros((9, 4, 4, 1), np.uint8), np.arange(9) % 2)

    def drawn(step, rows=slice(0, 400), share=0.25):
        monkeypatch.setattr(parallel, "share", lambda size: rows)
        draws = Draws(images, law(440, 1000), 400, 3, "expert/x", torch.device("cpu"), share)
        (batch,) = draws.batches([step])
        return batch.cond.label

    whole, all_told = drawn(5), drawn(5, share=0)
    assert set(all_told.tolist()) == {0, 1}
    dropped = whole != all_told
    assert (whole[dropped] == 2).all()
    assert 0.17 < dropped.float().mean() < 0.33  # 400 of them: standard deviation 0.022
    assert torch.equal(drawn(5), whole)
    assert torch.equal(drawn(5, slice(100, 300)), whole[100:300])
    assert not torch.equal(drawn(6) == 2, whole == 2)


def test_processes_share_the_draw_of_the_whole_batch(monkeypatch):
    images = Images(Items((1, 4, 4)), np.zeros((9, 4, 4, 1), np.uint8))

    def drawn(rows):
        monkeypatch.setattr(parallel, "share", lambda size: rows)
        (batch,) = Draws(images, law(440, 1000), 7, 3, "expert/x", torch.device("cpu")).batches([5])
        return batch.t.numpy(), batch.weight.numpy()

    whole = law(440, 1000).draw(generator(3, "expert/x/timestep", 5), 7)
    for rows in (slice(0, 7), slice(0, 4), slice(4, 7)):
        for part, of in zip(drawn(rows), whole, strict=True):
            np.testing.assert_array_equal(part, of[rows])
