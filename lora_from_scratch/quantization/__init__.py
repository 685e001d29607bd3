"""Weights in 8 and 4 bits, and layers that compute with them."""
