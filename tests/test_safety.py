import ast
import re

import pytest
from conftest import ROOT, TINY, changed

from ebdiff.experiment import load, stages
from ebdiff.experiment.jobs import Job

SOURCES = sorted((ROOT / "src/ebdiff").rglob("*.py"))
SCRIPTS = [*sorted((ROOT / "benchmarks").rglob("*.py"))]
PICKLES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "pandas.io.pickle",
}
RUN_CODE = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "torch.save",
    "torch.hub.load", "shutil.unpack_archive",
}  # fmt: skip
EXTRACT = {"extract", "extractall"}  # of a zip or tar: members are read one by one instead


def calls(tree):
    """Every call as (dotted name, {keyword: its source})."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def dangers(text):
    """What in a source could run code that a file holds, or hide an error."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [node.attr] if node.attr in PICKLES else []  # torch.serialization.pickle
        else:
            names = []
        yield from (n for n in names if n in PICKLES or n.split(".")[0] in PICKLES)
        if isinstance(node, ast.ExceptHandler) and (
            node.type is None or ast.unparse(node.type) == "BaseException"
        ):
            yield f"bare except in line {node.lineno}"
        if isinstance(node, ast.ClassDef):
            yield from (
                b for b in map(ast.unparse, node.bases) if re.fullmatch(r"yaml\.(Unsafe|Full)?Loader", b)
            )
    for name, keywords in calls(tree):
        if name in RUN_CODE or name.rpartition(".")[2] in EXTRACT:
            yield name
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield name
        # Left out, allow_pickle is False since NumPy 1.16.
        if keywords.get("allow_pickle", "False") != "False" or keywords.get("shell", "False") != "False":
            yield name
        if keywords.get("trust_remote_code", "False") != "False" or keywords.get("Loader"):
            yield name


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_runs_what_it_reads_or_hides_errors(path):
    assert list(dangers(path.read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from joblib import load", "import os.path, shelve", "torch.x.pickle.loads(x)",
        "eval(x)", "torch.load(p)", "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)", "f(x, allow_pickle=y)", "yaml.load(x)", "yaml.load(x, Loader=L)",
        "class L(yaml.Loader): pass", "run(x, shell=True)", "archive.extractall(x)", "pd.read_pickle(x)",
        "load_dataset(x, trust_remote_code=True)", "try: f()\nexcept: pass",
    ],
)  # fmt: skip
def test_the_scan_sees_each_danger(text):
    assert list(dangers(text))


def test_the_scan_sees_the_sources():
    assert len(SOURCES) > 30


def test_torchscript_is_loaded_in_one_place_only_and_after_its_hash():
    """TorchScript is code; `test_an_unknown_file_is_never_loaded` holds the place to its hash."""
    places = [p.name for p in SOURCES if "torch.jit.load" in p.read_text()]
    assert places == ["inception.py"]


@pytest.mark.parametrize(
    "path", [ROOT / "Snakefile", *sorted((ROOT / "rules").glob("*.smk"))], ids=lambda p: p.name
)
def test_no_rule_puts_text_of_the_configuration_into_a_shell(path):
    """Shell lines hold wildcards, all constrained to words, numbers of threads, and quoted paths."""
    allowed = r"threads|params\.threads|params\.experiments?:q|log:q|wildcards\.\w+(:q)?"
    text = path.read_text()
    constrained = re.findall(
        r"^    (\w+)=", (ROOT / "rules/common.smk").read_text().split("wildcard_constraints")[1], re.M
    )
    for block in re.findall(r"    shell:\n((?:        .*\n)+)", text):
        for field in re.findall(r"(?<!{){([^{}]+)}", block):
            assert re.fullmatch(allowed, field), field
            if field.startswith("wildcards."):
                assert field.removeprefix("wildcards.").removesuffix(":q") in constrained


# --- digests ----------------------------------------------------------------------------------------------

GRADIENT = {"searches.full.criteria": ["magnitude", "taylor"]}
MAGNITUDE = dict(seed=0, search="full", criterion="magnitude", weights="ema")
STAGES = {
    "data": ("prepare-data", {}),
    "dense": ("train-dense", dict(seed=0, search="full")),
    "magnitude masks": ("prune-per-epoch", MAGNITUDE),
    "taylor masks": ("prune-per-epoch", MAGNITUDE | {"criterion": "taylor"}),
    "hamming": ("hamming-matrix", MAGNITUDE),
    "ticket": ("select-eb-epoch", MAGNITUDE | {"rate": 0.5}),
    "expert": ("finetune-region", dict(seed=0, expert="full-magnitude-ema-0.5-t0-1000", milestone=40)),
    "sample": ("sample", dict(seed=0, run="eb-50")),
    "metrics": ("fid", dict(seed=0, run="eb-50")),
    "reference": ("reference-stats", dict(protocol="clean", number="all")),
    "cost": ("measure-cost", {}),
    "report": ("report", {}),
}


def stages_changed_by(changes):
    def all_digests(changes):
        e = load.parse(changed(TINY, {**GRADIENT, **changes}), "x.yaml")
        return {
            name: stages.digest(stages.STAGES[verb].depends(e, **{k: str(v) for k, v in where.items()}))
            for name, (verb, where) in STAGES.items()
        }

    before, after = all_digests({}), all_digests(changes)
    return {name for name in STAGES if before[name] != after[name]}


@pytest.mark.parametrize(
    ("key", "value", "stages"),
    [
        ("training.log_every", 7, set()),
        ("training.save_minutes", 1.0, set()),
        ("compute", {"mem_mb": 999, "runtime": 7, "gpus": 1, "share": 3}, set()),
        ("compute", {"gpus": 2}, {"dense", "expert"}),  # dropout: each process draws masks of its own
        ("compute", {"threads": 2}, {"cost"}),
        ("compute", {"device": "cpu"}, {"cost"}),
        ("about", "Another sentence.", {"report"}),
        ("sampling.batch", 3, set()),
        ("sampling.images", 99, {"sample", "report"}),
        ("sampling.steps", 11, {"sample", "report"}),
        ("runs.eb-50.title", "Another", {"report"}),
        ("tables.table4", ["eb-50"], {"report"}),
        ("pruning.stride", 50, {"taylor masks", "report"}),
        ("evaluation", {"batch": 8, "weights": "inception.pt"}, {"report"}),
        ("evaluation", {"precision_recall": True}, {"metrics", "report"}),
        ("evaluation", {"reference": 500}, {"metrics", "report"}),
        ("searches.full.threshold", 0.2, {"dense", "hamming", "ticket", "report"}),
        ("searches.full.horizon", 9, {"dense", "report"}),
        ("searches.full.watch", 1, {"dense", "report"}),
        ("training.learning_rate", 1e-3, {"dense", "expert", "report"}),
        ("training.ema_decay", 0.5, {"dense", "expert", "report"}),
        ("training.batch", 8, {"dense", "expert", "cost", "report"}),
        ("dataset.flip", False, {"dense", "expert", "report"}),
        ("dataset.subset", 96, {"dense", "expert", "report"}),
        ("runs.ta-eb.iterations", 21, {"report"}),
        # A milestone stands in its file's path: the expert at 40 steps stays what it was.
        ("runs.eb-50.iterations", 41, {"sample", "report"}),
    ],
)
def test_a_key_changes_exactly_the_digests_of_the_stages_that_use_it(key, value, stages):
    assert stages_changed_by({key: value}) == stages


def test_digests_follow_values_not_spelling():
    assert stages.digest(1, (2, 3)) == stages.digest(1, [2, 3])
    assert stages.digest({"a": 1, "b": 2}) == stages.digest({"b": 2, "a": 1})
    assert stages.digest(1, 2) != stages.digest(2, 1)
    assert stages.digest("a", "b") != stages.digest("ab")


def test_a_like_run_milestone_follows_the_other_runs_experts():
    like = {"title": "L", "method": "control", "init": "fresh", "rate": 0.5, "iterations": "like-ta-eb"}

    def digest(iterations):
        raw = changed(TINY, {"runs.like": like, "runs.ta-eb.iterations": iterations})
        where = dict(seed=0, expert="fresh-0.5-t0-1000", milestone="like-ta-eb")
        return Job.of(load.parse(raw, "x"), "finetune-region", **where).digest

    assert digest(20) == digest(20)
    assert digest(20) != digest(30)
