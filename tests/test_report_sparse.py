"""What the report shows of sparse training, from made-up results; expected numbers are computed by hand."""

from typing import get_args

import matplotlib
import numpy as np
import pytest
import reported
from conftest import ROOT
from reported import fabricate, make, rows_of, undrawn
from test_report import page_of
from test_report_paper import shipped, tables_of

from ebdiff.experiment import layout, load
from ebdiff.experiment.schema import Table
from ebdiff.experiment.stages import FIGURES, STAGES
from ebdiff.experiment.stages import figures as figures_of
from ebdiff.report import figures, reading
from ebdiff.report.results import Results
from ebdiff.system.errors import UserError

T2 = 4.303  # the 97.5 % point of Student's t with two degrees of freedom, as every textbook prints


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reported.vouched(monkeypatch)


def centre(run, seed):
    """Unpruned 20, 21, 22; static-75 one, two, three more; the rest half a unit more than unpruned."""
    return 20 + seed + {"unpruned": 0, "static-75": 1 + seed}.get(run, 0.5)


def some():
    """Three seeds of most runs, one of the early-bird ticket."""
    e = make(seeds=(0, 1, 2), sparse=True)
    fewer = e.runs["eb-50"].model_copy(update={"seeds": (0,)})
    e = e.model_copy(update={"runs": {**e.runs, "eb-50": fewer}})
    fabricate(e, centre)
    return e


def test_the_table_by_hand():
    """Four in five of a million weights are masked, 30 M MACs, 100 ms a step, masks a tenth more."""
    path, markdown, _ = tables_of(some(), "sparse")
    rows = {row["run"]: row for row in rows_of(path)}
    static = {key: float(rows["static 75"][key]) for key in ("params", "flops", "training_flops", "step_ms")}
    assert static == pytest.approx({"params": 4e5, "flops": 24e6, "training_flops": 72e6, "step_ms": 110})
    assert (rows["static 75"]["sparsity"], rows["static 75"]["seconds"]) == ("0.75", "160.0")
    assert (rows["Recycled"]["rate"], rows["Recycled"]["sparsity"]) == ("0.5", "0.0")
    assert float(rows["Recycled"]["step_ms"]) == pytest.approx(44)  # the narrow network's 40
    words = markdown.read_text()
    assert "masked weights go through dense kernels, so unstructured sparsity saves no time." in words
    assert "Speed-up" not in words and "Paper FID" not in words  # no row names a cell


def test_a_row_is_compared_with_the_unpruned_one_over_all_their_seeds():
    path, markdown, _ = tables_of(some(), "sparse")
    rows = {row["block"] + row["run"]: row for row in rows_of(path)}
    seeds = {key: row["vs_unpruned_seeds"] for key, row in rows.items()}
    assert (seeds.pop("UnprunedUnpruned"), seeds.pop(f"EB{reported.HOSTILE}")) == ("0", "1")
    assert set(seeds.values()) == {"3"}
    assert (rows["Sparsestatic 75"]["cfd"], rows["Sparsestatic 75"]["cfd_seeds"]) == ("23.0", "3")
    half = T2 / 3**0.5  # of 1, 2, 3
    (line,) = (line for line in markdown.read_text().splitlines() if "static 75" in line)
    assert f"+2.00 ({2 - half:+.2f} to {2 + half:+.2f})" in line


def curves_of(axes):
    """Every curve: x, y and the half lengths of its bars, by label."""
    found = {}
    for bars in axes.containers:
        (x, y), (segments,) = bars.lines[0].get_data(), (bar.get_segments() for bar in bars.lines[2])
        found[bars.get_label()] = x, y, [np.ptp(s[:, 1]) / 2 for s in segments if len(s)]
    return found


def test_quality_against_sparsity():
    figure = figures.sparsity(Results(some()))
    left, right = figure.axes
    curves, flops = curves_of(left), curves_of(right)
    assert set(curves) == {
        "static, 800 steps", "rigl, p 0.5, 800 steps", "rigl, p 0.05, 800 steps",
        "recycle, p 0.3, equal seconds",
    }  # fmt: skip
    x, y, half = curves["static, 800 steps"]  # 80 % of the weights are masked
    assert list(x) == pytest.approx([40, 60]) and list(y) == pytest.approx([21.5, 23])
    assert half == pytest.approx([T2 / 3**0.5, 2 * T2 / 3**0.5], rel=1e-3)
    assert [float(v[0]) for v in curves["recycle, p 0.3, equal seconds"][:2]] == pytest.approx([75, 21.5])
    assert list(flops["static, 800 steps"][0]) == pytest.approx([0.4, 0.6])
    relative = np.mean([1 / (800 / (n * 0.25)) for n in (500, 501, 502)])  # of a quarter of the MACs
    assert float(flops["recycle, p 0.3, equal seconds"][0][0]) == pytest.approx(relative)
    (line,) = (line for line in left.lines if line.get_label() == "Unpruned")
    band = next(p for p in left.patches if isinstance(p, matplotlib.patches.Rectangle))
    assert line.get_ydata()[0] == 21
    assert (band.get_y(), band.get_height()) == pytest.approx((21 - T2 / 3**0.5, 2 * T2 / 3**0.5), rel=1e-3)


def test_one_seed_has_no_interval():
    e = make(sparse=True)
    fabricate(e)
    left, _ = figures.sparsity(Results(e)).axes
    assert not any(half for *_, half in curves_of(left).values()) and not left.patches


def test_how_far_masks_move_is_drawn_for_those_that_do():
    (panel,) = figures.overlap(Results(some())).axes
    assert panel.get_title() == "rigl" and len(panel.lines) == 6
    first, before = (line.get_data() for line in panel.lines[:2])
    assert list(first[0]) == list(before[0]) == [100, 200, 300, 400, 500, 600]
    assert list(first[1]) == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]) and set(before[1]) == {0.75}


def test_only_experiments_with_sparse_training_have_its_figures(monkeypatch):
    undrawn(monkeypatch)
    plain, e = make(), some()
    assert figures_of(plain) == FIGURES and figures_of(e) == (*FIGURES, "sparsity", "overlap")
    assert figures_of(load.load("digits_sparse", ROOT / "config/experiments"))[-1] == "sampling"
    made = STAGES["tabulate"].outputs(e, experiment=e.name)
    assert layout.path(layout.FIGURE, experiment=e.name, figure="sparsity", ext="png") in made
    assert "Quality against the parameters" in page_of(e)[0]
    assert "Quality against the parameters" not in page_of(plain)[0]


def test_figures_of_what_isnt_there_yet_are_sentences():
    e = make(sparse=True)
    drawn = reported.write(e, "sparsity", "overlap", partial=True)
    assert all(path.stat().st_size > 1000 for path in drawn)


def test_published_values_of_sparse_training_stand_beside_ours():
    static = {
        "title": "Static", "method": "sparse", "init": "fresh", "iterations": 800,
        "sparse": {"method": "static", "sparsity": 0.25}, "paper": "static-dm",
    }  # fmt: skip
    changes = {
        "runs": {"unpruned": {"paper": "dense"}, "static": static, "sparse": {**static, "paper": None}}
    }
    e = shipped("lsun_bedroom", **changes, tables={"sparse": ["unpruned", "static", "sparse"]})
    fabricate(e)
    path, markdown, _ = tables_of(e, "sparse")
    found = [(row["paper_fid"], row["paper_fid_std"]) for row in rows_of(path)]
    assert found == [("31.09", ""), ("28.79", "12.65"), ("", "")]
    assert "2504.21380" in markdown.read_text() and "of 113.7" not in markdown.read_text()
    with pytest.raises(UserError, match=r"runs\.eb-50\.paper: 'static-dm' is not known"):
        shipped("digits", runs={"eb-50": {"paper": "static-dm"}})


def digits_sparse(quality):
    """The shipped experiment, with made-up results: those of some runs, else 20 unpruned and 22."""
    e = load.load("digits_sparse", ROOT / "config/experiments")
    fabricate(e, lambda run, seed: quality.get(run, 20 if run == "unpruned" else 22) + seed)
    return e


def test_the_primary_claims_of_digits_sparse():
    """Each is supported where the numbers say so, and the other way round not."""
    better = {"recycle-50": 20.5, "magran-50": 18, "magran-75-gentle": 17}
    for quality, verdict in ((better, "supported"), (dict.fromkeys(better, 30), "not supported")):
        e = digits_sparse(quality)
        claims = [c for c in reading.read(Results(e)) if c.kind == "primary"]
        assert [c.verdict for c in claims] == [verdict] * 4
    assert ["comparable quality" in c.text for c in claims] == [True, False, False, False]


def test_sparse_runs_of_enough_seeds_are_read_against_what_they_stand_beside():
    """By each seed's differences: 22 is exactly a tenth above 20, and grows slower with the seed."""
    found = {
        c.text: c
        for c in reading.read(Results(digits_sparse({"rigl-50": 19, "magran-75": 40, "narrow-50": 15})))
    }
    moving, share = "whose masks never move", "which exchanges more"
    told = {
        "RigL 50 % is of comparable quality to the unpruned network": "supported",
        "MagRan 75 %, p 0.5 is of comparable quality to the unpruned network": "not supported",
        f"RigL 50 % gives a lower cFD than Static 50 %, {moving}": "supported",
        "Recycled 50 %, EB's seconds gives a lower cFD than Narrow 50 %, EB's seconds, whose channels stay": (
            "not supported"
        ),
    }
    assert {text: found[text].verdict for text in told} == told
    assert {found[text].kind for text in told} == {"exploratory"}
    # Primary ones come once, and runs of one seed not at all.
    assert f"MagRan 75 %, p 0.05 gives a lower cFD than MagRan 75 %, p 0.5, {share}" in found
    assert sum(moving in text for text in found) == 2 and not any("RigL 75 %" in text for text in found)


def test_fewer_sampling_steps_are_drawn_and_tabled():
    e = digits_sparse({"unpruned-5": 30, "unpruned-10": 25, "unpruned-20": 21})
    left, right = figures.sampling_steps(Results(e)).axes
    curves = {"Unpruned", "EB 50 %", "Static 50 %"}
    assert set(curves_of(left)) == set(curves_of(right)) == curves
    x, y, half = curves_of(left)["Unpruned"]
    # int(x^2) for x evenly spaced up to sqrt(800): of 50 numbers the first two coincide
    assert list(x) == [5, 10, 20, 49] and list(y) == [32, 27, 23, 22]
    assert list(half) == pytest.approx(4 * [2.776 * (2.5 / 5) ** 0.5], rel=1e-3)  # t of four degrees
    assert list(curves_of(right)["EB 50 %"][0]) == [7.5 * n for n in (5, 10, 20, 49)]  # M
    rows = {row["run"]: row for row in rows_of(tables_of(e, "steps")[0])}
    assert rows["Unpruned, 10 steps"]["evaluations"] == "10" and rows["Unpruned"]["evaluations"] == "49"
    assert float(rows["Unpruned, 10 steps"]["image_macs"]) == pytest.approx(30e6 * 10)


def test_only_runs_of_control_are_sampled_in_a_way_of_their_own():
    """They are no rows that others are compared with."""
    for own, wrong in (
        (
            {"method": "unpruned"},
            r"runs\.other\.sampling: sampled in a way of its own, its method is control",
        ),
        ({"sampling": {"steps": 2000}}, r"runs\.other\.sampling\.steps: 2000 exceed the 1000 timesteps"),
        ({"sampling": {"images": 2}}, r"runs\.other\.sampling\.images"),
    ):
        run = {"title": "Other", "method": "control", "init": "dense", "sampling": {"steps": 10}, **own}
        with pytest.raises(UserError, match=wrong):
            shipped("digits", runs={"other": run})


def test_every_table_and_figure_has_a_name_of_its_own():
    """What is asked for by name is one or the other."""
    e = digits_sparse({})
    assert not set(get_args(Table)) & set(figures_of(e))
    drawn = reported.write(e, "steps", "sampling")
    assert {path.name for path in drawn} == {
        *(f"steps.{x}" for x in ("csv", "md", "tex")),
        "sampling.pdf",
        "sampling.png",
        "protocol.json",
    }
