import tracemalloc

import numpy as np
import pytest
from conftest import vouch

from ebdiff.data import sources
from ebdiff.experiment import layout
from ebdiff.metrics import classifier, distances, evaluate
from ebdiff.metrics.distances import Gaussian, Real, frechet_distance, precision_recall
from ebdiff.metrics.features import scratch
from ebdiff.system import files
from ebdiff.system.draws import generator
from ebdiff.system.errors import UserError


def gaussian(mean, covariance):
    return Gaussian(np.asarray(mean, float), np.asarray(covariance, float), 1000)


def random_covariance(rng, d):
    root = rng.standard_normal((d, d))
    return root @ root.T / d


# --- Fréchet distance -------------------------------------------------------------------------------------


def test_statistics_are_mean_and_unbiased_covariance():
    features = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    fit = Gaussian.fit(features)
    mean = features.astype(float).sum(axis=0) / 50
    centred = features.astype(float) - mean
    np.testing.assert_allclose(fit.mean, mean)
    np.testing.assert_allclose(fit.covariance, centred.T @ centred / 49)
    assert fit.count == 50


@pytest.mark.parametrize("block", [1, 2, 7, 49, 50, 64])
def test_streamed_statistics_use_every_row_whatever_the_block(block):
    features = 1e4 + np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    fit = Gaussian.fit(features, block)
    assert fit.count == 50
    np.testing.assert_allclose(fit.mean, np.mean(features, axis=0, dtype=np.float64), rtol=1e-12)
    expected = np.cov(features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(fit.covariance, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1])
def test_one_image_has_no_distance(count):
    with pytest.raises(UserError, match="at least 2 images"):
        Gaussian.fit(np.ones((count, 4), np.float32))


def test_memory_holds_the_statistics_and_a_block_never_the_features():
    d, block, count = 64, 200, 500
    rng = np.random.default_rng(0)

    class Features:
        def __len__(self):
            return block * count

        def __getitem__(self, rows):
            return rng.standard_normal((rows.stop - rows.start, d), np.float32)

    tracemalloc.start()
    fit = Gaussian.fit(Features(), block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert fit.count == block * count
    assert peak < 8 * (6 * d * d + 5 * block * d) < count * block * d * 4 / 8


def test_features_too_many_for_memory_lie_in_a_nameless_file(tmp_path):
    tracemalloc.start()
    with scratch(tmp_path / "new", 20_000, 256) as features:
        features[:] = 1
        features[::2] = 3
        fit, peak = Gaussian.fit(features), tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (fit.mean == 2).all()
    assert peak < features.nbytes / 2
    assert list((tmp_path / "new").iterdir()) == []


def test_a_set_is_at_no_distance_from_itself():
    fit = Gaussian.fit(np.random.default_rng(0).standard_normal((300, 16)))
    assert frechet_distance(fit, fit) == pytest.approx(0, abs=1e-9)


def test_equal_covariances_leave_the_squared_distance_of_the_means():
    rng = np.random.default_rng(1)
    covariance = random_covariance(rng, 8)
    shift = rng.standard_normal(8)
    found = frechet_distance(gaussian(np.zeros(8), covariance), gaussian(shift, covariance))
    assert found == pytest.approx((shift**2).sum(), rel=1e-9)


def test_diagonal_covariances_have_a_closed_form():
    rng = np.random.default_rng(2)
    a, b = rng.uniform(0.1, 3, (2, 12))
    found = frechet_distance(gaussian(np.zeros(12), np.diag(a)), gaussian(np.ones(12), np.diag(b)))
    assert found == pytest.approx(12 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-9)


def test_it_matches_the_matrix_root_and_is_symmetric():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(3)
    d = 24
    x = rng.standard_normal((6 * d, d)) @ random_covariance(rng, d)
    y = rng.standard_normal((4 * d, d)) + 0.1
    a, b = Gaussian.fit(x), Gaussian.fit(y)
    cross = np.trace(sqrtm(a.covariance @ b.covariance).real)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_singular_covariances_are_no_trouble():
    flat = np.diag([1.0, 0.0, 4.0])
    assert frechet_distance(gaussian(np.zeros(3), flat), gaussian(np.zeros(3), flat)) == pytest.approx(0)
    other = np.diag([0.0, 9.0, 4.0])
    assert frechet_distance(gaussian(np.zeros(3), flat), gaussian(np.zeros(3), other)) == pytest.approx(10)


# --- kernel distance ----------------------------------------------------------------------------------------


def kernel_distance(x, y):
    return Real.of(y).distances(x)["kid"]


def literal_kid(x, y):
    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    across = sum(k(a, b) for a in x for b in y) / (n * m)
    return within_x + within_y - 2 * across


def test_kid_is_the_literal_double_loop():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((13, 5)), 0.5 + rng.standard_normal((9, 5))
    assert kernel_distance(x, y) == pytest.approx(literal_kid(x.tolist(), y.tolist()), rel=1e-9)
    assert kernel_distance(x.astype(np.float32), y) == pytest.approx(kernel_distance(x, y), rel=1e-4)


def test_kid_is_that_of_a_second_library():
    from sklearn.metrics.pairwise import polynomial_kernel

    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((160, 32)), 0.2 + 1.1 * rng.standard_normal((130, 32))

    def mean_without_diagonal(k):
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    xx, yy, xy = (
        polynomial_kernel(a, b, degree=3, gamma=1 / 32, coef0=1) for a, b in ((x, x), (y, y), (x, y))
    )
    expected = mean_without_diagonal(xx) + mean_without_diagonal(yy) - 2 * xy.mean()
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((50, 4)), rng.standard_normal((33, 4))
    whole = kernel_distance(x, y)
    monkeypatch.setattr("ebdiff.metrics.distances.BLOCK", 7)
    assert kernel_distance(x, y) == pytest.approx(whole, rel=1e-9)


def test_kid_of_equal_distributions_is_unbiased_and_of_others_is_not():
    rng = np.random.default_rng(2)
    found = [kernel_distance(*rng.standard_normal((2, 60, 6))) for _ in range(200)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error
    assert min(found) < 0
    apart = kernel_distance(rng.standard_normal((60, 6)), 1 + rng.standard_normal((60, 6)))
    assert apart > 10 * np.std(found)


# --- precision and recall -----------------------------------------------------------------------------------


def literal_share(points, centres, k=3):
    radii = [sorted(np.linalg.norm(c - o) for j, o in enumerate(centres) if j != i)[k - 1]
             for i, c in enumerate(centres)]  # fmt: skip
    inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
    return sum(inside) / len(points)


@pytest.mark.parametrize("block", [2048, 8])
def test_precision_and_recall_are_the_literal_double_loop(block, monkeypatch):
    monkeypatch.setattr("ebdiff.metrics.distances.BLOCK", block)
    rng = np.random.default_rng(5)
    real, generated = rng.standard_normal((41, 3)), 0.8 + 0.5 * rng.standard_normal((29, 3))
    precision, recall = precision_recall(generated, real)
    assert precision == literal_share(generated, real)
    assert recall == literal_share(real, generated)
    assert 0 < recall < precision < 1


def test_precision_and_recall_at_their_ends():
    rng = np.random.default_rng(6)
    real = rng.standard_normal((60, 4)).astype(np.float32)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 100, real) == (0, 0)
    with pytest.raises(UserError, match="more than 3 images"):
        precision_recall(real[:3], real)


# --- the classifier and whole evaluations -------------------------------------------------------------------


@pytest.fixture
def pixels(workspace):
    return np.load("resources/data/digits/images.npy")[:300], np.load("resources/data/digits/labels.npy")[
        :300
    ]


@pytest.mark.slow
def test_the_classifier_is_deterministic_and_learns(pixels, workspace):
    accuracies = [classifier.fit(*pixels, workspace / f"{i}.safetensors") for i in range(2)]
    assert accuracies[0] == accuracies[1] > 0.8
    assert (workspace / "0.safetensors").read_bytes() == (workspace / "1.safetensors").read_bytes()
    network, accuracy = classifier.load_classifier(workspace / "0.safetensors")
    assert accuracy == accuracies[0]
    features = network.extract(pixels[0][:17])
    probabilities = network.probabilities(features)
    assert (features.shape, probabilities.shape) == ((17, 64), (17, 10))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(features[5:10], network.extract(pixels[0][5:10]), atol=1e-4)


def test_data_without_labels_is_refused(pixels, workspace):
    with pytest.raises(UserError, match="no labels"):
        classifier.fit(pixels[0], np.zeros(0, np.int64), workspace / "c.safetensors")
    assert not (workspace / "c.safetensors").exists()


def put_samples(experiment, run, drawn):
    path = layout.path(layout.SAMPLES, experiment="tiny", seed=0, run=run)
    files.write_array(path, drawn)
    files.write_json(path.with_name("ledger.json"), {})
    vouch(experiment, "sample", run=run, seed=0)


def put_classifier(experiment, pixels, labels):
    path = layout.path(layout.CLASSIFIER, dataset="digits")
    files.write_json(path.with_suffix(".json"), {"accuracy": classifier.fit(pixels, labels, path)})
    vouch(experiment, "train-classifier")


@pytest.mark.slow
def test_an_evaluation_stands_between_floor_and_ceiling(pixels, workspace, tiny):
    images = np.load("resources/data/digits/images.npy")
    put_classifier(tiny, *pixels)
    evaluate.reference_stats(tiny, "classifier")
    rng = np.random.default_rng(0)
    samples = {
        "unpruned": images[rng.permutation(1437)[:400]],
        "eb-50": rng.integers(0, 256, (300, 8, 8, 1), np.uint8),
        "ta-eb": images[np.flatnonzero(np.load("resources/data/digits/labels.npy") == 3)],
    }
    found = {}
    for run, drawn in samples.items():
        put_samples(tiny, run, drawn)
        found[run] = evaluate.evaluate(tiny, run, 0)
        stored = files.read_json(layout.path(layout.METRICS, experiment="tiny", seed=0, run=run))
        assert stored == found[run]
    real, noise, threes = found["unpruned"], found["eb-50"], found["ta-eb"]
    assert (real["images"], noise["images"], real["reference_images"]) == (400, 300, 1437)
    assert real["distance_name"] == "classifier Fréchet distance"
    assert 0 < real["floor"]["fd"] < 0.1 * real["ceiling"]["fd"]
    assert real["fd"] < 0.1 * real["ceiling"]["fd"]
    assert noise["fd"] == pytest.approx(noise["ceiling"]["fd"], rel=0.2)
    assert real["floor"]["kid"] < real["ceiling"]["kid"]
    assert sum(real["class_shares"]) == pytest.approx(1)
    assert min(real["class_shares"]) > 0.05
    assert threes["class_shares"][3] > 0.7
    assert threes["fd"] > 5 * real["fd"]
    assert real["confident"] == pytest.approx(real["real_confident"], abs=0.08)
    entry = real["protocols"]["classifier"]
    assert {key: real[key] for key in evaluate.FLAT} == {key: entry[key] for key in evaluate.FLAT}
    assert (real["ill_conditioned"], entry["split"]) == (False, "all images of digits")
    assert entry["precision"] is entry["recall"] is None
    assert len(entry["weights_sha256"]) == 64
    assert entry["versions"]["torch"]
    assert real["floor"]["images"] == 360
    assert real["memorisation"] is None  # training sees a part of them


@pytest.fixture
def split(workspace, vary):
    """Digits of which 360 are held out, with a classifier and reference statistics."""
    experiment = vary({"dataset.subset": ...})
    folder = workspace / "resources/data/digits"
    images, unseen = np.load(folder / "images.npy"), np.load(folder / "held_out.npy")
    put_classifier(experiment, images[:300], np.load(folder / "labels.npy")[:300])
    evaluate.reference_stats(experiment, "classifier")
    return experiment, images, unseen


def plain_fd(x, y):
    """The Fréchet distance of two sets of rows, by the eigenvalues of the product of their covariances."""
    (m, c), (n, d) = ((a.mean(0), np.cov(a.T)) for a in (x.astype(float), y.astype(float)))
    roots = np.sqrt(np.linalg.eigvals(c @ d).real.clip(0))
    return np.square(m - n).sum() + np.trace(c + d) - 2 * roots.sum()


@pytest.mark.parametrize("count", [200, 500])
def test_floor_and_samples_are_compared_with_equally_many_images(split, monkeypatch, count):
    monkeypatch.setattr(classifier, "EPOCHS", 6)
    experiment, images, unseen = split
    samples = np.random.default_rng(1).permutation(images)[:count]
    put_samples(experiment, "eb-50", samples)
    found = evaluate.evaluate(experiment, "eb-50", 0)
    network, _ = classifier.load_classifier(layout.path(layout.CLASSIFIER, dataset="digits"))
    n = min(count, 360)
    draws = {200: 4, 360: 3}[n]
    order = generator(0, "reference/floor").permutation(1437)[: draws * n]
    parts = [network.extract(images[rows]) for rows in np.split(order, draws)]
    held = network.extract(unseen[np.sort(generator(0, "reference/held out/floor").permutation(360)[:n])])
    told = {"fd": 0, "kid": 0, "images": n, "draws": draws, "held_out": True}
    for end, side in (("floor", held), ("at_floor", network.extract(samples)[:n])):
        assert found[end] | {"fd": 0, "kid": 0} == told
        assert found[end]["fd"] == pytest.approx(np.mean([plain_fd(side, x) for x in parts]), rel=1e-3)
    assert found["fd"] == pytest.approx(plain_fd(network.extract(samples), network.extract(images)), rel=1e-3)


def test_agreement_is_the_share_of_samples_seen_as_the_class_that_was_asked(workspace, vary, monkeypatch):
    monkeypatch.setattr(classifier, "EPOCHS", 15)
    told = vary({"dataset.classes": 10})
    images, labels = (np.load(f"resources/data/digits/{name}.npy") for name in ("images", "labels"))
    put_classifier(told, images[:800], labels[:800])
    evaluate.reference_stats(told, "classifier")
    real = images[[np.flatnonzero(labels == i % 10)[i // 10] for i in range(200)]]  # 0 to 9 by turns
    for wrong in (0, 50):
        put_samples(told, "eb-50", np.concatenate([real[wrong:], np.roll(real[:wrong], 1, axis=0)]))
        found = evaluate.evaluate(told, "eb-50", 0)
        assert found["agreement"] == pytest.approx((200 - wrong) / 200, abs=0.05)


def test_without_held_out_images_the_floor_is_between_two_halves(workspace, vary, monkeypatch):
    monkeypatch.setattr(classifier, "EPOCHS", 6)
    tiny = vary({"dataset.held_out": 0})
    sources.prepare(tiny)
    images = np.load("resources/data/digits/images.npy")
    pixels = images[:300], np.load("resources/data/digits/labels.npy")[:300]
    put_classifier(tiny, *pixels)
    evaluate.reference_stats(tiny, "classifier")
    put_samples(tiny, "eb-50", images)
    found = evaluate.evaluate(tiny, "eb-50", 0)
    assert (found["floor"]["images"], found["floor"]["held_out"]) == (898, False)
    assert found["memorisation"] is None
    assert 0 < found["floor"]["fd"] < 0.1 * found["ceiling"]["fd"]


def test_copies_of_training_images_are_told_from_new_ones(split):
    experiment, images, unseen = split
    rng = np.random.default_rng(2)
    near = {}
    for run, drawn in (("eb-50", rng.permutation(images)[:400]), ("ta-eb", rng.permutation(unseen))):
        put_samples(experiment, run, drawn)
        near[run] = evaluate.evaluate(experiment, run, 0)["memorisation"]
    assert (near["eb-50"]["nearest"], near["eb-50"]["nearer"]) == (pytest.approx(0, abs=1e-4), 1)
    assert near["ta-eb"]["nearest"] == pytest.approx(near["ta-eb"]["held_out_nearest"])
    assert near["ta-eb"]["nearer"] == pytest.approx(0.05, abs=1 / 360)
    assert near["eb-50"]["images"] == near["ta-eb"]["images"] == 360


def test_the_nearest_row_is_that_of_a_plain_loop():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((7, 4)), rng.standard_normal((9, 4))
    plain = [min(np.sqrt(((a - b) ** 2).sum()) for b in y) for a in x]
    np.testing.assert_allclose(distances.nearest(x, y), plain)


def test_a_reference_of_fewer_images_and_precision_and_recall(pixels, workspace, vary, monkeypatch):
    monkeypatch.setattr(classifier, "EPOCHS", 6)
    fewer = vary({"evaluation": {"reference": 200, "precision_recall": True}})
    put_classifier(fewer, *pixels)
    evaluate.reference_stats(fewer, "classifier", "200")
    put_samples(fewer, "eb-50", pixels[0])
    found = evaluate.evaluate(fewer, "eb-50", 0)
    assert (found["images"], found["reference_images"]) == (300, 200)
    assert found["ill_conditioned"]
    entry = found["protocols"]["classifier"]
    assert entry["split"] == "200 images of digits"
    assert entry["precision"] > 0.8 < entry["recall"]
    assert not list(workspace.rglob(".*"))  # no temporary file is left

    put_classifier(fewer, pixels[0][:200], pixels[1][:200])
    with pytest.raises(UserError, match=r"200\.npz: made from another .*classifier\.safetensors"):
        evaluate.evaluate(fewer, "eb-50", 0)
    evaluate.reference_stats(fewer, "classifier", "200")
    evaluate.evaluate(fewer, "eb-50", 0)


@pytest.mark.parametrize("count", ["2", "5000"])
def test_two_real_images_are_no_reference_nor_more_than_there_are(
    pixels, workspace, tiny, monkeypatch, count
):
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    put_classifier(tiny, *pixels)
    with pytest.raises(UserError, match=f"digits: {int(count):,} images, of 4 to 1,437"):
        evaluate.reference_stats(tiny, "classifier", count)
