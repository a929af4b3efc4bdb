"""Random input: experiments, YAML text, mask files, images and archives are read or refused, and no more."""

import io
import zipfile
from copy import deepcopy

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ebdiff.data import archives, images
from ebdiff.experiment import load, plain
from ebdiff.experiment.experiment import Experiment
from ebdiff.nets import checkpoints
from ebdiff.nets.unet import UNet
from ebdiff.system.errors import UserError
from ebdiff.tickets import history

# The same examples every time: a failure is a finding, never bad luck.
FUZZ = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), max_examples=100
)
FEWER = settings(FUZZ, max_examples=40)


def refused_or(function, *arguments):
    """The result of a call, or None where it is refused in one line."""
    try:
        return function(*arguments)
    except UserError as error:
        assert str(error).isprintable() and str(error)
    return None


# --- experiments ------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400),
    st.sampled_from(["like-eb-50", "final", "full", "dense", "epoch", "eb-50", "0.5", "${HOME}", "../x"]),
)  # fmt: skip
KEYS = st.one_of(
    st.text(max_size=5), st.sampled_from(sorted({*Experiment.model_fields, "full", "rates", "init"}))
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


def places(raw, above=()):
    """The path of every value of nested mappings and lists."""
    pairs = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in pairs:
        yield (*above, key)
        yield from places(value, (*above, key))


EXTRA = {
    "diffusion": {"timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02},
    "evaluation": {"protocols": ["classifier"], "reference": None, "weights": None},
    "speed": {"k": 5.0, "tau": 700, "dual": True},
    "compute": {"threads": 1, "gpus": 0, "share": 1, "device": "auto", "micro_batch": None},
    "tuning": {"device": "", "training": {"0.5": {"precision": "fp32"}}},
    "published": {"dataset": "cifar10", "note": ""},
    "scale": 1.0,
    "seeds": [0, 1],
}
WHOLE = {**TINY, **EXTRA, "name": "a"}
PLACES = list(places(WHOLE))


@FUZZ
@given(st.lists(st.tuples(st.sampled_from(PLACES), VALUES, st.integers(0, 3)), min_size=1, max_size=3))
def test_an_experiment_with_any_values_anywhere_loads_or_is_refused(changes):
    raw = deepcopy(WHOLE)
    for (*above, key), value, choice in changes:
        place = raw
        try:
            for step in above:
                place = place[step]
            if choice == 0:
                del place[key]
            else:
                place[key] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    text = yaml.safe_dump(raw, allow_unicode=True)
    refused_or(lambda: load.parse(plain.mapping(text, "a.yaml"), "a.yaml"))


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_every_place_of_an_experiment_survives_every_kind_of_value(place):
    for value in (
        None,
        True,
        -1,
        0,
        1.5,
        "x",
        [],
        {},
        [[]],
        [None],
        {"a": None},
        float("inf"),
        2**62,
        "like-a",
    ):
        raw = deepcopy(WHOLE)
        *above, key = place
        inner = raw
        for step in above:
            inner = inner[step]
        inner[key] = value
        refused_or(load.parse, raw, "a.yaml")


@FUZZ
@given(st.text(max_size=60) | st.text("[]{}:,-&*!|>'\"#%@`?~ \n\t0aé<", max_size=40))
def test_any_text_is_a_mapping_or_refused(text):
    found = refused_or(plain.mapping, text, "a.yaml")
    assert found is None or isinstance(found, dict)


@FUZZ
@given(st.data())
def test_a_damaged_experiment_loads_or_is_refused(data):
    text = list(yaml.safe_dump(WHOLE))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.text(max_size=3))
    refused_or(lambda: load.parse(plain.mapping("".join(text), "a.yaml"), "a.yaml"))


# --- files ------------------------------------------------------------------------------------------------


@st.composite
def damage(draw, content, most=3):
    """Some bytes of a file changed, or its end cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(0, most))):
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    return bytes(
        changed[: draw(st.sampled_from([len(changed)] * 3 + [0, len(changed) // 2, len(changed) - 1]))]
    )


def history_bytes(folder):
    rng = np.random.default_rng(0)
    masks = list(rng.integers(0, 256, (6, 2, 3), np.uint8))
    found = history.History((0.3, 0.5), ("a", "b"), (9, 8), masks[0], masks[1:])
    history.save_histories(folder / "masks.npz", {"ema": found})
    return (folder / "masks.npz").read_bytes()


def use(path):
    """All that the stages do with a mask history."""
    found = history.load_history(path, "ema")
    for rate in found.rates:
        distances = found.distances(rate)
        assert distances.shape == (len(found.masks),) * 2
        assert len(found.to_initial(rate)) == len(found.masks)
        mask = found.mask(rate, 0)
        assert (mask.dtype, mask.shape) == (np.dtype(bool), (found.length,))
        history.chance(mask, found.widths)
        history.first_settled(found.of_rate(rate), found.length, 3, 0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def test_damaged_mask_files_are_refused(folder):
    content = history_bytes(folder)

    @FUZZ
    @given(damage(content))
    def run(changed):
        (folder / "masks.npz").write_bytes(changed)
        refused_or(use, folder / "masks.npz")

    run()


ARRAYS = st.builds(
    lambda shape, kind, value: np.full(shape, value).astype(kind),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.sampled_from(["u1", "i8", "f4", "f8", "?", "U3"]),
    st.sampled_from([0, 1, 3, 255]),
)


def test_mask_files_of_any_arrays_are_used_or_refused(folder):
    history_bytes(folder)
    with np.load(folder / "masks.npz") as file:
        whole = {name: file[name] for name in file.files}

    @FUZZ
    @given(st.dictionaries(st.sampled_from(sorted(whole)), ARRAYS | st.none(), min_size=1, max_size=3))
    def run(changes):
        arrays = {k: v for k, v in {**whole, **changes}.items() if v is not None}
        np.savez(folder / "other.npz", **arrays)
        refused_or(use, folder / "other.npz")

    run()


def test_damaged_checkpoints_are_refused(folder):
    architecture = load.parse(deepcopy(TINY), "x.yaml").architecture
    buffer = io.BytesIO()
    torch.save(UNet(*architecture).state_dict(), buffer)
    content = buffer.getvalue()
    head = len(content) // 8  # names and shapes stand first

    @FEWER
    @given(damage(content[:head], most=6), st.booleans())
    def run(changed, whole):
        path = folder / "weights.pth"
        path.write_bytes(changed + content[head:] if whole else changed)
        tensors = refused_or(checkpoints.load_checkpoint, path, architecture)
        assert tensors is None or all(t.dtype == torch.float32 for t in tensors.values())

    run()


# --- images -----------------------------------------------------------------------------------------------

MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "I;16", "I;16B"]


def encoded(mode, kind, size, seed=0):
    """An image file's bytes, or None where the format has no such images."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    picture = Image.new(mode, size, 7) if ";" in mode else Image.fromarray(pixels).convert(mode)
    file = io.BytesIO()
    try:
        picture.save(file, kind)
    except (OSError, ValueError, KeyError):
        return None
    return file.getvalue()


def prepared(content, size, channels, crop):
    """One image through preparation: pixels, or None where it is refused."""
    try:
        found = images.pixels(images.Item("x", lambda: content), size, channels, crop, "bicubic")[0]
    except images.Broken as error:
        assert str(error)
        return None
    except UserError as error:
        assert "dataset.crop" in str(error)
        return None
    assert (found.shape, found.dtype) == ((size, size, channels), np.dtype(np.uint8))
    return found


HOW = st.tuples(
    st.sampled_from([4, 8, 9]), st.sampled_from([1, 3]), st.sampled_from(["none", "centre", "celeba"])
)


@FUZZ
@given(
    st.sampled_from(MODES), st.sampled_from(images.FORMATS),
    st.tuples(st.integers(1, 12), st.integers(1, 12)) | st.just((178, 218)), HOW,
)  # fmt: skip
def test_every_mode_format_and_size_becomes_uint8_or_is_refused(mode, kind, size, how):
    content = encoded(mode, kind, size)
    if content is not None:
        found = prepared(content, *how)
        fits = size == (178, 218) if how[2] == "celeba" else how[2] == "centre" or size[0] == size[1]
        assert fits or found is None
        assert found is not None or not fits or mode in ("F", "LAB", "I")


PICTURES = [
    c for kind in images.FORMATS for mode in ("L", "P", "RGBA", "I;16") if (c := encoded(mode, kind, (9, 9)))
]


@FUZZ
@given(st.sampled_from(PICTURES).flatmap(damage) | st.binary(max_size=64), HOW)
def test_damaged_image_files_become_uint8_or_are_refused(content, how):
    prepared(content, *how)


@FUZZ
@given(st.sampled_from([np.uint8, np.uint16, np.int32, np.float32]), st.integers(0, 2**32), HOW)
def test_tiffs_of_every_bit_depth_become_uint8_or_are_refused(kind, seed, how):
    samples = np.random.default_rng(seed).integers(-5 if np.dtype(kind).kind in "if" else 0, 70_000, (9, 9))
    file = io.BytesIO()
    Image.fromarray(samples.astype(kind)).save(file, "TIFF")
    found = prepared(file.getvalue(), *how)
    assert found is not None or how[2] == "celeba" or kind in (np.int32, np.float32)


def archive_bytes(kind):
    pictures = [encoded("RGB", "PNG", (6, 6), i) for i in range(4)]
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for i, picture in enumerate(pictures):
                archive.writestr(f"in/{i}.png", picture)
    else:
        cells = [{"bytes": picture, "path": None} for picture in pictures]
        pq.write_table(pa.table({"image": cells, "label": [0, 1, 2, 3]}), file)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["zip", "parquet"])
def test_damaged_archives_are_read_or_refused(folder, kind):
    @FUZZ
    @given(damage(archive_bytes(kind)))
    def run(changed):
        path = folder / f"in.{kind}"
        path.write_bytes(changed)

        def read():
            for item in archives.open_path(path).items():
                prepared_item(item)

        refused_or(read)

    def prepared_item(item):
        try:
            assert images.pixels(item, 8, 3, "centre", "bilinear")[0].shape == (8, 8, 3)
        except images.Broken as error:
            assert str(error)

    run()
