"""The report reads a small made-up results tree; every expected number is computed by hand."""

import csv
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from ebdiff.experiment.digests import report_digest

from ebdiff.experiment import layout, load, schema
from ebdiff.report import details, figures, needs, page, paper, protocol, reading, style, tables
from ebdiff.report.facts import RunFacts
from ebdiff.report.results import Missing, Results
from ebdiff.system.errors import UserError
from ebdiff.system.files import sha256, write_array, write_arrays, write_json, write_text

HOSTILE = r"EB <script>alert(1)</script> 50% & $\frac | _x_ {é} 漢"
STEP_MS = {
    "dense": 100.0, "0.3": 70.0, "0.4": 60.0, "0.5": 40.0, "0.55": 39.0, "0.6": 38.0, "0.7": 30.0,
    "0.8": 25.0, "0.9": 22.0,
}  # fmt: skip
MACS = {
    "dense": 30e6, "0.3": 18e6, "0.4": 12e6, "0.5": 7.5e6, "0.55": 7.2e6, "0.6": 7e6, "0.7": 5e6,
    "0.8": 2e6, "0.9": 1e6,
}  # fmt: skip

TRIPLE = [
    {"rate": 0.3, "span": [0, 260], "serve": [0, 240]},
    {"rate": 0.6, "span": [240, 460], "serve": [240, 440]},
    {"rate": 0.8, "span": [440, 1000]},
]
APART = [{"rate": e["rate"], "span": e.get("serve", e["span"])} for e in TRIPLE]
DENSER = [{**TRIPLE[0], "rate": 0.3}, {**TRIPLE[1], "rate": 0.4}, TRIPLE[2]]
LONGER = [{**TRIPLE[0], "iterations": 600}, *TRIPLE[1:]]

RAW = {
    "name": "digits",
    "about": "Made up for a test.",
    "dataset": {"name": "digits", "source": "bundled-digits", "flip": False, "image_size": 8, "channels": 1},
    "network": {"width": 64, "multipliers": [1, 1], "norm_groups": 8},
    "training": {"batch": 64, "ema_decay": 0.99},
    "searches": {
        "full": {"rates": [0.3, 0.4, 0.5, 0.6, 0.8], "horizon": 24},
        "iterwise": {"interval": {"unit": "iteration", "steps": 6}, "rates": [0.5], "horizon": 100},
    },
    "dense": {"iterations": 800},
    "sampling": {"images": 30},
    "published": {"expert_iterations": {400: 200000, 600: 300000}, "note": "Ours are digits."},
    "runs": {
        "unpruned": {"title": "Unpruned", "method": "unpruned", "init": "dense"},
        "scratch-50": {
            "title": "Scratch", "method": "scratch", "init": "fresh", "rate": 0.5, "iterations": 900,
        },
        "finetune-50": {
            "title": "Finetune", "method": "finetune", "search": "final", "rate": 0.5, "iterations": 100,
        },
        "eb-50": {"title": HOSTILE, "method": "eb", "rate": 0.5, "iterations": 900, "note": "A remark."},
        "random-50": {
            "title": "Random ticket", "method": "control",
            "criterion": "random", "rate": 0.5, "iterations": 900,
        },
        "ta-eb": {"title": "TA-EB", "method": "ta-eb", "iterations": 400, "experts": TRIPLE},
    },
    "tables": {"table4": ["unpruned", "scratch-50", "finetune-50", "eb-50", "random-50", "ta-eb"]},
}  # fmt: skip

MORE = {
    "eb-iter": {"title": "EB iter", "method": "eb", "search": "iterwise", "rate": 0.5, "iterations": 900},
    "apart": {"title": "Apart", "method": "ta-eb", "iterations": 400, "experts": APART},
    "denser": {"title": "30/40/80", "method": "ta-eb", "iterations": 400, "experts": DENSER},
    "longer": {"title": "Longer", "method": "ta-eb", "iterations": 400, "experts": LONGER},
    "narrow": {
        "title": "Narrow", "method": "control", "init": "fresh", "rate": 0.5, "iterations": "like-eb-50",
    },
    "short": {"title": "Short", "method": "control", "init": "dense", "iterations": "like-eb-50"},
    "ta-dense": {
        "title": "TA dense", "method": "control", "init": "snapshot", "iterations": 400, "experts": TRIPLE,
    },
}  # fmt: skip
ALL_TABLES = {
    **RAW["tables"],
    "table1": ["eb-50", "eb-iter"],
    "table3": ["apart", "ta-eb"],
    "table8": ["denser", "ta-eb"],
    "table9": ["ta-eb", "longer"],
    "controls": ["narrow", "short", "ta-dense"],
}


def make(seeds=(0,), more=False, name="digits"):
    raw = deepcopy(RAW)
    raw |= {"seeds": list(seeds), "name": name}
    if more:
        raw["runs"] |= deepcopy(MORE)
        raw["tables"] = ALL_TABLES
    return load.parse(raw, "test.yaml")


# --- a results tree -----------------------------------------------------------------------------------


def fabricate(e, quality=lambda run, seed: 20.0 + seed, settled=True):
    """Write every file that the report of an experiment reads, with simple numbers."""

    def at(template, **parts):
        return layout.path(template, experiment=e.name, dataset=e.dataset.name, **parts)

    rng = np.random.default_rng(0)
    networks = {
        k: {
            "rate": 0.0 if k == "dense" else float(k), "realised": 0.0 if k == "dense" else float(k),
            "params": int(MACS[k] / 30), "macs": int(MACS[k]), "step_ms": STEP_MS[k], "spread_ms": 0.5,
        }
        for k in MACS
    }  # fmt: skip
    write_json(at(layout.COST), {
        "device": "a quiet test machine", "threads": 1, "batch": 64, "torch": "2.13.0",
        "counter": "torch-pruning count_ops_and_params", "networks": networks,
    })  # fmt: skip
    write_array(at(layout.IMAGES), rng.integers(0, 256, (100, 8, 8, 1), np.uint8))
    write_json(at(layout.MANIFEST), {
        "title": "Optical digits", "origin": "scikit-learn", "licence": "CC BY 4.0",
        "count": 100, "shape": [8, 8, 1], "sha256": sha256(at(layout.IMAGES)),
    })  # fmt: skip
    for name, run in e.runs.items():
        for seed in e.seeds_of(name):
            protocols = e.evaluation.protocols
            write_json(
                at(layout.METRICS, run=name, seed=seed), metrics(quality(name, seed), name, seed, protocols)
            )
            samples = at(layout.SAMPLES, run=name, seed=seed)
            write_array(samples, rng.integers(0, 256, (30, 8, 8, 1), np.uint8))
            write_json(at(layout.SAMPLE_LEDGER, run=name, seed=seed), {"sha256": sha256(samples)})
            for x in run.experts:
                steps = x.iterations if isinstance(x.iterations, int) else 500 + seed
                parts = {"seed": seed, "expert": x.key, "milestone": str(x.iterations)}
                write_json(at(layout.LEDGER, **parts), ledger(steps))
                lines = [
                    f'{{"step": {i}, "loss": {900 / (i + 9)}, "seconds": 1}}'
                    for i in range(0, steps, max(50, steps // 20))
                ]
                write_text(at(layout.STATS, **parts), "\n".join(lines) + "\n")
                if x.needs_ticket:
                    ticket = {k: getattr(x, k) for k in ("search", "criterion", "weights", "rate")}
                    write_json(at(layout.STORY, seed=seed, **ticket), story(e, ticket, seed, settled))
    for seed in e.seeds:
        for search, s in e.searches.items():
            write_json(at(layout.DENSE_LEDGER, seed=seed, search=search), {
                **ledger(696), "intervals": 24, "stopped": "settled", "horizon": s.horizon,
            })  # fmt: skip
            for weights in ("raw", "ema"):
                parts = {"seed": seed, "search": search, "criterion": "magnitude", "weights": weights}
                write_arrays(at(layout.HAMMING, **parts), **hamming(s.rates, s.interval.unit))


def ledger(steps):
    process = {"started": "2026-01-02T03:04:05", "world": 2, "seconds": steps / 10, "steps": steps}
    return {
        "steps": steps, "seconds": steps / 10, "device_seconds": steps / 5, "images": 64 * steps,
        "peak_mb": 300.0,
        "device": "a quiet test machine", "threads": 1, "processes": [process],
        "versions": {"ebdiff": "0.1.0", "torch": "2.13.0"},
    }  # fmt: skip


def metrics(fd, run, seed, protocols=("classifier",)):
    found = {
        "protocol": protocols[0], "distance_name": protocol.MEASURES[protocols[0]].name,
        "fd": fd, "kid": fd / 100,
        "images": 30, "reference_images": 100, "floor": {"fd": 1.9, "kid": 0.0},
        "ceiling": {"fd": 561.0, "kid": 3.0}, "seed": seed, "run": run,
    }  # fmt: skip
    if protocols[0] != "classifier":
        details = {
            "split": "all train images", "mode": "bilinear", "device": "a test machine",
            "weights_sha256": "7ff4a85c3a6378f0dfc8433ffd789663", "versions": {"torch": "2.13.0"},
        }  # fmt: skip
        numbers = {"fd": fd, "kid": fd / 100, "precision": 0.6, "recall": 0.5}
        return found | {"protocols": dict.fromkeys(protocols, numbers | details)}
    return found | {
        "distance_name": "classifier Fréchet distance", "confident": 0.9, "real_confident": 0.95,
        "class_shares": [0.1] * 10, "classifier_accuracy": 0.992,
    }  # fmt: skip


def story(e, ticket, seed, settled):
    final = ticket["search"] == schema.FINAL
    unit = "epoch" if final else e.searches[ticket["search"]].interval.unit
    interval = 0 if final else 8 + seed
    steps = 6 if unit == "iteration" else 29
    return {
        **ticket, "realised": ticket["rate"], "settled": settled or final, "interval": interval,
        "intervals_completed": interval + 1, "unit": unit, "interval_steps": steps,
        "step": (interval + 1) * steps, "window": 5, "threshold": 0.1, "last_distances": [0.2, 0.15],
        "to_initial": None if final else 0.45, "to_last": 0.1, "chance": 0.5, "kind": "learned",
        "params": 1, "macs": 1, "widths": {}, "seed": seed,
    }  # fmt: skip


def hamming(rates, unit, n=14):
    age = np.arange(n)
    one = np.abs(age[:, None] - age) * 0.2 / (1 + np.minimum(age[:, None], age))
    matrix = np.clip(np.stack([one] * len(rates)), 0, 0.5).astype(np.float32)
    return {
        "rates": np.array(rates), "intervals": age, "matrix": matrix,
        "initial": np.tile(0.5 * (1 - np.exp(-age / 2)), (len(rates), 1)),
        "chance": np.full(len(rates), 0.5), "window": np.array(5), "threshold": np.array(0.1),
        "interval_steps": np.array(29), "unit": np.array(unit),
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(style, "DPI", 40)  # small pictures are drawn faster


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(e, table, **options):
    return tables.write_table(e, table, Path("out"), **options)


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


def test_table4_published_values_stand_on_the_right_rows():
    e = make()
    fabricate(e)
    csv_path, markdown, _ = write(e, "table4")
    fids = [(row["paper_fid"], row["paper_speedup"], row["paper_macs"]) for row in rows_of(csv_path)]
    assert fids == [
        ("5.15", "1.0", "6.1"), ("8.47", "0.71", "1.5"), ("15.23", "0.95", "1.5"),
        ("7.32", "2.45", "1.5"), ("", "", ""), ("7.69", "5.78", "1.3"),
    ]  # fmt: skip
    text = markdown.read_text()
    for note in ("7.29", "7.69 M", "Ours are digits.", "CIFAR-10", "torch-pruning", r"\[a\] A remark."):
        assert note in text


def test_every_other_table():
    e = make(seeds=(0, 2), more=True)
    fabricate(e)
    first, second = rows_of(write(e, "table1")[0])
    assert (first["ticket_at"], first["paper_ticket_at"], first["paper_fid"]) == (
        "8-10 (epoch)",
        "4 (epoch)",
        "7.32",
    )
    assert (second["criterion"], second["ticket_at"]) == ("iterwise-magnitude", "54-66 (iteration)")
    assert second["paper_ticket_at"] == "1144 (iteration)"
    apart, overlapped = rows_of(write(e, "table3")[0])
    assert [apart[f"region{i}"] for i in (1, 2, 3)] == ["0-240", "240-440", "440-1000"]
    assert (apart["overlap"], apart["paper_fid"]) == ("no", "8.1")
    assert (overlapped["region1"], overlapped["overlap"], overlapped["paper_fid"]) == ("0-260", "yes", "7.69")
    denser, _ = rows_of(write(e, "table8")[0])
    assert [float(denser[f"rate{i}"]) for i in (1, 2, 3)] == [0.3, 0.4, 0.8]
    assert (float(denser["rate"]), denser["paper_fid"]) == (pytest.approx(0.6), "7.48")
    _, longer = rows_of(write(e, "table9")[0])
    assert [longer[f"iterations{i}"] for i in (1, 2, 3)] == ["400", "400", "600"]
    assert (longer["paper_iterations"], longer["paper_fid"]) == ("200K / 200K / 300K", "7.56")
    narrow, short, ta_dense = rows_of(write(e, "controls")[0])
    assert narrow["iterations"] == "500-502"
    assert float(short["speedup"]) == pytest.approx((800 / 500 + 800 / 502) / 2)
    assert float(ta_dense["rate"]) == 0
    assert float(ta_dense["speedup_device_time"]) == pytest.approx((800 / 1461 + 800 / 1519) / 2)


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


def test_a_plan_stands_against_what_the_jobs_took():
    e = make()
    fabricate(e)
    results = Results(e)
    assert "Plan against actual" not in [table.caption for table in details.tables(results)]
    benchmarks = [("a", "experts", 30.0, 20.0), ("b", "experts", 10.0, 20.0), ("c", "sampling", 5.0, 10.0)]
    jobs = [{"benchmark": "results/digits/d.tsv", "kind": "metrics", "seconds": 9.0}]  # hasn't run
    for name, kind, predicted, actual in benchmarks:
        path = f"results/digits/{name}.tsv"
        write_text(Path(path), f"s\th:m:s\tmax_rss\n{actual}\t0:00:20\t300\n")
        jobs.append({"benchmark": path, "kind": kind, "seconds": predicted})
    plan = {"device": "here", "devices": 2, "pace": "measured", "wall_seconds": 240, "jobs": jobs}
    where = layout.path(layout.PLAN, experiment=e.name)
    write_json(where, {**plan, "digest": report_digest(e)})
    table = details.tables(Results(e))[-1]
    assert table.caption == "Plan against actual"
    assert table.cells() == [
        ["experts", "2", "40.0 s", "40.0 s", "1.00"],
        ["sampling", "1", "5.00 s", "10.0 s", "0.50"],
        ["all", "3", "45.0 s", "50.0 s", "0.90"],
    ]
    assert "4.00 min with 2 jobs at a time" in table.notes[0]
    write_json(where, {**plan, "digest": "of another configuration"})
    assert details.tables(Results(e))[-1].caption != "Plan against actual"


def test_an_unsettled_ticket_carries_a_dagger_and_no_claim():
    e = make(seeds=(0, 1))
    fabricate(e, settled=False)
    text = write(e, "table4")[1].read_text()
    assert re.search(r"\| TA-EB † \|", text)
    assert "0.200, 0.150" in text
    claims = reading.read(Results(e))
    assert not any("ticket at 50" in c.text or "Timestep-aware" in c.text for c in claims)
    assert {c.verdict for c in claims if "Tickets" in c.text} == {"not supported"}


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


def test_unknown_tables_and_figures_are_refused():
    e = make()
    with pytest.raises(UserError, match="table: 'table1' is not known; did you mean 'table4'"):
        needs.table_needs(e, "table1")
    with pytest.raises(UserError, match="did you mean 'figure2'"):
        needs.figure_needs(e, "figure2c")


# --- LaTeX --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ALL_TABLES)
def test_latex_is_balanced_and_escaped(table):
    e = make(seeds=(0, 1), more=True)
    fabricate(e)
    check_latex(write(e, table)[2].read_text(), 2 if table in ("table4", "controls") else 1)


def check_latex(tex, expected):
    """LaTeX of a table in so many parts."""
    bare = tex.replace(r"\\", "").replace(r"\{", "").replace(r"\}", "")
    assert bare.count("{") == bare.count("}")
    for environment in ("table", "tabular", "minipage"):
        assert tex.count(rf"\begin{{{environment}}}") == tex.count(rf"\end{{{environment}}}")
    parts = [part.split(r"\bottomrule")[0] for part in tex.split(r"\toprule")[1:]]
    assert len(parts) == expected
    for part in parts:
        lines = [line for line in part.splitlines() if line.endswith(r"\\")]
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in lines}) == 1
        assert not re.search(r"(?<!\\)[%#_]", part)
    assert tex.isascii() or set(re.sub(r"[\x00-\x7f]", "", tex)) <= {"é"}
    if shutil.which("pdflatex"):
        document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{tex}\end{{document}}"
        Path("try.tex").write_text(document)
        subprocess.run(["pdflatex", "-halt-on-error", "try.tex"], check=True, stdout=subprocess.DEVNULL)


# --- needs --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_needs_name_exactly_what_is_read():
    e = make(seeds=(0, 1), more=True)
    fabricate(e)
    every = {str(p) for p in Path().rglob("*") if p.is_file()}
    for name in [*e.tables, *needs.FIGURES]:
        find = needs.table_needs if name in e.tables else needs.figure_needs
        wanted = needs.paths(e, find(e, name))
        assert wanted and set(wanted) <= every, name
        shutil.move("results", "all")
        for path in (p for p in wanted if p.startswith("results/")):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path("all") / Path(path).relative_to("results"), path)
        writer = tables.write_table if name in e.tables else figures.write_figure
        writer(e, name, Path("out"))
        shutil.rmtree("results")
        shutil.move("all", "results")
    table4 = needs.paths(e, needs.table_needs(e, "table4"))
    assert str(layout.path(layout.COST, experiment="digits")) in table4


def test_the_room_imports_no_torch_and_needs_is_light():
    everything = "figures, heatmaps, needs, page, paper, reading, results, tables"
    for modules, forbidden in (
        (everything, {"torch"}),
        ("needs", {"torch", "pandas", "matplotlib", "seaborn"}),
        ("tables", {"torch", "pandas", "matplotlib", "seaborn"}),
    ):
        code = f"import sys; from ebdiff.report import {modules}; print({forbidden} & sys.modules.keys())"
        out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert out.stdout.strip() == "set()"


# --- figures ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_figure_is_drawn_whole_and_partial():
    e = make(more=True)
    for figure in needs.FIGURES:  # nothing is there: a sentence says so
        if figure != "figure3":  # its left panel needs no file
            with pytest.raises(Missing):
                figures.write_figure(e, figure, Path("out"))
        assert [p.stat().st_size > 1000 for p in figures.write_figure(e, figure, Path("out"), partial=True)]
    fabricate(e)
    for figure in needs.FIGURES:
        pdf, png = figures.write_figure(e, figure, Path("out"))
        assert pdf.read_bytes().startswith(b"%PDF") and png.read_bytes().startswith(b"\x89PNG")


def test_the_heat_maps_box_follows_the_early_bird_rule():
    e = make()
    fabricate(e)
    matrices = Results(e).hamming(0, "full", "magnitude", "ema")
    # Newest i against i - 4: 0.2 * 4 / (1 + i - 4) <= 0.1 first holds at i = 11.
    assert matrices.ticket(0.5) == 11
    assert np.isnan(matrices.newest_to_window(0.5)[:4]).all()
    with pytest.raises(UserError, match="no rate"):
        matrices.index(0.9)


def test_samples_stand_in_reading_order():
    images = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    assert figures.tile(images, 2).tolist() == [[0, 255, 1], [255, 255, 255], [2, 255, 3]]


# --- reading ------------------------------------------------------------------------------------------

RANKING = re.compile(r"\b(better|worse|best|worst|beats?|wins?|outperforms?|superior)\b", re.I)


def test_one_seed_decides_nothing_and_ranks_nothing():
    e = make(more=True)
    fabricate(e, quality=lambda run, seed: 10.0 if run == "eb-50" else 90.0)
    claims = reading.read(Results(e))
    quality = [c for c in claims if "cFD" in c.evidence]
    assert len(quality) >= 6 and {c.verdict for c in quality} == {reading.UNDECIDED}
    assert not any(RANKING.search(c.text + c.evidence) or "lower" in c.text for c in claims)


def test_a_difference_counts_only_beyond_twice_its_standard_error():
    e = make(seeds=(0, 1, 2))
    centre = {"eb-50": 20.0, "random-50": 30.0, "scratch-50": 21.0, "finetune-50": 10.0}
    fabricate(e, quality=lambda run, seed: centre.get(run, 25.0) + seed - 1)
    claims = {c.text: c for c in reading.read(Results(e))}
    # Every sample variance is 1: twice the standard error is 2 sqrt(2/3) = 1.63.
    lead = "The early-bird ticket at 50 % gives a lower cFD than "
    assert claims[lead + "a random ticket trained alike"].verdict == "supported"
    assert claims[lead + "pruning the finished network and finetuning"].verdict == "not supported"
    scratch = claims[lead + "the same network trained from scratch"]
    assert scratch.verdict == reading.UNDECIDED
    assert "-1.00, twice its standard error 1.63" in scratch.evidence


def test_tickets_and_step_times_are_read_from_their_numbers():
    e = make(seeds=(0, 1), more=True)
    fabricate(e)
    claims = {c.text: c for c in reading.read(Results(e))}
    learned = next(c for text, c in claims.items() if "learned" in text)
    assert learned.verdict == "supported" and "90 % of chance" in learned.evidence
    step = next(c for text, c in claims.items() if "training step" in text)
    assert step.verdict == "supported" and "2.50 times" in step.evidence
    faster = claims["Timestep-aware training takes less device time than unpruned training"]
    assert faster.verdict == "not supported"  # 800 / (532 + 276) on average of the two seeds
    assert any("leaving the same experts unpruned" in text for text in claims)
    assert any("a narrow network from new weights" in text for text in claims)


def test_published_rows_need_the_papers_iterations():
    e = make(more=True)
    results = Results(e)
    assert paper.published("table8", RunFacts(results, "longer")) == {}
    assert paper.published("table3", RunFacts(results, "ta-eb"))["fid"] == "7.69"
    assert paper.published("table4", RunFacts(results, "random-50")) == {}


# --- the page -----------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")  # the hostile title's, in the fonts of the figures
@pytest.mark.parametrize("partial", [False, True])
def test_the_page_is_self_contained_and_escaped(partial):
    e = make(more=True)
    fabricate(e)
    target = Path("results/digits/report.html")
    folder = Path("results/digits/figures")
    if partial:
        shutil.rmtree("results/digits/seed0/runs/ta-eb")
    else:
        with pytest.raises(Missing, match="figure1"):
            page.write_report(e, target)
        for figure in needs.FIGURES:
            figures.write_figure(e, figure, folder)
    page.write_report(e, target, partial=partial)
    html = target.read_text()
    tags = Tags()
    tags.feed(html)
    assert "script" not in tags.seen and "&lt;script&gt;" in html
    assert all(s.startswith(("data:image/png;base64,", "#")) for s in tags.sources)
    assert len(html) < 10_000_000 and not RANKING.search(re.sub(r"base64,[^\"]+", "", html))
    for word in (
        "CC BY 4.0",
        "a quiet test machine",
        "2026-01-02",
        "torch 2.13.0",
        "undecided at this scale",
    ):
        assert word in html
    assert folder.exists() is not partial


def test_a_partial_page_of_nothing_is_still_a_page():
    page.write_report(make(), Path("report.html"), partial=True)
    assert "So far" in Path("report.html").read_text()


def test_the_look_is_seaborns():
    """The style is written out, because importing seaborn is slow."""
    import matplotlib
    import seaborn

    asked = {**seaborn.axes_style("ticks"), **seaborn.plotting_context("paper", font_scale=1.05)}
    ours = {"axes.spines.right", "axes.spines.top", "font.family", "font.sans-serif", "image.cmap"}
    colours = {"axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "text.color", "grid.color",
               "patch.edgecolor", "axes.facecolor", "figure.facecolor"}  # fmt: skip
    same = matplotlib.colors.same_color
    with style.theme():
        for key in asked.keys() - ours - colours:
            value = matplotlib.rcParams[key]
            assert value == (pytest.approx(asked[key]) if isinstance(value, float) else asked[key]), key
        assert all(same(matplotlib.rcParams[key], asked[key]) for key in colours)
    assert seaborn.color_palette("colorblind").as_hex()[: len(style._COLOURS)] == style._COLOURS
