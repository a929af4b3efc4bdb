"""Drawings: preprocessing against literal forms, the raster, files good and bad, and real ones."""

import json
import math
import os
import pickle
import shutil
import xml.etree.ElementTree as ET
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, changed, vouch
from PIL import Image, ImageDraw
from test_doors import TOY, doors
from test_starter import bytes_read

from ebdiff import starter
from ebdiff.codecs.codec import open_codec
from ebdiff.codecs.raster import picture
from ebdiff.data import strokes
from ebdiff.data.dataset import Cond, conditions, open_dataset, open_held_out, open_labels, open_pixels
from ebdiff.data.sources import prepare
from ebdiff.diffusion import sample
from ebdiff.diffusion.ensemble import Ensemble
from ebdiff.diffusion.sample import svg_grid
from ebdiff.experiment import layout, load
from ebdiff.experiment.members import IdentityConfig
from ebdiff.experiment.records import Work
from ebdiff.metrics.classifier import Classifier
from ebdiff.nets import store
from ebdiff.nets.execution import Runtime
from ebdiff.system.errors import Unusable, UserError
from ebdiff.training.state import State

CPU = torch.device("cpu")
SVG = "{http://www.w3.org/2000/svg}"
ZIGZAG = [np.array([[5.0, 5], [9, 8], [5, 11]]), np.array([[2.0, 2]]), np.array([[9.0, 1], [9, 4]])]


def experiment(path, source="sketches", codec=None, **dataset):
    section = {"name": "drawn", "source": source, "max_points": 60, **dataset}
    raw = changed(TOY, {"dataset": section | ({"path": str(path)} if path else {}), "runs.shrunk": ...})
    raw |= {"name": "toy", "network": {"kind": "chirodiff", "hidden": 8, "layers": 1}}
    return load.parse(raw | {"codec": {"kind": "raster", "size": 32, **(codec or {})}}, "toy.yaml")


def line(*strokes, word="zigzag"):
    return json.dumps({"word": word, "drawing": [np.asarray(s, float).T.tolist() for s in strokes]})


def wave(k):
    """Drawing number k: one or two strokes, longer with k."""
    x = np.linspace(0, 10 + k, 20)
    both = [np.column_stack([x, np.sin(x + k)]), np.array([[0, 5], [3.0 + k, 6]])]
    return line(*both[: 1 + k % 2], word=("even", "odd")[k % 2])


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Forty prepared drawings, and their experiment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "waves.ndjson").write_text("\n".join(map(wave, range(40))) + "\n")
    e = experiment(tmp_path / "waves.ndjson")
    prepare(e)
    return e


# --- preprocessing ----------------------------------------------------------------------------------------


def literal(drawing, step):
    """ChiroDiff's preprocessing, point by point."""
    drawing = [s for s in drawing if len(s) > 1]
    x0, y0 = drawing[0][0]
    moved = [[(x - x0, y - y0) for x, y in s] for s in drawing]
    radius = max(math.hypot(x, y) for s in moved for x, y in s)
    points = []
    for pen, stroke in enumerate(moved):
        scaled = [(x / radius, y / radius) for x, y in stroke]
        legs = [math.dist(a, b) for a, b in pairwise(scaled)]
        n = max(2, round(sum(legs) / step) + 1)
        for i in range(n):
            way, k = sum(legs) * i / (n - 1), 0
            while k < len(legs) - 1 and way > legs[k]:
                way, k = way - legs[k], k + 1
            (ax, ay), (bx, by) = scaled[k], scaled[k + 1]
            share = min(way / legs[k], 1)
            points.append((10 * (ax + share * (bx - ax)), 10 * (ay + share * (by - ay)), pen))
    return [tuple(b - a for a, b in zip(p, q, strict=True)) for p, q in pairwise(points)]


@pytest.mark.parametrize("step", [0.05, 0.1, 0.3, 1.0])
def test_preprocessing_is_the_literal_one(step):
    np.testing.assert_allclose(strokes.movements(ZIGZAG, step), literal(ZIGZAG, step), atol=1e-5)
    rng = np.random.default_rng(0)
    for _ in range(20):
        drawing = [rng.normal(0, 50, (n, 2)) for n in rng.integers(2, 9, 4)]
        np.testing.assert_allclose(strokes.movements(drawing, step), literal(drawing, step), atol=1e-4)


def test_a_straight_line_has_twenty_equal_steps():
    found = strokes.movements([np.array([[3.0, 4], [3, 4.5], [3, 7]])], 0.05)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0, 0.5, 0]] * 20, atol=1e-6)


def test_a_circle_keeps_its_length_and_turns_evenly():
    angle = np.linspace(0, 2 * np.pi, 2001)
    found = strokes.movements([7 + 40 * np.column_stack([np.cos(angle), np.sin(angle)])], 0.05)
    # The farthest point from the first is across: the radius of the circle is 1/2, its length pi.
    assert len(found) == round(np.pi / 0.05)
    np.testing.assert_allclose(np.hypot(*found[:, :2].T), 10 * np.sin(np.pi / len(found)), rtol=1e-4)
    np.testing.assert_allclose(found[:, :2].sum(axis=0), 0, atol=1e-4)


def test_pen_and_place_come_back():
    parts = strokes.strokes_of(strokes.movements(ZIGZAG, 0.05), 0.8)
    assert len(parts) == 2
    ends = np.array([[part[0], part[-1]] for part in parts]) * np.hypot(4, 3) / 10 + [5, 5]
    radius = max(np.hypot(*(s - [5, 5]).T).max() for s in (ZIGZAG[0], ZIGZAG[2]))
    ends = (ends - [5, 5]) * radius / np.hypot(4, 3) + [5, 5]
    np.testing.assert_allclose(ends, [[[5, 5], [5, 11]], [[9, 1], [9, 4]]], atol=1e-4)


def test_simplification_keeps_corners_and_nothing_on_a_straight_way():
    corner = np.concatenate([np.linspace([0, 0], [1, 0], 21), np.linspace([1, 0], [1, 1], 21)[1:]])
    np.testing.assert_allclose(strokes.simplified(corner, 0.01), [[0, 0], [1, 0], [1, 1]])
    rng = np.random.default_rng(1)
    walk = rng.normal(size=(60, 2)).cumsum(axis=0)
    kept = strokes.simplified(walk, 0.8)
    assert 2 < len(kept) < 60
    dense = np.concatenate([np.linspace(a, b, 400) for a, b in pairwise(kept)])
    assert max(np.hypot(*(dense - p).T).min() for p in walk) <= 0.81
    assert len(strokes.simplified(walk, 0)) == 60


# --- the raster -------------------------------------------------------------------------------------------


def decoded(e, *sequences, length=60):
    x, mask = torch.zeros(len(sequences), length, 3), torch.zeros(len(sequences), length, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        x[i, : len(sequence)], mask[i, : len(sequence)] = torch.as_tensor(sequence), True
    codec = open_codec(e, CPU)
    return codec.decode(x, Cond(mask=mask)), codec.vector(x, Cond(mask=mask))


def test_lines_are_as_wide_as_asked_in_the_middle_of_white(tmp_path):
    e = experiment(tmp_path, codec={"size": 256, "line_width": 6})
    images, _ = decoded(e, [[0, 0.5, 0]] * 20, [[0.5, 0.5, 0]] * 20)
    assert (images.dtype, images.shape) == (np.uint8, (2, 256, 256, 1))
    ink = (255 - images[0, ..., 0].astype(float)) / 255
    np.testing.assert_allclose(ink[128].sum(), 6, atol=0.3)  # across
    np.testing.assert_allclose(ink.sum(axis=0)[:120].sum() + ink.sum(axis=0)[136:].sum(), 0)
    rows = np.flatnonzero(
        ink.sum(axis=1)
    )  # the line's ends stand a width from the border, half of it is round
    assert abs(rows[0] - 3) <= 1 and abs(rows[-1] - 252) <= 1
    diagonal = (255 - images[1, ..., 0].astype(float)) / 255
    np.testing.assert_allclose(diagonal[128].sum(), 6 * np.sqrt(2), atol=0.5)
    assert ((images[1] > 0) & (images[1] < 255)).any()  # anti-aliased


def test_a_decoded_drawing_is_the_one_drawn_from_its_strokes(tmp_path):
    image = decoded(experiment(tmp_path, codec={"size": 256}), strokes.movements(ZIGZAG, 0.05))[0][0, ..., 0]
    points = np.concatenate([ZIGZAG[0], ZIGZAG[2]])
    low, high, width = points.min(axis=0), points.max(axis=0), 6
    by_hand = Image.new("L", (1024, 1024), 255)
    for stroke in (ZIGZAG[0], ZIGZAG[2]):
        at = (stroke - (low + high) / 2) / (high - low).max() * (256 - 2 * width) + 128
        ImageDraw.Draw(by_hand).line((4 * at).ravel().tolist(), 0, 4 * width, joint="curve")
    expected = np.asarray(by_hand.reduce(4), float)
    assert np.abs(image - expected).mean() < 2  # of 255: round ends
    assert np.corrcoef(image.ravel(), expected.ravel())[0, 1] > 0.98


def test_padding_is_never_drawn_and_any_numbers_can_be(tmp_path):
    e = experiment(tmp_path)
    sequence = torch.tensor(strokes.movements(ZIGZAG, 0.05))
    codec, mask = open_codec(e, CPU), (torch.arange(60) < len(sequence))[None]
    x = torch.nn.functional.pad(sequence, (0, 0, 0, 60 - len(sequence)))[None]
    y = x.masked_fill(~mask[..., None], 9)
    np.testing.assert_array_equal(codec.decode(x, Cond(mask=mask)), codec.decode(y, Cond(mask=mask)))
    wild = [[[math.nan] * 3], [[math.inf, 0, 1]], [[1e30, -1e30, 1]], [[0, 0, 0]]]
    assert (decoded(e, *wild)[0].min(axis=(1, 2, 3)) < 255).all()  # a dot at least


def test_a_stroke_begins_above_the_pens_threshold(tmp_path):
    for value, parts in ((0.79, 1), (0.81, 2)):
        _, (svg,) = decoded(experiment(tmp_path), [[1, 1, 0], [1, 0, value], [1, 0, 0]])
        assert len(ET.fromstring(svg).findall(f".//{SVG}path")) == parts


def test_svg_has_every_stroke_where_the_raster_has_it(tmp_path):
    _, svgs = decoded(experiment(tmp_path), strokes.movements(ZIGZAG, 0.05), [[0, 0.5, 0]] * 20)
    paths = [p.get("d") for p in ET.fromstring(svgs[0]).iter(f"{SVG}path")]
    assert len(paths) == 2
    points = np.array([p.split() for d in paths for p in d[1:].split(" L")], float)
    assert points.min() == 6 and points.max() == 250  # a line width from the border
    grid = ET.fromstring(svg_grid(svgs * 8))
    assert len(grid.findall(f"{SVG}g")) == 16
    assert len(grid.findall(f".//{SVG}path")) == 24


# --- prepared drawings ------------------------------------------------------------------------------------


def test_what_is_prepared_is_what_was_drawn(drawn):
    data = open_dataset(drawn)
    pixels, apart, labels = open_pixels("drawn"), open_held_out("drawn"), open_labels("drawn")
    assert (len(data), len(pixels), len(labels), len(apart)) == (34, 34, 34, 6)  # 85 and 15 %
    batch = data.batch(data.at(np.arange(34)), CPU)
    assert (batch.x0.shape, batch.x0.dtype, batch.cond.label) == ((34, 60, 3), torch.float32, None)
    assert (batch.x0[~batch.cond.mask] == 0).all()
    np.testing.assert_array_equal(open_codec(drawn, CPU).decode(batch.x0, batch.cond), pixels)
    lines = (json.loads(wave(k)) for k in range(40))
    known = {
        strokes.movements([np.array(s).T for s in x["drawing"]], 0.05).tobytes(): x["word"] for x in lines
    }
    manifest = json.loads(layout.path(layout.MANIFEST, dataset="drawn").read_text())
    rows = [x[own].numpy().tobytes() for x, own in zip(batch.x0, batch.cond.mask, strict=True)]
    assert [known[row] for row in rows] == [manifest["categories"][k] for k in labels]
    assert len(set(rows)) == 34
    # The held-out pictures are those of the other six.
    others = [np.frombuffer(x, np.float32).reshape(-1, 3).copy() for x in set(known) - set(rows)]
    pictures = {image.tobytes() for image in decoded(drawn, *others)[0]}
    assert pictures == {image.tobytes() for image in apart}


def test_a_draw_is_those_rows_of_the_data(drawn):
    data = open_dataset(drawn)
    first, again = (data.draw(8, 3, "t", 5) for _ in range(2))
    for a, b, part in zip(first, again, data.draw(8, 3, "t", 5, slice(2, 4)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a[2:4], part)


def test_resident_sequences_make_the_same_batches(drawn):
    data = open_dataset(drawn)
    there = replace(data, resident=torch.from_numpy(np.array(data.rows)))
    for a, b in zip(*(d.batch(d.draw(8, 0, "t", 1), CPU) for d in (data, there)), strict=True):
        assert torch.equal(a.mask, b.mask) if isinstance(a, Cond) else torch.equal(a, b)


def test_lengths_are_drawn_from_the_data(drawn):
    data = open_dataset(drawn)

    def drawn_masks(seed, indices):
        return conditions(data.items, data.lengths, seed, indices).mask

    masks = drawn_masks(0, range(3000))
    assert masks.shape == (3000, 60) and not (masks[:, 1:] & ~masks[:, :-1]).any()
    lengths = masks.sum(dim=1).numpy()
    values, seen = np.unique(lengths, return_counts=True)
    expected = np.array([(data.lengths == v).sum() for v in values]) * 3000 / len(data)
    assert set(values) == set(data.lengths.tolist())
    assert ((seen - expected) ** 2 / expected).sum() < len(values) + 4 * np.sqrt(
        2 * len(values)
    )  # chi squared
    # A function of (seed, number).
    assert torch.equal(drawn_masks(0, [7, 2]), masks[[7, 2]])
    assert not torch.equal(drawn_masks(1, range(3000)), masks)


def test_handed_over_lengths_go_along_and_drawings_are_drawn_as_svg_too(drawn, tmp_path):
    """Of an expert that was never trained, as the file alone draws it."""
    expert = drawn.runs["unpruned"].experts[0]
    where = dict(seed=0, expert=expert.key, milestone=expert.iterations)
    state = State.start(store.fresh(drawn.architecture, 0, "test"), Runtime(CPU))
    state.save(layout.path(layout.MILESTONE, experiment="toy", **where), drawn.architecture, {})
    vouch(drawn, "finetune-region", **where)
    here = Ensemble.of(Work(drawn, "sample", run="unpruned", seed=0), CPU)
    here.write(tmp_path / "drawings.safetensors", {})
    there = Ensemble.read(tmp_path / "drawings.safetensors", CPU)
    shutil.rmtree("resources")
    assert torch.equal(here.conditions(3, range(9)).mask, there.conditions(3, range(9)).mask)
    np.testing.assert_array_equal(here.sample(6, seed=3, steps=4), there.sample(6, seed=3, steps=4))
    sample.draw(there, 5, 3, tmp_path / "out")
    names = {str(p.relative_to(tmp_path / "out").with_suffix("")) for p in (tmp_path / "out").rglob("*.svg")}
    assert names == {"grid", *(f"images/0000{i}" for i in range(5))}
    assert len(ET.parse(tmp_path / "out/grid.svg").getroot().findall(f"{SVG}g")) == 5


def test_another_raster_is_another_preparation(drawn):
    other = experiment(drawn.dataset.path, codec={"line_width": 3})
    assert other.prepared != drawn.prepared and other.dataset.content == drawn.dataset.content


def test_damage_is_noticed(drawn):
    path = layout.path(layout.MANIFEST, dataset="drawn").with_name("sequences.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + b"\0\0\0\1")
    with pytest.raises(Unusable, match=r"sequences\.npy: isn't what was prepared"):
        open_dataset(drawn)


def test_at_most_so_many_of_a_category_and_a_subset(drawn):
    few = drawn.model_copy(
        update={"dataset": drawn.dataset.model_copy(update={"per_category": 5, "name": "few", "held_out": 0})}
    )
    manifest = prepare(few)
    assert (manifest["count"], manifest["held_out"], manifest["classes"]) == (10, 0, 2)
    assert np.bincount(open_labels("few")).tolist() == [5, 5]
    part = drawn.model_copy(update={"dataset": drawn.dataset.model_copy(update={"subset": 7})})
    assert len(open_dataset(part)) == 7


# --- files, good and bad ----------------------------------------------------------------------------------

GOOD = line(*ZIGZAG)
BAD = {
    "malformed": ('{"word": "x", "drawing": [[[1,2],[3', "Invalid JSON"),
    "no drawing": ('{"word": "x"}', "drawing: Field required"),
    "no strokes": ('{"word": "x", "drawing": []}', "no strokes"),
    "one point": (line([[1, 2]]), "no stroke has two points"),
    "one place": (line([[1, 2], [1, 2]]), "all points are the same"),
    "one axis": ('{"drawing": [[[1, 2, 3]]]}', "stroke 0: needs as many x as y"),
    "uneven": ('{"drawing": [[[1, 2, 3], [1, 2]]]}', "stroke 0: needs as many x as y"),
    "words": ('{"drawing": [[["1", "2"], ["1", "2"]]]}', "drawing: Input should be a valid number"),
    "infinite": ('{"drawing": [[[1, 1e400], [1, 2]]]}', "drawing: Input should be"),
    "nan": ('{"drawing": [[[1, NaN], [1, 2]]]}', "drawing: Input should be"),
    "huge": ('{"drawing": [[[1, 1e300], [1, 2]]]}', "drawing: Input should be less than"),
    "deep": ("[" * 5000, "Invalid JSON"),
    "binary": (b"\xff\xfe\x00".decode("latin-1"), "Invalid JSON"),
}


def refused(e):
    with pytest.raises(UserError) as caught:
        prepare(e)
    assert "\n" not in str(caught.value)
    assert not layout.path(layout.MANIFEST, dataset="drawn").exists()
    return str(caught.value)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_told_by_its_number_or_skipped_and_counted(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    text, words = BAD[kind]
    path = tmp_path / "x.ndjson"
    path.write_text("\n".join([GOOD] * 4 + [text] + [GOOD] * 2), encoding="utf-8")
    message = refused(experiment(path))
    assert f"{path}:5: {words}" in message and "dataset.broken to skip" in message
    entry = prepare(experiment(path, broken="skip", held_out=0))
    assert (entry["count"], entry["skipped"], entry["too_long"]) == (6, 1, 0)


def test_ten_thousand_points_are_left_out_with_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, rng = tmp_path / "x.ndjson", np.random.default_rng(0)
    path.write_text("\n".join([GOOD] * 4 + [line(rng.normal(size=(10_000, 2)).round(2))]))
    entry = prepare(experiment(path, held_out=0))
    assert (entry["count"], entry["skipped"], entry["too_long"]) == (4, 0, 1)
    assert f"left out, longer than dataset.max_points 60: 1 (first {path}:5: " in capsys.readouterr().out


def a_pickle(path):
    path.write_bytes(pickle.dumps([[[1, 2], [3, 4]]]))
    return path


def a_folder(path):
    path.mkdir()
    a_pickle(path / "1.pkl")
    return path


def long_line(path):
    path.write_text("1" * 2**20)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (a_pickle, "a pickle, which is never loaded; convert it to stroke .ndjson"),
        (a_folder, "no .ndjson files of strokes (convert pickles"),
        (long_line, ":1: a line of 1 MiB is no drawing"),
        (lambda path: path, "no such file or folder; set dataset.path"),
        (lambda path: path.write_text(GOOD) and path, "to train on; at least 4 are needed"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, monkeypatch, make, words):
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / "x.ndjson")
    assert words in refused(experiment(path))


def test_categories_are_files_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("alarm clock", "cat", "dog"):
        (tmp_path / f"in/{name}.ndjson").write_text("\n".join([line(*ZIGZAG, word=name)] * 4))
    e = experiment(tmp_path / "in", "quickdraw", categories=["alarm clock", "dog"])
    assert prepare(e)["categories"] == ["alarm clock", "dog"]
    missing = experiment(tmp_path / "in", "quickdraw", categories=["bird"], name="other")
    with pytest.raises(UserError, match=r"bird\.ndjson: no such file"):
        prepare(missing)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"source": "sketches", "path": None}, "give `path`"),
        ({"source": "quickdraw", "path": None}, "give `path`"),
        ({"source": "vmnist", "categories": ["1"]}, "categories: quickdraw's alone"),
        ({"source": "quickdraw", "categories": ["../cat"]}, "dataset.categories.0"),
        ({"source": "sketches", "held_out": 0.6}, "dataset.held_out"),
        ({"source": "sketches", "step": 0}, "dataset.step"),
    ],
)
def test_a_bad_section_is_one_line(tmp_path, section, words):
    with pytest.raises(UserError) as caught:
        experiment(**{"path": tmp_path, **section})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_codec_and_data_must_fit(tmp_path, vary):
    with pytest.raises(ValueError, match=r"codec.kind identity: items of \(60, 3\) are no images"):
        IdentityConfig().check(experiment(tmp_path).dataset.items)
    with pytest.raises(UserError, match=r"codec.kind raster: draws sequences"):
        vary({"codec": {"kind": "raster"}})


# --- KanjiVG ----------------------------------------------------------------------------------------------


def kanji(*ways, position="left"):
    paths = "".join(f'<path d="{way}"/>' for way in ways)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:kvg="https://kanjivg.tagaini.net/">'
        f'<g><g kvg:position="{position}">{paths}</g></g><g><text>1</text></g></svg>'
    )


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Five characters in a zip, two of them on top of each other, a variant and a letter."""
    pytest.importorskip("svgpathtools", reason="the extra `sketches` is not installed")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "kanjivg.zip"
    with zipfile.ZipFile(path, "w") as file:
        for k, position in enumerate(["left", "left", "top", "top", "tare"]):
            text = kanji("M10,10c10,0,20,10,20,20", f"M5,{k}L50,50l3-4", position=position)
            file.writestr(f"kanji/04e0{k}.svg", text)
        for other in ("04e00-Kaisho", "00041"):
            file.writestr(f"kanji/{other}.svg", kanji("M1,1L2,2"))
    return path


def test_an_archive_of_kanjivg_is_read_packed_or_not(archive, tmp_path):
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "out")
    packed, unpacked = (
        [(name.rpartition("/")[2], *read()) for name, read in strokes.kanji(path)]
        for path in (archive, tmp_path / "out")
    )
    assert [name for name, *_ in packed] == [f"04e0{k}.svg" for k in range(5)]
    assert [word for *_, word in packed] == 2 * ["left and right"] + 2 * ["top and bottom"] + ["enclosed"]
    for (_, a, _), (_, b, _) in zip(packed, unpacked, strict=True):
        assert len(a) == 2 and all(map(np.array_equal, a, b))


def test_a_curve_is_followed():
    pytest.importorskip("svgpathtools", reason="the extra `sketches` is not installed")
    (found,) = strokes.traced("M10,20c10,0,20,10,20,20")
    t = np.linspace(0, 1, strokes.PIECES + 1)[:, None]
    p = np.array([[10, 20], [20, 20], [30, 30], [30, 40]])
    bezier = (1 - t) ** 3 * p[0] + 3 * t * (1 - t) ** 2 * p[1] + 3 * t**2 * (1 - t) * p[2] + t**3 * p[3]
    np.testing.assert_allclose(found, bezier)
    assert [len(s) for s in strokes.traced("M0,0L1,1M5,5L6,6")] == [1 + strokes.PIECES] * 2


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("M1,2x3,4", "unknown command 'x'"),
        ("M1,2c3", "can't be read"),
        ("M1,2L1e999,3", "aren't finite"),
        ("hello", "unknown command"),
        ("", "can't be read"),
    ],
)
def test_a_bad_path_is_told_by_its_file(archive, way, words):
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("kanji/09999.svg", kanji(way))
    message = refused(experiment(archive, "kanjivg"))
    assert f"{archive}/kanji/09999.svg: " in message and words in message
    assert prepare(experiment(archive, "kanjivg", broken="skip", held_out=0))["skipped"] == 1


def test_damaged_archives_and_files_are_one_line(archive, tmp_path):
    whole = archive.read_bytes()
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("kanji/09999.svg", "<svg><g>")
    assert "kanji/09999.svg: not SVG" in refused(experiment(archive, "kanjivg"))
    archive.write_bytes(whole[:200] + bytes(60) + whole[260:])
    assert "not SVG" in refused(experiment(archive, "kanjivg"))
    archive.write_bytes(whole[:100])
    assert "not a whole zip file" in refused(experiment(archive, "kanjivg"))
    (tmp_path / "empty").mkdir()
    assert "no KanjiVG files" in refused(experiment(tmp_path / "empty", "kanjivg"))


# --- init, the classifier, real drawings ------------------------------------------------------------------


def test_init_takes_drawings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "config/experiments"
    folder.mkdir(parents=True)
    (folder / "sketches.yaml").write_text((ROOT / "config/experiments/sketches.yaml").read_text())
    path = tmp_path / "mine.ndjson"
    path.write_text("\n".join(map(wave, range(40))))
    lines = starter.init("mine", str(path), None, force=False)
    assert lines[0] == "40 drawings, 40 looked at" and lines[1].startswith("2 categories; ")
    e = load.load("mine")
    assert (e.dataset.source, e.dataset.path, e.codec.size) == ("sketches", str(path), 256)
    assert (e.network.kind, e.training.batch, e.epoch_steps(34)) == ("chirodiff", 2, 17)
    assert e.evaluation.protocols == ("clean", "classifier")
    assert prepare(e)["count"] == 34
    folder.joinpath("mine.yaml").unlink()
    path.write_text("\n".join(["{}"] * 5))
    with pytest.raises(UserError, match=r"no drawing can be used; .*mine\.ndjson:5: drawing: Field required"):
        starter.init("mine", str(path), None, force=False)
    assert [p.name for p in folder.iterdir()] == ["sketches.yaml"]


def test_a_look_at_many_drawings_reads_some_lines(tmp_path, monkeypatch):
    waves = list(map(wave, range(40)))
    (tmp_path / "a.ndjson").write_text("\n".join(waves * 100))
    (tmp_path / "b.ndjson").write_text("\n".join(line(np.eye(2), word="late") for _ in waves))
    dataset = experiment(tmp_path).dataset
    assert [len(found) for found in strokes.look(dataset, 50)[1:]] == [51]
    monkeypatch.setattr(strokes, "WHOLE", 1000)
    monkeypatch.setattr(strokes, "LINE", 10_000)
    before = bytes_read()
    count, found = strokes.look(dataset, 50)
    assert bytes_read() - before < (tmp_path / "a.ndjson").stat().st_size / 2
    assert count == pytest.approx(4040, rel=0.05) and count % 100 == 0
    assert 40 <= len(found) <= 55 and {read().word for _, read in found} == {"even", "odd", "late"}
    (tmp_path / "b.ndjson").write_text("\n" * 20_000)
    (tmp_path / "a.ndjson").write_text("\n")
    assert strokes.look(dataset, 50) == (0, [])
    (tmp_path / "a.ndjson").write_text("x" * 20_000)
    with pytest.raises(UserError, match=r"a\.ndjson: a line of .* is no drawing"):
        strokes.look(dataset, 50)


def test_the_classifier_sees_large_pictures_at_64_pixels():
    network, x = Classifier(1, 3), torch.rand(2, 1, 64, 64)
    large = x.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    torch.testing.assert_close(network(large), network(x))


def test_real_characters_have_the_strokes_that_dictionaries_count():
    pytest.importorskip("svgpathtools", reason="the extra `sketches` is not installed")
    try:
        found = {Path(name).stem: read for name, read in strokes.kanji(None)}
    except UserError:
        pytest.skip("the extra `sketches` is not installed")
    assert 6_000 < len(found) < 7_000 and all(int(stem, 16) > 0x3400 for stem in found)
    known = {"一": 1, "三": 3, "木": 4, "国": 8, "漢": 13, "鬱": 29}
    kinds = {"木": "one piece", "国": "enclosed", "漢": "left and right", "草": "top and bottom"}
    for character, count in known.items():
        assert len(found[f"{ord(character):05x}"]().strokes) == count
    for character, kind in kinds.items():
        assert found[f"{ord(character):05x}"]().word == kind


@pytest.fixture(scope="module")
def quickdraw():
    if not (path := os.environ.get("EBDIFF_QUICKDRAW")):
        pytest.skip("EBDIFF_QUICKDRAW does not name a folder with Quick, Draw!'s .ndjson")
    return path


def test_real_drawings_are_prepared(quickdraw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest = prepare(experiment(quickdraw, "quickdraw", max_points=300, codec={"size": 64}))
    assert manifest["skipped"] == 0 and manifest["classes"] == 10
    assert manifest["count"] + manifest["held_out"] + manifest["too_long"] == 557
    ink = 255 - open_pixels("drawn").astype(float)
    assert ((ink.max(axis=(1, 2, 3)) > 200) & (ink.mean(axis=(1, 2, 3)) < 120)).all()


def test_real_strokes_survive_the_round_trip(quickdraw):
    """The picture of a resampled drawing is that of its strokes as they are."""
    for path in sorted(Path(quickdraw).iterdir())[:3]:
        for _, read in list(strokes.lines(path))[:5]:
            raw = [s for s in read().strokes if len(s) > 1]
            back = strokes.strokes_of(strokes.movements(raw, 0.01), 0.8)
            assert len(back) == len(raw)
            a, b = (picture(s, 64, 6 / 256).astype(float) for s in (raw, back))
            assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.94


@pytest.mark.long
def test_real_drawings_go_from_strokes_to_report(quickdraw, tmp_path):
    """Every stage: GRUs pruned by unit, samples as pictures and as SVG, the codec told with the metrics."""
    raw = changed(TOY, {"dataset": {"name": "q", "source": "quickdraw", "path": quickdraw, "step": 0.2}})
    raw |= {
        "network": {"kind": "chirodiff", "hidden": 16, "layers": 2},
        "codec": {"kind": "raster", "size": 64},
    }
    raw["dataset"] |= {"max_points": 64}
    raw["runs"] = {name: raw["runs"][name] for name in ("unpruned", "eb-50")}
    folder = tmp_path / "config/experiments"
    folder.mkdir(parents=True)
    (folder / "toy.yaml").write_text(yaml.safe_dump(raw))
    done = doors(tmp_path, "all")
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / layout.path(layout.RUN, experiment="toy", seed=0, run="eb-50")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["codec"] == {"kind": "raster", "size": 64, "line_width": 6.0, "pen": 0.8}
    assert np.load(run / "samples.npy").shape == (23, 64, 64, 1)
    drawn = ET.parse(run / "samples.svg").getroot()
    assert len(drawn.findall(f"{SVG}g")) == 16
    page = (tmp_path / layout.path(layout.REPORT, experiment="toy")).read_text()
    assert page.count("data:image/svg+xml;base64,") == 2
