"""Reference statistics, and metrics of a run, a folder or a first stage.

Verbs `reference-stats`, `fid`, `score` and `measure-first-stage`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ebdiff.codecs.codec import open_codec
from ebdiff.data import archives
from ebdiff.data.dataset import UNCONDITIONAL, conditions, open_held_out, open_pixels
from ebdiff.data.images import Files
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.records import Records, Work
from ebdiff.experiment.schema import FEWEST
from ebdiff.experiment.stages import references
from ebdiff.metrics.classifier import load_classifier
from ebdiff.metrics.distances import Gaussian, Real, nearest, precision_recall
from ebdiff.metrics.features import Extractor, scratch
from ebdiff.system.draws import generator
from ebdiff.system.errors import Unusable, UserError
from ebdiff.system.files import load_memmap, read_arrays, read_json, write_arrays, write_json, write_rows

RECONSTRUCTED, DECODED = 10_000, 256  # images that a first stage is measured on, at most; and at a time
FLOOR_DRAWS = 4  # of real images that the floor is averaged over, where there are as many
FAMILIAR = 0.05  # share of held-out images that lie nearer to a training image than the bound for copies
CONFIDENT = 0.9  # a sample the classifier gives at least this probability looks like a digit
CPU = torch.device("cpu")
# A protocol's entry and the keys that the primary protocol shows on top of metrics.json.
FLAT = (
    "protocol", "distance_name", "fd", "kid", "ill_conditioned", "images", "reference_images", "floor",
    "at_floor", "ceiling", "memorisation",
)  # fmt: skip


def reference_stats(
    experiment: Experiment, protocol: str, count: str = "all", device: torch.device = CPU
) -> None:
    """Statistics and features of the real images, once per dataset, protocol and count.

    With them go the features of as many images held out of training, and how far noise is from the real
    images: the upper end of the scale on which a run's distance lies.

    Args:
        protocol: classifier, legacy_pytorch or clean.
        count: how many images, drawn at random, or `all`.

    Raises:
        UserError: fewer than four images, or more than there are, or weights that can't be had.
    """
    work = Work(experiment, "reference-stats", protocol=protocol, number=count)
    dataset = experiment.dataset.name
    pixels = open_pixels(dataset)
    number = len(pixels) if count == "all" else int(count)
    if not FEWEST <= number <= len(pixels):
        raise UserError(
            f"reference statistics of {dataset}: {number:,} images, of {FEWEST} to {len(pixels):,}"
        )
    extractor = Extractor.open(protocol, dataset, experiment.evaluation, device)
    path, path_apart = work.path(layout.REFERENCE_FEATURES), work.path(layout.HELD_OUT_FEATURES)
    held_out = open_held_out(dataset)
    order, apart = _drawn("reference", len(pixels), number), _drawn("held out", len(held_out), number)
    noise = generator(0, "reference/noise").integers(
        0, 256, (min(number, extractor.noise), *pixels.shape[1:]), np.uint8
    )
    features = extractor.batches(pixels, "real images", order)
    write_rows(path, np.float32, (number, extractor.dimension), features)
    unseen = extractor.batches(held_out, "held-out images", apart) if len(apart) else ()
    write_rows(path_apart, np.float32, (len(apart), extractor.dimension), unseen)
    real = Real.of(load_memmap(path), extractor.device)
    with extractor.whole(noise, "noise", path.parent) as features:
        ceiling = real.distances(features, extractor.device)
    write_arrays(
        work.path(layout.REFERENCE),
        mean=real.fitted.mean,
        covariance=real.fitted.covariance,
        count=number,
        within=real.within,
        ceiling=[*ceiling.values(), len(noise)],
        weights=extractor.sha256,
    )
    work.end()


def evaluate(experiment: Experiment, run: str, seed: int, device: torch.device = CPU) -> dict[str, Any]:
    """Measure a run's samples under every protocol and write `metrics.json`.

    The keys of the first protocol stand on top, those of all under `protocols`; what the classifier
    makes of the samples is there where its protocol is among them.

    Memory holds a batch of images, a block of features and d x d statistics, whatever their number N. Samples
    and features (N x d float32) are files mapped into memory, whose pages the system takes back at need.

    Raises:
        UserError: samples or reference statistics are missing, damaged or made from something else.
    """
    work = Work(experiment, "fid", seed=seed, run=run)
    path, pixels = work.path(layout.METRICS), load_memmap(work.path(layout.SAMPLES))
    began, found, looks = time.perf_counter(), {}, {}
    label = conditions(experiment.items, None, seed, range(len(pixels))).label
    asked = None if label is None else label.numpy()
    for protocol in experiment.evaluation.protocols:
        found[protocol], more = _measure(experiment, protocol, pixels, asked, path.parent, device)
        looks |= more
    first = found[experiment.evaluation.protocols[0]]
    metrics = {
        "run": run,
        "seed": seed,
        **{key: first[key] for key in FLAT},
        **looks,
        "codec": experiment.codec.model_dump(mode="json"),
        "protocols": found,
        "seconds": round(time.perf_counter() - began, 3),
    }
    write_json(path, metrics)
    work.end()
    return metrics


def measure_first_stage(experiment: Experiment, device: torch.device = CPU) -> dict[str, Any]:
    """What encoding and decoding loses of the images, and write `reconstruction.json`.

    Root mean squared errors are of pixels in 0..255, those of training images by way of the stored latents.
    How far at most `RECONSTRUCTED` decoded training images are from the real ones bounds what runs can reach.

    Raises:
        UserError: the codec encodes nothing; or latents, images or reference statistics can't be used.
    """
    if not experiment.codec.ENCODED:
        raise UserError(f"{experiment.name}: codec.kind {experiment.codec.kind} encodes nothing")
    work = Work(experiment, "measure-first-stage")
    began, dataset, codec = time.perf_counter(), experiment.dataset.name, open_codec(experiment, device)
    path, latents = work.path(layout.RECONSTRUCTION), load_memmap(work.path(layout.LATENTS))
    pixels, held_out = open_pixels(dataset), open_held_out(dataset)
    rows, apart = (_drawn("first stage", len(x), RECONSTRUCTED) for x in (pixels, held_out))
    protocols = {}
    with scratch(path.parent, len(rows), *pixels.shape[1:], dtype=np.uint8) as decoded:

        def restored() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for first in range(0, len(rows), DECODED):
                here, there = rows[first : first + DECODED], decoded[first : first + DECODED]
                stored = torch.from_numpy(latents[here]).float().to(device)
                there[:] = codec.decode(stored, UNCONDITIONAL)
                yield there, pixels[here]

        unseen = (held_out[apart[first : first + DECODED]] for first in range(0, len(apart), DECODED))
        errors = {
            "rmse": _rmse(restored()),
            "held_out_rmse": _rmse((codec.decode(codec.encode(x), UNCONDITIONAL), x) for x in unseen),
        }
        for protocol in experiment.evaluation.protocols:
            extractor = Extractor.open(protocol, dataset, experiment.evaluation, device)
            real = _reference(dataset, experiment.evaluation.reference_count, extractor)[0]
            with extractor.whole(decoded, "decoded images", path.parent) as features:
                protocols[protocol] = real.distances(features, extractor.device) | extractor.story()
    found = {
        "codec": experiment.codec.model_dump(mode="json"),
        "trained_here": experiment.codec.TRAINED,
        "images": len(rows),
        "share": math.prod(latents.shape[1:]) / math.prod(pixels.shape[1:]),  # of an image's values
        **errors,
        "protocols": protocols,
        "seconds": round(time.perf_counter() - began, 3),
    }
    write_json(path, found)
    work.end()
    return found


def _rmse(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float | None:
    """Root mean squared error of pairs of equal arrays; None of none."""
    total, count = 0.0, 0
    for a, b in pairs:
        total, count = total + float(np.square(a.astype(np.float64) - b).sum()), count + a.size
    return (total / count) ** 0.5 if count else None


def score(experiment: Experiment, folder: Path, device: torch.device = CPU) -> list[dict[str, Any]]:
    """Measure a folder of images as a run's samples are, precision and recall too; nothing is kept.

    Images in folders below it count, too; all must have the size of the experiment's real images, which they
    are measured against.

    Returns:
        an entry for each protocol, as in `metrics.json`.

    Raises:
        UserError: too few images, one that can't be read or has another size, or no reference statistics.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found, records = archives.folder(folder), Records(experiment)
    if found.count < FEWEST:
        raise UserError(f"{folder}: {found.count} images are too few, {FEWEST} at least")
    for path in references(experiment):
        records.check(path)
    settings = experiment.evaluation.model_copy(update={"precision_recall": True})
    experiment = experiment.model_copy(update={"evaluation": settings})
    manifest = layout.path(layout.MANIFEST, dataset=experiment.dataset.name)
    pixels = Files(list(found.items()), tuple(read_json(manifest)["shape"]))
    return [_measure(experiment, p, pixels, None, manifest.parent, device)[0] for p in settings.protocols]


def _measure(
    experiment: Experiment,
    protocol: str,
    pixels: np.ndarray | Files,
    asked: np.ndarray | None,
    folder: Path,
    device: torch.device,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A protocol's entry in `metrics.json`, and what the classifier makes of the samples."""
    dataset, settings = experiment.dataset.name, experiment.evaluation
    began = time.perf_counter()
    extractor = Extractor.open(protocol, dataset, settings, device)
    real, held_out, ceiling = _reference(dataset, settings.reference_count, extractor)
    manifest = read_json(layout.path(layout.MANIFEST, dataset=dataset))
    number, looks, precision, recall = real.fitted.count, {}, None, None
    with extractor.whole(pixels, "samples", folder) as features:
        sets = features, real.features, held_out, extractor.device
        distances, (floor, at_floor) = real.distances(features, extractor.device), _floor(*sets)
        # Only where there are features of just the images that training saw.
        known = len(held_out) and number == manifest["count"] and not experiment.dataset.subset
        copied = _memorisation(*sets) if known else None
        if settings.precision_recall:
            precision, recall = precision_recall(features, real.features, extractor.device)
        if protocol == "classifier":
            looks = _looks(dataset, features, real.features, asked)
    return {
        "protocol": protocol,
        **distances,
        "precision": precision,
        "recall": recall,
        "images": len(pixels),
        "reference_images": number,
        # The covariance of n images has rank n - 1: below 4d the distance is mostly sampling error.
        "ill_conditioned": min(len(pixels), number) < 4 * extractor.dimension,
        "floor": floor,
        "at_floor": at_floor,
        "ceiling": ceiling,
        "memorisation": copied,
        "split": f"{'all' if number == manifest['count'] else number} images of {dataset}",
        **extractor.story(),
        "seconds": round(time.perf_counter() - began, 3),
    }, looks


def _looks(dataset: str, features: np.ndarray, real: np.ndarray, asked: np.ndarray | None) -> dict[str, Any]:
    """How sure the classifier is of the samples and which classes it sees, from its features.

    Where samples were asked to be of a class, in how many of them it sees that one.
    """
    network, accuracy = load_classifier(layout.path(layout.CLASSIFIER, dataset=dataset))
    probabilities, of_real = network.probabilities(features), network.probabilities(real)
    seen = probabilities.argmax(axis=1)
    shares = np.bincount(seen, minlength=probabilities.shape[1]) / len(features)
    return {
        **({} if asked is None else {"agreement": float((seen == asked).mean())}),
        "confident": float((probabilities.max(axis=1) > CONFIDENT).mean()),
        "real_confident": float((of_real.max(axis=1) > CONFIDENT).mean()),
        "class_shares": shares.tolist(),
        "classifier_accuracy": accuracy,
    }


def _drawn(what: str, count: int, number: int) -> np.ndarray:
    """At most `number` of `count` rows, drawn at random, ascending: the disk is read forwards."""
    return np.sort(generator(0, f"reference/{what}").permutation(count)[:number])


def _floor(
    features: np.ndarray, real: np.ndarray, held_out: np.ndarray, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How far unseen real images are from real ones, and samples by the same measure: n on every side.

    A Fréchet distance grows as images get fewer, so n = min(held out, samples) for both, and is averaged
    over a few disjoint draws of n real images. Without held-out images two halves of the real ones stand
    for them.
    """
    if len(held_out):
        unseen, seen = held_out, real
    else:
        order = generator(0, "reference/halves").permutation(len(real))
        unseen, seen = (real[rows] for rows in np.array_split(order, 2))
    n = min(len(unseen), len(seen), len(features))
    draws = min(FLOOR_DRAWS, len(seen) // n)
    order = generator(0, "reference/floor").permutation(len(seen))[: draws * n].reshape(draws, n)
    sides = unseen[_drawn("held out/floor", len(unseen), n)], features[:n]
    found: list[list[dict[str, float]]] = [[], []]
    for rows in np.sort(order):
        drawn = Real.of(seen[rows], device)
        for side, distances in zip(sides, found, strict=True):
            distances.append(drawn.distances(side, device))
    told = {"images": n, "draws": draws, "held_out": bool(len(held_out))}
    means = ({key: float(np.mean([d[key] for d in side])) for key in ("fd", "kid")} for side in found)
    return tuple({**mean, **told} for mean in means)


def _memorisation(
    features: np.ndarray, real: np.ndarray, held_out: np.ndarray, device: torch.device
) -> dict[str, float]:
    """How near samples come to a training image, against how near images do that training never saw.

    Mirrored copies, where training mirrors, are not looked for.
    """
    n = min(len(held_out), len(features))
    sampled, unseen = (nearest(side[:n], real, device) for side in (features, held_out))
    return {
        "images": n,
        "nearest": float(np.median(sampled)),
        "held_out_nearest": float(np.median(unseen)),
        "bound": FAMILIAR,
        "nearer": float((sampled < np.quantile(unseen, FAMILIAR)).mean()),
    }


def _reference(dataset: str, count: str, extractor: Extractor) -> tuple[Real, np.ndarray, dict[str, float]]:
    """What `reference_stats` stored: the real images, features of held-out ones, and the ceiling."""
    where = dict(dataset=dataset, protocol=extractor.protocol, number=count)
    statistics = layout.path(layout.REFERENCE, **where)
    found = read_arrays(statistics)
    if str(found.get("weights")) != extractor.sha256:
        raise Unusable(statistics, "made with other weights")
    features, held_out = (
        load_memmap(layout.path(template, **where))
        for template in (layout.REFERENCE_FEATURES, layout.HELD_OUT_FEATURES)
    )
    fitted = Gaussian(found["mean"], found["covariance"], int(found["count"]))
    ceiling = dict(zip(("fd", "kid", "images"), found["ceiling"].tolist(), strict=True))
    return Real(features, fitted, float(found["within"])), held_out, ceiling
