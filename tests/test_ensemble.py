"""Finished experts as one object: drawn from, used in Python, handed over as one file."""

import hashlib
import re
import signal
import subprocess
import sys
from pathlib import Path

import kills
import numpy as np
import pytest
import torch
from conftest import write_experiment
from PIL import Image
from stages import run
from test_diffusion import drawn, experts, untrained  # noqa: F401 (a fixture)

import ebdiff
from ebdiff.data import archives
from ebdiff.data.images import Files
from ebdiff.diffusion import sample
from ebdiff.experiment import layout, load
from ebdiff.system.errors import UserError
from ebdiff.system.files import read_json
from ebdiff.system.interrupts import Interrupted

# As in the documentation: what somebody who trained an ensemble does with it.
EXAMPLE = """
import ebdiff

ensemble = ebdiff.load("tiny", "ta-eb")
images = ensemble.sample(23, seed=0)  # uint8 (23, 8, 8, 1)
print(ensemble.spans)  # timesteps that each expert serves
print([widths["conv_in.weight"] for widths in ensemble.widths])

import torch
x = torch.randn(2, 1, 8, 8)
print(ensemble.denoiser(x, t=700).shape)
"""


@pytest.fixture
def project(experts):  # noqa: F811
    """A project whose TA-EB run has experts, and samples of theirs: its folder."""
    write_experiment(experts)
    drawn(load.load("tiny"))
    return experts


def samples():
    return np.load(layout.path(layout.SAMPLES, experiment="tiny", seed=0, run="ta-eb"))


def state_of(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_the_example_runs(project):
    code = EXAMPLE + "\nimport numpy; numpy.save('images.npy', images)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[(0, 240), (240, 1000)]", "[8, 8]", "torch.Size([2, 1, 8, 8])"]
    np.testing.assert_array_equal(np.load("images.npy"), samples())


def test_importing_the_package_is_cheap():
    code = "import ebdiff, sys; print(sorted(m for m in sys.modules if m in ('torch', 'numpy', 'pydantic')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_image_depends_on_its_seed_and_number(project):
    ensemble = ebdiff.load("tiny", "ta-eb")
    np.testing.assert_array_equal(ensemble.sample(20), samples()[:20])
    again = ensemble.sample(20, seed=7)
    assert (again != samples()[:20]).mean() > 0.3
    np.testing.assert_array_equal(ensemble.draw(list(range(10, 20)), 7).images, again[10:])


def test_predicted_noise_is_that_of_the_expert_that_serves_the_timestep(project):
    ensemble = ebdiff.load("tiny", "ta-eb")
    x = torch.randn(3, 1, 8, 8)
    for t, i in ((0, 0), (239, 0), (240, 1), (999, 1)):
        from ebdiff.nets import store

        network = store.build(ensemble.experts[i].architecture, ensemble.experts[i].tensors).eval()
        with torch.no_grad():
            expected = network(x, torch.full((3,), t))
        assert torch.equal(ensemble.denoiser(x, t), expected)
    with pytest.raises(UserError, match="timesteps are 0 to 999"):
        ensemble.denoiser(x, 1000)


def test_other_sampling_settings_for_once(project):
    ensemble, seen = ebdiff.load("tiny", "ta-eb"), []
    router = ensemble.router
    ensemble.__dict__["router"] = lambda x, t, cond: seen.append(t) or router(x, t, cond)
    short = ensemble.sample(2, steps=3, spacing="uniform")
    assert seen == [999, 666, 333, 0] and short.shape == (2, 8, 8, 1)
    for wrong, words in (({"stepps": 3}, "sampling.stepps"), ({"steps": 0}, "sampling.steps: ")):
        with pytest.raises(UserError, match=words):
            ensemble.sample(2, **wrong)
    with pytest.raises(UserError, match="label 3: it knows no classes"):
        ensemble.sample(2, label=3)


def test_draw_writes_images_and_leaves_results_alone(project, capsys):
    before = state_of(project / "results")
    where = ("--run", "ta-eb", "--out", "drawn", "-n", 12)
    assert run("draw", "tiny", *where, "--noise-seed", 0) == 0
    assert state_of(project / "results") == before
    assert sorted(p.name for p in Path("drawn").iterdir()) == ["grid.png", "images"]
    assert sorted(p.name for p in Path("drawn/images").iterdir()) == [f"{i:05d}.png" for i in range(12)]
    images = np.stack([np.asarray(Image.open(f"drawn/images/{i:05d}.png")) for i in range(12)])
    np.testing.assert_array_equal(images, samples()[:12, ..., 0])
    assert run("draw", "tiny", *where) == 1
    assert "drawn: exists already; name a new folder with --out" in capsys.readouterr().err


GUIDED = {"dataset.classes": 10, "training.label_dropout": 0.1}


def test_guidance_of_one_is_none_and_of_two_is_asked_for(experts):  # noqa: F811
    """eps_null + w (eps_class - eps_null)."""
    write_experiment(experts, GUIDED)
    untrained(load.load("tiny"))
    drawn(load.load("tiny"))
    found = {}
    for w in (None, 1, 2):
        words = () if w is None else ("--guidance", w)
        assert run("draw", "tiny", "--run", "ta-eb", "-n", 3, "--label", 3, *words, "--out", f"w{w}") == 0
        found[w] = np.stack([np.asarray(Image.open(f"w{w}/images/{i:05d}.png")) for i in range(3)])
    assert (
        np.abs(found[1].astype(int) - found[None]).max() <= 1 < np.abs(found[2].astype(int) - found[1]).max()
    )
    asked = ebdiff.load("tiny", "ta-eb").sample(3, label=3, guidance=2.0)
    np.testing.assert_array_equal(found[2], asked[..., 0])


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({}, ("--guidance", 2), "sampling.guidance: the network is told no classes"),
        ({"dataset.classes": 10}, ("--guidance", 2), "the network never learns to do without"),
        (GUIDED, ("--guidance", -1), "sampling.guidance: "),
        (GUIDED, ("--guidance", "nan"), "sampling.guidance: "),
        (GUIDED, ("--label", 10), "label 10: classes are 0 to 9"),
    ],
)  # fmt: skip
def test_what_no_network_here_can_draw_is_refused_before_anything_is_written(
    experts, capsys, changes, arguments, words  # noqa: F811
):  # fmt: skip
    write_experiment(experts, changes)
    untrained(load.load("tiny"))
    drawn(load.load("tiny"))
    before = sorted(Path().iterdir())
    capsys.readouterr()
    assert run("draw", "tiny", "--run", "ta-eb", *arguments, "--out", "new/drawn") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert sorted(Path().iterdir()) == before


def test_drawing_that_was_ended_leaves_nothing(project, monkeypatch):
    image, before, numbers = sample._image, sorted(Path().iterdir()), iter(range(5))

    def cut(pixels):
        if next(numbers, None) is None:
            raise Interrupted(signal.SIGINT)
        return image(pixels)

    monkeypatch.setattr(sample, "_image", cut)
    assert run("draw", "tiny", "--run", "ta-eb", "--out", "drawn") == 128 + signal.SIGINT
    assert sorted(Path().iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_drawing_that_was_killed_leaves_no_folder_and_the_next_one_tidies_up(project, number):
    command = ("ebdiff", "draw", "tiny", "--run", "ta-eb", "--out", "drawn", "-n")
    process = kills.start(project, *command, "20000")
    assert kills.wait_until(process, lambda: any(project.glob(".drawn.*/drawn/images/00019.png")))
    process.send_signal(number)
    status, said = kills.ended(process, project)
    killed = number == signal.SIGKILL
    assert (status, len(list(Path().glob(".drawn.*")))) == ((-number, 1) if killed else (128 + number, 0)), (
        said
    )
    assert not Path("drawn").exists()
    assert run(*command[1:], 3) == 0
    assert len(list(Path("drawn/images").iterdir())) == 3 and not list(Path().glob(".drawn.*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tiny",), "say which run: eb-50, ta-eb, unpruned"),
        (("tiny", "--run", "ta_eb"), "did you mean 'ta-eb'?"),
        (("tiny", "--run", "eb-50"), "make it with `snakemake --cores all results/tiny"),
        (("nothing.safetensors",), "nothing.safetensors: missing; give a file"),
        (("whole.safetensors", "--run", "eb-50"), "is one run's already; leave out 'eb-50'"),
    ],
)
def test_what_cant_be_drawn_from_is_one_line(project, capsys, arguments, words):
    assert run("draw", *arguments, "--out", "drawn") == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and words in errors[0]
    assert not Path("drawn").exists()


# --- handed over -----------------------------------------------------------------------------------------


@pytest.fixture
def exported(project, capsys):
    assert run("export", "tiny", "--run", "ta-eb", "ensemble.safetensors") == 0
    assert capsys.readouterr().out.splitlines() == ["ensemble.safetensors", "ensemble.md"]
    return project


def test_a_file_draws_the_same_images_where_there_is_no_project(exported, tmp_path_factory, monkeypatch):
    whole, checkpoints = samples(), list(exported.glob("results/tiny/seed0/experts/*/*.safetensors"))
    file = exported / "ensemble.safetensors"
    share = file.stat().st_size / sum(path.stat().st_size for path in checkpoints)
    assert len(checkpoints) == 2 and 0.24 < share < 0.3
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    ensemble = ebdiff.load(file)
    np.testing.assert_array_equal(ensemble.sample(23), whole)
    assert ensemble.spans == [(0, 240), (240, 1000)]
    assert ensemble.story["data"]["licence"] == "CC BY 4.0"
    assert run("draw", file, "-n", 3, "--out", "drawn") == 0
    np.testing.assert_array_equal(np.asarray(Image.open("drawn/images/00002.png")), whole[2, ..., 0])


def test_the_card_tells_what_it_is_and_nothing_of_this_machine(exported):
    card = Path("ensemble.md").read_text()
    for words in (
        'ebdiff.load("ensemble.safetensors")', "| 0-240 | 0-260 | 30 % pruned |", "Not measured.",
        "CC BY 4.0", "uint8 (16, 8, 8, 1)",
        hashlib.sha256(Path("ensemble.safetensors").read_bytes()).hexdigest(),
    ):  # fmt: skip
        assert words in card
    assert str(exported) not in card
    assert str(exported).encode() not in Path("ensemble.safetensors").read_bytes()


# --- scored ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_images_that_were_drawn_get_the_score_of_their_run(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(made)
    out, before = tmp_path / "drawn", state_of(made)
    assert run("draw", "tiny", "--run", "eb-50", "-n", 23, "--out", out) == 0
    capsys.readouterr()
    assert run("score", out / "images", "--against", "tiny") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert state_of(made) == before
    metrics = read_json(layout.path(layout.METRICS, experiment="tiny", seed=0, run="eb-50"))
    expected = f"classifier Fréchet distance {metrics['fd']:.2f}, kernel distance {metrics['kid']:.4f}, "
    assert first.startswith(expected)
    assert "23 images against all images of digits" in second
    assert re.search(r", precision [01]\.\d{3}, recall [01]\.\d{3}$", first)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (["L8"] * 3, "3 images are too few, 4 at least"),
        (["L8"] * 4, "make it with `snakemake --cores all resources/data/digits/reference"),
    ],
)
def test_what_cant_be_scored_is_one_line(workspace, capsys, images, words):
    write_experiment(workspace)
    pictures("given", images)
    assert run("score", "given", "--against", "tiny") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def pictures(folder, kinds):
    """Images of a mode and size: L8 is grey, 8x8."""
    Path(folder).mkdir()
    for i, kind in enumerate(kinds):
        image = Image.new(kind.rstrip("0123456789"), (int(kind.lstrip("LRGB")),) * 2, 3 * i)
        image.save(f"{folder}/{i}.png")
    return Files(list(archives.folder(Path(folder)).items()), (8, 8, 1))


def test_files_are_an_array_of_images_of_one_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = pictures("given", ["L8", "L8", "RGB8", "L9"])
    np.testing.assert_array_equal(found[np.array([1, 0])], np.repeat([3, 0], 64).reshape(2, 8, 8, 1))
    assert found[np.array([2])].shape == (1, 8, 8, 1) and len(found) == 4
    with pytest.raises(UserError, match=r"given/3\.png: 9x9 pixels, but the real images have 8x8"):
        found[np.arange(4)]
    Path("given/1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"given/1\.png: not one of"):
        found[np.arange(4)]


@pytest.mark.slow
def test_a_measured_run_has_its_numbers_on_the_card(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    assert run("export", "tiny", "--run", "eb-50", tmp_path / "eb.safetensors") == 0
    metrics = read_json(layout.path(layout.METRICS, experiment="tiny", seed=0, run="eb-50"))
    card = (tmp_path / "eb.md").read_text()
    assert f"| cFD ‡ | {metrics['fd']:.2f} |" in card and metrics["protocols"]["classifier"]["mode"] in card


def test_exporting_writes_over_nothing(exported, capsys):
    before = Path("ensemble.safetensors").read_bytes()
    for name, words in (("ensemble.safetensors", "exists already"), ("ensemble.pt", "NAME.safetensors")):
        assert run("export", "tiny", "--run", "ta-eb", name) == 1
        assert words in capsys.readouterr().err
    assert Path("ensemble.safetensors").read_bytes() == before


def test_what_is_no_ensemble_is_one_line(exported, capsys):
    whole = Path("ensemble.safetensors").read_bytes()
    (checkpoint, _) = exported.glob("results/tiny/seed0/experts/*/*.safetensors")
    for wrong in (b"", whole[:1000], whole[: len(whole) // 2], checkpoint.read_bytes()):
        Path("wrong.safetensors").write_bytes(wrong)
        assert run("draw", "wrong.safetensors", "--out", "drawn") == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "wrong.safetensors: " in line and "give a file that `ebdiff export` wrote" in line
    size = int.from_bytes(whole[:8], "little")
    for key in ("codec", "decoder", "experts", "items", "sampling", "serve", "config", "timesteps"):
        header = whole[8 : 8 + size].replace(f'\\"{key}\\"'.encode(), f'\\"{"x" * len(key)}\\"'.encode())
        Path("wrong.safetensors").write_bytes(whole[:8] + header + whole[8 + size :])
        assert run("draw", "wrong.safetensors", "--out", "drawn") == 1, key
        assert "holds no ensemble" in capsys.readouterr().err
