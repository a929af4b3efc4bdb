"""The diffusion process: schedule, timestep laws, samplers."""
