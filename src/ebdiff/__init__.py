"""Early-bird tickets and timestep-aware experts for cheap diffusion training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ebdiff.diffusion.ensemble import Ensemble

__version__ = "0.1.0"


def load(source: str | Path, run: str | None = None, seed: int = 0, device: str | None = None) -> Ensemble:
    """The finished experts of a run, to draw images from or to predict noise with.

    Args:
        source: an experiment of the project in the working directory, or a file that `ebdiff export` wrote.
        run: one of the experiment's; a file holds one.
        seed: of the experts.
        device: such as ``cpu`` or ``cuda:1``; None: as the experiment says, else a GPU where there is one.

    Raises:
        ebdiff.system.errors.UserError: it isn't there, isn't finished, or isn't what its stages made.
    """
    from ebdiff.diffusion import ensemble  # here, because torch takes seconds

    return ensemble.load(source, run, seed, device)
