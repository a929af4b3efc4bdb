"""The trainings that the workflow asks for (verbs `train-dense` and `finetune-region`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ebdiff.cost.accounting import AFTER_DENSE, TrainedExpert, like_iterations, search_steps
from ebdiff.data.dataset import open_dataset
from ebdiff.diffusion.process import Process
from ebdiff.diffusion.timesteps import Antithetic, SpeeD, TimestepLaw
from ebdiff.experiment import inputs, layout
from ebdiff.experiment.digests import dense_digest, expert_digest, settings
from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.runs import HOOKS, Expert, Run
from ebdiff.nets import store
from ebdiff.nets.checkpoints import load_checkpoint
from ebdiff.nets.denoiser import Denoiser
from ebdiff.nets.execution import Runtime
from ebdiff.pruning.count import meta_tensors
from ebdiff.system import parallel
from ebdiff.system.files import read_json, sha256, write_json, write_text
from ebdiff.system.ledger import ledger
from ebdiff.tickets.history import save_histories
from ebdiff.tickets.watch import Watch
from ebdiff.training.loop import Job, train
from ebdiff.training.resume import resumable, stamp
from ebdiff.training.state import State


def train_dense(experiment: Experiment, name: str, seed: int, device: torch.device) -> None:
    """Train the dense network of a search until its tickets settled, or to its horizon.

    Writes snapshots, masks of every interval (raw and averaged), the full state at the end, and a
    ledger. Killed and called again, it goes on and ends with the same bits.
    """
    search, training = experiment.searches[name], experiment.training
    where = dict(experiment=experiment.name, seed=seed, search=name)
    last = layout.path(layout.DENSE_LAST, **where)
    dataset = open_dataset(experiment)
    runtime = Runtime.of(experiment, "training", "dense", device)
    expected = stamp(dense_digest(experiment, name), dataset.sha256, [])
    what = {"search": name, "seed": seed, "settings": settings(experiment, last)}
    with resumable(last, what, expected, runtime) as place:
        state = place.state
        if state is None:
            network = store.fresh(experiment.architecture, seed, f"dense/{name}")
            state = State.start(network, runtime)
        every = search.interval.steps or experiment.epoch_steps(len(dataset))
        watch = Watch(experiment, search, every, place.folder / "snapshots", what["settings"], device)
        job = Job(
            name=f"dense/{name}",
            seed=seed,
            dataset=dataset,
            law=Antithetic(*search.span),
            process=Process(experiment.diffusion),
            training=training,
            runtime=runtime,
            stats=place.stats,
        )
        train(state, job, every * search.horizon, hooks=[watch], save=place.saver(experiment.architecture))

        if not parallel.first():
            return
        state.hooks = ()  # the masks go into a file of their own
        state.save(last, experiment.architecture, place.story)
        save_histories(layout.path(layout.DENSE_MASKS, **where), watch.histories, what["settings"])
        watch.publish(layout.path(layout.SNAPSHOTS, **where))
        write_text(layout.path(layout.DENSE_STATS, **where), place.stats.read_text())
        intervals = len(watch.histories["raw"].masks)
        entry = ledger(
            device,
            **what,
            steps=state.step,
            seconds=round(state.seconds, 3),
            device_seconds=round(state.device_seconds, 3),
            images=state.step * training.batch,
            intervals=intervals,
            horizon=search.horizon,
            stopped="settled" if intervals < search.horizon else "horizon",
            settled={f"{kind} {rate}": at for (kind, rate), at in watch.first_settled.items()},
            processes=state.processes,
            execution=runtime.told(),
            stats_sha256=sha256(place.stats),
        )
        write_json(layout.path(layout.DENSE_LEDGER, **where), entry)


def milestone_steps(experiment: Experiment, expert: Expert, milestone: str, seed: int) -> int:
    """Steps of a milestone: the number itself, or for `like-RUN` as many as cost the same.

    Equal means equal measured device time, the other run's search included: cost.json gives the
    times per step, that run's ticket stories the steps its search is charged.
    """
    if not milestone.startswith("like-"):
        return int(milestone)
    other = milestone.removeprefix("like-")
    networks = read_json(layout.path(layout.COST, experiment=experiment.name))["networks"]
    stories = [read_json(path) for path in inputs.stories(experiment, other, seed)]
    return like_steps(experiment, expert, experiment.runs[other], networks, stories)


def like_steps(
    experiment: Experiment,
    expert: Expert,
    run: Run,
    networks: Mapping[str, Mapping[str, Any]],
    stories: Iterable[Mapping[str, Any]],
) -> int:
    """Steps of an expert that cost the same device time as a run, by measured `step_ms`.

    Args:
        experiment, expert: whose steps.
        run: the run to be like.
        networks: `step_ms` of every network, as in cost.json.
        stories: of that run's tickets.
    """

    def step_time(e: Expert) -> float:
        return networks[e.network]["step_ms"] / networks["dense"]["step_ms"]

    trained = [TrainedExpert(e.iterations, step_time(e)) for e in run.experts]
    before = sum(search_steps(stories).values())
    if run.method in AFTER_DENSE:
        before += experiment.dense.iterations
    return like_iterations(trained, before, step_time(expert))


def _initial(experiment: Experiment, expert: Expert, stream: str, seed: int) -> Denoiser:
    """The network at step 0: a ticket, a ticket's dense snapshot, or fresh weights."""
    if expert.init == "dense":
        return store.fresh(experiment.architecture, seed, stream)
    if expert.init == "fresh":
        shapes = meta_tensors(experiment.architecture, expert.rate)
        return store.fresh(experiment.architecture, seed, stream, shapes)
    where = dict(experiment=experiment.name, seed=seed, **inputs.ticket_parts(expert))
    if expert.init == "inherit":
        tensors, architecture, _ = store.load(layout.path(layout.TICKET, **where))
        return store.build(architecture, tensors)
    interval = read_json(layout.path(layout.STORY, **where))["interval"]
    tensors, architecture, _ = store.load(
        inputs.snapshot(experiment, expert.search, seed, interval), f"{expert.weights}."
    )
    return store.build(architecture, tensors)


def _law(experiment: Experiment, expert: Expert) -> TimestepLaw:
    """The timestep law of an expert, on its span."""
    if expert.law == "speed":
        return SpeeD(*expert.span, experiment.diffusion, experiment.speed)
    return Antithetic(*expert.span)


def _beginning(
    experiment: Experiment, key: str, milestone: str, seed: int, steps: int, runtime: Runtime
) -> State:
    """The state a milestone starts from: the furthest one on its way, a checkpoint, or step 0."""
    expert = experiment.experts()[key]
    paths = inputs.beginnings(experiment, key, milestone, seed)
    if inputs.is_given(experiment, key, milestone):
        tensors = load_checkpoint(paths[0], experiment.architecture)
        state = State.start(store.build(experiment.architecture, tensors), runtime)
        state.step = steps  # trained elsewhere: its steps count, its seconds aren't known
        return state
    done = {path: store.story(path)["step"] for path in paths}
    started = [path for path in paths if done[path] <= steps]
    if started:
        return State.load(max(started, key=done.__getitem__), runtime)
    return State.start(_initial(experiment, expert, _stream(expert), seed), runtime)


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
    expert, training = experiment.experts()[key], experiment.training
    where = dict(experiment=experiment.name, seed=seed, expert=key, milestone=milestone)
    output = layout.path(layout.MILESTONE, **where)
    dataset = open_dataset(experiment)
    read = inputs.expert(experiment, key, milestone, seed)
    inputs.check(experiment, read)

    steps = milestone_steps(experiment, expert, milestone, seed)
    expected = stamp(expert_digest(experiment, key, milestone), dataset.sha256, read)
    what = {"expert": key, "milestone": milestone, "seed": seed, "settings": settings(experiment, output)}
    runtime = Runtime.of(experiment, "training", expert.network, device)
    with resumable(output, what, expected, runtime) as place:
        state = place.state or _beginning(experiment, key, milestone, seed, steps, runtime)
        job = Job(
            name=_stream(expert),
            seed=seed,
            dataset=dataset,
            law=_law(experiment, expert),
            process=Process(experiment.diffusion),
            training=training,
            runtime=runtime,
            stats=place.stats,
        )
        hooks = [HOOKS.member(name)(config, job) for name, config in expert.hooks.items()]
        train(state, job, steps, hooks=hooks, save=place.saver(experiment.architecture))

        if not parallel.first():
            return
        state.save(output, experiment.architecture, place.story)
        write_text(layout.path(layout.STATS, **where), place.stats.read_text())
        entry = ledger(
            device,
            **what,
            steps=state.step,
            seconds=round(state.seconds, 3),
            device_seconds=round(state.device_seconds, 3),
            images=state.step * training.batch,
            processes=state.processes,
            execution=runtime.told(),
            stats_sha256=sha256(place.stats),
        )
        write_json(layout.path(layout.LEDGER, **where), entry)
