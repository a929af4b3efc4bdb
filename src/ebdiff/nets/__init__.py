"""Denoising networks and how they are stored."""
