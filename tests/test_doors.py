"""Whatever is denoised comes in through a door: no line of the package knows the members of `doors.py`."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, changed
from kills import read_npz, read_safetensors

DOORS = Path(__file__).with_name("doors.py")
TOY = {
    "dataset": {"name": "strokes", "source": "strokes"},
    "network": {"kind": "toy-gru", "dropout": 0.0},
    "codec": {"kind": "toy-raster"},
    "diffusion": {"timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2, "loss": "mean", "error": "l1"},
    "training": {
        "batch": 16, "learning_rate": 2e-3, "warmup": 5, "ema_decay": 0.9, "log_every": 10,
        "save_minutes": 1e-6,
    },
    "pruning": {"images": 32, "stride": 20},
    "searches": {"full": {"rates": [0.3, 0.5], "criteria": ["magnitude", "taylor"], "horizon": 6}},
    "dense": {"iterations": 40},
    "sampling": {"steps": 10, "images": 23, "batch": 10},
    "runs": {
        "unpruned": {"title": "Unpruned", "method": "unpruned", "init": "dense"},
        "eb-50": {"title": "EB", "method": "eb", "rate": 0.5, "iterations": 24},
        "eb-50-taylor": {
            "title": "EB (Taylor)", "method": "eb", "criterion": "taylor", "rate": 0.5, "iterations": 20
        },
        "shrunk": {
            "title": "Shrunk", "method": "control", "rate": 0.3, "iterations": 24,
            "hooks": {"toy-shrink": {"every": 5}},
        },
    },
    "tables": {"table4": ["unpruned", "eb-50"]},
}  # fmt: skip
GUIDED = {"training.label_dropout": 0.2, "sampling.guidance": 2.0}
EXPERT = "full-magnitude-ema-0.5-t0-100"


def project(folder):
    path = folder / "config/experiments/toy.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(changed(TOY, GUIDED)))
    return folder


def doors(folder, *words, **env):
    return subprocess.run(
        [sys.executable, DOORS, *words], cwd=folder, capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = project(tmp_path_factory.mktemp("toy"))
    done = doors(folder, "all")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def bits(folder):
    """Every array of the results and every number of the metrics, by file."""
    found = {}
    for path in sorted((folder / "results").rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = read_safetensors(path)[1]
        elif path.suffix == ".npz":
            found[name] = read_npz(path)
        elif path.suffix == ".npy":
            found[name] = np.load(path).tobytes()
        elif path.name == "metrics.json":
            metrics = json.loads(path.read_text())
            found[name] = [metrics[key] for key in ("fd", "kid", "confident", "class_shares")]
    return found


@pytest.mark.slow
def test_sequences_under_a_recurrent_network_go_from_data_to_report(undisturbed):
    results = undisturbed / "results/toy/seed0"
    samples, items = (np.load(results / f"runs/eb-50/{name}.npy") for name in ("samples", "items"))
    assert (samples.shape, samples.dtype, items.shape) == ((23, 8, 8, 1), np.uint8, (23, 12, 3))
    ticket = read_safetensors(results / "tickets/full/magnitude/ema/0.5.safetensors")[1]
    shapes = {name.removeprefix("raw."): array[1] for name, array in ticket.items()}
    assert shapes["gru.weight_hh_l1_reverse"] == (12, 4)  # three gates of half the eight units
    assert shapes["gru.weight_ih_l1"] == (12, 8)
    assert shapes["out.weight"] == (3, 4)
    assert shapes["frequencies"] == (4,)
    assert (undisturbed / "results/toy/report.html").stat().st_size > 10_000
    metrics = json.loads((results / "runs/unpruned/metrics.json").read_text())
    assert metrics["fd"] > 0 and len(metrics["class_shares"]) == 3
    assert 0 <= metrics["agreement"] <= 1


@pytest.mark.slow
def test_a_hook_replaces_every_fifth_step(undisturbed):
    (path,) = (undisturbed / "results/toy/seed0/experts").glob("*-shrink*/24.safetensors")
    story, tensors = read_safetensors(path)
    assert np.frombuffer(tensors["extra.shrink.count"][2], np.float32) == [4]
    told = json.loads(json.dumps(story))["ebdiff"]["story"]
    assert (told["step"], told["updates"]) == (24, 20)


@pytest.mark.slow
def test_killed_at_any_stage_it_goes_on_with_the_same_bits(undisturbed, tmp_path):
    folder = project(tmp_path)
    (shrunk,) = (p.name for p in (undisturbed / "results/toy/seed0/experts").glob("*-shrink*"))
    for at in ("dense/full:25", f"expert/{EXPERT}:9", f"expert/{shrunk}:12"):
        done = doors(folder, "all", KILL_AT=at)
        assert done.returncode == -signal.SIGKILL, (at, done.stderr[-2000:])
    done = doors(folder, "all")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from step" in done.stdout
    assert bits(folder) == bits(undisturbed)


@pytest.mark.slow
def test_the_pruned_recurrent_network_is_the_dense_one_with_those_units_silenced(tmp_path):
    """And padding may hold anything."""
    check = tmp_path / "check.py"
    check.write_text(
        f"import sys; sys.path.insert(0, {str(DOORS.parent)!r})\n"
        "import doors, numpy as np, torch\n"
        "from ebdiff.data.dataset import Cond\n"
        "from ebdiff.experiment.members import Architecture\n"
        "from ebdiff.nets import store\n"
        "from ebdiff.pruning.graph import split, trace\n"
        "from ebdiff.pruning.importance import magnitude\n"
        "from ebdiff.pruning.select import select\n"
        "from ebdiff.pruning.surgery import cut\n"
        "it = Architecture(doors.GRUConfig(), doors.ToyStrokesConfig(name='s').items)\n"
        "net = store.fresh(it, 0, 't').eval()\n"
        "tensors = {n: t.detach() for n, t in net.state_dict().items()}\n"
        "groups = trace(it); mask = select(groups, magnitude(tensors), 0.5)\n"
        "small = store.build(it, cut(it, tensors, mask)).eval()\n"
        "dense = store.build(it, tensors).eval(); h = it.config.hidden\n"
        "x = torch.randn(5, 12, 3); inside = torch.arange(12) < torch.tensor([4, 12, 7, 5, 9])[:, None]\n"
        "cond, t = Cond(torch.tensor([0, 1, 2, 0, 1]), inside), torch.tensor([0, 50, 99, 3, 20])\n"
        "with torch.no_grad():\n"
        "    whole = dense(x, t, cond)\n"
        "    for group, part in zip(groups, split(groups, mask)):\n"
        "        gone = np.flatnonzero(~part)\n"
        "        if group.name == 'mid':\n"
        "            dense.mid.weight[gone] = 0; dense.mid.bias[gone] = 0\n"
        "        else:  # n = tanh(0) = 0, and h' = (1 - z) n + z h stays 0\n"
        "            for kind in ('weight_ih', 'weight_hh', 'bias_ih', 'bias_hh'):\n"
        "                key = group.name.removeprefix('gru_')\n"
        "                getattr(dense.gru, f'{kind}_{key}')[2 * h + gone] = 0\n"
        "    silenced, pruned = dense(x, t, cond), small(x, t, cond)\n"
        "    y = x.clone(); y[~inside] = 7\n"
        "    padded = small(y, t, cond)\n"
        "assert (silenced - pruned).abs().max() < 1e-5 < (whole - pruned).abs().max()\n"
        "assert torch.equal(padded[inside], pruned[inside])\n"
    )
    done = subprocess.run([sys.executable, check], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_no_line_of_the_package_knows_the_toys():
    classes = set(re.findall(r"class (\w+)\(", DOORS.read_text()))
    names = sorted(classes | {"toy-gru", "toy-raster", "toy-shrink"})
    text = "\n".join(p.read_text() for p in (ROOT / "src").rglob("*.py"))
    assert [name for name in names if re.search(rf"\b{name}\b", text)] == []
