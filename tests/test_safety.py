import ast

import pytest
from conftest import ROOT, TINY, changed

from ebdiff import digests, loading

SOURCES = sorted((ROOT / "src/ebdiff").rglob("*.py"))


def calls(tree):
    """Every call as (dotted name, keyword names)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg for k in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT / "src/ebdiff")) for p in SOURCES])
def test_no_source_unpickles_or_hides_errors(path):
    tree = ast.parse(path.read_text())
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
    }
    assert not imported & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for name, keywords in calls(tree):
        assert name not in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system", "torch.save")
        assert name != "torch.load" or "weights_only" in keywords
        assert name not in ("np.load", "numpy.load") or "allow_pickle" in keywords
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
            assert ast.unparse(node.type) not in ("BaseException",), f"line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False"
        if isinstance(node, ast.keyword) and node.arg == "shell":
            assert ast.unparse(node.value) == "False"


def test_the_scan_sees_the_sources():
    assert len(SOURCES) > 30


# --- digests ----------------------------------------------------------------------------------------------

GRADIENT = {"searches.full.criteria": ["magnitude", "taylor"]}
STAGES = {
    "data": digests.data_digest,
    "dense": lambda e: digests.dense_digest(e, "full"),
    "magnitude masks": lambda e: digests.masks_digest(e, "full", "magnitude", "ema"),
    "taylor masks": lambda e: digests.masks_digest(e, "full", "taylor", "ema"),
    "hamming": lambda e: digests.hamming_digest(e, "full", "magnitude", "ema"),
    "ticket": lambda e: digests.ticket_digest(e, "full", "magnitude", "ema", 0.5),
    "expert": lambda e: digests.expert_digest(e, "full-magnitude-ema-0.5-t0-1000", "40"),
    "sample": lambda e: digests.sample_digest(e, "eb-50"),
    "metrics": digests.metrics_digest,
    "reference": lambda e: digests.reference_digest(e, "clean", "all"),
    "cost": digests.cost_digest,
    "report": digests.report_digest,
}


def stages_changed_by(changes):
    def all_digests(changes):
        e = loading.parse(changed(TINY, {**GRADIENT, **changes}), "x.yaml")
        return {name: stage(e) for name, stage in STAGES.items()}

    before, after = all_digests({}), all_digests(changes)
    return {name for name in STAGES if before[name] != after[name]}


@pytest.mark.parametrize(
    ("key", "value", "stages"),
    [
        ("training.log_every", 7, set()),
        ("training.save_minutes", 1.0, set()),
        ("compute", {"mem_mb": 999, "runtime": 7, "gpus": 1}, set()),
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
        ("dataset.flip", False, {"dense", "expert", "cost", "report"}),
        ("dataset.subset", 96, {"dense", "expert", "report"}),
        ("runs.ta-eb.iterations", 21, {"report"}),
        # A milestone stands in its file's path: the expert at 40 steps stays what it was.
        ("runs.eb-50.iterations", 41, {"sample", "report"}),
    ],
)
def test_a_key_changes_exactly_the_digests_of_the_stages_that_use_it(key, value, stages):
    assert stages_changed_by({key: value}) == stages


def test_digests_follow_values_not_spelling():
    assert digests.digest(1, (2, 3)) == digests.digest(1, [2, 3])
    assert digests.digest({"a": 1, "b": 2}) == digests.digest({"b": 2, "a": 1})
    assert digests.digest(1, 2) != digests.digest(2, 1)
    assert digests.digest("a", "b") != digests.digest("ab")


def test_a_like_run_milestone_follows_the_other_runs_experts():
    like = {"title": "L", "method": "control", "init": "fresh", "rate": 0.5, "iterations": "like-ta-eb"}

    def digest(iterations):
        raw = changed(TINY, {"runs.like": like, "runs.ta-eb.iterations": iterations})
        return digests.expert_digest(loading.parse(raw, "x"), "fresh-0.5-t0-1000", "like-ta-eb")

    assert digest(20) == digest(20)
    assert digest(20) != digest(30)
