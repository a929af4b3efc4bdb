"""First stages: what encodes and decodes, the store of latents, and what reads which of the two."""

import json
import shutil
import signal
import sys
import types
from pathlib import Path

import kills
import numpy as np
import pytest
import stages
import torch
from conftest import TINY, changed, vouch, write_experiment
from PIL import Image
from safetensors import safe_open
from test_diffusion import drawn, untrained

import ebdiff
from ebdiff.codecs import autoencoder, first_stage
from ebdiff.codecs.codec import open_codec
from ebdiff.codecs.first_stage import encode_latents, statistics
from ebdiff.data import archives
from ebdiff.data.dataset import (
    UNCONDITIONAL,
    conditions,
    open_dataset,
    open_held_out,
    open_pixels,
    to_float,
    to_uint8,
)
from ebdiff.experiment import layout, load
from ebdiff.experiment.jobs import Job, jobs
from ebdiff.experiment.members import Items
from ebdiff.experiment.records import Records
from ebdiff.experiment.stages import STAGES
from ebdiff.metrics.classifier import train_classifier
from ebdiff.metrics.distances import Gaussian, frechet_distance
from ebdiff.metrics.evaluate import measure_first_stage, reference_stats
from ebdiff.metrics.features import Extractor
from ebdiff.system.errors import UserError
from ebdiff.system.files import read_json

CPU = torch.device("cpu")
CODEC = {"kind": "autoencoder", "channels": 4, "factor": 4}
LATENT = {"codec": CODEC, "dataset.flip": False, "sampling.clamp": False}
VQ = {"kind": "vq", "path": "weights", "channels": 3, "factor": 2}


def path(template):
    return layout.path(template, experiment="tiny")


@pytest.fixture
def latent(vary):
    return lambda changes=(): vary({**LATENT, "codec": dict(CODEC), **dict(changes)})


@pytest.fixture
def short(monkeypatch):
    """The rule's training, cut to 80 steps."""
    monkeypatch.setattr(autoencoder, "STEPS", 10)


@pytest.fixture(scope="session")
def first_stage_of_digits(tmp_path_factory, digits):
    """A project with a first stage of the digits, trained for 80 steps of its rule: its folder."""
    folder = kills.fresh(digits, tmp_path_factory.mktemp("first stage") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(autoencoder, "STEPS", 10)
        autoencoder.train_first_stage(
            load.parse(changed(TINY, {**LATENT, "codec": dict(CODEC)}), "x.yaml"), CPU
        )
    return folder


@pytest.fixture
def trained(workspace, latent, first_stage_of_digits):
    """A workspace with that first stage."""
    kills.fresh(first_stage_of_digits / "results", workspace / "results")
    return latent()


# --- what is asked ------------------------------------------------------------------------------------------


def test_what_is_denoised_is_a_latent_under_the_image_s_label(latent, tiny):
    e = latent({"dataset.classes": 10})
    assert e.items == Items((4, 2, 2), 10)
    assert e.architecture.items == e.items
    assert tiny.items == tiny.dataset.items == Items((1, 8, 8))


def test_training_reads_latents_and_metrics_read_images(latent, tiny):
    def reads(e, verb, **where):
        return set(Job.of(e, verb, **{"seed": 0, **where}).reads)

    images, latents = layout.path(layout.IMAGES, dataset="digits"), path(layout.LATENTS)
    e = latent()
    for verb, where in (
        ("train-dense", {"search": "full"}),
        ("prune-per-epoch", {"search": "full", "criterion": "taylor", "weights": "ema"}),
    ):
        e = latent({"searches.full.criteria": ["magnitude", "taylor"]})
        assert latents in reads(e, verb, **where) and images not in reads(e, verb, **where)
    for verb, where in (
        ("reference-stats", {"protocol": "classifier", "number": "all"}),
        ("encode-latents", {}),
    ):
        assert images in reads(e, verb, **where) and latents not in reads(e, verb, **where)
    assert {path(layout.FIRST_STAGE), path(layout.LATENTS_MANIFEST)} <= reads(e, "sample", run="eb-50")
    verbs = [job.stage.verb for job in jobs(e)]
    assert verbs.index("prepare-data") < verbs.index("train-first-stage") < verbs.index("encode-latents")
    assert verbs.index("encode-latents") < verbs.index("train-dense")
    assert verbs.count("measure-first-stage") == 1
    assert not {"train-first-stage", "encode-latents", "measure-first-stage"} & {
        j.stage.verb for j in jobs(tiny)
    }
    given = [job.stage.verb for job in jobs(latent({"codec": {**VQ, "factor": 4}}))]
    assert "encode-latents" in given and "train-first-stage" not in given


def test_weights_from_outside_are_inputs_of_all_that_opens_them(latent, tmp_path):
    """So that others make everything again, and nothing of theirs is taken over; the hub's have no files."""
    files = {tmp_path / "config.json", tmp_path / "model.safetensors"}
    for file in (*files, tmp_path / "notes.txt"):
        file.write_text("{}")
    e = latent({"codec": {**VQ, "factor": 4, "path": str(tmp_path)}})
    for verb, where in (("encode-latents", {}), ("measure-first-stage", {}), ("sample", {"run": "eb-50"})):
        read = {p for p in Job.of(e, verb, **{"seed": 0, **where}).reads if p.is_relative_to(tmp_path)}
        assert read == files
    hub = latent({"codec": {**VQ, "factor": 4, "path": None, "hub": "a/b"}})
    assert not any(p.is_absolute() for p in Job.of(hub, "encode-latents").reads)


def test_another_first_stage_means_other_settings_of_all_that_comes_of_it(latent):
    def settings(e, verb, **where):
        return Records(e).settings(Job.of(e, verb, **where))

    a, b = latent(), latent({"codec": {**CODEC, "channels": 3}})
    for verb, where in (
        ("train-first-stage", {}),
        ("encode-latents", {}),
        ("train-dense", {"search": "full", "seed": 0}),
    ):
        assert settings(a, verb, **where) != settings(b, verb, **where)
    assert settings(a, "prepare-data") == settings(b, "prepare-data")
    here, there = (latent({"codec": {**VQ, "factor": 4, "path": p}}) for p in ("here", "there"))
    assert settings(here, "encode-latents") == settings(there, "encode-latents")  # checked by hash instead
    assert settings(here, "encode-latents") != settings(
        latent({"codec": {**VQ, "kind": "kl", "factor": 4}}), "encode-latents"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset.flip": True}, "dataset.flip: images are encoded once, as they are"),
        ({"sampling.clamp": True}, "sampling.clamp: latents go beyond"),
        ({"codec": {**VQ, "factor": 3}}, "codec.factor: images of 8 pixels can't be divided by 3"),
        ({"codec": {"kind": "vq"}}, "give `path`"),
        ({"codec": {"kind": "kl", "hub": "../secrets"}}, "codec.hub"),
        ({"codec": {**CODEC, "factor": 3}}, "codec.factor"),
        ({"codec.width": 3}, "codec.width: unknown key"),
        ({"dataset": {"name": "drawn", "source": "kanjivg"}}, "encodes images"),
    ],
)  # fmt: skip
def test_what_no_first_stage_can_do_is_refused_by_name(latent, changes, words):
    with pytest.raises(UserError, match=words.replace(".", r"\.")) as error:
        latent(changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("verb", ["train-first-stage", "encode-latents", "measure-first-stage"])
def test_without_a_first_stage_its_verbs_say_so(verb, tiny):
    from ebdiff import cli

    function = {
        "train-first-stage": autoencoder.train_first_stage, "encode-latents": encode_latents,
        "measure-first-stage": measure_first_stage,
    }[verb]  # fmt: skip
    assert verb.replace("-", "_") in dir(cli) and verb in STAGES
    with pytest.raises(
        UserError, match=r"tiny: codec\.kind identity (encodes nothing|isn't trained on the data)"
    ):
        function(tiny, CPU)


# --- our own ------------------------------------------------------------------------------------------------


def test_the_autoencoder_is_what_its_rule_says(latent):
    network = autoencoder.Autoencoder(3, 5, 8)
    found = [tuple(m.weight.shape[:2]) for m in network.encoder if isinstance(m, torch.nn.Conv2d)]
    assert found == [(32, 3), (64, 32), (128, 64), (128, 128), (5, 128)]
    x = torch.randn(2, 3, 16, 16)
    assert network.encode(x).shape == (2, 5, 2, 2)
    assert network.decode(network.encode(x)).shape == x.shape


@pytest.mark.long
def test_a_trained_one_keeps_more_of_unseen_digits_than_principal_components(workspace, latent, monkeypatch):
    """Trained for a sixth of its rule's steps; of half as many components."""
    monkeypatch.setattr(autoencoder, "STEPS", 25)
    assert autoencoder.steps_of(1437, 8) == 200 and autoencoder.steps_of(64, 8) == 50
    autoencoder.train_first_stage(latent(), CPU)
    codec, unseen, seen = open_codec(latent(), CPU), open_held_out("digits"), open_pixels("digits")
    back = codec.decode(codec.encode(unseen), UNCONDITIONAL)
    assert (back.shape, back.dtype) == (unseen.shape, np.uint8)
    x, y = (a.reshape(len(a), -1).astype(float) for a in (seen, unseen))
    axes = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:8]
    linear = (y - x.mean(0)) @ axes.T @ axes + x.mean(0)
    assert np.square(back.reshape(len(y), -1) - y).mean() < np.square(linear - y).mean()


def test_its_latents_have_mean_0_and_variance_1(trained):
    z = open_codec(trained, CPU).encode(open_pixels("digits")).numpy().astype(np.float64)
    np.testing.assert_allclose(z.mean(axis=(0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(z.std(axis=(0, 2, 3)), 1, atol=1e-4)
    told = read_json(path(layout.FIRST_STAGE_LEDGER))
    assert (told["steps"], told["images"]) == (80, 80 * 64)


@pytest.mark.slow
def test_training_that_was_cut_goes_on_with_the_same_bits(workspace, latent, monkeypatch, capsys):
    e = latent({"training.save_minutes": 1e-9, "codec": {**CODEC, "factor": 2}})
    monkeypatch.setattr(autoencoder, "STEPS", 3)
    autoencoder.train_first_stage(e, CPU)
    whole = path(layout.FIRST_STAGE).read_bytes()
    path(layout.FIRST_STAGE).unlink()
    learn = autoencoder.learn

    def cut(network, optimizer, pixels, step, device):
        if step == 10:
            raise KeyboardInterrupt
        learn(network, optimizer, pixels, step, device)

    monkeypatch.setattr(autoencoder, "learn", cut)
    with pytest.raises(KeyboardInterrupt):
        autoencoder.train_first_stage(e, CPU)
    monkeypatch.setattr(autoencoder, "learn", learn)
    autoencoder.train_first_stage(e, CPU)
    assert "going on from step 10" in capsys.readouterr().out
    assert path(layout.FIRST_STAGE).read_bytes() == whole
    assert not list(Path("results").rglob("state"))


# --- the store ----------------------------------------------------------------------------------------------


def test_statistics_are_numpy_s_whatever_the_blocks():
    z = (3 + 0.5 * np.random.default_rng(0).standard_normal((70, 3, 2, 4))).astype(np.float16)
    for size in (1, 16, 70):
        mean, std = statistics(z[i : i + size] for i in range(0, 70, size))
        np.testing.assert_allclose(mean, z.astype(np.float64).mean(axis=(0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(std, z.astype(np.float64).std(axis=(0, 2, 3)), rtol=1e-9)


def test_the_store_holds_what_the_codec_makes_of_every_image(trained, monkeypatch):
    encode_latents(trained, CPU)
    latents, manifest = np.load(path(layout.LATENTS)), read_json(path(layout.LATENTS_MANIFEST))
    assert (latents.dtype, latents.shape) == (np.float16, (1437, 4, 2, 2))
    one_by_one = [open_codec(trained, CPU).encode(open_pixels("digits")[[i]]).numpy() for i in (0, 700, 1436)]
    np.testing.assert_allclose(latents[[0, 700, 1436]], np.concatenate(one_by_one), rtol=2e-3, atol=1e-3)
    assert (manifest["count"], manifest["shape"]) == (1437, [4, 2, 2])
    np.testing.assert_allclose(manifest["mean"], latents.astype(np.float64).mean(axis=(0, 2, 3)), atol=1e-9)
    np.testing.assert_allclose(manifest["std"], latents.astype(np.float64).std(axis=(0, 2, 3)), rtol=1e-9)
    for block, pixels in ((100, 2**18), (256, 64)):
        monkeypatch.setattr(first_stage, "BLOCK", block)
        monkeypatch.setattr(first_stage, "PIXELS", pixels)
        encode_latents(trained, CPU)
        np.testing.assert_allclose(np.load(path(layout.LATENTS)), latents, rtol=2e-3, atol=1e-3)


def test_training_sees_the_latents_of_its_images_under_their_labels(trained, latent):
    e = latent({"dataset.classes": 10})
    encode_latents(e, CPU)
    dataset = open_dataset(e)
    assert (len(dataset), dataset.items) == (160, e.items)
    x0, cond = dataset.batch(dataset.at(np.array([3, 0, 159])), CPU)
    stored, labels = np.load(path(layout.LATENTS)), np.load(layout.path(layout.LABELS, dataset="digits"))
    assert x0.dtype == torch.float32
    np.testing.assert_array_equal(x0, stored[[3, 0, 159]].astype(np.float32))
    assert cond.label.tolist() == labels[[3, 0, 159]].tolist()
    assert conditions(e.items, None, 0, [0, 11, 25]).label.tolist() == [0, 1, 5]
    with pytest.raises(UserError, match=r"dataset\.subset: 1,500, but digits has 1,437 to train on"):
        open_dataset(latent({"dataset.subset": 1500}))


def test_encoding_that_was_cut_encodes_no_image_twice(trained, monkeypatch, capsys):
    encode_latents(trained, CPU)
    whole, seen = np.load(path(layout.LATENTS)), []
    encode = autoencoder.SmallAutoencoder.encode

    def cut(codec, images):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(images))
        return encode(codec, images)

    monkeypatch.setattr(autoencoder.SmallAutoencoder, "encode", cut)
    with pytest.raises(KeyboardInterrupt):
        encode_latents(trained, CPU)
    assert not path(layout.LATENTS_MANIFEST).exists()
    monkeypatch.setattr(autoencoder.SmallAutoencoder, "encode", encode)
    encode_latents(trained, CPU)
    assert "going on, 3 batches are there" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(path(layout.LATENTS)), whole)


def test_latents_of_another_first_stage_are_refused_in_one_line(trained, latent, monkeypatch):
    encode_latents(trained, CPU)
    open_codec(trained, CPU)
    with pytest.raises(UserError, match=r"latents\.npy: made for other settings; remake it"):
        Records(latent({"codec": {**CODEC, "channels": 3}})).check(path(layout.LATENTS))
    monkeypatch.setattr(autoencoder, "STEPS", 1)  # weights replaced behind everybody's back
    autoencoder.train_first_stage(trained, CPU)
    with pytest.raises(
        UserError, match=r"latents\.npy: made by another first stage than that of now; remake"
    ) as error:
        open_codec(trained, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_what_encoding_loses_is_measured_on_stored_latents(trained):
    encode_latents(trained, CPU)
    train_classifier(trained)
    reference_stats(trained, "classifier")
    found = measure_first_stage(trained)
    codec, pixels, unseen = open_codec(trained, CPU), open_pixels("digits"), open_held_out("digits")
    back = codec.decode(torch.from_numpy(np.load(path(layout.LATENTS)).astype(np.float32)), UNCONDITIONAL)
    rmse = np.sqrt(np.mean((back.astype(float) - pixels) ** 2))
    assert found["rmse"] == pytest.approx(rmse, rel=1e-6)
    held_out = codec.decode(codec.encode(unseen), UNCONDITIONAL).astype(float)
    assert found["held_out_rmse"] == pytest.approx(np.sqrt(np.mean((held_out - unseen) ** 2)), rel=1e-6)
    extract = Extractor.open("classifier", "digits", trained.evaluation, CPU).features
    fd = frechet_distance(Gaussian.fit(extract(back)), Gaussian.fit(extract(np.array(pixels))))
    assert found["protocols"]["classifier"]["fd"] == pytest.approx(fd, rel=1e-6)
    assert found["images"] == 1437 and found["trained_here"]


# --- those of diffusers -------------------------------------------------------------------------------------


@pytest.fixture
def saved(workspace):
    """Small networks with random weights, as diffusers saves them, in the folder `weights`."""
    pytest.importorskip("diffusers")
    from ebdiff.nets.diffusers_ import diffusers_for

    def save(kind, **config):
        torch.manual_seed(0)
        usual = dict(
            in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
        network = getattr(diffusers_for("test"), kind)(**{**usual, **config}).eval()
        network.save_pretrained("weights")
        return network

    return save


@torch.no_grad()
def test_vq_latents_are_what_comes_before_quantisation_which_decoding_does(saved, latent):
    network = saved("VQModel")
    e = latent({"codec": VQ})
    codec, pixels = open_codec(e, CPU), open_pixels("digits")[:5]
    z = network.quant_conv(network.encoder(to_float(torch.tensor(pixels))))
    np.testing.assert_allclose(codec.encode(pixels), z, atol=1e-6)
    codes = network.quantize.embedding.weight
    flat = z.permute(0, 2, 3, 1).reshape(-1, 3)
    nearest = codes[torch.cdist(flat, codes).argmin(dim=1)].reshape(5, 4, 4, 3).permute(0, 3, 1, 2)
    image = network.decoder(network.post_quant_conv(nearest))
    assert np.abs(codec.decode(z, UNCONDITIONAL).astype(int) - to_uint8(image)).max() <= 1


@torch.no_grad()
def test_kl_latents_are_the_posterior_s_mean_times_the_scale(saved, latent):
    network = saved("AutoencoderKL")
    codec = open_codec(latent({"codec": {**VQ, "kind": "kl", "scale": 0.5}}), CPU)
    pixels = open_pixels("digits")[:5]
    mean = network.quant_conv(network.encoder(to_float(torch.tensor(pixels))))[:, :3]
    np.testing.assert_allclose(codec.encode(pixels), 0.5 * mean, atol=1e-6)
    image = network.decoder(network.post_quant_conv(mean))
    assert np.abs(codec.decode(0.5 * mean, UNCONDITIONAL).astype(int) - to_uint8(image)).max() <= 1


def test_they_are_encoded_like_ours_and_swapped_weights_are_noticed(saved, latent):
    saved("VQModel")
    e = latent({"codec": VQ})
    encode_latents(e, CPU)
    assert np.load(path(layout.LATENTS)).shape == (1437, 3, 4, 4)
    saved("VQModel", layers_per_block=2)
    with pytest.raises(UserError, match="made by another first stage"):
        open_codec(e, CPU)


@pytest.mark.parametrize(
    ("kind", "config", "codec", "words"),
    [
        ("VQModel", {}, {"channels": 4}, r"codec\.channels and codec\.factor: .* makes latents \(3, 2, 2\)"),
        ("VQModel", {}, {"factor": 4}, r"makes latents \(3, 4, 4\) of images of 8 pixels, not \(3, 2, 2\)"),
        ("VQModel", {"in_channels": 3}, {}, "doesn't encode images of 1 channels"),
        ("AutoencoderKL", {}, {}, r"codec\.kind vq, weights: holds AutoencoderKL, not VQModel"),
    ],
)  # fmt: skip
def test_another_s_weights_are_refused_in_one_line(saved, latent, kind, config, codec, words):
    saved(kind, **config)
    with pytest.raises(UserError, match=words) as error:
        open_codec(latent({"codec": {**VQ, **codec}}), CPU)
    assert "\n" not in str(error.value)


def test_weights_that_don_t_fit_their_config_are_refused(saved, latent):
    saved("VQModel")
    config = Path("weights/config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "layers_per_block": 2}))
    with pytest.raises(UserError, match="these weights are another architecture's"):
        open_codec(latent({"codec": VQ}), CPU)
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "layers_per_block": 1, "block_out_channels": [8, 16]})
    )
    with pytest.raises(UserError, match="these weights can't be used"):
        open_codec(latent({"codec": VQ}), CPU)
    next(Path("weights").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="these weights can't be used"):
        open_codec(latent({"codec": VQ}), CPU)


def test_what_isn_t_there_is_told(workspace, latent, monkeypatch):
    with pytest.raises(UserError, match=r"codec\.path nowhere: no config\.json there"):
        open_codec(latent({"codec": {**VQ, "path": "nowhere"}}), CPU)
    with pytest.raises(
        UserError, match=r"codec\.path: nothing is left of '\$\{UNSET_VQ:-\}'; set it, or codec\.hub"
    ):
        open_codec(latent({"codec": {**VQ, "path": "${UNSET_VQ:-}"}}), CPU)
    Path("weights").mkdir()
    Path("weights/config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "diffusers.utils.import_utils", None)
    with pytest.raises(UserError, match=r"codec\.kind vq needs diffusers: pip install 'ebdiff\[latent\]'"):
        open_codec(latent({"codec": VQ}), CPU)


def test_a_gated_repository_says_what_to_do(saved, latent, monkeypatch):
    def refuse(name, **_):
        raise OSError(f"403 Client Error. Cannot access gated repo for url https://x/{name}.\nAsk for it.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError) as error:
        open_codec(latent({"codec": {"kind": "vq", "hub": "owner/name/vqvae"}}), CPU)
    assert "codec.hub owner/name/vqvae: can't be had (403" in str(error.value)
    assert "export HF_TOKEN, or set codec.path to a local copy" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_gated_dataset_without_a_token_says_what_to_do(monkeypatch):
    def refuse(name, split):
        raise FileNotFoundError(f"Dataset '{name}' is a gated dataset on the Hub. You must be authenticated.")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=refuse))
    with pytest.raises(
        UserError, match=r"dataset\.hub a/b, split train: .*export HF_TOKEN, or set dataset\.path"
    ):
        archives.from_hub("a/b")


# --- handed over --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "modules"),
    [
        (CODEC, {"decoder"}),
        (VQ, {"decoder", "post_quant_conv", "quantize"}),
        ({**VQ, "kind": "kl", "scale": 0.5}, {"decoder", "post_quant_conv"}),
    ],
    ids=["autoencoder", "vq", "kl"],
)
def test_an_exported_ensemble_decodes_with_the_same_bits_elsewhere(
    workspace, tmp_path_factory, monkeypatch, capsys, request, codec, modules
):
    """Where there is neither project nor first stage; its encoder stays behind."""
    kind = codec["kind"]
    if kind == "autoencoder":
        kills.fresh(request.getfixturevalue("first_stage_of_digits") / "results", workspace / "results")
    else:
        request.getfixturevalue("saved")({"vq": "VQModel", "kl": "AutoencoderKL"}[kind])
        codec = {**codec, "path": str(workspace / "weights")}
    write_experiment(workspace, {**LATENT, "codec": codec, "dataset.classes": 10})
    e = load.load("tiny")
    encode_latents(e, CPU)
    untrained(e)
    drawn(e)
    whole = np.load(layout.path(layout.SAMPLES, experiment="tiny", seed=0, run="ta-eb"))
    assert stages.run("export", "tiny", "--run", "ta-eb", "ensemble.safetensors") == 0
    card = Path("ensemble.md").read_text()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    content = Path("ensemble.safetensors").rename(elsewhere / "ensemble.safetensors").read_bytes()
    shutil.rmtree(workspace)
    monkeypatch.chdir(elsewhere)
    np.testing.assert_array_equal(ebdiff.load("ensemble.safetensors").sample(23), whole)
    assert stages.run("draw", "ensemble.safetensors", "-n", 3, "--out", "drawn") == 0
    np.testing.assert_array_equal(np.asarray(Image.open("drawn/images/00002.png")), whole[2, ..., 0])
    with safe_open("ensemble.safetensors", "np") as file:
        held = {n: file.get_tensor(n).size for n in file.keys() if n.startswith("codec.")}  # noqa: SIM118
    assert {n.split(".")[1] for n in held} == modules
    assert f"first stage, {sum(held.values()):,} parameters" in card and f"kind {kind}" in card
    assert str(workspace) not in card and str(workspace).encode() not in content
    # Another decoder than the tensors'.
    for there, other in (
        (b'\\"channels\\": 4', b'\\"channels\\": 5'),
        (b"[8, 8]", b"[8, 4]"),
        (b"[8, 8]", b"[8, x]"),
    ):
        if there in content:
            Path("wrong.safetensors").write_bytes(content.replace(there, other))
            capsys.readouterr()
            assert stages.run("draw", "wrong.safetensors", "--out", "wrong") == 1
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert "tensors don't fit" in line or "holds no" in line


# --- whole, and killed --------------------------------------------------------------------------------------

RUN = (
    "import sys; from ebdiff.codecs import autoencoder as a; a.STEPS = 5; from ebdiff import cli; cli.main()"
)


def command(*words):
    return [sys.executable, "-c", RUN, *words]


@pytest.mark.long
def test_killed_while_training_or_encoding_they_go_on_with_the_same_bits(tmp_path, digits):
    """SIGKILL whenever a state was saved, twice; then a SIGTERM."""
    codec = {**CODEC, "factor": 2}
    write_experiment(tmp_path / "before", {**LATENT, "codec": codec, "training.save_minutes": 1e-6})
    kills.fresh(digits / "resources", tmp_path / "before/resources")
    calm = kills.fresh(tmp_path / "before", tmp_path / "calm")
    for verb in ("train-first-stage", "encode-latents"):
        before = kills.fresh(calm, tmp_path / "before")
        assert kills.ended(kills.start(calm, *command(verb, "tiny")), calm)[0] == 0
        here = kills.fresh(before, tmp_path / "here")
        for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
            process = kills.start(here, *command(verb, "tiny"))
            if kills.wait_until(process, kills.saved(here)):
                process.send_signal(number)
            status, said = kills.ended(process, here)
            assert status in (0, -number, 128 + number), said
            assert kills.wrong(here, calm) == []
        status, said = kills.ended(kills.start(here, *command(verb, "tiny")), here)
        assert status == 0, said
        assert "going on" in said
        assert kills.wrong(here, calm) == []
        assert kills.products(here) == kills.products(calm)
        assert kills.leftovers(here) == []


@pytest.mark.slow
def test_a_latent_run_goes_from_images_to_tables_through_every_verb(workspace, short):
    write_experiment(workspace, {**LATENT, "codec": {**CODEC, "factor": 2}, "dataset.classes": 10})
    first = [("train-first-stage", "tiny"), ("encode-latents", "tiny")]
    for words in (*first, *stages.STAGES, ("measure-first-stage", "tiny"), stages.TABLE):
        assert stages.run(*words) == 0, words
    folder = layout.path(layout.RUN, experiment="tiny", seed=0, run="eb-50")
    items, images = np.load(folder / "items.npy"), np.load(folder / "samples.npy")
    assert (items.shape, images.shape, images.dtype) == ((23, 4, 4, 4), (23, 8, 8, 1), np.uint8)
    decoded = open_codec(load.load("tiny"), CPU).decode(torch.from_numpy(items), UNCONDITIONAL)
    assert np.abs(decoded.astype(int) - images).max() <= 1
    assert read_json(folder / "metrics.json")["codec"]["kind"] == "autoencoder"
    table = layout.path(layout.TABLE, experiment="tiny", table="table4", ext="md").read_text()
    assert "First stage: our own small autoencoder" in table
    assert "a latent holds 100 % of the values of an image" in table


@pytest.mark.long
def test_encoding_holds_the_same_memory_for_ten_times_the_images(tmp_path, monkeypatch):
    import test_bounded
    from test_bounded import FEW, MANY, RAW, peak

    raw = changed(RAW, {"codec": CODEC, "dataset.flip": False, "sampling.clamp": False})
    monkeypatch.setattr(test_bounded, "RAW", raw)
    monkeypatch.chdir(tmp_path)
    e = load.parse(raw, "x.yaml")
    work = "from ebdiff.codecs import first_stage as f\nf.encode_latents(experiment, torch.device('cpu'))"
    found = []
    for images in (FEW, MANY):
        rows = np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), np.uint8)
        place = layout.path(layout.IMAGES, dataset="data")
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(place, rows)
        place.with_name("manifest.json").write_text(json.dumps({"count": images}))
        vouch(e, "prepare-data")
        if images == FEW:
            monkeypatch.setattr(autoencoder, "STEPS", 1)
            autoencoder.train_first_stage(e, CPU)
        else:
            vouch(e, "train-first-stage")
        found.append(peak(tmp_path, images, work))
    print(f"encoding {FEW} and {MANY} images: {found[0]:.0f} and {found[1]:.0f} MB")
    assert np.load(path(layout.LATENTS), mmap_mode="r").shape == (MANY, 4, 8, 8)
    assert found[1] - found[0] < 30  # the images alone are 55 MB
