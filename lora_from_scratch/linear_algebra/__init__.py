"""Rank, the singular value decomposition and subspaces, from scratch."""
