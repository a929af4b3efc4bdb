"""The stages of the tiny experiment, run in this process, and one file of each kind that they leave."""

import sys

from ebdiff import cli
from ebdiff.experiment import layout
from ebdiff.system import files

EXPERT = "full-magnitude-ema-0.5-t0-1000"
# Every key but the name of a file: one of each kind that a stage reads.
WHERE = dict(
    experiment="tiny", dataset="digits", seed=0, search="full", criterion="magnitude", weights="ema",
    rate=0.5, expert=EXPERT, milestone=40, run="eb-50", protocol="classifier", number="all",
)  # fmt: skip
EB = ("finetune-region", "tiny", "--expert", EXPERT, "--milestone", "40")
DENSE = ("finetune-region", "tiny", "--expert", "dense-full", "--milestone", "80")
RANDOM = ("select-eb-epoch", "tiny", "--rate", "0.5", "--criterion", "random")
FID = ("fid", "tiny", "--run", "eb-50")
SAMPLE = ("sample", "tiny", "--run", "eb-50")
TABLE = ("tabulate", "tiny")
STAGES = [
    ("train-classifier", "digits"), ("reference-stats", "digits"), ("measure-cost", "tiny"),
    ("train-dense", "tiny"), ("prune-per-epoch", "tiny"), ("hamming-matrix", "tiny"),
    ("prune-per-epoch", "tiny", "--weights", "raw"), ("hamming-matrix", "tiny", "--weights", "raw"),
    *(("select-eb-epoch", "tiny", "--rate", rate) for rate in ("0.3", "0.5", "0.8")), EB, DENSE,
    ("prune-per-epoch", "tiny", "--search", "final"),
    ("finetune-region", "tiny", "--expert", "full-magnitude-ema-0.3-t0-260", "--milestone", "20"),
    ("finetune-region", "tiny", "--expert", "full-magnitude-ema-0.8-t240-1000", "--milestone", "20"),
    *((verb, "tiny", "--run", run) for run in ("unpruned", "eb-50", "ta-eb") for verb in ("sample", "fid")),
]  # fmt: skip


def run(*arguments):
    """A verb in this process: its exit status."""
    before = sys.argv
    sys.argv = ["ebdiff", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = before
    return 0


def path_of(template):
    """The file of a kind that the stages above read."""
    if template == layout.SNAPSHOT:
        story = files.read_json(layout.path(layout.STORY, **WHERE))
        return layout.path(template, interval=story["interval"], **WHERE)
    return layout.path(template, **WHERE)
