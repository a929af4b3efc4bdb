"""Two experiments side by side, by numbers that are known."""

import os
import re
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import reported
from conftest import vouch
from scipy import stats
from stages import run

from ebdiff.experiment import layout
from ebdiff.report import figures, style, tables
from ebdiff.report.compare import FIGURES, common, compare, differing
from ebdiff.report.render import Column, Table, from_markdown, to_markdown
from ebdiff.report.results import Earlier, Results
from ebdiff.system.errors import UserError
from ebdiff.system.files import read_json, write_json

LESS = {0: 2.0, 1: 2.5, 2: 1.8, 3: 0.0}  # by which the second experiment's distances are lower


@pytest.fixture
def both(tmp_path, monkeypatch):
    """Two experiments of three common seeds; the second's distances are lower."""
    monkeypatch.chdir(tmp_path)
    reported.vouched(monkeypatch)
    a, b = reported.make(seeds=(0, 1, 2)), reported.make(seeds=(0, 1, 2, 3), name="other")
    b = b.model_copy(update={"training": b.training.model_copy(update={"batch": 32})})
    reported.fabricate(a)
    reported.fabricate(b, lambda run, seed: 20.0 + seed - LESS[seed])
    return a, b


def row(table, name):
    """A row by the keys of its columns."""
    (found,) = (r for r in table.values if r[0] == name)
    return dict(zip((c.key for c in table.columns), found, strict=True))


def test_differences_are_paired_by_seed(both):
    found = row(common(*map(Results, both)), "TA-EB")
    assert found["cfd_0"] == (20, 21, 22) and found["cfd_1"] == (18, 18.5, 20.2, 23)
    np.testing.assert_allclose(found["minus"], [-2, -2.5, -1.8])
    assert found["p"] == pytest.approx(stats.ttest_1samp(found["minus"], 0).pvalue)
    assert found["seconds_0"] == found["seconds_1"][:3]
    np.testing.assert_allclose(found["kid_1"], [0.18, 0.185, 0.202, 0.23])


def test_distances_measured_in_other_ways_are_not_compared(both):
    path = layout.path(layout.METRICS, experiment="other", run="ta-eb", seed=1)
    told = read_json(path)
    told["protocols"]["classifier"]["reference_images"] = 50
    write_json(path, told)
    table = common(*map(Results, both))
    assert row(table, "TA-EB")["minus"] is None and row(table, "TA-EB")["p"] is None
    assert row(table, "Unpruned")["minus"] is not None
    assert "Measured in different ways, so not compared: TA-EB." in table.notes


def test_settings_that_differ(both):
    assert list(differing(*both)) == [("training.batch", "64", "32"), ("seeds", "[0, 1, 2]", "[0, 1, 2, 3]")]


def test_the_page_holds_both(both, monkeypatch):
    drawn = style.save(style.sentence("a figure"), Path(), "dot")[1].read_bytes()

    def write(results, names, folder):
        folder.mkdir(parents=True)
        for name in names:
            (folder / f"{name}.png").write_bytes(drawn)

    monkeypatch.setattr(figures, "write", write)
    layout.path(layout.METRICS, experiment="other", run="eb-50", seed=0).unlink()
    path = compare(*both)
    assert path == Path("results/digits/compared/other/compare.html")
    page = path.read_text(encoding="utf-8")
    assert page.count("<img ") == 2 * len(FIGURES)
    assert page.count("<h2>Tables of ") == 2 and "<title>digits and other</title>" in page
    assert "<script>alert" not in page and "training.batch" in page
    assert re.search(r"TA-EB</td>.*-2\.10 \(", page)
    with pytest.raises(UserError, match="with itself"):
        compare(both[0], both[0])


# --- two dates of one ---------------------------------------------------------------------------------------


@pytest.fixture
def dates(tmp_path, monkeypatch):
    """An experiment, and a copy of its results from when it was trained in smaller batches, without TA-EB."""
    monkeypatch.chdir(tmp_path)
    reported.vouched(monkeypatch)
    now = reported.make(seeds=(0, 1, 2))
    training = now.training.model_copy(update={"batch": 32})
    runs = {name: listed for name, listed in now.runs.items() if name != "ta-eb"}
    then = now.model_copy(update={"training": training, "runs": runs, "tables": {"table1": ("eb-50",)}})
    for e, quality in ((then, lambda _, seed: 20.0 + seed - LESS[seed]), (now, lambda _, seed: 20.0 + seed)):
        reported.fabricate(e, quality)
        for name, seed in ((name, seed) for name in e.runs for seed in e.seeds):
            made = datetime(2026, 11, 1 if e is then else 26, 9, 10 + seed).timestamp()
            os.utime(layout.path(layout.METRICS, experiment="digits", run=name, seed=seed), (made, made))
            vouch(e, "fid", run=name, seed=seed)
        if e is then:
            reported.write(e, "table1", folder=Path("results/digits"))
            style.save(style.sentence("a figure"), Path("results/digits/figures"), "figure5")
            shutil.copytree(
                "results/digits", "old/digits", copy_function=shutil.copy
            )  # made now, by its date
    return now, Path("old/digits")


def test_two_dates_are_paired_by_seed_and_told_apart(dates):
    table = common(Results(dates[0], partial=True), Earlier(*dates))
    found = row(table, "Unpruned")
    assert found["cfd_0"] == (20, 21, 22) and found["cfd_1"] == (18, 18.5, 20.2)
    assert found["p"] == pytest.approx(stats.ttest_1samp([-2, -2.5, -1.8], 0).pvalue)
    assert "TA-EB" not in [r[0] for r in table.values]  # then there was none
    assert "seconds_0" in found and not {"seconds_1", "speedup_1"} & found.keys()  # files of then don't tell
    headings = [column.heading for column in table.columns]
    assert {"cFD\ndigits\n2026-11-26 09:12", "cFD\nold/digits\n2026-11-01 09:12"} <= {*headings}
    (changed,) = (note for note in table.notes if note.startswith("Made for other settings"))
    assert "Unpruned" in changed


def test_the_page_shows_what_was_written_then(dates, monkeypatch):
    now, old = dates
    drawn = (old / "figures/figure5.png").read_bytes()

    def write(results, names, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / f"{name}.png").write_bytes(drawn)

    monkeypatch.setattr(figures, "write", write)
    metrics = old / layout.path(layout.METRICS, experiment="digits", run="eb-50", seed=1).relative_to(
        "results/digits"
    )
    metrics.write_text(metrics.read_text().replace("18.5", "1.85"))
    (old / "tables/mine.md").write_text("no table\n")
    page = compare(now, old).read_text(encoding="utf-8")
    assert page.count("<img ") == len(FIGURES) + 1
    assert "<title>digits, 2026-11-26 09:12 and old/digits, 2026-11-01 09:12</title>" in page
    assert "Settings that differ" not in page  # those of then aren't kept
    assert f"<li>{metrics}: damaged (it isn&#39;t what its record tells)</li>" in page
    assert "<li>old/tables/mine.md: damaged" in page.replace("old/digits", "old")
    # What lay there before there were records still shows: pictures and tables.
    for folder in ("records", "seed0", "seed1", "seed2"):
        shutil.rmtree(old / folder)
    page = compare(now, old).read_text(encoding="utf-8")
    assert page.count("<img ") == len(FIGURES) + 1 and "<h2>Tables of old/digits</h2>" in page
    assert "Runs of one name" not in page
    Path("empty").mkdir()
    other = reported.make(seeds=(0,), name="other")
    reported.fabricate(other)
    vouch(other, "fid", run="eb-50", seed=0)
    with pytest.raises(
        UserError, match=r"results/other holds results of other; give a copy of results/digits"
    ):
        compare(now, Path("./results/other"))
    for folder, words in (("results/digits", "with itself"), ("./empty", "empty holds no results of digits")):
        with pytest.raises(UserError, match=words):
            compare(now, Path(folder))


@pytest.mark.slow
def test_a_copy_of_real_results_is_vouched_for_by_its_own_records(made, tmp_path, monkeypatch, capsys):
    shutil.copytree(made, tmp_path / "project", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "project")
    shutil.copytree("results/tiny", "old/tiny", copy_function=shutil.copy)
    assert run("compare", "tiny", "old/tiny") == 0
    printed = capsys.readouterr().out.strip()
    assert printed == "results/tiny/compared/tiny/compare.html"
    page = Path(printed).read_text(encoding="utf-8")
    assert "Runs of one name" in page and "Left out" not in page and "Made for other settings" not in page
    assert run("compare", "tiny", "results/tiny/") == 1
    assert "compare: tiny with itself" in capsys.readouterr().err


def test_a_table_comes_back_from_its_markdown(both):
    built = tables.build(Results(both[0]), "table4")
    assert built.grouped and built.bold
    read = from_markdown(to_markdown(built))
    assert read.cells() == built.cells() and read.notes == built.notes
    assert (read.caption, read.grouped, read.bold) == (built.caption, built.grouped, built.bold)
    assert [c.left for c in read.columns] == [c.left for c in built.columns] and read.label == built.label
    strange = Table(
        "A | b", (Column("k", "*x*_[1]\\", str, left=True),), [["<b> & `c` | \\"]], [""], ["a # b"]
    )
    read = from_markdown(to_markdown(strange))
    assert (read.caption, read.columns[0].heading) == ("A | b", "*x*_[1]\\")
    assert (read.cells(), read.notes) == (strange.cells(), ["a # b"])
