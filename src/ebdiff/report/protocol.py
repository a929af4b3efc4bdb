"""What the quality numbers are: their name, and the protocol behind them."""

from __future__ import annotations

from dataclasses import dataclass

from ebdiff.experiment.experiment import Experiment
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
    "legacy_pytorch": Measure("fid", "FID", "Inception features (legacy_pytorch, as the paper's script)"),
    "clean": Measure("clean_fid", "clean FID", "Inception features (clean-fid's resizing)"),
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


def published_notes(results: Results) -> list[str]:
    """How the paper's FID relates to ours."""
    experiment = results.experiment
    name, measure = paper.NAMES[experiment.published.dataset], shown(experiment)
    if comparable(experiment):
        apart = _apart(results)
        ours = f" Ours: {', '.join(apart)}." if apart else ""
        return [f"Paper FID ({name}): published values; differences are ours minus the paper's.{ours}"]
    others = ["another dataset"] if experiment.dataset.name != experiment.published.dataset else []
    others += [f"another metric than {measure.name}"] if measure.name != "FID" else []
    return [
        f"Paper FID ({name}): published values, {' and '.join(others)}; shown where the cell is the same."
    ]


def _apart(results: Results) -> list[str]:
    """What sets our runs apart from the paper's where the metric is the same."""
    experiment, apart = results.experiment, []
    dense = results.attempt(results.network, "dense")
    params = paper.unpruned_params(experiment)
    if dense and abs(dense["params"] / 1e6 / params - 1) > 0.01:
        apart.append(f"a network of {text.mega(dense['params'])} M parameters instead of {params:g} M")
    if experiment.published.expert_iterations:
        apart.append("other iterations, which stand for the paper's")
    elif experiment.scale != 1:
        apart.append(f"{text.number(experiment.scale)} of the paper's iterations")
    if experiment.sampling.images != paper.IMAGES:
        apart.append(f"{experiment.sampling.images:,} samples instead of {paper.IMAGES:,}")
    return apart


def _sentence(metrics: dict) -> str:
    """The protocol of one `metrics.json`, in words."""
    measure = MEASURES[metrics["protocol"]]
    entry = metrics.get("protocols", {}).get(metrics["protocol"], {})
    split = f" ({entry['split']})" if "split" in entry else ""
    mode = f", {entry['mode']}" if "mode" in entry else ""
    held_out = metrics.get("classifier_accuracy")
    accuracy = f" (held-out accuracy {held_out:.3f})" if held_out is not None else ""
    called = metrics["distance_name"]
    distance = "Fréchet distance" if called == measure.name else called
    parts = [
        f"{measure.name}: {distance} between {metrics['images']} samples and "
        f"{metrics['reference_images']} real images{split}, in {measure.features}{accuracy}{mode}; "
        "KID in the same features."
    ]
    details = _details(entry)
    parts += [f"Computed with {details}."] if details else []
    parts += ["It can't be compared with values of other features."] if measure.name != "FID" else []
    scale = [
        f"{words} {metrics[key]['fd']:.{decimals}f}"
        for key, words, decimals in (("floor", "real images against real images", 2), ("ceiling", "noise", 0))
        if metrics.get(key)
    ]
    parts += [f"For scale: {', '.join(scale)}."] if scale else []
    return " ".join(parts)


def _details(entry: dict) -> str:
    """What numbers of a protocol depend on beside the images: weights, device, versions."""
    found = [f"weights {entry['weights_sha256'][:12]}"] if "weights_sha256" in entry else []
    found += [f"{name} {version}" for name, version in entry.get("versions", {}).items()]
    found += [f"on {entry['device']}"] if "device" in entry else []
    return ", ".join(found)
