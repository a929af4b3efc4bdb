"""Drawings as sequences of movements, padded: how they are stored, and as training sees them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebdiff.data import strokes
from ebdiff.data.dataset import Batch, Cond, Stored, inside, moved
from ebdiff.data.images import Broken
from ebdiff.data.sources import all_labelled, check_room, tell_broken, write_manifest
from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.members import CODECS
from ebdiff.experiment.schema import FEWEST
from ebdiff.system.draws import generator
from ebdiff.system.errors import Unusable, UserError
from ebdiff.system.files import load_memmap, read_json, sha256, write_array, write_rows
from ebdiff.system.progress import progress

BLOCK = 256  # drawings drawn at a time
SEQUENCES, LENGTHS = "sequences.npy", "lengths.npy"  # beside the images


class Sketches(Stored):
    """Prepared drawings, float32 (N, L, 3): dx, dy, whether a stroke begins; zeros at the end."""

    @classmethod
    def of(cls, experiment: Experiment) -> Sketches:
        dataset = experiment.dataset
        manifest = layout.path(layout.MANIFEST, dataset=dataset.name)
        told = read_json(manifest)
        for name in (SEQUENCES, LENGTHS):
            if sha256(path := manifest.with_name(name)) != told.get(name):
                raise Unusable(path, "isn't what was prepared")
        sequences, lengths = (
            load_memmap(manifest.with_name(name))[: dataset.subset] for name in (SEQUENCES, LENGTHS)
        )
        return cls(dataset.items, sequences, lengths=np.array(lengths))

    def batch(self, arrays: Sequence[np.ndarray | Tensor], device: torch.device) -> Batch:
        """Movements (B, L, 3) and which of them are a drawing's own."""
        sequences, lengths = moved(arrays, device, self.resident)
        return Batch(sequences, Cond(mask=inside(lengths, self.items.shape[0])))


def write(
    experiment: Experiment, images: Path, labels: Path, held_out: Path, manifest: Path, threads: int = 1
) -> dict:
    """Sequences as float32 (N, L, 3) and lengths as int64 (N,); and as every source: images of them by the
    experiment's codec, their categories, images of drawings held out of training, and last the manifest.

    Which are held out, and the order, is a function of their number alone; the first n are a fair subset.
    """  # fmt: skip
    dataset, longest = experiment.dataset, experiment.dataset.max_points
    found, words, told = _read(experiment)
    order = generator(0, "sketches/split").permutation(len(found))
    apart, kept = np.split(order, [math.ceil(dataset.held_out * len(found))])
    if len(kept) < FEWEST:
        raise UserError(
            f"dataset {dataset.name}: {len(kept)} drawings to train on; at least {FEWEST} are needed"
        )
    codec = CODECS.member(experiment.codec.kind)(experiment, torch.device("cpu"))

    def padded(rows: np.ndarray) -> np.ndarray:
        sequences = np.zeros((len(rows), longest, 3), np.float32)
        for sequence, i in zip(sequences, rows, strict=True):
            sequence[: len(found[i])] = found[i]
        return sequences

    def drawn(rows: np.ndarray) -> np.ndarray:
        own = torch.tensor([len(found[i]) for i in rows])
        return codec.decode(torch.from_numpy(padded(rows)), Cond(mask=inside(own, longest)))

    def blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
        return (rows[first : first + BLOCK] for first in range(0, len(rows), BLOCK))

    def pictures(rows: np.ndarray) -> Iterator[np.ndarray]:
        return map(drawn, progress(blocks(rows), total=math.ceil(len(rows) / BLOCK), desc="images"))

    shape = drawn(kept[:1]).shape[1:]
    images.parent.mkdir(parents=True, exist_ok=True)
    check_room(images.parent, len(found) * math.prod(shape) + len(kept) * 12 * longest)
    manifest.unlink(missing_ok=True)  # never beside data that it doesn't describe
    write_rows(images, np.uint8, (len(kept), *shape), pictures(kept))
    write_rows(held_out, np.uint8, (len(apart), *shape), pictures(apart))
    sequences, lengths = (images.with_name(name) for name in (SEQUENCES, LENGTHS))
    write_rows(sequences, np.float32, (len(kept), longest, 3), map(padded, blocks(kept)))
    write_array(lengths, np.array([len(found[i]) for i in kept], np.int64))
    categories = sorted(set(words)) if all_labelled("drawing", words) else []
    write_array(labels, np.array([categories.index(words[i]) for i in kept if categories], np.int64))
    more = {
        "count": len(kept),
        "held_out": len(apart),
        **told,
        "shape": list(shape),
        "classes": len(categories),
        "categories": categories,
        SEQUENCES: sha256(sequences),
        LENGTHS: sha256(lengths),
    }
    origin = dataset.path or dataset.source
    return write_manifest(manifest, dataset, origin, strokes.STORIES[dataset.source], more)


def _read(experiment: Experiment) -> tuple[list[np.ndarray], list[str | None], dict[str, int]]:
    """The drawings as movements, their categories, and how many were left out; see `tell_broken`."""
    dataset = experiment.dataset
    found, words, taken, broken, long = [], [], Counter(), [], []
    for name, read in progress(strokes.find(dataset), desc="drawings"):
        try:
            drawing = read()
            if taken[drawing.word] == dataset.per_category:
                continue
            sequence = strokes.movements(drawing.strokes, dataset.step, dataset.simplify)
        except Broken as error:
            broken.append(f"{name}: {error}")
            continue
        if len(sequence) > dataset.max_points:
            long.append(f"{name}: {len(sequence):,}")
            continue
        taken[drawing.word] += 1
        found.append(sequence)
        words.append(drawing.word)
    tell_broken("drawing", broken, dataset.broken)
    if long:
        print(f"left out, longer than dataset.max_points {dataset.max_points}: {len(long)} (first {long[0]})")
    return found, words, {"skipped": len(broken), "too_long": len(long)}
