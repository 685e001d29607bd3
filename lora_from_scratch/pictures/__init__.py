"""Handwritten digits: a classifier and a diffusion model small enough to train on a laptop, and how both are adapted."""
