import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from ebdiff.data.dataset import Images, open_dataset, open_pixels
from ebdiff.data.sources import prepare
from ebdiff.experiment.records import Work
from ebdiff.nets import store
from ebdiff.pruning.graph import trace
from ebdiff.pruning.importance import magnitude
from ebdiff.pruning.select import select
from ebdiff.pruning.surgery import cut
from ebdiff.system import files
from ebdiff.system.draws import generator
from ebdiff.system.errors import UserError

STORY = {"ticket": "é†", "rate": 0.5, "distances": [0.1, 0.2], "none": None}

LOADING = """
import sys, numpy as np, torch
from pathlib import Path
from ebdiff.nets import store
torch.set_num_threads(1)
tensors, architecture, story = store.load(Path(sys.argv[1]))
network = store.build(architecture, tensors).eval()
x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 1, 8, 8), np.float32))
with torch.no_grad():
    np.save(sys.argv[2], network(x, torch.tensor([0, 700])).numpy())
"""


def tensors_of(e, rate):
    network = store.fresh(e.architecture, 0, "test")
    tensors = {n: p.detach() for n, p in network.named_parameters()}
    if rate == 0:
        return tensors
    return cut(e.architecture, tensors, select(trace(e.architecture), magnitude(tensors), rate))


@pytest.mark.parametrize("rate", [0, 0.5])
def test_a_network_gives_the_same_outputs_in_a_fresh_process(tmp_path, tiny, rate):
    tensors = tensors_of(tiny, rate)
    path, output = tmp_path / "net.safetensors", tmp_path / "out.npy"
    store.save(path, tensors, tiny.architecture, STORY)
    subprocess.run([sys.executable, "-c", LOADING, path, output], check=True)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 1, 8, 8), np.float32))
    torch.set_num_threads(1)
    with torch.no_grad():
        expected = store.build(tiny.architecture, tensors).eval()(x, torch.tensor([0, 700])).numpy()
    np.testing.assert_array_equal(np.load(output), expected)
    assert expected.std() > 0


def test_a_pruned_network_is_smaller(tiny):
    sizes = [sum(t.numel() for t in tensors_of(tiny, rate).values()) for rate in (0, 0.5, 0.8)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] < 0.4 * sizes[0]


def test_architecture_story_and_prefix_come_back(tmp_path, tiny):
    path = tmp_path / "deep/net.safetensors"
    a, b = tensors_of(tiny, 0), tensors_of(tiny, 0.5)
    both = {**{f"raw.{n}": t for n, t in a.items()}, **{f"ema.{n}": t for n, t in b.items()}}
    store.save(path, both, tiny.architecture, STORY)
    tensors, architecture, story = store.load(path, "ema.")
    assert (architecture, story, store.story(path)) == (tiny.architecture, STORY, STORY)
    assert tensors.keys() == b.keys()
    assert all(torch.equal(tensors[n], b[n]) for n in b)


def test_views_and_channels_last_are_stored(tmp_path, tiny):
    tensors = tensors_of(tiny, 0)
    odd = {
        n: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for n, t in tensors.items()
    }
    store.save(tmp_path / "n.safetensors", odd, tiny.architecture, {})
    found = store.load(tmp_path / "n.safetensors")[0]
    assert all(torch.equal(found[n], tensors[n]) for n in tensors)


def test_a_built_network_owns_its_weights(tiny):
    tensors = tensors_of(tiny, 0)
    before = tensors["conv_in.weight"].clone()
    store.build(tiny.architecture, tensors).conv_in.weight.data.zero_()
    assert torch.equal(tensors["conv_in.weight"], before)


def damage(kind, path):
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(b"\x80\x04garbage" * 50)


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "garbage"])
@pytest.mark.parametrize("read", [store.load, store.story], ids=["load", "story"])
def test_a_damaged_network_is_one_line_that_names_the_file(tmp_path, tiny, kind, read):
    path = tmp_path / "net.safetensors"
    store.save(path, tensors_of(tiny, 0), tiny.architecture, STORY)
    damage(kind, path)
    with pytest.raises(UserError, match=r"net\.safetensors") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, tmp_path / "f.safetensors")
    with pytest.raises(UserError, match=r"f\.safetensors"):
        store.load(tmp_path / "f.safetensors")
    with pytest.raises(UserError, match=r"f\.safetensors"):
        store.story(tmp_path / "f.safetensors")


def test_tensors_of_another_architecture_are_refused(tiny, vary):
    with pytest.raises(UserError, match="don't fit"):
        store.build(vary({"network.blocks": 2}).architecture, tensors_of(tiny, 0))
    with pytest.raises(UserError, match="don't fit"):
        store.build(vary({"network.middle_attention": False}).architecture, tensors_of(tiny, 0))


def test_fresh_weights_follow_seed_and_stream(tiny):
    def weights(seed, stream):
        return store.fresh(tiny.architecture, seed, stream).down[0].block[0].conv1.weight.detach()

    assert torch.equal(weights(0, "a"), weights(0, "a"))
    assert not torch.equal(weights(0, "a"), weights(1, "a"))
    assert not torch.equal(weights(0, "a"), weights(0, "b"))
    # U(-b, b), b = 1 / sqrt(8 channels x 9): standard deviation b / sqrt(3).
    found = torch.cat([weights(seed, "a").flatten() for seed in range(20)])
    assert found.abs().max() <= 72**-0.5
    assert found.std().item() == pytest.approx(72**-0.5 / 3**0.5, rel=0.03)


# --- layers of every kind -----------------------------------------------------------------------------------


def layers(width, deep=2):
    """One of each kind; `width` tells their sizes."""
    return nn.ModuleDict({
        "linear": nn.Linear(3 * width, width),
        "one": nn.Conv1d(width, 2 * width, 3),
        "two": nn.Conv2d(2 * width, width, 3, groups=width),
        "three": nn.Conv3d(2, width, 1),
        "group": nn.GroupNorm(2, 2 * width),
        "layer": nn.LayerNorm(width),
        "bare": nn.LayerNorm(width, elementwise_affine=False),
        "gru": nn.GRU(width, 2 * width, num_layers=deep, bidirectional=True),
        "class": nn.Embedding(5, width),
    })  # fmt: skip


def test_fresh_weights_are_the_literal_draws_of_each_layer():
    network, seed = layers(4), 7
    store.initialise(network, seed, "s")

    def drawn(name, bound):
        index = 1 + list(network).index(name)  # of all modules; the first is the whole
        draws = generator(seed, "s/init", index)
        for parameter in network[name].parameters():
            expected = draws.uniform(-bound, bound, tuple(parameter.shape)).astype(np.float32)
            np.testing.assert_array_equal(parameter.detach().numpy(), expected)

    drawn("linear", 12**-0.5)  # its inputs
    drawn("one", (4 * 3) ** -0.5)  # channels times kernel
    drawn("two", (2 * 3 * 3) ** -0.5)  # of one of its groups
    drawn("three", 2**-0.5)
    drawn("gru", 8**-0.5)  # its hidden size, biases too
    assert len(list(network["gru"].parameters())) == 16
    expected = generator(seed, "s/init", 9).standard_normal((5, 4)).astype(np.float32)
    np.testing.assert_array_equal(network["class"].weight.detach().numpy(), expected)
    for name in ("group", "layer"):
        assert (network[name].weight == 1).all()
        assert not network[name].bias.any()


def test_bounds_are_those_of_pytorchs_own_initialisation():
    torch.manual_seed(0)
    own, ours = layers(16), layers(16)
    store.initialise(ours, 0, "s")
    for (name, a), b in zip(own.named_parameters(), ours.parameters(), strict=True):
        if a.numel() > 30 and a.std() > 0:
            assert b.std().item() == pytest.approx(a.std().item(), rel=0.35), name
            if not name.startswith("class"):
                assert b.abs().max().item() == pytest.approx(a.abs().max().item(), rel=0.15), name


class Positions(nn.Module):
    """A table of its own."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.empty(3, 4))


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (nn.Sequential(nn.Linear(2, 2), Positions()), r"1 \(Positions\)"),
        (Positions(), r"the whole \(Positions\)"),
        (nn.ModuleDict({"norm": nn.BatchNorm2d(3)}), r"norm \(BatchNorm2d\)"),
        (nn.ModuleDict({"rnn": nn.LSTM(3, 3)}), r"rnn \(LSTM\)"),
    ],
)
def test_layers_that_nothing_can_initialise_are_refused(network, named):
    with pytest.raises(UserError, match=named) as error:
        store.initialise(network, 0, "s")
    assert "\n" not in str(error.value)


def test_every_layer_adopts_the_shapes_of_a_smaller_one():
    torch.manual_seed(0)
    small, found = layers(4), layers(8)
    store.adopt_shapes(found, dict(small.named_parameters()))
    found.load_state_dict(small.state_dict(), assign=True)
    x = torch.randn(5, 1, 4)  # steps, items, width
    inputs = {
        "linear": torch.randn(2, 12), "one": torch.randn(2, 4, 6), "three": torch.randn(2, 2, 3, 3, 3),
        "group": torch.randn(2, 8, 3), "layer": x, "gru": x, "class": torch.tensor([4, 0]),
    }  # fmt: skip
    for name, given in inputs.items():
        a, b = small[name](given), found[name](given)
        a, b = (a[0], b[0]) if name == "gru" else (a, b)
        assert torch.equal(a, b), name
        assert repr(small[name]) == repr(found[name])


def test_a_built_network_with_a_missing_tensor_names_it(tiny):
    tensors = tensors_of(tiny, 0)
    del tensors["mid.block_1.conv1.bias"]
    with pytest.raises(UserError, match=r"don't fit .*mid\.block_1\.conv1\.bias"):
        store.build(tiny.architecture, tensors)


# --- whole files ----------------------------------------------------------------------------------------


def test_an_exception_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("half")
        assert temporary.suffix == ".json"
        assert files.read_json(path) == {"old": 1}
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert files.read_json(path) == {"old": 1}


def test_a_new_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new/b.txt"
    with files.replacing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert len(list(path.parent.iterdir())) == 1


def test_unsavable_values_leave_no_file(tmp_path, tiny):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "nan.json", {"loss": float("nan")})
    with pytest.raises(TypeError):
        store.save(tmp_path / "n.safetensors", tensors_of(tiny, 0), tiny.architecture, {"story": object()})
    assert list(tmp_path.iterdir()) == []


READERS = {
    "x.json": (files.read_json, lambda path: files.write_json(path, [1] * 100)),
    "x.npz": (files.read_arrays, lambda path: files.write_arrays(path, a=np.arange(1000))),
    "x.npy": (files.load_memmap, lambda path: np.save(path, np.arange(1000))),
}


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "garbage"])
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_one_line_that_names_them(tmp_path, name, kind):
    read, write = READERS[name]
    path = tmp_path / name
    write(path)
    read(path)
    damage(kind, path)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_pickled_arrays_are_never_loaded(tmp_path):
    np.save(tmp_path / "p.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.savez(tmp_path / "p.npz", a=np.array([{"a": 1}], object))
    with pytest.raises(UserError, match=r"p\.npy"):
        files.load_memmap(tmp_path / "p.npy")
    with pytest.raises(UserError, match=r"p\.npz"):
        files.read_arrays(tmp_path / "p.npz")


# --- the data ---------------------------------------------------------------------------------------------


def test_prepared_digits_are_those_of_scikit_learn(workspace, vary):
    from sklearn.datasets import load_digits

    prepare(vary({"dataset.held_out": 0}))
    pixels = open_pixels("digits")
    truth = load_digits()
    np.testing.assert_allclose(pixels[..., 0], truth.images * 255 / 16, atol=0.5)
    np.testing.assert_array_equal(np.load("resources/data/digits/labels.npy"), truth.target)
    manifest = files.read_json(workspace / "resources/data/digits/manifest.json")
    assert (manifest["count"], manifest["shape"], manifest["classes"]) == (1797, [8, 8, 1], 10)


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "garbage"])
@pytest.mark.parametrize("name", ["images.npy", "manifest.json"])
def test_missing_or_corrupt_images_are_named(workspace, tiny, name, kind):
    damage(kind, workspace / "resources/data/digits" / name)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        Work(tiny, "train-dense", search="full", seed=0)
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_refused(workspace, vary):
    with pytest.raises(UserError, match=r"\(8, 8, 1\).*\(16, 16, 1\)"):
        Images.of(vary({"dataset.image_size": 16}))


@pytest.mark.parametrize("key", ["dataset.subset", "evaluation.reference"])
def test_more_items_than_there_are_are_refused_as_soon_as_their_number_is_known(workspace, vary, key):
    words = f"{key}: 5,000, but digits has 1,437 to train on"
    with pytest.raises(UserError, match=words):
        vary({"evaluation": {}, key: 5000})
    prepared = vary({"evaluation": {}, key: 5000, "dataset.source": "images", "dataset.path": "elsewhere"})
    with pytest.raises(UserError, match=words):
        open_dataset(prepared)
