"""An adversary's inputs through the command line: each is one line, or fine, and leaves nothing behind.

Beside `test_malformed` (values of experiments, words of the command line), `test_hostile` (what reaches
beyond its folder) and `test_faults` (damage that records notice).
"""
# ruff: noqa: E501 (a case is a line)

import gzip
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import zipfile
from copy import copy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import ROOT, TINY, changed, write_experiment
from PIL import Image
from stages import path_of, run
from test_hostile import png, zip_of
from test_workflow import BIN, copied, snakemake

from ebdiff.experiment import layout, load
from ebdiff.experiment.jobs import Job
from ebdiff.experiment.records import sealed
from ebdiff.nets import store
from ebdiff.system.files import holding

pytestmark = pytest.mark.slow
GB, SECONDS = 2**30, 60
PROGRESS, LEFT_OUT = re.compile(r".*: .*\d.* \[.*\]"), re.compile("broken |(labels )?left out: ")
YAML, TUNING = "config/experiments/tiny.yaml", "config/tuning/tiny.yaml"
PNGS = {f"{i}.png": png(i) for i in range(5)}


def put(path, content=b""):
    """Write a file, its folders too."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tiny(changes=None, text=""):
    """The tiny experiment's file, with some keys changed and text added."""
    put(YAML, yaml.safe_dump(changed(TINY, changes or {})) + text)


def sparse(path, size=2**40):
    """A file that takes no room on the disk."""
    with put(path).open("wb") as file:
        file.truncate(size)


def fifo(path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).unlink(missing_ok=True)
    os.mkfifo(path)


def link(path, target):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).unlink(missing_ok=True)
    Path(path).symlink_to(target)


def instead(path, make):
    """Another thing in the place of a file."""
    Path(path).unlink()
    make(path)


# --- experiments: how to make the file, the command, what the line must name (None: it is fine) --------------


def bases(count):
    for i in range(count):
        put(f"config/experiments/b{i}.yaml", f"base: b{i + 1}\n")
    put(f"config/experiments/b{count}.yaml", "base: tiny\n")
    tiny()


EXPERIMENTS = {
    "a folder for a file": (lambda: instead(YAML, os.mkdir), "status tiny", "'tiny' is not known"),
    "a pipe for a file": (lambda: fifo(YAML), "status tiny", "'tiny' is not known"),
    "a link to itself": (lambda: link(YAML, "tiny.yaml"), "status tiny", "'tiny' is not known"),
    "a link to nothing": (lambda: link(YAML, "nothing"), "plan tiny", "'tiny' is not known"),
    "a file that can't be read": (lambda: link(YAML, "/proc/self/mem"), "status tiny", "tiny.yaml: Input"),
    "a file of a terabyte": (lambda: sparse(YAML), "status tiny", "tiny.yaml: larger than"),
    "ten megabytes of numbers": (lambda: put(YAML, f"seeds: [{'1, ' * 3_000_000}1]"), "status tiny", "larger"),
    "experiments is a file": (
        lambda: (shutil.rmtree("config/experiments"), put("config/experiments")),
        "status tiny", "no config/experiments here",
    ),
    "experiments is a link to itself": (
        lambda: (shutil.rmtree("config/experiments"), link("config/experiments", "experiments")),
        "status tiny", "no config/experiments here",
    ),
    "a hundred bases": (lambda: bases(100), "status b0", None),
    "a thousand bases": (lambda: bases(1000), "status b0", ".yaml: not valid YAML: maximum recursion"),
    "a base in a circle of three": (
        lambda: [put(f"config/experiments/{a}.yaml", f"base: {b}\n") for a, b in ("xy", "yz", "zx")],
        "compare tiny x", "x -> y -> z -> x",
    ),
    "a base that is broken": (
        lambda: put("config/experiments/x.yaml", "base: y\n") and put("config/experiments/y.yaml", "a: ["),
        "export x out.safetensors --run eb-50", "y.yaml, line 1: not valid YAML",
    ),
    "a base that is a list of itself": (lambda: put("config/experiments/x.yaml", "base: &a [*a]\n"), "status x", "x.yaml: "),
    "another experiment is broken": (lambda: put("config/experiments/x.yaml", "base: [\n"), "prepare-data digits", None),
    "a byte order mark and CRLF": (lambda: put(YAML, "\ufeff" + yaml.safe_dump(TINY).replace("\n", "\r\n")), "status tiny", None),
    "another version of YAML": (lambda: put(YAML, "%YAML 9.9\n---\n" + yaml.safe_dump(TINY)), "status tiny", "tiny.yaml"),
    "a Cyrillic letter in a key": (lambda: tiny(text="tr\u0430ining: {}"), "status tiny", "'training'"),
    "a title of Hebrew, Arabic and emoji": (lambda: tiny({"runs.eb-50.title": "\u05d0\u0628 \U0001f642e\u0301"}), "status tiny", None),
    "a kind that is a list": (lambda: tiny({"network.kind": ["unet"]}), "status tiny", "network: kind"),
    "a kind that is a mapping": (lambda: tiny({"network.kind": {"a": 1}}), "status tiny", "network: kind"),
    "no kind": (lambda: tiny({"network.kind": None}), "status tiny", "network: kind"),
    "a codec that is a list": (lambda: tiny({"codec": [1]}), "status tiny", "codec"),
    "a codec's kind that is a list": (lambda: tiny({"codec": {"kind": []}}), "train-first-stage tiny", "codec: kind"),
    "a source that is a list": (lambda: tiny({"dataset.source": ["images"]}), "prepare-data digits", "source"),
    "a sparse method that is a list": (
        lambda: tiny({"runs.x": {"title": "X", "method": "sparse", "init": "fresh", "iterations": 9,
                                 "sparse": {"method": []}}}),
        "status tiny", "runs.x",
    ),
    "a sparse method that isn't there": (
        lambda: tiny({"runs.x": {"title": "X", "method": "sparse", "init": "fresh", "iterations": 9,
                                 "sparse": {"method": "rigl2"}}}),
        "status tiny", "'rigl2' is not known; did you mean 'rigl'",
    ),
    "an interval's unit that is a list": (
        lambda: tiny({"searches.full.interval": {"unit": []}}), "status tiny", "searches.full.interval",
    ),
    "claims that are numbers": (lambda: tiny({"claims": [5]}), "status tiny", "claims.0"),
    "a claim about itself": (lambda: tiny({"claims": [{"run": "eb-50", "against": "eb-50"}]}), "status tiny", "claims"),
    "an iteration in base sixty": (lambda: tiny({}, "scale: 1:30.5"), "status tiny", None),
    "a scale that leaves nothing": (lambda: tiny({"scale": 1e-300}), "status tiny", None),
    "a dataset of another name in each experiment": (
        lambda: write_experiment(Path(), {"dataset.held_out": 0.3}, "x"),
        "prepare-data digits", "'digits' means different images in tiny.yaml and x.yaml",
    ),
    "a first stage of no codec": (lambda: None, "train-first-stage tiny", "tiny: codec.kind identity isn't"),
    "latents of no codec": (lambda: None, "encode-latents tiny", "tiny: codec.kind identity encodes nothing"),
    "the error of no codec": (lambda: None, "measure-first-stage tiny", "tiny: codec.kind identity"),
    "a codec whose weights are a pipe": (
        lambda: (tiny({"codec": {"kind": "vq", "path": "w", "channels": 3, "factor": 2},
                       "dataset.flip": False, "sampling.clamp": False}),
                 fifo("w/config.json"), fifo("w/model.safetensors")),
        "encode-latents tiny", "w/",
    ),
    "a codec whose weights are nothing": (
        lambda: (tiny({"codec": {"kind": "vq", "path": "w", "channels": 3, "factor": 2},
                       "dataset.flip": False, "sampling.clamp": False}),
                 put("w/config.json"), put("w/diffusion_pytorch_model.safetensors")),
        "encode-latents tiny", "w",
    ),
    "a tuning that is a pipe": (lambda: fifo(TUNING), "status tiny", "tuning/tiny.yaml"),
    "a tuning that is a folder": (lambda: Path(TUNING).mkdir(parents=True), "status tiny", "tuning/tiny.yaml"),
    "a tuning that is a link to itself": (lambda: link(TUNING, "tiny.yaml"), "status tiny", None),
    "a tuning of a terabyte": (lambda: sparse(TUNING), "status tiny", "tuning/tiny.yaml: larger"),
    "a tuning of binary": (lambda: put(TUNING, bytes(range(256))), "status tiny", "tiny.yaml: not UTF-8"),
    "a dense network from a pipe": (
        lambda: (tiny({"dense.from": "w.pth"}), fifo("w.pth")),
        "finetune-region tiny --expert dense-full --milestone 80", "w.pth",
    ),
    "a dense network from a folder": (
        lambda: (tiny({"dense.from": "w"}), Path("w").mkdir()),
        "finetune-region tiny --expert dense-full --milestone 80", "w",
    ),
    "a path whose variable isn't closed": (
        lambda: tiny({"dataset.source": "images", "dataset.path": "${HOME"}), "prepare-data digits", "${HOME",
    ),
    "a path of nobody's home": (
        lambda: tiny({"dataset.source": "images", "dataset.path": "~nobody9/x"}), "prepare-data digits",
        "~nobody9/x",
    ),
    "a path of 300 letters": (
        lambda: tiny({"dataset.source": "images", "dataset.path": "x" * 300}), "prepare-data digits", "xxx: File name too long",
    ),
    "an empty path": (
        lambda: tiny({"dataset.source": "images", "dataset.path": ""}), "prepare-data digits", "tiny.yaml: dataset: give `path`",
    ),
}  # fmt: skip

# --- images and drawings at in*, prepared -----------------------------------------------------------------------


def images(*pictures, **options):
    """A folder of good images and some others."""
    for name, content in PNGS.items():
        put(f"in/{name}", content)
    for i, picture in enumerate(pictures):
        picture.save(f"in/x{i}.{options.pop('suffix', 'png')}", **options)


def raw(name, content):
    images()
    put(f"in/{name}", content)


def saved(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, content):
    """A PNG with one more chunk after its header."""
    import zlib

    data = png()
    body = kind + content
    extra = len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return data[:33] + extra + data[33:]


def packed(size):
    import zlib

    return zlib.compress(bytes(size), 9)


ZIPPED = zip_of(io.BytesIO(), PNGS).getvalue()


def overlapping():
    with zipfile.ZipFile("in.zip", "w") as archive:
        archive.writestr("0.png", png())
        archive.filelist += [copy(archive.filelist[0]) for _ in range(9)]


def twice():
    with zipfile.ZipFile("in.zip", "w") as archive:
        for name in [*PNGS, *PNGS]:
            archive.writestr(name, PNGS[name])


def parquet(path="in.parquet", **columns):
    pq.write_table(pa.table(columns), path)


def cells(n=5):
    return [{"bytes": png(i), "path": None} for i in range(n)]


ROTATED = Image.Exif()
ROTATED[0x0112] = 6
RGB, GREY = Image.new("RGB", (8, 8), 7), Image.new("L", (8, 8), 7)
HUGE = Image.new("1", (20_000, 20_000))

DATA = {
    "an empty zip": (lambda: zip_of("in.zip", {}), "in.zip: 0 images"),
    "a zip of folders": (lambda: zip_of("in.zip", {"a.png/": b"", "b/c.png/": b""}), "in.zip: 0 images"),
    "a zip of zips": (lambda: zip_of("in.zip", {"a.zip": ZIPPED}), "0 images"),
    "half a zip": (lambda: put("in.zip", ZIPPED[:500]), "in.zip: not a whole zip"),
    "a zip with much after it": (lambda: put("in.zip", ZIPPED + bytes(2**20)), "in.zip: not a whole zip"),
    "text for a zip": (lambda: put("in.zip", "hello"), "in.zip: not a whole zip"),
    "a zip whose members overlap": (overlapping, None),
    "a zip of every name twice": (twice, None),
    "a zip of names in two lines": (lambda: zip_of("in.zip", {f"a\n{n}": c for n, c in PNGS.items()}), None),
    "a zip of names in two lines, broken": (
        lambda: zip_of("in.zip", {f"a\n\x1b[2J{i}.png": b"" for i in range(5)}), r"in.zip:a\n\x1b[2J0.png",
    ),
    "a zip of a name of 60,000 letters": (lambda: zip_of("in.zip", {"a" * 60_000 + ".png": b""}), "in.zip"),
    "an npz": (lambda: np.savez("in.npz", x=np.zeros((5, 8, 8, 3), np.uint8)), "in.npz: 0 images"),
    "an npy": (lambda: np.save("in.npy", np.zeros((5, 8, 8, 3), np.uint8)), "in.npy: not a folder, zip or"),
    "a gzip": (lambda: put("in.gz", gzip.compress(png())), "in.gz: not a folder, zip or parquet file"),
    "an empty folder": (lambda: Path("in").mkdir(), "in: 0 images"),
    "a link to itself as folder": (lambda: link("in", "in"), "in"),
    "a folder in itself": (lambda: (images(), link("in/a", "../in"), link("in/b", ".")), None),
    "folders called as images": (lambda: [put(f"in/{i}.png/x.txt") for i in range(5)], "in: 0 images"),
    "images of no bytes": (lambda: [put(f"in/{i}.png") for i in range(5)], "broken images: 5 (in/0.png: "),
    "a link to nothing among images": (lambda: (images(), link("in/x.png", "nothing")), "in/x.png: "),
    "a name that is no UTF-8": (lambda: (images(), put(os.fsdecode(b"in/\xff\xfe.png"))), r"in/\udcff\udcfe.png: "),
    "text for an image": (lambda: raw("x.png", "hello"), "in/x.png: not one of PNG"),
    "a script for an image": (lambda: raw("x.png", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "x.png"),
    "16 bits": (lambda: images(Image.fromarray(np.full((8, 8), 40_000, np.uint16))), None),
    "one bit": (lambda: images(Image.new("1", (8, 8))), None),
    "a palette with transparency": (lambda: images(Image.new("P", (8, 8)), transparency=0), None),
    "CMYK": (lambda: images(Image.new("CMYK", (8, 8)), suffix="jpg"), None),
    "turned by EXIF": (lambda: images(RGB, suffix="jpg", exif=ROTATED), None),
    "an animation": (lambda: raw("x.gif", saved(GREY, "GIF", save_all=True, append_images=[GREY] * 99)), None),
    "a WebP animation": (lambda: raw("x.webp", saved(RGB, "WEBP", save_all=True, append_images=[RGB] * 9)), None),
    "LAB": (lambda: raw("x.tif", saved(Image.new("LAB", (8, 8)), "TIFF")), None),
    "floats": (lambda: raw("x.tif", saved(Image.new("F", (8, 8)), "TIFF")), "in/x.tif: samples of 32 bits"),
    "a strip": (lambda: images(Image.new("L", (20_000, 1))), "in/x0.png: 20000x1 pixels, not square"),
    "a text chunk that unpacks to 256 MiB": (lambda: raw("x.png", chunk(b"zTXt", b"a\0\0" + packed(2**28))), "in/x.png: "),
    "a profile that unpacks to 256 MiB": (lambda: raw("x.png", chunk(b"iCCP", b"a\0\0" + packed(2**28))), "x.png"),
    "400 megapixels in 50 KB": (lambda: images(HUGE), "in/x0.png: "),
    "80 megapixels in 10 KB": (lambda: images(HUGE.crop((0, 0, 8900, 8900))), None),
    "80 transparent megapixels": (lambda: images(Image.new("P", (8900, 8900)), transparency=0), None),
    "a PPM of 10^8 by 1": (lambda: raw("x.ppm", "P6 99999999 1 255\n"), "in/x.ppm: "),
    "a PPM of -1 by 1": (lambda: raw("x.ppm", "P6 -1 1 255\n"), "in/x.ppm: "),
    "a JPEG cut short": (lambda: raw("x.jpg", saved(RGB.resize((99, 99)), "JPEG")[:400]), "in/x.jpg: "),
    "a parquet of no rows": (lambda: parquet(image=pa.array([], pa.binary())), "in.parquet: 0 images"),
    "a parquet of no columns": (lambda: parquet(), "in.parquet: no image column"),
    "a parquet of text": (lambda: parquet(image=["a"] * 5), "no image column"),
    "a parquet without images": (lambda: parquet(image=pa.array([None] * 5, pa.binary())), "in.parquet:row 0"),
    "text for a parquet": (lambda: put("in.parquet", "PAR1 hello PAR1"), "in.parquet: not a whole parquet"),
    "no bytes for a parquet": (lambda: put("in.parquet"), "in.parquet: not a whole parquet file"),
    "a broken parquet among good ones": (
        lambda: (Path("in").mkdir(), parquet("in/a.parquet", image=cells()), put("in/b.parquet", "PAR1")),
        "in/b.parquet: not a whole",
    ),
    "a label of -1": (lambda: parquet(image=cells(), label=[0, 1, 2, 3, -1]), "row 4: label -1; classes are"),
    "a label of 2^31": (lambda: parquet(image=cells(), label=[0, 1, 2, 3, 2**31]), "row 4: label 2147483648"),
    "labels that are text": (lambda: parquet(image=cells(), label=["a"] * 5), None),
    "some labels": (lambda: parquet(image=cells(), label=[0, 1, None, 3, 4]), None),
    "text for an lmdb": (lambda: put("in/data.mdb", "hello"), "in: not a whole lmdb"),
    "no bytes for an lmdb": (lambda: put("in/data.mdb"), "in"),
    "zeros for an lmdb": (lambda: put("in/data.mdb", bytes(2**20)), "in: not a whole lmdb"),
    "a device for an lmdb": (lambda: link("in/data.mdb", "/dev/zero"), "in: 0 images"),
    "a folder for an lmdb": (lambda: Path("in/data.mdb").mkdir(parents=True), "in: 0 images"),
}  # fmt: skip

# Keys of the dataset, beside good images at in/, and what the line must name.
KEYS = {
    "five held out of nothing": ({"held_out": 0.2}, "dataset.held_out 0.2 of in: 1 images are too few"),
    "a test split of a folder": ({"held_out": "test"}, "dataset.held_out"),
    "CIFAR-10 from a folder": ({"source": "cifar10"}, "in"),
    "a celebrity of 8 pixels": ({"crop": "celeba"}, "8x8 pixels, but crop: celeba"),
    "four channels": ({"channels": 4}, "channels"),
    "a subset of more": ({"subset": 6}, None),  # is told when it is trained on
    "encoded in a word": ({"store": "Encoded"}, "did you mean 'encoded'"),
    "another experiment's name": ({"name": "digits"}, "digits"),
}  # fmt: skip

LINE = '{"word": "a", "drawing": [[[0, 1, 2], [0, 1, 3]]]}\n'


def drawings(line, times=5):
    put("in.ndjson", 5 * LINE + times * line if isinstance(line, str) else (5 * LINE).encode() + line)


DRAWINGS = {
    "not a number": (lambda: drawings('{"drawing": [[[0, NaN], [0, 1]]]}\n'), "in.ndjson:6: "),
    "a number beyond floats": (lambda: drawings('{"drawing": [[[0, 1e999], [0, 1]]]}\n'), "in.ndjson:6: "),
    "a number of 5,000 digits": (lambda: drawings(f'{{"drawing": [[[0, {"9" * 5000}], [0, 1]]]}}\n'), ":6: "),
    "text for numbers": (lambda: drawings('{"drawing": [[["a"], ["b"]]]}\n'), "in.ndjson:6: drawing: "),
    "more x than y": (lambda: drawings('{"drawing": [[[0, 1, 2], [0, 1]]]}\n'), "stroke 0: needs as many x as"),
    "a list for a drawing": (lambda: drawings("[1, 2]\n"), "in.ndjson:6: "),
    "no drawing": (lambda: drawings('{"word": "a"}\n'), "in.ndjson:6: drawing: "),
    "no strokes": (lambda: drawings('{"drawing": []}\n'), "in.ndjson:6: "),
    "one point": (lambda: drawings('{"drawing": [[[1], [1]]]}\n'), "in.ndjson:6: "),
    "the same point again": (lambda: drawings('{"drawing": [[[1, 1, 1], [1, 1, 1]]]}\n'), "in.ndjson:6: "),
    "nested 100,000 deep": (lambda: drawings('{"drawing": ' + "[" * 100_000 + "\n"), "in.ndjson:6: "),
    "a line of 2 MiB": (lambda: drawings(f'{{"drawing": "{"x" * 2**21}"}}\n'), "in.ndjson:6: a line of 1 MiB"),
    "bytes": (lambda: drawings(bytes(range(256))), "in.ndjson:6: "),
    "a gzip": (lambda: put("in.ndjson", gzip.compress(5 * LINE.encode())), "in.ndjson:1: Invalid JSON"),
    "a byte order mark": (lambda: put("in.ndjson", "\ufeff" + 5 * LINE), "in.ndjson:1: "),
    "nothing": (lambda: put("in.ndjson", "\n\n"), " drawings"),
    "time as a third axis": (lambda: drawings('{"drawing": [[[0, 9], [0, 9], [0, 5]]]}\n'), None),
}  # fmt: skip

# --- ensembles -------------------------------------------------------------------------------------------------


def ensemble(edit=None, tensors=None):
    """The exported ensemble with something changed of what it tells, or of its tensors."""
    found, told = store.read(Path("whole.safetensors"))
    (edit or (lambda told: None))(told)
    found = {n: t for n, x in found.items() if (t := tensors(n, x) if tensors else x) is not None}
    store.write(Path("x.safetensors"), found, told)


def tells(**changes):
    """One that tells other things, by dotted keys; ... removes one."""
    return lambda: ensemble(lambda told: told.update(changed(told, changes)) or [
        told.pop(key) for key, value in changes.items() if value is ...
    ])  # fmt: skip


def header(text, length=None):
    data = text if isinstance(text, bytes) else text.encode()
    put("x.safetensors", (len(data) if length is None else length).to_bytes(8, "little") + data)


def first(told, **changes):
    told["experts"][0].update(changes)


def config(told, **changes):
    told["experts"][0]["config"].update(changes)


NO = "x.safetensors: "
ENSEMBLES = {
    "no bytes": (lambda: put("x.safetensors"), NO),
    "four bytes": (lambda: put("x.safetensors", b"abcd"), NO),
    "a header that isn't there": (lambda: header("", 1000), NO),
    "a header of 2^60 bytes": (lambda: header("{}", 2**60), NO),
    "a header that is no JSON": (lambda: header("hello"), NO),
    "a header nested 100,000 deep": (lambda: header("[" * 100_000), NO),
    "a header without tensors": (lambda: header("{}"), NO),
    "tensors beyond the file": (lambda: header(json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})), NO),
    "a folder": (lambda: Path("x.safetensors").mkdir(), NO),
    "a pipe": (lambda: fifo("x.safetensors"), NO),
    "a device": (lambda: link("x.safetensors", "/dev/zero"), NO),
    "a link to itself": (lambda: link("x.safetensors", "x.safetensors"), "x.safetensors"),
    "not there": (lambda: None, "x.safetensors: missing; give a file that `ebdiff export` wrote"),
    "half of it": (lambda: put("x.safetensors", Path("whole.safetensors").read_bytes()[:20_000]), NO),
    "a checkpoint": (lambda: shutil.copy(path_of(layout.MILESTONE), "x.safetensors"), "holds no ensemble"),
    "another's metadata": (lambda: header(json.dumps({"__metadata__": {"ebdiff": "[" * 100_000}})), NO),
    "weights that are no numbers": (lambda: ensemble(None, lambda n, x: x * np.nan), NO),
    "weights without end": (lambda: ensemble(None, lambda n, x: x / 0), NO),
    "weights of another type": (lambda: ensemble(None, lambda n, x: x.to(torch.int8)), NO),
    "weights of half the bits": (lambda: ensemble(None, lambda n, x: x.half()), None),
    "complex weights": (lambda: ensemble(None, lambda n, x: x.to(torch.complex64)), NO),
    "weights turned around": (lambda: ensemble(None, lambda n, x: x.T if x.dim() == 2 else x), NO),
    "weights without channels": (lambda: ensemble(None, lambda n, x: x[:0]), NO),
    "a layer narrower than its neighbours": (lambda: ensemble(None, lambda n, x: x[:1] if n.startswith("0.conv_in") else x), NO),
    "scalars": (lambda: ensemble(None, lambda n, x: x.sum()), NO),
    "a layer that is missing": (lambda: ensemble(None, lambda n, x: None if "conv_in" in n else x), NO),
    "layers of none": (lambda: ensemble(None, lambda n, x: {"0": x}.get(n[:1])), None),
    "no tensors but one": (lambda: ensemble(None, lambda n, x: x if n.endswith("conv_in.bias") else None), NO),
    "no experts": (tells(experts=[]), NO),
    "experts that are a number": (tells(experts=5), NO),
    "experts that are text": (tells(experts="abc"), NO),
    "an expert of no span": (lambda: ensemble(lambda told: first(told, serve=[])), NO),
    "an expert of a span without end": (lambda: ensemble(lambda told: first(told, serve=[0, 1e400])), NO),
    "spans with a gap": (lambda: ensemble(lambda told: first(told, serve=[0, 999])), NO),
    "an expert's network that is a list": (lambda: ensemble(lambda told: first(told, network=[])), None),
    "a network of another kind": (lambda: ensemble(lambda told: config(told, kind="chirodiff")), NO),
    "a network of a kind that isn't there": (lambda: ensemble(lambda told: config(told, kind="x")), NO),
    "a network of 10^6 levels": (lambda: ensemble(lambda told: config(told, multipliers=[1] * 10**6)), NO),
    "a network of 10^9 times the width": (lambda: ensemble(lambda told: config(told, multipliers=[10**9, 10**9])), NO),
    "a network of 64 blocks": (lambda: ensemble(lambda told: config(told, blocks=64)), NO),
    "no diffusion": (tells(diffusion=...), NO),
    "a million timesteps": (tells(**{"diffusion.timesteps": 10**6}), NO),
    "10^12 timesteps": (tells(**{"diffusion.timesteps": 10**12}), NO),
    "more steps than timesteps": (tells(**{"sampling.steps": 10**5}), "sampling.steps: 100000 exceed the 1000 timesteps"),
    "a batch of 10^9": (tells(**{"sampling.batch": 10**9}), NO),
    "guidance without classes": (tells(**{"sampling.guidance": 2.0}), "sampling.guidance: the network is told no classes"),
    "items of a terabyte": (tells(**{"items.shape": [1, 2**20, 2**20]}), NO),
    "items of no size": (tells(**{"items.shape": [1, 0, 0]}), NO),
    "items of two axes": (tells(**{"items.shape": [8, 8]}), NO),
    "items of 5 channels": (tells(**{"items.shape": [5, 8, 8]}), NO),
    "items of -1": (tells(**{"items.shape": [1, -8, -8]}), NO),
    "items of text": (tells(**{"items.shape": "abc"}), NO),
    "items of 3.5": (tells(**{"items.shape": [1, 3.5, 3.5]}), NO),
    "items of any length without lengths": (tells(**{"items.variable": True}), NO),
    "classes that nothing knows": (tells(**{"items.classes": 10}), NO),
    "-1 classes": (tells(**{"items.classes": -1}), NO),
    "classes that are text": (tells(**{"items.classes": "many"}), NO),
    "another codec": (tells(codec={"kind": "raster"}), NO),
    "a codec with weights elsewhere": (tells(codec={"kind": "vq", "path": "/dev/zero", "channels": 1, "factor": 1}), NO),
    "a story that is a number": (tells(story=5), NO),
    "a name that is a path": (tells(experiment="../../x"), None),
    "label dropout that is text": (tells(label_dropout="x"), NO),
}  # fmt: skip

# --- results of a finished experiment, edited by hand ------------------------------------------------------------


def edit(template, **changes):
    path = path_of(template)
    put(path, json.dumps({**json.loads(path.read_text()), **changes}))


def array(template, value):
    path = path_of(template)
    path.unlink()
    np.save(path.with_suffix(".npy"), value)
    path.with_suffix(".npy").rename(path)


def planned(**changes):
    """A plan that is what `ebdiff plan` wrote, but for what it says."""
    e = load.load("tiny")
    jobs = [{"benchmark": "results/tiny/benchmarks/x.tsv", "seconds": 1.0}]
    told = {"jobs": jobs, "devices": 1, "digest": Job.of(e, "tabulate").digest, **changes}
    put("results/tiny/plan.json", json.dumps(sealed(told)))


def benchmarked(text):
    """A plan, and what Snakemake is said to have measured of a job."""
    e = load.load("tiny")
    place = Job.of(e, "prepare-data").note("benchmarks", "tsv")
    planned(jobs=[{"benchmark": str(place), "seconds": 1.0}])
    put(place, text)


def reading(text):
    """A training's readings, for whoever asks how far it is."""
    layout.path(layout.MILESTONE, experiment="tiny", seed=0, expert="dense-full", milestone=80).unlink()
    put(state() / "stats.jsonl", text)


def state():
    return Job.of(load.load("tiny"), "finetune-region", seed=0, expert="dense-full", milestone=80).state


DRAW, EXPORT = "draw tiny --run eb-50 -n 2 --out out", "export tiny out.safetensors --run eb-50"
MILESTONE = "experts/full-magnitude-ema-0.5-t0-1000/40.safetensors: "
RESULTS = {
    "an expert cut short": (lambda: os.truncate(path_of(layout.MILESTONE), 5000), DRAW, f"{MILESTONE}damaged"),
    "an expert of nothing": (lambda: os.truncate(path_of(layout.MILESTONE), 0), EXPORT, f"{MILESTONE}damaged"),
    "an expert that is a pipe": (lambda: fifo(path_of(layout.MILESTONE)), DRAW, MILESTONE),
    "an expert that is a folder": (lambda: instead(path_of(layout.MILESTONE), os.mkdir), EXPORT, MILESTONE),
    "another's expert": (lambda: shutil.copy(path_of(layout.TICKET), path_of(layout.MILESTONE)), DRAW, f"{MILESTONE}damaged"),
    "a run that isn't finished": (lambda: path_of(layout.MILESTONE).unlink(), DRAW, f"{MILESTONE}missing"),
    "Inception from a pipe": (
        lambda: (tiny({"evaluation": {"protocols": ["clean"], "weights": "w.pt"}}), fifo("w.pt")),
        "reference-stats digits --protocol clean", "w.pt",
    ),
    "Inception from noise": (
        lambda: (tiny({"evaluation": {"protocols": ["clean"], "weights": "w.pt"}}), put("w.pt", b"PK")),
        "reference-stats digits --protocol clean", "w.pt",
    ),
    "a manifest of text": (lambda: edit(layout.MANIFEST, origin=5), EXPORT, "manifest.json: damaged"),
    "a manifest that lies about the shape": (
        lambda: edit(layout.MANIFEST, shape=[10**6] * 3), "score in --against tiny", "manifest.json: damaged",
    ),
    "metrics of text": (lambda: edit(layout.METRICS, protocols="many"), EXPORT, None),  # left out, and said
    "metrics of text, compared": (lambda: edit(layout.METRICS, protocols=5), "compare tiny other", None),
    "samples of another shape": (lambda: array(layout.SAMPLES, np.zeros((2, 3))), "compare tiny other", None),
    "samples of another shape, verified": (lambda: array(layout.SAMPLES, np.zeros((2, 3))), "verify tiny", "tiny: 1 files can't be used"),
    "a ledger of text": (lambda: edit(layout.LEDGER, seconds="many"), "compare other tiny", None),
    "a ledger of text, verified": (lambda: edit(layout.LEDGER, seconds=""), "verify tiny", "1 files can't be"),
    "costs of text": (lambda: edit(layout.COST, networks=[]), "tabulate tiny", "cost.json: damaged"),
    "statistics of nothing": (lambda: array(layout.REFERENCE, np.zeros(0)), "score in --against tiny", "classifier-all.npz: damaged"),
    "features of another shape": (lambda: array(layout.REFERENCE_FEATURES, np.zeros((3, 4))), "score in --against tiny", "damaged"),
    "no statistics": (lambda: path_of(layout.REFERENCE).unlink(), "score in --against tiny", "classifier-all.npz: missing"),
    "results are a file": (lambda: (shutil.rmtree("results/tiny"), put("results/tiny")), "status tiny", "Not a directory"),
    "results are a file, and wanted": (lambda: (shutil.rmtree("results"), put("results")), "train-dense tiny", "results"),
    "results are a link to themselves": (lambda: (shutil.rmtree("results"), link("results", "results")), "train-dense tiny", "results"),
    "records are a file": (
        lambda: (shutil.rmtree("results/tiny/records"), put("results/tiny/records")), "status tiny", "Not a directory",
    ),
    "records are a file, and wanted": (lambda: (shutil.rmtree("results/tiny/records"), put("results/tiny/records")), DRAW, "record"),
    "a plan of text": (lambda: put("results/tiny/plan.json", "hello"), "status tiny", "with `ebdiff plan tiny`"),
    "a plan that is a pipe": (lambda: fifo("results/tiny/plan.json"), "status tiny", "plan.json: not a file"),
    "a plan of a terabyte": (lambda: sparse("results/tiny/plan.json"), "status tiny", "plan.json: "),
    "a plan of other jobs": (planned, "status tiny", None),
    "a benchmark of bytes": (lambda: benchmarked(bytes(range(256))), "status tiny", None),
    "a benchmark of nothing": (lambda: benchmarked(""), "status tiny", None),
    "a benchmark of text": (lambda: benchmarked("s\nmany\n"), "status tiny", None),
    "a benchmark of no number": (lambda: benchmarked("s\nnan\n"), "status tiny", None),
    "a benchmark without end": (lambda: benchmarked("s\ninf\n"), "status tiny", None),
    "a benchmark of a long line": (lambda: benchmarked(f"s\n{'9' * 200_000}\n"), "status tiny", None),
    "readings of bytes": (lambda: reading(bytes(range(256))), "status tiny", None),
    "readings of a number": (lambda: reading("5\n"), "status tiny", None),
    "readings of a list": (lambda: reading("[]\n"), "status tiny", None),
    "readings of text": (lambda: reading('{"step": "a", "loss": "b"}\n'), "status tiny", None),
    "readings of no numbers": (lambda: reading('{"step": 9, "loss": NaN, "seconds": NaN}\n'), "status tiny", None),
    "readings nested 100,000 deep": (lambda: reading("[" * 100_000), "status tiny", None),
    "a folder of images that are broken": (lambda: put("in/5.png"), "score in --against tiny", "in/5.png: "),
    "a folder of images of another size": (
        lambda: put("in/5.png", png(5, 9)), "score in --against tiny", "in/5.png: 9x9 pixels, but the real",
    ),
    "no folder": (lambda: None, "score nowhere --against tiny", "nowhere: no such folder"),
    "a file for a folder": (lambda: put("x.png", png()), "score x.png --against tiny", "x.png: no such folder"),
    "a folder of one": (lambda: put("one/x.png", png()), "score one --against tiny", "one: 1 images are too few"),
    "out is taken": (lambda: put("out/x"), DRAW, "out: exists already"),
    "out is a file": (lambda: put("out"), DRAW, "out: exists already"),
    "out is below a file": (lambda: put("x"), "draw tiny --run eb-50 --out x/y", "x"),
    "out can't be": (lambda: None, "draw tiny --run eb-50 --out /proc/x", "/proc/x"),
    "out is too long": (lambda: None, f"draw tiny --run eb-50 --out {'x' * 300}", "xxx"),
    "a file that is there": (lambda: put("out.safetensors"), EXPORT, "out.safetensors: exists already"),
    "a card that is there": (lambda: put("out.md"), EXPORT, "out.md: exists already"),
    "a card that is a folder": (lambda: Path("out.md").mkdir(), EXPORT, "out.md: exists already"),
    "another suffix": (lambda: None, "export tiny out.pt --run eb-50", "out.pt: call it NAME.safetensors"),
    "a file below a file": (lambda: put("x"), "export tiny x/y.safetensors --run eb-50", "x"),
    "no run": (lambda: None, "draw tiny --out out", "tiny: say which run: eb-50, ta-eb, unpruned"),
    "a run that isn't": (lambda: None, "draw tiny --run eb50 --out out", "'eb50' is not known; did you mean"),
    "a run of a path": (lambda: None, "export tiny out.safetensors --run ../x", "'../x' is not known"),
    "a run of a file": (lambda: None, "draw whole.safetensors --run eb-50 --out out", "is one run's already"),
    "a class of none": (lambda: None, f"{DRAW} --label 3", "label 3: it knows no classes"),
    "a seed beyond 64 bits": (lambda: None, f"{DRAW} --seed {2**64}", "beyond 63 bits"),
    "a noise seed beyond 64 bits": (lambda: None, f"{DRAW} --noise-seed {2**70}", None),
    "a seed of nobody": (lambda: None, f"{DRAW} --seed 7", "seed7"),
    "compared with itself": (lambda: None, "compare tiny tiny", "tiny with itself"),
    "compared with nothing": (lambda: None, "compare tiny ../x", "../x: no such folder; give a copy of results/tiny"),
    "compared with a folder above": (lambda: None, "compare tiny ./", "holds no results of tiny"),
    "compared with a file": (lambda: put("x/y"), "compare tiny x/y", "x/y: no such folder"),
    "compared with a link to itself": (lambda: link("x/y", "y"), "compare tiny x/y", "x/y"),
    "compared with broken results": (
        lambda: [put(p, b"[") for p in Path(shutil.copytree("results/tiny", "x/y")).rglob("*.json")] and None,
        "compare tiny x/y", "x/y holds no results of tiny",
    ),
    "compared with pipes": (
        lambda: [fifo(p) for p in list(Path(shutil.copytree("results/tiny", "x/y")).rglob("*.*")) if p.is_file()],
        "compare tiny x/y", "x/y holds no results of tiny",
    ),
    "readings of text, watched": (lambda: reading("hello"), "tensorboard tiny", None),
    "readings of lists, watched": (lambda: reading("[]\n5\n"), "tensorboard tiny", None),
    "readings of words, watched": (
        lambda: reading('{"step": "a", "loss": "b", "seconds": []}\n'), "tensorboard tiny", None,
    ),
    "a place of events that is a file": (lambda: put("results/tiny/tensorboard"), "tensorboard tiny", "tensorboard"),
    "events of bytes": (lambda: put("results/tiny/tensorboard/x/events.out.tfevents.1", b"x"), "tensorboard tiny", None),
}  # fmt: skip

# --- the environment: what a shell runs, whether it succeeds, what it must say ------------------------------------

ENVIRONMENTS = {
    "no output": ("ebdiff status tiny >&-", 0, ""),
    "no output of an error": ("ebdiff status tyny 2>&-", 1, ""),
    "no input": ("ebdiff status tiny <&-", 0, "jobs done"),
    "nothing at all": ("ebdiff status tiny <&- >&- 2>&-", 0, ""),
    "a pipe that nobody reads": ("ebdiff schema | true", None, ""),
    "a pipe that is closed soon": ("ebdiff schema | head -n 1", None, "{"),
    "a full output": ("ebdiff schema > /dev/full", 1, "the disk is full"),
    "a full output of one line": ("ebdiff version > /dev/full", 1, "the disk is full"),
    "no home": ("HOME=/proc/none ebdiff compare tiny other", 0, "compare.html"),
    "no temporary folder": ("TMPDIR=/nowhere ebdiff draw tiny --run eb-50 -n 2 --out out", 0, "grid.png"),
    "no temporary folder, scoring": ("TMPDIR=/nowhere ebdiff score in --against tiny", 0, "recall"),
    "small files, drawing": ("ulimit -f 1; ebdiff draw tiny --run eb-50 -n 99 --out out", 1, "out"),
    "small files, exporting": (f"ulimit -f 8; ebdiff {EXPORT}", 1, "out.safetensors: File too large"),
    "small files, comparing": ("ulimit -f 4; ebdiff compare tiny other", 1, "compared/other"),
    "small files, initialising": ("ulimit -f 0; ebdiff init x --images in --no-estimate", 1, "x.yaml: File too"),
    "few open files": ("ulimit -n 8; ebdiff status tiny", None, ""),
    "a locale that isn't there": ("LC_ALL=zz_ZZ ebdiff status tiny", 0, "jobs done"),
    "ASCII alone": ("LC_ALL=C PYTHONUTF8=0 PYTHONIOENCODING=ascii ebdiff status é", 1, "is not known"),
    "a folder that is gone": ("mkdir gone; cd gone; rmdir ../gone; ebdiff status", 1, "no config/experiments here"),
    "another backend": ("MPLBACKEND=nonsense ebdiff tabulate tiny figure2", 0, "figure2.pdf"),
    "columns that are a word": ("COLUMNS=many ebdiff nosuch", 2, "nosuch"),
    "one column": ("COLUMNS=1 ebdiff status tiny", 0, "done"),
    "threads that are a word": ("OMP_NUM_THREADS=many ebdiff draw tiny --run eb-50 -n 2 --out out", 0, "grid"),
    "GPUs that are a word": ("CUDA_VISIBLE_DEVICES=many ebdiff draw tiny --run eb-50 -n 2 --out out", 0, "grid"),
    "no path": (f"PATH= {BIN}/ebdiff init x --images in --no-estimate", 0, "wrote config/experiments/x.yaml"),
    "no rights for anybody": ("umask 777; ebdiff init x --images in --no-estimate", 0, "x.yaml"),
    "warnings are errors": ("PYTHONWARNINGS=error ebdiff status tiny", 0, "jobs done"),
}  # fmt: skip

WORKFLOWS = {
    "runs twice": (("smoke", "--config", "runs=eb-50,eb-50", "--dry-run"), None),
    "runs of nothing": (("smoke", "--config", "runs=,"), "runs"),
    "runs that are a mapping": (("smoke", "--config", "runs={eb-50: 1}"), "runs"),
    "runs in two lines": (("smoke", "--config", 'runs="eb-50\\nx"'), "runs"),
    "experiments that are true": (("--config", "experiments=true"), "experiments"),
    "experiments that are a half": (("--config", "experiments=0.5"), "experiments"),
    "an experiment twice": (("--config", "experiments=smoke,smoke", "--dry-run"), None),
    "a key of an experiment": (("smoke", "--config", "seeds=5"), "config: 'seeds' is not known"),
}  # fmt: skip

COUNT = sum(map(len, (EXPERIMENTS, DATA, KEYS, DRAWINGS, ENSEMBLES, RESULTS, ENVIRONMENTS, WORKFLOWS)))


def test_there_are_more_than_a_hundred():
    assert COUNT >= 100
    print(f"{COUNT} malformed inputs")


def files():
    """Every file, link and pipe below the working directory, with what it holds by its date."""
    found = (Path(base, name) for base, _, names in os.walk(".") for name in names)
    return {path: path.lstat().st_mtime_ns for path in found if path.suffix != ".lock"}


def memory(what):
    """Bytes of this process: VmSize, VmRSS, or its peak, VmHWM."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.fixture
def bounded():
    """Within a minute, and never a gigabyte more than there was before."""

    def late(*_):
        pytest.fail(f"still at work after {SECONDS} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 4 * GB, before[1]))  # the machine's sake
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resident = memory("VmRSS")
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert memory("VmHWM") - resident < GB


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the tiny experiment, and those that `init` starts from."""
    for name in ("images", "sketches"):
        put(tmp_path / f"config/experiments/{name}.yaml",
            (ROOT / f"config/experiments/{name}.yaml").read_bytes())  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # verbs set the number of threads
    tiny()
    return tmp_path


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    """The finished project, an exported ensemble of its run beside it, another experiment, and images."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("profiles", "rules", "envs", ".snakemake"))
    write_experiment(folder, {"training.batch": 8}, "other")
    for i in range(9):
        put(folder / f"in/{i}.png", saved(Image.open(io.BytesIO(png(i))).convert("L"), "PNG"))
    before = Path.cwd()
    os.chdir(folder)
    assert run("export", "tiny", "whole.safetensors", "--run", "eb-50") == 0
    os.chdir(before)
    return folder


@pytest.fixture
def results(finished, tmp_path, monkeypatch):
    """A copy of it."""
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "project"))
    monkeypatch.setattr(os, "environ", os.environ.copy())


def told(stderr):
    """What was said, but for progress, and for what of the input is left out."""
    return [line for line in stderr.splitlines() if not (PROGRESS.fullmatch(line) or LEFT_OUT.match(line))]


def judge(line, named, capsys):
    """Run a command in this process: refused in one line that names what is wrong, or fine."""
    before = files()
    capsys.readouterr()
    status = run(*line.split(" "))
    said = told(capsys.readouterr().err)
    ours = [text for text in said if text.startswith("ebdiff: ")]
    assert all(text.isprintable() for text in said)
    if named is None:
        assert (status, ours) == (0, []), said
        return
    assert status in (1, 2), said
    if status == 1:  # 2 is the usage, with the option in a frame
        assert ours == said and len(ours[0]) < 1000, said
    assert named in (text := "\n".join(said)), text
    assert files() == before


@pytest.mark.parametrize("case", EXPERIMENTS)
def test_experiments(project, bounded, capsys, case):
    make, line, named = EXPERIMENTS[case]
    make()
    judge(line, named, capsys)


def prepared(capsys, named, base="tiny", **dataset):
    (path,) = (p for p in Path().glob("in*"))
    raw = yaml.safe_load(Path(f"config/experiments/{base}.yaml").read_text())
    raw["dataset"] = {"name": "mine", "source": "images", "path": str(path), "image_size": 8, **dataset}
    put("config/experiments/mine.yaml", yaml.safe_dump({k: v for k, v in raw.items() if k != "name"}))
    judge(f"prepare-data {raw['dataset']['name']}", named, capsys)


@pytest.mark.parametrize("case", DATA)
def test_images(project, bounded, capsys, case):
    make, named = DATA[case]
    if "lmdb" in case:
        pytest.importorskip("lmdb")
    make()
    prepared(capsys, named)


@pytest.mark.parametrize("case", KEYS)
def test_keys_of_a_dataset(project, bounded, capsys, case):
    images()
    keys, named = KEYS[case]
    prepared(capsys, named, **keys)


@pytest.mark.parametrize("case", DRAWINGS)
@pytest.mark.parametrize("verb", ["prepare-data mine", "init mine2 --images in.ndjson --no-estimate"])
def test_drawings(project, bounded, capsys, case, verb):
    make, named = DRAWINGS[case]
    make()
    put("config/experiments/mine.yaml", "base: sketches\ndataset: {name: mine, path: in.ndjson}\n")
    if verb.startswith("init"):  # looks at all, and proposes to leave out the broken ones
        named = named if case in ("nothing", "a gzip", "a line of 2 MiB") else None
    judge(verb, named, capsys)


@pytest.mark.parametrize("case", ENSEMBLES)
def test_ensembles(results, bounded, capsys, case):
    make, named = ENSEMBLES[case]
    make()
    judge("draw x.safetensors -n 2 --out out", named, capsys)


@pytest.mark.parametrize("case", RESULTS)
def test_results(results, bounded, capsys, case):
    make, line, named = RESULTS[case]
    make()
    if case.startswith("readings"):
        with holding(state()):  # as if it ran
            return judge(line, named, capsys)
    judge(line, named, capsys)


@pytest.mark.long
@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environments(results, case):
    line, expected, words = ENVIRONMENTS[case]
    before = set(files())
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], env=env, capture_output=True, timeout=SECONDS
    )
    printed = (done.stdout + done.stderr).decode(errors="replace")
    assert "Traceback" not in printed and "Exception ignored" not in printed
    assert expected is None or done.returncode == expected, printed
    assert words in printed
    if expected == 1:
        assert len(told(done.stderr.decode())) <= 1, printed
        assert set(files()) == before


@pytest.mark.long
@pytest.mark.parametrize("case", WORKFLOWS)
def test_workflows(tmp_path, case):
    words, named = WORKFLOWS[case]
    folder = copied(tmp_path)
    done = snakemake(folder, *words)
    printed = done.stdout + done.stderr
    assert "Traceback" not in printed and "Finished job" not in printed
    assert (done.returncode == 0) == (named is None), printed
    assert (named or "") in printed
    assert not (folder / "results").exists() and not (folder / "resources").exists()
