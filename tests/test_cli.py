import subprocess
import sys

import pytest
import typer
from conftest import write_experiment

from ebdiff import cli
from ebdiff.experiment import layout

VERBS = sorted(command.callback.__name__.replace("_", "-") for command in cli.app.registered_commands)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: (status, output, lines of errors)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ebdiff", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as stop:
            cli.main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err.strip().splitlines()

    return run


def test_every_rule_has_its_verb():
    assert set(VERBS) >= {
        "prepare-data", "train-dense", "prune-per-epoch", "hamming-matrix", "select-eb-epoch",
        "finetune-region", "sample", "reference-stats", "train-classifier", "fid", "measure-cost",
        "tabulate", "report",
    }  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(run, verb):
    status, out, _ = run(verb, "--help")
    assert status == 0
    command = typer.main.get_command(cli.app).commands[verb]
    assert command.help
    assert command.help.split()[0] in out
    for parameter in command.params:
        assert parameter.help, f"{verb} doesn't explain {parameter.name}"


def test_help_lists_every_verb(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(verb in out for verb in VERBS)


SEARCH = ("--search", "full")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train-dense", "tyny"), "did you mean 'tiny'?"),
        (("report", "nothing-like-it"), "known: tiny"),
        (("prepare-data", "digit"), "dataset 'digit'"),
        (("train-dense", "tiny", "--search", "ful"), "--search 'ful' is not known; did you mean 'full'?"),
        (("train-dense", "tiny", "--search", "final"), "--search 'final' is not known"),
        (("prune-per-epoch", "tiny", "--criterion", "magnitud"), "did you mean 'magnitude'?"),
        (("prune-per-epoch", "tiny", "--weights", "emma"), "did you mean 'ema'?"),
        (("select-eb-epoch", "tiny", "--rate", "0.5", "--search", "fulll"), "did you mean 'full'?"),
        (("select-eb-epoch", "tiny", "--rate", "0.5", "--weights", "rew"), "did you mean 'raw'?"),
        (("hamming-matrix", "tiny", "--search", "ful"), "did you mean 'full'?"),
        (("hamming-matrix", "tiny", "--criterion", "taylor"), "known: magnitude"),
        (("hamming-matrix", "tiny", "--weights", "emma"), "did you mean 'ema'?"),
        (("sample", "tiny", "--run", "eb50"), "--run 'eb50' is not known; did you mean 'eb-50'?"),
        (("fid", "tiny", "--run", "ta_eb"), "did you mean 'ta-eb'?"),
        (("finetune-region", "tiny", "--expert", "dense-ful", "--milestone", "80"), "'dense-full'?"),
        (("finetune-region", "tiny", "--expert", "dense-full", "--milestone", "81"), "known: 80"),
        (("tabulate", "tiny", "table44"), "did you mean 'table4'?"),
        (("tabulate", "tiny", "figure11"), "did you mean 'figure1"),
    ],
)
def test_an_unknown_name_is_one_line_with_a_hint(tmp_path, monkeypatch, run, arguments, words):
    write_experiment(tmp_path)
    monkeypatch.chdir(tmp_path)
    status, _, errors = run(*arguments)
    assert status == 1
    assert len(errors) == 1
    assert errors[0].startswith("ebdiff: ")
    assert words in errors[0]
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (("train-dense", "tiny"), "resources/data/digits/images.npy"),
        (("train-classifier", "digits"), "resources/data/digits/images.npy"),
        (("prune-per-epoch", "tiny"), "results/tiny/seed0/dense/full/masks.npz"),
        (("select-eb-epoch", "tiny", "--rate", "0.5"), "results/tiny/seed0/dense/full/snapshots"),
        (("sample", "tiny", "--run", "eb-50"), "experts/full-magnitude-ema-0.5-t0-1000/40.safetensors"),
        (("fid", "tiny", "--run", "eb-50"), "results/tiny/seed0/runs/eb-50/samples.npy"),
        (("report", "tiny", "--final"), "results/tiny"),
    ],
)
def test_a_missing_file_is_one_line_that_names_it(tmp_path, monkeypatch, run, arguments, missing):
    write_experiment(tmp_path)
    monkeypatch.chdir(tmp_path)
    status, _, errors = run(*arguments)
    assert status == 1
    assert len(errors) == 1
    assert missing in errors[0]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_broken_experiment_starts_nothing(tmp_path, monkeypatch, run):
    write_experiment(tmp_path, {"training.bacth": 3})
    monkeypatch.chdir(tmp_path)
    status, out, errors = run("prepare-data", "digits")
    assert status == 1
    status, out, errors = run("train-dense", "tiny")
    assert (status, out) == (1, "")
    assert "tiny.yaml: training.bacth" in errors[0]
    assert len(errors) == 1
    assert not (tmp_path / "resources").exists()


def test_an_unknown_device_is_one_line(workspace, run):
    write_experiment(workspace, {"compute.device": "gpuu"})
    status, _, errors = run("train-dense", "tiny")
    assert status == 1
    assert len(errors) == 1
    assert "compute.device" in errors[0]


@pytest.mark.slow
def test_a_verb_alone_in_a_shell(workspace, verb):
    write_experiment(workspace)
    done = verb("train-dense", "tiny", "--seed", "2")
    assert done.returncode == 0, done.stderr
    folder = layout.path(layout.DENSE, experiment="tiny", seed=2, search="full")
    found = sorted(p.name for p in (workspace / folder).iterdir())
    assert found == ["last.safetensors", "ledger.json", "masks.npz", "snapshots", "stats.jsonl"]


LIGHT = [
    *(f"experiment.{name}" for name in ("load", "layout", "stages", "jobs", "records", "members")),
    *(f"system.{name}" for name in ("errors", "files", "draws")), "cost.accounting", "diffusion.schedule",
    *(f"report.{name}" for name in (
        "notes", "tables", "figures", "page", "published", "reading", "results", "facts", "style",
    )),
]  # fmt: skip


def test_the_configuration_and_the_report_import_no_torch():
    imports = "; ".join(f"import ebdiff.{name}" for name in LIGHT)
    code = f"import sys; {imports}; print([m for m in sys.modules if m.split('.')[0].startswith('torch')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
