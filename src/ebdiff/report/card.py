"""What is handed over: an ensemble as one file, and beside it the card that says what it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ebdiff.experiment import layout
from ebdiff.experiment.experiment import Experiment
from ebdiff.report import notes
from ebdiff.report.results import Results
from ebdiff.system.errors import UserError
from ebdiff.system.files import replacing, sha256, write_text

if TYPE_CHECKING:
    from ebdiff.diffusion.ensemble import Ensemble


def export(experiment: Experiment, ensemble: Ensemble, out: Path) -> Path:
    """Write an ensemble of an experiment as one file, and its card in Markdown; give the card's path.

    The card comes first, so that no file is without; killed in between, the same command goes on. Its numbers
    are those of metrics.json of the run and seed, with their protocols; without them it says that nothing was
    measured.

    Args:
        experiment: whose.
        ensemble: of one of its runs.
        out: NAME.safetensors; the card is NAME.md.

    Raises:
        UserError: another suffix, or one of the files is there already; the data's manifest can't be used.
    """
    card = out.with_suffix(".md")
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: call it NAME.safetensors")
    if out.exists():
        raise UserError(f"{out}: exists already; choose another name")
    results, story = Results(experiment, partial=True), ensemble.story
    data = dict(results.file(layout.MANIFEST))
    origin = Path(data["origin"])
    if origin.is_absolute():
        data["origin"] = origin.name  # where the images lie here is nobody's business
    with replacing(out) as temporary:
        ensemble.write(temporary, {key: data[key] for key in ("title", "origin", "licence")})
        told = notes.template("card.md.j2").render(
            experiment=experiment,
            run=experiment.runs[story["run"]],
            ensemble=ensemble,
            name=out.name,
            sha256=sha256(temporary),
            data=data,
            metrics=results.attempt(results.metrics, story["run"], story["seed"]),
        )
        if card.exists() and not (card.is_file() and card.read_bytes() == f"{told}\n".encode()):
            raise UserError(f"{card}: exists already; choose another name")
        write_text(card, f"{told}\n")
    return card
