"""Handwritten digits: a small classifier and a small diffusion model, and how both are adapted."""
