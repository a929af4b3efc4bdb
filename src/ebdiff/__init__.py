"""Early-bird tickets and timestep-aware experts for cheap diffusion training."""

__version__ = "0.1.0"
