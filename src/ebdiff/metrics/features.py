"""Features: a protocol's network, and its values for many images without holding them in memory."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from ebdiff.data.images import Files
from ebdiff.experiment import layout
from ebdiff.experiment.schema import Evaluation
from ebdiff.metrics import classifier, inception
from ebdiff.system.devices import device_name
from ebdiff.system.files import naming, sha256
from ebdiff.system.ledger import versions
from ebdiff.system.progress import progress

NAMES = {"classifier": "classifier Fréchet distance", "legacy_pytorch": "FID", "clean": "clean FID"}


@dataclass(frozen=True)
class Extractor:
    """How a protocol turns images into features."""

    protocol: str
    features: Callable[[np.ndarray], np.ndarray]  # uint8 (B, H, W, C) -> float32 (B, dimension)
    dimension: int
    batch: int  # images per call
    noise: int  # images that the ceiling is taken from
    mode: str  # what happens to an image before the network, in words
    sha256: str  # of the network's weights file
    device: torch.device

    @classmethod
    def open(cls, protocol: str, dataset: str, settings: Evaluation, device: torch.device) -> Extractor:
        """Load the network of a protocol; UserError if its weights are missing or not the expected ones."""
        if protocol == "classifier":
            path = layout.path(layout.CLASSIFIER, dataset=dataset)
            network, _ = classifier.load_classifier(path)
            cpu = torch.device("cpu")  # small enough, and the same numbers on every machine
            mode = "images in [-1, 1], those of more than 64 pixels averaged to 64"
            size = classifier.FEATURES
            return cls(protocol, network.extract, size, 500, 2000, mode, sha256(path), cpu)
        network = inception.Inception(protocol, settings.weights, device)
        batch = min(settings.batch, inception.CPU_BATCH) if device.type == "cpu" else settings.batch
        mode = inception.MODES[protocol]
        return cls(protocol, network, inception.DIMENSION, batch, 256, mode, network.sha256, device)

    def batches(
        self, pixels: np.ndarray | Files, what: str, order: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """Features (b, dimension) of images, all or in an order, batch by batch; `what` says whose."""
        order = np.arange(len(pixels)) if order is None else order
        with progress(total=len(order), desc=f"{self.protocol}: {what}", unit=" images") as bar:
            for first in range(0, len(order), self.batch):
                rows = order[first : first + self.batch]
                yield self.features(pixels[rows])
                bar.update(len(rows))

    @contextmanager
    def whole(self, pixels: np.ndarray | Files, what: str, folder: Path) -> Iterator[np.ndarray]:
        """Features (n, dimension) of all images, in a nameless file of a folder."""
        with scratch(folder, len(pixels), self.dimension) as found:
            first = 0
            for part in self.batches(pixels, what):
                found[first : first + len(part)] = part
                first += len(part)
            yield found

    def story(self) -> dict[str, object]:
        """What stands beside every number: network, mode, device and versions."""
        used = () if self.protocol == "classifier" else ("clean-fid", "pillow")
        return {
            "distance_name": NAMES[self.protocol],
            "mode": self.mode,
            "weights_sha256": self.sha256,
            "device": device_name(self.device),
            "versions": {**versions(), **{name: metadata.version(name) for name in used}},
        }


@contextmanager
def scratch(folder: Path, *shape: int, dtype: type = np.float32) -> Iterator[np.ndarray]:
    """An array of a shape in a nameless temporary file of a folder: disk, not memory."""
    folder.mkdir(parents=True, exist_ok=True)
    with naming(folder), tempfile.TemporaryFile(dir=folder) as file:
        # A full disk is an error here, but kills a process that touches a page later.
        os.posix_fallocate(file.fileno(), 0, math.prod(shape) * np.dtype(dtype).itemsize)
        yield np.memmap(file, dtype, "w+", shape=shape)
