"""How far an experiment is, from hand-made files: what is done, what runs, and what is left."""

import json

from conftest import vouch

from ebdiff.experiment import layout
from ebdiff.experiment.jobs import Job, jobs
from ebdiff.experiment.records import sealed
from ebdiff.report import status
from ebdiff.system.files import held, holding, read_json, write_json, write_text


def told(e):
    return list(status.lines(e))


def test_what_is_done_and_what_waits(workspace, tiny, vary):
    """Prepared digits are the only thing there; of other settings, even they aren't."""
    lines = told(tiny)
    assert "prepare-data        1 of    1 done" in lines
    assert lines[-1] == f"1 of {len(jobs(tiny))} jobs done; `ebdiff plan tiny` tells how long all takes"
    assert "prepare-data        0 of    1 done" in told(vary({"dataset.held_out": 0.3}))


def test_what_runs_tells_its_step_loss_and_time_left(workspace, tiny):
    key = tiny.runs["eb-50"].experts[0].key
    job = Job.of(tiny, "finetune-region", seed=0, expert=key, milestone=40)
    folder = job.state
    with holding(folder):
        assert held(folder)
        readings = [{"step": n, "loss": 1 / n, "seconds": 2.0 * n} for n in (8, 16)]
        write_text(folder / "stats.jsonl", "\n".join(map(json.dumps, readings)) + "\n")
        lines = told(tiny)
        assert any(line.startswith("finetune-region") and line.endswith("1 running") for line in lines)
        (line,) = (line for line in lines if line.startswith("running: "))
        assert "step 16 of 40, loss 0.0625, 48.0 s left; log: results/tiny/logs/seed0/" in line
        (folder / "stats.jsonl").unlink()
    assert not held(folder) and not any(line.startswith("running") for line in told(tiny))
    write_text(folder.with_name(f"{folder.name}.lock"), "1 on nowhere")  # of a killed job
    assert not held(folder)


def test_the_whole_takes_what_was_planned_at_the_pace_of_what_is_done(workspace, tiny):
    """Ten seconds a job were planned; the one that is done took five; two at a time."""
    all_of = jobs(tiny)
    planned = [{"benchmark": str(j.note("benchmarks", "tsv")), "seconds": 10.0} for j in all_of]
    plan = {"jobs": planned, "devices": 2, "digest": Job.of(tiny, "tabulate").digest}
    write_json(layout.path(layout.PLAN, experiment="tiny"), sealed(plan))
    write_text(Job.of(tiny, "prepare-data").note("benchmarks", "tsv"), "s\n5.0\n")
    left = 0.5 * 10 * (len(all_of) - 1) / 2
    assert told(tiny)[-1].endswith(f"about {status.text.duration(left)} left with 2 jobs at a time")
    # What was linked in a second says nothing about the pace.
    job = Job.of(tiny, "measure-cost")
    write_json(layout.path(layout.COST, experiment="tiny"), {})
    vouch(tiny, "measure-cost")
    record = read_json(job.note("records", "json"))
    del record["record"]
    write_json(job.note("records", "json"), sealed({**record, "adopted": "results/other/records/x.json"}))
    write_text(job.note("benchmarks", "tsv"), "s\n1.0\n")
    left = 0.5 * 10 * (len(all_of) - 2) / 2
    assert told(tiny)[-1].endswith(f"about {status.text.duration(left)} left with 2 jobs at a time")


def test_the_state_of_a_job_is_where_it_keeps_itself(tiny):
    """Beside what it goes on with: the dense network's last state, a milestone, samples."""
    paths = {
        ("train-dense", layout.DENSE_LAST): {"search": "full"},
        ("finetune-region", layout.MILESTONE): {"expert": tiny.runs["eb-50"].experts[0].key, "milestone": 40},
        ("sample", layout.SAMPLES): {"run": "eb-50"},
    }
    for (verb, template), where in paths.items():
        job = Job.of(tiny, verb, seed=0, **where)
        assert job.state == layout.state_of(job.path(template))
