"""Images that stay encoded: pixels, batches and statistics of a raw store, in fewer bytes; LSUN's lmdb."""

import builtins
import io

import numpy as np
import pytest
import torch
from conftest import TINY, changed
from PIL import Image

from ebdiff.codecs import autoencoder
from ebdiff.cost import plan
from ebdiff.data import archives, encoded, sources
from ebdiff.data.dataset import Images, open_held_out, open_pixels, resident
from ebdiff.data.encoded import open_images
from ebdiff.diffusion.timesteps import Antithetic
from ebdiff.experiment import layout, load
from ebdiff.experiment.jobs import Job
from ebdiff.metrics import classifier, evaluate
from ebdiff.system.errors import Unusable, UserError
from ebdiff.training.batches import Draws

CPU = torch.device("cpu")


def photograph(seed, width=40, height=40):
    """Smooth colours, so that JPEG makes them small."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def stored(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def experiment(store, path="in", **dataset):
    of_it = {"name": "data", "source": "images", "path": str(path), "store": store, "image_size": 32,
             "channels": 3, "crop": "centre", "held_out": 0, "subset": ..., **dataset}  # fmt: skip
    return load.parse(changed(TINY, {f"dataset.{key}": value for key, value in of_it.items()}), "x.yaml")


KINDS = {
    "jpeg": stored(photograph(0)), "wide jpeg": stored(photograph(1, 70, 40)),
    "grey jpeg": stored(photograph(2).convert("L")), "webp": stored(photograph(3), "WEBP"),
    "lossless webp": stored(photograph(4), "WEBP", lossless=True), "png": stored(photograph(5), "PNG"),
    "palette": stored(photograph(6).quantize(16), "GIF"),
    "clear": stored(photograph(7).convert("RGBA").rotate(20), "PNG"),
    "deep": stored(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40), "PNG"),
    "large bmp": stored(photograph(8, 300, 300), "BMP"),  # more bytes than its pixels have
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project with a folder of images of all kinds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name, content in KINDS.items():
        (tmp_path / f"in/{name}.png").write_bytes(content)  # names don't matter
    return tmp_path


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("size", "channels", "resize"), [(32, 3, "bilinear"), (40, 1, "bicubic")])
def test_both_stores_hold_the_same_pixels(folder, size, channels, resize, threads):
    more = {"image_size": size, "channels": channels, "resize": resize, "held_out": 0.4}
    told, found = {}, {}
    for store in ("raw", "encoded"):
        told[store] = sources.prepare(experiment(store, **more), threads)
        found[store] = [np.array(images) for images in (open_pixels("data"), open_held_out("data"))]
    assert told["raw"] == told["encoded"]
    assert [len(images) for images in found["raw"]] == [6, 4]
    for raw, decoded in zip(found["raw"], found["encoded"], strict=True):
        np.testing.assert_array_equal(raw, decoded)


def test_celeba_is_cropped_when_decoded_and_pixels_are_kept_where_they_take_no_more(folder):
    (folder / "celeba").mkdir()
    for i in range(4):
        noisy = Image.fromarray(np.random.default_rng(i).integers(0, 256, (218, 178, 3), np.uint8))
        image = noisy if i == 2 else photograph(i, 178, 218)
        (folder / f"celeba/{i}.jpg").write_bytes(stored(image))
    whole = []
    for store in ("raw", "encoded"):
        sources.prepare(experiment(store, "celeba", crop="celeba"))
        whole.append(np.array(open_pixels("data")))
    np.testing.assert_array_equal(*whole)
    assert np.diff(open_pixels("data").ends)[1] == 32 * 32 * 3


def test_kept_are_the_sources_own_bytes_and_nothing_else(folder):
    sources.prepare(experiment("encoded"))
    images = open_pixels("data")
    own = [content for _, content in sorted(KINDS.items()) if len(content) < 3 * 32**2]
    assert len(own) == 8
    content, at = images.content.tobytes(), 0
    for piece in own:
        assert (at := content.find(piece, at)) >= 0
    sizes = sum(map(len, own)) + 2 * 3 * 32**2
    assert len(content) == sizes + 8 * 10 + encoded.TAIL


def test_only_what_is_asked_for_is_decoded(folder, monkeypatch):
    sources.prepare(experiment("encoded"))
    images, read, pixels = open_pixels("data"), [], encoded.pixels
    whole = np.array(images)
    monkeypatch.setattr(encoded, "pixels", lambda *a, **b: read.append(a) or pixels(*a, **b))
    assert images.shape == (10, 32, 32, 3) and images.nbytes == whole.nbytes
    view = images[2:8][1:-1]
    assert len(view) == 4 and not read
    np.testing.assert_array_equal(view[np.array([3, 0, 0])], whole[[6, 3, 3]])
    assert len(read) == 3
    np.testing.assert_array_equal(view[-1], whole[6])
    np.testing.assert_array_equal(np.stack(list(view)), whole[3:7])
    assert images[:0][np.arange(0)].shape == np.array(images[:0]).shape == (0, 32, 32, 3)
    assert resident(images, CPU) is None


def test_batches_are_the_same_from_both_stores(folder):
    drawn = []
    for store in ("raw", "encoded"):
        e = experiment(store, subset=7, flip=True)
        sources.prepare(e)
        images = Images.of(e)
        assert len(images) == 7 and images.slow == (store == "encoded")
        draws = Draws(images, Antithetic(0, 10), 5, 0, "s", CPU)
        drawn.append([[d.x0, d.t, d.eps] for d in draws.batches(range(20))])
    assert all(torch.equal(a, b) for x, y in zip(*drawn, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.filterwarnings("error::UserWarning")  # torch reads what it takes for a list one by one
def test_latents_are_normalised_alike_from_both_stores(folder):
    found = []
    for store in ("raw", "encoded"):
        e = experiment(store)
        sources.prepare(e)
        torch.manual_seed(0)
        network = autoencoder.Autoencoder(3, 4, 2)
        autoencoder.normalise(network, open_pixels("data"), CPU)
        found.append(network.mean)
    assert torch.equal(*found)


def test_metrics_are_the_same_from_both_stores(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    pictures = [stored(photograph(i)) for i in range(60)]
    pq.write_table(pa.table({"image": pictures, "label": [i % 3 for i in range(60)]}), "in.parquet")
    monkeypatch.setattr(classifier, "EPOCHS", 2)
    found = {}
    for store in ("raw", "encoded"):
        e = experiment(store, "in.parquet", held_out=0.25)
        sources.prepare(e)
        classifier.train_classifier(e)
        evaluate.reference_stats(e, "classifier")
        where = {"dataset": "data", "protocol": "classifier", "number": "all"}
        made = (layout.CLASSIFIER, layout.REFERENCE_FEATURES, layout.HELD_OUT_FEATURES)
        found[store] = [layout.path(template, **where).read_bytes() for template in made]
    assert found["raw"] == found["encoded"]


def test_the_default_is_no_part_of_what_anything_depends_on():
    assert "store" not in experiment("raw").dataset.content
    assert experiment("encoded").dataset.content["store"] == "encoded"


def test_broken_images_are_skipped_and_refused_as_ever(folder):
    (folder / "in/cut.jpg").write_bytes(KINDS["jpeg"][:300])
    with pytest.raises(UserError, match=r"cut\.jpg"):
        sources.prepare(experiment("encoded"))
    told = sources.prepare(experiment("encoded", broken="skip"))
    assert (told["count"], told["skipped"]) == (10, 1) and len(open_pixels("data")) == 10


@pytest.mark.parametrize("spoil", [
    lambda content: content[:-1], lambda content: content[:40], lambda content: content[:0],
    lambda content: np.r_[content[: -encoded.TAIL], np.full(encoded.TAIL, 32, np.uint8)],
    lambda content: np.r_[np.zeros(9, np.uint8), content[-encoded.TAIL :]],
])  # fmt: skip
def test_a_damaged_file_is_named(folder, spoil):
    sources.prepare(experiment("encoded"))
    path = layout.path(layout.IMAGES, dataset="data")
    np.save(path, spoil(np.load(path)))
    with pytest.raises(Unusable, match=r"images\.npy: damaged"):
        open_images(path)


def test_an_image_that_this_machine_cant_decode_is_named(folder):
    sources.prepare(experiment("encoded"))
    path = layout.path(layout.IMAGES, dataset="data")
    content = np.load(path)
    content[open_images(path).ends[2] :][:4] = 0
    np.save(path, content)
    with pytest.raises(Unusable, match=r"images\.npy: image 3 can't be decoded here: not one of"):
        open_images(path)[[1, 2, 3]]


def test_room_and_plan_count_what_is_kept(folder, monkeypatch):
    e, asked = experiment("encoded"), []
    monkeypatch.setattr(sources, "check_room", lambda path, needed: asked.append(needed))
    before, _ = sources.encoded_image(e.dataset)
    sources.prepare(e)
    after, seconds = sources.encoded_image(e.dataset)
    size = layout.path(layout.IMAGES, dataset="data").stat().st_size
    assert asked == [pytest.approx(size, rel=0.1)]
    assert before == pytest.approx(size / 10, rel=0.1) and after == pytest.approx(size / 10, rel=0.1)
    assert 1e-5 < seconds < 1
    networks = {"dense": {"params": 1, "step_ms": 1.0}}
    forecast = plan.Forecast(e, CPU, 1000, networks, {}, after)
    assert forecast.demand(Job.of(e, "prepare-data")) == (0, int(1000 * (after + 8)))
    assert sources.encoded_image(experiment("raw").dataset) is None
    assert sources.encoded_image(experiment("encoded", "nowhere", name="other").dataset) is None


# --- lmdb ---------------------------------------------------------------------------------------------------


@pytest.fixture
def lsun(tmp_path, monkeypatch):
    """An lmdb as LSUN's: WebP images under hashes, written in another order than that of the keys."""
    lmdb = pytest.importorskip("lmdb")
    monkeypatch.chdir(tmp_path)
    with lmdb.open("lsun", map_size=2**22) as content, content.begin(write=True) as writing:
        for i in np.random.default_rng(0).permutation(30):
            writing.put(b"%02x" % i, stored(photograph(i, 60, 40), "WEBP"))
    (tmp_path / "lsun/lock.mdb").unlink()
    return tmp_path / "lsun"


@pytest.mark.parametrize("store", ["raw", "encoded"])
def test_an_lmdb_is_read_in_the_order_of_its_keys(lsun, store):
    told = sources.prepare(experiment(store, lsun, held_out=0.2), threads=3)
    assert (told["count"], told["held_out"], told["origin"]) == (24, 6, str(lsun))
    assert list(lsun.iterdir()) == [lsun / "data.mdb"]  # nothing is written beside it
    found = archives.open_path(lsun)
    assert [item.name for item in found.items()] == [f"{lsun}:{i:02x}" for i in range(30)]
    assert [item.read() for item in found.items()] == [
        stored(photograph(i, 60, 40), "WEBP") for i in range(30)
    ]
    (lsun.parent / "folder").mkdir()
    for item in found.items():
        (lsun.parent / f"folder/{item.name[-2:]}.webp").write_bytes(item.read())
    from_lmdb = np.array(open_pixels("data"))
    sources.prepare(experiment("raw", "folder", held_out=0.2))
    np.testing.assert_array_equal(from_lmdb, open_pixels("data"))


@pytest.mark.parametrize("size", [0, 100, 9000, -1])
def test_an_lmdb_that_is_cut_short_is_refused(lsun, size):
    whole = (lsun / "data.mdb").read_bytes()
    (lsun / "data.mdb").write_bytes(whole[:size])
    with pytest.raises(UserError, match=r"lsun: .*(not a whole lmdb|cut short).*copy it again"):
        archives.open_path(lsun)


def test_an_lmdb_with_damaged_pages_is_refused(lsun):
    content = bytearray((lsun / "data.mdb").read_bytes())
    for page in range(2, len(content) // 4096):
        content[4096 * page + 10] = 0xFF  # no kind of page
    (lsun / "data.mdb").write_bytes(content)
    with pytest.raises(UserError, match=r"lsun: .*copy it again"):
        list(archives.open_path(lsun).items())


def test_an_lmdb_without_its_library(tmp_path, monkeypatch):
    (tmp_path / "data.mdb").write_bytes(b"")
    real = builtins.__import__

    def missing(name, *rest):
        if name == "lmdb":
            raise ImportError
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install 'ebdiff\[lmdb\]'"):
        archives.open_path(tmp_path)
