"""Hostile names and files: nothing leaves its folder, runs in a shell, or becomes markup."""

import csv
import io
import json
import os
import re
import stat
import subprocess
import tarfile
import zipfile
from copy import deepcopy
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import TINY, changed, unet
from PIL import Image
from reported import ALL_TABLES, MORE, RAW, fabricate, undrawn, vouched, write
from test_report import check_latex
from test_workflow import copied, edit, snakemake

from ebdiff.data import archives, images, sources, strokes
from ebdiff.experiment import layout, load, records
from ebdiff.experiment.jobs import Job
from ebdiff.experiment.members import SketchesConfig
from ebdiff.nets.checkpoints import load_checkpoint
from ebdiff.report import page, render
from ebdiff.report.render import Column
from ebdiff.report.results import Results
from ebdiff.system.errors import Unusable, UserError
from ebdiff.system.files import load_memmap, read_arrays, read_json, read_told, sha256, write_json

# A file name may hold whatever but "/" and the null byte.
HOSTILE = "a; touch pwned $(touch pwned) `touch pwned` ' \" \\ & | > pwned {x} {wildcards.seed} * \n -rf ü"
MARKUP = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'><svg/onload=alert(1)>", "{{ 7*7 }}",
    "{% raw %}", "&lt;b&gt;", "<!--", "]]>", "javascript:alert(1)", "</title></style><b>x",
]  # fmt: skip


def png(seed=0, size=8):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def prepare(tmp_path):
    """Prepare a source into tmp_path/out: (pixels, manifest)."""

    def run(path, **dataset):
        dataset = {"name": "data", "source": "images", "path": str(path), "image_size": 8, **dataset}
        raw = changed(TINY, {"dataset": dataset})
        paths = [
            tmp_path / "out" / name for name in ("images.npy", "labels.npy", "held_out.npy", "manifest.json")
        ]
        sources.write(load.parse(raw, "x.yaml"), *paths)
        return np.load(paths[0]), read_json(paths[-1])

    return run


def files_of(folder):
    return {p.relative_to(folder) for p in folder.rglob("*")}


# --- archives ---------------------------------------------------------------------------------------------


def zip_of(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


GOOD = {f"{i}.png": png(i) for i in range(5)}


@pytest.mark.parametrize(
    "name",
    ["../x.png", "/etc/x.png", "a/../../x.png", "..\\x.png", "C:\\x.png", "C:x.png", "\\\\host\\x.png"],
)
def test_a_zip_whose_members_point_elsewhere_is_refused(tmp_path, prepare, name):
    archive = zip_of(tmp_path / "in.zip", {**GOOD, name: png()})
    with pytest.raises(UserError, match="points outside the archive"):
        prepare(archive)


def test_a_link_in_a_zip_is_bytes_and_never_followed(tmp_path, prepare):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(99))
    archive = zip_of(tmp_path / "in.zip", GOOD)
    link = zipfile.ZipInfo("9.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(link, str(secret))
    with pytest.raises(UserError, match=r"9\.png: not one of"):
        prepare(archive)
    assert len(prepare(archive, broken="skip")[0]) == len(GOOD)


def test_a_zip_bomb_is_known_by_its_declared_size_and_read_no_further(tmp_path, prepare, monkeypatch):
    monkeypatch.setattr(archives, "FILE_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in GOOD.items():
            archive.writestr(name, content)
        archive.writestr("9.png", bytes(2**24))
    with pytest.raises(UserError, match="unpacks to 16 MiB, which looks like a decompression bomb"):
        prepare(tmp_path / "in.zip")


def test_a_zip_that_lies_about_a_size_gives_no_more_than_it_declares(tmp_path, prepare):
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in GOOD.items():
            archive.writestr(name, content)
        archive.writestr("9.png", bytes(2**24))
    data = (tmp_path / "in.zip").read_bytes()
    (tmp_path / "in.zip").write_bytes(
        data.replace((2**24).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    )
    pixels, manifest = prepare(tmp_path / "in.zip", broken="skip")
    assert (len(pixels), manifest["skipped"]) == (5, 1)


def test_encrypted_and_oddly_packed_members_are_broken_images(tmp_path, prepare):
    archive = zip_of(tmp_path / "in.zip", GOOD)
    data = bytearray(archive.read_bytes())
    first, second = (data.index(b"PK\x01\x02"), data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1))
    data[first + 8] |= 1  # encrypted
    data[data.index(b"PK\x03\x04") + 6] |= 1
    data[second + 10] = 99  # a method that there isn't
    archive.write_bytes(data)
    with pytest.raises(UserError, match="broken images: "):
        prepare(archive)


def test_a_tar_of_images_is_never_unpacked(tmp_path, prepare):
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        member = tarfile.TarInfo("../../evil.png")
        member.size = len(png())
        archive.addfile(member, io.BytesIO(png()))
    before = files_of(tmp_path)
    with pytest.raises(UserError, match="not a folder, zip or parquet file"):
        prepare(tmp_path / "in.tar")
    assert files_of(tmp_path) - before <= {Path("out")}


def test_a_parquet_file_names_no_file_of_this_machine(tmp_path, prepare):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(99))
    cells = [{"bytes": png(i), "path": None} for i in range(4)] + [{"bytes": None, "path": str(secret)}]
    pq.write_table(pa.table({"image": cells}), tmp_path / "in.parquet")
    with pytest.raises(UserError, match="no image in this row"):
        prepare(tmp_path / "in.parquet")


def test_pipes_and_devices_in_a_folder_are_not_read(tmp_path, prepare):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in GOOD.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    pixels, manifest = prepare(folder, broken="skip")
    assert (len(pixels), manifest["skipped"]) == (5, 2)


def test_hostile_file_names_stay_on_the_line_of_the_message(tmp_path, prepare, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in GOOD.items():
        (folder / name).write_bytes(content)
    (folder / "a\n\x1b[2J.png").write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        prepare(folder)
    assert str(caught.value).isprintable()
    prepare(folder, broken="skip")
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("broken image ")]
    assert len(printed) == 1 and printed[0].isprintable()


def test_an_image_bomb_is_known_by_its_header():
    header = b"P6 60000 60000 255\n"  # 10 GB, of which nothing follows
    with pytest.raises(images.Broken, match="decompression bomb"):
        images.opened(images.Item("x.ppm", lambda: header))


# --- sizes --------------------------------------------------------------------------------------------------

ZEROS = bytes(2**24 + 1)


def parquet_of(path, column, **options):
    pq.write_table(pa.table({"image": column}), path, compression="zstd", **options)
    return path


def test_a_parquet_cell_that_stands_in_every_row_is_known_by_its_groups_size(tmp_path, prepare):
    """A dictionary of one cell, of which every row would be a copy."""
    column = pa.array([{"bytes": ZEROS, "path": None}] * 4, pa.struct({"bytes": pa.binary(), "path": "str"}))
    path = parquet_of(tmp_path / "in.parquet", column, dictionary_pagesize_limit=2**30)
    assert path.stat().st_size < 5000
    with pytest.raises(UserError, match=r"in\.parquet: row group 0 unpacks from .* a decompression bomb"):
        prepare(path)


def test_a_parquet_file_that_lies_about_its_sizes_is_read_one_cell_far(tmp_path, prepare):
    path = parquet_of(tmp_path / "in.parquet", pa.array([ZEROS] * 4, pa.binary()), use_dictionary=False)
    size = pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size

    def varint(value, length):  # Thrift's, of a positive number
        parts = [2 * value >> 7 * k & 127 for k in range(length)]
        return bytes([part | 128 for part in parts[:-1]] + parts[-1:])

    length = -(-(2 * size).bit_length() // 7)
    path.write_bytes(path.read_bytes().replace(varint(size, length), varint(1000, length)))
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size == 1000
    with pytest.raises(UserError, match="a decompression bomb"):
        prepare(path)


def test_a_parquet_column_of_lists_holds_no_images(tmp_path, prepare):
    cell = {"bytes": pa.list_(pa.int64())}
    column = pa.array([{"bytes": [0] * 2**20}] * 4, pa.struct(cell))
    with pytest.raises(UserError, match=r"no image column .*image \(struct<bytes: list"):
        prepare(parquet_of(tmp_path / "in.parquet", column))


def test_an_npz_that_unpacks_to_more_than_deflate_can_pack_is_not_unpacked(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.npy", bytes(2**22))
    monkeypatch.setattr(zipfile.ZipFile, "read", None)
    with pytest.raises(Unusable, match=r"x\.npz: damaged \(a decompression bomb: unpacks to 4,194,304 bytes"):
        read_arrays(tmp_path / "x.npz")


@pytest.mark.parametrize("read", [read_told, partial(load_checkpoint, architecture=unet(8))])
def test_a_safetensors_header_is_not_parsed_beyond_its_size(tmp_path, read):
    header = json.dumps({"__metadata__": {"ebdiff": json.dumps({"story": "x" * 2**23})}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match=r"x\.safetensors: .*a header of more than 8 MiB"):
        read(path)


def test_a_packed_checkpoint_is_not_unpacked(tmp_path):
    torch.save({"x": torch.zeros(2**20)}, tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(UserError, match=r"x\.pth: packed, which torch\.save never does"):
        load_checkpoint(tmp_path / "x.pth", unet(8))


READERS = [read_json, read_arrays, read_told, load_memmap, sha256]


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_what_is_no_file_is_not_read_for_one(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(Unusable, match=f"{name}: not a file"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["zero", "pipe", "zero.zip", "pipe.parquet", "pipe.ndjson"])
def test_a_path_of_images_or_drawings_that_is_no_file(tmp_path, prepare, name):
    if "zero" in name:
        (tmp_path / name).symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"dataset.path: .*{name}' is neither a file nor a folder"):
        prepare(tmp_path / name)
    (tmp_path / "in").mkdir()
    (tmp_path / name).rename(tmp_path / "in" / name)
    if name.endswith("parquet"):
        with pytest.raises(UserError, match="not a file"):
            prepare(tmp_path / "in")
    if name.endswith("ndjson"):
        drawings = SketchesConfig(name="x", source="sketches", path=str(tmp_path / "in"))
        for find in (strokes.find, partial(strokes.look, most=5)):
            with pytest.raises(UserError, match="neither a file"):
                find(drawings)


def test_json_out_of_all_proportion_is_not_read(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(Unusable, match="larger than 64 MiB"):
        read_json(tmp_path / "x.json")


# --- paths that results tell --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "x\0"])
def test_no_part_of_a_path_leads_elsewhere(name):
    for template, part in (
        (layout.MASKS, "weights"),
        (layout.DENSE_LEDGER, "search"),
        (layout.TABLE, "table"),
    ):
        where = {"experiment": "e", "seed": 0, "search": "s", "criterion": "c", "weights": "w", "ext": "csv"}
        with pytest.raises(UserError, match="is no name of a file"):
            layout.path(template, **where | {part: name})


def test_a_record_makes_nothing_be_read_but_what_its_job_reads(workspace, tiny, monkeypatch):
    path = layout.path(layout.MANIFEST, dataset="digits")
    place = Job.of(tiny, "prepare-data").note("records", "json")
    write_json(place, records.sealed({**records.opened(place), "read": {"/dev/zero": "x", "../secret": "x"}}))
    read = []
    monkeypatch.setattr(records, "sha256", lambda path: read.append(path) or sha256(path))
    records.Records(tiny).check(path)
    assert read == [path]


def test_a_plan_makes_no_file_be_read_outside_the_results(tmp_path, monkeypatch, tiny):
    (tmp_path / "project/results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project")
    for name in ("../secret.tsv", "results/own.tsv"):
        Path(name).write_text("s\n5.0\n")
    Path("results/zero.tsv").symlink_to("/dev/zero")
    seconds = Results(tiny, partial=True).job_seconds
    assert seconds("results/own.tsv") == 5
    for name in (
        "../secret.tsv",
        "results/../../secret.tsv",
        str(tmp_path / "secret.tsv"),
        "results/zero.tsv",
        "",
    ):
        assert seconds(name) is None


# --- the report -------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The tags of a page, and every attribute that could load or run something."""

    def __init__(self):
        super().__init__()
        self.seen, self.risky, self.text = {}, [], []

    def handle_starttag(self, tag, attrs):
        self.seen[tag] = self.seen.get(tag, 0) + 1
        for key, value in attrs:
            if key.startswith("on") or key in ("src", "href", "style", "srcdoc", "action"):
                self.risky.append((tag, key, value))

    def handle_data(self, data):
        self.text.append(data)


def reported(attack, folder):
    """The page of a fabricated experiment in which every free text is an attack."""
    raw = deepcopy({**RAW, "runs": RAW["runs"] | MORE, "tables": ALL_TABLES})
    raw |= {"about": attack, "published": {"note": attack}}
    for run in raw["runs"].values():
        run |= {"title": attack + run["title"], "note": attack}
    raw["dataset"]["path"] = attack
    e = load.parse(raw, "x.yaml")
    fabricate(e)
    where = dict(experiment=e.name, dataset=e.dataset.name)
    for template, keys in (
        (layout.MANIFEST, ("title", "origin", "licence")),
        (layout.COST, ("device",)),
    ):
        path = layout.path(template, **where)
        write_json(path, {**read_json(path), **dict.fromkeys(keys, attack)})
    for path in Path("results").rglob("experts/*/*.json"):
        ledger = read_json(path)
        write_json(path, {**ledger, "device": attack, "versions": {attack: attack}})
    page.write_page(Results(e, partial=True), folder / "report.html")
    return e, (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_no_text_of_an_experiment_becomes_markup(tmp_path, monkeypatch):
    """The page with every attack in every free text has the tags of a harmless page, and no others."""

    vouched(monkeypatch)
    monkeypatch.chdir(tmp_path)
    undrawn(monkeypatch)
    parsed = []
    for attack in ("harmless", " ".join(MARKUP)):
        tags = Tags()
        _, html = reported(attack, tmp_path)
        tags.feed(html)
        parsed.append(tags)
    harmless, attacked = parsed
    assert attacked.seen == harmless.seen
    assert not any(key.startswith("on") or key == "srcdoc" for _, key, _ in attacked.risky)
    ours = re.compile(r"data:image/png;base64,.*|#.*|(figures|tables)/[a-z0-9]+\.(pdf|png|csv|tex|md)")
    assert all(ours.fullmatch(v) for _, key, v in attacked.risky if key != "style")
    shown = " ".join(attacked.text)
    assert "{{ 7*7 }}" in shown and " 49 " not in shown
    assert "<script>alert(1)</script>" in shown  # as text


def test_no_text_of_an_experiment_becomes_markdown_or_latex(tmp_path, monkeypatch):
    vouched(monkeypatch)
    monkeypatch.chdir(tmp_path)
    attack = (
        r"\input{/etc/passwd} & 50 % _x_ ^^5c $\write18{x}$ # ~ | a | `b` [c](javascript:d) <img src=x> **e**"
    )
    raw = deepcopy(RAW)
    for run in raw["runs"].values():
        run |= {"title": attack, "note": attack}
    e = load.parse(raw, "x.yaml")
    fabricate(e)
    _, markdown, tex, _ = write(e, "table4", folder=tmp_path)
    text = tex.read_text()
    check_latex(text, 3)
    assert r"\input" not in text and r"\write" not in text and "^^" not in text
    assert r"\textbackslash{}input\{/etc/passwd\}" in text
    lines = [line for line in markdown.read_text().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    written = markdown.read_text()
    assert "<img" not in written and "](" not in written.replace(r"\](", "")
    assert not re.search(r"(?<!\\)`b", written)


def test_no_text_of_a_csv_is_a_formula_and_numbers_stay_numbers():
    texts, numbers = ["=1+1", "+1", "-1", "@x", "a=1"], [-1.5, -2, 0.5, None, 7]
    columns = (Column("text", "T", lambda row: row), Column("number", "N", lambda row: row))
    rows = [list(row) for row in zip(texts, numbers, strict=True)]
    table = render.Table("", columns, rows, ["-", *[""] * 4], [])
    found = list(csv.DictReader(io.StringIO(render.to_csv(table))))
    assert [row["text"] for row in found] == ["'=1+1", "'+1", "'-1", "'@x", "a=1"]
    assert [row["number"] for row in found] == ["-1.5", "-2", "0.5", "", "7"]
    assert found[0]["marks"] == "'-"


def test_every_character_is_escaped_for_latex():
    escaped = render._tex("".join(map(chr, range(0x20, 0x7F))))
    bare = re.sub(
        r"\\(textbackslash|textasciicircum|textasciitilde|textasciigrave)\{\}|\\[{}$&%#_]|\$[<>|]\$",
        "",
        escaped,
    )
    assert not set(bare) & set("\\$&%#_^~")
    assert render._tex("\x1b\u202e\n") == "?? "


# --- the shell --------------------------------------------------------------------------------------------


TOLD = ("--dry-run", "--printshellcmds", "--workflow-profile", "none")  # in Snakemake's own words


def bash(folder, command):
    """Run a rule's shell line with a stand-in for `ebdiff` that writes down its words."""
    stand_in = folder / "bin/ebdiff"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done > words\n')
    stand_in.chmod(0o755)
    env = {**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", f"set -euo pipefail; {command}"], cwd=folder, env=env, check=True)
    return (folder / "words").read_text().split("\0")[:-1]


@pytest.mark.slow
def test_no_value_of_an_experiment_reaches_a_shell(tmp_path):
    """Every shell line of a hostile experiment is words that begin harmlessly, and none is a hostile one."""
    folder = copied(tmp_path)
    checkpoint = folder / f"{HOSTILE.replace('{', '').replace('}', '')}.pth"
    checkpoint.touch()
    for path, value in (
        ("about", HOSTILE),
        ("dataset", {"name": "mine", "source": "images", "path": HOSTILE}),
        ("dense", {"from": str(checkpoint), "iterations": 900}),
        ("runs.eb-50.title", HOSTILE.replace("\n", "")),
        ("runs.eb-50.note", HOSTILE),
        ("evaluation", {"protocols": ["clean"], "weights": HOSTILE}),
    ):
        edit(folder, "smoke", path, value)
    before = files_of(folder)
    done = snakemake(folder, "smoke", *TOLD)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = re.findall(r"^Shell command: (ebdiff .*)$", done.stdout + done.stderr, re.MULTILINE)
    assert len(commands) > 15
    for command in commands:
        assert "pwned" not in command
        (folder / command.split(" > ")[1].split()[0]).parent.mkdir(parents=True, exist_ok=True)
        words = bash(folder, command)
        assert all(re.fullmatch(r"[a-z0-9.-]+", word) for word in words), words
    assert not (folder / "pwned").exists()
    assert before <= files_of(folder)


@pytest.mark.slow
def test_a_hostile_folder_of_images_is_prepared_by_the_workflow(tmp_path):
    folder = copied(tmp_path)
    (folder / HOSTILE).mkdir()
    for name, content in GOOD.items():
        (folder / HOSTILE / name).write_bytes(content)
    raw = changed(TINY, {"name": "mine"})
    raw["dataset"] = {"name": "mine", "source": "images", "path": HOSTILE, "image_size": 8}
    (folder / "config/experiments/mine.yaml").write_text(yaml.safe_dump(raw))
    done = snakemake(folder, "resources/data/mine/images.npy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert np.load(folder / "resources/data/mine/images.npy").shape == (5, 8, 8, 3)
    assert read_json(folder / "resources/data/mine/manifest.json")["origin"] == HOSTILE
    assert not (folder / "pwned").exists()


@pytest.mark.slow
def test_so_far_quotes_its_experiments(tmp_path):
    """What gets past the check of names, because it is one, is one word in the loop."""
    folder = copied(tmp_path)
    done = snakemake(folder, "so-far", *TOLD, "--config", "experiments=smoke,digits")
    assert done.returncode == 0, done.stdout + done.stderr
    command = re.search(r"^Shell command: (bash -ec .*)$", done.stdout + done.stderr, re.MULTILINE)[1]
    (folder / "results/logs").mkdir(parents=True)
    assert bash(folder, command) == ["report", "digits", "--so-far"]
    for hostile in ("$(touch pwned)", "`touch pwned`", "';touch pwned;'"):
        done = snakemake(folder, "so-far", "--config", f"experiments={json.dumps([hostile])}")
        assert done.returncode != 0
        assert "is not known" in done.stdout + done.stderr
    assert not (folder / "pwned").exists()
