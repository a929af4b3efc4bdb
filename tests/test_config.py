import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY, changed

from ebdiff.experiment import keys, load
from ebdiff.experiment.runs import Run
from ebdiff.experiment.schema import Training
from ebdiff.system.errors import UserError

EXPERIMENTS = ROOT / "config/experiments"
SHIPPED = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def refusal(raw):
    """The message an experiment is refused with."""
    with pytest.raises(UserError) as caught:
        load.parse(raw, "config/experiments/x.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("config/experiments/x.yaml: ")
    return message


def renamed(path, new):
    """The tiny experiment with a key misspelt."""
    folder = path.rpartition(".")[0]
    place = TINY
    for key in path.split("."):
        place = place[key]
    return changed(TINY, {path: ..., f"{folder}.{new}".lstrip("."): place})


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_experiments_load(name):
    experiment = load.load(name, EXPERIMENTS)
    assert experiment.name == name
    assert experiment.runs


@pytest.mark.parametrize(
    ("path", "misspelt"),
    [
        ("sampling", "samplin"),
        ("training.batch", "bacth"),
        ("training.learning_rate", "learning_rat"),
        ("network.multipliers", "multiplyers"),
        ("pruning.stride", "strid"),
        ("searches.full.horizon", "horizont"),
        ("searches.full.rates", "ratess"),
        ("runs.eb-50.rate", "rat"),
        ("runs.eb-50.iterations", "iteration"),
        ("runs.ta-eb.experts", "expert"),
        ("runs.unpruned.title", "titel"),
    ],
)
def test_a_misspelt_key_gets_a_did_you_mean(path, misspelt):
    message = refusal(renamed(path, misspelt))
    assert f"{misspelt}: unknown key" in message
    assert f"did you mean {path.rpartition('.')[2]!r}?" in message


@pytest.mark.parametrize("key", ["image_size", "channels"])
def test_what_moved_to_the_dataset_is_told(key):
    message = refusal(changed(TINY, {f"network.{key}": 1}))
    assert f"network.{key}: unknown key; it is dataset.{key} now" in message


@pytest.mark.parametrize(("section", "key"), [("network", "kind"), ("dataset", "source"), ("codec", "kind")])
@pytest.mark.parametrize("name", ["x", None, 3, ["unet"], {"a": 1}])
def test_an_unknown_member_of_a_seam_is_one_line(section, key, name):
    message = refusal(changed(TINY, {f"{section}.{key}": name}))
    assert f"{section}: {key} {str(name)!r} is not known; " in message


def test_a_misspelt_key_of_an_expert_is_found_in_its_list():
    experts = [{"rate": 0.3, "span": [0, 500]}, {"rate": 0.3, "spann": [500, 1000]}]
    message = refusal(changed(TINY, {"runs.ta-eb.experts": experts}))
    assert "runs.ta-eb.experts.1.spann" in message
    assert "did you mean 'span'?" in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.batch", "many"),
        ("training.batch", 0),
        ("training.batch", None),
        ("training.learning_rate", -1e-3),
        ("training.ema_decay", 1.0),
        ("network.multipliers", 2),
        ("network.norm_groups", 3),
        ("dataset.image_size", 7),
        ("sampling.spacing", "quadd"),
        ("sampling.images", 2.5),
        ("dataset.source", "bundled-digit"),
        ("searches.full.horizon", 3),
        ("searches.full.interval", {"unit": "pseudo-epoch"}),
        ("searches.full.span", [1, 2, 3]),
        ("searches.full.threshold", 0),
        ("runs.eb-50.iterations", 0),
        ("runs.eb-50.iterations", "as-eb"),
        ("runs.eb-50.method", "magic"),
        ("runs.eb-50.experts", []),
        ("training", 5),
        ("seeds", []),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_key(path, value):
    message = refusal(changed(TINY, {path: value}))
    # A network's sizes are judged together, so the section is named.
    named = path.rpartition(".")[0] if "norm_groups" in path or "image_size" in path else path
    assert named.rpartition(".")[2] in message


@pytest.mark.parametrize(("changes", "words"), [
    ({"training.label_dropout": 0.1}, "training.label_dropout: the network is told no classes"),
    ({"sampling.guidance": 3}, "sampling.guidance: the network is told no classes; set dataset.classes"),
    ({"sampling.guidance": 3, "dataset.classes": 10}, "set training.label_dropout"),
])  # fmt: skip
def test_guidance_needs_classes_and_labels_dropped(changes, words):
    assert words in refusal(changed(TINY, changes))


def test_what_tells_of_classes_stands_in_no_dump_of_networks_without(vary):
    usual = {"dataset.classes": None, "training.label_dropout": 0, "sampling.guidance": None}
    assert vary(usual).model_dump_json() == vary({}).model_dump_json()
    assert not any(key.rpartition(".")[2] in vary(usual).model_dump_json() for key in usual)
    told = vary({"dataset.classes": 10, "training.label_dropout": 0.1, "sampling.guidance": 3})
    assert told.architecture.items.classes == 10
    assert told.prepared == vary({}).prepared


def serving(*experts):
    return changed(TINY, {"runs.ta-eb.experts": [{"rate": 0.3, **e} for e in experts]})


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([[0, 240], [260, 1000]], "no expert serves timesteps [240, 260)"),
        ([[0, 260], [240, 1000]], "two experts serve timesteps [240, 260)"),
        ([[0, 240], [240, 999]], "no expert serves timesteps [999, 1000)"),
        ([[1, 240], [240, 1000]], "no expert serves timesteps [0, 1)"),
    ],
)
def test_serve_spans_must_tile_all_timesteps(spans, words):
    message = refusal(serving(*({"span": [0, 1000], "serve": s} for s in spans)))
    assert "runs.ta-eb" in message
    assert words in message


def test_serve_spans_may_be_listed_in_any_order():
    load.parse(serving({"span": [500, 1000]}, {"span": [0, 500]}), "x.yaml")


@pytest.mark.parametrize("span", [[0, 1001], [-1, 1000], [500, 500], [600, 400]])
@pytest.mark.parametrize("where", ["searches.full.span", "runs.eb-50.span"])
def test_a_span_outside_the_timesteps_is_refused(where, span):
    message = refusal(changed(TINY, {where: span}))
    assert f"{where}: [{span[0]}, {span[1]})" in message
    assert "[0, 1000)" in message


def test_an_expert_serves_only_what_it_trains_on():
    message = refusal(serving({"span": [0, 240], "serve": [0, 300]}, {"span": [300, 1000]}))
    assert "runs.ta-eb.experts[0].serve" in message


@pytest.mark.parametrize("rate", [0, 1, 1.2, -0.5])
@pytest.mark.parametrize("where", ["runs.eb-50.rate", "searches.full.rates"])
def test_impossible_rates_are_refused(where, rate):
    value = [rate] if where.endswith("rates") else rate
    assert "rate" in refusal(changed(TINY, {where: value}))


def test_a_rate_that_leaves_no_channel_is_refused():
    # 8 channels: int(8 * 0.1) = 0 are kept.
    message = refusal(changed(TINY, {"searches.full.rates": [0.3, 0.5, 0.8, 0.9]}))
    assert "searches.full.rates: rate 0.9 leaves no channel" in message


def test_an_unknown_criterion_gets_a_did_you_mean():
    message = refusal(changed(TINY, {"searches.full.criteria": ["magnitud"]}))
    assert "searches.full.criteria" in message
    assert "did you mean 'magnitude'?" in message


@pytest.mark.parametrize(
    ("key", "value"), [("rate", 0.4), ("criterion", "taylor"), ("search", "ful"), ("weights", "raw")]
)
def test_a_ticket_must_be_one_that_its_search_looks_for(key, value):
    only_ema = {"searches.full.weights": ["ema"], f"runs.eb-50.{key}": value}
    message = refusal(changed(TINY, only_ema))
    assert f"runs.eb-50.{key}: " in message
    assert "did you mean 'full'?" in message if key == "search" else "'full' looks for" in message


def test_a_ticket_at_an_interval_must_be_one_whose_weights_its_search_keeps():
    run = {"title": "At 2", "method": "control", "rate": 0.5, "after": 2, "iterations": 40}
    kept = {"searches.full.tickets_at": [0, 2], "searches.full.criteria": ["magnitude", "taylor"]}

    def at(changes, searches=kept):
        return changed(TINY, {**searches, "runs.at": {**run, **changes}})

    keys = load.parse(at({}), "x.yaml").experts()
    assert {"full-magnitude-ema-0.5-at2-t0-1000", "full-magnitude-ema-0.5-t0-1000"} < keys.keys()
    wrong = "search 'full' keeps no weights after 2 intervals; add 2 to searches.full.tickets_at"
    assert f"runs.at.after: {wrong}" in refusal(at({}, {"searches.full.tickets_at": [0, 1]}))
    assert "runs.at: method eb means" in refusal(at({"method": "eb"}))
    assert "no taylor mask before any training" in refusal(at({"criterion": "taylor", "after": 0}))
    for changes in ({"init": "fresh"}, {"search": "final"}):
        assert "runs.at.after: only tickets of a search" in refusal(at(changes))
    assert "tickets_at 7 lies beyond horizon 6" in refusal(changed(TINY, {"searches.full.tickets_at": [7]}))


@pytest.mark.parametrize("other", ["like-eb50", "like-"])
def test_like_an_unknown_run_is_refused(other):
    message = refusal(changed(TINY, {"runs.eb-50.iterations": other}))
    assert "runs.eb-50.iterations" in message


def test_like_a_run_that_is_itself_like_one_is_refused():
    like = {"title": "a", "method": "control", "init": "fresh", "rate": 0.5}
    raw = changed(
        TINY, {"runs.a": {**like, "iterations": "like-b"}, "runs.b": {**like, "iterations": "like-a"}}
    )
    assert "itself like one" in refusal(raw)


def test_a_table_of_an_unknown_run_is_refused():
    message = refusal(changed(TINY, {"tables.table4": ["unpruned", "eb-5"]}))
    assert "tables.table4: 'eb-5' is not known; did you mean 'eb-50'?" in message


def test_final_tickets_need_an_unpruned_run():
    assert "final" in refusal(changed(TINY, {"runs.eb-50.search": "final", "runs.unpruned": ...}))
    assert "reserved" in refusal(changed(TINY, {"searches.final": {"rates": [0.5]}}))


def test_negative_seeds_are_refused():
    assert "seeds" in refusal(changed(TINY, {"seeds": [-1]}))


def test_the_unpruned_network_trains_on_all_timesteps():
    halves = [{"init": "dense", "span": [0, 500]}, {"init": "dense", "span": [500, 1000]}]
    assert "runs.unpruned" in refusal(changed(TINY, {"runs.unpruned.experts": halves}))


# --- files and inheritance ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    def write(name, raw):
        (tmp_path / f"{name}.yaml").write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
        return tmp_path

    write("base", changed(TINY, {"name": "base"}))
    return write


def test_a_base_gives_what_the_file_leaves_out(folder):
    where = folder("child", {"base": "base", "training": {"batch": 8}, "tables": {"table4": ["eb-50"]}})
    base, child = load.load("base", where), load.load("child", where)
    assert child.name == "child"
    assert child.training == base.training.model_copy(update={"batch": 8})
    assert child.runs == base.runs
    assert child.tables == {"table4": ("eb-50",)}


def test_null_removes_an_inherited_run_and_lists_are_replaced_whole(folder):
    where = folder(
        "child",
        {"base": "base", "runs": {"eb-50": None}, "tables": {"table4": None}, "seeds": [3]},
    )
    child = load.load("child", where)
    assert set(child.runs) == {"unpruned", "ta-eb"}
    assert child.tables == {}
    assert child.seeds == (3,)


def test_bases_may_have_bases(folder):
    folder("middle", {"base": "base", "training": {"batch": 8}})
    where = folder("top", {"base": "middle", "training": {"clip": None}})
    training = load.load("top", where).training
    assert (training.batch, training.clip) == (8, None)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a", {"base": "a"}, "circle"),
        ("a", {"base": "bases"}, "did you mean 'base'?"),
        ("a", {"base": 3}, "base"),
        ("a", "training: [1, 2", "not valid YAML"),
        ("a", "- just a list", "mapping"),
        ("a", "", "mapping"),
        ("a", {"base": "base", "training": {"bach": 1}}, "did you mean 'batch'?"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(folder, name, content, words):
    where = folder(name, content)
    with pytest.raises(UserError, match=words.replace("?", r"\?")) as caught:
        load.load(name, where)
    assert "\n" not in str(caught.value)
    assert f"{name}.yaml" in str(caught.value) or "bases.yaml" in str(caught.value)


def test_an_unknown_experiment_gets_a_did_you_mean(folder):
    where = folder("child", {"base": "base"})
    with pytest.raises(UserError, match="did you mean 'child'"):
        load.load("chlid", where)


# --- scale ----------------------------------------------------------------------------------------------


def test_scale_multiplies_steps_and_nothing_else(vary):
    changes = {
        "searches.part": {"interval": {"unit": "pseudo-epoch", "steps": 30}, "rates": [0.5], "horizon": 9},
        "runs.short": {"title": "S", "method": "control", "init": "fresh", "rate": 0.5,
                       "iterations": "like-eb-50"},
    }  # fmt: skip
    one, half = vary(changes), vary({**changes, "scale": 0.5})
    assert half.dense.iterations == 40
    assert half.final_expert.iterations == 40
    assert [e.iterations for e in half.runs["ta-eb"].experts] == [10, 10]
    assert half.runs["short"].experts[0].iterations == "like-eb-50"
    assert half.training.warmup == round(5 * 0.5)
    assert half.searches["part"].interval.steps == 15
    assert half.searches["full"] == one.searches["full"]
    assert half.searches["part"].horizon == one.searches["part"].horizon
    assert half.searches["part"].window == one.searches["part"].window
    same = {"warmup"}
    assert half.training.model_dump(exclude=same) == one.training.model_dump(exclude=same)
    assert half.sampling == one.sampling


def test_scale_never_takes_the_last_step(vary):
    small = vary({"scale": 1e-6})
    assert small.dense.iterations == 1
    assert small.runs["eb-50"].experts[0].iterations == 1


# --- primary claims ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ([{"run": "eb-5", "against": "ta-eb"}], "claims[0].run: 'eb-5' is not known; did you mean 'eb-50'?"),
        ([{"run": "eb-50", "against": "ta"}], "claims[0].against: 'ta' is not known; known: eb-50, ta-eb"),
        ([{"run": "eb-50", "against": "eb-50"}], "claims[0].against: 'eb-50' is the run itself"),
        ([{"run": "eb-50"}], "claims.0.against: this key is missing"),
        (
            [{"run": "eb-50", "agianst": "ta-eb"}],
            "claims.0.agianst: unknown key; 'agianst' is not known; did you mean 'against'?",
        ),
        (
            [{"run": "eb-50", "kind": "fastre", "against": "ta-eb"}],
            "claims.0.kind: 'fastre' is not known; did",
        ),
        ([{"run": "eb-50", "against": "ta-eb"}] * 2, "claims: run='eb-50' kind='lower' against='ta-eb'"),
        ([{"run": "eb-50", "against": "ta-eb"}] * 5, "claims: Tuple should have at most 4 items"),
        ({"run": "eb-50", "against": "ta-eb"}, "claims: must be a list"),
    ],
)
def test_a_claim_about_no_two_runs_is_refused(claims, words):
    assert words in refusal(changed(TINY, {"claims": claims}))


def test_claims_of_a_base_go_with_the_runs_that_are_removed(tmp_path):
    both = [{"run": "eb-50", "against": "unpruned"}, {"run": "ta-eb", "against": "eb-50"}]

    def loaded(**more):
        (tmp_path / "base.yaml").write_text(yaml.safe_dump({**TINY, "claims": both}))
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"base": "base", **more}))
        return [(c.run, c.kind, c.against) for c in load.load("mine", tmp_path).claims]

    assert loaded() == [("eb-50", "lower", "unpruned"), ("ta-eb", "lower", "eb-50")]
    tables = {name: ["unpruned", "eb-50"] for name in TINY["tables"]}
    without = {"runs": {"ta-eb": None}, "tables": tables}
    assert loaded(**without) == [("eb-50", "lower", "unpruned")]
    assert loaded(claims=[]) == []
    with pytest.raises(UserError, match=r"mine\.yaml: claims\[0\]\.run: 'ta-eb' is not known"):
        loaded(**without, claims=both[1:])


# --- defaults and names -----------------------------------------------------------------------------------


def test_experts_that_differ_in_serve_or_milestone_only_are_one(vary):
    experts = [{"rate": 0.3, "span": [0, 1000], "serve": [0, 500]}, {"rate": 0.5, "span": [0, 1000],
               "serve": [500, 1000], "iterations": 30}]  # fmt: skip
    e = vary({"runs.ta-eb.experts": experts})
    assert set(e.experts()) == {
        "dense-full", "full-magnitude-ema-0.5-t0-1000", "full-magnitude-ema-0.3-t0-1000",
    }  # fmt: skip
    assert e.milestones("full-magnitude-ema-0.5-t0-1000") == [30, 40]
    assert e.previous_milestone("full-magnitude-ema-0.5-t0-1000", "40") == 30
    assert e.previous_milestone("full-magnitude-ema-0.5-t0-1000", "30") is None


@pytest.mark.parametrize(("batch", "steps"), [(16, 10), (15, 11), (160, 1), (161, 1)])
def test_an_epoch_is_every_image_once_in_full_batches(vary, batch, steps):
    assert vary({"training.batch": batch}).epoch_steps(1797) == steps


# --- the schema -------------------------------------------------------------------------------------------


def test_the_schema_file_is_up_to_date():
    stored = json.loads((ROOT / "config/experiment.schema.json").read_text())
    assert stored == load.schema(), "run: ebdiff schema > config/experiment.schema.json"
    told = (ROOT / "docs/keys.md").read_text(encoding="utf-8")
    assert told == keys.markdown() + "\n", "run: ebdiff schema --markdown > docs/keys.md"
    spelt = re.findall(r"^\| `(\w+)` \|", told, re.MULTILINE)
    assert {*Training.model_fields, *Run.model_fields, "sparsity", "hidden", "tickets_at"} <= set(spelt)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_experiments_fit_the_schema(name):
    jsonschema = pytest.importorskip("jsonschema")
    raw = yaml.safe_load(Path(EXPERIMENTS / f"{name}.yaml").read_text())
    jsonschema.validate(raw, load.schema())


@pytest.mark.parametrize(
    ("path", "value"),
    [("training.bacth", 3), ("training.batch", "many"), ("runs.eb-50.rat", 0.5), ("searches.full.rates", 3)],
)
def test_the_schema_refuses_what_loading_refuses(path, value):
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(TINY, {path: value}), load.schema())


@pytest.mark.parametrize("name", ["cifar10", "digits_full"])
def test_tables_8_and_9_share_their_trainings(name):
    e = load.load(name, ROOT / "config/experiments")
    experts = [x for table in ("table8", "table9") for run in e.tables[table] for x in e.runs[run].experts]
    assert len({x.key for x in experts}) == 7
    assert len({(x.key, x.iterations) for x in experts}) == 13
