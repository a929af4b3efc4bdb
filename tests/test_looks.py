"""What figures and the page look like: sizes, legible and whole text, legends; and the page in a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import reported
from conftest import ROOT
from matplotlib.axis import Tick
from matplotlib.text import Text
from PIL import Image
from reported import fabricate, make

from ebdiff.experiment import load
from ebdiff.experiment.stages import FIGURES
from ebdiff.experiment.stages import figures as figures_of
from ebdiff.report import figures, page, style
from ebdiff.report.results import Results

TEXT_BLOCK = 6.875  # inches: both columns of a CVPR page; one is 3.25 wide
CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Every figure of two experiments, drawn, and what stands in its margins."""
    found = {}

    def keep(figure, folder, name):
        for _ in range(2):  # as it is saved
            figure.draw_without_rendering()
        found[folder.name, name] = figure
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("drawn"))
        reported.vouched(patch)
        patch.setattr(style, "save", keep)
        many = load.load("digits_sparse", ROOT / "config/experiments")
        for e, asked in ((make(more=True, sparse=True), None), (many, ("figure5", "sampling"))):
            fabricate(e)
            figures.write(Results(e), asked or figures_of(e), Path(e.name))
    return found


@pytest.mark.filterwarnings("ignore:Glyph")  # a hostile title's
@pytest.mark.slow
def test_figures_fit_their_column_and_their_text_is_legible_and_whole(drawn):
    assert {name for _, name in drawn} == {*FIGURES, "sparsity", "overlap", "sampling"}
    for key, figure in drawn.items():
        width, height = figure.get_size_inches()
        assert width <= TEXT_BLOCK and height <= 9, key
        ticks = {label for tick in figure.findobj(Tick) for label in (tick.label1, tick.label2)}
        for text in figure.findobj(Text):
            words, (left, bottom, right, top) = text.get_text(), text.get_window_extent().extents
            assert text.get_fontsize() >= 6 and "mathdefault" not in words, (key, words)
            if words and text not in ticks:  # some of these are beyond the axes, and not drawn
                assert min(left, bottom) > -1, (key, words)
                assert right < figure.bbox.width + 1 and top < figure.bbox.height + 1, (key, words)


def test_every_curve_has_one_legend_entry(drawn):
    for key, figure in drawn.items():
        for legend in (*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))):
            labels = [text.get_text() for text in legend.get_texts()]
            assert len(labels) == len(set(labels)), key
    losses = drawn["digits", "losses"]
    lines = [line for line in losses.axes[0].lines if len(line.get_xdata())]
    assert len(losses.legends[0].get_texts()) == len(lines)
    assert [t.get_text() for t in losses.legends[0].get_texts() if t.get_text().startswith("TA-EB")] == [
        "TA-EB, t 0-260", "TA-EB, t 240-460", "TA-EB, t 440-1000",
    ]  # fmt: skip


def test_many_samples_are_still_large(drawn):
    """45 runs and real images, each image at least 7 mm wide."""
    figure = drawn["digits_sparse", "figure5"]
    assert len(figure.axes) == 46
    for axes in figure.axes:
        (image,) = axes.images
        width = axes.get_position().width * figure.get_size_inches()[0] * 25.4
        assert width / (image.get_array().shape[1] / 9) >= 7  # 8 pixels and a gap


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The page of an experiment, with all its figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("finished"))
        reported.vouched(patch)
        e = make(seeds=(0, 1))
        fabricate(e)
        reported.write(e, *figures_of(e), folder=Path("page"))
        page.write_page(Results(e), Path("page/report.html"))
    return folder / "page/report.html"


MEASURE = """<script>addEventListener("load", () => {
  const size = i => [i.naturalWidth, i.naturalHeight, i.clientWidth, i.clientHeight];
  const sizes = () => [...document.images].map(size);
  const told = [document.documentElement.scrollWidth, sizes()];
  document.querySelectorAll(".zoom").forEach(zoom => zoom.open = true);
  document.title = JSON.stringify([...told, sizes()]);
});</script>"""


SCROLLED = """<script>addEventListener("load", () => {
  const widths = box => [box.scrollWidth, box.clientWidth];
  document.title = JSON.stringify([...document.querySelectorAll(".scroll")].map(widths));
});</script>"""


def browser(tmp_path, path, *flags, width=1600):
    """What headless Chromium says of a page of so many x 5000 pixels."""
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}")
    quiet = "headless no-sandbox disable-gpu no-first-run disable-background-networking"
    quiet += f" disable-component-update disable-sync hide-scrollbars window-size={width},5000"
    home = tmp_path / "home"
    asked = [*(f"--{flag}" for flag in quiet.split()), f"--user-data-dir={home}", *flags, path.as_uri()]
    done = subprocess.run([CHROMIUM, *asked], check=True, capture_output=True, text=True, timeout=300)
    shutil.rmtree(home, ignore_errors=True)
    return done.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")
def test_the_page_in_a_browser_shows_its_figures_and_enlarges_them(tmp_path, finished):
    measured = tmp_path / "measured.html"
    measured.write_text(finished.read_text() + MEASURE)
    title = re.search("<title>(.*?)</title>", browser(tmp_path, measured, "--dump-dom"))[1]
    width, before, after = json.loads(title)
    assert width == 1600 and len(before) == len(FIGURES)
    for (natural, tall, across, down), (*_, wide, _) in zip(before, after, strict=True):
        assert natural > 300 and across > 300 and down > 100 and across < 1600 - 64
        assert across / down == pytest.approx(natural / tall, rel=0.02) and wide > 1.2 * across


@pytest.mark.slow
def test_no_table_scrolls_at_the_width_of_a_laptop(tmp_path, finished):
    measured = tmp_path / "measured.html"
    measured.write_text(finished.read_text() + SCROLLED)
    title = re.search("<title>(.*?)</title>", browser(tmp_path, measured, "--dump-dom", width=1280))[1]
    widths = json.loads(title)
    assert len(widths) > 4 and all(own <= given for own, given in widths)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_a_screenshot_of_the_page_is_neither_empty_nor_broken(tmp_path, finished, dark):
    flags = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    browser(tmp_path, finished, f"--screenshot={tmp_path / 'page.png'}", *flags)
    with Image.open(tmp_path / "page.png") as image:
        grey = np.asarray(image.convert("L"))
    assert grey.shape == (5000, 1600)
    paper = np.bincount(grey.ravel()).argmax()
    assert (paper < 60) == dark
    bands = [(band != paper).mean() for band in np.split(grey, 5)]
    assert min(bands) > 0.02 and max(bands) < 0.95, bands


def test_numbers_of_crowded_points_stand_apart_and_near():
    x, y = np.array([0.0, 3, 6, 100]), np.array([20.0, 20, 21, 20])
    assert figures._apart(x, y) == pytest.approx([61 / 3 - 7, 61 / 3, 61 / 3 + 7, 20], abs=1)
    many = figures._apart(np.zeros(20), np.full(20, 5.0))
    assert np.diff(np.sort(many)).min() > 6 and many.mean() == pytest.approx(5) and np.ptp(many) < 200
