import hashlib
import io
import os
import struct
import subprocess
import sys
import tarfile
import time
import types
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY, changed
from PIL import Image

from ebdiff.data import archives, cifar10, images, sources
from ebdiff.experiment import layout, load, places
from ebdiff.experiment.members import ImagesConfig
from ebdiff.system import files
from ebdiff.system.ahead import ahead
from ebdiff.system.errors import UserError


def picture(seed, width=16, height=16, channels=3):
    """Random pixels, uint8 (height, width, channels)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


PICTURES = [picture(i) for i in range(9)]
NAMES = [f"{'ab'[i % 2]}/{i}.png" for i in range(9)]  # sorted: a/0 a/2 a/4 a/6 a/8 b/1 b/3 b/5 b/7
ORDER = [0, 2, 4, 6, 8, 1, 3, 5, 7]


@pytest.fixture
def prepare(tmp_path):
    """Prepare a source into tmp_path/out: (pixels, labels, manifest)."""

    def run(threads=1, source="images", size=16, channels=3, **dataset):
        dataset = {"name": "data", "source": source, **{k: str(v) for k, v in dataset.items()}}
        raw = changed(TINY, {"dataset": {**dataset, "image_size": size, "channels": channels}})
        out = tmp_path / "out"
        paths = [out / layout.path(t, dataset="data").name for t in layout.DATA_FILES]
        manifest = sources.write(load.parse(raw, "x.yaml"), *paths, threads=threads)
        assert files.read_json(paths[-1]) == manifest
        assert sorted(out.iterdir()) == sorted(paths)
        assert manifest["held_out"] == len(files.load_memmap(paths[2]))
        return files.load_memmap(paths[0]), np.load(paths[1]), manifest

    return run


@pytest.fixture
def refused(prepare, tmp_path):
    """The one line with which a source is refused; nothing is left under a final name."""

    def run(**options):
        with pytest.raises(UserError) as caught:
            prepare(**options)
        assert "\n" not in str(caught.value)
        out = tmp_path / "out"
        assert not out.exists() or not list(out.iterdir())
        return str(caught.value)

    return run


def fill(folder, pictures=PICTURES, names=NAMES):
    for name, pixels in zip(names, pictures, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(pixels))
    return folder


def zip_of(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def parquet_of(path, pictures, labels=None, column="img", kind="WEBP"):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": encoded(p, kind), "path": None} for p in pictures]
    columns = {column: pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    if labels is not None:
        columns["label"] = labels
    pq.write_table(pa.table(columns), path, row_group_size=4)
    return path


# --- what is read ------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_its_names(prepare, tmp_path):
    folder = fill(tmp_path / "in")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"no image")
    (folder / "a/.thumbs").mkdir()
    (folder / "a/.thumbs/x.png").write_bytes(b"no image")
    pixels, labels, manifest = prepare(path=folder)
    np.testing.assert_array_equal(pixels, [PICTURES[i] for i in ORDER])
    assert (len(labels), manifest["classes"], manifest["skipped"]) == (0, 0, 0)
    assert (manifest["count"], manifest["shape"], manifest["licence"]) == (9, [16, 16, 3], "not stated")


def test_a_zip_of_a_folder_is_the_folder(prepare, tmp_path):
    folder = fill(tmp_path / "in")
    members = {name: (folder / name).read_bytes() for name in reversed(NAMES)}
    whole = zip_of(tmp_path / "in.zip", {**members, "__MACOSX/a/._0.png": b"x", "readme.md": b"x"})
    np.testing.assert_array_equal(prepare(path=whole)[0], [PICTURES[i] for i in ORDER])


def test_the_folder_of_an_image_may_be_its_class(prepare, tmp_path):
    """In the order of the folders' names, packed or not; a column of labels goes before."""
    words = ["zebra", "ant", "n02/cat"]
    folder = fill(tmp_path / "in", names=[f"{words[i % 3]}/{i}.png" for i in range(9)])
    _, labels, manifest = prepare(path=folder, labels="folders")
    assert (labels.tolist(), manifest["classes"]) == ([0, 0, 0, 1, 1, 1, 2, 2, 2], 3)
    members = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.png")}
    assert prepare(path=zip_of(tmp_path / "in.zip", members), labels="folders")[1].tolist() == labels.tolist()
    assert not len(prepare(path=folder)[1])
    table = parquet_of(tmp_path / "in.parquet", PICTURES, [i % 4 for i in range(9)])
    assert prepare(path=table, labels="folders")[1].tolist() == [i % 4 for i in range(9)]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_file_does_not_depend_on_threads_or_timing(prepare, tmp_path, threads, monkeypatch):
    folder = fill(tmp_path / "in")
    first = prepare(path=folder)[2]
    slow = sources.pixels

    def uneven(item, *args, **options):
        time.sleep(0.02 if item.name.endswith("0.png") else 0)
        return slow(item, *args, **options)

    monkeypatch.setattr(sources, "pixels", uneven)
    assert prepare(path=folder, threads=threads)[2] == first


def test_parquet_in_the_hubs_layout_with_labels(prepare, tmp_path):
    path = parquet_of(tmp_path / "x.parquet", PICTURES, [i % 3 for i in range(9)])
    pixels, labels, manifest = prepare(path=path)
    np.testing.assert_array_equal(pixels, PICTURES)
    np.testing.assert_array_equal(labels, np.arange(9) % 3)
    assert labels.dtype == np.int64
    assert manifest["classes"] == 3


def test_a_folder_of_parquet_files_gives_its_training_split(prepare, tmp_path):
    parquet_of(tmp_path / "in/plain/train-00001-of-00002.parquet", PICTURES[4:8])
    parquet_of(tmp_path / "in/plain/train-00000-of-00002.parquet", PICTURES[:4])
    parquet_of(tmp_path / "in/plain/test-00000-of-00001.parquet", PICTURES[8:])
    np.testing.assert_array_equal(prepare(path=tmp_path / "in")[0], PICTURES[:8])
    for path in (tmp_path / "in/plain").glob("train*"):
        path.rename(path.with_name(path.name.replace("train", "part")))
    assert len(prepare(path=tmp_path / "in")[0]) == 9


def test_parquet_of_plain_binary_and_of_labels_that_are_no_classes(prepare, tmp_path):
    table = pa.table({"file": ["x"] * 9, "picture": [encoded(p) for p in PICTURES], "label": ["cat"] * 9})
    pq.write_table(table, tmp_path / "x.parquet")
    pixels, labels, _ = prepare(path=tmp_path / "x.parquet")
    np.testing.assert_array_equal(pixels, PICTURES)
    assert len(labels) == 0


@pytest.mark.parametrize(("label", "kind"), [(-1, pa.int64()), (2**31, pa.int64()), (2**64 - 1, pa.uint64())])
def test_a_label_that_is_no_class_is_refused_by_name_before_anything_is_there(refused, tmp_path, label, kind):
    table = pa.table({"image": list(map(encoded, PICTURES)), "label": pa.array([*range(8), label], kind)})
    pq.write_table(table, tmp_path / "x.parquet")
    assert f"x.parquet:row 8: label {label}; classes are" in refused(path=tmp_path / "x.parquet")


def test_labels_are_those_of_all_images_or_of_none_which_is_said(prepare, tmp_path, capsys):
    parquet_of(tmp_path / "in/0.parquet", PICTURES[:4], [0, 1, None, 2])
    parquet_of(tmp_path / "in/1.parquet", PICTURES[4:])
    _, labels, manifest = prepare(path=tmp_path / "in")
    assert (len(labels), manifest["classes"]) == (0, 0)
    assert "labels left out: 6 of 9 images have none" in capsys.readouterr().err


def test_hidden_labels_of_a_test_split_play_no_part(prepare, tmp_path):
    parquet_of(tmp_path / "in/train.parquet", PICTURES[:5], [0, 1, 0, 1, 0])
    parquet_of(tmp_path / "in/test.parquet", PICTURES[5:], [-1] * 4)
    manifest = prepare(path=tmp_path / "in", held_out="test")[2]
    assert (manifest["classes"], manifest["held_out"]) == (2, 4)


def test_linked_folders_are_followed_and_read_once(prepare, tmp_path):
    fill(tmp_path / "elsewhere", PICTURES[:4], [f"{i}.png" for i in range(4)])
    fill(tmp_path / "in", PICTURES[4:8], [f"z/{i}.png" for i in range(4)])
    for name, target in {"b": "../elsewhere", "a": "../elsewhere", "loop": "..", "z/up": "../../in"}.items():
        (tmp_path / "in" / name).symlink_to(target)
    (tmp_path / "in/gone").symlink_to("nowhere")
    np.testing.assert_array_equal(prepare(path=tmp_path / "in")[0], PICTURES[:8])
    parquet_of(tmp_path / "tables/x.parquet", PICTURES)
    (tmp_path / "links").mkdir()
    (tmp_path / "links/to").symlink_to("../tables")
    assert prepare(path=tmp_path / "links")[2]["count"] == 9


def test_paths_fill_in_variables_and_home(prepare, tmp_path, monkeypatch):
    fill(tmp_path / "in")
    monkeypatch.setenv("EBDIFF_TEST_HERE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("${EBDIFF_TEST_HERE}/in", "~/in", "${EBDIFF_TEST_NOWHERE:-~/in}"):
        assert prepare(path=path)[2]["count"] == 9
    assert places.given("${EBDIFF_TEST_NOWHERE:-}", "dataset.path") is None


# --- the rule of conversion --------------------------------------------------------------------------------


def item(data, name="x.png"):
    return images.Item(name, lambda: data)


def test_crop_celeba_is_a_slice():
    pixels = picture(0, 178, 218)
    found = images.pixels(item(encoded(pixels)), 128, 3, "celeba", "bilinear")[0]
    np.testing.assert_array_equal(found, pixels[121 - 64 : 121 + 64, 89 - 64 : 89 + 64])


@pytest.mark.parametrize(("width", "height"), [(20, 16), (16, 20), (21, 16), (16, 16)])
def test_crop_centre_is_the_central_square(width, height):
    pixels = picture(0, width, height)
    found = images.pixels(item(encoded(pixels)), 16, 3, "centre", "bilinear")[0]
    top, left = (height - 16) // 2, (width - 16) // 2
    np.testing.assert_array_equal(found, pixels[top : top + 16, left : left + 16])


def bilinear(x):
    return np.clip(1 - abs(x), 0, None)


def bicubic(x):
    """Keys (1981) with a = -1/2."""
    x = abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, 2 - 4 * x + 2.5 * x**2 - x**3 / 2, 0))


def resized(pixels, size, kernel):
    """Two passes of weighted means, by a kernel as wide as an output pixel where that is the larger one."""

    def weights(count):
        scale = count / size
        middles, places = (np.arange(size) + 0.5) * scale, np.arange(count) + 0.5
        found = kernel((places - middles[:, None]) / max(scale, 1))
        return found / found.sum(1, keepdims=True)

    height, width, _ = pixels.shape
    return np.einsum("yh,xw,hwc->yxc", weights(height), weights(width), pixels)


@pytest.mark.parametrize("kernel", [bilinear, bicubic])
@pytest.mark.parametrize("side", [128, 37, 11])
def test_filters_are_those_of_their_formulas(kernel, side):
    pixels = picture(side, side, side) // 2 + 64  # Pillow clips between its two passes
    found, scaled = images.pixels(item(encoded(pixels)), 16, 3, "none", kernel.__name__)
    assert scaled
    assert abs(found - resized(pixels, 16, kernel)).max() < 1.6  # and rounds there


def test_celeba_is_resized_as_the_public_pipeline_does_it(prepare, tmp_path):
    """A crop around the face, then torchvision's Resize of a Pillow image: `bilinear`, the default."""
    faces = [picture(i, 178, 218) for i in range(4)]
    fill(tmp_path / "in", faces, [f"{i}.png" for i in range(4)])
    found, _, manifest = prepare(path=tmp_path / "in", size=64, crop="celeba")
    for face, small in zip(faces, found, strict=True):
        square = Image.fromarray(face[57:185, 25:153])
        np.testing.assert_array_equal(small, np.asarray(square.resize((64, 64), Image.BILINEAR)))
    assert manifest["resize"] == "bilinear"


@pytest.mark.parametrize("preset", ["celeba", "lsun_church", "lsun_bedroom"])
def test_presets_resize_as_the_public_pipeline_does(preset):
    assert load.load(preset).dataset.resize == "bilinear"


def test_the_filter_is_named_where_an_image_was_resized(prepare, tmp_path):
    fill(tmp_path / "in")
    assert "resize" not in prepare(path=tmp_path / "in", resize="bicubic")[2]
    (tmp_path / "in/c.png").write_bytes(encoded(picture(0, 20, 20)))
    assert prepare(path=tmp_path / "in", resize="bicubic")[2]["resize"] == "bicubic"


def test_a_filter_prepares_other_data_only_where_there_is_something_to_resize():
    def content(source, size, resize):
        keys = {"name": "x", "source": source, "image_size": size, "resize": resize, "path": "x"}
        return ImagesConfig(**keys).content

    for source, size in [("bundled-digits", 8), ("cifar10", 32)]:
        assert content(source, size, "bilinear") == content(source, size, "bicubic")
    for source, size in [("bundled-digits", 16), ("cifar10", 64), ("images", 32)]:
        assert content(source, size, "bilinear") != content(source, size, "bicubic")


def test_modes_are_converted_by_rule():
    grey = picture(0, channels=1)
    colour = picture(1)

    def found(image, channels=3):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return images.pixels(item(buffer.getvalue()), 16, channels, "none", "bilinear")[0].astype(int)

    assert (found(Image.fromarray(grey[..., 0])) == grey).all()
    luma = colour @ np.array([0.299, 0.587, 0.114])
    assert abs(found(Image.fromarray(colour), 1)[..., 0] - luma).max() < 1
    sixteen = Image.fromarray(grey[..., 0].astype(np.uint16) * 257)
    assert (found(sixteen, 1) == grey).all()
    assert (found(sixteen) == grey).all()
    paletted = Image.fromarray(colour).quantize(16)
    assert (found(paletted) == np.asarray(paletted.convert("RGB"))).all()
    alpha = Image.fromarray(np.dstack([colour, np.full((16, 16), 255, np.uint8)]))
    assert (found(alpha) == colour).all()
    alpha.putalpha(0)
    assert (found(alpha) == 255).all()
    paletted.info["transparency"] = 0
    clear = np.asarray(paletted) == 0
    assert (found(paletted)[clear] == 255).all()
    assert (found(Image.fromarray(grey[..., 0] > 127), 1) == 255 * (grey > 127)).all()


def test_orientation_is_ignored():
    pixels = picture(0)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    found, _ = images.pixels(item(buffer.getvalue()), 16, 3, "none", "bilinear")
    np.testing.assert_array_equal(found, pixels)


def test_formats_that_run_other_programs_are_not_opened():
    with pytest.raises(images.Broken, match="not one of"):
        images.opened(item(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"))


# --- bad input ---------------------------------------------------------------------------------------------


def bomb(width=12_000, height=12_000):
    """A PNG whose header promises more pixels than an image may have."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_images(refused, tmp_path, count):
    (tmp_path / "in").mkdir()
    fill(tmp_path / "in", PICTURES[:count], NAMES[:count])
    message = refused(path=tmp_path / "in")
    assert f"{tmp_path / 'in'}: {count} images; at least 4" in message


def test_a_missing_path_and_an_unset_variable(refused, tmp_path):
    assert "nowhere: no such file or folder; set dataset.path" in refused(path=tmp_path / "nowhere")
    assert "dataset.path: the environment variable EBDIFF_UNSET is not" in refused(path="${EBDIFF_UNSET}/x")
    assert "give `path`" in refused()
    assert "set dataset.path" in refused(path="${NOT_SET_ANYWHERE:-}")
    (tmp_path / "x.rar").write_bytes(b"Rar!")
    assert "x.rar: not a folder, zip or parquet file" in refused(path=tmp_path / "x.rar")


def test_images_that_are_not_square_are_refused_with_the_remedy(refused, prepare, tmp_path):
    fill(
        tmp_path / "in",
        [*PICTURES[:4], picture(0, 20, 16), picture(1, 30, 10)],
        [f"{i}.png" for i in range(6)],
    )
    message = refused(path=tmp_path / "in", threads=2)
    assert "4.png: 20x16 pixels, not square; set dataset.crop to centre" in message
    assert "0.png: 16x16 pixels, but crop: celeba" in refused(path=tmp_path / "in", crop="celeba")
    assert prepare(path=tmp_path / "in", crop="centre")[0].shape == (6, 16, 16, 3)


def test_square_images_of_other_sizes_are_resized(prepare, tmp_path):
    fill(tmp_path / "in", [picture(i, 8 + i, 8 + i) for i in range(9)])
    assert prepare(path=tmp_path / "in")[0].shape == (9, 16, 16, 3)


BROKEN = {
    "truncated": encoded(picture(0, 64, 64))[:5000],
    "text": b"not an image",
    "empty": b"",
    "bomb": bomb(),
    "huge": bomb(60_000, 60_000),
    "rubbish": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "jpeg": encoded(picture(0, 64, 64), "JPEG")[:2000],
}


@pytest.mark.parametrize("where", ["folder", "zip", "parquet"])
def test_broken_images_are_named_and_refused_or_skipped(refused, prepare, tmp_path, where, capsys, recwarn):
    good = {f"a{i}.png": encoded(p) for i, p in enumerate(PICTURES)}
    members = {**good, **{f"b-{name}.png": data for name, data in BROKEN.items()}}
    names = list(members)
    if where == "folder":
        path = tmp_path / "in"
        path.mkdir()
        for name, data in members.items():
            (path / name).write_bytes(data)
    elif where == "zip":
        path = zip_of(tmp_path / "in.zip", members)
    else:
        path = tmp_path / "in.parquet"
        pq.write_table(pa.table({"image": [*members.values(), None]}), path)
        names = [f"row {i}" for i in range(len(members))]
    count = len(BROKEN) + (where == "parquet")
    message = refused(path=path, threads=2)
    assert f"broken images: {count} (" in message
    assert f"and {count - 5} more); replace them, or set dataset.broken to skip" in message
    bad = sorted(n for n in names if n not in good) if where != "parquet" else names[9:]
    assert all(name in message for name in bad[:5])
    pixels, _, manifest = prepare(path=path, broken="skip")
    np.testing.assert_array_equal(pixels, PICTURES)
    assert (manifest["count"], manifest["skipped"]) == (9, count)
    told = capsys.readouterr().err
    assert all(name in told for name in bad)
    assert "decompression bomb" in told
    assert not recwarn.list


def test_labels_stay_with_their_images_when_some_are_skipped(prepare, tmp_path):
    cells = [{"bytes": encoded(p), "path": None} for p in PICTURES]
    cells[2]["bytes"] = b"broken"
    pq.write_table(pa.table({"image": cells, "label": list(range(9))}), tmp_path / "x.parquet")
    _, labels, _ = prepare(path=tmp_path / "x.parquet", broken="skip")
    assert labels.tolist() == [0, 1, 3, 4, 5, 6, 7, 8]


def test_nearly_all_images_broken(refused, tmp_path):
    fill(tmp_path / "in")
    for name in NAMES[3:]:
        (tmp_path / "in" / name).write_bytes(b"x")
    assert "3 images can be read; at least 4 are needed" in refused(path=tmp_path / "in", broken="skip")


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/x.png", "..\\x.png", "C:\\x.png"])
def test_a_zip_that_points_outside_itself_is_refused(refused, tmp_path, name):
    good = {f"{i}.png": encoded(p) for i, p in enumerate(PICTURES)}
    message = refused(path=zip_of(tmp_path / "in.zip", {**good, name: encoded(PICTURES[0])}))
    assert "in.zip: member" in message
    assert "points outside the archive" in message
    assert not list(tmp_path.rglob("x.png"))


def test_a_zip_bomb_is_refused_without_unpacking(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "FILE_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(2**21))
    message = refused(path=tmp_path / "in.zip")
    assert "'0.png' unpacks to 2 MiB, which looks like a decompression bomb" in message


@pytest.mark.parametrize("name", ["in.zip", "in.parquet"])
def test_truncated_archives(refused, tmp_path, name):
    path = tmp_path / name
    if name == "in.zip":
        zip_of(path, {f"{i}.png": encoded(p) for i, p in enumerate(PICTURES)})
    else:
        parquet_of(path, PICTURES)
    path.write_bytes(path.read_bytes()[:-200])
    assert f"{path}: not a whole" in refused(path=path)


def test_damage_inside_a_parquet_file(refused, tmp_path):
    path = parquet_of(tmp_path / "in.parquet", PICTURES)
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)  # the first page's header
    path.write_bytes(data)
    assert f"{path}: damaged (" in refused(path=path)


def test_a_parquet_file_without_images_names_its_columns(refused, tmp_path):
    pq.write_table(pa.table({"caption": ["x"], "score": [1.0]}), tmp_path / "in.parquet")
    message = refused(path=tmp_path / "in.parquet")
    assert "no image column" in message
    assert "caption (string), score (double)" in message


def test_channels_that_no_image_has(refused, tmp_path):
    assert "dataset.channels is 2" in refused(path=fill(tmp_path / "in"), channels=2)


def test_a_full_disk_is_seen_before_anything_is_decoded(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    assert "make room" in refused(path=fill(tmp_path / "in"))


def test_an_interrupted_preparation_starts_again_cleanly(prepare, tmp_path, monkeypatch):
    folder = fill(tmp_path / "in")
    first = prepare(path=folder)[2]

    def interrupted(*_):
        raise KeyboardInterrupt

    (folder / "z.png").write_bytes(encoded(picture(99)))
    monkeypatch.setattr(sources, "write_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(path=folder)
    monkeypatch.undo()
    assert files.read_json(tmp_path / "out/manifest.json") == first
    assert prepare(path=folder)[2]["count"] == 10


def test_only_a_few_images_are_in_memory_at_a_time():
    taken = []

    def items():
        for i in range(1000):
            taken.append(i)
            yield i

    done = ahead(lambda i: -i, items(), 2, 16)
    assert [next(done) for _ in range(10)] == [-i for i in range(10)]
    assert len(taken) < 50
    done.close()
    assert len(taken) < 50


# --- CIFAR-10 ----------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_cifar(tmp_path, monkeypatch):
    """A small archive in CIFAR-10's binary layout, with its checksum taken for the published one."""
    pixels = np.stack([picture(i, 32, 32) for i in range(24)])
    labels = np.arange(24, dtype=np.uint8) % 10
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for k, name in enumerate([*cifar10.BATCHES["train"], *cifar10.BATCHES["test"]]):
            part = slice(4 * k, 4 * k + 4)
            data = np.hstack(
                [labels[part, None], pixels[part].transpose(0, 3, 1, 2).reshape(4, -1)]
            ).tobytes()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar10, "COUNT", {"train": 20, "test": 4})
    monkeypatch.setattr(cifar10, "URL", path.as_uri())
    return path, pixels[:20], labels[:20]


def test_the_binary_archive(prepare, tiny_cifar):
    path, pixels, labels = tiny_cifar
    found, classes, manifest = prepare(source="cifar10", path=path, size=32, threads=2)
    np.testing.assert_array_equal(found, pixels)
    np.testing.assert_array_equal(classes, labels)
    assert (manifest["classes"], manifest["licence"]) == (10, "no licence stated by its author")


def test_parquet_and_archive_give_the_same_file(prepare, tiny_cifar, tmp_path):
    path, pixels, labels = tiny_cifar
    first = prepare(source="cifar10", path=path, size=32)[2]
    parquet_of(tmp_path / "in/train-0.parquet", pixels, labels.astype(int))
    parquet_of(tmp_path / "in/test-0.parquet", pixels[:5])
    assert prepare(source="cifar10", path=tmp_path / "in", size=32)[2] == first


@pytest.mark.parametrize("kind", ["archive", "parquet"])
def test_the_test_split_is_held_out(prepare, tiny_cifar, tmp_path, kind):
    path, pixels, labels = tiny_cifar
    unseen = np.stack([picture(i, 32, 32) for i in range(20, 24)])
    if kind == "parquet":
        path = tmp_path / "in"
        parquet_of(path / "train-0.parquet", pixels, labels.astype(int))
        parquet_of(path / "test-0.parquet", unseen)
    found, classes, manifest = prepare(source="cifar10", path=path, size=32, held_out="test")
    np.testing.assert_array_equal(found, pixels)
    np.testing.assert_array_equal(classes, labels)
    np.testing.assert_array_equal(np.load(tmp_path / "out/held_out.npy"), unseen)
    assert (manifest["count"], manifest["held_out"]) == (20, 4)


# --- held out of training -----------------------------------------------------------------------------------


def test_a_share_of_each_class_is_held_out(prepare, tmp_path):
    from sklearn.datasets import load_digits

    truth = load_digits()
    pixels, labels, manifest = prepare(source="bundled-digits", size=8, channels=1, held_out=0.2)
    unseen = np.load(tmp_path / "out/held_out.npy")
    assert (manifest["count"], manifest["held_out"]) == (len(pixels), len(unseen)) == (1437, 360)
    apart = np.bincount(truth.target) - np.bincount(labels)
    np.testing.assert_allclose(apart, 0.2 * np.bincount(truth.target), atol=1)
    every = [image.tobytes() for image in np.rint(truth.images * 255 / 16).astype(np.uint8)]
    assert sorted(image.tobytes() for image in [*pixels, *unseen]) == sorted(every)
    order = [every.index(image.tobytes()) for image in unseen]
    assert order == sorted(order)


def test_a_share_of_unlabelled_images_is_the_same_each_time(prepare, tmp_path):
    folder = fill(tmp_path / "in")
    first = prepare(path=folder, held_out=0.4)
    unseen = np.load(tmp_path / "out/held_out.npy")
    assert (len(first[0]), len(unseen)) == (5, 4)
    np.testing.assert_array_equal(prepare(path=folder, held_out=0.4, threads=3)[0], first[0])
    every = {image.tobytes() for image in PICTURES}
    assert {image.tobytes() for image in [*first[0], *unseen]} == every


def test_what_cannot_be_held_out_is_refused(refused, tmp_path):
    folder = fill(tmp_path / "in")
    assert "held_out to a share" in refused(path=folder, held_out="test")
    assert "1 images are too few; raise it" in refused(path=folder, held_out=0.1)
    whole = parquet_of(tmp_path / "in.parquet", PICTURES, [0] * 8 + [1])
    assert (
        f"dataset.held_out 0.4 of {whole}: can't be divided by class (The least populated class"
        in refused(path=whole, held_out=0.4)
    )
    with pytest.raises(UserError, match="bundled-digits have no test split"):
        load.parse(changed(TINY, {"dataset.held_out": "test"}), "x.yaml")


def test_the_count_that_is_planned_with_is_of_what_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dataset, count in (
        ({"dataset.held_out": 0.2}, 1437),
        (
            {"dataset.source": "images", "dataset.path": str(fill(tmp_path / "in")), "dataset.held_out": 0.4},
            5,
        ),
    ):
        raw = changed(TINY, {**dataset, "dataset.subset": ...})
        assert sources.count(load.parse(raw, "x.yaml").dataset) == count


def test_the_archive_is_fetched_once_and_checked(prepare, tiny_cifar, tmp_path, monkeypatch):
    path, pixels, _ = tiny_cifar
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    np.testing.assert_array_equal(prepare(source="cifar10", size=32)[0], pixels)
    path.unlink()  # the network is needed once
    np.testing.assert_array_equal(prepare(source="cifar10", size=32)[0], pixels)


def test_no_network_or_a_wrong_file_from_it(refused, tiny_cifar, tmp_path, monkeypatch):
    path, *_ = tiny_cifar
    monkeypatch.chdir(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    message = refused(source="cifar10", size=32)
    assert (
        f"wrong checksum: md5 {hashlib.md5(path.read_bytes()).hexdigest()}, expected {cifar10.MD5}" in message
    )
    path.unlink()
    assert "can't be fetched" in refused(source="cifar10", size=32)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_truncated_archive_and_that_of_pickles(refused, tiny_cifar, monkeypatch):
    path, *_ = tiny_cifar
    path.write_bytes(path.read_bytes()[:-100])
    found = hashlib.md5(path.read_bytes()).hexdigest()
    message = refused(source="cifar10", path=path, size=32)
    assert f"{path}: wrong checksum: md5 {found}, expected {cifar10.MD5}" in message
    monkeypatch.setattr(cifar10, "PYTHON_MD5", found)
    assert "pickles, which are never loaded" in refused(source="cifar10", path=path, size=32)


def test_an_archive_with_a_good_checksum_and_bad_content(refused, tiny_cifar, monkeypatch):
    path, *_ = tiny_cifar
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(cifar10.BATCHES["train"][0])
        member.size = 10
        archive.addfile(member, io.BytesIO(bytes(10)))
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(path.read_bytes()).hexdigest())
    assert f"{path}: not the archive of" in refused(source="cifar10", path=path, size=32)


def test_half_of_cifar_is_not_cifar(refused, tiny_cifar, tmp_path):
    parquet_of(tmp_path / "in.parquet", tiny_cifar[1][:10])
    message = refused(source="cifar10", path=tmp_path / "in.parquet", size=32)
    assert "in.parquet: 10 images, but CIFAR-10's train split has 20" in message


@pytest.mark.slow
def test_real_cifar10(prepare):
    where = os.environ.get("EBDIFF_CIFAR10")
    if not where:
        pytest.skip("EBDIFF_CIFAR10 does not name a folder with CIFAR-10")
    pixels, labels, manifest = prepare(source="cifar10", path=where, size=32, threads=2)
    assert pixels.shape == (50_000, 32, 32, 3)
    np.testing.assert_allclose(pixels.mean((0, 1, 2)) / 255, [0.4914, 0.4822, 0.4465], atol=1e-3)
    np.testing.assert_array_equal(np.bincount(labels), [5000] * 10)
    assert (manifest["classes"], manifest["skipped"]) == (10, 0)


# --- the hub -----------------------------------------------------------------------------------------------


def test_the_hub_without_its_library(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "dataset.hub a/b: needs the `datasets` library; pip install 'ebdiff[hub]'" in refused(hub="a/b")


def test_the_hub_without_a_network(refused, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("offline\nmode")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert "dataset.hub a/b, split train: can't be had (offline mode)" in refused(hub="a/b")


def test_a_dataset_of_the_hub(prepare, tmp_path, monkeypatch):
    """A local folder in the hub's layout goes the same way through the library."""
    pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    parquet_of(tmp_path / "owner/name/train-00000-of-00001.parquet", PICTURES, list(range(9)), "image")
    parquet_of(tmp_path / "owner/name/test-00000-of-00001.parquet", PICTURES[:2], [0, 1], "image")
    pixels, labels, manifest = prepare(hub="owner/name")
    np.testing.assert_array_equal(pixels, PICTURES)
    assert labels.tolist() == list(range(9))
    assert manifest["origin"] == "https://huggingface.co/datasets/owner/name"


# --- memory ------------------------------------------------------------------------------------------------

MEASURED = """
import re, sys
from pathlib import Path
from ebdiff.experiment import load
from ebdiff.data.sources import write
import yaml
out = Path(sys.argv[1])
experiment = load.parse(yaml.safe_load(Path(sys.argv[2]).read_text()), "x.yaml")
names = "images.npy", "labels.npy", "held_out.npy", "manifest.json"
write(experiment, *(out / name for name in names), threads=2)
# Not getrusage: its peak is inherited from the parent process.
print(int(re.search("VmHWM: *\\t* *(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_memory_is_bounded_for_20000_images_of_256x256(tmp_path, kind):
    import yaml

    (tmp_path / "in").mkdir()
    data = [encoded(picture(i, 256, 256), "JPEG") for i in range(20)]  # 40 KB each: 800 MB in all
    if kind == "folder":
        for i, content in enumerate(data):
            (tmp_path / f"{i}.jpg").write_bytes(content)
        for i in range(20_000):
            os.link(tmp_path / f"{i % 20}.jpg", tmp_path / f"in/{i:05}.jpg")
    else:
        part = pa.table({"image": data * 50})
        with pq.ParquetWriter(tmp_path / "in/train-0.parquet", part.schema, use_dictionary=False) as file:
            for _ in range(20):
                file.write_table(part)
    dataset = {"name": "data", "source": "images", "path": str(tmp_path / "in")}
    raw = changed(TINY, {"dataset": {**dataset, "image_size": 256}})
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-c", MEASURED, str(tmp_path), str(tmp_path / "x.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(f"peak {float(done.stdout):.0f} MiB")
    assert float(done.stdout) < 600, "MiB; 1.5 GB is promised"
    assert np.load(tmp_path / "images.npy", mmap_mode="r").shape == (20_000, 256, 256, 3)
