"""The noise schedule and the timesteps a sampler visits. NumPy only: the report reads it too."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ebdiff.experiment.schema import Diffusion, Sampler

# beta of all timesteps from first, last and T: DDPM's, and latent diffusion's.
BETAS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "linear": np.linspace,
    "scaled_linear": lambda first, last, timesteps: np.linspace(first**0.5, last**0.5, timesteps) ** 2,
}


def alphas_bar(diffusion: Diffusion) -> np.ndarray:
    """Cumulative product of 1 - beta, float64 of shape (T,)."""
    betas = BETAS[diffusion.schedule](diffusion.beta_start, diffusion.beta_end, diffusion.timesteps)
    return np.cumprod(1 - betas)


def visited(diffusion: Diffusion, sampling: Sampler) -> list[int]:
    """The distinct timesteps a sampler visits, ascending.

    `uniform` takes every (T / steps)-th. `quad` takes int(x^2) for x evenly spaced in
    [0, sqrt(0.8 T)] (DDIM's code); its first few coincide, and a repeated step is an identity, so
    100 quad steps visit 96 timesteps. DDPM ancestral sampling visits all T.
    """
    if sampling.sampler == "ddpm":
        return list(range(diffusion.timesteps))
    if sampling.spacing == "uniform":
        steps = np.arange(0, diffusion.timesteps, max(1, diffusion.timesteps // sampling.steps))
    else:
        steps = np.linspace(0, np.sqrt(diffusion.timesteps * 0.8), sampling.steps) ** 2
    return sorted(set(steps.astype(int).tolist()))
