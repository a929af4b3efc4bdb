"""Where every file lives. The only place that spells a path.

Constants are templates with Snakemake wildcards; `path` fills them in. Rules, verbs, the report
and the notebooks all use them, so a file moves by changing one line here.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from ebdiff.experiment.schema import INITIAL
from ebdiff.system.errors import UserError

TUNING = "config/tuning/{experiment}.yaml"
DOWNLOAD = "resources/downloads/{file}"

# Shared by all experiments that use a dataset.
DATA = "resources/data/{dataset}"
IMAGES = DATA + "/images.npy"
LABELS = DATA + "/labels.npy"
HELD_OUT = DATA + "/held_out.npy"  # images that no training sees
MANIFEST = DATA + "/manifest.json"
DATA_FILES = (IMAGES, LABELS, HELD_OUT, MANIFEST)
CLASSIFIER = DATA + "/classifier.safetensors"
CLASSIFIER_LEDGER = DATA + "/classifier.json"
REFERENCE = DATA + "/reference/{protocol}-{number}.npz"  # number: how many images, or `all`
REFERENCE_FEATURES = DATA + "/reference/{protocol}-{number}.npy"
HELD_OUT_FEATURES = DATA + "/reference/held_out/{protocol}-{number}.npy"

EXPERIMENT = "results/{experiment}"
TAKEN = ("reference", "logs", "benchmarks", "records")  # folders of results/ that are no experiment's
FIRST_STAGE = EXPERIMENT + "/first_stage/weights.safetensors"  # where it is trained on the data
FIRST_STAGE_LEDGER = EXPERIMENT + "/first_stage/ledger.json"
LATENTS = EXPERIMENT + "/first_stage/latents.npy"  # of all images, where the codec encodes them
LATENTS_MANIFEST = EXPERIMENT + "/first_stage/latents.json"
RECONSTRUCTION = EXPERIMENT + "/first_stage/reconstruction.json"
COST = EXPERIMENT + "/cost.json"
PLAN = EXPERIMENT + "/plan.json"
TABLE = EXPERIMENT + "/tables/{table}.{ext}"
PROTOCOLS = EXPERIMENT + "/tables/protocol.json"
FIGURE = EXPERIMENT + "/figures/{figure}.{ext}"
REPORT = EXPERIMENT + "/report.html"
SO_FAR = EXPERIMENT + "/so-far"
COMPARED = EXPERIMENT + "/compared/{other}"  # with another experiment
SO_FAR_REPORT = SO_FAR + "/report.html"

SEED = EXPERIMENT + "/seed{seed}"
DENSE = SEED + "/dense/{search}"
SNAPSHOTS = DENSE + "/snapshots"
SNAPSHOT = SNAPSHOTS + "/{interval}.safetensors"
DENSE_MASKS = DENSE + "/masks.npz"
DENSE_LAST = DENSE + "/last.safetensors"
DENSE_LEDGER = DENSE + "/ledger.json"
DENSE_STATS = DENSE + "/stats.jsonl"
DENSE_FILES = (SNAPSHOTS, DENSE_MASKS, DENSE_LAST, DENSE_LEDGER, DENSE_STATS)

TICKETS = SEED + "/tickets/{search}/{criterion}/{weights}"
MASKS = TICKETS + "/masks.npz"
MASKS_LEDGER = TICKETS + "/masks.ledger.json"
HAMMING = TICKETS + "/hamming.npz"
TICKET = TICKETS + "/{rate}.safetensors"
STORY = TICKETS + "/{rate}.json"  # rate: as `ticket` spells it

EXPERT = SEED + "/experts/{expert}"
MILESTONE = EXPERT + "/{milestone}.safetensors"
LEDGER = EXPERT + "/{milestone}.json"
STATS = EXPERT + "/{milestone}.stats.jsonl"

TENSORBOARD = EXPERIMENT + "/tensorboard"
PREVIEWS = EXPERIMENT + "/previews/seed{seed}/{of}"  # grids while training

RUN = SEED + "/runs/{run}"
SAMPLES = RUN + "/samples.npy"
SAMPLE_ITEMS = RUN + "/items.npy"  # where the codec keeps them
SAMPLES_PNG = RUN + "/samples.png"
SAMPLES_SVG = RUN + "/samples.svg"  # where the codec draws
SAMPLE_LEDGER = RUN + "/ledger.json"
METRICS = RUN + "/metrics.json"

TABLE_EXTENSIONS = ("csv", "md", "tex")
FIGURE_EXTENSIONS = ("pdf", "png")


def path(template: str, **parts: object) -> Path:
    """The path of a template with its wildcards filled in.

    Raises:
        KeyError: a wildcard without a value.
        UserError: a value that is no name, and would lead elsewhere: some come from files.
    """
    for value in map(str, parts.values()):
        if value in ("", ".", "..") or {"/", "\0"} & set(value):
            raise UserError(f"{value!r} is no name of a file")
    return Path(template.format(**parts))


def ticket(rate: float, interval: int | None = None) -> str:
    """The wildcard `rate` of a ticket: the asked rate, and after how many intervals where that is chosen."""
    return str(rate) if interval is None else f"{rate}-at{interval}"


def asked(ticket: str) -> tuple[float, int | None]:
    """The rate, and after how many intervals where that is chosen: the inverse of `ticket`."""
    rate, _, interval = ticket.partition("-at")
    return float(rate), int(interval) if interval else None


def weights_at(interval: int) -> str:
    """The wildcard `interval` of a snapshot: 0-based, or `initial` for the weights before any training."""
    return "initial" if interval == INITIAL else str(interval)


def parts(template: str, path: Path) -> dict[str, str] | None:
    """The wildcards that make `path` of a template, or None: the inverse of `path`."""
    found = _pattern(template).fullmatch(str(path))
    return found and found.groupdict()


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(template)))


def state_of(output: Path) -> Path:
    """The undeclared folder beside an output where its resumable state lives.

    Snakemake deletes a failed job's declared outputs; what a killed job needs to go on with
    must therefore not be one of them.
    """
    return output.parent / "state" / output.stem
