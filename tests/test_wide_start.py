"""The exhibit of unit 09: how wide A starts if it is stored the other way round."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_from_scratch.methods.lora import initial_factors
from lora_from_scratch.museum import wide_start
from lora_from_scratch.museum.wide_start import FaultyLoRALayer


@pytest.mark.parametrize(("in_features", "rank"), [(768, 8), (256, 1), (64, 64)])
def test_the_exhibit_is_too_wide_by_the_root_of_in_over_rank(in_features: int, rank: int) -> None:
    torch.manual_seed(0)
    linear, layer = nn.Linear(in_features, 2000), FaultyLoRALayer(in_features, 5, rank, 16)
    ratio = float(layer.A.detach().abs().max() / linear.weight.detach().abs().max())
    assert ratio == pytest.approx((in_features / rank) ** 0.5, rel=0.05)


def test_the_exhibit_fails_the_test_of_the_museum() -> None:
    with pytest.raises(AssertionError, match=r"times as wide as it should be"):
        wide_start.test_lora_start(FaultyLoRALayer)


def test_the_start_of_the_library_and_that_of_a_linear_layer_pass() -> None:
    def ours(in_features: int, out_features: int, rank: int, alpha: float) -> SimpleNamespace:
        A, B = initial_factors(in_features, out_features, rank)
        return SimpleNamespace(A=A, B=B)

    def linear(in_features: int, out_features: int, rank: int, alpha: float) -> SimpleNamespace:
        return SimpleNamespace(A=nn.Linear(in_features, rank).weight.T, B=torch.zeros(rank, out_features))

    wide_start.test_lora_start(ours)
    wide_start.test_lora_start(linear)


def test_two_zero_factors_fail() -> None:
    with pytest.raises(AssertionError):
        wide_start.test_lora_start(lambda i, o, r, a: SimpleNamespace(A=torch.zeros(r, i), B=torch.zeros(o, r)))
