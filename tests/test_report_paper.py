"""Every published cell finds its run, and the tables of real datasets set ours beside it."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
from conftest import ROOT
from test_report import check_latex, fabricate, rows_of

from ebdiff.experiment import layout, load
from ebdiff.report import needs, page, paper, reading, style, tables
from ebdiff.report.facts import RunFacts
from ebdiff.report.results import Results
from ebdiff.system.files import read_json, write_json

CRITERIA = ("magnitude", "taylor", "diff-pruning")
REGIONS = [([0, 260], [0, 240]), ([240, 460], [240, 440]), ([440, 1000], None)]
SHIPPED = {
    "cifar10": ("table1", "table3", "table4", "table7", "table8", "table9"),
    "celeba": ("table2", "table5"),
    "lsun_church": ("table6",),
    "lsun_bedroom": ("table6",),
}


def aware(rates, iterations, searches=("region1", "region2", "region3"), regions=REGIONS, **more):
    """A timestep-aware run; iterations of each expert, lowest timesteps first."""
    experts = [
        {"search": search, "rate": rate, "span": span, "serve": serve or span, "iterations": steps}
        for search, rate, (span, serve), steps in zip(searches, rates, regions, iterations, strict=True)
    ]
    return {"title": f"TA-EB {rates} {iterations}", "method": "ta-eb", "experts": experts, **more}


def single(method, iterations, rate=None, **more):
    """A run of one network over all timesteps."""
    words = " ".join(map(str, more.values()))
    run = {"title": f"{method} {rate or ''} {words}", "method": method, "iterations": iterations, **more}
    return run | ({"init": "dense"} if rate is None else {"rate": rate})


def experiment(name, runs, listed, dense=800_000, **more):
    """An experiment shaped like the paper's; nothing of it is ever trained."""
    regions = {
        f"region{i}": {"span": span, "rates": rates}
        for i, span, rates in (
            (1, [0, 260], [0.3]), (2, [240, 460], [0.4, 0.5, 0.6]), (3, [440, 1000], [0.55, 0.7, 0.8, 0.9]),
        )
    }  # fmt: skip
    plain = {f"plain{i}": {"span": s, "rates": [r]} for i, s, r in ((1, [0, 240], 0.3), (2, [240, 440], 0.6))}
    iterwise = {"interval": {"unit": "iteration", "steps": 78}, "rates": [0.3, 0.5], "horizon": 100}
    raw = {
        "name": name,
        "dataset": {"name": name, "source": "images", "path": "elsewhere"},
        "network": {},
        "training": {"batch": 128},
        "searches": {
            "full": {"rates": [0.3, 0.5], "criteria": list(CRITERIA)},
            "iterwise": iterwise,
            **regions,
            **plain,
        },
        "dense": {"iterations": dense},
        "sampling": {},
        "evaluation": {"protocols": ["legacy_pytorch", "clean"]},
        "published": {"dataset": name},
        "runs": runs,
        "tables": listed,
    }
    return load.parse(deepcopy(raw) | more, "test.yaml")


def cifar10(**more):
    runs = {
        "unpruned": single("unpruned", 800_000),
        "unpruned-300": single("unpruned", 300_000),
        "unpruned-speed": single("unpruned", 300_000, law="speed"),
        "scratch-300": single("scratch", 300_000, 0.5, init="fresh"),
        "speed-50": single("control", 300_000, 0.5, init="fresh", law="speed"),
        "eb-300": single("eb", 300_000, 0.5),
        "eb-speed": single("eb", 300_000, 0.5, law="speed"),
        "ta-50": aware((0.3, 0.6, 0.55), (100_000,) * 3),
        "ta-speed": aware((0.3, 0.6, 0.55), (100_000,) * 3, law="speed"),
        "plain": aware(
            (0.3, 0.6, 0.8), (200_000,) * 3, ("plain1", "plain2", "region3"),
            [([0, 240], None), ([240, 440], None), ([440, 1000], None)],
        ),
        "ta-eb": aware((0.3, 0.6, 0.8), (200_000,) * 3),
    }  # fmt: skip
    table1, table4 = [], ["unpruned"]
    for percent in (30, 50):
        rate = percent / 100
        runs[f"scratch-{percent}"] = single("scratch", 900_000, rate, init="fresh")
        table4.append(f"scratch-{percent}")
        for criterion in ("random", *CRITERIA):
            name = f"finetune-{criterion}-{percent}"
            runs[name] = single("finetune", 100_000, rate, search="final", criterion=criterion)
            table4.append(name)
        for criterion in CRITERIA:
            runs[f"eb-{criterion}-{percent}"] = single("eb", 900_000, rate, criterion=criterion)
            table1.append(f"eb-{criterion}-{percent}")
        runs[f"eb-iter-{percent}"] = single("eb", 900_000, rate, search="iterwise")
        table1.append(f"eb-iter-{percent}")
    table8 = ["ta-eb"]
    for rates in ((3, 4, 7), (3, 4, 8), (3, 4, 9), (3, 5, 7), (3, 5, 8), (3, 6, 7)):
        name = "ta-" + "-".join(map(str, rates))
        runs[name] = aware(tuple(r / 10 for r in rates), (200_000,) * 3)
        table8.append(name)
    table9 = ["ta-eb"]
    for steps in ((3, 2, 2), (3, 3, 2), (3, 3, 3), (4, 3, 3), (4, 4, 3), (4, 4, 4)):
        name = "long-" + "-".join(map(str, steps))
        runs[name] = aware((0.3, 0.6, 0.8), tuple(100_000 * n for n in steps))
        table9.append(name)
    listed = {
        "table1": table1, "table3": ["plain", "ta-eb"], "table4": [*table4, *table1, "ta-eb"],
        "table7": ["unpruned-300", "unpruned-speed", "scratch-300", "speed-50", "eb-300", "eb-speed",
                   "ta-50", "ta-speed"],
        "table8": table8, "table9": table9,
    }  # fmt: skip
    return experiment("cifar10", runs, listed, **more)


def celeba(**more):
    runs = {"unpruned": single("unpruned", 500_000), "scratch": single("scratch", 600_000, 0.5, init="fresh")}
    for criterion in ("random", *CRITERIA):
        runs[f"ft-{criterion}"] = single("finetune", 100_000, 0.5, search="final", criterion=criterion)
    for criterion in CRITERIA:
        for steps in (500, 600):
            runs[f"eb-{criterion}-{steps}"] = single("eb", 1000 * steps, 0.5, criterion=criterion)
    runs["ta-eb"] = aware((0.3, 0.6, 0.8), (200_000,) * 3)
    table2 = [name for name in runs if name.startswith("eb-")]
    listed = {"table2": table2, "table5": [name for name in runs if not name.endswith("-500")]}
    return experiment("celeba", runs, listed, dense=500_000, **more)


def lsun(name="lsun_church", **more):
    runs = {
        "unpruned": single("unpruned", 800_000),
        "scratch": single("scratch", 800_000, 0.5, init="fresh"),
        "eb": single("eb", 800_000, 0.5),
        "ta-200": aware((0.3, 0.6, 0.8), (200_000,) * 3),
        "ta-300": aware((0.3, 0.6, 0.8), (300_000,) * 3),
    }
    return experiment(name, runs, {"table6": list(runs)}, **more)


MAKERS = {
    "cifar10": cifar10,
    "celeba": celeba,
    "lsun_church": lsun,
    "lsun_bedroom": lambda **more: lsun("lsun_bedroom", **more),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(e, table, **options):
    return tables.write_table(e, table, Path("out"), **options)


# --- every cell has its run ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 0.01, 0.00037])
@pytest.mark.parametrize("name", MAKERS)
def test_every_published_cell_is_matched_by_exactly_one_run(name, scale):
    e = MAKERS[name](scale=scale)
    assert set(e.tables) == set(SHIPPED[name])
    assert paper.unmatched(e) == []
    results = Results(e)
    for table, names in e.tables.items():  # and no row of ours is without one
        assert len(paper.cells(e, table)) == len(names)
        assert all(paper.published(table, RunFacts(results, run)) for run in names)


def test_the_tables_of_the_four_datasets_are_all_of_the_papers_ddpm_cells():
    cells = {(table, str(row)) for e in (make() for make in MAKERS.values()) for table in e.tables
             for row in paper.cells(e, table)}  # fmt: skip
    printed = {(f"table{i}", str(row)) for i in range(1, 10) for row in paper.rows(f"table{i}")
               if row.get("model", "ddpm") == "ddpm"}  # fmt: skip
    assert cells == printed


def test_a_cell_without_a_run_and_one_with_two_are_named():
    e = lsun()
    without = e.model_copy(update={"tables": {"table6": ("unpruned", "scratch", "eb", "ta-300")}})
    assert paper.unmatched(without) == [
        "table6: dataset lsun_church, method ta-eb, iterations 200000: no run"
    ]
    twice = e.model_copy(update={"runs": {**e.runs, "other": e.runs["eb"]},
                                 "tables": {"table6": (*e.tables["table6"], "other")}})  # fmt: skip
    assert paper.unmatched(twice) == [
        "table6: dataset lsun_church, method eb, iterations 800000: eb and other"
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_published_cell_has_a_shipped_run(name):
    folder = ROOT / "config/experiments"
    if not (folder / f"{name}.yaml").is_file():
        pytest.skip(f"no {name}.yaml")
    e = load.load(name, folder)
    assert set(SHIPPED[name]) <= set(e.tables)
    assert paper.unmatched(e) == []


def test_digits_full_has_every_cell_of_its_tables():
    assert paper.unmatched(load.load("digits_full", ROOT / "config/experiments")) == []


def test_what_looks_alike_is_not_the_same_cell():
    e = cifar10()
    facts = {name: RunFacts(Results(e), name) for name in e.runs}
    assert paper.published("table4", facts["eb-300"]) == {}  # too short
    assert paper.published("table4", facts["eb-speed"]) == {}
    assert paper.published("table1", facts["eb-speed"]) == {}
    assert paper.published("table3", facts["long-3-3-3"]) == {}
    assert paper.published("table5", facts["unpruned"]) == {}  # another dataset
    assert paper.published("table7", facts["unpruned"]) == {}
    assert paper.published("table7", facts["eb-magnitude-50"]) == {}
    assert paper.published("controls", facts["unpruned"]) == {}


def test_an_experiment_may_say_what_its_iterations_stand_for():
    raw = {"dataset": "celeba", "expert_iterations": {500_000: 600_000, 600_000: 500_000, 200_000: 200_000}}
    e = celeba(published=raw)
    results = Results(e)
    assert paper.published("table2", RunFacts(results, "eb-magnitude-600"))["fid"] == "5.61"
    assert paper.published("table5", RunFacts(results, "eb-magnitude-600"))["fid"] == "5.53"
    assert paper.published("table5", RunFacts(results, "ft-taylor"))["fid"] == "6.09"


# --- our numbers beside the published ones ------------------------------------------------------------


def test_table5_shows_differences_and_corrected_macs():
    e = celeba(seeds=[0, 1])
    fabricate(e, quality=lambda run, seed: 6.0 + seed)
    path, markdown, _ = write(e, "table5")
    rows = rows_of(path)
    assert "cfd" not in rows[0] and float(rows[0]["fid"]) == 6.5
    assert [row["paper_macs"] for row in rows] == ["23.9", *["6.0"] * 8, "5.2"]
    assert [row["paper_fid"] for row in rows][:2] == ["5.03", "5.57"]
    assert float(rows[0]["fid_difference"]) == pytest.approx(6.5 - 5.03)
    # Ours: 500K / (600K x 0.4) for EB.
    eb = next(row for row in rows if row["block"] == "EB")
    assert float(eb["speedup"]) == pytest.approx(500 / 240)
    assert float(eb["speedup_difference"]) == pytest.approx(500 / 240 - 1.89)
    text = markdown.read_text()
    assert "+1.47 ± 0.71" in text and "Paper FID (CelebA)" in text and "cFD" not in text
    for note in (
        "3.4 G MACs in its baseline rows",
        "legacy\\_pytorch",
        "weights 7ff4a85c3a63,",
        "torch 2.13.0",
        "30 samples and 100 real images (all train images)",
        "differences are ours minus the paper's",
    ):
        assert note in text, note


def test_table2_has_a_row_for_each_number_of_iterations():
    e = celeba(scale=0.1)
    fabricate(e)
    rows = rows_of(write(e, "table2")[0])
    assert [row["paper_fid"] for row in rows] == ["5.61", "5.53", "5.5", "5.42", "5.66", "5.58"]
    assert [row["iterations"] for row in rows][:2] == ["50000", "60000"]
    assert [row["paper_iterations"] for row in rows][:2] == ["500K", "600K"]
    assert rows[0]["paper_ticket_at"] == "15 (epoch)"


def test_table6_takes_the_rows_of_its_own_dataset():
    for name, fids in (
        ("lsun_church", ["26.58", "54.18", "37.6", "54.03", "46.12"]),
        ("lsun_bedroom", ["45.37", "217.07", "81.6", "144.58", "135.2"]),
    ):
        e = lsun(name)
        fabricate(e)
        path, markdown, _ = write(e, "table6")
        assert [row["paper_fid"] for row in rows_of(path)] == fids
        assert "batch of six" in markdown.read_text() and paper.NAMES[name] in markdown.read_text()


def test_table7_counts_speedups_over_its_own_unpruned_run():
    e = cifar10()
    fabricate(e)
    path, markdown, _ = write(e, "table7")
    rows = rows_of(path)
    ours = [float(row["speedup"]) for row in rows]
    # c = 0.4 at 50 %, 0.7 at 30 %; every network is as long as the unpruned one.
    assert ours == pytest.approx([1, 1, 1 / 1.4, 2.5, 2.5, 2.5, 3 / 0.7, 3 / 0.7])
    assert [row["block"] for row in rows] == ["Unpruned"] * 2 + ["50 %"] * 4 + ["50 % on average"] * 2
    assert [row["law"] for row in rows] == ["uniform", "SpeeD"] * 4
    assert float(rows[2]["seconds"]) == 2 * 60_000  # its own 300K steps and the unpruned 300K, on two devices
    assert "2.76 and 0.73" in markdown.read_text() and "30/60/55" in markdown.read_text()
    wanted = needs.paths(e, needs.table_needs(e, "table7"))
    assert not any("/800000.json" in path for path in wanted)


def test_other_protocols_and_datasets_show_no_difference():
    for changes, words in (
        ({"evaluation": {"protocols": ["clean"]}}, ("clean FID:", "another metric than clean FID")),
        ({"evaluation": {"protocols": ["classifier"]}}, ("cFD:", "another metric than cFD")),
        ({"dataset": {"name": "faces", "source": "images", "path": "x"}}, ("FID:", "another dataset;")),
    ):
        e = celeba(**changes)
        fabricate(e)
        path, markdown, _ = write(e, "table5")
        row, text = rows_of(path)[0], markdown.read_text()
        assert "fid_difference" not in row and "speedup_difference" not in row
        assert row["paper_fid"] == "5.03" and row["paper_speedup"] == "1.0"
        assert all(word in text for word in words)
        if "evaluation" in changes:  # only the published column is called FID
            assert "| FID |" not in text


def test_too_few_images_are_marked():
    e = lsun(scale=0.5)
    fabricate(e)
    path = layout.path(layout.METRICS, experiment=e.name, seed=0, run="eb")
    write_json(path, {**read_json(path), "ill_conditioned": True})
    _, markdown, tex = write(e, "table6")
    lines = markdown.read_text().splitlines()
    assert [line for line in lines if line.startswith("|") and "‡" in line] == [
        line for line in lines if "eb 0.5" in line
    ]
    assert any(line.startswith("‡ Fewer than four images") for line in lines)
    assert "0.5 of the paper's iterations" in markdown.read_text() and r"\ddag" in tex.read_text()


def test_a_table_with_nothing_run_is_still_a_table():
    for make in MAKERS.values():
        e = make()
        for table in e.tables:
            _, markdown, _ = write(e, table, partial=True)
            assert "So far" in markdown.read_text() and "Paper FID" in markdown.read_text()


@pytest.mark.parametrize("table", ["table2", "table5", "table6", "table7"])
def test_latex_of_the_new_tables(table):
    e = {"table6": lsun, "table7": cifar10}.get(table, celeba)(seeds=[0, 1], scale=0.5)
    fabricate(e)
    check_latex(write(e, table)[2].read_text(), 1 if table == "table2" else 2)


@pytest.mark.slow
def test_the_page_and_its_details_need_no_classifier(monkeypatch):
    monkeypatch.setattr(style, "DPI", 40)
    e = lsun()
    fabricate(e)
    page.write_report(e, Path("report.html"), partial=True)
    html = re.sub(r"base64,[^\"]+", "", Path("report.html").read_text())
    assert "cFD" not in html and "Confidence" not in html
    assert all(word in html for word in ("Precision", "Recall", "clean FID", "the paper's own metric"))


# --- claims -------------------------------------------------------------------------------------------


def claims_of(e, quality):
    fabricate(e, quality=lambda run, seed: quality.get(run, 50.0) + 0.01 * seed)
    return {claim.text: claim for claim in reading.read(Results(e))}


def test_claims_on_overlap_speed_and_comparable_quality():
    centre = {"unpruned": 5.15, "ta-eb": 5.5, "plain": 8.1, "eb-300": 9.3, "eb-speed": 8.9,
              "unpruned-300": 5.6, "unpruned-speed": 6.0, "finetune-magnitude-50": 15.0,
              "eb-magnitude-50": 7.0}  # fmt: skip
    claims = claims_of(cifar10(seeds=[0, 1, 2]), centre)

    def verdict(*words):
        (found,) = (claim for text, claim in claims.items() if all(word in text for word in words))
        return found.verdict

    assert verdict("overlapping regions") == "supported"
    assert verdict("Adding SpeeD to the early-bird ticket at 50 %") == "supported"
    assert verdict("Adding SpeeD to unpruned training") == "not supported"
    assert verdict("Adding SpeeD to timestep-aware training at 50 %") == reading.UNDECIDED
    assert verdict("Adding SpeeD to a network pruned by 50 % from new weights") == reading.UNDECIDED
    assert verdict("at 50 % trained for 900000 steps", "finetuning") == "supported"
    # 5.50 is within a tenth of 5.15; 3 / 0.7 ... 800K / (200K x 0.7) as the paper counts.
    assert verdict("comparable quality") == "supported"
    name = next(text for text in claims if "comparable quality" in text)
    assert "5.71×" in claims[name].evidence and "10 % above" in claims[name].evidence


def test_quality_far_above_is_not_comparable_and_one_seed_undecided():
    for seeds, ours, expected in (
        ([0, 1], 20.0, "not supported"),
        ([0], 5.0, reading.UNDECIDED),
    ):
        claims = claims_of(lsun(seeds=seeds), {"unpruned": 5.15, "ta-200": ours})
        (found,) = (claim for text, claim in claims.items() if "comparable quality" in text)
        assert found.verdict == expected
