"""Precision, memory format, graphs, micro-batches: other arithmetic, the same method."""

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, vouch, write_experiment
from test_training import job, same, start

from ebdiff import cli
from ebdiff.cost import tune
from ebdiff.data.dataset import Cond, open_pixels, to_uint8
from ebdiff.diffusion import ensemble, sample
from ebdiff.diffusion.sampling import Router
from ebdiff.experiment import layout, load
from ebdiff.experiment.jobs import Job
from ebdiff.experiment.schema import Execution, Tuning
from ebdiff.metrics.classifier import load_classifier, train_classifier
from ebdiff.metrics.distances import Gaussian, frechet_distance
from ebdiff.nets import execution, store
from ebdiff.nets.execution import EAGER, GPU, Captured, Runtime
from ebdiff.system.devices import device_name
from ebdiff.system.errors import UserError
from ebdiff.system.files import read_json
from ebdiff.training.loop import train
from ebdiff.training.state import State

CPU = torch.device("cpu")
# Without attention: the gradient of k's bias is rounding alone, which Adam blows up.
PLAIN = {"network.dropout": 0.0, "network.middle_attention": False}


def trained(e, steps=4, runtime=None, state=None):
    runtime = runtime or Runtime(CPU)
    if state is None:
        state = State.start(store.fresh(e.architecture, 0, "test"), runtime)
    train(state, job(e, runtime=runtime), steps, save=lambda s: None)
    return state


def distance(a, b):
    """Largest difference of two states' weights."""
    a, b = a.view("raw"), b.view("raw")
    return max((a[n] - b[n]).abs().max().item() for n in a)


def gradient(state):
    """The last step's gradient, flat."""
    return torch.cat([p.grad.flatten() for p in state.network.parameters()])


# --- micro-batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 8, 16, 100])
def test_micro_batches_give_the_whole_batchs_gradient_to_rounding(workspace, vary, size):
    e = vary(PLAIN)
    whole, cut = trained(e, 1), trained(e, 1, Runtime(CPU, micro_batch=size))
    a, b = gradient(whole), gradient(cut)
    assert (a - b).norm() < 1e-5 * a.norm()


def test_with_dropout_micro_batches_draw_other_masks(workspace, tiny):
    whole, cut = trained(tiny, 1), trained(tiny, 1, Runtime(CPU, micro_batch=4))
    assert distance(whole, cut) > 1e-4
    again = trained(tiny, 1, Runtime(CPU, micro_batch=4))
    assert same(cut.view("raw"), again.view("raw"))


def test_micro_batch_comes_from_the_experiment_and_counts_where_dropout_does(vary):
    e = vary({"compute.micro_batch": 4})
    assert Runtime.of(e, "training", "dense", CPU).micro_batch == 4
    # With dropout other masks are drawn; without, only rounding changes.
    assert (
        Job.of(e, "train-dense", seed=0, search="full").digest
        != Job.of(vary({}), "train-dense", seed=0, search="full").digest
    )
    plain = vary({"network.dropout": 0.0})
    e = vary({"network.dropout": 0.0, "compute.micro_batch": 4})
    assert (
        Job.of(e, "train-dense", seed=0, search="full").digest
        == Job.of(plain, "train-dense", seed=0, search="full").digest
    )


# --- precision and memory format ---------------------------------------------------------------------------


def test_channels_last_changes_rounding_only_and_goes_on_with_the_same_bits(workspace, vary):
    e = vary(PLAIN)
    last = Runtime(CPU, Execution(channels_last=True))
    state = trained(e, 4, last)
    assert state.network.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    a, b = gradient(trained(e, 1, last)), gradient(trained(e, 1))
    assert 0 < (a - b).norm() < 1e-5 * a.norm()

    half = trained(e, 2, last)
    half.save(workspace / "half.safetensors", e.architecture, {})
    half = State.load(workspace / "half.safetensors", last)
    on = trained(e, 4, last, half)
    assert same(state.tensors(), on.tensors())


def test_bf16_training_keeps_weights_moments_and_average_in_fp32(workspace, vary):
    e = vary(PLAIN)
    state = trained(e, 4, Runtime(CPU, Execution(precision="bf16")))
    assert {t.dtype for t in state.tensors().values()} == {torch.float32}
    apart = distance(state, trained(e, 4))
    assert 0 < apart < distance(state, start(e))  # other rounding, the same training


def test_sampling_in_bf16_draws_nearly_the_same_images(vary):
    e = vary({})
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 1, 8, 8), np.float32))
    t = torch.full((4,), 500)
    with torch.inference_mode():
        exact = Runtime(CPU).denoiser(store.fresh(e.architecture, 0, "s"))(x, t)
        for how in (Execution(precision="bf16"), Execution(precision="bf16", channels_last=True)):
            coarse = Runtime(CPU, how).denoiser(store.fresh(e.architecture, 0, "s"))(x, t)
            assert coarse.dtype == torch.float32
            assert 0 < (coarse - exact).abs().max() < 0.03 * exact.abs().max()


def test_defaults_are_fp32_on_a_cpu_and_bf16_on_a_gpu_where_batches_are_large(tiny):
    cifar10, gpu = load.load("cifar10", ROOT / "config/experiments"), torch.device("cuda")
    assert Runtime.of(cifar10, "training", "dense", CPU).how == Execution()
    assert Runtime.of(cifar10, "sampling", "0.5", gpu).how == GPU
    assert Runtime.of(tiny, "training", "dense", gpu).how == Execution()
    assert GPU.precision == "bf16"


@pytest.fixture
def switches():
    """Torch's switches, put back afterwards."""
    before = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:]
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)


def test_fp32_on_a_gpu_is_strict_whatever_came_before(tiny, switches):
    cuda, network = torch.device("cuda"), store.fresh(tiny.architecture, 0, "x")
    for precision, strict in (("bf16", False), ("fp32", True), ("tf32", False), ("fp32", True)):
        runtime = Runtime(cuda, Execution(precision=precision))
        runtime.set_arithmetic()
        assert (torch.get_float32_matmul_precision() == "highest") == strict
        assert torch.backends.cuda.matmul.allow_tf32 != strict and torch.backends.cudnn.allow_tf32 != strict
        with runtime.autocast():
            assert not torch.is_autocast_enabled("cuda")
        assert runtime.halves == bool(runtime.halved(network)) == (precision == "bf16")


def test_norms_stay_fp32_and_everything_else_is_halved(tiny):
    network = store.fresh(tiny.architecture, 0, "x")
    halved = Runtime(torch.device("cuda"), GPU).halved(network)
    assert {n for n, _ in network.named_parameters()} - halved == {
        f"{name}.{key}" for name, m in network.named_modules() if "norm" in name for key in ("weight", "bias")
    }


@pytest.mark.long
def test_metrics_of_bf16_and_fp32_samples_agree_better_than_two_seeds(workspace, vary):
    e = vary({"training.learning_rate": 5e-3})
    train_classifier(e)
    classifier, _ = load_classifier(layout.path(layout.CLASSIFIER, dataset="digits"))
    state = trained(e, 400)
    real = Gaussian.fit(classifier.extract(np.array(open_pixels("digits"))))

    def distance(images):
        return frechet_distance(Gaussian.fit(classifier.extract(images)), real)

    def distances(how):
        network = store.build(e.architecture, state.view("ema"))
        router = Router([(0, 1000)], [Runtime(CPU, how).denoiser(network)])
        drawn = (ensemble.generate(e, router, list(range(200)), seed, CPU) for seed in range(5))
        return np.array([distance(to_uint8(images)) for images in drawn])

    exact, coarse = distances(Execution()), distances(GPU)
    noise = distance(np.random.default_rng(0).integers(0, 256, (200, 8, 8, 1), np.uint8))
    print("METRIC", exact, coarse, noise)
    assert exact.max() < noise / 3  # it has learned something
    assert 0 < np.abs(coarse - exact).max() < 0.3 * exact.std(ddof=1)


# --- graphs ------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """CUDA's streams and graphs without CUDA: a replay runs the captured function again, in its places."""
    told = SimpleNamespace(at="current", waits=[], graphs=[])

    class Stream:
        name = "own"

        def wait_stream(self, other):
            told.waits.append((self.name, other.name))

    class Current(Stream):
        name = "current"

    class Graph:
        replays = 0

        def pool(self):
            return "shared"

        def replay(self):
            self.replays += 1
            told.at = "replay"
            self.output.copy_(self.function(*self.places))
            told.at = "current"

    @contextmanager
    def stream(stream):
        before, told.at = told.at, stream.name
        try:
            yield
        finally:
            told.at = before

    @contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        assert pool == "shared" and not torch.is_inference_mode_enabled()
        told.graphs.append(graph)
        told.at = "capture"
        yield  # an error leaves the capturing stream, as torch's does
        told.at = "own"

    def held(function):
        """The function, such that a graph can hold it."""

        def run(*arguments):
            output = function(*arguments)
            if told.at == "capture":
                g = told.graphs[-1]
                g.function, g.places, g.output = function, arguments, output
            return output

        return run

    told.held = held
    for fake in (Stream, stream, graph):
        monkeypatch.setattr(torch.cuda, fake.__name__, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", Current)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(execution, "_room", lambda: (room, first))
    room, first = Stream(), Graph()
    return told


def test_a_function_runs_eagerly_a_few_times_and_is_then_replayed_on_copies_of_its_inputs(cuda):
    called = []

    @cuda.held
    def double(x, cond):
        called.append(cuda.at)
        assert cond.mask is None
        return 2 * x + cond.label

    run, x, outputs = Captured(double), torch.zeros(2), []
    for i in range(EAGER + 3):  # in a memory of the caller's, who uses it for something else afterwards
        outputs.append(run(x.fill_(i), Cond(torch.tensor(10.0 * i), None)))
        x.fill_(-1)
    assert [y.tolist() for y in outputs] == [[12.0 * i] * 2 for i in range(EAGER + 3)]
    assert called == ["own"] * EAGER + ["capture"] + ["replay"] * 3
    assert cuda.waits == [("own", "current"), ("current", "own")] * EAGER + [("current", "own")]
    (graph,) = cuda.graphs
    assert graph.places[0] is not x and graph.places[1].mask is None


def test_every_set_of_shapes_has_a_graph_of_its_own(cuda):
    run = Captured(cuda.held(lambda x, y: x.sum() + (0 if y is None else y.sum())))
    kinds = [
        (torch.ones(2), None),
        (torch.ones(3), None),
        (torch.ones(3), torch.ones(2)),
        (torch.ones(3, dtype=torch.int64), None),
    ]
    for _ in range(EAGER + 2):
        found = [run(*inputs).item() for inputs in kinds]
        assert found == [2, 3, 5, 3]
    assert [graph.replays for graph in cuda.graphs] == [2] * len(kinds)


def test_what_is_captured_while_sampling_serves_outside_of_inference_too(cuda):
    run = Captured(cuda.held(lambda x: 2 * x))
    with torch.inference_mode():
        for _ in range(EAGER + 1):
            run(torch.ones(2))
    assert run(torch.ones(2)).tolist() == [2, 2] and not cuda.graphs[0].places[0].is_inference()


def test_what_cannot_be_captured_goes_on_eagerly_and_says_so(cuda, capsys):
    def reads_back(x):
        if cuda.at == "capture":
            raise RuntimeError("operation not permitted when stream is capturing\nand so on")
        return 2 * x

    run = Captured(reads_back)
    assert [run(torch.tensor(float(i))).item() for i in range(EAGER + 3)] == [2 * i for i in range(EAGER + 3)]
    assert cuda.at == "current" and len(cuda.graphs) == 1
    told = capsys.readouterr().out
    assert (
        told == "not captured as a CUDA graph, so slower: operation not permitted when stream is capturing\n"
    )


def test_memory_that_runs_out_in_a_capture_is_told_as_such(cuda):
    def large(x):
        if cuda.at == "capture":
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return x

    run = Captured(large)
    for _ in range(EAGER):
        run(torch.ones(1))
    with pytest.raises(RuntimeError, match="out of memory"):
        run(torch.ones(1))


def test_only_cuda_replays_and_a_deterministic_job_does_not():
    for device, deterministic, captures in (
        ("cuda", False, True),
        ("cuda", True, False),
        ("cpu", False, False),
    ):
        runtime = Runtime(torch.device(device), GPU, deterministic=deterministic)
        assert runtime.captures == runtime.told()["graph"] == captures
        assert captures or runtime.captured(len) is len


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


@pytest.fixture
def eagerly(switches, monkeypatch):
    """The same arithmetic, launched kernel by kernel."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return Runtime(CUDA, GPU, deterministic=True)


@gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_captured_training_ends_as_an_eager_one(workspace, vary, eagerly, dropout):
    e = vary(PLAIN | {"network.dropout": dropout})
    captured, eager = (trained(e, EAGER + 6, how).raw for how in (Runtime(CUDA, GPU), eagerly))
    moved = (eager - trained(e, 0, eagerly).raw).norm()
    # Other algorithms in bf16 end 0.015 apart, fp32 0.02, other masks 0.66: so measured on a CPU.
    assert (captured - eager).norm() < 0.05 * moved


@gpu
@pytest.mark.parametrize("how", [GPU, Execution()])
def test_a_captured_training_repeats_its_losses(workspace, tiny, switches, how):
    def losses(name):
        work = job(tiny, runtime=Runtime(CUDA, how), stats=workspace / name)
        work = replace(work, training=tiny.training.model_copy(update={"log_every": 1}))
        train(
            State.start(store.fresh(tiny.architecture, 0, "test"), work.runtime),
            work,
            20,
            save=lambda s: None,
        )
        return [json.loads(line)["loss"] for line in work.stats.read_text().splitlines()]

    first = losses("first")
    assert len(set(first)) == 20
    assert losses("second") == pytest.approx(first, rel=1e-2)


@gpu
def test_a_captured_network_predicts_as_an_eager_one(tiny, eagerly):
    run, exact = (
        how.denoiser(store.fresh(tiny.architecture, 0, "s")) for how in (Runtime(CUDA, GPU), eagerly)
    )
    with torch.inference_mode():
        for i in range(EAGER + 3):
            x, t = torch.randn(4, 1, 8, 8, device=CUDA), torch.full((4,), 100 * i, device=CUDA)
            found, expected = run(x, t), exact(x, t)
            assert (found - expected).abs().max() < 0.03 * expected.abs().max()


# --- tuning ------------------------------------------------------------------------------------------------


def test_tune_writes_what_the_workflow_then_reads(workspace, monkeypatch):
    write_experiment(workspace)
    e = load.load("tiny")
    pretended = {"fp32": 3.0, "fp32 channels_last": 2.0, "bf16": 1.99, "bf16 channels_last": 4.0}
    monkeypatch.setattr(tune, "interleaved", lambda work, n: {h: [pretended[tune.words(h)]] for h in work})
    tune.tune(e, CPU)
    text = (workspace / "config/tuning/tiny.yaml").read_text()
    assert text.startswith("# Written by `ebdiff tune tiny`")
    assert "training dense: fp32 3000.0 ms, fp32 channels_last 2000.0 ms" in text

    tuned = load.load("tiny")
    assert set(tuned.tuning.training) == set(tuned.tuning.sampling) == {"dense", "0.3", "0.5", "0.8"}
    # bf16 is half a per cent faster: not worth its rounding.
    assert Runtime.of(tuned, "training", "0.5", CPU).how == Execution(channels_last=True)
    assert tuned.model_copy(update={"tuning": e.tuning}) == e


def test_tune_leaves_out_what_cannot_run_and_says_why(workspace, monkeypatch, capsys):
    write_experiment(workspace)
    real = tune.training_step

    def without_fp32(experiment, network, runtime):
        if runtime.how.precision == "fp32":
            raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB\nmore words")
        return real(experiment, network, runtime)

    monkeypatch.setattr(tune, "training_step", without_fp32)
    monkeypatch.setattr(tune, "interleaved", lambda work, n: {how: [1.0] for how in work})
    found = tune.tune(load.load("tiny"), CPU)
    assert found.training["dense"] == Execution(precision="bf16")
    assert found.sampling["dense"] == Execution()
    told = capsys.readouterr().out
    assert "fp32 channels_last: left out (CUDA out of memory. Tried to allocate 9 GiB)\n" in told

    def never(experiment, network, runtime):
        raise RuntimeError("no")

    monkeypatch.setattr(tune, "training_step", never)
    with pytest.raises(UserError, match="tiny: no training step of dense runs on"):
        tune.tune(load.load("tiny"), CPU)


def test_there_is_nothing_to_tune_on_a_gpu(workspace, tiny):
    with pytest.raises(UserError, match="tiny: nothing to tune on a GPU"):
        tune.tune(tiny, CUDA)
    assert not (workspace / "config").exists()


@pytest.mark.parametrize("measured_here", [True, False])
def test_a_tuning_of_another_device_is_told(workspace, capsys, measured_here):
    device = device_name(CPU) if measured_here else "NVIDIA H100"
    write_experiment(workspace)
    e = load.load("tiny").model_copy(update={"tuning": Tuning(device=device)})
    cli._device(e)
    told = capsys.readouterr().out
    assert ("warning: tuned on NVIDIA H100, but this is " in told) != measured_here


@pytest.mark.slow
def test_tune_really_measures(workspace, capsys):
    write_experiment(workspace)
    found = tune.tune(load.load("tiny"), CPU)
    assert found == load.load("tiny").tuning
    assert found.device


def test_a_tuned_network_reruns_what_it_computes_and_nothing_else(vary):
    plain = vary({})
    tuned = vary({"tuning.training": {0.5: {"channels_last": True}}})
    eb, ta = "full-magnitude-ema-0.5-t0-1000", "full-magnitude-ema-0.8-t240-1000"
    assert (
        Job.of(plain, "finetune-region", seed=0, expert=eb, milestone=40).digest
        != Job.of(tuned, "finetune-region", seed=0, expert=eb, milestone=40).digest
    )
    assert (
        Job.of(plain, "finetune-region", seed=0, expert=ta, milestone=20).digest
        == Job.of(tuned, "finetune-region", seed=0, expert=ta, milestone=20).digest
    )
    assert (
        Job.of(plain, "train-dense", seed=0, search="full").digest
        == Job.of(tuned, "train-dense", seed=0, search="full").digest
    )
    assert (
        Job.of(plain, "sample", seed=0, run="eb-50").digest
        == Job.of(tuned, "sample", seed=0, run="eb-50").digest
    )
    sampled = vary({"tuning.sampling": {"dense": {"precision": "bf16"}}})
    assert (
        Job.of(plain, "sample", seed=0, run="unpruned").digest
        != Job.of(sampled, "sample", seed=0, run="unpruned").digest
    )
    assert (
        Job.of(plain, "sample", seed=0, run="eb-50").digest
        == Job.of(sampled, "sample", seed=0, run="eb-50").digest
    )


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("training: {dense: {precison: bf16}}", "training.dense.precison: unknown key; 'precison'"),
        ("training: {dense: {precision: fp16}}", "training.dense.precision: 'fp16' is not known"),
        ("trainng: {}", "trainng: unknown key"),
        ("- 1", "must be a mapping"),
        ("training: [", "not valid YAML"),
    ],
)
def test_a_damaged_tuning_file_is_one_line(workspace, written, named):
    write_experiment(workspace)
    path = workspace / "config/tuning/tiny.yaml"
    path.parent.mkdir()
    path.write_text(written)
    with pytest.raises(UserError, match=r"config/tuning/tiny\.yaml") as error:
        load.load("tiny")
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_the_whole_pipeline_follows_the_tuning(workspace, monkeypatch):
    """Dense training and sampling ask for the execution of the right network."""
    write_experiment(workspace, {"tuning.sampling": {"0.3": {"precision": "bf16"}}})
    asked = []
    real = Runtime.of

    def spying(experiment, use, network, device):
        asked.append((use, network))
        return real(experiment, use, network, device)

    monkeypatch.setattr(Runtime, "of", spying)
    e = load.load("tiny")
    monkeypatch.setattr(store, "load", lambda path, prefix="": (None, e.architecture, {"step": 20}))
    monkeypatch.setattr(store, "build", lambda c, t: store.fresh(c, 0, "x"))
    for expert in e.runs["ta-eb"].experts:
        where = dict(seed=0, expert=expert.key, milestone=expert.iterations)
        path = layout.path(layout.MILESTONE, experiment="tiny", **where)
        path.parent.mkdir(parents=True)
        path.touch()
        vouch(e, "finetune-region", **where)
    sample.sample(e, "ta-eb", 0, CPU)
    assert asked == [("sampling", "0.3"), ("sampling", "0.8")]
    ledger = read_json(layout.path(layout.SAMPLE_LEDGER, experiment="tiny", seed=0, run="ta-eb"))
    precisions = {network: how["precision"] for network, how in ledger["execution"].items()}
    assert precisions == {"0.3": "bf16", "0.8": "fp32"}
    assert yaml.safe_load("0.3") == 0.3
