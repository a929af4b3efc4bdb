import io
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, write_experiment
from PIL import Image

from ebdiff import starter
from ebdiff.data import archives
from ebdiff.experiment import load
from ebdiff.system.errors import UserError

BASE = ROOT / "config/experiments/images.yaml"


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "config/experiments").mkdir(parents=True)
    shutil.copy(BASE, tmp_path / "config/experiments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fill(folder, count=12, width=64, height=64, grey=False):
    """Some random images in a folder."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 1 if grey else 3), np.uint8)
        pixels = np.broadcast_to(pixels, (height, width, 3))
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{i:03}.png")
    return folder


def of(count, size=(64, 64), colour=True):
    """What some number of images would look like."""
    return starter.Look(count, 500, Counter({size: 500}), Counter(RGB=500), colour, 0)


def proposal(count, size, **look):
    text = starter.propose("mine", "~/images", size, of(count, **look))
    return load.parse(
        {**load.with_base(yaml.safe_load(text), BASE.with_name("mine.yaml")), "name": "mine"}, "mine.yaml"
    )


def test_an_experiment_from_a_folder_of_images(project):
    lines = starter.init("mine", str(fill(project / "photos")), 32, force=False)
    assert lines[-1].strip() == "snakemake --cores all --config experiments=mine"
    assert lines[0] == "12 images, 12 looked at"
    assert lines[1] == "sizes 64x64 (12); modes RGB (12); colour"
    e = load.load("mine")
    assert (e.dataset.path, e.dataset.crop) == (str(project / "photos"), "none")
    assert (e.dataset.image_size, e.dataset.channels) == (32, 3)
    assert list(e.runs) == ["unpruned", "eb-50", "random-ticket-50", "ta-eb"]
    assert list(e.tables) == ["table4"]
    assert [x.serve for x in e.runs["ta-eb"].experts] == [(0, 240), (240, 440), (440, 1000)]
    assert [x.span for x in e.runs["ta-eb"].experts] == [(0, 260), (240, 460), (440, 1000)]
    assert [x.rate for x in e.runs["ta-eb"].experts] == [0.3, 0.6, 0.8]
    assert e.final_expert is not None


def test_the_proposed_experiment_prepares_its_images(project):
    from ebdiff.data.sources import prepare

    starter.init("mine", str(fill(project / "photos", width=80, grey=True)), 16, force=False)
    assert prepare(load.load("mine"))["shape"] == [16, 16, 1]


def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_look_at_many_images_reads_some_of_them(project, monkeypatch):
    def png(i):
        out, side = io.BytesIO(), 8 + 8 * (i >= 1500)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, 8, 3), np.uint8)).save(out, "PNG")
        return out.getvalue() + bytes(10_000)

    table = pa.table({"image": list(map(png, range(2000)))})
    pq.write_table(table, project / "x.parquet", row_group_size=50, use_dictionary=False, compression="none")
    monkeypatch.setattr(starter, "LOOKED_AT", 8)
    before = bytes_read()
    lines = starter.init("mine", str(project / "x.parquet"), 8, force=False)
    assert lines[:2] == ["2,000 images, 8 looked at", "sizes 8x8 (6), 8x16 (2); modes RGB (8); colour"]
    assert bytes_read() - before < (project / "x.parquet").stat().st_size / 2


@pytest.mark.parametrize("stride", [1, 2, 3, 7, 100])
def test_about_every_nth_of_a_parquet_files_images_is_looked_at(project, stride):
    table = pa.table({"image": [bytes([i]) for i in range(40)]})
    for name, size in (("a", 3), ("b", 40)):
        pq.write_table(table, project / f"{name}.parquet", row_group_size=size)
    found = archives.parquet([project / "a.parquet", project / "b.parquet"])
    assert len(list(found.items(stride))) == len(range(0, 80, stride))
    assert stride > 1 or [item.read()[0] for item in found.items()] == [*range(40)] * 2


@pytest.mark.parametrize(
    ("width", "height", "crop"), [(64, 64, "none"), (80, 64, "centre"), (178, 218, "celeba")]
)
def test_the_crop_follows_the_sizes(project, width, height, crop):
    folder = fill(project / "photos", 4, width, height)
    starter.init("mine", str(folder), 64, force=False)
    assert load.load("mine").dataset.crop == crop


def test_the_papers_networks_come_back_at_the_papers_sizes():
    cifar, celeba, lsun = proposal(50_000, 32), proposal(162_770, 64), proposal(126_227, 256)
    assert cifar.network.multipliers == (1, 2, 2, 2)
    assert celeba.network.multipliers == (1, 2, 2, 2, 4)
    assert lsun.network.multipliers == (1, 1, 2, 2, 4, 4)
    assert all(e.network.attention == (16,) and e.network.width == 128 for e in (cifar, celeba, lsun))
    assert [e.training.batch for e in (cifar, celeba, lsun)] == [128, 96, 8]
    assert [e.searches["full"].interval.unit for e in (cifar, celeba, lsun)] == [
        "epoch",
        "epoch",
        "pseudo-epoch",
    ]
    assert [e.searches["full"].interval.steps for e in (cifar, celeba, lsun)] == [None, None, 1000]
    assert cifar.dense.iterations < celeba.dense.iterations == lsun.dense.iterations == 400_000


@pytest.mark.parametrize("size", [8, 16, 24, 32, 48, 64, 96, 128, 256, 512])
@pytest.mark.parametrize("count", [4, 100, 5_000, 2_000_000])
def test_every_proposal_is_a_valid_experiment(count, size):
    e = proposal(count, size)
    assert e.training.batch <= count
    steps = e.searches["full"].interval.steps or e.epoch_steps(count)
    assert steps * e.searches["full"].horizon <= e.dense.iterations
    assert 20_000 <= e.dense.iterations <= 400_000
    assert e.runs["eb-50"].experts[0].iterations == e.dense.iterations * 9 // 8
    # Every rate takes something from the narrowest layers, and leaves something.
    blocks = e.network.width // e.network.norm_groups
    for rate in e.searches["full"].rates:
        n = (e.network.width - int(e.network.width * (1 - rate))) // e.network.norm_groups
        assert 0 < n < blocks


def test_comments_survive_and_the_file_is_the_proposal(project):
    starter.init("mine", str(fill(project / "photos")), 32, force=False)
    text = (project / "config/experiments/mine.yaml").read_text()
    assert text.startswith("# Written by `ebdiff init mine`. Seen: 12 images")
    assert text.count(" # ") > 15
    assert len(text.splitlines()) < 60
    assert "$" not in text.replace("${VARIABLES}", "")


def test_variables_and_quotes_stay_in_the_file(project, monkeypatch):
    fill(project / 'my "best" photos')
    monkeypatch.setenv("EBDIFF_TEST_HERE", str(project))
    starter.init("mine", '${EBDIFF_TEST_HERE}/my "best" photos', 32, force=False)
    assert load.load("mine").dataset.path == '${EBDIFF_TEST_HERE}/my "best" photos'


def test_an_experiment_is_not_overwritten_without_force(project):
    folder = str(fill(project / "photos"))
    path = write_experiment(project, name="mine")
    before = path.read_text()
    with pytest.raises(UserError, match=r"mine\.yaml: exists already; .* --force"):
        starter.init("mine", folder, 32, force=False)
    assert path.read_text() == before
    starter.init("mine", folder, 32, force=True)
    assert path.read_text() != before


def test_a_dataset_name_that_means_other_images_is_refused(project):
    write_experiment(project)
    with pytest.raises(UserError, match=r"tiny\.yaml: calls other images 'digits'"):
        starter.init("digits", str(fill(project / "photos")), 32, force=False)


def broken(folder):
    for i in range(5):
        (folder / f"{i}.png").write_bytes(b"x")


@pytest.mark.parametrize(
    ("name", "size", "make", "words"),
    [
        ("Mine", 32, fill, "name: "),
        ("../mine", 32, fill, "name: "),
        ("mine", 50, fill, "--size 50: halves only to 25"),
        ("mine", 4, fill, "--size 4"),
        ("mine", 0, fill, "--size 0"),
        ("mine", -32, fill, "--size -32"),
        ("mine", 32, lambda folder: fill(folder, 3), "3 images; at least 4"),
        ("mine", 32, lambda folder: None, "0 images; at least 4"),
        ("mine", 32, broken, "none of 5 images can be read"),
        ("mine", 32, lambda folder: folder.rmdir(), "no such file or folder"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_writes_nothing(project, name, size, make, words):
    (project / "photos").mkdir()
    make(project / "photos")
    with pytest.raises(UserError) as caught:
        starter.init(name, str(project / "photos"), size, force=False)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in project.rglob("*.yaml")] == ["images.yaml"]


def test_the_verb(project, verb):
    done = verb(
        "init", "mine", "--images", fill(project / "photos", width=20), "--size", "32", "--no-estimate"
    )
    assert done.returncode == 0, done.stderr
    assert "note: sides of 20 pixels will be enlarged to 32" in done.stdout
    assert done.stdout.rstrip().endswith("snakemake --cores all --config experiments=mine")
    again = verb("init", "mine", "--images", project / "photos")
    assert (again.returncode, len(again.stderr.strip().splitlines())) == (1, 1)


def test_the_estimate_proposes_the_scale_that_fits_an_evening():
    """Ten hours of training and two of the rest on two devices: four hours are room for six of the ten."""
    kinds = {"train-dense": 4, "finetune-region": 6, "sample": 2}
    plan = {
        "experiment": "mine", "device": "a laptop", "devices": 2, "wall_seconds": 6 * 3600,
        "jobs": [{"kind": kind, "seconds": 3600 * hours} for kind, hours in kinds.items()],
    }  # fmt: skip
    assert starter.estimated(plan) == [
        "about 6.00 h on a laptop with 2 jobs at a time",
        "`scale: 0.6` in config/experiments/mine.yaml would fit an evening (4.00 h)",
    ]
    assert len(starter.estimated({**plan, "wall_seconds": 3 * 3600})) == 1
