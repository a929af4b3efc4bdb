"""The report reads a small made-up results tree; every expected number is computed by hand."""

import json
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import reported
from reported import ALL_TABLES, HOSTILE, fabricate, make, rows_of, undrawn

from ebdiff.experiment import layout, load, places
from ebdiff.experiment.jobs import Job
from ebdiff.experiment.records import Records, sealed
from ebdiff.experiment.stages import FIGURES
from ebdiff.report import figures, page, reading, render, style, text
from ebdiff.report.facts import RunFacts
from ebdiff.report.results import Missing, Results
from ebdiff.system.errors import UserError
from ebdiff.system.files import read_json, write_json, write_text


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reported.vouched(monkeypatch)
    monkeypatch.setattr(style, "DPI", 40)  # small pictures are drawn faster


def write(e, table, **options):
    """The csv, md and tex of a table."""
    return reported.write(e, table, **options)[:3]


# --- numbers as people read them ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.25, "0.25 s"), (45, "45.0 s"), (119, "119 s"), (120, "2.00 min"), (90 * 60, "90.0 min"),
        (2 * 3600, "2.00 h"), (47 * 3600, "47.0 h"), (10 * 86400, "10.0 days"),
        (267_794 * 3600, "30.5 years"),
    ],
)  # fmt: skip
def test_durations_have_a_unit_that_fits(seconds, words):
    assert text.duration(seconds) == words


def test_spans_name_both_ends_once():
    assert text.span([3, 1, 2]) == "1-3" and text.span([2, 2]) == "2" and text.span([]) == text.MISSING
    assert text.span([0.301, 0.299], text.percent) == "29.9-30.1"
    assert text.span([0.3, 0.30001], text.percent) == "30"  # as they are shown


# --- tables -------------------------------------------------------------------------------------------


def test_table4_speedups_and_seconds_by_hand():
    e = make()
    fabricate(e)
    rows = {row["run"]: row for row in rows_of(write(e, "table4")[0])}

    def costs(title):
        keys = ("speedup", "speedup_with_search", "speedup_device_time", "speedup_macs", "seconds")
        return [float(rows[title][k]) for k in keys]

    # c = 0.4 at 50 %; the ticket is found after 9 epochs of 29 steps = 261.
    assert costs("Unpruned") == pytest.approx([1, 1, 1, 1, 2 * 80])  # on two devices each
    eb = [800 / 360, 800 / (360 + 261), 800 / (360 + 261), 800 / 225, 2 * (90 + 26.1)]
    assert costs(HOSTILE) == pytest.approx(eb)
    assert costs("Random ticket") == pytest.approx(eb)
    assert costs("Scratch") == pytest.approx([800 / 1160] * 3 + [800 / 1025, 2 * (90 + 80)])
    assert costs("Finetune") == pytest.approx([800 / 840] * 3 + [800 / 825, 2 * (10 + 80)])
    # 400 steps each at c = 0.70, 0.38, 0.25; one search serves all three.
    ta = [800 / 280, 800 / (280 + 261), 800 / (532 + 261), 800 / 240, 2 * (120 + 26.1)]
    assert costs("TA-EB") == pytest.approx(ta)
    assert float(rows["TA-EB"]["rate"]) == pytest.approx(0.64)
    assert float(rows["TA-EB"]["macs"]) == pytest.approx(0.24 * 18e6 + 0.2 * 7e6 + 0.56 * 2e6)


def test_the_time_of_gradient_masks_is_part_of_the_search():
    taylor, like = {"criterion": "taylor"}, {"method": "control", "init": "fresh", "rate": 0.5}
    raw = deepcopy(reported.RAW)
    raw["searches"]["full"]["criteria"] = ["magnitude", "taylor"]
    for run in ("eb-50", "finetune-50", "ta-eb"):
        raw["runs"][run] |= taylor
    raw["runs"]["like"] = {"title": "Like", "iterations": "like-eb-50", **like}
    e = load.parse(raw, "test.yaml")
    fabricate(e)
    assert {str(path) for path in Path("results").rglob("masks.ledger.json")} == {
        str(path) for path in Job.of(e, "tabulate").reads if path.name == "masks.ledger.json"
    }
    path, markdown, _ = write(e, "table4")
    rows = {row["run"]: row for row in rows_of(path)}

    def costs(title):
        keys = ("speedup", "speedup_with_search", "speedup_device_time", "seconds")
        return [float(rows[title][k]) for k in keys]

    # Two seconds an interval, nine of 24: 18 s, or 180 dense steps. Of the finished network 2 s, 20 steps.
    spent = 360 + 261 + 180
    assert costs(HOSTILE) == pytest.approx([800 / 360, 800 / spent, 800 / spent, 2 * (90 + 26.1) + 18])
    assert costs("Finetune") == pytest.approx([800 / 840, 800 / 860, 800 / 860, 2 * (10 + 80) + 2])
    # One search, and one passing over its snapshots, serve all three.
    ta = [800 / 280, 800 / (280 + 261 + 180), 800 / (532 + 261 + 180), 2 * (120 + 26.1) + 18]
    assert costs("TA-EB") == pytest.approx(ta)
    assert costs("Random ticket")[1] == pytest.approx(800 / (360 + 261))  # magnitude's search, but no masks
    assert "The time of gradient criteria's masks" in markdown.read_text()
    bars = figures._timeline(RunFacts(Results(e), "ta-eb"), 0)
    assert [bar[:3] for bar in bars[1:4]] == [
        ("search full", 0, pytest.approx(26.1)), ("taylor masks, EMA", pytest.approx(26.1), 18),
        ("expert 0-260, 30 %", pytest.approx(44.1), 40),
    ]  # fmt: skip
    where = dict(expert="fresh-0.5-t0-1000", milestone="like-eb-50", seed=0)
    read = Job.of(e, "finetune-region", **where).reads
    assert layout.path(layout.MASKS_LEDGER, experiment="digits", seed=0, search="full", criterion="taylor",
                       weights="ema") in read  # fmt: skip
    from ebdiff.training.train import milestone_steps  # here, because the report imports no torch

    steps = milestone_steps(e, e.runs["like"].experts[0], "like-eb-50", 0)
    assert steps == round(spent / 0.4)


def test_table4_published_values_stand_on_the_right_rows():
    e = make()
    fabricate(e)
    csv_path, markdown, _ = write(e, "table4")
    fids = [(row["paper_fid"], row["paper_speedup"], row["paper_macs"]) for row in rows_of(csv_path)]
    assert fids == [
        ("5.15", "1.0", "6.1"), ("8.47", "0.71", "1.5"), ("15.23", "0.95", "1.5"),
        ("7.32", "2.45", "1.5"), ("", "", ""), ("7.69", "5.78", "1.3"),
    ]  # fmt: skip
    words = markdown.read_text()
    for note in ("7.29", "7.69 M", "Ours are digits.", "CIFAR-10", "torch-pruning", r"\[a\] A remark."):
        assert note in words


def test_every_other_table():
    e = make(seeds=(0, 2), more=True)
    fabricate(e)
    first, second = rows_of(write(e, "table1")[0])
    assert (first["ticket_at"], first["paper_ticket_at"]) == ("8-10 (epoch)", "4 (epoch)")
    assert first["paper_fid"] == "7.32"
    # 5 and 3 of 40 mask entries; the iteration-wise search is another training than the unpruned one.
    assert (float(first["to_final"]), first["to_final_seeds"]) == (pytest.approx((5 + 3) / 80), "2")
    assert (second["to_final"], second["to_final_seeds"]) == ("", "0")
    assert (second["criterion"], second["ticket_at"]) == ("iterwise-magnitude", "54-66 (iteration)")
    assert second["paper_ticket_at"] == "1144 (iteration)"
    apart, overlapped = rows_of(write(e, "table3")[0])
    assert [apart[f"region{i}"] for i in (1, 2, 3)] == ["0-240", "240-440", "440-1000"]
    assert (apart["overlap"], apart["paper_fid"]) == ("no", "8.1")
    assert (overlapped["region1"], overlapped["overlap"], overlapped["paper_fid"]) == ("0-260", "yes", "7.69")
    denser, _ = rows_of(write(e, "table8")[0])
    assert [float(denser[f"rate{i}"]) for i in (1, 2, 3)] == [0.3, 0.4, 0.8]
    assert (float(denser["rate"]), denser["paper_fid"]) == (pytest.approx(0.6), "7.48")
    plain, longer = rows_of(write(e, "table9")[0])
    assert [longer[f"iterations{i}"] for i in (1, 2, 3)] == ["400", "400", "600"]
    assert (longer["paper_iterations"], longer["paper_fid"]) == ("200K / 200K / 300K", "7.56")
    assert plain["paper_iterations"] == "3 × 200K"
    narrow, short, ta_dense, _ = rows_of(write(e, "controls")[0])
    assert narrow["iterations"] == "500-502"
    assert float(short["speedup"]) == pytest.approx((800 / 500 + 800 / 502) / 2)
    assert float(ta_dense["rate"]) == 0
    assert float(ta_dense["speedup_device_time"]) == pytest.approx((800 / 1461 + 800 / 1519) / 2)


def test_agreement_has_a_column_where_samples_are_asked_to_be_of_a_class():
    raw = deepcopy(reported.RAW)
    raw["dataset"]["classes"], raw["training"]["label_dropout"], raw["sampling"]["guidance"] = 10, 0.1, 3.0
    e = load.parse(raw, "test.yaml")
    fabricate(e)
    for i, run in enumerate(e.runs):
        path = layout.path(layout.METRICS, experiment="digits", seed=0, run=run)
        write_json(path, read_json(path) | {"agreement": 0.9 - i / 100})
    csv, markdown, _ = write(e, "table4")
    assert [float(row["agreement"]) for row in rows_of(csv)] == [0.9, 0.89, 0.88, 0.87, 0.86, 0.85]
    assert "asked of them, by guidance of 3, for which a step takes two passes." in markdown.read_text()
    plain = make()
    fabricate(plain)
    assert not any("greement" in path.read_text() for path in write(plain, "table4"))


def test_one_seed_has_no_spread_and_several_have():
    one, two = make(), make(seeds=(0, 2), name="two")
    fabricate(one)
    fabricate(two)
    assert "20.00 ±" not in write(one, "table4")[1].read_text()
    path, markdown, tex = write(two, "table4")
    assert "21.00 ± 1.41" in markdown.read_text()
    assert r"21.00 $\pm$ 1.41" in tex.read_text()
    row = rows_of(path)[0]
    assert (row["cfd"], row["cfd_seeds"]) == ("21.0", "2")
    assert float(row["cfd_std"]) == pytest.approx(2**0.5)


def bold_of(path):
    """(row, what stands bold in it) of a Markdown table."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")][2:]
    return [(i, word) for i, line in enumerate(lines) for word in re.findall(r"\*\*(.+?)\*\*", line)]


def test_the_lowest_mean_is_bold_unless_its_ticket_moved_or_seeds_are_missing():
    e = make(seeds=(0, 1))
    centre = {"ta-eb": 3.0, "scratch-50": 4.0, "eb-50": 9.0}
    fabricate(e, quality=lambda run, seed: centre.get(run, 10.0) + seed)
    path, markdown, tex = write(e, "table4")
    assert bold_of(markdown) == [(5, "3.50 ± 0.71"), (5, "0.035 ± 0.007")]  # cFD and KID
    assert tex.read_text().count(r"\textbf") == 2 and "*" not in path.read_text()
    assert "Bold: the lowest mean" in markdown.read_text()
    fabricate(e, quality=lambda run, seed: centre.get(run, 10.0) + seed, settled=False)
    assert bold_of(write(e, "table4")[1]) == [
        (1, "4.50 ± 0.71"),
        (1, "0.045 ± 0.007"),
    ]  # scratch has no ticket
    layout.path(layout.METRICS, experiment="digits", seed=1, run="unpruned").unlink()
    markdown = write(e, "table4", partial=True)[1]
    assert bold_of(markdown) == [] and "Bold" not in markdown.read_text()


def test_a_table_shows_the_seeds_that_all_its_rows_have():
    e = make(seeds=(0, 1, 2))
    fewer = e.runs["eb-50"].model_copy(update={"seeds": (2, 1)})
    e = e.model_copy(update={"runs": {**e.runs, "eb-50": fewer}})
    fabricate(e)  # 20 plus the seed
    path, markdown, _ = write(e, "table4")
    assert {(row["cfd"], row["cfd_seeds"]) for row in rows_of(path)} == {("21.5", "2")}
    assert "Seeds 1, 2, which all rows have" in markdown.read_text()
    assert "which all rows have" not in write(make(seeds=(0, 1)), "table4", partial=True)[1].read_text()


def test_how_quality_was_measured_stands_in_a_side_file():
    e = make(seeds=(0, 1))
    fabricate(e)
    path = layout.path(layout.METRICS, experiment="digits", seed=1, run="ta-eb")
    metrics = read_json(path)
    metrics["protocols"]["classifier"]["versions"] = {"torch": "2.14.0"}
    write_json(path, metrics)
    *written, side = reported.write(e, "table4")
    same, other = json.loads(side.read_text())
    assert len(same["runs"]) == 11 and same["weights_sha256"] == "7ff4a85c3a6378f0dfc8433ffd789663"
    assert (other["versions"], other["runs"]) == ({"torch": "2.14.0"}, ["ta-eb, seed 1"])
    assert not any("7ff4a85c" in p.read_text() or "2.13.0" in p.read_text() for p in written)


def test_under_every_table_and_figure_of_quality_stands_how_networks_were_executed(monkeypatch):
    undrawn(monkeypatch)
    e = make(seeds=(0, 1), more=True)
    fabricate(e)
    how, where = "fp32, 2 processes on a quiet test machine", "fp32 on a quiet test machine"
    line = f"Executed: training {how}; sampling {where}."
    for table in e.tables:
        _, markdown, tex = write(e, table)
        assert line in markdown.read_text() and line in tex.read_text()
    html, _ = page_of(e)
    assert f"<dt>Executed</dt><dd>{line.removeprefix('Executed: ')}</dd>" in html
    captions = re.findall("<figcaption>(.*?)</figcaption>", html)
    assert [line in words for words in captions if words.startswith("Quality against")] == [True, True]
    checks = html[html.index("Checks on the samples") :]
    assert line in checks[: checks.index("</figure>")]


def test_under_seconds_stands_which_trainings_were_linked_and_from_where():
    e = make(seeds=(0, 1))
    fabricate(e)
    (expert,) = e.runs["eb-50"].experts
    where = dict(expert=(key := expert.key), milestone=expert.iterations)
    linked = [Job.of(e, "finetune-region", seed=seed, **where) for seed in e.seeds]
    linked += [Job.of(e, "train-dense", seed=0, search="full"), Job.of(e, "sample", seed=0, run="eb-50")]
    assert "Linked, not trained here" not in write(e, "table4")[1].read_text()
    for job, other in zip(linked, ("digits_full", "digits_full", "first", "first"), strict=True):
        told = {"adopted": f"results/{other}/records/seed0/x.json"}
        write_json(job.note("records", "json"), sealed(told))
    line = (
        "Linked, with the seconds that they took where they were trained: full from results/first; "
        f"{key} from results/digits_full."
    )
    assert line in write(e, "table4")[1].read_text().replace("\\", "")


def test_rows_that_were_executed_otherwise_are_named():
    e = make()
    fabricate(e)
    ta_eb, scratch = e.runs["ta-eb"].experts, e.runs["scratch-50"].experts
    coarse = {**reported.EXECUTION, "precision": "bf16", "channels_last": True}
    del coarse["graph"]
    coarse["compile"] = False  # a ledger from before GPUs ran graphs

    def ledger_of(expert):
        parts = {"seed": 0, "expert": expert.key, "milestone": expert.iterations}
        return layout.path(layout.LEDGER, experiment="digits", **parts)

    def edited(path, change):
        entry = read_json(path)
        change(entry)
        write_json(path, entry)

    # One of three experts went on elsewhere; another training was given from outside and ran no step here.
    elsewhere = {"device": "NVIDIA H100", "world": 1, "share": 3, "execution": coarse, "steps": 9}
    edited(ledger_of(ta_eb[1]), lambda x: x["processes"].append(elsewhere))
    edited(ledger_of(scratch[0]), lambda x: x["processes"].append({**elsewhere, "steps": 0}))
    drawn = layout.path(layout.SAMPLE_LEDGER, experiment="digits", seed=0, run="ta-eb")
    edited(drawn, lambda x: x["execution"].update({ta_eb[2].network: coarse}))
    here, there = "on a quiet test machine", "bf16, channels last"
    assert (
        f"Executed: training fp32, 2 processes {here} and {there}, 3 jobs to a GPU on NVIDIA H100 (TA-EB); "
        f"sampling fp32 {here} and {there} on a quiet test machine (TA-EB)."
    ) in write(e, "table4")[1].read_text()
    layout.path(layout.SAMPLE_LEDGER, experiment="digits", seed=0, run="eb-50").unlink()
    with pytest.raises(UserError, match=r"runs/eb-50/ledger\.json: missing"):
        write(e, "table4")
    assert "; sampling fp32" in write(e, "table4", partial=True)[1].read_text()


def test_an_unsettled_ticket_carries_a_dagger_and_no_claim():
    e = make(seeds=(0, 1))
    fabricate(e, settled=False)
    words = write(e, "table4")[1].read_text()
    assert re.search(r"\| TA-EB † +\|", words)
    assert "0.200, 0.150" in words
    claims = reading.read(Results(e))
    assert not any("ticket at 50" in c.text or "Timestep-aware" in c.text for c in claims)
    assert {c.verdict for c in claims if "tickets appear" in c.text} == {"not supported"}


def test_a_ticket_at_a_chosen_interval_is_neither_settled_nor_unsettled():
    e = make(seeds=(0, 1), more=True)
    fabricate(e, settled=False)
    rows = {row["run"]: row for row in rows_of(write(e, "controls")[0])}
    assert (rows["At 2"]["ticket_at"], rows["At 2"]["marks"]) == ("after 2 (epoch)", "")
    assert rows["TA dense"]["marks"] == "†"
    early = next(c for c in reading.read(Results(e)) if "appear" in c.text)
    assert (
        "0 of the runs' 12 tickets appeared by then" in early.evidence
    )  # of two seeds: five of search full, one of iterwise


def test_a_missing_file_is_named_and_a_partial_table_says_what_fills_it():
    e = make()
    fabricate(e)
    gone = layout.path(layout.METRICS, experiment="digits", seed=0, run="eb-50")
    gone.unlink()
    with pytest.raises(UserError, match=re.escape(str(gone))):
        write(e, "table4")
    assert not Path("out/table4.csv").exists()
    path, markdown, _ = write(e, "table4", partial=True)
    rows = rows_of(path)
    assert (rows[3]["cfd"], rows[2]["cfd"]) == ("", "20.0")
    assert "snakemake --cores all results/digits/tables/table4.csv" in markdown.read_text().replace("\\", "")
    shutil.rmtree("results")
    assert "–" in write(e, "table4", partial=True)[1].read_text()


def test_damaged_files_are_left_out_of_a_partial_table_by_name_and_refused_in_a_whole_one(capsys):
    e = make()
    fabricate(e)
    layout.path(layout.COST, experiment="digits").write_text("{")
    markdown = write(e, "table4", partial=True)[1].read_text()
    assert re.search(r"Left out: results/digits/cost\\?\.json: damaged .*remake it with", markdown)
    assert "cost.json: damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"cost\.json: damaged"):
        write(e, "table4")


def test_a_table_is_aligned_and_a_block_named_once():
    columns = (render.Column("run", "Run", str, left=True), render.Column("n", "Steps\n(K)", str))
    table = render.Table("Two runs", columns, [["long name", 7], ["b", None]], ["", "†"], ["A note."])
    assert render.to_markdown(table).splitlines() == [
        "**Two runs**", "", "| Run       |   Steps (K) |", "|:----------|------------:|",
        "| long name |           7 |", "| b †       |           – |", "", "A note.  ",
    ]  # fmt: skip
    grouped = replace(table, values=[["a", 1], ["a", 2], ["b", 2], ["a", 2]], marks=[""] * 4, grouped=True)
    assert [row[0] for row in grouped.cells()] == ["a", "", "b", "a"]


# --- LaTeX --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ALL_TABLES)
def test_latex_is_balanced_and_escaped(table):
    e = make(seeds=(0, 1), more=True)
    fabricate(e)
    check_latex(write(e, table)[2].read_text(), {"table1": 2, "table4": 3, "controls": 2}.get(table, 1))


def check_latex(tex, expected):
    """LaTeX of a table in so many parts."""
    bare = tex.replace(r"\\", "").replace(r"\{", "").replace(r"\}", "")
    assert bare.count("{") == bare.count("}")
    for environment in ("table*", "tabular", "minipage"):
        assert tex.count(rf"\begin{{{environment}}}") == tex.count(rf"\end{{{environment}}}")
    parts = [part.split(r"\bottomrule")[0] for part in tex.split(r"\toprule")[1:]]
    assert len(parts) == expected
    for part in parts:
        lines = [line for line in part.split(r"\midrule", 1)[1].splitlines() if line.endswith(r"\\")]
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in lines}) == 1
        assert not re.search(r"(?<!\\)[%#_]", part)
    assert tex.isascii() or set(re.sub(r"[\x00-\x7f]", "", tex)) <= {"é"}
    compiled({"table": tex})


def compiled(tables):
    """Compile tables as a two-column paper would; what LaTeX complains about. Nothing without LaTeX."""
    if not shutil.which("pdflatex"):
        return []
    body = "\n".join(rf"\typeout{{== {name}}}{tex}\clearpage" for name, tex in tables.items())
    head = r"\documentclass[10pt,twocolumn]{article}\usepackage{booktabs}"
    Path("try.tex").write_text(rf"{head}\begin{{document}}Text.{body}\end{{document}}")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "try.tex"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found, name = [], ""
    for line in Path("try.log").read_text(errors="replace").splitlines():
        name = line[3:] if line.startswith("== ") else name
        over = re.match(r"Overfull \\[hv]box \(([\d.]+)pt|.*Float too large for page by ([\d.]+)pt", line)
        if over and float(over[1] or over[2]) > 1:
            found.append(f"{name}: {line}")
    return found


# --- what is read -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")  # the hostile title's, in the fonts of the figures
def test_a_whole_report_is_written_from_what_it_is_said_to_read():
    e = make(seeds=(0, 1), more=True)
    fabricate(e)
    wanted = {str(path) for path in Job.of(e, "tabulate").reads}
    for path in Path("results").rglob("*.*"):
        if path.is_file() and str(path) not in wanted and path.suffix != ".jsonl":  # shown if there
            path.unlink()
    target = Path("results/digits/report.html")
    with pytest.raises(Missing, match="figure1"):
        page.write_page(Results(e), target)
    written = reported.write(e, *e.tables, *FIGURES, folder=target.parent)
    assert len(written) == 3 * len(e.tables) + 1 + 2 * len(FIGURES)
    begin = {".pdf": b"%PDF", ".png": b"\x89PNG"}
    assert all(path.read_bytes().startswith(begin.get(path.suffix, b"")) for path in written)
    page.write_page(Results(e), target)
    check_page(target.read_text())
    linked = re.findall('href="([^"#]+)"', target.read_text())
    assert {str(target.parent / link) for link in linked} == {str(p) for p in written if p.suffix != ".json"}
    assert wanted >= {f"results/digits/seed0/tickets/full/magnitude/{w}/hamming.npz" for w in ("raw", "ema")}


def test_the_room_imports_no_torch_and_the_page_draws_nothing():
    everything = "figures, page, published, reading, results, tables"
    drawing = {"matplotlib", "seaborn"}
    for modules, forbidden in (
        (everything, {"torch"}),
        ("tables, page", {"torch", *drawing}),
    ):
        code = f"import sys; from ebdiff.report import {modules}; print({forbidden} & sys.modules.keys())"
        out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert out.stdout.strip() == "set()"


# --- figures ------------------------------------------------------------------------------------------


def test_a_figure_of_nothing_is_a_sentence_and_a_whole_one_refused():
    e = make(more=True)
    for figure in FIGURES:
        if figure not in ("figure3", "losses"):  # one panel needs no file; readings may be missing
            with pytest.raises(Missing):
                reported.write(e, figure)
        drawn = reported.write(e, figure, partial=True)
        assert all(path.stat().st_size > 1000 for path in drawn)


def test_the_heat_maps_box_follows_the_early_bird_rule():
    e = make()
    fabricate(e)
    distances = Results(e).hamming(0, "full", "magnitude", "ema", 0.5)
    # Newest i against i - 4: 0.2 * 4 / (1 + i - 4) <= 0.1 first holds at i = 11.
    assert distances.ticket == 11
    assert np.isnan(distances.queue[:4]).all() and not np.isnan(distances.queue[4:]).any()
    with pytest.raises(UserError, match="no rate"):
        Results(e).hamming(0, "full", "magnitude", "ema", 0.9)


def test_samples_stand_in_a_row():
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1)
    assert figures.strip(images[:2], 2).tolist() == [[0, 255, 1]]
    assert figures.strip(images, 4).tolist() == [[0, 255, 1, 255, 2, 255, 255]]
    assert figures.strip(images.repeat(3, axis=3), 3).shape == (1, 5, 3)


def test_the_look_is_seaborns():
    """The style is written out, because importing seaborn is slow. Text of 7.5 points instead of 12."""
    import matplotlib
    import seaborn

    context = {key: 7.5 / 12 * size for key, size in seaborn.plotting_context("notebook").items()}
    asked = {**seaborn.axes_style("ticks"), **context}
    ours = {"axes.spines.right", "axes.spines.top", "font.family", "font.sans-serif", "image.cmap"}
    colours = {"axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "text.color", "grid.color",
               "patch.edgecolor", "axes.facecolor", "figure.facecolor"}  # fmt: skip
    same = matplotlib.colors.same_color
    with style.theme():
        for key in asked.keys() - ours - colours:
            value = matplotlib.rcParams[key]
            assert value == (pytest.approx(asked[key]) if isinstance(value, float) else asked[key]), key
        assert all(same(matplotlib.rcParams[key], asked[key]) for key in colours)
    palette = seaborn.color_palette("colorblind").as_hex()
    used = {
        *style.METHOD_COLOURS.values(),
        *map(style.span_colour, range(5)),
        *style.WEIGHTS_COLOURS.values(),
    }
    assert used - {style.METHOD_COLOURS["unpruned"]} <= set(palette)


# --- reading ------------------------------------------------------------------------------------------

RANKING = re.compile(r"\b(better|worse|best|worst|beats?|wins?|outperforms?|superior)\b", re.I)


def test_one_seed_decides_nothing_and_ranks_nothing():
    e = make(more=True)
    fabricate(e, quality=lambda run, seed: 10.0 if run == "eb-50" else 90.0)
    claims = reading.read(Results(e))
    quality = [c for c in claims if "cFD" in c.evidence]
    assert all("1 seed in common" in c.evidence and "p =" not in c.evidence for c in quality)
    assert len(quality) >= 6 and {c.verdict for c in quality} == {reading.UNDECIDED}
    assert not any(RANKING.search(c.text + c.evidence) or "lower" in c.text for c in claims)


def test_tickets_and_step_times_are_read_from_their_numbers():
    e = make(seeds=(0, 1, 2), more=True)
    fabricate(e)
    claims = {c.text: c for c in reading.read(Results(e))}
    learned = next(c for words, c in claims.items() if "learned" in words)
    assert learned.verdict == "supported" and "90 % of chance" in learned.evidence
    step = next(c for words, c in claims.items() if "training step" in words)
    assert step.verdict == "supported" and "2.50 times" in step.evidence
    faster = claims["Timestep-aware training takes less device time than unpruned training"]
    assert faster.verdict == reading.UNDECIDED  # 800 / (532 + 290), 0.97, with step times 2 % apart
    assert any("leaving the same experts unpruned" in words for words in claims)
    assert any("a narrow network from new weights" in words for words in claims)


def test_tickets_that_never_settled_count_against_being_early():
    e = make(seeds=(0, 1), more=True)
    fabricate(e)
    name = "90 % of the tickets appear before half of the unpruned training is over"

    def early():
        return next(c for c in reading.read(Results(e)) if c.text == name)

    # Six tickets of each seed: five after 9 or 10 epochs of 29 steps, one after as many intervals of 6.
    assert early().verdict == "supported"
    assert early().evidence == (
        "12 of the runs' 12 tickets appeared by then. "
        "Settled after 54-290 steps: 6.8-36.2 % of the unpruned run's 800. "
        "The paper says 0.5-2.5 %; 0 were as early, and a queue of masks isn't full before 3.8 %."
    )
    stories = sorted(Path("results").rglob("tickets/*/magnitude/ema/0.*.json"))
    drawn = [path for path in stories if "/final/" not in str(path) and "-at" not in path.stem]
    assert len(drawn) == 12
    for path, settled, step, verdict, words in (
        (
            drawn[0],
            True,
            400,
            "supported",
            "11 of the runs' 12 tickets appeared by then. Settled after 54-400",
        ),  # at half, not before
        (
            drawn[1],
            False,
            290,
            "not supported",
            "10 of the runs' 12 tickets appeared by then. Still moving when the search ended: 1.",
        ),
    ):
        write_json(path, {**read_json(path), "settled": settled, "step": step})
        assert early().verdict == verdict and early().evidence.startswith(words)
    write_json(drawn[2], {**read_json(drawn[2]), "step": 20})
    assert "1 were as early" in early().evidence  # a fortieth of 800


def test_tickets_stand_beside_the_finished_networks_masks():
    e = make(seeds=(0, 1), more=True)
    fabricate(e)
    claims = {c.text: c for c in reading.read(Results(e))}
    same = claims["Tickets are the finished network's masks"]
    # Five rates of each seed: 5 of 40 entries of seed 0 are beyond the threshold of 0.1, 3 of seed 1 within.
    assert same.verdict == "not supported"
    words = (
        "finished network's mask is 0.075-0.125, to the search's last mask 0.100, to the initial mask 0.450"
    )
    assert words in same.evidence and "by chance 0.500; 5 of 10 are within" in same.evidence
    assert "The searches of 2 other tickets lead to no finished network" in same.evidence


def test_without_a_finished_network_of_the_search_none_stands_beside(vary):
    def beside(e, seed=0, **changes):
        ticket = dict(search="full", criterion="magnitude", weights="ema")
        return [str(path) for path in places.masks_beside(e, seed, **{**ticket, **changes})]

    whole = vary({"seeds": [0, 1], "runs.unpruned.seeds": [0]})
    own, final = beside(whole)
    assert final == "results/tiny/seed0/tickets/final/magnitude/ema/masks.npz"
    assert own == final.replace("final", "full") and whole.rates_of("final") == [0.3, 0.5, 0.8]
    assert {own, final} <= set(map(str, Job.of(whole, "tabulate").reads))
    ticket = Job.of(
        whole, "select-eb-epoch", seed=0, search="full", criterion="magnitude", weights="ema", rate=0.5
    )
    assert [job.stage.verb for job in ticket.needs] == ["train-dense", "prepare-data", "prune-per-epoch"]
    assert not any("final" in job.name for job in ticket.needs)  # it is drawn before that network is there
    assert beside(whole, seed=1) == beside(whole, criterion="random") == beside(whole, search="region") == []
    for changes in (
        {"runs.unpruned": ..., "tables": {}},
        {"runs.unpruned.iterations": 70},
        {"runs.unpruned.law": "speed"},
        {"dense.from": "public.safetensors"},
    ):
        e = vary(changes)
        assert beside(e) == [] and places.finished(e) is None
        assert not any("/final/" in str(path) for path in Job.of(e, "tabulate").reads)


def test_a_page_without_a_finished_network_says_nothing_of_it(monkeypatch):
    undrawn(monkeypatch)
    raw = deepcopy(reported.RAW)
    del raw["runs"]["unpruned"], raw["runs"]["finetune-50"]
    e = load.parse({**raw, "tables": {"table1": ["eb-50"]}}, "test.yaml")
    fabricate(e)
    html, _ = page_of(e)
    assert "finished network's mask" not in html and "finished mask" not in html and "last mask" in html


# --- the page -----------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Tags, what they load, and the table cells of a page."""

    def __init__(self):
        super().__init__()
        self.seen, self.sources, self.rows = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]
        if tag in ("tr", "td", "th"):
            self.rows += [[]] if tag == "tr" else []
            self.rows[-1] += [] if tag == "tr" else [""]

    def handle_data(self, data):
        if self.seen and self.seen[-1] in ("td", "th"):
            self.rows[-1][-1] += data.strip()


def page_of(e):
    """The page of what is there: its HTML, and its tags."""
    page.write_page(Results(e, partial=True), Path("page.html"))
    html, tags = Path("page.html").read_text(), Tags()
    tags.feed(html)
    return re.sub(r"base64,[^\"]+", "", html), tags


def check_page(html):
    """A page is self-contained, escaped, and ranks nothing."""
    tags = Tags()
    tags.feed(html)
    assert "script" not in tags.seen and "&lt;script&gt;" in html
    beside = r"(figures/\w+\.(pdf|png)|tables/\w+\.(csv|tex|md))"
    assert all(s.startswith(("data:image/png;base64,", "#")) or re.fullmatch(beside, s) for s in tags.sources)
    assert tags.seen.count("img") == len(FIGURES)
    assert len(html) < 10_000_000 and not RANKING.search(re.sub(r"base64,[^\"]+", "", html))
    told = ("CC BY 4.0", "a quiet test machine", "2026-01-02", "torch 2.13.0", reading.UNDECIDED)
    for word in (*told, "exploratory", "a mask decides only which weights they inherit"):
        assert word in html


def test_a_partial_page_shows_what_is_there(monkeypatch):
    undrawn(monkeypatch)
    e = make(more=True)
    fabricate(e)
    shutil.rmtree("results/digits/seed0/runs/ta-eb")
    html, _ = page_of(e)
    check_page(Path("page.html").read_text())
    assert "So far: this page shows what is there" in html
    assert not Path("results/digits/figures").exists()


def test_the_page_says_which_rates_pay_and_bounds_where_the_file_has_them(monkeypatch):
    undrawn(monkeypatch)
    e = make()
    fabricate(e)
    path = layout.path(layout.COST, experiment="digits")
    cost = read_json(path)
    cost["networks"]["0.3"]["step_ms"] = 99.0
    write_json(path, cost)
    html, _ = page_of(e)
    assert "at 0.25 TFLOP/s (fp32) or bytes at 20.0 GB/s" in html
    assert "rate 0.3 gains nothing on this device (99.0 ms a step against 100 ms for dense)" in html
    del cost["peaks"]  # as earlier versions measured
    for key in ("operations", "bytes", "bound_ms", "bound_by"):
        for network in cost["networks"].values():
            del network[key]
    write_json(path, cost)
    html, tags = page_of(e)
    assert ["30 % pruned", "30", "600,000", "18.0", "99.0", "0.5", "0.99", "0.60"] in tags.rows
    assert "TFLOP" not in html


def test_a_partial_page_of_nothing_is_still_a_page():
    assert "So far" in page_of(make())[0]


def test_the_page_tells_when_was_trained(monkeypatch):
    undrawn(monkeypatch)
    e = make()
    fabricate(e)
    assert "<dt>Trained</dt><dd>2026-01-02</dd>" in page_of(e)[0]
    path = next(Path("results/digits/seed0/experts").rglob("900.json"))
    ledger = read_json(path)
    ledger["processes"][0]["started"] = "2025-11-20T23:59:00"
    write_json(path, ledger)
    assert "<dt>Trained</dt><dd>2025-11-20 to 2026-01-02</dd>" in page_of(e)[0]


def test_the_pages_details_are_those_of_the_files(monkeypatch):
    undrawn(monkeypatch)
    e = make(seeds=(0, 1), more=True)
    fabricate(e)
    _, tags = page_of(e)
    # Asked for 50 %: 0.25 M parameters, 7.5 M MACs, 40 of 100 ms, 6 x 64 x 7.5 MFLOP.
    sizes, bound = ["50 % pruned", "50", "250,000", "7.50"], ["2.88", "123 MB", "31.4", "bytes"]
    assert [*sizes, "40.0", "0.5", "0.40", "0.25", *bound] in tags.rows
    own, other = (["full", c, "ema", "50", "50", "1", "epoch 9", "290"] for c in ("magnitude", "random"))
    assert [*own, "0.450", "0.100", "0.075", "0.500", "learned"] in tags.rows
    assert [*other, "–", "–", "–", "0.500", "drawn at random"] in tags.rows
    assert ["iterwise", "0-1000", "0", "settled", "24 of 100", "696", "69.6", "300"] in tags.rows
    assert ["TA-EB", "20.00", "0.2", "0.036", "11.05", "2", "90", "95", "10", "30"] in tags.rows


def test_a_plan_stands_against_what_the_jobs_took(monkeypatch):
    undrawn(monkeypatch)
    e = make()
    fabricate(e)
    assert "Plan against actual" not in page_of(e)[0]
    benchmarks = [("a", "experts", 30.0, 20.0), ("b", "experts", 10.0, 20.0), ("c", "sampling", 5.0, 10.0)]
    jobs = [{"benchmark": "results/digits/d.tsv", "kind": "metrics", "seconds": 9.0}]  # hasn't run
    for name, kind, predicted, actual in benchmarks:
        path = f"results/digits/{name}.tsv"
        write_text(Path(path), f"s\th:m:s\tmax_rss\n{actual}\t0:00:20\t300\n")
        jobs.append({"benchmark": path, "kind": kind, "seconds": predicted})
    plan = {"device": "here", "devices": 2, "pace": "measured", "wall_seconds": 240, "jobs": jobs}
    where = layout.path(layout.PLAN, experiment=e.name)
    write_json(where, sealed({**plan, "digest": Job.of(e, "tabulate").digest}))
    html, tags = page_of(e)
    assert tags.rows[-3:] == [
        ["experts", "2", "40.0 s", "40.0 s", "1.00"],
        ["sampling", "1", "5.00 s", "10.0 s", "0.50"],
        ["all", "3", "45.0 s", "50.0 s", "0.90"],
    ]
    assert "4.00 min with 2 jobs at a time" in html
    whole = where.read_text()
    nested = '{"jobs": ' + "[" * 900 + "]" * 900 + "}"
    for damage in ("[1]", "null", "{}", nested, whole[:-9], whole.replace("240", "250")):
        write_text(where, damage)
        with pytest.raises(UserError, match=r"^results/digits/plan\.json: damaged .*`ebdiff plan digits`$"):
            Results(e).plan()
    write_json(where, sealed({**plan, "digest": "of another configuration"}))
    assert "Plan against actual" not in page_of(e)[0]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, [[20, 9.0], [40, 1.0]]),
        ({"runs.unpruned.law": "speed"}, [[20, 2.0], [40, 1.0]]),
        ({"dense.from": "public.safetensors"}, [[20, 2.0], [40, 1.0]]),
    ],
)
def test_losses_begin_with_those_of_a_search_only_where_training_went_on_from_it(
    tmp_path, monkeypatch, vary, changes, shown
):
    monkeypatch.chdir(tmp_path)
    experiment = vary(changes)
    expert = experiment.runs["unpruned"].experts[0]
    at = dict(expert=expert.key, milestone=80)
    for template, readings in ((layout.STATS, {20: 2.0, 40: 1.0}), (layout.DENSE_STATS, {20: 9.0})):
        path = layout.path(template, experiment="tiny", seed=0, search="full", **at)
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({"step": s, "loss": x}) + "\n" for s, x in readings.items()))
    monkeypatch.setattr(Records, "check", lambda *_: "")
    results = Results(experiment)
    assert results.losses(0, expert).tolist() == shown
    assert results._read.keys() <= set(Job.of(experiment, "tabulate").reads)
