"""Which files a stage reads: asked by the rules before anything runs, and by the verbs when they do.

Verbs also check that what they read was made under the experiment's settings, as Snakemake does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ebdiff.experiment import layout
from ebdiff.experiment.digests import settings
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.runs import Expert
from ebdiff.experiment.schema import FINAL
from ebdiff.system.errors import Unusable, UserError, unknown
from ebdiff.system.files import read_arrays, read_json, read_told


def check(experiment: Experiment, paths: Iterable[Path]) -> None:
    """Refuse files that were made under other settings than the experiment's; of a folder, all in it.

    What isn't there is left to whoever reads it.

    Raises:
        Unusable: one was made for other settings, or is damaged.
    """
    for path in paths:
        for file in sorted(path.glob("[!.]*")) if path.is_dir() else [path]:
            expected = settings(experiment, file)
            if expected is not None and file.exists() and _carried(file) not in (None, expected):
                raise Unusable(file, "made for other settings")


def _carried(path: Path) -> str | None:
    """The settings that a file was made under, where it says so."""
    if path.suffix == ".json":
        return read_json(path).get("settings")
    if path.suffix == ".npz":
        found = read_arrays(path).get("settings")
        return None if found is None else str(found)
    return read_told(path).get("story", {}).get("settings")


def given(path: str, key: str) -> Path | None:
    """A path of the experiment, `~`, `${VARIABLE}` and `${VARIABLE:-default}` filled in; None if empty.

    Args:
        path: the text.
        key: where it stands, for messages.

    Raises:
        UserError: a variable without default isn't set, or there is no such home.
    """

    def value(match: re.Match) -> str:
        found = os.environ.get(match["name"]) or match["default"]
        if found is None:
            raise UserError(
                f"{key}: the environment variable {match['name']} is not set; "
                f"export {match['name']}=/where/it/is, or write the path itself"
            )
        return found

    filled = re.sub(r"\$\{(?P<name>\w+)(:-(?P<default>[^}]*))?\}", value, path)
    try:
        return Path(filled).expanduser() if filled else None
    except RuntimeError as error:
        raise UserError(f"{key}: {path!r}: {error}") from None


def final_path(experiment: Experiment, seed: int | str) -> Path:
    """The finished unpruned network, which the search `final` reads."""
    return layout.path(
        layout.MILESTONE,
        experiment=experiment.name,
        seed=seed,
        expert=experiment.final_expert.key,
        milestone=experiment.dense.iterations,
    )


def snapshots(experiment: Experiment, search: str, seed: int | str) -> Path:
    """The snapshots of a search: a folder, or for `final` the unpruned network's last milestone."""
    if search == FINAL:
        return final_path(experiment, seed)
    return layout.path(layout.SNAPSHOTS, experiment=experiment.name, seed=seed, search=search)


def snapshot(experiment: Experiment, search: str, seed: int | str, interval: int) -> Path:
    """Weights at the end of an interval (0-based) of a search."""
    if search == FINAL:
        return final_path(experiment, seed)
    where = dict(experiment=experiment.name, seed=seed, search=search)
    return layout.path(layout.SNAPSHOT, interval=interval, **where)


def taken_while_training(search: str, criterion: str) -> bool:
    """Whether `train-dense` recorded the masks itself, so that nothing needs computing."""
    return search != FINAL and criterion == "magnitude"


def masks(experiment: Experiment, search: str, criterion: str, weights: str, seed: int | str) -> list[Path]:
    """What `prune-per-epoch` reads: masks taken while training; for gradients, snapshots and images too.

    Raises:
        UserError: the search takes no masks of that criterion.
    """
    known = {"magnitude"}  # taken while training, whatever tickets are asked for
    known.update(("taylor", "diff-pruning") if search == FINAL else experiment.searches[search].criteria)
    if criterion not in known:
        raise UserError(f"search {search!r}: no masks of criterion {unknown(criterion, known)}")
    where = dict(experiment=experiment.name, seed=seed, search=search)
    found = [final_path(experiment, seed)] if search == FINAL else [layout.path(layout.DENSE_MASKS, **where)]
    if criterion == "magnitude":
        return found
    if search != FINAL:
        found.append(snapshots(experiment, search, seed))
    data = (layout.IMAGES, layout.MANIFEST)
    return found + [layout.path(t, dataset=experiment.dataset.name) for t in data]


def ticket(
    experiment: Experiment, search: str, criterion: str, weights: str, rate: float | str, seed: int | str
) -> list[Path]:
    """What `select-eb-epoch` reads: snapshots, and masks, or for a random ticket the magnitude
    ticket's story (for `final`, nothing more).

    Raises:
        UserError: the search doesn't look for that rate.
    """  # fmt: skip
    if float(rate) not in experiment.rates_of(search):
        raise UserError(f"search {search!r}: rate {unknown(str(rate), experiment.rates_of(search))}")
    where = dict(experiment=experiment.name, seed=seed, search=search, weights=weights)
    manifest = layout.path(layout.MANIFEST, dataset=experiment.dataset.name)  # tells an epoch's steps
    found = [snapshots(experiment, search, seed), manifest]
    if criterion != "random":
        found.append(layout.path(layout.MASKS, criterion=criterion, **where))
    elif search != FINAL:
        found.append(layout.path(layout.STORY, criterion="magnitude", rate=rate, **where))
    return found


def ticket_parts(expert: Expert) -> dict[str, object]:
    """The wildcards of an expert's ticket."""
    return {k: getattr(expert, k) for k in ("search", "criterion", "weights", "rate")}


def stories(experiment: Experiment, run: str, seed: int | str) -> list[Path]:
    """The stories of the tickets that a run's experts start from."""
    return [
        layout.path(layout.STORY, experiment=experiment.name, seed=seed, **ticket_parts(expert))
        for expert in experiment.runs[run].experts
        if expert.needs_ticket
    ]


def is_given(experiment: Experiment, key: str, milestone: str) -> bool:
    """Whether a milestone is the public checkpoint of `dense.from`, with nothing to train."""
    unpruned = experiment.experts()[key].continues_search
    return bool(experiment.dense.source) and unpruned and milestone == str(experiment.dense.iterations)


def beginnings(experiment: Experiment, key: str, milestone: str, seed: int | str) -> list[Path]:
    """Training states a milestone may continue: its predecessor's and, unpruned, the search's.

    A public checkpoint taken as the unpruned network is its own beginning.
    """
    where = dict(experiment=experiment.name, seed=seed)
    if is_given(experiment, key, milestone):
        found = given(experiment.dense.source, "dense.from")
        if found is None:
            raise UserError(f"dense.from: nothing is left of {experiment.dense.source!r}")
        if {"{", "}"} & set(str(found)):
            raise UserError(f"dense.from: {str(found)!r}: rename it, the workflow takes braces for wildcards")
        return [found]
    found = []
    before = experiment.previous_milestone(key, milestone)
    if before is not None:
        found.append(layout.path(layout.MILESTONE, expert=key, milestone=before, **where))
    expert = experiment.experts()[key]
    if expert.continues_search and not experiment.dense.source:
        found.append(layout.path(layout.DENSE_LAST, search=expert.search, **where))
    return found


def expert(experiment: Experiment, key: str, milestone: str, seed: int | str) -> list[Path]:
    """What `finetune-region` reads beside the images: states, tickets, and costs for `like-RUN`.

    Raises:
        UserError: no run has the expert at that milestone.
    """
    spec = experiment.experts()[key]
    known = [str(m) for m in experiment.all_milestones(key)]
    if milestone not in known:
        raise UserError(f"expert {key}: milestone {unknown(milestone, known)}")
    where = dict(experiment=experiment.name, seed=seed, **ticket_parts(spec))
    found = beginnings(experiment, key, milestone, seed)
    if spec.init == "inherit":
        found.append(layout.path(layout.TICKET, **where))
    if spec.init == "snapshot":
        found += [layout.path(layout.STORY, **where), snapshots(experiment, spec.search, seed)]
    if milestone.startswith("like-"):
        found.append(layout.path(layout.COST, experiment=experiment.name))
        found += stories(experiment, milestone.removeprefix("like-"), seed)
    return found


def reference(dataset: str, protocol: str) -> list[Path]:
    """What `reference-stats` reads."""
    found = [layout.path(t, dataset=dataset) for t in (layout.IMAGES, layout.MANIFEST)]
    return found + _feature_network(dataset, protocol)


def _feature_network(dataset: str, protocol: str) -> list[Path]:
    """The network of a protocol, where a rule makes it; Inception's weights are checked by hash."""
    return [layout.path(layout.CLASSIFIER, dataset=dataset)] if protocol == "classifier" else []


def references(experiment: Experiment) -> list[Path]:
    """What `fid` reads beside the samples: each protocol's reference, and the classifier where asked."""
    dataset, settings = experiment.dataset.name, experiment.evaluation
    found = [layout.path(layout.MANIFEST, dataset=dataset)]
    for protocol in settings.protocols:
        where = dict(dataset=dataset, protocol=protocol, number=settings.reference_count)
        found += [layout.path(t, **where) for t in (layout.REFERENCE, layout.REFERENCE_FEATURES)]
        found += _feature_network(dataset, protocol)
    return found


def experts(experiment: Experiment, run: str, seed: int | str) -> list[Path]:
    """What `sample` reads: the milestone of each of a run's experts."""
    where = dict(experiment=experiment.name, seed=seed)
    return [
        layout.path(layout.MILESTONE, expert=e.key, milestone=e.iterations, **where)
        for e in experiment.runs[run].experts
    ]
