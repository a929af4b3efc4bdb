"""Real CIFAR-10 through the whole method on a CPU, with real Inception features: minutes."""

import json
import os

import pytest
from test_workflow import copied, snakemake

from ebdiff.experiment import layout

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    if not os.environ.get("EBDIFF_CIFAR10"):
        pytest.skip("EBDIFF_CIFAR10 does not name a folder with CIFAR-10")
    folder = copied(tmp_path_factory.mktemp("cifar10"))
    done = snakemake(folder, "--config", "experiments=cifar10_tiny", timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("run", ["unpruned", "eb-50", "ta-eb"])
def test_every_run_has_its_fid(tiny, run):
    path = layout.path(layout.METRICS, experiment="cifar10_tiny", seed=0, run=run)
    metrics = json.loads((tiny / path).read_text())
    assert metrics["distance_name"] == "FID"
    assert (metrics["images"], metrics["reference_images"]) == (256, 512)
    assert metrics["ill_conditioned"]  # 256 images in 2,048 dimensions
    assert metrics["floor"]["fd"] < metrics["fd"] < 1000
    assert metrics["kid"] < metrics["ceiling"]["kid"]  # better than noise


def test_tickets_tables_and_report_are_there(tiny):
    for table in ("table1", "table4"):
        path = layout.path(layout.TABLE, experiment="cifar10_tiny", table=table, ext="md")
        assert "FID" in (tiny / path).read_text()
    assert (tiny / layout.path(layout.REPORT, experiment="cifar10_tiny")).stat().st_size < 10e6
