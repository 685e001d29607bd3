"""A small classifier and a small diffusion model for handwritten digits, and adapting both."""
