"""A small classifier trained on the data's own labels: features where Inception doesn't fit.

Distances in its features are called "classifier Fréchet distance", never FID.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebdiff.data.dataset import open_labels, open_pixels, to_float
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.records import Work
from ebdiff.nets import store
from ebdiff.system.draws import generator
from ebdiff.system.errors import UserError
from ebdiff.system.files import write_json

FEATURES, EPOCHS, BATCH, RATE = 64, 60, 64, 2e-3
HELD_OUT = 0.25  # share of the images whose labels training never sees
MOST = 40_000  # images to train on: enough for features, an hour on a CPU
SMALL = 32  # pixels, up to which images are taken as they are
LARGE = 315  # pixels of those that cost as much as any larger image, by multiplications
BLOCK = 2048 * SMALL**2  # pixels per call outside training, so that memory stays bounded


class Classifier(nn.Module):
    """Two convolutions, a 64-d feature layer and a linear head. Input in [-1, 1], any size >= 4.

    Images of more than 32 pixels are averaged to at most 64, and pooled fourfold between the convolutions:
    strokes of a 256-pixel drawing stay visible, their larger shapes come into view, and the cost stays small.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.features = nn.Linear(64 * 16, FEATURES)
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 64) and logits (B, classes)."""
        if (side := x.shape[-1]) > SMALL:
            x = F.adaptive_avg_pool2d(x, min(side, 2 * SMALL))
        h = F.relu(self.conv1(x))
        if side > SMALL:
            h = F.max_pool2d(h, 4)
        h = F.relu(self.conv2(h))
        h = F.adaptive_avg_pool2d(h, 4).flatten(1)
        h = F.relu(self.features(h))
        return h, self.head(h)

    @torch.inference_mode()
    def extract(self, pixels: np.ndarray) -> np.ndarray:
        """Features (B, 64) float32 of uint8 images (B, H, W, C)."""
        return self(to_float(torch.tensor(pixels)))[0].numpy()

    @torch.inference_mode()
    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Class probabilities (N, classes) of features (N, 64)."""
        return self.head(torch.tensor(features)).softmax(dim=1).numpy()


def train_classifier(experiment: Experiment) -> float:
    """Train on the dataset's images and labels (verb `train-classifier`); see `fit`."""
    began, dataset = time.perf_counter(), experiment.dataset.name
    work = Work(experiment, "train-classifier")
    accuracy = fit(open_pixels(dataset), open_labels(dataset), work.path(layout.CLASSIFIER))
    entry = {"accuracy": accuracy, "seconds": round(time.perf_counter() - began, 3)}
    write_json(work.path(layout.CLASSIFIER_LEDGER), entry)
    work.end()
    return accuracy


def fit(pixels: np.ndarray, labels: np.ndarray, path: Path) -> float:
    """Train on three quarters of images, uint8 (N, H, W, C), with labels, int64 (N,), deterministically, and
    store it at a path, with accuracy and sizes.

    Returns:
        accuracy on the held-out quarter.

    Raises:
        UserError: the dataset has no labels.
    """
    if len(labels) != len(pixels):
        raise UserError(f"{path}: the data has no labels; set evaluation.protocols to legacy_pytorch")
    order = generator(0, "classifier/split").permutation(len(pixels))
    held = int(len(pixels) * HELD_OUT)
    test, train = order[:held], order[held : held + MOST]
    network = Classifier(pixels.shape[3], int(labels.max()) + 1)
    store.initialise(network, 0, "classifier")
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, weight_decay=1e-4)
    for epoch in range(EPOCHS):
        shuffled = generator(0, "classifier/order", epoch).permutation(train)
        for first in range(0, len(shuffled), BATCH):
            batch = shuffled[first : first + BATCH]
            logits = network(to_float(torch.tensor(pixels[batch])))[1]
            loss = F.cross_entropy(logits, torch.from_numpy(labels[batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    block = max(1, BLOCK // (pixels.shape[1] * pixels.shape[2]))

    def features(rows: np.ndarray) -> np.ndarray:
        parts = (pixels[rows[first : first + block]] for first in range(0, len(rows), block))
        return np.concatenate(list(map(network.extract, parts)))

    with torch.inference_mode():
        # Features of mean square 1 on real images, and the head inversely: no logit changes (ReLU is
        # homogeneous), but distances no longer grow with training.
        scale = torch.from_numpy(features(train)).square().mean().sqrt()
        network.features.weight /= scale
        network.features.bias /= scale
        network.head.weight *= scale
    guesses = network.probabilities(features(test)).argmax(axis=1)
    accuracy = float(torch.from_numpy(guesses == labels[test]).float().mean())
    story = {"accuracy": accuracy, "channels": pixels.shape[3], "classes": int(labels.max()) + 1}
    store.write(path, network.state_dict(), {"story": story})
    return accuracy


def load_classifier(path: Path) -> tuple[Classifier, float]:
    """The stored classifier in eval mode, and its held-out accuracy."""
    tensors, told = store.read(path)
    story = told["story"]
    network = Classifier(story["channels"], story["classes"])
    network.load_state_dict(tensors)
    return network.eval(), story["accuracy"]
