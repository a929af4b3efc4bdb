"""What the quality numbers are: their name, and the protocol behind them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ebdiff.config import Experiment
from ebdiff.report import paper, text
from ebdiff.report.facts import RunFacts
from ebdiff.report.results import Results

MARK = "‡"  # a Fréchet distance of too few images


@dataclass(frozen=True)
class Measure:
    """How a protocol's Fréchet distance is called.

    Attributes:
        key: its column in the csv.
        name: its heading.
        features: what the distance lives in.
    """

    key: str
    name: str
    features: str


MEASURES = {
    "classifier": Measure("cfd", "cFD", "the features of a small classifier"),
    "legacy_pytorch": Measure(
        "fid", "FID", "Inception features, images resized bilinearly without filtering (legacy_pytorch)"
    ),
    "clean": Measure("clean_fid", "clean FID", "Inception features, images resized bicubically (clean)"),
}


def shown(experiment: Experiment) -> Measure:
    """The measure that tables and figures show."""
    return MEASURES[experiment.evaluation.protocols[0]]


def comparable(experiment: Experiment) -> bool:
    """Whether our numbers are of the same kind as the published ones: the paper's FID of its dataset."""
    same_data = experiment.dataset.name == experiment.published.dataset
    return same_data and experiment.evaluation.protocols[0] == "legacy_pytorch"


def notes(results: Results, rows: list[RunFacts]) -> list[str]:
    """How quality was measured, from the metrics that are there; one line per way."""
    found = []
    for facts in rows:
        for seed in facts.seeds:
            metrics = results.attempt(results.metrics, facts.name, seed)
            found += [_sentence(metrics)] if metrics else []
    if any(facts.ill_conditioned for facts in rows):
        found.append(
            f"{MARK} Fewer than four images per feature: the Fréchet distance is ill-conditioned and "
            "too high. KID doesn't suffer from that."
        )
    return list(dict.fromkeys(found))


def published_note(experiment: Experiment) -> list[str]:
    """How the paper's FID relates to ours."""
    name, measure = paper.NAMES[experiment.published.dataset], shown(experiment)
    if not comparable(experiment):
        others = ["another dataset"] if experiment.dataset.name != experiment.published.dataset else []
        others += [f"another metric than {measure.name}"] if measure.name != "FID" else []
        return [
            f"Paper FID ({name}): published values, {' and '.join(others)}; shown where the cell is the same."
        ]
    apart = []
    if experiment.scale != 1:
        apart.append(f"{text.number(experiment.scale)} of the paper's iterations")
    if experiment.sampling.images != paper.IMAGES:
        apart.append(f"{experiment.sampling.images} samples instead of {paper.IMAGES}, which raises FID")
    ours = f" Ours are from {' and '.join(apart)}." if apart else ""
    return [f"Paper FID ({name}): published values; differences are ours minus the paper's.{ours}"]


def _sentence(metrics: dict) -> str:
    """The protocol of one `metrics.json`, in words."""
    measure = MEASURES[metrics["protocol"]]
    held_out = metrics.get("classifier_accuracy")
    accuracy = f" (held-out accuracy {held_out:.3f})" if held_out is not None else ""
    parts = [
        f"{measure.name}: {metrics['distance_name']} between {metrics['images']} samples and "
        f"{metrics['reference_images']} real training images, in {measure.features}{accuracy}; "
        "KID in the same features."
    ]
    details = _details(metrics.get("protocols", {}).get(metrics["protocol"], {}))
    parts += [f"{'; '.join(details)}."] if details else []
    parts += ["It can't be compared with values of other features."] if measure.name != "FID" else []
    scale = [
        f"{words} {metrics[key]['fd']:.{decimals}f}"
        for key, words, decimals in (("floor", "real images against real images", 2), ("ceiling", "noise", 0))
        if metrics.get(key)
    ]
    parts += [f"For scale: {', '.join(scale)}."] if scale else []
    return " ".join(parts)


def _details(facts: dict) -> list[str]:
    """What a protocol says of itself beside its numbers: split, weights, versions."""
    found = []
    for key, value in facts.items():
        if isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
            found.append(f"{key} {', '.join(f'{name} {version}' for name, version in value.items())}")
        elif isinstance(value, str) and key != "distance_name":
            short = value[:12] if re.fullmatch(r"[0-9a-f]{32,}", value) else value
            found.append(f"{key.replace('_', ' ')} {short}")
    return found
