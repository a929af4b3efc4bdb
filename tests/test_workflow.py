import base64
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, write_experiment

from ebdiff.cost.plan import Forecast
from ebdiff.experiment import load
from ebdiff.experiment.jobs import jobs

SHIPPED = sorted(path.stem for path in (ROOT / "config/experiments").glob("*.yaml"))
PARTS = ("Snakefile", "rules", "config", "envs", "profiles")
BIN = Path(sys.executable).parent
# Whatever is drawn or written from the results.
SHOWN = {"tabulate_smoke", "write_report"}
TRAINED = {"train_dense", "prune_per_epoch", "hamming_matrix", "select_eb_epoch", "finetune_region"}
TRAINED |= {"sample", "fid"}


def snakemake(folder, *arguments, cores=2, timeout=600):
    command = [sys.executable, "-m", "snakemake", "--cores", str(cores), *arguments]
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


def copied(folder):
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part)
        else:
            shutil.copy(source, folder / part)
    return folder


class Plan:
    """What a dry run would do: jobs per rule, and the shell commands."""

    def __init__(self, folder, *arguments):
        # Snakemake's own words, which tell each command.
        triggers = ("--rerun-triggers", "mtime", "params", "input")
        plain = ("--workflow-profile", "none", "--printshellcmds", *triggers)
        done = snakemake(folder, *arguments, "--dry-run", *plain)
        assert done.returncode == 0, done.stderr + done.stdout
        text = done.stdout + done.stderr
        stats = re.search(r"^total +\d+$", text, re.MULTILINE)
        found = re.findall(r"^([\w-]+) +(\d+)$", text, re.MULTILINE) if stats else []
        self.jobs = {name: int(n) for name, n in found if name not in ("total", "smoke", "all", "report")}
        self.commands = re.findall(r"^Shell command: (ebdiff .*?) > ", text, re.MULTILINE)
        assert stats or "Nothing to be done" in text


@pytest.fixture
def project(tmp_path):
    return copied(tmp_path)


def edit(folder, name, path, value):
    """Write one key into an experiment's file."""
    file = folder / f"config/experiments/{name}.yaml"
    raw = yaml.safe_load(file.read_text())
    *parents, key = path.split(".")
    place = raw
    for parent in parents:
        place = place.setdefault(parent, {})
    place[key] = value
    file.write_text(yaml.safe_dump(raw))


# --- plans ------------------------------------------------------------------------------------------------


FAST = ("digits", "digits_sparse")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SHIPPED]
)
def test_the_plan_of_every_shipped_experiment_is_complete(project, name):
    plan = Plan(project, "--config", f"experiments={name}")
    e = load.load(name, project / "config/experiments")
    seeds = [(run, seed) for run in e.runs for seed in e.seeds_of(run)]
    assert plan.jobs["sample"] == plan.jobs["fid"] == len(seeds)
    expected = {
        (x.key, str(x.iterations), seed) for run, seed in seeds for x in e.runs[run].experts
    }  # the milestones that runs list; chains may add some
    asked = [
        re.search(r"--expert (\S+) --milestone (\S+) --seed (\d+)", c)
        for c in plan.commands
        if "finetune-region" in c
    ]
    found = [(m[1], m[2], int(m[3])) for m in asked]
    assert len(found) == len(set(found)) == plan.jobs["finetune_region"]
    assert expected <= set(found)
    assert plan.jobs["prepare_data"] == plan.jobs["measure_cost"] == plan.jobs["write_report"] == 1
    assert len(plan.commands) == len(set(plan.commands))
    rules = {"report": "write_report", "tabulate": f"tabulate_{name}"}
    verbs = (job.stage.verb for job in jobs(e))
    predicted = Counter(rules.get(verb, verb.replace("-", "_")) for verb in verbs)
    assert predicted == Counter(plan.jobs)


@pytest.mark.slow
def test_an_expert_of_two_runs_is_trained_once(project):
    before = Plan(project, "smoke").jobs
    twin = {"title": "Twin", "method": "ta-eb", "iterations": 100, "experts": [
        {"rate": 0.3, "span": [0, 260], "serve": [0, 250]},
        {"rate": 0.6, "span": [240, 460], "serve": [250, 440]},
        {"rate": 0.8, "span": [440, 1000]},
    ]}  # fmt: skip
    edit(project, "smoke", "runs.twin", twin)
    after = Plan(project, "smoke").jobs
    assert after["sample"] == before["sample"] + 1
    assert after["finetune_region"] == before["finetune_region"]
    assert after["select_eb_epoch"] == before["select_eb_epoch"]


@pytest.mark.slow
def test_a_longer_milestone_of_an_expert_adds_one_job_that_goes_on_from_the_first(project):
    before = Plan(project, "smoke").jobs
    longer = {"title": "Longer", "method": "eb", "rate": 0.5, "iterations": 300}
    edit(project, "smoke", "runs.longer", longer)
    after = Plan(project, "smoke").jobs
    assert after["finetune_region"] == before["finetune_region"] + 1
    assert after["train_dense"] == before["train_dense"]
    target = "results/smoke/seed0/experts/full-magnitude-ema-0.5-t0-1000/300.safetensors"
    commands = [c for c in Plan(project, target).commands if "finetune-region" in c]
    assert [c.split("--milestone ")[1].split()[0] for c in commands] == ["225", "300"]


@pytest.mark.slow
def test_some_runs_can_be_asked_for_alone(project):
    whole, some = Plan(project, "smoke"), Plan(project, "smoke", "--config", "runs=eb-50")
    assert some.jobs["sample"] == some.jobs["fid"] == 1
    assert some.jobs["finetune_region"] == 1
    assert not SHOWN & set(some.jobs)
    two = Plan(project, "smoke", "--config", "runs=eb-50,unpruned")
    assert two.jobs["sample"] == 2
    assert whole.jobs["sample"] == 3


@pytest.mark.slow
def test_a_table_of_any_experiment_is_a_target(project):
    plan = Plan(project, "results/smoke/tables/table4.tex")
    assert plan.jobs["tabulate_smoke"] == 1
    assert plan.jobs["sample"] == 3
    assert "write_report" not in plan.jobs


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("training.bacth", 32, "did you mean 'batch'?"),
        ("runs.ta-eb.experts", [{"rate": 0.3, "span": [0, 900]}], "no expert serves timesteps [900, 1000)"),
    ],
)
def test_a_mistake_in_an_experiment_is_one_line_and_starts_nothing(project, path, value, words):
    edit(project, "smoke", path, value)
    done = snakemake(project, "smoke")
    assert done.returncode != 0
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "smoke.yaml" in line]
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert not (project / "results").exists()
    assert not (project / "resources").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--config", "experiments=smokee"), "did you mean 'smoke'?"),
        (("smoke", "--config", "runs=eb50"), "did you mean 'eb-50'?"),
        (("results/smoke/tables/table9.csv",), "table9"),
        (("results/smoke/seed0/runs/eb-51/metrics.json",), "eb-51"),
    ],
)
def test_unknown_targets_are_refused_before_anything_starts(project, arguments, words):
    done = snakemake(project, *arguments)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (project / "resources").exists()


def test_braces_in_the_projects_path_are_one_line(tmp_path):
    folder = tmp_path / "br{x}ces"
    folder.mkdir()
    done = snakemake(copied(folder), "smoke")
    assert done.returncode != 0
    assert "br{x}ces: Snakemake takes braces for wildcards" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr and not (folder / "results").exists()


@pytest.mark.slow
def test_what_there_is_so_far_is_shown_although_nothing_is_finished(project):
    done = snakemake(project, "so-far", "--config", "experiments=smoke")
    assert done.returncode == 0, done.stderr
    page = project / "results/smoke/so-far/report.html"
    assert "–" in page.read_text(encoding="utf-8")
    assert not (project / "resources").exists()
    assert not (project / "results/smoke/report.html").exists()


@pytest.mark.slow
def test_a_home_that_cannot_be_written_stops_no_workflow(project, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    done = snakemake(project, "smoke", "--dry-run")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_workflow_is_lint_free(project):
    done = snakemake(project, "--lint")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Congratulations" in done.stdout + done.stderr


def test_the_rules_are_formatted():
    pytest.importorskip("snakefmt")
    command = [sys.executable, "-m", "snakefmt", "--check", "Snakefile", "rules"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- the smoke experiment, once for real --------------------------------------------------------------------


@pytest.fixture
def edited(finished):
    """Plan the finished experiment after an edit, then take the edit back."""
    file = finished / "config/experiments/smoke.yaml"
    original = file.read_text()

    def plan(path, value):
        edit(finished, "smoke", path, value)
        return Plan(finished, "smoke").jobs

    yield plan
    file.write_text(original)


def results(folder):
    return folder / "results/smoke"


@pytest.mark.slow
def test_a_finished_experiment_has_nothing_left_to_do(finished):
    assert Plan(finished, "smoke").jobs == {}
    assert not list(finished.rglob("state"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "value", "rules"),
    [
        ("training.log_every", 7, set()),
        ("training.save_minutes", 1.0, set()),
        ("sampling.batch", 50, set()),
        ("compute.mem_mb", 900, set()),
        ("compute.runtime", 20, set()),
        ("compute.threads", 2, {"measure_cost", *SHOWN}),
        ("about", "Another sentence.", SHOWN),
        ("runs.eb-50.title", "Another title", SHOWN),
        ("sampling.images", 100, {"sample", "fid", *SHOWN}),
        ("sampling.steps", 10, {"sample", "fid", *SHOWN}),
        ("searches.full.threshold", 0.12, {*TRAINED, *SHOWN}),
        ("training.learning_rate", 1e-3, {*TRAINED, *SHOWN}),
        ("training.batch", 40, {"measure_cost", *TRAINED, *SHOWN}),
        ("network.dropout", 0.05, {"measure_cost", *TRAINED, *SHOWN}),
    ],
)
def test_editing_a_key_runs_again_exactly_what_uses_it(edited, path, value, rules):
    assert set(edited(path, value)) == rules


@pytest.mark.slow
def test_adding_a_run_runs_that_run_alone(edited):
    run = {"title": "EB 60 %", "method": "eb", "rate": 0.6, "iterations": 225}
    jobs = edited("runs.eb-60", run)
    assert set(jobs) == {"finetune_region", "sample", "fid", *SHOWN}
    assert jobs["finetune_region"] == jobs["sample"] == jobs["fid"] == 1


@pytest.mark.slow
def test_one_longer_expert_trains_one_expert(edited):
    jobs = edited("runs.eb-50.iterations", 230)
    assert set(jobs) == {"finetune_region", "sample", "fid", *SHOWN}
    assert jobs["finetune_region"] == jobs["sample"] == 1


@pytest.mark.slow
def test_every_run_has_its_images_and_metrics(finished):
    for run in ("unpruned", "eb-50", "ta-eb"):
        folder = results(finished) / "seed0/runs" / run
        samples = np.load(folder / "samples.npy")
        assert (samples.shape, samples.dtype) == ((200, 8, 8, 1), np.uint8)
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["images"] == 200
        assert 0 < metrics["fd"] < metrics["ceiling"]["fd"]
        assert metrics["classifier_accuracy"] > 0.95


@pytest.mark.slow
def test_every_ticket_says_what_it_is(finished):
    stories = list(results(finished).glob("seed0/tickets/full/magnitude/ema/*.json"))
    stories = [json.loads(p.read_text()) for p in stories if "ledger" not in p.name]
    assert {s["rate"] for s in stories} == {0.3, 0.5, 0.6, 0.8}
    for s in stories:
        assert s["settled"] is (max(s["last_distances"]) <= 0.1)
        assert s["interval"] >= 4
        assert s["step"] == 20 * s["intervals_completed"]
        assert 0 <= s["to_initial"] <= 1


@pytest.mark.slow
def test_costs_are_measured_for_every_network(finished):
    cost = json.loads((results(finished) / "cost.json").read_text())
    assert set(cost["networks"]) == {"dense", "0.3", "0.5", "0.6", "0.8"}
    macs = [cost["networks"][k]["macs"] for k in ("dense", "0.3", "0.5", "0.6", "0.8")]
    assert macs == sorted(macs, reverse=True)
    assert all(n["step_ms"] > 0 for n in cost["networks"].values())


@pytest.mark.slow
def test_tables_and_figures_are_whole(finished):
    for table in ("table1", "table4"):
        for ext in ("csv", "md", "tex"):
            assert (results(finished) / f"tables/{table}.{ext}").stat().st_size > 100
    with (results(finished) / "tables/table4.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["Unpruned", "EB 50 %", "TA-EB 30/60/80 %"]
    assert all(float(row["cfd"]) > 0 and float(row["speedup"]) > 0 for row in rows)
    tex = (results(finished) / "tables/table4.tex").read_text()
    assert r"\toprule" in tex
    for figure in ("1", "1b", "2", "2b", "3", "4", "5"):
        path = results(finished) / f"figures/figure{figure}"
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_report_needs_no_network(finished):
    path = results(finished) / "report.html"
    assert path.stat().st_size < 10_000_000
    page = path.read_text(encoding="utf-8")
    loaded = re.findall(r"""(?:src|<link[^>]*href)\s*=\s*["']?([^"'\s>]+)""", page)
    assert loaded
    assert all(address.startswith(("data:", "#")) for address in loaded)
    assert not re.search(r"""url\(\s*["']?http|@import|<script[^>]+src""", page)
    assert page.rstrip().endswith("</html>")
    for title in ("Unpruned", "EB 50 %", "TA-EB 30/60/80 %"):
        assert title in page


@pytest.mark.slow
def test_every_job_left_its_log_and_benchmark(finished):
    plan = Plan(finished, "smoke", "--forceall")
    jobs = sum(plan.jobs.values())
    assert len(list(finished.rglob("benchmarks/**/*.tsv"))) == jobs
    assert len([p for p in finished.rglob("logs/**/*.log") if ".snakemake" not in p.parts]) == jobs


@pytest.mark.slow
def test_every_job_left_its_record_of_what_it_made(finished):
    experiment = load.load("smoke", finished / "config/experiments")
    found = jobs(experiment)
    assert {finished / job.note("records", "json") for job in found} == set(
        finished.rglob("records/**/*.json")
    )
    for job in found:
        made = json.loads((finished / job.note("records", "json")).read_text())["made"]
        for path in job.makes:
            assert str(path) in made or [p for p in made if Path(p).parent == path], path


@pytest.mark.slow
def test_the_planned_jobs_left_files_of_at_most_the_planned_sizes(finished):
    experiment = load.load("smoke", finished / "config/experiments")
    networks = json.loads((results(finished) / "cost.json").read_text())["networks"]
    networks = {name: {**network, "image_ms": 1.0} for name, network in networks.items()}
    planned = Forecast(experiment, torch.device("cpu"), 1437, networks, {"torch": 1.0, "light": 1.0}).tasks()
    for task in planned:
        made, verb = [finished / path for path in task.job.makes], task.job.stage.verb
        if verb in ("select-eb-epoch", "finetune-region", "sample", "prepare-data"):
            large = sum(p.stat().st_size for p in made if p.suffix not in (".json", ".jsonl", ".png"))
            # Tensors and pixels to the byte; names, shapes and stamps come on top.
            assert 0 <= large - task.size < 60_000, made
        if verb == "train-dense":  # its search may end before the horizon
            files = [f for f in (results(finished) / "seed0/dense").rglob("*") if f.is_file()]
            assert 0.3 < sum(f.stat().st_size for f in files) / task.size < 1.3


@pytest.mark.slow
def test_a_plan_stands_against_what_happened(finished):
    ours = results(finished)
    command = [sys.executable, "-m", "ebdiff.cli"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = dict(cwd=finished, env=env, capture_output=True, text=True, check=True)
    cost = json.loads((ours / "cost.json").read_text())
    try:
        subprocess.run([*command, "plan", "smoke", "--devices", "2"], **run)
        plan = json.loads((ours / "plan.json").read_text())
        for name, network in cost["networks"].items():
            for key in ("rate", "realised", "params", "macs"):
                assert plan["networks"][name][key] == network[key]
        nothing = Plan(finished, "smoke")
        assert not nothing.jobs  # asking for a plan makes nothing run again
        page = Path(subprocess.run([*command, "report", "smoke", "--so-far"], **run).stdout.strip())
        text = (finished / page).read_text(encoding="utf-8")
        assert "Plan against actual" in text
    finally:
        (ours / "plan.json").unlink(missing_ok=True)


@pytest.mark.slow
def test_every_long_stage_left_its_ledger(finished):
    experts = list(results(finished).glob("seed0/experts/*/*.json"))
    assert len(experts) == 5
    for path in experts:
        ledger = json.loads(path.read_text())
        assert ledger["steps"] == int(path.stem)
        assert ledger["images"] == 32 * ledger["steps"]
        assert ledger["seconds"] > 0
        assert ledger["device"]
        assert ledger["versions"]["torch"]


@pytest.mark.slow
def test_two_seeds_are_two_experiments(finished):
    seeded = Plan(finished, "results/smoke/seed7/runs/eb-50/metrics.json")
    assert seeded.jobs["train_dense"] == 1
    assert "prepare_data" not in seeded.jobs
    assert "measure_cost" not in seeded.jobs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["early_bird", "sparse", "latent"])
def test_the_notebooks_run_on_what_smoke_left_or_is_committed(name, finished, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    monkeypatch.setenv("EBDIFF_EXPERIMENT", "smoke")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a verb has set it, in this process
    folder = {"metadata": {"path": str(finished if name == "early_bird" else ROOT)}}
    nbclient.NotebookClient(notebook, resources=folder, timeout=120).execute()
    shown = [out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("image/png" in data for data in shown) and any("text/html" in data for data in shown)


def test_a_search_of_gradient_tickets_alone_still_shows_its_controls(tmp_path):
    """Magnitude masks are taken while training whatever is asked: Figure 2b needs them."""
    folder = copied(tmp_path)
    changes = {"searches.full.criteria": ["taylor"], "runs.eb-50.criterion": "taylor", "runs.ta-eb": ...,
               "tables.table4": ["unpruned", "eb-50"]}  # fmt: skip
    write_experiment(folder, changes, "gradients")
    jobs = Plan(folder, "results/gradients/report.html").jobs
    assert jobs["train_dense"] == 1
    assert jobs["prune_per_epoch"] == 4  # magnitude of raw and averaged weights, taylor; one of the finished


@pytest.mark.slow
def test_what_was_done_after_snakemake_had_died_is_not_made_again(project):
    """As it leaves a job behind: the mark of an unfinished output, and no metadata."""
    made = [f"resources/data/digits/{name}" for name in ("manifest.json", "images.npy")]
    assert snakemake(project, made[0]).returncode == 0
    state = project / ".snakemake"

    def left_behind():
        for path in made:
            name = base64.urlsafe_b64encode(path.encode()).decode()
            (state / "incomplete" / name).write_text('{"external_jobid": null}')
            (state / "metadata" / name).unlink(missing_ok=True)
        before = (project / made[1]).stat().st_ino
        done = snakemake(project, made[0])
        assert done.returncode == 0 and not list(state.glob("incomplete/*"))
        return (project / made[1]).stat().st_ino == before, done.stdout + done.stderr

    same, said = left_behind()
    assert same and "Nothing to be done" in said
    (project / made[1]).write_bytes(b"half")
    (project / made[0]).touch()
    same, said = left_behind()
    assert not same and "prepare_data digits" in said
