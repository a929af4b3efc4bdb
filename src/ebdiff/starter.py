"""`ebdiff init`: look at somebody's images or drawings and propose an experiment for them.

The proposal scales the paper's settings (CIFAR-10 at 32, CelebA at 64, LSUN at 256; ChiroDiff's for drawings)
to the size and number of the images; every choice stands in the file with its reason, to be changed there.
A name that is taken, or images that no experiment can be made of, are a `UserError`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ebdiff.data import strokes
from ebdiff.data.images import CELEBA_SIZE, Broken, converted, opened
from ebdiff.data.sources import find
from ebdiff.experiment import load, plain
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.jobs import of_dataset
from ebdiff.experiment.members import ImagesConfig, SketchesConfig
from ebdiff.experiment.places import given
from ebdiff.experiment.schema import is_name
from ebdiff.report import text
from ebdiff.system.errors import UserError
from ebdiff.system.files import write_text
from ebdiff.system.progress import progress

BASE = "images"  # the experiment that the proposals differ from
DRAWINGS = "sketches"  # the same of drawings
EVENING = 4 * 3600  # seconds
LOOKED_AT = 500  # images, evenly spread: enough to know sizes and colours


@dataclass(frozen=True)
class Look:
    """What the images are like, judged from some of them."""

    count: int  # in all
    seen: int  # looked at
    sizes: Counter[tuple[int, int]]  # width, height
    modes: Counter[str]  # Pillow's
    colour: bool  # whether any has
    broken: int  # can't be read

    @property
    def crop(self) -> str:
        """The crop that these sizes ask for."""
        if set(self.sizes) == {CELEBA_SIZE}:
            return "celeba"
        return "none" if all(width == height for width, height in self.sizes) else "centre"

    def lines(self) -> list[str]:
        """The look in words."""
        common = ", ".join(f"{w}x{h} ({n})" for (w, h), n in self.sizes.most_common(3))
        more = f" and {len(self.sizes) - 3} other sizes" if len(self.sizes) > 3 else ""
        modes = ", ".join(f"{mode} ({n})" for mode, n in self.modes.most_common())
        broken = f"; {self.broken} can't be read" if self.broken else ""
        return [
            f"{self.count:,} images, {self.seen:,} looked at{broken}",
            f"sizes {common}{more}; modes {modes}; {'colour' if self.colour else 'grey'}",
        ]


def look(dataset: ImagesConfig) -> Look:
    """Look at up to 500 images of a dataset; UserError if none can be read."""
    found = find(dataset)
    stride = max(1, found.count // LOOKED_AT)
    sizes, modes, colour, broken, seen = Counter(), Counter(), False, 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for item in progress(found.items(stride), desc="looking", leave=False):
            seen += 1
            try:
                image = opened(item)
                small = np.asarray(converted(image, 3).resize((32, 32), Image.Resampling.BOX), int)
            except Broken:
                broken += 1
                continue
            sizes[image.size] += 1
            modes[image.mode] += 1
            # JPEG leaves some colour noise in grey photographs.
            colour |= bool(np.ptp(small, axis=-1).max() > 8)
    if not sizes:
        raise UserError(f"{found.where}: none of {seen} images can be read; are these images?")
    return Look(found.count, seen, sizes, modes, colour, broken)


def levels(size: int) -> list[int]:
    """The resolutions of the network: halved down to 4 or so, in at most six levels as for LSUN."""
    found = [size]
    while found[-1] % 2 == 0 and found[-1] >= 8 and len(found) < 6:
        found.append(found[-1] // 2)
    if size < 8 or found[-1] > 16:
        raise UserError(
            f"--size {size}: halves only to {found[-1]}; take 8, 16, 32, 64 or another multiple of 16"
        )
    return found


# Widths of the levels in the paper's networks: CIFAR-10 has four levels, CelebA five, LSUN six.
MULTIPLIERS = {2: [1, 2], 3: [1, 2, 2], 4: [1, 2, 2, 2], 5: [1, 2, 2, 2, 4], 6: [1, 1, 2, 2, 4, 4]}
# Images up to a size: batch, learning rate, EMA decay, images per sampling pass. 32: CIFAR-10, 64: CelebA,
# larger than 128: LSUN; 128 lies between.
SETTINGS = (
    (32, 128, "2.0e-4", 0.9999, 500),
    (64, 96, "2.0e-4", 0.9999, 250),
    (128, 32, "5.0e-5", 0.9995, 64),
    (math.inf, 8, "2.0e-5", 0.999, 16),
)
CROPS = {
    "none": "all images seen are square",
    "centre": "not all images seen are square: the largest central square",
    "celeba": "all images seen have the size of aligned CelebA: 128x128 around the face",
}


def _iterations(epoch: int) -> int:
    """N by the steps of an epoch: 400 passes over the data, within 20,000 and 400,000."""
    return min(400_000, max(20_000, round(400 * epoch, -3)))


def _head(name: str, seen: Look | Drawn, base: str, things: str) -> str:
    """What every proposal begins with."""
    return f"""\
# Written by `ebdiff init {name}`. Seen: {"; ".join(seen.lines())}.
# Everything else stands in {base}.yaml, and holds unless it is written here too. Run it with
#
#     snakemake --cores all --config experiments={name}
base: {base}
about: Early-bird tickets and timestep-aware experts on the {things} of {name}.

# Multiplies all iterations and pseudo-epochs below: 0.1 is a first look at a tenth of the cost.
scale: 1.0
"""


def _searches(epoch: int, n: int, things: str) -> str:
    """The search and the unpruned network, by N and an epoch's steps (391 of CIFAR-10, 1,696 of CelebA)."""
    if 200 <= epoch <= 2500:
        interval, steps = f"epoch # {epoch:,} steps", epoch
    else:
        steps, why = (400, "masks hardly move in an epoch") if epoch < 200 else (1000, "as for LSUN")
        interval = f"{{unit: pseudo-epoch, steps: {steps}}} # an epoch has {epoch:,} steps: {why}"
    return f"""\
searches:
  full:
    interval: {interval}
    horizon: {max(10, min(40, n // (2 * steps)))} # intervals after which the search gives up

dense:
  iterations: {n} # N: about {n / epoch:,.0f} passes over the {things}
"""


def _runs(n: int, part: int) -> str:
    """The machine, and the runs; each of the experts trains for a `part` of N."""
    gpu = shutil.which("nvidia-smi") is not None
    found = "seen on this machine" if gpu else "none seen on this machine: this will be slow, see scale"
    share = "a quarter of N as in the paper" if part == 4 else "half of N: a quarter is little"
    return f"""\
compute:
  threads: {min(4, os.cpu_count() or 1)}
  gpus: {int(gpu)} # per job; {found}

runs:
  eb-50: {{iterations: {n * 9 // 8}}} # 9/8 of N, as in the paper
  random-ticket-50: {{iterations: {n * 9 // 8}}}
  ta-eb: {{iterations: {n // part}}} # per expert; {share}
"""


def propose(name: str, images: str, size: int, seen: Look) -> str:
    """The experiment for images at a path as YAML with comments: what differs from `images.yaml`.

    Both it and its dataset get the name; `size` is the height and width to train at, pixels.
    """
    resolutions = levels(size)
    _, batch, rate, decay, at_once = next(row for row in SETTINGS if size <= row[0])
    while batch > 8 and seen.count < 10 * batch:  # an epoch of ten steps at least
        batch //= 2
    batch = min(batch, seen.count)
    epoch = math.ceil(seen.count / batch)
    n = _iterations(epoch)
    width = 128 if seen.count >= 20_000 else 64
    samples = min(10_000, max(1_000, round(seen.count, -3)))
    few = "" if samples >= 8192 else " # fewer than 8,192 make FID ill-conditioned: compare runs only"
    part = 4 if n >= 200_000 else 2
    return f"""\
{_head(name, seen, BASE, "images")}
dataset:
  name: {name}
  path: {json.dumps(images, ensure_ascii=False)} # folder, zip or parquet; ${{VARIABLES}} are filled in
  image_size: {size} # pixels, height and width
  channels: {3 if seen.colour else 1} # 3: colour, 1: grey
  crop: {seen.crop} # {CROPS[seen.crop]}

network: # the paper's kind of U-Net for this size
  width: {width} # {"as in the paper" if width == 128 else "half the paper's: few images need no more"}
  multipliers: {MULTIPLIERS[len(resolutions)]} # widths at {", ".join(map(str, resolutions))} pixels
  attention: {[r for r in resolutions[1:] if r <= 16][:1]} # pixels
  dropout: {0.1 if size <= 64 else 0.0}
  norm_groups: {width // 4} # four channels each at the first level

training:
  batch: {batch} # {epoch:,} steps per epoch; less if memory is short
  learning_rate: {rate} # the paper's for this size
  ema_decay: {decay}

{_searches(epoch, n, "images (20,000 to 400,000; the paper: 800,000)")}
sampling:
  spacing: {"quad" if size <= 32 else "uniform"} # as the paper does at this size
  images: {samples}{few}
  batch: {at_once}

{_runs(n, part)}"""


@dataclass(frozen=True)
class Drawn:
    """What drawings are like, judged from some of them."""

    count: int  # in all, of large files about
    points: list[int]  # of those looked at
    words: Counter[str | None]  # their categories
    broken: int  # can't be used

    def lines(self) -> list[str]:
        """The look in words."""
        broken = f"; {self.broken} can't be used" if self.broken else ""
        median, longest = int(np.median(self.points)), max(self.points)
        return [
            f"{self.count:,} drawings, {len(self.points) + self.broken:,} looked at{broken}",
            f"{len(self.words)} categories; {median} points in the middle, at most {longest:,}",
        ]


def look_at_drawings(dataset: SketchesConfig) -> Drawn:
    """Look at up to 500 drawings, evenly spread; UserError if none can be used."""
    count, found = strokes.look(dataset, LOOKED_AT)
    points, words, broken = [], Counter(), 0
    for name, read in found:
        try:
            drawing = read()
            points.append(1 + len(strokes.movements(drawing.strokes, dataset.step)))
            words[drawing.word] += 1
        except Broken as error:
            broken, last = broken + 1, f"{name}: {error}"
    if not points:
        raise UserError(f"{dataset.path}: " + (f"no drawing can be used; {last}" if count else "no drawings"))
    return Drawn(count, points, words, broken)


def propose_drawings(name: str, drawings: str, size: int, seen: Drawn) -> str:
    """The experiment for drawings at a path as YAML with comments: what differs from `sketches.yaml`."""
    kept = math.floor(seen.count * 0.85)  # held out: the rest
    batch = max(1, min(128, 2 ** int(math.log2(max(kept // 10, 1)))))
    epoch = math.ceil(kept / batch)
    n = _iterations(epoch)
    hidden = 48 if kept < 2_000 else 96 if kept < 50_000 else 128
    usual = int(np.quantile(seen.points, 0.99))
    protocol = "[clean, classifier]" if None not in seen.words and len(seen.words) > 1 else "[clean]"
    return f"""\
{_head(name, seen, DRAWINGS, "drawings")}
dataset:
  name: {name}
  source: sketches
  path: {json.dumps(drawings, ensure_ascii=False)} # .ndjson or a folder of them; ${{VARIABLES}} are filled in
  max_points: {min(300, math.ceil(usual / 10) * 10)} # 99 % of those seen have at most {usual:,}
  broken: {"skip # and count them" if seen.broken else "refuse"}

codec:
  size: {size} # pixels, of the pictures that metrics see

network: # ChiroDiff's
  hidden: {hidden} # 48, 96 or 128, by the number of drawings

training:
  batch: {batch} # {epoch:,} steps per epoch

{_searches(epoch, n, "drawings")}
sampling:
  images: {min(10_000, max(1_000, round(seen.count, -3)))}

evaluation:
  protocols: {protocol}{" # fewer than 8,192 drawings make FID ill-conditioned" if kept < 8192 else ""}
  reference: null

{_runs(n, 2)}"""


def estimated(plan: Mapping[str, Any]) -> list[str]:
    """How long a planned experiment takes, and the `scale` at which it fits an evening."""
    wall, path = plan["wall_seconds"], load.EXPERIMENTS / f"{plan['experiment']}.yaml"
    at_once = text.plural(plan["devices"], "job")
    lines = [f"about {text.duration(wall)} on {plan['device']} with {at_once} at a time"]
    scaled = [j["seconds"] for j in plan["jobs"] if j["kind"] in ("train-dense", "finetune-region")]
    rest = sum(j["seconds"] for j in plan["jobs"]) - sum(scaled)
    scale = (EVENING * plan["devices"] - rest) / sum(scaled)
    if wall > EVENING and scale > 0:
        lines.append(
            f"`scale: {text.number(scale)}` in {path} would fit an evening ({text.duration(EVENING)})"
        )
    return lines


def are_drawings(path: str) -> bool:
    """Whether there are .ndjson files at a path, rather than images."""
    found = given(path, "--images")
    return found is not None and (found.suffix == ".ndjson" or any(found.glob("*.ndjson")))


def init(name: str, images: str, size: int | None, force: bool, folder: Path = load.EXPERIMENTS) -> list[str]:
    """Write `{folder}/{name}.yaml` for images (folder, zip, parquet) or drawings (.ndjson, folder of them).

    `size` is the pixels to train at, or of drawings to draw them at. ${VARIABLES} in the path stay in the
    file and are filled in at use.

    Returns:
        lines for the user: what was seen, what was written, the command to run next.

    Raises:
        UserError: the name is taken or no name, or the images or the size are unusable; nothing is written.
    """
    if not is_name(name):
        raise UserError(f"name: {name[:60]!r} isn't one; up to 60 lower-case letters, digits, - and _")
    path = folder / f"{name}.yaml"
    if path.exists() and not force:
        raise UserError(f"{path}: exists already; choose another name, or --force to write over it")
    told = []
    if are_drawings(images):
        size = 256 if size is None else size
        seen = look_at_drawings(SketchesConfig(name=name, source="sketches", path=images))
        text = propose_drawings(name, images, size, seen)
    else:
        size = 64 if size is None else size
        # The name is checked before anything is read: a proposal for images nobody has looked at yet.
        _checked(propose(name, images, size, Look(1000, 0, Counter(), Counter(), True, 0)), name, path)
        seen = look(ImagesConfig(name=name, source="images", path=images))
        text = propose(name, images, size, seen)
        small = min(min(s) for s in seen.sizes)
        told = [f"note: sides of {small} pixels will be enlarged to {size}"] if small < size else []
    experiment = _checked(text, name, path)
    _check_free(experiment, folder)
    write_text(path, text)
    return [
        *seen.lines(),
        *told,
        f"wrote {path}; read it, then run:",
        "",
        f"    snakemake --cores all --config experiments={name}",
    ]


def _check_free(experiment: Experiment, folder: Path) -> None:
    """Refuse the name of a dataset that another experiment uses for other images."""
    try:
        other = of_dataset(experiment.dataset.name, folder=folder)
    except UserError:
        return  # none uses it
    if other.name != experiment.name and other.prepared != experiment.prepared:
        raise UserError(
            f"{folder / f'{other.name}.yaml'}: calls other images {experiment.name!r}; choose another name"
        )


def _checked(text: str, name: str, path: Path) -> Experiment:
    return load.parse({**load.with_base(plain.mapping(text, str(path)), path), "name": name}, str(path))
