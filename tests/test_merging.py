"""Merging adapters: laws of the functions of unit 24, and its exhibit."""

from __future__ import annotations

import pytest
import torch

from lora_from_scratch.methods.merging import drop_and_rescale, intruder_dimensions, merge_agreeing, sum_of_loras, trim
from lora_from_scratch.museum import averaged_factors

PAIRS = [(torch.eye(2)[:1], torch.eye(2)[:, :1]), (torch.eye(2)[1:], torch.eye(2)[:, 1:])]


def test_the_exhibit_has_cross_terms_and_the_sum_of_the_library_has_none() -> None:
    A, B = averaged_factors.faulty_sum_of_loras(PAIRS, [1.0, 1.0])
    assert torch.equal(B @ A, torch.ones(2, 2))
    A, B = sum_of_loras(PAIRS, [1.0, 1.0])
    assert torch.equal(B @ A, torch.eye(2))


def test_the_exhibit_fails_the_test_of_the_museum_and_the_sum_of_the_library_passes() -> None:
    averaged_factors.test_sum_of_loras(sum_of_loras)
    with pytest.raises(AssertionError, match="weighted sum"):
        averaged_factors.test_sum_of_loras(averaged_factors.faulty_sum_of_loras)


def test_a_sum_of_loras_has_the_rank_of_all_together() -> None:
    torch.manual_seed(0)
    pairs = [(torch.randn(rank, 12), torch.randn(10, rank)) for rank in (1, 2, 4)]
    A, B = sum_of_loras(pairs, [1.0, -2.0, 0.5])
    assert int(torch.linalg.matrix_rank(B @ A)) == 7


def test_trimming_keeps_no_entry_that_is_smaller_than_one_that_is_dropped() -> None:
    update = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    kept = trim(update, 0.3) != 0
    assert int(kept.sum()) == 180
    assert update[kept].abs().min() >= update[~kept].abs().max()


def test_updates_that_agree_everywhere_are_averaged() -> None:
    updates = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) + 0.1
    assert torch.allclose(merge_agreeing(updates), updates.mean(dim=0))
    assert torch.allclose(merge_agreeing(-updates), -updates.mean(dim=0))


def test_dropping_and_rescaling_leaves_the_mean_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    update = torch.tensor([1.0, -2.0, 3.0])
    mean = torch.stack([drop_and_rescale(update, 0.8, generator) for _ in range(20_000)]).mean(dim=0)
    assert torch.allclose(mean, update, rtol=0.1)


def test_scaling_a_weight_brings_no_intruder_and_a_strong_random_direction_brings_one() -> None:
    torch.manual_seed(0)
    W = torch.randn(64, 64)
    change = torch.outer(torch.randn(64), torch.randn(64))
    assert intruder_dimensions(W, 3 * W, leading=10) == 0
    assert intruder_dimensions(W, W + change, leading=10) == 1
