"""AdaLoRA's choice of triplets, and the exhibit of unit 18: laws, and values from the definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_from_scratch.methods.adalora import AdaLoRALinear
from lora_from_scratch.methods.rank_allocation import allocate, cubic_budget, smoothed_sensitivity, triplet_scores
from lora_from_scratch.museum import never_allocated


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=5), st.data())
def test_exactly_the_budget_is_kept_and_nothing_that_is_cut_is_better(
    scores: list[list[int]], data: st.DataObject
) -> None:
    budget = data.draw(st.integers(0, sum(map(len, scores))))
    masks = allocate([torch.tensor(one, dtype=torch.float32) for one in scores], budget)
    assert [len(mask) for mask in masks] == [len(one) for one in scores]
    flat = [
        (score, bool(kept))
        for one, mask in zip(scores, masks, strict=True)
        for score, kept in zip(one, mask, strict=True)
    ]
    kept, cut = [s for s, k in flat if k], [s for s, k in flat if not k]
    assert len(kept) == budget
    assert not kept or not cut or min(kept) >= max(cut)


@given(st.integers(0, 50), st.integers(1, 60), st.integers(0, 200), st.integers(0, 200))
def test_the_budget_is_that_of_whole_numbers(first: int, length: int, target: int, more: int) -> None:
    for step in range(1, first + length + 3):
        left = min(max(first + length - step, 0), length)
        exact = target + more * left**3 // length**3
        budget = cubic_budget(step, first, first + length, target + more, target)
        assert budget == exact or (budget == exact - 1 and more * left**3 % length**3 == 0)  # a float just below it


def test_a_constant_sensitivity_is_approached_and_its_uncertainty_vanishes() -> None:
    w, g = torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 0.5])
    means = torch.zeros(2), torch.zeros(2)
    for _ in range(300):
        means = smoothed_sensitivity(w, g, *means, 0.9, 0.8)
    torch.testing.assert_close(means[0], torch.tensor([6.0, 0.5]))
    torch.testing.assert_close(means[1], torch.zeros(2), atol=1e-5, rtol=0)


def test_permuting_triplets_permutes_their_scores() -> None:
    torch.manual_seed(0)
    shapes = {"lora_A": (4, 6), "lora_E": (4, 1), "lora_B": (5, 4)}
    one, other = ({part: torch.rand(shape) for part, shape in shapes.items()} for _ in range(2))
    order = torch.tensor([2, 0, 3, 1])

    def permuted(table: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {part: t[:, order] if part == "lora_B" else t[order] for part, t in table.items()}

    scores = triplet_scores(one, other)
    torch.testing.assert_close(triplet_scores(permuted(one), permuted(other)), scores[order])


def test_orthonormal_factors_have_no_distance_and_zeros_that_of_the_identity() -> None:
    layer = AdaLoRALinear(nn.Linear(7, 5), 3, 3.0, 0.0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.lora_A.copy_(torch.linalg.qr(torch.randn(7, 3))[0].T)
        layer.lora_B.zero_()
    expected = torch.tensor([0.0, 3.0**0.5])
    torch.testing.assert_close(layer.distances_from_orthonormal(), expected, atol=1e-5, rtol=0)


def test_the_exhibit_fails_the_test_of_the_museum_and_the_mended_loop_passes() -> None:
    never_allocated.test_train(never_allocated.train)
    with pytest.raises(AssertionError, match="in five steps it is called with"):
        never_allocated.test_train(never_allocated.faulty_train)
