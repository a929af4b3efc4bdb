"""From a source to prepared data: `prepare` stores what an experiment's `dataset` names.

Images are decoded by several threads (Pillow lets them run side by side), kept in order and written one
after the other, so that memory is bounded whatever the number of images and the file depends on no timing.
A source or an image that can't be had as the experiment asks for it is a `UserError`.
"""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ebdiff.data import archives, cifar10, encoded
from ebdiff.data.archives import Collection
from ebdiff.data.images import Broken, Item, pixels
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.members import DatasetConfig, ImagesConfig
from ebdiff.experiment.records import Work
from ebdiff.experiment.registry import located
from ebdiff.experiment.schema import FEWEST
from ebdiff.system.ahead import ahead
from ebdiff.system.errors import UserError, printable
from ebdiff.system.files import (
    holding,
    read_json,
    remove_leftovers,
    replacing,
    write_array,
    write_header,
    write_json,
)
from ebdiff.system.progress import progress

CLASSES = 2**31  # that labels may name
NAMED = 5  # broken images named in a message
SAMPLED = 64  # images that tell what one takes


def bundled_digits() -> Collection:
    """scikit-learn's copy of the UCI test set of handwritten digits: 1,797 of 8x8, labelled."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The file's grey levels are 0..16.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]

    def items() -> Iterator[Item]:
        for i, (image, label) in enumerate(zip(images, digits.target, strict=True)):
            yield Item(f"digit {i}", image.copy, int(label))

    story = {
        "title": "Optical recognition of handwritten digits (test part)",
        "origin": "UCI Machine Learning Repository, as bundled with scikit-learn",
        "licence": "CC BY 4.0",
    }
    return Collection("bundled digits", len(images), items, story)


def find(dataset: ImagesConfig, split: str = "train") -> Collection:
    """The images that `dataset` names, of its source's training or test split, not yet read."""
    path = archives.local(dataset)
    if dataset.source == "bundled-digits":
        return bundled_digits()
    if dataset.source == "cifar10":
        return cifar10.cifar10(path, split)
    if path is not None:
        found = archives.open_path(path, split)
    elif dataset.hub:
        found = archives.from_hub(dataset.hub, split)
    else:
        raise UserError(f"dataset {dataset.name}: set dataset.path (folder, zip or parquet) or dataset.hub")
    if found.count < FEWEST:
        raise UserError(
            f"{found.where}: {found.count} images; at least {FEWEST} are needed "
            f"({', '.join(archives.EXTENSIONS)} files, or parquet)"
        )
    return archives.by_folder(found) if dataset.labels == "folders" else found


def divided(dataset: ImagesConfig) -> tuple[Collection, Collection]:
    """The images to train on, and those held out: the source's test split, or a share of each class.

    Which ones is a function of their number, labels and the share alone.
    """
    found = find(dataset)
    if dataset.held_out == "test":
        unseen = find(dataset, "test")
        # Labels of theirs play no part; of many test splits they are hidden, -1.
        return found, replace(unseen, items=lambda: (replace(i, label=None) for i in unseen.items()))
    if not dataset.held_out:
        return found, replace(found, count=0, items=lambda: iter(()))
    if (few := dataset.kept_out(found.count)) < FEWEST:
        raise UserError(
            f"dataset.held_out {dataset.held_out:g} of {found.where}: {few} images are too few; raise it"
        )
    labels = [item.label for item in found.items()]
    try:
        from sklearn.model_selection import train_test_split

        kept, out = train_test_split(
            np.arange(len(labels)),
            test_size=dataset.held_out,
            stratify=None if None in labels else labels,
            random_state=0,
        )
    except ValueError as error:  # too few of a class, in the words of scikit-learn
        raise UserError(
            f"dataset.held_out {dataset.held_out:g} of {found.where}: can't be divided by class ({error}); "
            "change it"
        ) from None
    return _some(found, kept), _some(found, out)


def _some(found: Collection, rows: np.ndarray) -> Collection:
    """Those images of a collection, in its order."""
    chosen = frozenset(rows.tolist())

    def items() -> Iterator[Item]:
        return (item for i, item in enumerate(found.items()) if i in chosen)

    return replace(found, count=len(chosen), items=items)


def count(dataset: DatasetConfig) -> int:
    """How many items there are to train on: by the manifest, else at most, by the source."""
    manifest = layout.path(layout.MANIFEST, dataset=dataset.name)
    if manifest.exists():
        return read_json(manifest)["count"]
    if dataset.known_count is not None:
        return dataset.known_count
    try:
        if not (isinstance(dataset, ImagesConfig) and dataset.path):
            raise UserError(f"dataset {dataset.name}: isn't here yet")
        found = find(dataset).count
        return found - dataset.kept_out(found)
    except UserError as error:
        raise UserError(f"{error}; or say how many images there are, with --images") from None


def _decoded(item: Item, dataset: ImagesConfig) -> tuple[Item, bytes | Broken, bool]:
    """An item, what is stored of it, and whether its pixels were resized."""
    read, stays = cache(item.read), dataset.store == "encoded"
    wanted = dataset.image_size, dataset.channels, dataset.crop, dataset.resize
    try:
        found, resized = pixels(replace(item, read=read), *wanted)
    except Broken as error:
        return item, error, False
    return item, encoded.kept(read(), found) if stays else found.tobytes(), resized


def encoded_image(dataset: DatasetConfig, found: Collection | None = None) -> tuple[float, float] | None:
    """Bytes and core seconds of decoding that an image takes which stays encoded, by the first ones.

    Those of `found`, else those prepared or at dataset.path; None where none stay encoded or none are here.
    """
    if not isinstance(dataset, ImagesConfig) or dataset.store != "encoded":
        return None
    path = layout.path(layout.IMAGES, dataset=dataset.name)
    if found is None and path.exists() and isinstance(images := encoded.open_images(path), encoded.Encoded):
        began, number = time.thread_time(), min(SAMPLED, len(images))
        for row in range(number):
            images[row]
        return len(images.content) / len(images), (time.thread_time() - began) / number
    if found is None and dataset.path:
        with suppress(UserError):
            found = find(dataset)
    if found is None:
        return None
    began = time.thread_time()
    first = [_decoded(item, dataset)[1] for item in islice(found.items(), SAMPLED)]
    sizes = [len(stored) for stored in first if isinstance(stored, bytes)]
    return float(np.mean(sizes or [0])), (time.thread_time() - began) / len(first)


def write_images(
    found: Collection, file: BinaryIO, experiment: Experiment, threads: int
) -> tuple[list, int, bool]:
    """Decode a collection into an npy file of uint8 (count, size, size, channels), or see that it can be
    decoded and store it as in `data.encoded`.

    Writing goes through the file, not a memory map, whose touched pages would count as memory.

    Returns:
        the labels of the images written (None: it has none), how many were skipped, whether any was resized.
    """
    dataset = experiment.dataset
    decode = partial(_decoded, dataset=dataset)
    image = (dataset.image_size, dataset.image_size, dataset.channels) if dataset.store == "raw" else ()
    write_header(file, np.uint8, (found.count, *image))
    ends, end = array("q"), 0
    labels: list[int | None] = []
    broken: list[str] = []
    resized = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are refused by name
        decoded = ahead(decode, found.items(), threads, 8 * threads)
        bar = progress(decoded, total=found.count, desc="images") if found.count else decoded
        for item, result, scaled in bar:
            if item.label is not None and not 0 <= item.label < CLASSES:
                raise UserError(f"{item.name}: label {item.label}; classes are 0, 1 ..., below {CLASSES:,}")
            if isinstance(result, Broken):
                broken.append(f"{item.name}: {result}")
            elif not (broken and dataset.broken == "refuse"):  # else only to name all that are broken
                end += file.write(result)
                ends.append(end)
                labels.append(item.label)
                resized |= scaled
    tell_broken("image", broken, dataset.broken)
    if found.count and len(labels) < FEWEST:
        raise UserError(f"{found.where}: {len(labels)} images can be read; at least {FEWEST} are needed")
    if not image:
        end += file.write(encoded.index(ends, dataset))
    file.seek(0)
    write_header(file, np.uint8, (len(labels) if image else end, *image))
    return labels, len(broken), resized


def tell_broken(what: str, broken: list[str], policy: str) -> None:
    """Say which images or drawings can't be used, one line each; UserError where they are refused."""
    if broken and (policy == "skip" or len(broken) > NAMED):  # the error below names only the first
        print(*(f"broken {what} {printable(line)}" for line in broken), sep="\n", file=sys.stderr)
    if broken and policy == "refuse":
        more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise UserError(
            f"broken {what}s: {len(broken)} ({'; '.join(broken[:NAMED])}{more}); replace them, "
            "or set dataset.broken to skip"
        )


def all_labelled(what: str, labels: list) -> bool:
    """Whether every image or drawing has a label: else none counts, which is said where some do."""
    without = labels.count(None)
    if 0 < without < len(labels):
        print(f"labels left out: {without:,} of {len(labels):,} {what}s have none", file=sys.stderr)
    return not without


def check_room(path: Path, needed: int) -> None:
    """Refuse to begin what a disk has no room for: `needed` bytes."""
    free = shutil.disk_usage(path).free
    if needed > free:
        raise UserError(
            f"{path}: the images need {needed / 1e6:,.1f} MB, but the disk has {free / 1e6:,.1f} MB free; "
            "make room, then run the same command again"
        )


def prepare(experiment: Experiment, threads: int = 1) -> dict:
    """Read the experiment's source, write its images, labels and manifest (verb `prepare-data`), return that.

    By whom they are written says the dataset: `write`, of images. The number of threads changes no result.

    Raises:
        UserError: the source is damaged, or another process is preparing the same; nothing is written.
    """
    work = Work(experiment, "prepare-data")
    paths = [work.path(template) for template in layout.DATA_FILES]
    with holding(layout.state_of(paths[0])):
        entry = located(type(experiment.dataset).WRITE)(experiment, *paths, threads)
        work.end()
    return entry


def write(
    experiment: Experiment, images: Path, labels: Path, held_out: Path, manifest: Path, threads: int = 1
) -> dict:
    """Images as uint8 (N, H, W, C) or encoded, their labels as int64 (N,), or (0,) without, images held out
    of training likewise, and last the manifest.
    """  # fmt: skip
    dataset = experiment.dataset
    if dataset.channels not in (1, 3):
        raise UserError(f"dataset.channels is {dataset.channels}; images have 1 (grey) or 3 (RGB)")
    found, kept_out = divided(dataset)
    images.parent.mkdir(parents=True, exist_ok=True)
    for path in (images, held_out):
        remove_leftovers(path)  # they take room
    size, _ = encoded_image(dataset, found) or (dataset.image_size**2 * dataset.channels, 0)
    check_room(images.parent, int((found.count + kept_out.count) * size))
    with replacing(images) as temporary:
        with temporary.open("wb") as file:
            classes, skipped, resized = write_images(found, file, experiment, threads)
        with replacing(held_out) as apart, apart.open("wb") as file:
            unseen, skipped_too, resized_too = write_images(kept_out, file, experiment, threads)
        manifest.unlink(missing_ok=True)  # never beside images that it doesn't describe
    labelled = all_labelled("image", classes)
    write_array(labels, np.array(classes if labelled else [], np.int64))
    more = {
        "count": len(classes),
        "held_out": len(unseen),
        "skipped": skipped + skipped_too,
        "shape": [dataset.image_size, dataset.image_size, dataset.channels],
        **({"resize": dataset.resize} if resized or resized_too else {}),
        "classes": max(classes) + 1 if labelled else 0,
    }
    return write_manifest(manifest, dataset, found.where, found.story, more)


def write_manifest(path: Path, dataset: DatasetConfig, origin: str, story: dict, more: dict) -> dict:
    """Write what prepared data are: title, origin and licence as far as `story` tells them, and `more`."""
    usual = {"title": dataset.name, "origin": origin, "licence": "not stated"}
    entry = {"dataset": dataset.name, "source": dataset.source, **usual, **story, **more}
    write_json(path, entry)
    return entry
