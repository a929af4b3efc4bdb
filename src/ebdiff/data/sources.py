"""Where images come from. Each source returns uint8 images and labels; `prepare` stores them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ebdiff.config import Dataset, Experiment
from ebdiff.digests import data_digest
from ebdiff.errors import UserError
from ebdiff.files import replacing, sha256, write_json


def bundled_digits() -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """scikit-learn's copy of the UCI test set of handwritten digits.

    Returns:
        images (1797, 8, 8, 1) uint8 in 0..255, labels (1797,) int64, and their story.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The file's grey levels are 0..16.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    story = {
        "title": "Optical recognition of handwritten digits (test part)",
        "origin": "UCI Machine Learning Repository, as bundled with scikit-learn",
        "licence": "CC BY 4.0",
    }
    return images, digits.target.astype(np.int64), story


SOURCES = {"bundled-digits": bundled_digits}


def prepare(experiment: Experiment, images: Path, labels: Path, manifest: Path) -> dict:
    """Read the experiment's source and write images, labels and a manifest.

    Raises:
        UserError: the images' size doesn't fit the network.
    """
    dataset: Dataset = experiment.dataset
    pixels, classes, story = SOURCES[dataset.source]()
    expected = (experiment.network.image_size, experiment.network.image_size, experiment.network.channels)
    if pixels.shape[1:] != expected:
        raise UserError(
            f"dataset {dataset.name}: images are {pixels.shape[1:]}, the network expects {expected}; "
            "change network.image_size or network.channels"
        )
    for path, array in ((images, pixels), (labels, classes)):
        with replacing(path) as temporary:
            np.save(temporary, array)
    entry = {
        "dataset": dataset.name,
        "source": dataset.source,
        **story,
        "count": len(pixels),
        "shape": list(pixels.shape[1:]),
        "classes": int(classes.max()) + 1 if len(classes) else 0,
        "sha256": sha256(images),
        "digest": data_digest(experiment),
    }
    write_json(manifest, entry)
    return entry
