"""Two experiments side by side, by numbers that are known."""

import re
from pathlib import Path

import numpy as np
import pytest
import reported
from scipy import stats

from ebdiff.experiment import layout
from ebdiff.report import figures, style
from ebdiff.report.compare import FIGURES, common, compare, differing
from ebdiff.report.results import Results
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
