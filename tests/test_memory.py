"""Estimated memory against what training steps really take, and against made-up control groups."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import unet, write_experiment

from ebdiff.nets import memory
from ebdiff.nets.execution import Runtime
from ebdiff.nets.store import build
from ebdiff.pruning.count import meta_tensors
from ebdiff.system.errors import UserError

CPU = torch.device("cpu")
SMALL = unet(16, width=32, multipliers=(1, 2), blocks=1, attention=(8,), dropout=0.1, norm_groups=8)

MEASURED = """
import sys
import torch
from ebdiff.cost.measure import Blanks
from ebdiff.diffusion.process import Process
from ebdiff.diffusion.timesteps import Antithetic
from ebdiff.experiment.members import Architecture, Items, UNetConfig
from ebdiff.experiment.schema import Diffusion, Training
from ebdiff.nets import store
from ebdiff.nets.execution import Runtime
from ebdiff.pruning.count import meta_tensors
from ebdiff.training.loop import Job, train
from ebdiff.training.state import State

CPU = torch.device("cpu")
architecture = Architecture(UNetConfig.model_validate_json(sys.argv[1]), Items((3, 32, 32)))
rate, batch = float(sys.argv[2]), int(sys.argv[3])
training = Training(batch=batch, log_every=10**9)
shapes = meta_tensors(architecture, rate)
torch.nn.Conv2d(3, 8, 3)(torch.zeros(1, 3, 8, 8)).sum().backward()  # loads what is loaded at first use
with open("/proc/self/status") as file:
    before = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
network = store.build(architecture, {n: torch.zeros(t.shape) for n, t in shapes.items()})
state = State.start(network, Runtime(CPU))
process, blanks = Process(Diffusion()), Blanks(architecture.items)
job = Job("m", 0, blanks, Antithetic(0, 1000), process, training, Runtime(CPU))
train(state, job, 3, save=lambda s: None)
# Not getrusage: its peak is inherited from the parent process.
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
print(1024 * (peak - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_estimate_is_within_a_quarter_of_the_measured_peak(rate):
    large = unet(width=64, multipliers=(1, 2), blocks=1)
    command = [sys.executable, "-c", MEASURED, large.config.model_dump_json(), str(rate), "32"]
    measured = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert memory.footprint(large, meta_tensors(large, rate)).bytes(32) == pytest.approx(measured, rel=0.25)


def test_what_grows_with_images_is_predicted_and_the_rest_is_parameters():
    """Five images, measured, keep what the forward passes of two and of three foretell."""
    network = build(SMALL, {n: torch.zeros(t.shape) for n, t in meta_tensors(SMALL, 0).items()})
    for bf16 in (False, True):
        needs = memory.Footprint.of(network, bf16)
        assert needs.fixed + 5 * needs.growing == pytest.approx(memory._kept_for_backward(network, 5, bf16))
    assert memory.Footprint.of(network).fixed.sum() == 0
    parameters = sum(p.numel() for p in network.parameters())
    assert memory.Footprint.of(network).bytes(0) == int(memory.FRAGMENTED * 20 * parameters)


def test_what_one_layer_keeps_for_its_backward_pass_is_counted_once():
    """A network of one block at 2x2: every tensor that autograd keeps, counted by hand."""
    small = unet(
        2, 1, width=4, multipliers=(1,), blocks=1, attention=(), dropout=0,
        middle_attention=False, norm_groups=2,
    )  # fmt: skip
    # Per image, width 4, 4 pixels: a block keeps norm1's input, its output (silu's input), silu's
    # output (conv's input), the same three around conv2, and mean and rstd of 2 groups, twice.
    pixels, width, time = 4, 4, 16
    narrow = 6 * width * pixels + 8  # a block of `width` inputs
    # An up block's input is 2 x width wide: norm1's input, output and silu's output are wider, and
    # its 1x1 shortcut keeps the same input.
    wide = 6 * width * pixels + 3 * width * pixels + 8
    temb = [4, time, time, time]  # embedding, dense.0's output, its silu, dense.1's output
    blocks = 3 * narrow + 2 * wide + 5 * time  # each block keeps silu(temb) for its projection
    ends = pixels + 3 * width * pixels + 4  # conv_in's input; norm_out's input, output, silu, statistics
    expected = 4 * (sum(temb) + blocks + ends)
    assert memory.footprint(small, meta_tensors(small, 0)).growing.sum() == expected


def test_bfloat16_keeps_less_and_pruning_too():
    dense, pruned = meta_tensors(SMALL, 0), meta_tensors(SMALL, 0.5)
    full = memory.footprint(SMALL, dense).bytes(64)
    assert memory.footprint(SMALL, dense, bf16=True).bytes(64) < 0.8 * full
    assert memory.footprint(SMALL, pruned).bytes(64) < 0.8 * full


def test_the_largest_micro_batch_is_the_largest_divisor_that_fits():
    needs = memory.footprint(SMALL, meta_tensors(SMALL, 0))
    assert needs.micro_batch(12, needs.bytes(4)) == 4
    assert needs.micro_batch(12, needs.bytes(4) - 1) == 3
    assert needs.micro_batch(10, needs.bytes(4)) == 2
    assert needs.micro_batch(12, 1000) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_names_the_micro_batch_that_would_fit(monkeypatch, capsys, error):
    network = build(SMALL, {n: torch.zeros(t.shape) for n, t in meta_tensors(SMALL, 0).items()})
    needs = memory.Footprint.of(network)
    parameters = sum(p.numel() for p in network.parameters())
    there = 20 * parameters  # weights, average, moments and gradient
    monkeypatch.setattr(memory, "available_bytes", lambda device: needs.bytes(16) - there)
    with (
        pytest.raises(UserError, match=r"out of memory on cpu: .*compute\.micro_batch: 16$"),
        memory.enough(network, 64, Runtime(CPU)),
    ):
        raise error
    assert "warning: a step of 64 images needs about" in capsys.readouterr().out

    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**40)  # it looked enough, but wasn't
    with (
        pytest.raises(UserError, match=r"compute\.micro_batch: 16$"),
        memory.enough(network, 64, Runtime(CPU, micro_batch=32)),
    ):
        raise error
    assert capsys.readouterr().out == ""
    with pytest.raises(RuntimeError, match="something else"), memory.enough(network, 64, Runtime(CPU)):
        raise RuntimeError("something else")


@pytest.mark.slow
def test_a_training_that_really_runs_out_of_memory_says_so(workspace):
    """The address space is limited to what is there and 300 MB; the batch wants gigabytes."""
    write_experiment(workspace, {"network.width": 64, "training.batch": 4096, "network.dropout": 0.0})
    program = """
import resource, torch
from ebdiff.experiment import load
from ebdiff.training.train import train_dense
torch.nn.Conv2d(3, 8, 3)(torch.zeros(1, 3, 8, 8)).sum().backward()
with open("/proc/self/status") as file:
    size = next(1024 * int(line.split()[1]) for line in file if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size + 300 * 2**20,) * 2)
train_dense(load.load("tiny"), "full", 0, torch.device("cpu"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "UserError: out of memory on cpu" in done.stderr
    assert "set compute.micro_batch: " in done.stderr


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_memory_limits_of_every_enclosing_group_count(tmp_path):
    stat = "anon 5\ninactive_file 20"
    group(tmp_path / "job", memory__max=1000, memory__current=400, memory__stat=stat)
    group(tmp_path / "job/step", memory__max="max", memory__current=300, memory__stat=stat)
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    assert list(memory._left_in_cgroups(tmp_path, own)) == [620]


def test_version_one_groups_are_understood(tmp_path):
    files = {
        "memory.limit_in_bytes": 900,
        "memory.usage_in_bytes": 500,
        "memory.stat": "total_inactive_file 7",
    }
    group(tmp_path / "memory/slurm", **files)
    own = tmp_path / "cgroup"
    own.write_text("5:cpu,cpuacct:/\n4:memory:/slurm\n0::/\n")
    assert list(memory._left_in_cgroups(tmp_path, own)) == [407]


def test_available_memory_is_what_the_kernel_says_at_most():
    with open("/proc/meminfo") as file:
        total = next(1024 * int(line.split()[1]) for line in file if line.startswith("MemTotal"))
    assert 0 < memory.available_bytes(torch.device("cpu")) <= total


def test_measuring_a_footprint_leaves_nothing_behind():
    """What a forward pass keeps for the backward pass is gone with it; a GPU's graph couldn't be captured."""
    network, outputs = build(SMALL, {n: torch.zeros(t.shape) for n, t in meta_tensors(SMALL, 0).items()}), []
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda layer, inputs, output: outputs.append(weakref.ref(output)))
    memory.Footprint.of(network)
    gc.collect()
    assert outputs and not any(output() is not None for output in outputs)
