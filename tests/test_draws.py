import numpy as np
import pytest
import torch

from ebdiff.data.dataset import Images, batch_indices, conditions
from ebdiff.experiment.members import Items
from ebdiff.system.draws import generator, item_noise
from ebdiff.system.errors import UserError

CPU = torch.device("cpu")


def words(seed, stream, *position):
    """64 raw 64-bit words of a stream: no transformation hides a coincidence."""
    return generator(seed, stream, *position).bit_generator.random_raw(64)


def all_differ(draws):
    found = np.concatenate(draws)
    return len(np.unique(found)) == len(found)


def test_the_same_call_gives_the_same_bits():
    np.testing.assert_array_equal(words(3, "dense/full/noise", 7), words(3, "dense/full/noise", 7))


def test_seeds_streams_and_steps_never_share_a_draw():
    streams = (
        "dense/full/noise",
        "dense/full/timestep",
        "dense/part/noise",
        "expert/a/noise",
        "sample/noise",
    )
    draws = [words(seed, s, step) for seed in range(20) for s in streams for step in range(100)]
    assert all_differ(draws)


def test_shifted_seeds_are_no_shifted_copies():
    # The trap of `seed + step`: seed 0 at step 1 must not be seed 1 at step 0.
    assert all_differ([words(seed, "noise", step) for seed in range(50) for step in range(50)])


def test_seeds_beyond_32_bits_differ():
    seeds = [0, 1, 2**32, 2**32 + 1, 2**40, 2**63]
    assert all_differ([words(seed, "noise", 0) for seed in seeds])


def test_position_and_seed_are_told_apart():
    assert all_differ(
        [words(1, "a"), words(1, "a", 0), words(1, "a", 0, 0), words(1, "a", 0, 1), words(0, "a", 1)]
    )


def test_item_noise_depends_on_seed_number_and_step_only():
    shape = (1, 4, 4)
    whole = item_noise(0, range(10), 5, shape)
    assert whole.dtype == np.float32
    for shard in ([0, 1, 2], [7, 3], [9]):
        np.testing.assert_array_equal(item_noise(0, shard, 5, shape), whole[shard])
    others = [item_noise(1, range(10), 5, shape), item_noise(0, range(10), 6, shape)]
    assert all_differ([whole.ravel(), *(o.ravel() for o in others)])


def test_item_noise_is_standard_normal():
    noise = item_noise(0, range(500), 0, (1, 8, 8)).ravel()
    # Standard errors for n = 32,000: mean 0.0056, variance 0.0079, fourth moment 0.055.
    assert noise.mean() == pytest.approx(0, abs=0.022)
    assert noise.var() == pytest.approx(1, abs=0.032)
    assert (noise**4).mean() == pytest.approx(3, abs=0.22)


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (10, 10), (7, 20), (160, 16)])
def test_every_image_comes_once_per_permutation_and_batches_go_on_across_its_end(count, batch):
    steps = 3 * count  # a whole number of permutations
    row = np.concatenate([batch_indices(count, batch, 0, "s", step) for step in range(steps)])
    assert len(row) == steps * batch
    permutations = row.reshape(-1, count)
    np.testing.assert_array_equal(np.sort(permutations), np.tile(np.arange(count), (3 * batch, 1)))
    assert len({tuple(p) for p in permutations.tolist()}) > 1


def test_order_differs_by_seed_and_stream():
    orders = {tuple(batch_indices(50, 50, seed, s, 0).tolist()) for seed in range(5) for s in ("a", "b")}
    assert len(orders) == 10


def test_any_step_can_be_drawn_without_the_ones_before():
    late = batch_indices(97, 16, 0, "s", 1234)
    for step in (3, 900):
        batch_indices(97, 16, 0, "s", step)
    np.testing.assert_array_equal(batch_indices(97, 16, 0, "s", 1234), late)


@pytest.fixture
def numbered():
    """Forty images that carry their number in every pixel but the first column, which is 255."""
    pixels = np.tile(np.arange(40, dtype=np.uint8)[:, None, None, None], (1, 4, 4, 1))
    pixels[:, :, 0] = 255
    return pixels


def test_batches_are_scaled_to_minus_one_and_one_and_unflipped(numbered):
    images = Images(Items((1, 4, 4)), numbered)
    batch = images.batch(images.draw(8, 0, "s", 0), CPU).x0
    assert batch.shape == (8, 1, 4, 4)
    assert (batch[..., 0] == 1).all()
    expected = batch_indices(40, 8, 0, "s", 0) / 127.5 - 1
    np.testing.assert_allclose(batch[:, 0, 0, 1], expected, atol=1e-6)


def test_flips_mirror_about_half_of_the_images_and_spare_the_data(numbered):
    original = numbered.copy()
    images = Images(Items((1, 4, 4)), numbered, flip=True)
    batch = np.concatenate([images.batch(images.draw(40, 0, "s", step), CPU).x0 for step in range(10)])
    right = (batch[:, 0, :, -1] == 1).all(axis=1)
    left = (batch[:, 0, :, 0] == 1).all(axis=1)
    assert (left ^ right).all()
    assert 0.4 < right.mean() < 0.6  # 400 coins: standard deviation 0.025
    np.testing.assert_array_equal(numbered, original)


def test_labels_go_with_their_images_and_classes_take_turns_in_samples(numbered):
    images = Images(Items((1, 4, 4), classes=7), numbered, np.arange(40) % 7, flip=True)
    batch = images.batch(images.draw(8, 0, "s", 0), CPU)
    numbers = ((batch.x0[:, 0, 0, 1] + 1) * 127.5).round().long()  # neither edge of a mirrored image
    assert torch.equal(batch.cond.label, numbers % 7)
    assert np.bincount(conditions(images.items, None, 0, range(700)).label).tolist() == [100] * 7
    assert conditions(images.items, None, 3, [9, 2]).label.tolist() == [2, 2]  # a function of the number


def test_labels_that_training_cannot_be_told_are_refused_in_one_line(workspace, vary):
    told = Images.of(vary({"dataset.classes": 10, "dataset.subset": 100}))
    truth = np.load(workspace / "resources/data/digits/labels.npy")
    np.testing.assert_array_equal(told.labels, truth[:100])
    assert Images.of(vary({})).labels is None
    with pytest.raises(UserError, match=r"dataset.classes is 9, but digits holds the label 9, .* 0 to 8$"):
        Images.of(vary({"dataset.classes": 9}))
    np.save(workspace / "resources/data/digits/labels.npy", truth[:0])
    with pytest.raises(UserError, match=r"dataset.classes is 10, but digits has no labels; set it to null"):
        Images.of(vary({"dataset.classes": 10}))


def test_a_subset_is_respected(workspace, vary):
    images = Images.of(vary({"dataset.subset": 100}))
    assert len(images) == 100
    whole = np.load(workspace / "resources/data/digits/images.npy")
    np.testing.assert_array_equal(images.rows, whole[:100])
