"""The trainings that the workflow asks for (verbs `train-dense` and `finetune-region`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ebdiff.cost.accounting import every_network, mask_seconds, search_steps
from ebdiff.data.dataset import open_dataset
from ebdiff.diffusion.process import Process
from ebdiff.diffusion.timesteps import Antithetic, SpeeD, TimestepLaw
from ebdiff.experiment import layout, places
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.jobs import Job as Stage
from ebdiff.experiment.records import Records, Work, opened
from ebdiff.experiment.runs import HOOKS, Budget, Expert
from ebdiff.experiment.schema import AFTER_DENSE, Span
from ebdiff.experiment.sparsity import METHODS
from ebdiff.nets import store
from ebdiff.nets.checkpoints import load_checkpoint
from ebdiff.nets.denoiser import Denoiser
from ebdiff.nets.execution import Runtime
from ebdiff.pruning.count import meta_tensors
from ebdiff.system import parallel
from ebdiff.system.errors import Missing, Unusable, UserError
from ebdiff.system.files import held, read_json, write_json, write_text
from ebdiff.system.ledger import ledger
from ebdiff.tickets.history import save_histories
from ebdiff.tickets.watch import Watch
from ebdiff.training.hooks import Hook
from ebdiff.training.loop import Job, train
from ebdiff.training.preview import Preview
from ebdiff.training.resume import Place, resumable
from ebdiff.training.state import State


def train_dense(experiment: Experiment, name: str, seed: int, device: torch.device) -> None:
    """Train the dense network of a search until its tickets settled, or to its horizon.

    Writes snapshots, masks of every interval (raw and averaged), the full state at the end, and a
    ledger. Killed and called again, it goes on and ends with the same bits.
    """
    search = experiment.searches[name]
    work = Work(experiment, "train-dense", seed=seed, search=name)
    dataset = open_dataset(experiment)
    runtime = Runtime.of(experiment, "training", "dense", device)
    with resumable(work.path(layout.DENSE_LAST), experiment.architecture, work.stamp, runtime) as place:
        state = place.state
        if state is None:
            state = State.start(store.fresh(experiment.architecture, seed, f"dense/{name}"), runtime)
        every = experiment.interval_steps(name, len(dataset))
        watch = Watch(experiment, search, every, place.snapshots, device)
        job = Job(
            name=f"dense/{name}",
            seed=seed,
            dataset=dataset,
            law=Antithetic(*search.span),
            process=Process(experiment.diffusion),
            training=experiment.training,
            runtime=runtime,
            stats=place.stats,
        )
        looks = _previews(experiment, job, "dense", f"search-{name}", search.span)
        train(state, job, every * search.horizon, hooks=[watch, *looks], save=place.keep)

        if parallel.first():
            state.hooks = ()  # the masks get a file of their own
            save_histories(work.path(layout.DENSE_MASKS), watch.histories)
            watch.publish(work.path(layout.SNAPSHOTS))
            intervals = len(watch.histories["raw"].masks)
            _finish(
                work, place, state, runtime, (layout.DENSE_LAST, layout.DENSE_STATS, layout.DENSE_LEDGER),
                intervals=intervals,
                horizon=search.horizon,
                stopped="settled" if intervals < search.horizon else "horizon",
                settled={f"{kind} {rate}": at for (kind, rate), at in watch.first_settled.items()},
            )  # fmt: skip


def _finish(
    work: Work, place: Place, state: State, runtime: Runtime, templates: tuple[str, str, str], **told: Any
) -> None:
    """Write what every training leaves: its state, its readings, and a ledger of all steps so far."""
    output, stats, spent = map(work.path, templates)
    what = {k: v for k, v in work.job.where.items() if k != "experiment"}
    state.save(output, work.job.experiment.architecture, what)
    write_text(stats, place.stats.read_text(encoding="utf-8"))
    entry = ledger(
        runtime.device,
        **what,
        steps=state.step,
        seconds=round(state.seconds, 3),
        device_seconds=round(state.device_seconds, 3),
        images=state.step * work.job.experiment.training.batch,
        **told,
        processes=state.processes,
    )
    write_json(spent, entry)
    work.end()


def milestone_steps(experiment: Experiment, expert: Expert, milestone: str, seed: int) -> int:
    """Steps of a milestone: the number itself, or as many as a budget allows.

    cost.json gives times and FLOPs per step; ticket stories the steps that searches are charged, ledgers
    their masks' seconds.
    """
    budget = Budget.of(milestone)
    if budget is None:
        return int(milestone)
    cost, charged = read_json(layout.path(layout.COST, experiment=experiment.name)), places.charged
    told = [read_json(p) for p in places.stories(experiment, charged(experiment, expert, budget), seed)]

    def ledger(search: str, criterion: str, weights: str) -> dict[str, Any]:
        ticket = dict(search=search, criterion=criterion, weights=weights)
        return read_json(layout.path(layout.MASKS_LEDGER, experiment=experiment.name, seed=seed, **ticket))

    masks = sum(mask_seconds(experiment, told, ledger).values())
    return budget_steps(experiment, expert, budget, every_network(cost), told, masks)


def budget_steps(
    experiment: Experiment,
    expert: Expert,
    budget: Budget,
    networks: Mapping[str, Mapping[str, Any]],
    stories: Iterable[Mapping[str, Any]],
    mask_seconds: float,
) -> int:
    """Steps of an expert that cost as much as a budget, by measured `step_ms` or by `training_flops`.

    Args:
        experiment, expert: whose steps.
        budget: what they may cost.
        networks: what a step of every network costs, as `every_network` gives it.
        stories: of the tickets that `places.charged` names.
        mask_seconds: charged to their masks.

    Raises:
        UserError: the expert's own search takes all of it.
    """

    def step(e: Expert) -> float:
        return networks[e.costs][budget.unit] / networks["dense"][budget.unit]

    dense_ms = networks["dense"]["step_ms"]
    before = sum(search_steps(stories).values()) + 1e3 * mask_seconds / dense_ms
    if budget.run is None:
        affords = 60e3 * budget.minutes / dense_ms - before
        if affords <= 0:
            raise UserError(
                f"iterations: {budget.minutes}min are over before {expert.key} begins; give it more"
            )
    else:
        run = experiment.runs[budget.run]
        before += experiment.dense.iterations if run.method in AFTER_DENSE else 0
        affords = sum(e.iterations * step(e) for e in run.experts) + before
    return max(1, round(affords / step(expert)))


def _initial(experiment: Experiment, expert: Expert, stream: str, seed: int) -> Denoiser:
    """The network at step 0: a ticket, a ticket's dense snapshot, or fresh weights."""
    if expert.init == "dense":
        return store.fresh(experiment.architecture, seed, stream)
    if expert.init == "fresh":
        shapes = meta_tensors(experiment.architecture, expert.rate or 0)
        return store.fresh(experiment.architecture, seed, stream, shapes)
    if expert.init == "inherit":
        tensors, architecture, _ = store.load(places.ticket_of(experiment, expert, layout.TICKET, seed))
        return store.build(architecture, tensors)
    interval = read_json(places.ticket_of(experiment, expert, layout.STORY, seed))["interval"]
    tensors, architecture, _ = store.load(
        places.snapshot(experiment, expert.search, seed, interval), f"{expert.weights}."
    )
    return store.build(architecture, tensors)


def _previews(experiment: Experiment, job: Job, network: str, of: str, span: Span) -> list[Hook]:
    """Looks at samples on the way, where they are asked for and the network knows all timesteps."""
    if experiment.training.sample_every is None or span != (0, experiment.diffusion.timesteps):
        return []
    folder = layout.path(layout.PREVIEWS, experiment=experiment.name, seed=job.seed, of=of)
    return [Preview(experiment, job, network, folder)]


def _law(experiment: Experiment, expert: Expert) -> TimestepLaw:
    """The timestep law of an expert, on its span."""
    if expert.law == "speed":
        return SpeeD(*expert.span, experiment.diffusion, experiment.speed)
    return Antithetic(*expert.span)


def _beginning(
    experiment: Experiment, key: str, milestone: str, seed: int, steps: int, runtime: Runtime, place: Place
) -> State:
    """The state a milestone starts from: the furthest one on its way, a checkpoint, or step 0.

    Milestones that the experiment listed before serve, too: raising `iterations` trains the difference.
    What an unfinished training kept, this one's or another's, is in its `place` already.
    """
    expert = experiment.experts()[key]
    if places.is_given(experiment, key, milestone):
        tensors = load_checkpoint(places.checkpoint(experiment), experiment.architecture)
        state = State.start(store.build(experiment.architecture, tensors), runtime)
        state.step = steps  # trained elsewhere: its steps count, its seconds aren't known
        return state
    paths = Stage.of(experiment, "finetune-region", seed=seed, expert=key, milestone=milestone).continues
    paths += _on_disk(experiment, key, seed)
    done = {path: store.story(path)["step"] for path in paths}
    kept = place.state.step if place.state else 0
    started = [path for path in paths if kept < done[path] <= steps]
    if started:
        furthest = max(started, key=done.__getitem__)
        if parallel.first():
            place.stats.unlink(missing_ok=True)  # of the kept state, which isn't as far
            if (where := layout.parts(layout.MILESTONE, furthest)) is not None:
                with suppress(Missing, Unusable):  # its curve goes on, too
                    Records(experiment).check(stats := layout.path(layout.STATS, **where))
                    write_text(place.stats, stats.read_text(encoding="utf-8"))
        return State.load(furthest, runtime)
    return place.state or State.start(_initial(experiment, expert, _stream(expert), seed), runtime)


def _on_disk(experiment: Experiment, key: str, seed: int) -> list[Path]:
    """Milestones of an expert that lie there, listed or not, and are what would be trained on the way."""
    records, found = Records(experiment), []
    folder = layout.path(
        layout.MILESTONE, experiment=experiment.name, seed=seed, expert=key, milestone=1
    ).parent
    for path in folder.glob("[0-9]*.safetensors"):
        with suppress(Missing, Unusable):
            records.check(path)
            found.append(path)
    return found


def _unfinished(work: Work, steps: int) -> Iterator[Path]:
    """Records of states that the expert's training to other milestones kept and one to `steps` comes by.

    As of finished ones, their settings and all that they were made from must be those of now. A job that is
    at work keeps its own to itself.
    """
    records, job = Records(work.job.experiment), work.job
    for folder in job.state.parent.glob("[0-9]*/"):
        other = replace(job, where={**job.where, "milestone": folder.name})
        if other.state == job.state or held(folder):
            continue
        for record in folder.glob("[0-9]*.json"):
            with suppress(UserError, OSError, KeyError, TypeError, ValueError):  # none of ours
                found, read = opened(record), {str(path): records.check(path) for path in other.reads}
                agrees = found["settings"] == records.settings(other)
                if agrees and read.items() <= found["inputs"].items() and int(record.stem) <= steps:
                    yield record


def _stream(expert: Expert) -> str:
    """Whose randomness an expert's training uses.

    The unpruned network goes on with its search's: same bits as never having stopped.
    """
    return f"dense/{expert.search}" if expert.continues_search else f"expert/{expert.key}"


def finetune_region(
    experiment: Experiment, key: str, milestone: str, seed: int, device: torch.device
) -> None:
    """Train an expert on its span up to a milestone, from where the previous one ended.

    Writes the full training state, its readings and a ledger of all steps so far. Killed and
    called again, it goes on and ends with the same bits.
    """
    work = Work(experiment, "finetune-region", seed=seed, expert=key, milestone=milestone)
    expert = experiment.experts()[key]
    steps = milestone_steps(experiment, expert, milestone, seed)
    runtime = Runtime.of(experiment, "training", expert.network, device)
    output, others = work.path(layout.MILESTONE), _unfinished(work, steps)
    with resumable(output, experiment.architecture, work.stamp, runtime, others) as place:
        state = _beginning(experiment, key, milestone, seed, steps, runtime, place)
        job = Job(
            name=_stream(expert),
            seed=seed,
            dataset=open_dataset(experiment),
            law=_law(experiment, expert),
            process=Process(experiment.diffusion),
            training=experiment.training,
            runtime=runtime,
            stats=place.stats,
        )
        hooks = [HOOKS.member(name)(config, job) for name, config in expert.hooks.items()]
        if expert.sparse:
            hooks.append(METHODS.member(expert.sparse.method)(expert.sparse, job))
        hooks += _previews(experiment, job, expert.network, key, expert.span)
        train(state, job, steps, hooks=hooks, save=place.keep)
        if parallel.first():
            told = {key: value for hook in hooks for key, value in hook.told().items()}
            _finish(work, place, state, runtime, (layout.MILESTONE, layout.STATS, layout.LEDGER), **told)
