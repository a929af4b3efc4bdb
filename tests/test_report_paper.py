"""Runs stand beside the published cells they name, and the tables of real datasets set ours beside them."""

import re
import shutil
from pathlib import Path

import pytest
import reported
import yaml
from conftest import ROOT
from reported import fabricate, rows_of, undrawn
from test_report import compiled

from ebdiff.experiment import layout, load, paper
from ebdiff.report import page, published, reading
from ebdiff.report.render import Corrected
from ebdiff.report.results import Results
from ebdiff.system.errors import UserError
from ebdiff.system.files import read_json, write_json

SHIPPED = sorted(path.stem for path in (ROOT / "config/experiments").glob("*.yaml"))
WHOLE = {  # experiments that have every cell of their tables
    "cifar10": ("table1", "table3", "table4", "table7", "table8", "table9"),
    "celeba": ("table2", "table5"),
    "lsun_church": ("table6",),
    "lsun_bedroom": ("table6",),
    "imagenet_ldm": ("table6",),
    "digits_full": ("table1", "table3", "table4", "table8", "table9"),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reported.vouched(monkeypatch)


def shipped(name, **changes):
    """A shipped experiment with some keys changed, called `mine`."""
    folder = Path("config/experiments")
    shutil.copytree(ROOT / folder, folder, dirs_exist_ok=True)
    (folder / "mine.yaml").write_text(yaml.safe_dump({"base": name, **changes}))
    return load.load("mine", folder)


def tables_of(e, table, **options):
    """The csv, md and tex of a table."""
    return reported.write(e, table, **options)[:3]


# --- cells --------------------------------------------------------------------------------------------


def unmatched(e):
    """The cells of an experiment's tables beside which not exactly one run listed there stands."""
    found = []
    for table, names in e.tables.items():
        for cell in paper.rows(table, e.published.dataset):
            same = [name for name in names if e.runs[name].paper == cell]
            if len(same) != 1:
                found.append(f"{table}: {cell}: {' and '.join(same) or 'no run'}")
    return found


@pytest.mark.parametrize("name", WHOLE)
def test_every_published_cell_has_exactly_one_run(name):
    e = load.load(name, ROOT / "config/experiments")
    assert set(WHOLE[name]) <= set(e.tables)
    assert unmatched(e) == []
    for table in WHOLE[name]:  # and no row of ours is without one
        assert all(published.row(e, table, run) for run in e.tables[table] if run != "random-ticket-50")


def test_a_cell_without_a_run_and_one_with_two_are_named():
    e = shipped("lsun_church", tables={"table6": ["unpruned", "scratch-50", "eb-50", "ta-eb-300k"]})
    assert unmatched(e) == ["table6: ta-eb-200k: no run"]
    e = shipped("lsun_church", runs={"ta-eb-200k": {"paper": "ta-eb-300k"}})
    assert unmatched(e) == ["table6: ta-eb-200k: no run", "table6: ta-eb-300k: ta-eb-200k and ta-eb-300k"]


def test_the_tables_of_the_five_datasets_are_all_of_the_papers_cells():
    known = {(t, d, c) for t in paper.TABLES for d in published.NAMES for c in paper.rows(t, d)}
    names = [name for name in WHOLE if name != "digits_full"]
    ours = [load.load(name, ROOT / "config/experiments") for name in names]
    assert known == {
        (t, e.published.dataset, e.runs[run].paper)
        for e in ours for t in e.tables for run in e.tables[t] if t in paper.TABLES
    }  # fmt: skip
    assert len(known) == sum((8, 6, 2, 20, 10, 14, 8, 7, 7))  # Tables 1 to 9


def described(e, run):
    """What a run is, in the words of the csv: method, criterion, asked rates."""
    experts = sorted(run.experts, key=lambda x: x.serve)
    kind = {"unpruned": "unpruned", "scratch": "scratch", "ta-eb": "ta-eb"}.get(run.method, "eb")
    criterion = experts[0].criterion if kind == "eb" else None
    if criterion and experts[0].search == "iterwise":
        criterion = "iterwise-magnitude"
    return kind, criterion, [x.rate or 0 for x in experts], [x.iterations for x in experts]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_run_is_what_its_cell_is_about(name):
    """The rows' own words on method, criterion, rates and iterations, of whatever each table prints."""
    e = load.load(name, ROOT / "config/experiments")
    unknown = ("celebahq_ldm", "imagenette_ldm")  # their paper's tables aren't at hand
    assert any(run.paper for run in e.runs.values()) or name in unknown
    # Their notes tell how they compare.
    own = (
        "digits",
        "smoke",
        "cifar10_tiny",
        "cifar10_latent",
        "images",
        "sketches",
        "quickdraw",
        "kanjivg",
        "vmnist",
    )
    own_lengths = name.startswith(own)
    for run in e.runs.values():
        kind, criterion, rates, steps = described(e, run)
        law = "+speed" if run.experts[0].law == "speed" else ""
        for table in paper.TABLES:
            row = paper.rows(table, e.published.dataset).get(run.paper)
            if row is None:
                continue
            if table == "table7":
                speed = (run.method, law) == ("control", "+speed")
                assert row["method"] == ("speed" if speed else kind + law)
                average = sum(r * (x.serve[1] - x.serve[0]) for r, x in zip(rates, run.experts, strict=True))
                assert row["block"] in ("unpruned", "rate0.5", "average0.5")
                assert average / 1000 == (0 if row["block"] == "unpruned" else pytest.approx(0.5))
            else:
                assert not law
                asked = row.get("nominal_rate") or ("0.3/0.6/0.8" if kind == "ta-eb" else None)
                asked = "/".join(row[f"rate{i}"] for i in (1, 2, 3)) if "rate1" in row else asked
                if asked and kind != "unpruned":
                    assert asked == "/".join(f"{rate:g}" for rate in rates), (run.paper, table)
                word = row.get("method") or row.get("criterion")
                if word and kind != "ta-eb":
                    assert word == (criterion or kind) or (table, word) == ("table6", "eb")
                if "overlap" in row:
                    assert (row["overlap"] == "yes") == any(x.span != x.serve for x in run.experts)
            if not own_lengths:
                printed = published.iterations(row, len(steps))
                assert steps == [max(1, round(n * e.scale)) for n in printed], (run.paper, table)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runs": {"eb-50": {"paper": "eb-50-magnitud"}}},
         "mine.yaml: runs.eb-50.paper: 'eb-50-magnitud' is not known; did you mean 'eb-50-magnitude'?"),
        ({"runs": {"eb-50": {"paper": "eb-50-magnitude-600k"}}}, "runs.eb-50.paper: 'eb-50-magnitude-600k'"),
        ({"runs": {"eb-50": {"paper": ["a"]}}}, "runs.eb-50.paper"),
        ({"published": {"dataset": "celeba"}}, "runs.eb-50.paper: 'eb-50-magnitude' is not known"),
        ({"runs": {"eb-50": {"papers": "ta-eb"}}}, "did you mean 'paper'"),
    ],
)  # fmt: skip
def test_cells_that_the_dataset_doesnt_have_are_refused(changes, words):
    with pytest.raises(UserError) as error:
        shipped("digits", **changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_value_is_shown_where_the_named_cell_is_printed_and_nowhere_else():
    e = shipped("cifar10", tables={"table1": ["eb-50", "eb-50-300k", "random-ticket-50"]})
    assert published.row(e, "table1", "eb-50")["fid"] == published.row(e, "table4", "eb-50")["fid"] == "7.32"
    for table, run in (
        ("table1", "eb-50-300k"),  # of Table 7
        ("table7", "eb-50"),
        ("table3", "ta-eb-300k-300k-300k"),
        ("table5", "unpruned"),  # another dataset
        ("controls", "unpruned"),
        ("table4", "random-ticket-50"),  # names none
    ):
        assert published.row(e, table, run) == {}, (table, run)
    fabricate(e)
    assert [row["paper_fid"] for row in rows_of(tables_of(e, "table1")[0])] == ["7.32", "", ""]


def test_a_corrected_number_is_shown_for_a_printed_one():
    e = load.load("cifar10", ROOT / "config/experiments")
    row = published.row(e, "table4", "ta-eb")
    assert (published.number(row, "fid"), published.both(row, "fid")) == (7.69, Corrected(7.69, printed=7.29))
    row = published.row(e, "table8", "ta-eb-30-40-90")
    assert published.both(row, "average_macs_g") == Corrected(1.47, printed=1.57)
    assert published.both(published.row(e, "table4", "eb-50"), "fid") == Corrected(7.32, printed=7.32)
    assert published.number({}, "fid") is published.both({}, "fid") is None


# --- our numbers beside the published ones ------------------------------------------------------------


def test_table5_shows_differences_and_corrected_macs():
    e = shipped("celeba", seeds=[0, 1])
    fabricate(e, quality=lambda run, seed: 6.0 + seed)
    path, markdown, _ = tables_of(e, "table5")
    rows = rows_of(path)
    assert "cfd" not in rows[0] and float(rows[0]["fid"]) == 6.5
    assert [row["paper_macs"] for row in rows] == ["23.9", *["6.0"] * 8, "5.2"]
    assert [row["paper_fid"] for row in rows][:2] == ["5.03", "5.57"]
    assert float(rows[0]["fid_difference"]) == pytest.approx(6.5 - 5.03)
    # Ours: 500K / (600K x 0.4) for EB.
    eb = next(row for row in rows if row["block"] == "EB")
    assert float(eb["speedup"]) == pytest.approx(500 / 240)
    assert float(eb["speedup_difference"]) == pytest.approx(500 / 240 - 1.89)
    words = markdown.read_text()
    assert "+1.47 ± 0.71" in words and "Paper FID (CelebA)" in words and "cFD" not in words
    for note in (
        "3.4 G MACs in its baseline rows",
        "legacy\\_pytorch",
        "30 samples and 100 real images (all train images)",
        "differences are ours minus the paper's. Ours: a network of 1.00 M parameters instead of 78.7 M.",
    ):
        assert note in words, note


def test_both_values_stand_where_the_paper_contradicts_itself(monkeypatch):
    """Those that the paper's tables print, beside what its other tables, or counting, give."""
    undrawn(monkeypatch)
    e = shipped("cifar10")
    fabricate(e, quality=lambda run, seed: 7.5)
    path, markdown, tex = tables_of(e, "table4")
    rows = {row["run"]: row for row in rows_of(path)}
    aware, half, third = (rows[e.runs[name].title] for name in ("ta-eb", "eb-50", "eb-30"))
    assert (aware["paper_fid"], aware["paper_fid_as_printed"]) == ("7.69", "7.29")
    assert float(aware["fid_difference"]) == pytest.approx(7.5 - 7.69)
    assert (half["paper_macs"], half["paper_macs_as_printed"]) == ("1.5", "3.4")
    assert (third["paper_macs"], third["paper_macs_as_printed"]) == ("3.4", "3.4")
    for words in (markdown.read_text(), tex.read_text()):
        assert words.count("7.69 (printed 7.29)") == 1
        assert words.count("1.50 (printed 3.40)") == 9  # the rows at 50 %
        assert words.count("(printed") == 10
    page.write_page(Results(e, partial=True), Path("report.html"))
    assert Path("report.html").read_text().count("<td>7.69<small>(printed 7.29)</small></td>") == 1
    path, markdown, _ = tables_of(e, "table8")
    assert [(row["paper_macs"], row["paper_macs_as_printed"]) for row in rows_of(path)][2] == ("1.47", "1.57")
    assert markdown.read_text().count("1.47 (printed 1.57)") == markdown.read_text().count("(printed") == 1


def test_table2_has_a_row_for_each_number_of_iterations():
    e = shipped("celeba", scale=0.1)
    fabricate(e)
    rows = rows_of(tables_of(e, "table2")[0])
    assert [row["paper_fid"] for row in rows] == ["5.61", "5.53", "5.5", "5.42", "5.66", "5.58"]
    assert [row["iterations"] for row in rows][:2] == ["50000", "60000"]
    assert [row["paper_iterations"] for row in rows][:2] == ["500K", "600K"]
    assert rows[0]["paper_ticket_at"] == "15 (epoch)"


def test_iterations_that_stand_for_other_ones_are_told():
    assert published.scale(shipped("celeba")) == 1
    assert published.scale(shipped("celeba", scale=0.00037)) == 0.00037  # rounded as loading rounds
    assert published.scale(load.load("digits_full", ROOT / "config/experiments")) is None
    e = shipped("celeba", runs={"eb-50-600k": {"iterations": 900_000}})
    assert published.scale(e) is None
    fabricate(e)
    path, markdown, _ = tables_of(e, "table2")
    assert [(row["iterations"], row["paper_iterations"]) for row in rows_of(path)][1] == ("900000", "600K")
    assert "other iterations, which stand for the paper's" in markdown.read_text()


def test_table6_takes_the_rows_of_its_own_dataset():
    for name, fids in (
        ("lsun_church", ["26.58", "54.18", "37.6", "54.03", "46.12"]),
        ("lsun_bedroom", ["45.37", "217.07", "81.6", "144.58", "135.2"]),
    ):
        e = shipped(name)
        fabricate(e)
        path, markdown, _ = tables_of(e, "table6")
        assert [row["paper_fid"] for row in rows_of(path)] == fids
        assert "batch of six" in markdown.read_text() and published.NAMES[name] in markdown.read_text()


def test_table7_counts_speedups_over_its_own_unpruned_run():
    e = shipped("cifar10")
    fabricate(e)
    path, markdown, _ = tables_of(e, "table7")
    rows = rows_of(path)
    # c = 0.4 at 50 %, 0.7 at 30 %; every network is as long as the unpruned one.
    ours = [float(row["speedup"]) for row in rows]
    assert ours == pytest.approx([1, 1, 1 / 1.4, 2.5, 2.5, 2.5, 3 / 0.7, 3 / 0.7])
    assert [row["block"] for row in rows] == ["Unpruned"] * 2 + ["50 %"] * 4 + ["50 % on average"] * 2
    assert [row["law"] for row in rows] == ["uniform", "SpeeD"] * 4
    assert float(rows[2]["seconds"]) == 2 * 60_000  # its own 300K steps and the unpruned 300K, on two devices
    assert "2.76 and 0.73" in markdown.read_text() and "30/60/55" in markdown.read_text()


def test_other_protocols_and_datasets_show_no_difference():
    for changes, words in (
        ({"evaluation": {"protocols": ["clean"]}}, ("clean FID:", "another metric than clean FID")),
        ({"evaluation": {"protocols": ["classifier"]}}, ("cFD:", "another metric than cFD")),
        ({"dataset": {"name": "faces", "source": "images", "path": "x"}}, ("FID:", "another dataset;")),
    ):
        e = shipped("celeba", **changes)
        fabricate(e)
        path, markdown, _ = tables_of(e, "table5")
        row, told = rows_of(path)[0], markdown.read_text()
        assert "fid_difference" not in row and "speedup_difference" not in row
        assert row["paper_fid"] == "5.03" and row["paper_speedup"] == "1.0"
        assert all(word in told for word in words)
        if "evaluation" in changes:  # only the published column is called FID
            assert not re.search(r"\| +FID \|", told)


def test_too_few_images_are_marked():
    e = shipped("lsun_church", scale=0.5)
    fabricate(e)
    path = layout.path(layout.METRICS, experiment=e.name, seed=0, run="eb-50")
    write_json(path, {**read_json(path), "ill_conditioned": True})
    _, markdown, tex = tables_of(e, "table6")
    lines = markdown.read_text().splitlines()
    (marked,) = [line for line in lines if line.startswith("|") and "‡" in line]
    assert "EB 50 % ‡" in marked
    assert any(line.startswith("‡ Fewer than four images") for line in lines)
    assert "0.5 of the paper's iterations" in markdown.read_text() and r"\ddag" in tex.read_text()


@pytest.mark.parametrize("name", ["cifar10", "celeba", "lsun_church", "digits_full"])
def test_a_table_with_nothing_run_is_still_a_table(name):
    e = shipped(name)
    for table in e.tables:
        words = tables_of(e, table, partial=True)[1].read_text()
        assert "So far" in words and ("Paper FID" in words or table == "controls")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex")
@pytest.mark.parametrize("name", SHIPPED)
def test_latex_fits_a_page_of_two_columns(name):
    """Every table of every shipped experiment, as wide and as long as its numbers make it."""
    e = shipped(name, **({"seeds": [0, 1, 2]} if name != "digits_full" else {}))
    fabricate(e, quality=lambda run, seed: 100 + 11.3 * seed)
    tables = {table: tables_of(e, table)[2].read_text() for table in e.tables}
    assert not any(word in tex for tex in tables.values() for word in ("makebox", "resizebox", "scalebox"))
    assert compiled(tables) == []


def test_the_page_and_its_details_need_no_classifier(monkeypatch):
    undrawn(monkeypatch)
    e = shipped("lsun_church", evaluation={"precision_recall": True})
    fabricate(e)
    page.write_page(Results(e, partial=True), Path("report.html"))
    html = re.sub(r"base64,[^\"]+", "", Path("report.html").read_text())
    assert "cFD" not in html and "Confidence" not in html
    assert all(word in html for word in ("Precision", "Recall", "clean FID", "the paper's own metric"))


# --- claims -------------------------------------------------------------------------------------------


def claims_of(e, quality):
    fabricate(e, quality=lambda run, seed: quality.get(run, 50.0) + 0.01 * seed)
    return {claim.text: claim for claim in reading.read(Results(e))}


def test_claims_on_overlap_speed_and_comparable_quality():
    centre = {"unpruned": 5.15, "ta-eb": 5.5, "ta-eb-plain": 8.1, "ta-eb-same-tickets-plain": 5.0,
              "ta-eb-random": 6.0, "ta-eb-full": 5.1, "raw-ticket-50": 8.0, "ticket-at-2": 6.5,
              "eb-50-300k": 9.3, "eb-50-speed": 8.9,
              "unpruned-300k": 5.6, "unpruned-speed": 6.0, "magnitude-50": 15.0, "eb-50": 7.0}  # fmt: skip
    claims = claims_of(shipped("cifar10", seeds=[0, 1, 2]), centre)

    def verdict(*words):
        (found,) = (claim for name, claim in claims.items() if all(word in name for word in words))
        return found.verdict

    assert verdict("overlapping regions", "(Table 3)") == "supported"
    assert verdict("overlapping regions", "with the same tickets") == "not supported"
    assert verdict("from its own tickets", "random") == "supported"
    assert verdict("from its own tickets", "full range") == "not supported"
    assert verdict("at 50 % trained for 900000 steps", "raw weights") == "supported"
    assert verdict("at 50 % trained for 900000 steps", "cut after 2 epochs") == "not supported"
    assert verdict("Adding SpeeD to the early-bird ticket at 50 %") == "supported"
    assert verdict("Adding SpeeD to unpruned training") == "not supported"
    assert verdict("Adding SpeeD to timestep-aware training at 50 %") == reading.UNDECIDED
    assert verdict("Adding SpeeD to a network pruned by 50 % from new weights") == reading.UNDECIDED
    assert verdict("at 50 % trained for 900000 steps", "finetuning") == "supported"
    # 5.50 is within a tenth of 5.15; 3 / 0.7 ... 800K / (200K x 0.7) as the paper counts.
    assert verdict("comparable quality") == "supported"
    name = next(name for name in claims if "comparable quality" in name)
    for words in ("5.71×", "10 % above", "7.69 (printed 7.29) against 5.15, +49 %, would fail that margin"):
        assert words in claims[name].evidence


def test_quality_far_above_is_not_comparable_and_one_seed_undecided():
    for seeds, ours, expected in (
        ([0, 1, 2], 20.0, "not supported"),
        ([0, 1], 5.0, reading.UNDECIDED),
    ):
        claims = claims_of(shipped("lsun_church", seeds=seeds), {"unpruned": 5.15, "ta-eb-200k": ours})
        (found,) = (claim for name, claim in claims.items() if "comparable quality" in name)
        assert found.verdict == expected


def test_the_papers_own_distances_of_celeba_would_be_comparable():
    claims = claims_of(shipped("celeba"), {})
    (found,) = (claim for name, claim in claims.items() if "comparable quality" in name)
    assert "The paper's own 5.41 against 5.03, +8 %, would keep that margin." in found.evidence


# --- ratios to baselines ------------------------------------------------------------------------------


RATIOS = [(t, d, *key, row) for t in paper.TABLES for d in published.NAMES
          for key, row in paper.ratios(t, d).items()]  # fmt: skip


def test_the_ratios_of_the_papers_text_are_those_of_printed_speedups():
    assert len(RATIOS) == 14
    ends = {"finetune": max, "scratch": min}  # the fastest, the slowest row
    for table, dataset, cell, method, row in RATIOS:
        rows = paper.rows(table, dataset)
        speedup = {c: float(r["speedup"]) for c, r in rows.items()}
        exact, printed = speedup[cell] / speedup[row["over"]], float(row["printed"])
        assert int(100 * exact) <= round(100 * printed) <= int(100 * exact) + 1, (table, cell)
        same = {
            c: s for c, s in speedup.items()
            if c.startswith("scratch" if method == "scratch" else ("random", "magnitude", "taylor", "diff"))
        }  # fmt: skip
        if method == "scratch" or row["over"] in same:  # 10.32 isn't over the pipeline it names
            assert speedup[row["over"]] == ends[method](same.values())
    named = [(t, c) for t, _, c, method, row in RATIOS if method == "finetune" and "scratch" in row["over"]]
    assert named == [("table4", "ta-eb")]


def test_ratios_to_baselines_stand_beside_those_of_the_text():
    e = shipped("cifar10", seeds=[0, 1, 2])
    fabricate(e)
    path, markdown, _ = tables_of(e, "table4")
    rows = dict(zip(e.tables["table4"], rows_of(path), strict=True))
    ours = {name: [row[f"vs_{m}"] for m in ("scratch", "finetune")] for name, row in rows.items()}
    # Step times 0.7 and 0.4: scratch 8 / (8 + 9 x 0.7) at 30 %, prune-and-finetune 8 / (8 + 0.4) at 50 %.
    scratch, finetune = 8 / 14.3, 8 / 8.4
    assert [float(x) for x in ours["eb-50"]] == pytest.approx([8 / 3.6 / scratch, 8 / 3.6 / finetune])
    assert [float(x) for x in ours["ta-eb"]] == pytest.approx([8 / 1.4 / scratch, 8 / 1.4 / finetune])
    assert ours["unpruned"] == ours["scratch-30"] == ours["magnitude-50"] == ["", ""]
    said = [rows["eb-50"][f"paper_vs_{m}"] for m in ("scratch", "finetune")]
    assert said == ["4.38", "2.57"] and rows["ta-eb"]["paper_vs_scratch"] == "10.32"
    assert rows["eb-30"]["paper_vs_scratch"] == "" and "5.78/0.56" in markdown.read_text()
    claims = {claim.text: claim for claim in reading.read(Results(e))}
    name = "TA-EB 30/60/80 %, timed as in Table 4, is faster than "
    found = claims[f"{name}training a pruned network from scratch"]
    assert found.verdict == "supported" and found.kind == "exploratory"
    assert "Over Scratch 30 %, as the paper's text, which says 10.32. 10.21× ± 0.23 by" in found.evidence
    assert f"{name}training, pruning and finetuning" not in claims  # that 10.32 is over scratch, too
    # In Table 7 everything is 300K steps long: 3 / (3 + 1.2) from scratch, 3 / 1.2 the ticket.
    row = rows_of(tables_of(e, "table7")[0])[4]
    assert (float(row["vs_scratch"]), row["paper_vs_scratch"]) == (pytest.approx(3.5), "3.45")
    assert "vs_finetune" not in row


def test_without_baselines_there_are_no_ratios():
    e = shipped("cifar10_tiny")
    fabricate(e)
    path, markdown, _ = tables_of(e, "table4")
    assert not any("vs_" in key for key in rows_of(path)[0]) and "Over scratch" not in markdown.read_text()
