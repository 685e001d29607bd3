"""Random choices as a function of (seed, step); see `training`."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def step_seed(seed: int, step: int, stream: int = 0) -> int:
    """A seed for one step (and one process) of a run, hashed so that the seeds of neighbouring steps are unrelated."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) % 2**64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64  # SplitMix64's mixer (Steele et al. 2014)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
    return (mixed ^ (mixed >> 31)) % 2**63


def shuffled_places(count: int, batch_size: int, seed: int, step: int) -> list[tuple[int, int]]:
    """The (epoch, item) pairs of one step's batch: every item once per epoch, in a new random order each epoch."""
    first = step * batch_size
    places = (divmod(index, count) for index in range(first, first + batch_size))
    return [(epoch, int(_order(count, seed, epoch)[place])) for epoch, place in places]


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(step_seed(seed, epoch, stream=1)))
