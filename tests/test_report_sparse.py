"""What the report shows of sparse training, from made-up results; expected numbers are computed by hand."""

import matplotlib
import numpy as np
import pytest
import reported
from conftest import ROOT
from reported import fabricate, make, rows_of, undrawn
from test_report import page_of
from test_report_paper import shipped, tables_of

from ebdiff.experiment import layout, load
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


def test_the_primary_claims_of_digits_sparse():
    """Each is supported where the numbers say so, and the other way round not."""
    better = {"recycle-50": 20.5, "magran-50": 18, "magran-75-gentle": 17}
    for quality, verdict in ((better, "supported"), (dict.fromkeys(better, 30), "not supported")):
        e = load.load("digits_sparse", ROOT / "config/experiments").model_copy(update={"seeds": (0, 1, 2)})
        fabricate(e, lambda run, seed, of=quality: of.get(run, 20 if run == "unpruned" else 22) + seed)
        claims = [c for c in reading.read(Results(e)) if c.kind == "primary"]
        assert [c.verdict for c in claims] == [verdict] * 4
    assert ["comparable quality" in c.text for c in claims] == [True, False, False, False]
