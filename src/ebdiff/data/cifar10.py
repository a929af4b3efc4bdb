"""CIFAR-10's training and test split: the official binary archive, or parquet files.

The archive's python version holds pickles and is refused, as is whatever else isn't CIFAR-10 (`UserError`).
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ebdiff.data.archives import Collection, fetch, open_path
from ebdiff.data.images import Item
from ebdiff.experiment import layout
from ebdiff.system.errors import UserError

ARCHIVE = "cifar-10-binary.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
PYTHON_MD5 = "c58f30108f718f92721af3b95e74349a"  # cifar-10-python.tar.gz
BATCHES = {
    "train": [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)],
    "test": ["cifar-10-batches-bin/test_batch.bin"],
}
COUNT = {"train": 50_000, "test": 10_000}
STORY = {
    "title": "CIFAR-10, training split",
    "origin": "A. Krizhevsky, Learning multiple layers of features from tiny images, 2009",
    "licence": "no licence stated by its author",
}


def wrong(path: Path) -> str | None:
    """What is wrong with an archive, in words, if it hasn't the published checksum."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found == PYTHON_MD5:
        return f"the python archive holds pickles, which are never loaded; take {URL} instead"
    return None if found == MD5 else f"wrong checksum: md5 {found}, expected {MD5}; delete it and take {URL}"


def binary(path: Path, split: str = "train") -> Collection:
    """The archive's batches of a split: 10,000 records each of a label byte and 3 x 32 x 32 bytes."""
    if told := wrong(path):
        raise UserError(f"{path}: {told}")

    def items() -> Iterator[Item]:
        try:
            with tarfile.open(path, "r:gz") as archive:
                for name in BATCHES[split]:
                    data = np.frombuffer(archive.extractfile(name).read(), np.uint8).reshape(-1, 1 + 3072)
                    images = data[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                    for i, (image, label) in enumerate(zip(images, data[:, 0], strict=True)):
                        yield Item(f"{path}:{name}:{i}", image.copy, int(label))
        except (tarfile.TarError, KeyError, ValueError, OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: not the archive of {URL} ({error}); delete it and take that") from None

    return Collection(str(path), COUNT[split], items, STORY)


def cifar10(path: Path | None, split: str = "train") -> Collection:
    """The 50,000 training or 10,000 test images, from a local copy or the network."""
    if path is None:
        path = layout.path(layout.DOWNLOAD, file=ARCHIVE)
        fetch(URL, path, wrong)
    if path.is_file() and path.name.endswith((".tar.gz", ".tgz")):
        return binary(path, split)
    found = open_path(path, split)
    if found.count != COUNT[split]:
        raise UserError(
            f"{path}: {found.count:,} images, but CIFAR-10's {split} split has {COUNT[split]:,}; "
            "give all of it"
        )
    return replace(found, story=STORY)
