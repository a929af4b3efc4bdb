"""Peak memory at two sizes: what grows with the number of images stays on the disk."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TINY, changed, vouch

from ebdiff.experiment import layout, load
from ebdiff.nets import store
from ebdiff.system.files import write_json

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc"),
]

FEW, MANY = 2_000, 20_000  # images of 3 KB: 6 MB and 61 MB
RAW = changed(TINY, {
    "network": {"width": 8, "multipliers": [1], "blocks": 1,
                "attention": [], "middle_attention": False, "norm_groups": 4},
    "dataset": {"name": "data", "source": "images", "path": "unused"},
    "sampling.steps": 1,
    "sampling.batch": 100,
})  # fmt: skip

MEASURED = """
import re, sys
from pathlib import Path
import torch, yaml
from ebdiff.experiment import load
experiment = load.parse(yaml.safe_load(Path("x.yaml").read_text()), "x.yaml")
{work}
# Not getrusage: its peak is inherited from the parent process.
print("peak", re.search("VmHWM:\\\\s*(\\\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def peak(folder, images, work):
    """Peak resident MB of a process that does some work on an experiment of so many images."""
    (folder / "x.yaml").write_text(yaml.safe_dump(changed(RAW, {"sampling.images": images})))
    command = [sys.executable, "-c", MEASURED.format(work=work)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(re.search(r"peak (\d+)", done.stdout)[1]) / 1e3


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A folder with the one expert of the run `unpruned`, fresh weights."""
    monkeypatch.chdir(tmp_path)
    e = load.parse(RAW, "x.yaml")
    (expert,) = e.runs["unpruned"].experts
    tensors = {f"ema.{n}": t for n, t in store.fresh(e.architecture, 0, "x").state_dict().items()}
    where = dict(seed=0, expert=expert.key, milestone=expert.iterations)
    store.save(
        layout.path(layout.MILESTONE, experiment="tiny", **where), tensors, e.architecture, {"step": 1}
    )
    vouch(e, "finetune-region", **where)
    return tmp_path


def test_sampling_holds_the_same_memory_for_ten_times_the_images(trained):
    work = (
        "from ebdiff.diffusion.sample import sample\nsample(experiment, 'unpruned', 0, torch.device('cpu'))"
    )
    few, many = (peak(trained, images, work) for images in (FEW, MANY))
    print(f"sampling {FEW} and {MANY} images: {few:.0f} and {many:.0f} MB")
    path = trained / layout.path(layout.SAMPLES, experiment="tiny", seed=0, run="unpruned")
    assert np.load(path, mmap_mode="r").shape == (MANY, 32, 32, 3)
    # Two processes of equal work were seen 15 MB apart; the images alone are 55 MB, as floats 220.
    assert many - few < 30


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A folder with a small dataset, its classifier and its reference statistics."""
    from ebdiff.metrics.classifier import train_classifier
    from ebdiff.metrics.evaluate import reference_stats

    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    images = layout.path(layout.IMAGES, dataset="data")
    images.parent.mkdir(parents=True)
    np.save(images, pixels)
    np.save(images.with_name("labels.npy"), np.arange(40) % 4)
    np.save(images.with_name("held_out.npy"), pixels[:0])
    write_json(layout.path(layout.MANIFEST, dataset="data"), {"count": 40})
    experiment = load.parse(RAW, "x.yaml")
    vouch(experiment, "prepare-data")
    train_classifier(experiment)
    reference_stats(experiment, "classifier")
    return tmp_path


def test_measuring_samples_maps_them_and_their_features_once_and_no_more(measured):
    """As bytes, in pages of files that the system takes back when it needs them; never as floats."""
    work = "from ebdiff.metrics.evaluate import evaluate\nevaluate(experiment, 'unpruned', 0)"
    path = layout.path(layout.SAMPLES, experiment="tiny", seed=0, run="unpruned")
    path.parent.mkdir(parents=True)
    found = []
    for images in (FEW, MANY):
        np.save(path, np.zeros((images, 32, 32, 3), np.uint8))
        write_json(path.with_name("ledger.json"), {})
        vouch(
            load.parse(changed(RAW, {"sampling.images": images}), "x.yaml"), "sample", run="unpruned", seed=0
        )
        found.append(peak(measured, images, work))
    print(f"measuring {FEW} and {MANY} images: {found[0]:.0f} and {found[1]:.0f} MB")
    mapped = (MANY - FEW) * (32 * 32 * 3 + 64 * 4) / 1e6
    assert found[1] - found[0] < mapped + 25
