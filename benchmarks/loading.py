"""How many training images per CPU second, against transforms image by image?

    python benchmarks/loading.py

One thread on both sides, CPU time. Real CIFAR-10 where `resources/data/cifar10` is prepared, else random
pixels of its shape: the work is the same. Then what decoding takes where images stay encoded: made-up ones
of LSUN's size (341x256, WebP of 14 KB) and larger files (JPEG of 32 KB), beside a raw store of these pixels.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import paired
import plain
import torch
from PIL import Image

from ebdiff.data import sources
from ebdiff.data.archives import folder
from ebdiff.data.dataset import Batch, Images, batch_indices
from ebdiff.data.encoded import open_images
from ebdiff.experiment import layout
from ebdiff.experiment.members import Items
from ebdiff.system.files import load_memmap

BATCH = 128
CPU = torch.device("cpu")


def pixels(count: int) -> tuple[np.ndarray, str]:
    """uint8 (count, 32, 32, 3), and what they are."""
    path = paired.ROOT / layout.path(layout.IMAGES, dataset="cifar10")
    if path.exists():
        return load_memmap(path)[:count], "CIFAR-10"
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8), "random pixels"


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def photographs(count: int, kind: str, quality: int, place: Path) -> tuple[Images, Images]:
    """Made-up photographs (smooth, with noise) of 341x256, in a raw store and in an encoded one, 256x256."""
    rng = np.random.default_rng(0)
    (place / kind).mkdir()
    for i in range(count):
        smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((341, 256))
        noisy = (smooth + rng.normal(0, 6, (256, 341, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(place / f"{kind}/{i}.{kind}", quality=quality)
    stores = []
    for store in ("raw", "encoded"):
        e, path = paired.experiment(BATCH, tiny=False), place / f"{kind}-{store}.npy"
        new = {"store": store, "image_size": 256, "crop": "centre"}
        e = e.model_copy(update={"dataset": e.dataset.model_copy(update=new)})
        with path.open("wb") as file:
            sources.write_images(folder(place / kind), file, e, 1)
        stores.append(Images(e.dataset.items, open_images(path), flip=True))
    return stores[0], stores[1]


def decoding(args: argparse.Namespace, kind: str, quality: int) -> paired.Row:
    """Images per core second that an encoded store gives, beside those of a raw one."""
    size, found = 4 if args.tiny else BATCH, {"raw": [], "encoded": []}
    with tempfile.TemporaryDirectory() as place:
        stores = photographs(2 * size, kind, quality, Path(place))
        first, same = (images.draw(size, 0, "loading", 0)[0] for images in stores)
        assert np.array_equal(first, same), "the images differ"
        for step in range(args.rounds):
            for name, images in zip(found, stores, strict=True):
                found[name].append(size / cpu_seconds(partial(images.draw, size, 0, "loading", step)))
        kilobytes = len(stores[1].rows.content) / len(stores[1]) / 1e3
    note = f"{kilobytes:.0f} KB each; {median(found['raw']):,.0f} from a raw store in memory, of 197 KB"
    measure = f"256x256 images per core second, decoded from {kind.upper()}"
    return paired.row(measure, found["encoded"], "", against="raw store", note=note)


def main(argv: Sequence[str] | None = None) -> None:
    args = paired.arguments(__doc__, argv, rounds=9)
    torch.set_num_threads(1)
    batches = 2 if args.tiny else 40
    data, what = pixels(batches * BATCH)
    images, dataset = Images(Items((3, 32, 32)), data, flip=True), plain.Dataset(data)

    # The same pictures: ours without flips, theirs put straight by hand.
    order = batch_indices(len(data), len(data), 0, "loading", 0)
    straight = images.batch(images.at(order), CPU).x0
    theirs = torch.stack([dataset[i] for i in order[:BATCH]])
    same = [bool((a - b).abs().max() < 1e-6) for a, b in zip(straight[:BATCH], theirs, strict=True)]
    turned = [bool((a.flip(2) - b).abs().max() < 1e-6) for a, b in zip(straight[:BATCH], theirs, strict=True)]
    assert all(s or f for s, f in zip(same, turned, strict=True)), "the images differ"

    def ours(step: int) -> Batch:
        return images.batch(images.draw(BATCH, 0, "loading", step), CPU)

    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True)
    s: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(args.rounds):
        s["theirs"].append(cpu_seconds(lambda: list(loader)))
        s["ours"].append(cpu_seconds(lambda: list(map(ours, range(batches)))))
    per_second = {side: len(data) / median(times) for side, times in s.items()}
    note = f"{per_second['theirs']:,.0f} and {per_second['ours']:,.0f} images per CPU second, {what}"
    goal = ("images per CPU second, with flips", "transforms image by image", "≥ 8")
    rows = [paired.compare(*goal, s["theirs"], s["ours"], note)]
    rows += [decoding(args, "webp", 75), decoding(args, "jpeg", 90)]
    paired.write("loading", rows, torch.device("cpu"), args.out)


if __name__ == "__main__":
    main()
