"""One step of training as a sequence of operators: what CUDA would launch, and what a graph may replay."""

from collections import Counter
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from conftest import unet
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ebdiff.data.dataset import UNCONDITIONAL
from ebdiff.diffusion.process import Process
from ebdiff.experiment import load
from ebdiff.experiment.schema import Diffusion, Training
from ebdiff.nets import fused, store
from ebdiff.nets import unet as nets_unet
from ebdiff.nets.execution import GPU, Runtime
from ebdiff.pruning.count import meta_tensors
from ebdiff.training.loop import Job, learner
from ebdiff.training.state import State

GOAL = 900  # kernels of a step of the CIFAR-10 network; 2,586 under autocast, layer by layer
NO_KERNEL = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided",
             "aten::_unsafe_view"}  # fmt: skip
# Kernels of an operator on CUDA where it isn't one: gradients of input and weight; sums of partial sums;
# attention's three; of lists one for every so many tensors.
KERNELS = {"aten::convolution_backward": 2, "ebdiff::norm_silu_backward": 2, "ebdiff::channel_sums": 2}
KERNELS |= {"aten::_scaled_dot_product_flash_attention_for_cpu_backward": 3, "aten::select_backward": 2}
KERNELS |= {"aten::_foreach_norm": 2, "aten::linalg_vector_norm": 2}
MANY = 128
READS_BACK = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}
READS_BACK |= {"aten::equal", "aten::_unique2", "aten::repeat_interleave"}


class Calls(TorchDispatchMode):
    """The operators that are called: each with the tensors it reads and gives, by all but their values.

    The tensors themselves must go: a gradient that someone else holds too is copied. Their memory stays, so
    that no two share an address.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        given = operator(*args, **(kwargs or {}))
        if operator._schema.name != "prim::device":
            self.calls.append((operator, *map(self.told, (args, given))))
        return given

    @staticmethod
    def told(tensors):
        tensors = [x for x in tree_leaves(tensors) if isinstance(x, torch.Tensor)]
        return [((x.shape, x.stride(), x.dtype, x.device), x.untyped_storage()) for x in tensors]

    def kernels(self):
        """How many kernels CUDA would launch, by operator."""
        found = Counter()
        for operator, read, _ in self.calls:
            name = operator._schema.name
            if not operator.is_view and name not in NO_KERNEL:
                found[name] += KERNELS.get(name, 1 + (len(read) // MANY if name == "aten::cat" else 0))
        return found

    def shapes(self):
        """What a graph fixes: the operators, and everything about their tensors but values and places."""
        return [(operator, *([how for how, _ in x] for x in both)) for operator, *both in self.calls]

    def memory(self):
        """Addresses of what was read and not made here, and of what of it was written."""
        outside, written, made = set(), set(), set()
        for operator, read, given in self.calls:
            read, given = ([memory._cdata for _, memory in x] for x in (read, given))
            outside |= set(read) - made
            if operator._schema.is_mutable:
                written |= set(read[:1]) - made
            elif not operator.is_view:
                made |= set(given)
        return outside, written


def last(x):
    """`fused.fuses` for any device."""
    return x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last)


def training(architecture, rate, device="cpu", batch=128):
    """A state on zeros, its function of a step, and the step's inputs."""
    shapes = meta_tensors(architecture, rate)
    network = store.build(architecture, {name: torch.zeros(x.shape) for name, x in shapes.items()})
    runtime = Runtime(torch.device(device), GPU)
    state = State.start(network.train(), runtime)
    job = Job("step", 0, None, None, Process(Diffusion()), Training(batch=batch), runtime)
    x0, t, _ = network.example(batch)
    inputs = x0, UNCONDITIONAL, t, torch.ones(batch), torch.zeros_like(x0)
    inputs = [x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs]
    job.process.noised(inputs[0], inputs[2], inputs[4])  # makes the noise levels, once
    return state, learner(state, job), inputs


def recorded(state, learn, inputs):
    """Forward, backward and gathering, in the fused forms; then the update."""
    fusing = (patch.object(module, "fuses", last) for module in (fused, nets_unet))
    with next(fusing), next(fusing), Calls() as learning:
        state.begin_step()
        learn(*inputs)
    with Calls() as updating:
        state.clip(1.0)
        state.descend(Training())
        state.update_average(Training())
    return learning, updating


@pytest.mark.parametrize("rate", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_step_of_the_papers_network_is_few_kernels_and_reads_nothing_back(halves, rate):
    step = training(load.load("cifar10").architecture, rate)
    with FakeTensorMode(allow_non_fake_inputs=True):  # without data: shapes that depend on them raise
        learning, updating = (calls.kernels() for calls in recorded(*step))
    assert learning["ebdiff::norm_silu"] == 51 and "aten::native_group_norm" not in learning
    total = learning.total() + updating.total()
    assert total <= GOAL, f"{learning.total()} + {updating.total()}: {(learning + updating).most_common()}"
    assert updating.total() <= 20
    assert not READS_BACK & (learning | updating).keys()


TINY = unet(8, width=8, multipliers=(1, 2), attention=(4,), norm_groups=4, dropout=0.1)


def test_a_step_stays_on_its_device(halves, monkeypatch):
    monkeypatch.setattr(Runtime, "autocast", lambda runtime: nullcontext())  # which knows no meta device
    for calls in recorded(*training(TINY, 0.0, device="meta", batch=4)):
        tensors = [how for _, read, given in calls.calls for how, _ in (*read, *given)]
        assert {device.type for *_, device in tensors} == {"meta"}


def test_a_replay_would_launch_the_same_on_the_same_memory(halves):
    """Whatever a step hasn't made itself lies where it lay before; of that it writes the gradient only."""
    state, learn, inputs = training(TINY, 0.0, batch=4)
    steps = []
    for _ in range(2):
        state.begin_step()
        with Calls() as calls:
            learn(*inputs)
        steps.append(calls)
    assert steps[0].shapes() == steps[1].shapes()
    (before, _), (after, written) = (calls.memory() for calls in steps)
    assert before == after and {state.half.untyped_storage()._cdata} < after
    assert written == {state.grad.untyped_storage()._cdata}


@pytest.mark.parametrize("channels", [1, 3])
def test_what_does_not_lie_channels_last_is_never_fused(channels, monkeypatch):
    """A GPU computes small batches strictly, without a kernel to compile: not for one channel, which lies in
    any layout at once, nor after attention, whose product lies otherwise."""
    for module in (fused, nets_unet):
        monkeypatch.setattr(module, "fuses", last)
    for function in (fused.Norm, fused.Sum, fused.Product):
        monkeypatch.setattr(function, "apply", None)
    network = store.fresh(unet(8, channels=channels, multipliers=(1, 2), attention=(8, 4)), 0, "test")
    network(*network.example(2)).sum().backward()
