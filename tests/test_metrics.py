import json

import numpy as np
import pytest

from ebdiff import layout
from ebdiff.metrics import classifier, evaluate
from ebdiff.metrics.frechet import Gaussian, frechet_distance
from ebdiff.metrics.kid import kernel_distance


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


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((50, 4)), rng.standard_normal((33, 4))
    whole = kernel_distance(x, y)
    monkeypatch.setattr("ebdiff.metrics.kid.BLOCK", 7)
    assert kernel_distance(x, y) == pytest.approx(whole, rel=1e-9)


def test_kid_of_equal_distributions_is_unbiased_and_of_others_is_not():
    rng = np.random.default_rng(2)
    found = [kernel_distance(*rng.standard_normal((2, 60, 6))) for _ in range(200)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error
    assert min(found) < 0
    apart = kernel_distance(rng.standard_normal((60, 6)), 1 + rng.standard_normal((60, 6)))
    assert apart > 10 * np.std(found)


# --- the classifier and whole evaluations -------------------------------------------------------------------


@pytest.fixture
def pixels(workspace):
    return np.load("resources/data/digits/images.npy")[:300], np.load("resources/data/digits/labels.npy")[
        :300
    ]


def test_the_classifier_is_deterministic_and_learns(pixels, workspace):
    accuracies = [classifier.train_classifier(*pixels, workspace / f"{i}.safetensors") for i in range(2)]
    assert accuracies[0] == accuracies[1] > 0.8
    assert (workspace / "0.safetensors").read_bytes() == (workspace / "1.safetensors").read_bytes()
    network, accuracy = classifier.load_classifier(workspace / "0.safetensors")
    assert accuracy == accuracies[0]
    features, probabilities = classifier.classify(network, pixels[0][:17], batch=5)
    assert (features.shape, probabilities.shape) == ((17, 64), (17, 10))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    whole = classifier.classify(network, pixels[0][:17])[0]
    np.testing.assert_allclose(features, whole, atol=1e-4)


def test_data_without_labels_is_refused(pixels, workspace):
    from ebdiff.errors import UserError

    with pytest.raises(UserError, match="no labels"):
        classifier.train_classifier(pixels[0], np.zeros(0, np.int64), workspace / "c.safetensors")
    assert not (workspace / "c.safetensors").exists()


def test_an_evaluation_stands_between_floor_and_ceiling(pixels, workspace, tiny):
    images = np.load("resources/data/digits/images.npy")
    classifier.train_classifier(*pixels, layout.path(layout.CLASSIFIER, dataset="digits"))
    evaluate.reference_stats(tiny)
    rng = np.random.default_rng(0)
    samples = {
        "unpruned": images[rng.permutation(1797)[:400]],
        "eb-50": rng.integers(0, 256, (300, 8, 8, 1), np.uint8),
        "ta-eb": images[np.flatnonzero(np.load("resources/data/digits/labels.npy") == 3)],
    }
    found = {}
    for run, drawn in samples.items():
        path = layout.path(layout.SAMPLES, experiment="tiny", seed=0, run=run)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, drawn)
        found[run] = evaluate.evaluate(tiny, run, 0)
        stored = json.loads(layout.path(layout.METRICS, experiment="tiny", seed=0, run=run).read_text())
        assert stored == found[run]
    real, noise, threes = found["unpruned"], found["eb-50"], found["ta-eb"]
    assert (real["images"], noise["images"], real["reference_images"]) == (400, 300, 1797)
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
