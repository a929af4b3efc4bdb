"""Malformed experiments and command lines: each is one line that names what is wrong, and starts nothing."""

import os
import shutil
import sys
from math import inf, nan

import pytest
import yaml
from conftest import ROOT, TINY, changed, write_experiment
from test_workflow import copied, snakemake

from ebdiff import cli
from ebdiff.experiment import load
from ebdiff.system.errors import UserError

FRESH = {"title": "A", "method": "control", "init": "fresh", "rate": 0.5}
PART = {"rates": [0.5], "span": [0, 500]}

# What is written over the tiny experiment, and what the line must name.
VALUES = [
    # numbers that aren't, or can't be
    ({"scale": inf}, "scale: "),
    ({"scale": nan}, "scale: "),
    ({"scale": 0}, "scale: "),
    ({"scale": 1e300}, "scale: "),
    ({"scale": True}, "scale: can't be true or false"),
    ({"training.learning_rate": inf}, "training.learning_rate: "),
    ({"training.clip": -1}, "training.clip: "),
    ({"training.save_minutes": inf}, "training.save_minutes: "),
    ({"training.warmup": -1}, "training.warmup: "),
    ({"training.ema_warmup": 2}, "training.ema_warmup: "),
    ({"training.batch": 10**30}, "training.batch: is a number beyond 64 bits"),
    ({"training.batch": 10**9}, "training.batch: "),
    ({"network.width": 2**30}, "network.width: "),
    ({"dataset.image_size": 2**20}, "dataset.image_size: "),
    ({"diffusion": {"timesteps": 10**12}}, "diffusion.timesteps: "),
    ({"runs.eb-50.iterations": 10**400}, "runs.eb-50.iterations: is a number beyond 64 bits"),
    ({"runs.eb-50.iterations": True}, "iterations: can't be true or false"),
    ({"runs.eb-50.iterations": 1.5}, "iterations"),
    ({"runs.eb-50.rate": "half"}, "rate: "),
    ({"runs.eb-50.rate": 1e-5}, "rate: "),
    ({"seeds": [True]}, "seeds: can't be true or false"),
    ({"seeds": [2**63]}, "seeds.0: is a number beyond 64 bits"),
    ({"seeds": [0, 0]}, "seeds: 0, 0: one is repeated"),
    ({"seeds": 3}, "seeds: must be a list"),
    ({"runs.eb-50.seeds": [1, 1]}, "runs.eb-50.seeds"),
    # sections
    ({"dataset": ...}, "dataset: this key is missing"),
    ({"dataset": None}, "dataset: must be a mapping"),
    ({"dataset.source": "images"}, "give `path`"),
    ({"dataset.hub": "../../etc"}, "dataset.hub: "),
    ({"dataset.path": 5}, "dataset.path: "),
    ({"dataset.crop": "center"}, "did you mean 'centre'?"),
    ({"dataset.broken": "drop"}, "known: refuse, skip"),
    ({"dataset.subset": 0}, "dataset.subset: "),
    ({"dataset.subset": 1}, "dataset.subset: "),
    ({"dataset.subset": 1438}, "dataset.subset: 1,438, but digits has 1,437 to train on"),
    ({"dataset.channels": 5}, "dataset.channels: "),
    ({"network.multipliers": [1, 0]}, "network.multipliers.1: "),
    ({"network.multipliers": []}, "network.multipliers: needs at least one"),
    ({"network.attention": [3]}, "attention [3] at none of the resolutions [8, 4]"),
    ({"network.dropout": 1}, "network.dropout: "),
    ({"diffusion": {"beta_start": 0.5}}, "beta_end 0.02 is below beta_start 0.5"),
    ({"diffusion": {"timestep": 5}}, "did you mean 'timesteps'?"),
    ({"diffusion": []}, "diffusion: must be a mapping"),
    ({"pruning.threshold": 1}, "pruning.threshold: "),
    ({"searches": {}}, "dense.search: 'full' is not known; known: none"),
    ({"searches.full": None}, "searches.full: must be a mapping"),
    ({"searches.full.rates": [0.5, 0.5]}, "searches.full.rates: 0.5, 0.5: one is repeated"),
    ({"searches.full.rates": [nan]}, "searches.full.rates.0: "),
    ({"searches.full.interval": "epoc"}, "did you mean 'epoch'?"),
    ({"searches.full.interval": {"unit": "epoch", "steps": 4}}, "searches.full.interval: give `steps`"),
    ({"searches.full.criteria": ["random"]}, "known: diff-pruning, magnitude, taylor"),
    ({"searches.full.weights": "ema"}, "searches.full.weights: must be a list"),
    ({"searches.full.span": "all"}, "searches.full.span: must be a list"),
    ({"searches.snapshot-full": PART}, "searches.snapshot-full: names that begin with snapshot-"),
    ({"searches.part": PART, "dense.search": "part"}, "dense.search: 'part' doesn't span all timesteps"),
    ({"dense": 5}, "dense: must be a mapping"),
    ({"dense.source": "x.pth"}, "dense.source: unknown key; 'source' is not known; known: from, iterations"),
    ({"dense.search": "fll"}, "dense.search: 'fll' is not known; did you mean 'full'?"),
    ({"sampling.steps": 2000}, "sampling.steps: 2000 exceed the 1000 timesteps"),
    ({"sampling.images": 1}, "sampling.images: "),
    ({"sampling.images": 10**15}, "sampling.images: "),
    ({"sampling.sampler": "dim"}, "did you mean 'ddim'?"),
    ({"evaluation": {"protocols": ["clean"] * 2}}, "evaluation.protocols: clean, clean: one is repeated"),
    ({"evaluation": {"protocols": ["fid"]}}, "known: classifier, clean, legacy_pytorch"),
    ({"evaluation": {"reference": 1}}, "evaluation.reference: "),
    ({"evaluation": {"reference": 1438}}, "evaluation.reference: 1,438, but digits has 1,437"),
    ({"speed": {"lam": 2}}, "speed.lam: "),
    ({"speed": {"tau": 1000}, "runs.eb-50.law": "speed"}, "speed.tau: 1000"),
    ({"compute": {"device": "$(reboot)"}}, "compute.device: "),
    ({"compute": {"device": "meta"}}, "compute.device: "),
    ({"compute": {"threads": 10**6}}, "compute.threads: "),
    ({"compute": {"mem_mb": 1}}, "compute.mem_mb: "),
    ({"compute": {"micro_batch": 0}}, "compute.micro_batch: "),
    ({"compute": {"gpus": 2, "device": "cuda"}}, "compute: 2 `gpus` need `device: auto`"),
    ({"compute": {"share": 0}}, "compute.share: "),
    ({"compute": {"share": 3}}, "`share: 3` needs `gpus: 1` and `device: auto`, not `gpus: 0` and"),
    ({"compute": {"share": 2, "gpus": 2}}, "`share: 2` needs `gpus: 1`"),
    ({"compute": {"share": 2, "gpus": 1, "device": "cuda:1"}}, "and `device: cuda:1`"),
    ({"tuning": {"training": {"0.5": {"precison": "bf16"}}}}, "did you mean 'precision'?"),
    ({"published": {"dataset": "cifar"}}, "did you mean 'cifar10'?"),
    ({"runs.eb-50.paper": "eb-50-magnitud"}, "runs.eb-50.paper: 'eb-50-magnitud' is not known; did you mean"),
    ({"runs.eb-50.paper": {"table4": "ta-eb"}}, "runs.eb-50.paper: "),
    # runs and tables
    ({"runs": {}}, "runs: needs at least one"),
    ({"runs": ["eb-50"]}, "runs: must be a mapping"),
    ({"runs.eb-50": None}, "runs.eb-50: must be a mapping"),
    ({"runs.eb-50.title": ""}, "runs.eb-50.title: "),
    ({"runs.eb-50.experts": [5]}, "runs.eb-50.experts.0: must be a mapping"),
    ({"runs.eb-50.experts": [{}, {}]}, "runs.eb-50: two experts serve timesteps [0, 1000)"),
    ({"runs.eb-50.serve": [0]}, "serve.1: this key is missing"),
    ({"runs.eb-50.init": "dense"}, "runs.eb-50.experts.0: give a rate to every expert except `init: dense`"),
    ({"runs.eb-50.rate": ...}, "runs.eb-50.experts.0: give a rate"),
    ({"runs.eb-50.iterations": ...}, "iterations: this key is missing"),
    ({"runs.eb-50.method": "scratch"}, "runs.eb-50: method scratch means init: fresh"),
    ({"runs.a": {**FRESH, "iterations": "like-a"}}, "runs.a.iterations: like-a refers to a run"),
    ({"runs.a": {**FRESH, "iterations": "like-../x"}}, "runs.a.iterations: '../x' is not known"),
    ({"runs.eb-50.law": "spee"}, "did you mean 'speed'?"),
    ({"tables": {"table10": ["eb-50"]}}, "did you mean 'table1'?"),
    ({"tables": {"table4": []}}, "tables.table4: needs at least one"),
    ({"tables": {"table4": ["eb-50", "eb-50"]}}, "tables.table4: eb-50, eb-50: one is repeated"),
    # text
    ({"about": "\x1b[2J"}, "about: holds the unprintable character '\\x1b'"),
    ({"dataset.path": "a\0b"}, "dataset.path: holds the unprintable character '\\x00'"),
    ({"runs.eb-50.title": "\ud800"}, "runs.eb-50.title: holds the unprintable character"),
    ({"runs.eb-50.title": "a\nb"}, "runs.eb-50.title: "),
    ({"runs.eb-50.title": "a\tb"}, "runs.eb-50.title: "),
    ({"runs.eb-50.title": "a\u202eb"}, "runs.eb-50.title: holds the unprintable character '\\u202e'"),
    ({"runs.eb-50.note": "a\u2066b"}, "runs.eb-50.note: holds the unprintable character '\\u2066'"),
    ({"about": "a\u2028b"}, "about: holds the unprintable character '\\u2028'"),
    ({"bad\nkey": 1}, "top level: 'bad\\nkey' can't be a key"),
]  # fmt: skip


def refusal(folder, name="a"):
    """The line with which an experiment's file is refused."""
    with pytest.raises(UserError) as caught:
        load.load(name, folder)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


@pytest.mark.parametrize(("changes", "named"), VALUES, ids=[str(changes)[:60] for changes, _ in VALUES])
def test_a_malformed_value_is_one_line_that_names_file_and_key(tmp_path, changes, named):
    raw = changed(TINY, {"name": "a", **changes})
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(raw))
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}/a.yaml: ")
    assert named in message


def test_what_the_malformed_values_are_written_over_is_well_formed(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**TINY, "name": "a"}))
    assert set(load.load("a", tmp_path).runs) == set(TINY["runs"])


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/x", "a b", ".", "", "-x", "Ä", "a\n", "x" * 61, 5])
@pytest.mark.parametrize("key", ["dataset.name", "searches", "runs", "tables.table4"])
def test_names_are_words(tmp_path, key, name):
    """Names of datasets, searches and runs become names of folders."""
    thing = {"searches": {name: PART}, "runs": {name: {**FRESH, "iterations": 5}}, "tables.table4": [name]}
    value = {**TINY[key], **thing[key]} if key in ("searches", "runs") else thing.get(key, name)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(changed(TINY, {"name": "a", key: value})))
    assert key.partition(".")[0] in refusal(tmp_path)


@pytest.mark.parametrize("name", ["reference", "logs", "benchmarks"])
def test_an_experiment_never_takes_a_folder_of_results_that_is_another_thing(tmp_path, name):
    write_experiment(tmp_path, name=name)
    assert f"name: '{name}' is reserved" in refusal(tmp_path / "config/experiments", name)


GOOD = yaml.safe_dump({**TINY, "name": "a"})
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))

# The whole file, and what the line must say.
TEXTS = {
    "empty": ("", "must be a mapping"),
    "only a comment": ("# nothing", "must be a mapping"),
    "null": ("null", "must be a mapping"),
    "a number": ("5", "must be a mapping"),
    "a list": ("- a", "must be a mapping"),
    "tab": ("training:\n\tbatch: 5", "line 2: not valid YAML: found character '\\t'"),
    "unclosed": ("seeds: [1, 2", "line 1: not valid YAML"),
    "two documents": (f"{GOOD}---\n{GOOD}", "another document"),
    "a key twice": (f"{GOOD}\nseeds: [1]\nseeds: [2]", "key 'seeds' stands twice"),
    "a run twice": ("runs:\n  a: {}\n  a: {}", "line 3: not valid YAML: key 'a' stands twice"),
    "binary": (bytes(range(256)), "not UTF-8"),
    "latin-1": ("about: café".encode("latin-1"), "not UTF-8"),
    "utf-16": (GOOD.encode("utf-16"), "not UTF-8"),
    "a null byte": ("about: \0", "not valid YAML"),
    "a pickle in a tag": ("a: !!python/object/apply:os.system ['touch pwned']", "could not determine"),
    "a tag that lies": ("scale: !!bool x", "not valid YAML"),
    "a date that isn't": ("about: 2024-13-45", "not valid YAML"),
    "a date": (f"{GOOD}\nabout: 2024-01-01", "about: is a date; put it in quotes"),
    "bytes": (f"{GOOD}\nabout: !!binary aGVsbG8=", "about: is a bytes"),
    "a set": ("seeds: !!set {1, 2}", "seeds: is a set"),
    "a number of 5,000 digits": (f"seeds: [{'9' * 5000}]", "not valid YAML"),
    "nested too deep to parse": ("[" * 2000, "not valid YAML"),
    "nested too deep to mean anything": (f"a: {'[' * 50}{']' * 50}", "nested more than 10 deep"),
    "a list in itself": ("a: &a [*a]", "nested more than 10 deep"),
    "a run in itself": ("runs: &a {x: *a}", "nested more than 10 deep"),
    "a billion laughs": (LAUGHS, "more than 10,000 values"),
    "a merge of no mapping": ("a: {<<: 5}", "line 1: not valid YAML"),
    "a list as key": ("? [a]\n: 1", "unhashable key"),
    "null as key": (f"{GOOD}\n~: 1", "'None' can't be a key"),
    "a number as key": (f"{GOOD}\n5: 1", "5"),
    "a number as a run's name": (GOOD.replace("  eb-50:", "  5:"), "runs.5"),
    "yes as a run's name": (GOOD.replace("  eb-50:", "  yes:"), "(got True)"),
    "a base elsewhere": ("base: ../../x", "base '../../x' is not known"),
    "a base in two lines": ('base: "a\\nb"', "base 'a\\nb' is not known"),
    "a base that isn't there": ("base: nothing", "base 'nothing' is not known"),
    "a long base": (f"base: {'x' * 5000}", "is not known"),
    "itself as base": ("base: a", "a -> a"),
    "a list of bases": ("base: [a]", "base must be the name of an experiment"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_malformed_file_is_one_line_that_names_it(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content, words = TEXTS[kind]
    (tmp_path / "a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(tmp_path)
    assert f"{tmp_path}/a.yaml" in message
    assert words in message
    assert not (tmp_path / "pwned").exists()


def test_merge_keys_may_repeat_what_they_merge(tmp_path):
    """YAML's own way to share keys isn't a key written twice."""
    text = f"{yaml.safe_dump(changed(TINY, {'name': 'a', 'runs': ...}))}\n" + (
        "runs:\n"
        "  unpruned: {title: U, method: unpruned, init: dense}\n"
        "  a: &a {title: A, method: eb, rate: 0.5, iterations: 9}\n"
        "  eb-50: &b {<<: *a, title: B}\n"
        "  ta-eb: {<<: *b, title: C, iterations: 10}\n"
    )
    (tmp_path / "a.yaml").write_text(text)
    runs = load.load("a", tmp_path).runs
    assert [run.title for run in runs.values()] == ["U", "A", "B", "C"]
    assert [run.experts[0].iterations for run in runs.values()] == [80, 9, 9, 10]


# --- command lines ----------------------------------------------------------------------------------------

# The words after `ebdiff`, and what the message must name. The experiment tiny is there, no results are.
COMMANDS = [
    ("nosuch", "nosuch"),
    ("trian-dense tiny", "train-dense"),
    ("--nope", "--nope"),
    ("version x", "x"),
    ("train-dense", "name"),
    ("train-dense tiny extra", "extra"),
    ("train-dense tiny --sed 3", "--sed"),
    ("train-dense tiny --seed", "--seed"),
    ("train-dense tiny --seed x", "--seed"),
    ("train-dense tiny --seed 1.5", "--seed"),
    ("train-dense tiny --seed -1", "--seed"),
    ("train-dense tiny --threads 0", "--threads"),
    ("train-dense tiny --threads 99999", "--threads"),
    ("prepare-data digits --threads 99999", "--threads"),
    (f"train-dense tiny --seed {2**63}", f"--seed {2**63}: beyond 63 bits"),
    (f"hamming-matrix tiny --seed {2**64}", f"--seed {2**64}: beyond 63 bits"),
    ("train-dense ../tiny", "experiment '../tiny' is not known"),
    ("train-dense tiny.yaml", "did you mean 'tiny'?"),
    ("train-dense config/experiments/tiny.yaml", "is not known"),
    (f"train-dense {'x' * 5000}", "is not known"),
    ("train-dense Tiny", "did you mean 'tiny'?"),
    ("prune-per-epoch tiny --criterion random", "--criterion 'random' is not known"),
    ("prune-per-epoch tiny --criterion taylor", "--criterion 'taylor' is not known"),
    ("prune-per-epoch tiny --search final --criterion random", "--criterion 'random' is not known"),
    ("prune-per-epoch tiny --seed -1", "--seed"),
    ("hamming-matrix tiny --search final", "--search 'final' is not known"),
    ("hamming-matrix tiny --criterion random", "random"),
    ("select-eb-epoch tiny", "--rate"),
    ("select-eb-epoch tiny --rate half", "--rate"),
    ("select-eb-epoch tiny --rate 0.4", "--rate '0.4' is not known"),
    ("select-eb-epoch tiny --rate nan", "--rate 'nan' is not known"),
    ("select-eb-epoch tiny --rate 1.5", "--rate '1.5' is not known"),
    ("finetune-region tiny", "--expert"),
    ("finetune-region tiny --expert dense-full", "--milestone"),
    ("finetune-region tiny --expert ../../x --milestone 80", "--expert '../../x' is not known"),
    ("finetune-region tiny --expert dense-full --milestone many", "--milestone 'many' is not known"),
    ("finetune-region tiny --expert dense-full --milestone like-eb-50", "--milestone 'like-eb-50'"),
    ("sample tiny", "--run"),
    ("sample tiny --run ../x", "--run '../x' is not known"),
    ("fid tiny --run eb-50 --seed x", "--seed"),
    ("prepare-data", "dataset"),
    ("prepare-data ../digits", "dataset '../digits'"),
    ("prepare-data digits --threads -1", "--threads"),
    ("train-classifier tiny", "dataset 'tiny'"),
    ("reference-stats digits --protocol fid", "--protocol 'fid' is not known"),
    ("reference-stats digits --images many", "--images 'many'"),
    ("reference-stats digits --images -5", "--images '-5'"),
    ("reference-stats digits --images 1", "--images '1'"),
    ("reference-stats digits --images ²", "--images '²'"),
    ("measure-cost tiny --threads x", "--threads"),
    ("tabulate tiny table10", "did you mean 'table4'?"),
    ("tabulate tiny ../x", "'../x' is not known"),
    ("report tiny --sofar", "--so-far"),
    ("report nothing", "experiment 'nothing' is not known"),
    ("init mine", "--images"),
    ("init mine --images nowhere", "nowhere: no such file or folder"),
    ("init ../mine --images .", "name: '../mine'"),
    ("init Mine --images .", "name: 'Mine'"),
    (f"init {'x' * 300} --images .", "name: 'xxx"),
    ("init reference --images .", "name: 'reference' is reserved"),
    ("init tiny --images .", "exists already"),
    ("init mine --images . --size 7", "--size 7"),
    ("init mine --images . --size big", "--size"),
    ("init mine --images ${NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE is not set"),
]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command line in this process, in a folder with one experiment: (status, what it printed)."""
    path = write_experiment(tmp_path)
    shutil.copy(ROOT / "config/experiments/images.yaml", path.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(os, "environ", os.environ.copy())  # verbs set the number of threads

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["ebdiff", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out + captured.err

    return run


@pytest.mark.parametrize(("line", "named"), COMMANDS, ids=[line[:60] for line, _ in COMMANDS])
def test_a_malformed_command_line_names_what_is_wrong(tmp_path, run, line, named):
    before = set(tmp_path.rglob("*"))
    status, printed = run(*line.split(" "))
    assert named in printed
    if status == 1:  # ours: one line; 2 is the usage, with the option in a frame
        assert printed.startswith("ebdiff: ") and len(printed.splitlines()) == 1
    else:
        assert status == 2 and "Error" in printed
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["tiny\nx", "a\0", "\x1b[2J", "$(touch pwned)", "a b", "*"])
def test_a_hostile_name_on_the_command_line_is_printed_harmlessly(tmp_path, run, name):
    for words in (("report", name), ("prepare-data", name), ("init", name, "--images", ".")):
        status, printed = run(*words)
        assert status == 1
        assert printed.rstrip("\n").isprintable()
    assert not (tmp_path / "pwned").exists()


def test_outside_a_project_it_says_so(tmp_path, run, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for line in ("report tiny", "prepare-data digits", "init mine --images ."):
        assert run(*line.split())[1].startswith(
            "ebdiff: no config/experiments here; run ebdiff in a project's"
        )


def test_a_dataset_whose_path_is_missing_is_named_when_it_is_needed(tmp_path, run):
    images = {"name": "mine", "source": "images"}
    write_experiment(tmp_path, {"dataset": {**images, "path": "/nowhere/at/all"}}, "gone")
    write_experiment(
        tmp_path, {"dataset": {**images, "name": "other", "path": "${NOT_SET_ANYWHERE}"}}, "unset"
    )
    assert "/nowhere/at/all: no such file or folder" in run("prepare-data", "mine")[1]
    assert "NOT_SET_ANYWHERE is not set" in run("prepare-data", "other")[1]
    assert not (tmp_path / "resources").exists() or not list((tmp_path / "resources").rglob("*.*"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 56.8 PiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
        RuntimeError("Storage size calculation overflowed with sizes=[4398046511104, 1099511627776]"),
    ],
)
def test_a_network_too_large_for_the_machine_is_one_line(run, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(load, "load", fails)
    status, printed = run("report", "tiny")
    assert status == 1 and len(printed.splitlines()) == 1
    assert "not enough memory" in printed and "compute.micro_batch" in printed


def test_a_defect_of_the_program_keeps_its_traceback(run, monkeypatch):
    def fails(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(load, "load", fails)
    with pytest.raises(RuntimeError, match="a defect"):
        run("report", "tiny")


# --- as a user types them ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [("train-dense", "tyny"), ("train-dense", "tiny", "--seed", "-1"), ("nosuch",)]
)
def test_a_real_process_ends_with_a_line_and_a_status(tmp_path, verb, words):
    write_experiment(tmp_path)
    done = verb(*words)
    assert done.returncode in (1, 2)
    assert next(w for w in reversed(words) if not w.endswith("1")) in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "results").exists()


def test_a_console_without_its_letters_and_a_home_that_is_not_there_fail_no_verb(tmp_path, verb, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    write_experiment(tmp_path, {"runs.eb-50.title": "é‡漢", "searches.full.horizon": 5})
    done = verb("tabulate", "tiny", "table4", "figure2")
    assert done.returncode == 0, done.stderr
    assert r"\xe9\u2021\u6f22" in done.stdout and "figure2.pdf" in done.stdout


WORKFLOWS = [
    (("--config", "experiments=../smoke"), "experiment '../smoke' is not known"),
    (("--config", "experiments=$(touch pwned)"), "experiment '$(touch pwned)' is not known"),
    (("--config", "experiments="), "config experiments: "),
    (("--config", "experiments=5"), "config experiments: a list, or names separated by commas, not 5"),
    (("--config", "experiments=[]"), "config experiments: name at least one"),
    (("--config", "experiment=smoke"), "config: 'experiment' is not known; did you mean 'experiments'?"),
    (("smoke", "--config", "runs=5"), "config runs: a list"),
    (("smoke", "--config", "runs=../x"), "runs: '../x' is not known"),
    (("so-far", "--config", "experiments=--help"), "experiment '--help' is not known"),
    (("so-far", "--config", "experiments='; touch pwned'"), "is not known"),
    (("results/reference/report.html",), "experiment 'reference' is not known"),
    (("results/smoke/../../pwned",), "pwned"),
    (("results/smoke/seed007/runs/eb-50/metrics.json",), "seed007"),
    (("results/smoke/seed0/experts/dense-full/81.safetensors",), "milestone '81' is not known"),
    (("results/smoke/seed0/tickets/full/magnitude/ema/0.4.json",), "rate '0.4' is not known"),
    (("results/smoke/seed0/tickets/full/taylor/ema/masks.npz",), "--criterion 'taylor' is not known"),
    ((f"results/smoke/seed{2**64}/dense/full/ledger.json",), f"--seed {2**64}: beyond 63 bits"),
    (("resources/data/nosuch/images.npy",), "dataset 'nosuch'"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("words", "named"), WORKFLOWS, ids=[" ".join(words) for words, _ in WORKFLOWS])
def test_a_malformed_workflow_call_starts_nothing(tmp_path, words, named):
    folder = copied(tmp_path)
    done = snakemake(folder, *words)
    printed = done.stdout + done.stderr
    assert done.returncode != 0
    assert named in printed
    assert "Traceback" not in printed and "Finished job" not in printed
    for left in ("results", "resources", "pwned"):
        assert not (folder / left).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("config/config.yaml", "experiments: [smoke", "Config file is not valid"),
        ("config/config.yaml", "runs: []", "config experiments: name at least one"),
        ("config/config.yaml", "experiments: [[smoke]]", "config experiments: "),
        ("config/experiments/smoke.yaml", "base: digits\ntraining:\n\tbatch: 5\n", "smoke.yaml, line 3: "),
        ("config/experiments/smoke.yaml", LAUGHS, "more than 10,000 values"),
        ("config/experiments/digits.yaml", "", "digits.yaml: must be a mapping"),
        (
            "config/tuning/smoke.yaml",
            "training: {dense: {precision: fp64}}",
            "tuning/smoke.yaml: training.dense",
        ),
    ],
)
def test_a_malformed_file_starts_no_workflow(tmp_path, file, text, named):
    folder = copied(tmp_path)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(text)
    done = snakemake(folder, *([] if "config.yaml" in file else ["smoke"]))
    assert done.returncode != 0
    assert named in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (folder / "results").exists() and not (folder / "resources").exists()
