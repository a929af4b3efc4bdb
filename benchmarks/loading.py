"""How many training images per CPU second, against transforms image by image?

    python benchmarks/loading.py

One thread on both sides, CPU time. Real CIFAR-10 where `resources/data/cifar10` is prepared, else random
pixels of its shape: the work is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import paired
import plain
import torch

from ebdiff.data.dataset import Batch, Images, batch_indices
from ebdiff.experiment import layout
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


def main(argv: Sequence[str] | None = None) -> None:
    args = paired.arguments(__doc__, argv, rounds=9)
    torch.set_num_threads(1)
    batches = 2 if args.tiny else 40
    data, what = pixels(batches * BATCH)
    images, dataset = Images(data, flip=True), plain.Dataset(data)

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
    paired.write("loading", rows, torch.device("cpu"), args.out)


if __name__ == "__main__":
    main()
