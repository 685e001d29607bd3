"""The exhibit of unit 19, and the greedy allocation of bits that its learners write."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from lora_from_scratch.checks.unit_19.splits import FAULTY, SOUND
from lora_from_scratch.methods.greedy_allocation import allocate_greedily
from lora_from_scratch.methods.lq_lora import allocate, split
from lora_from_scratch.museum import last_iterate
from lora_from_scratch.quantization.low_bit import LowBitTensor, quantize_normal_float


def with_bits(*bits: int) -> Callable[[torch.Tensor], LowBitTensor]:
    """A way to quantise that takes another number of bits at each call."""
    following = iter(bits)
    return lambda M: quantize_normal_float(M, next(following), 16)


def off(W: torch.Tensor, result: tuple[LowBitTensor, torch.Tensor, torch.Tensor]) -> float:
    Q, A, B = result
    return float((W - Q.dequantize() - B @ A).norm())


def test_the_exhibit_returns_the_iteration_in_which_the_error_rose_and_the_library_the_one_before() -> None:
    W = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    errors = {}
    for name, function in {"exhibit": last_iterate.faulty_split, "library": split}.items():
        errors[name] = off(W, function(W, 2, with_bits(2, 4, 3, 8), 4))
    best = off(W, split(W, 2, with_bits(2, 4), 2))
    assert errors["library"] == pytest.approx(best, rel=1e-6)
    assert errors["exhibit"] > 1.2 * best


def test_the_test_of_the_museum_passes_for_sound_functions_and_fails_for_faulty_ones() -> None:
    for sound in (split, *SOUND.values()):
        last_iterate.test_split(sound)
    for faulty in (last_iterate.faulty_split, *FAULTY.values()):
        with pytest.raises(AssertionError):
            last_iterate.test_split(faulty)


def table(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(4, 4, generator=generator, dtype=torch.float64)
    return errors, torch.randint(1, 9, (4, 4), generator=generator).double()


def total(plan: list[int], of: torch.Tensor) -> float:
    return sum(float(of[i, c]) for i, c in enumerate(plan))


@pytest.mark.parametrize("seed", range(8))
def test_the_greedy_allocation_fits_and_no_change_of_one_matrix_that_fits_would_improve_it(seed: int) -> None:
    errors, sizes = table(seed)
    budget = float(sizes.amin(1).sum()) + 6
    plan = allocate_greedily(errors, sizes, budget)
    assert total(plan, sizes) <= budget
    for i, c in itertools.product(range(4), repeat=2):
        other = [*plan[:i], c, *plan[i + 1 :]]
        larger = total(other, sizes) > total(plan, sizes)
        assert not (larger and total(other, sizes) <= budget and total(other, errors) < total(plan, errors))


def test_the_greedy_allocation_is_the_best_where_the_table_is_convex_and_all_sizes_are_equal() -> None:
    for seed in range(8):
        steps = torch.rand(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        falls = steps.sort(dim=1, descending=True).values  # each step saves less than the one before
        errors = 4 - torch.cat([torch.zeros(5, 1, dtype=torch.float64), falls.cumsum(1)], dim=1)
        sizes = torch.arange(1.0, 5, dtype=torch.float64).expand(5, 4)
        pytest.importorskip("scipy")
        best = allocate(errors, sizes, 12.0)
        assert total(allocate_greedily(errors, sizes, 12.0), errors) == pytest.approx(total(best, errors))


def test_greedy_is_not_always_the_best() -> None:
    errors = torch.tensor([[9.0, 5.0, 9.0], [9.0, 9.0, 1.0]], dtype=torch.float64)
    sizes = torch.tensor([[1.0, 2.0, 1.5], [1.0, 1.5, 4.0]], dtype=torch.float64)
    assert allocate_greedily(errors, sizes, 5.0) == [1, 0]
    assert total([0, 2], errors) < total([1, 0], errors)
    assert total([0, 2], sizes) <= 5.0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing fits into the budget of 1\.5: the least is 2"):
        allocate_greedily(torch.ones(2, 2), torch.ones(2, 2), 1.5)
