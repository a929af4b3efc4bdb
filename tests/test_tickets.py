import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from ebdiff.data.dataset import open_dataset
from ebdiff.diffusion.process import Process
from ebdiff.diffusion.timesteps import Antithetic
from ebdiff.experiment import layout, load, places
from ebdiff.nets import store
from ebdiff.nets.execution import Runtime
from ebdiff.pruning.graph import trace
from ebdiff.pruning.importance import magnitude
from ebdiff.pruning.select import Selector, select_random
from ebdiff.pruning.surgery import cut
from ebdiff.report.facts import RunFacts
from ebdiff.report.results import Results
from ebdiff.system.errors import UserError
from ebdiff.tickets import stages
from ebdiff.tickets.history import (
    History,
    chance,
    first_settled,
    hamming,
    hamming_matrix,
    last_distances,
    load_history,
    recent_distances,
    save_histories,
    settled,
)
from ebdiff.training.loop import Job, train
from ebdiff.training.state import State
from ebdiff.training.train import _initial, train_dense

CPU = torch.device("cpu")
LENGTH = 20


def history_of(*flips):
    """Packed masks of 20 entries; each is all True but for the given entries."""
    masks = np.ones((len(flips), LENGTH), bool)
    for mask, flipped in zip(masks, flips, strict=True):
        mask[list(flipped)] = False
    return np.packbits(masks, axis=1)


def fires_at(*flips, window=5, threshold=0.1):
    return first_settled(history_of(*flips), LENGTH, window, threshold)


def test_hamming_on_packed_bits_is_the_share_of_differing_entries():
    rng = np.random.default_rng(0)
    for length in (1, 7, 8, 9, 1000):
        a, b = rng.random((2, 6, length)) < 0.4
        naive = [sum(x != y for x, y in zip(p, q, strict=True)) / length for p, q in zip(a, b, strict=True)]
        found = hamming(np.packbits(a, axis=1), np.packbits(b, axis=1), length)
        np.testing.assert_allclose(found, naive)


def test_the_earliest_ticket_is_at_interval_four():
    assert fires_at(*[()] * 4) is None
    assert fires_at(*[()] * 5) == 4
    assert fires_at(*[()] * 3, window=3) == 2


def test_equality_with_the_threshold_counts_as_settled():
    # Two of twenty entries are exactly 0.1.
    assert fires_at((), (), (), (), (0, 1)) == 4
    assert fires_at((), (), (), (), (0, 1, 2)) is None


def test_the_rule_waits_until_the_last_far_mask_has_left_the_queue():
    far = range(10)
    assert fires_at((), (), far, (), (), (), (), (), ()) == 7


def test_a_slow_drift_does_not_settle():
    # Each mask is 1 entry (0.05) from the one before, 4 (0.2) from the oldest in the queue.
    drift = [range(i) for i in range(8)]
    neighbours = [hamming(a, b, LENGTH) for a, b in pairwise(history_of(*drift))]
    assert max(neighbours) <= 0.1
    assert fires_at(*drift) is None
    assert fires_at(*drift, threshold=0.2) == 4


def test_only_the_newest_mask_is_compared_not_all_pairs():
    # The four older masks lie 0.2 apart, each 0.1 from the newest.
    star = [(0, 1), (2, 3), (4, 5), (6, 7), ()]
    packed = history_of(*star)
    assert max(hamming(a, b, LENGTH) for a in packed[:4] for b in packed[:4]) == pytest.approx(0.2)
    assert fires_at(*star) == 4


def test_last_distances_are_to_the_four_before_oldest_first():
    packed = history_of((), (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4))
    np.testing.assert_allclose(last_distances(packed, LENGTH, 5), [0.2, 0.15, 0.1, 0.05])
    np.testing.assert_allclose(last_distances(packed[:2], LENGTH, 5), [0.05])


@pytest.mark.parametrize("window", [2, 5, 9])
def test_a_whole_history_is_judged_as_its_intervals_one_by_one(window):
    rng, fired = np.random.default_rng(window), []
    for length in (20, 64, 100):
        # Masks that move less and less.
        masks = np.cumsum(rng.random((40, length)) < np.logspace(-1, -2, 40)[:, None], axis=0) % 2 == 0
        packed = np.packbits(masks, axis=1)
        recent = recent_distances(packed, length, window)
        for i in range(len(masks)):
            expected = [np.mean(masks[i] != masks[j]) for j in range(max(0, i - window + 1), i)]
            missing = window - 1 - len(expected)
            np.testing.assert_array_equal(recent[i], [np.nan] * missing + expected)
        one_by_one = [settled(packed[: i + 1], length, window, 0.1) for i in range(len(masks))]
        fired.append(first_settled(packed, length, window, 0.1))
        assert fired[-1] == (one_by_one.index(True) if any(one_by_one) else None)
    assert any(fired)


@pytest.mark.parametrize("pruned", [0, 1, 5, 10, 20])
def test_chance_of_one_group(pruned):
    mask = np.arange(20) >= pruned
    f = pruned / 20
    assert chance(mask, [20]) == pytest.approx(2 * f * (1 - f))


def test_chance_is_the_mean_distance_of_random_masks(tiny):
    groups, rng = trace(tiny.architecture), np.random.default_rng(0)
    for rate in (0.3, 0.5, 0.8):
        masks = np.stack([select_random(groups, rng, rate) for _ in range(400)])
        distances = (masks[:200] != masks[200:]).mean(axis=1)
        error = distances.std() / np.sqrt(len(distances))
        assert chance(masks[0], [g.width for g in groups]) == pytest.approx(distances.mean(), abs=4 * error)


@pytest.fixture
def history(tiny):
    groups, rng = trace(tiny.architecture), np.random.default_rng(0)

    def masks():
        return np.stack([np.packbits(select_random(groups, rng, r)) for r in (0.3, 0.5)])

    return History(
        (0.3, 0.5),
        tuple(g.name for g in groups),
        tuple(g.width for g in groups),
        masks(),
        [masks() for _ in range(7)],
    )


def test_a_history_comes_back_as_it_was_saved(tmp_path, tiny, history):
    bare = History(history.rates, history.names, history.widths, None, history.masks[:2])
    save_histories(tmp_path / "m.npz", {"raw": bare, "ema": history})
    found = load_history(tmp_path / "m.npz", "ema", trace(tiny.architecture))
    assert (found.rates, found.names, found.widths) == (history.rates, history.names, history.widths)
    np.testing.assert_array_equal(found.masks, history.masks)
    np.testing.assert_array_equal(found.initial, history.initial)
    raw = load_history(tmp_path / "m.npz", "raw", trace(tiny.architecture))
    assert raw.initial is None
    assert len(raw.masks) == 2
    with np.load(tmp_path / "m.npz") as file:
        assert not file["names"].dtype.hasobject


def test_distances_of_a_history_match_the_unpacked_masks(history):
    masks = np.stack([history.mask(0.5, i) for i in range(7)])
    naive = (masks[:, None] != masks[None]).mean(axis=2)
    np.testing.assert_allclose(history.distances(0.5), naive, atol=1e-6)
    initial = np.unpackbits(history.initial[1], count=history.length).astype(bool)
    np.testing.assert_allclose(history.to_initial(0.5), (masks != initial).mean(axis=1))


def test_a_history_of_another_network_or_order_is_refused(tmp_path, vary, history):
    path = tmp_path / "m.npz"
    save_histories(path, {"ema": history})
    for change in ({"network.width": 16}, {"network.blocks": 2}, {"network.middle_attention": False}):
        with pytest.raises(UserError, match=r"m\.npz: masks of another network"):
            load_history(path, "ema", trace(vary(change).architecture))
    with pytest.raises(UserError, match=r"m\.npz: .* in another order"):
        load_history(path, "ema", trace(vary({}).architecture)[::-1])


def test_missing_weights_and_missing_files_are_named(tmp_path, tiny, history):
    path = tmp_path / "m.npz"
    with pytest.raises(UserError, match=r"m\.npz: missing"):
        load_history(path, "ema", trace(tiny.architecture))
    save_histories(path, {"ema": history})
    with pytest.raises(UserError, match=r"m\.npz.*raw"):
        load_history(path, "raw", trace(tiny.architecture))


# --- whole searches -----------------------------------------------------------------------------------


def search(experiment, **ticket):
    where = {"search": "full", "criterion": "magnitude", "weights": "ema", "seed": 0}
    train_dense(experiment, "full", 0, CPU)
    stages.prune_per_epoch(experiment, **where, device=CPU)
    hamming_matrix(experiment, **where)
    return stages.select_eb_epoch(experiment, **where, rate=ticket.get("rate", 0.5))


def test_a_search_that_settles_stops_and_says_so(workspace, vary):
    e = vary({"searches.full.threshold": 0.9, "searches.full.horizon": 30, "searches.full.watch": 1})
    story = search(e)
    assert story["settled"] is True
    assert (story["interval"], story["intervals_completed"], story["step"]) == (4, 5, 50)
    where = dict(experiment="tiny", seed=0, search="full")
    ledger = json.loads(layout.path(layout.DENSE_LEDGER, **where).read_text())
    # Every rate settles at interval 4; one more is watched.
    assert (ledger["stopped"], ledger["intervals"], ledger["steps"]) == ("settled", 6, 60)
    kept = [path.name for path in layout.path(layout.SNAPSHOTS, **where).iterdir()]
    assert kept == ["4.safetensors"]


def test_a_search_goes_on_to_the_last_interval_that_a_ticket_is_asked_at(workspace, vary):
    e = vary(
        {"searches.full.threshold": 0.9, "searches.full.horizon": 30, "searches.full.tickets_at": [0, 9]}
    )
    assert search(e)["interval"] == 4
    where = dict(experiment="tiny", seed=0, search="full")
    assert json.loads(layout.path(layout.DENSE_LEDGER, **where).read_text())["intervals"] == 9
    kept = {path.stem for path in layout.path(layout.SNAPSHOTS, **where).iterdir()}
    assert kept == {"initial", "4", "8"}


@pytest.mark.parametrize("after", [0, 2])
def test_a_ticket_at_an_interval_is_cut_from_a_dense_training_of_that_length(workspace, vary, after):
    """Against a training of its own, by the plain loop without a search."""
    at = {"title": "At", "method": "control", "rate": 0.5, "after": after, "iterations": 5}
    e = vary({"searches.full.tickets_at": [0, 2], "runs.at": at, "runs.whole": {**at, "init": "snapshot"}})
    search(e)
    story = stages.select_eb_epoch(e, "full", "magnitude", "ema", 0.5, 0, after)

    state = State.start(store.fresh(e.architecture, 0, "dense/full"), Runtime(CPU))
    process, law = Process(e.diffusion), Antithetic(0, 1000)
    job = Job("dense/full", 0, open_dataset(e), law, process, e.training, Runtime(CPU))
    train(state, job, 10 * after, save=lambda _: None)
    dense, groups = state.view("ema"), trace(e.architecture)
    mask = Selector(groups, (0.5,), CPU)(magnitude(dense))[0]

    expert, whole = (e.runs[name].experts[0] for name in ("at", "whole"))
    for x, expected in ((expert, cut(e.architecture, dense, mask)), (whole, dense)):
        begun = _initial(e, x, "any", 0).state_dict()
        assert begun.keys() == expected.keys()
        assert all(torch.equal(begun[name], expected[name]) for name in expected)
    told = json.loads(places.ticket_of(e, expert, layout.STORY, 0).read_text())
    assert told == story
    assert (story["settled"], story["interval"], story["step"]) == (None, after - 1, 10 * after)
    assert (story["to_initial"] == 0) == (after == 0)
    random = stages.select_eb_epoch(e, "full", "random", "ema", 0.5, 0, after)
    assert {k: random[k] for k in ("settled", "step", "widths")} == {
        k: story[k] for k in ("settled", "step", "widths")
    }


def test_a_search_that_never_settles_gives_its_last_mask_marked_so(workspace, vary):
    story = search(vary({"searches.full.threshold": 1e-9, "training.learning_rate": 0.01}))
    assert story["settled"] is False
    assert (story["interval"], story["step"]) == (5, 60)
    assert max(story["last_distances"]) > 1e-9
    stored = layout.path(
        layout.STORY, experiment="tiny", seed=0, search="full", criterion="magnitude", weights="ema", rate=0.5
    )
    assert json.loads(stored.read_text())["settled"] is False


def test_a_slow_average_is_called_near_its_initialisation(workspace, vary):
    """EMA 0.9999 keeps the initial weights: the rule fires at once, with the initial mask."""
    story = search(vary({"training.ema_decay": 0.9999}))
    assert (story["settled"], story["interval"]) == (True, 4)
    assert story["to_initial"] < 0.1 < story["chance"]
    assert story["kind"] == "near its initialisation"


def test_a_rate_that_was_not_searched_for_is_refused(workspace, tiny):
    search(tiny)
    with pytest.raises(UserError, match=r"rate .?0\.4.? is not known"):
        stages.select_eb_epoch(tiny, "full", "magnitude", "ema", 0.4, 0)


def test_a_random_ticket_is_cut_at_the_magnitude_tickets_interval(workspace, tiny):
    story = search(tiny)
    random = stages.select_eb_epoch(tiny, "full", "random", "ema", 0.5, 0)
    assert random["step"] == story["step"]
    assert random["params"] == story["params"]
    assert random["widths"] == story["widths"]
    parts = dict(experiment="tiny", seed=0, search="full", weights="ema", rate=0.5)
    mine, theirs = (
        store.load(layout.path(layout.TICKET, criterion=c, **parts))[0] for c in ("magnitude", "random")
    )
    assert any(not torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.slow
def test_a_ticket_is_as_far_from_the_finished_network_as_their_masks_differ(made, monkeypatch):
    """On real trainings; the masks are read as plain bits."""
    monkeypatch.chdir(made)
    facts = RunFacts(Results(load.load("tiny")), "eb-50")

    def bits(search, interval):
        where = dict(experiment="tiny", seed=0, search=search, criterion="magnitude", weights="ema")
        with np.load(layout.path(layout.MASKS, **where)) as file:
            rate = file["ema.rates"].tolist().index(0.5)
            return np.unpackbits(file["ema.masks"][interval, rate], count=file["ema.widths"].sum())

    (story,) = facts.tickets
    differing = np.count_nonzero(bits("full", story["interval"]) != bits("final", 0))
    assert differing > 0 and facts.to_final == (differing / len(bits("final", 0)),)
