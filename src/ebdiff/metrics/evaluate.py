"""Reference statistics and the metrics of a run (verbs `reference-stats` and `fid`)."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ebdiff import layout
from ebdiff.config import Experiment
from ebdiff.data.store import open_pixels
from ebdiff.digests import data_digest
from ebdiff.draws import generator
from ebdiff.files import load_memmap, read_arrays, write_arrays, write_json
from ebdiff.metrics.classifier import classify, load_classifier
from ebdiff.metrics.frechet import Gaussian, frechet_distance
from ebdiff.metrics.kid import kernel_distance

CONFIDENT = 0.9  # a sample the classifier gives at least this probability looks like a digit
DISTANCE_NAMES = {"classifier": "classifier Fréchet distance"}


def _distances(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    return {
        "fd": frechet_distance(Gaussian.fit(a), Gaussian.fit(b)),
        "kid": kernel_distance(a, b),
    }


def reference_stats(experiment: Experiment) -> None:
    """Features of the real images, once per dataset and protocol, with the scale's two ends.

    The floor is half of the data against the other half; the ceiling is uniform noise against all.
    """
    dataset, protocol = experiment.dataset.name, experiment.evaluation.protocol
    pixels, _ = open_pixels(dataset)
    network, accuracy = load_classifier(layout.path(layout.CLASSIFIER, dataset=dataset))
    features, probabilities = classify(network, pixels)
    order = generator(0, "reference/halves").permutation(len(pixels))
    half = len(pixels) // 2
    rng = generator(0, "reference/noise")
    noise = rng.integers(0, 256, (min(len(pixels), 2000), *pixels.shape[1:]), np.uint8)
    floor = _distances(features[order[:half]], features[order[half:]])
    ceiling = _distances(classify(network, noise)[0], features)
    write_arrays(
        layout.path(layout.REFERENCE, dataset=dataset, protocol=protocol),
        features=features,
        confident=np.array((probabilities.max(axis=1) > CONFIDENT).mean()),
        accuracy=np.array(accuracy),
        floor=np.array([floor["fd"], floor["kid"]]),
        ceiling=np.array([ceiling["fd"], ceiling["kid"]]),
        digest=np.array(data_digest(experiment)),
    )


def evaluate(experiment: Experiment, run: str, seed: int) -> dict[str, Any]:
    """Distances of a run's samples to the real images, and what the classifier makes of them."""
    where = dict(experiment=experiment.name, seed=seed, run=run)
    dataset, protocol = experiment.dataset.name, experiment.evaluation.protocol
    began = time.perf_counter()
    pixels = load_memmap(layout.path(layout.SAMPLES, **where))
    network, _ = load_classifier(layout.path(layout.CLASSIFIER, dataset=dataset))
    real = read_arrays(layout.path(layout.REFERENCE, dataset=dataset, protocol=protocol))
    features, probabilities = classify(network, pixels)
    guesses = probabilities.argmax(axis=1)
    metrics = {
        "run": run,
        "seed": seed,
        "protocol": protocol,
        "distance_name": DISTANCE_NAMES[protocol],
        **_distances(features, real["features"]),
        "images": len(pixels),
        "reference_images": len(real["features"]),
        "floor": dict(zip(("fd", "kid"), real["floor"].tolist(), strict=True)),
        "ceiling": dict(zip(("fd", "kid"), real["ceiling"].tolist(), strict=True)),
        "confident": float((probabilities.max(axis=1) > CONFIDENT).mean()),
        "real_confident": float(real["confident"]),
        "class_shares": (np.bincount(guesses, minlength=probabilities.shape[1]) / len(guesses)).tolist(),
        "classifier_accuracy": float(real["accuracy"]),
        "seconds": round(time.perf_counter() - began, 3),
    }
    write_json(layout.path(layout.METRICS, **where), metrics)
    return metrics
