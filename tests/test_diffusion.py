import numpy as np
import pytest
import torch
from conftest import vouch

from ebdiff.data.dataset import Cond, to_uint8
from ebdiff.diffusion import ensemble, sample
from ebdiff.diffusion.process import Process
from ebdiff.diffusion.sampling import Router, ddim, ddpm, guided
from ebdiff.diffusion.schedule import alphas_bar, visited
from ebdiff.diffusion.timesteps import Antithetic
from ebdiff.experiment import layout
from ebdiff.experiment.schema import Diffusion, Sampling
from ebdiff.nets import store
from ebdiff.nets.execution import Runtime
from ebdiff.system.batches import Batches
from ebdiff.system.files import read_json
from ebdiff.training.state import State

ABAR = alphas_bar(Diffusion())
CPU = torch.device("cpu")
REGIONS = ((0, 240), (240, 440), (440, 1000))


def per_region(steps):
    return [sum(lo <= t < hi for t in steps) for lo, hi in REGIONS]


def test_alphas_bar_is_the_product_of_all_alphas_so_far():
    product = 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert ABAR[t] == pytest.approx(product, rel=1e-9)


def test_scaled_linear_betas_have_evenly_spaced_roots():
    diffusion = Diffusion(timesteps=5, schedule="scaled_linear", beta_start=0.01, beta_end=0.25)
    product = 1.0
    for t, root in enumerate((0.1, 0.2, 0.3, 0.4, 0.5)):
        product *= 1 - root**2
        assert alphas_bar(diffusion)[t] == pytest.approx(product)


def test_noising_mixes_signal_and_noise_of_each_items_own_timestep():
    x0, eps = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 5, 2), np.float32))
    found = Process(Diffusion()).noised(x0, torch.tensor([0, 400, 999]), eps)
    for row, t in enumerate((0, 400, 999)):
        expected = ABAR[t] ** 0.5 * x0[row] + (1 - ABAR[t]) ** 0.5 * eps[row]
        torch.testing.assert_close(found[row], expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("error", ["l2", "l1"])
@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_the_loss_of_an_item_is_that_of_its_own_values(error, loss):
    """Three sequences of up to 5 points of 2 values; padding holds what would be seen in any sum."""
    predicted, eps = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 5, 2), np.float32))
    lengths, process = (5, 1, 3), Process(Diffusion(error=error, loss=loss))
    for row, length in enumerate(lengths):
        predicted[row, length:] = torch.nan
    predicted.requires_grad_()
    found = process.loss(predicted, eps, torch.arange(5) < torch.tensor(lengths)[:, None])
    for row, length in enumerate(lengths):
        apart = (predicted - eps)[row, :length].flatten()
        values = [abs(v) if error == "l1" else v * v for v in apart.tolist()]
        expected = sum(values) / (len(values) if loss == "mean" else 1)
        assert found[row].item() == pytest.approx(expected, rel=1e-5)
        alone = process.loss(predicted[row : row + 1, :length], eps[row : row + 1, :length])
        assert found[row].item() == pytest.approx(alone.item(), rel=1e-6)
    found.sum().backward()
    assert (predicted.grad[1, 1:] == 0).all() and predicted.grad[1, 0].abs().min() > 0


def test_quad_visits_96_distinct_timesteps():
    steps = visited(Diffusion(), Sampling(spacing="quad", steps=100))
    root = 800**0.5
    asked = [int((root * i / 99) ** 2 + 1e-9) for i in range(100)]
    assert per_region(asked) == [55, 19, 26]
    assert len(steps) == 96
    assert steps[0] == 0
    assert steps[-1] in (799, 800)
    assert set(steps[:-1]) == set(asked[:-1])
    assert steps == sorted(set(steps))


def test_uniform_visits_every_tenth_timestep():
    steps = visited(Diffusion(), Sampling(spacing="uniform", steps=100))
    assert steps == list(range(0, 1000, 10))
    assert per_region(steps) == [24, 20, 56]


def test_ancestral_sampling_visits_all():
    assert visited(Diffusion(timesteps=50), Sampling(sampler="ddpm", steps=10)) == list(range(50))


# --- timesteps of training ----------------------------------------------------------------------------


@pytest.mark.parametrize(("lo", "hi"), [(0, 1000), (240, 460), (440, 1000), (7, 8)])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_timesteps_stay_in_their_span_and_come_in_antithetic_pairs(lo, hi, batch):
    t, weight = Antithetic(lo, hi).draw(np.random.default_rng(0), batch)
    assert t.shape == weight.shape == (batch,)
    assert (weight == 1).all()
    assert lo <= t.min()
    assert t.max() < hi
    half = batch // 2 + 1
    for i in range(half, batch):
        assert t[i] + t[i - half] == lo + hi - 1


def test_timesteps_are_uniform_over_the_span():
    rng = np.random.default_rng(0)
    t = np.concatenate([Antithetic(240, 460).draw(rng, 64)[0] for _ in range(2000)])
    # Partners are dependent; the 33 first halves are not.
    halves = t.reshape(2000, 64)[:, :33].ravel()
    counts = np.bincount(halves - 240, minlength=220)
    expected = len(halves) / 220
    chi2 = ((counts - expected) ** 2 / expected).sum()
    # 219 degrees of freedom: mean 219, standard deviation 20.9.
    assert abs(chi2 - 219) < 4 * 20.9
    assert t.min() == 240
    assert t.max() == 459


# --- samplers, with denoisers that are exactly right ----------------------------------------------------


def level(t):
    return torch.tensor(ABAR)[t].reshape(-1, 1, 1, 1)


def normal(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def sampled(sampler, denoiser, x, steps, clamp=False):
    rng = np.random.default_rng(1)
    return sampler(denoiser, x, steps, ABAR, lambda t: torch.from_numpy(rng.standard_normal(x.shape)), clamp)


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("spacing", ["quad", "uniform"])
def test_ddim_recovers_the_point_of_a_point_mass(spacing, clamp):
    point = torch.linspace(-0.9, 0.9, 16, dtype=torch.float64).reshape(1, 1, 4, 4)

    def eps(x, t):
        return (x - level(t).sqrt() * point) / (1 - level(t)).sqrt()

    steps = visited(Diffusion(), Sampling(spacing=spacing, steps=20))
    x = sampled(ddim, eps, normal((3, 1, 4, 4)), steps, clamp)
    torch.testing.assert_close(x, point.expand(3, 1, 4, 4), rtol=0, atol=1e-8)


def test_ancestral_sampling_adds_no_noise_after_the_last_step():
    def eps(x, t):
        return (x - level(t).sqrt() * 0.5) / (1 - level(t)).sqrt()  # all data at 0.5

    x = sampled(ddpm, eps, normal((3, 1, 4, 4)), list(range(1000)))
    torch.testing.assert_close(x, torch.full_like(x, 0.5), rtol=0, atol=1e-8)


def test_clamping_keeps_x0_in_range():
    def eps(x, t):
        return (x - level(t).sqrt() * 3.0) / (1 - level(t)).sqrt()  # points to 3

    steps = visited(Diffusion(), Sampling(spacing="uniform", steps=20))
    assert sampled(ddim, eps, normal((2, 1, 2, 2)), steps).mean() == pytest.approx(3)
    assert sampled(ddim, eps, normal((2, 1, 2, 2)), steps, clamp=True).max() == pytest.approx(1)


def gaussian_eps(mean, deviation):
    """The optimal denoiser for data N(mean, deviation^2): E[eps | x_t]."""

    def eps(x, t):
        a = level(t)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * deviation**2 + 1 - a)

    return eps


@pytest.mark.parametrize(("mean", "deviation"), [(0.3, 0.2), (-1.0, 1.5)])
def test_ddim_reproduces_gaussian_data(mean, deviation):
    # Data through all 1,000 steps; the ODE's discretisation leaves about 1 %, sampling
    # (n = 10,000) 1 % of the deviation.
    x = sampled(ddim, gaussian_eps(mean, deviation), normal((10_000, 1, 1, 1)), list(range(1000)))
    assert x.mean().item() == pytest.approx(mean, abs=0.04 * deviation)
    assert x.std().item() == pytest.approx(deviation, rel=0.04)


def expected_ancestral_deviation(deviation):
    """Deviation of DDPM's linear chain, followed in closed form: x -> A x + noise of variance beta."""
    variance, before = 1.0, np.concatenate([[1.0], ABAR[:-1]])
    for t in reversed(range(1000)):
        a, b = ABAR[t], before[t]
        beta = 1 - a / b
        # x0 given x is linear with slope sqrt(a) s^2 / (a s^2 + 1 - a); then the posterior mean.
        slope = a**0.5 * deviation**2 / (a * deviation**2 + 1 - a)
        slope = (b**0.5 * beta * slope + (1 - beta) ** 0.5 * (1 - b)) / (1 - a)
        variance = slope**2 * variance + (beta if t else 0)
    return variance**0.5


@pytest.mark.parametrize(("mean", "deviation"), [(0.3, 0.5), (-1.0, 1.0)])
def test_ancestral_sampling_reproduces_gaussian_data(mean, deviation):
    x = sampled(ddpm, gaussian_eps(mean, deviation), normal((10_000, 1, 1, 1)), list(range(1000)))
    assert x.mean().item() == pytest.approx(mean, abs=0.04 * deviation)
    # The data's own deviation, but for the fixed variance's bias at small t ...
    assert x.std().item() == pytest.approx(deviation, rel=0.04)
    # ... which is known: four standard errors of n = 10,000 around it.
    assert x.std().item() == pytest.approx(expected_ancestral_deviation(deviation), rel=0.02)


def test_steps_go_from_the_noisiest_down_and_each_is_visited_once():
    seen = []

    def eps(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    for sampler in (ddim, ddpm):
        seen.clear()
        sampled(sampler, eps, normal((2, 1, 2, 2)), [0, 3, 500, 999])
        assert seen == [999, 500, 3, 0]


# --- the router ---------------------------------------------------------------------------------------


def test_every_timestep_goes_to_the_expert_that_serves_it():
    networks = [lambda x, t, cond, i=i: x + i + t / 1e4 for i in range(3)]
    # Not in order of time: the span decides, not the place in the list.
    router = Router([(440, 1000), (0, 240), (240, 440)], networks)
    for t in range(1000):
        right = 1 if t < 240 else 2 if t < 440 else 0
        assert router.expert(t) is networks[right]
        assert torch.equal(router(torch.zeros(2), t), right + torch.full((2,), t) / 1e4)


def test_guidance_is_both_passes_written_out():
    """eps_null + w (eps_class - eps_null), of a made up network of three classes; 3 says that it is none."""
    calls = []

    def eps(x, t, cond):
        calls.append(len(x))
        return x * (cond.label[:, None] + 1) + t / 1e3

    x, t, label = normal((4, 5)), 7, torch.tensor([0, 2, 1, 0])

    def null(cond):
        return cond._replace(label=torch.full_like(cond.label, 3))

    told, untold = eps(x, t, Cond(label)), eps(x, t, Cond(torch.full((4,), 3)))
    calls.clear()
    for w in (0.0, 1.0, 3.0):
        found = guided(eps, null, w)(x, t, Cond(label))
        torch.testing.assert_close(found, untold + w * (told - untold))
    torch.testing.assert_close(guided(eps, null, 1.0)(x, t, Cond(label)), told)
    assert calls == [8] * 4  # one call for both


# --- whole images --------------------------------------------------------------------------------------


def router_of(experiment):
    """Three experts with fresh weights, louder than at initialisation."""
    networks = []
    for seed in range(3):
        network = store.fresh(experiment.architecture, seed, "test").eval()
        for parameter in network.parameters():
            parameter.data *= 1.5
        networks.append(network)
    return Router(REGIONS, networks)


SHORT = {"sampling.sampler": "ddpm", "diffusion": {"timesteps": 40, "beta_end": 0.3},
         "runs.ta-eb": ..., "tables": {}}  # fmt: skip


@pytest.mark.parametrize(("changes", "serves"), [({}, REGIONS), (SHORT, [(0, 20), (20, 30), (30, 40)])])
def test_images_hardly_depend_on_the_batch(vary, changes, serves):
    e = vary(changes)
    router = Router(serves, router_of(e).experts)

    def images(indices, seed=0):
        return to_uint8(ensemble.generate(e, router, list(indices), seed, CPU)).astype(int)

    whole = images(range(64))
    sevens = np.concatenate([images(range(i, min(i + 7, 64))) for i in range(0, 64, 7)])
    assert whole.shape == sevens.shape == (64, 8, 8, 1)
    assert whole.std() > 10
    assert (abs(sevens - whole) <= 1).mean() >= 0.999
    assert (abs(images([50, 3]) - whole[[50, 3]]) <= 1).mean() >= 0.99
    assert (images([3], seed=1) != whole[3]).mean() > 0.3


def untrained(experiment):
    """Write untrained files where the experts of TA-EB would be."""
    for i, expert in enumerate(experiment.runs["ta-eb"].experts):
        state = State.start(store.fresh(experiment.architecture, i, "test"), Runtime(CPU))
        where = dict(experiment="tiny", seed=0, expert=expert.key, milestone=expert.iterations)
        state.save(layout.path(layout.MILESTONE, **where), experiment.architecture, {})


@pytest.fixture
def experts(workspace, tiny):
    untrained(tiny)
    return workspace


def drawn(experiment):
    """Sample TA-EB from the untrained experts, as if trained under the experiment's settings."""
    for expert in experiment.runs["ta-eb"].experts:
        vouch(experiment, "finetune-region", seed=0, expert=expert.key, milestone=expert.iterations)
    sample.sample(experiment, "ta-eb", 0, CPU)


@pytest.mark.parametrize(("count", "batch"), [(23, 10), (20, 10), (4, 10), (4, 1)])
def test_exactly_n_images_are_drawn(experts, vary, count, batch):
    e = vary({"sampling.images": count, "sampling.batch": batch, "sampling.steps": 4})
    drawn(e)
    folder = experts / "results/tiny/seed0/runs/ta-eb"
    images = np.load(folder / "samples.npy")
    assert (images.shape, images.dtype) == ((count, 8, 8, 1), np.uint8)
    assert (folder / "samples.png").stat().st_size > 0
    assert not (folder / "state").exists()


def test_a_run_may_be_sampled_in_a_way_of_its_own(experts, vary):
    """By the same experts, as if the whole experiment were: only what it says itself is another's."""
    own = {"runs.ta-eb.method": "control", "runs.ta-eb.sampling": {"steps": 3}}
    found = []
    for changes in ({"sampling.steps": 5}, {"sampling.steps": 3}, {"sampling.steps": 5, **own}):
        e = vary({"sampling.images": 6, "sampling.batch": 6, **changes})
        drawn(e)
        folder = experts / "results/tiny/seed0/runs/ta-eb"
        told = read_json(folder / "ledger.json")["evaluations"]
        found.append((told, np.load(folder / "samples.npy").tobytes()))
    assert [told for told, _ in found] == [5, 3, 3]
    assert found[2] == found[1] != found[0]


def test_interrupted_sampling_goes_on_where_it_was(experts, tiny, monkeypatch, capsys):
    folder = experts / "results/tiny/seed0/runs/ta-eb"
    drawn(tiny)
    whole = np.load(folder / "samples.npy")
    (folder / "samples.npy").unlink()

    generate, indices_drawn = ensemble.generate, []

    def counting(experiment, router, indices, *rest):
        if len(indices_drawn) == 2:
            raise KeyboardInterrupt
        indices_drawn.append(indices)
        return generate(experiment, router, indices, *rest)

    monkeypatch.setattr(ensemble, "generate", counting)
    with pytest.raises(KeyboardInterrupt):
        drawn(tiny)
    assert not (folder / "samples.npy").exists()
    indices_drawn.clear()
    monkeypatch.setattr(ensemble, "generate", counting)
    drawn(tiny)
    assert indices_drawn == [[20, 21, 22]]
    assert "going on, 2 batches are there" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(folder / "samples.npy"), whole)


def test_another_batch_in_its_place_is_drawn_again(experts, tiny, monkeypatch, capsys):
    folder = experts / "results/tiny/seed0/runs/ta-eb"
    drawn(tiny)
    whole = np.load(folder / "samples.npy")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Batches, "join", interrupted)
        drawn(tiny)
    (folder / "state/samples/1.npz").write_bytes((folder / "state/samples/0.npz").read_bytes())
    drawn(tiny)
    assert "1.npz: not used (" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(folder / "samples.npy"), whole)


def interrupted(*_):
    raise KeyboardInterrupt


def test_samples_of_other_settings_are_not_gone_on_with(experts, vary, monkeypatch):
    generate, calls = ensemble.generate, []

    def stopping(experiment, router, indices, *rest):
        calls.append(indices[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(experiment, router, indices, *rest)

    monkeypatch.setattr(ensemble, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        drawn(vary({}))
    drawn(vary({"sampling.steps": 9}))
    assert calls == [0, 10, 0, 10, 20]
