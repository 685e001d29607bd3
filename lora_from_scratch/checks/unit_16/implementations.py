"""Implementations of `random_combination` on which a learner's test is tried.

They stand for the ways in which code draws random numbers from a seed, and draw other numbers than the library's. Each
entry of `IMPLEMENTATIONS` makes a new function, so that nothing is left over from the implementation before it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Implementation = Callable[[Tensor, tuple[int, int], int], Tensor]


seed_globally = torch.default_generator.manual_seed  # as `torch.manual_seed`, but much faster


def combine(c: Tensor, U: Tensor) -> Tensor:
    return torch.tensordot(c, U.to(c.dtype), dims=1)


# --- Sound -----------------------------------------------------------------------------------------------


def own_generator() -> Implementation:
    return lambda c, shape, seed: combine(c, torch.randn(len(c), *shape, generator=torch.Generator().manual_seed(seed)))


def restored_state() -> Implementation:
    def random_combination(c: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
        before = torch.get_rng_state()
        seed_globally(seed)
        U = torch.randn(len(c), *shape)
        torch.set_rng_state(before)
        return combine(c, U)

    return random_combination


def forked_generator() -> Implementation:
    def random_combination(c: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            seed_globally(seed)
            return combine(c, torch.randn(len(c), *shape))

    return random_combination


def numpy_generator() -> Implementation:
    def random_combination(c: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
        return combine(c, torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], size=(len(c), *shape))))

    return random_combination


def sound_cache() -> Implementation:
    kept: dict[tuple[int, ...], Tensor] = {}

    def random_combination(c: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
        key = (len(c), *shape, seed)
        if key not in kept:
            kept[key] = torch.randn(len(c), *shape, generator=torch.Generator().manual_seed(seed))
        return combine(c, kept[key])

    return random_combination


# --- Faulty: the global generator is another one afterwards -----------------------------------------------


def reseeds_with_a_random_number() -> Implementation:
    def random_combination(c: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
        afterwards = int(torch.randint(2**31, ()))
        seed_globally(seed)
        U = torch.randn(len(c), *shape)
        seed_globally(afterwards)
        return combine(c, U)

    return random_combination


def seeds_and_leaves_it() -> Implementation:
    def random_combination(c: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
        seed_globally(seed)
        return combine(c, torch.randn(len(c), *shape))

    return random_combination


def goes_back_to_the_seed_in_use() -> Implementation:
    def random_combination(c: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
        before = torch.initial_seed()
        seed_globally(seed)
        U = torch.randn(len(c), *shape)
        seed_globally(before)
        return combine(c, U)

    return random_combination


def cached_after_seeding() -> Implementation:
    kept: dict[tuple[int, ...], Tensor] = {}

    def random_combination(c: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
        key = (len(c), *shape, seed)
        if key not in kept:
            seed_globally(seed)
            kept[key] = torch.randn(len(c), *shape)
        return combine(c, kept[key])

    return random_combination


def shuffles_with_the_global_generator() -> Implementation:
    """The sum does not depend on the order, so the result is right."""

    def random_combination(c: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
        U = torch.randn(len(c), *shape, generator=torch.Generator().manual_seed(seed))
        order = torch.randperm(len(c))
        return combine(c[order].double(), U[order].double()).to(c.dtype)

    return random_combination


# --- Faulty: the result is not the seed's ------------------------------------------------------------------


def forked_without_a_seed() -> Implementation:
    def random_combination(c: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            return combine(c, (seed + 1) * torch.randn(len(c), *shape))

    return random_combination


def one_generator_for_all_calls() -> Implementation:
    generators: dict[int, torch.Generator] = {}

    def random_combination(c: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
        generator = generators.setdefault(seed, torch.Generator().manual_seed(seed))
        return combine(c, torch.randn(len(c), *shape, generator=generator))

    return random_combination


def adds_the_global_seed() -> Implementation:
    def random_combination(c: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + torch.initial_seed())
        return combine(c, torch.randn(len(c), *shape, generator=generator))

    return random_combination


def ignores_the_seed() -> Implementation:
    return lambda c, shape, seed: combine(c, torch.randn(len(c), *shape, generator=torch.Generator().manual_seed(0)))


SOUND: dict[str, Callable[[], Implementation]] = {
    "a generator of its own": own_generator,
    "the global generator, whose state is put back": restored_state,
    "a copy of the global generator (fork_rng)": forked_generator,
    "NumPy's generator": numpy_generator,
    "a generator of its own, and the matrices are kept": sound_cache,
}
FAULTY: dict[str, Callable[[], Implementation]] = {
    "the global generator gets a random seed afterwards": reseeds_with_a_random_number,
    "the global generator is seeded and left so": seeds_and_leaves_it,
    "the global generator gets back its seed, and so starts again": goes_back_to_the_seed_in_use,
    "the global generator is seeded when a seed is used for the first time": cached_after_seeding,
    "the global generator is used for the order of the sum": shuffles_with_the_global_generator,
    "a copy of the global generator, which is not seeded": forked_without_a_seed,
    "a generator that goes on from call to call": one_generator_for_all_calls,
    "the seed is added to the global generator's": adds_the_global_seed,
    "the seed is not used": ignores_the_seed,
}
IMPLEMENTATIONS = SOUND | FAULTY
