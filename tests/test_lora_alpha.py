"""Alpha exchanged for a learning rate: the same change of the weight after every step of Adam."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_from_scratch.finetune.alpha_and_learning_rate import exchange_alpha
from lora_from_scratch.methods.lora import delta_weight, lora_scaling


def trained(A: Tensor, B: Tensor, alpha: float, rate: float, steps: int = 12) -> list[Tensor]:
    """dW at the start and after each step of PyTorch's Adam, fitting a fixed random matrix with sixth powers in it."""
    target = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A, B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
    optimizer = torch.optim.Adam([A, B], lr=rate, eps=1e-30)
    changes = []
    for _ in range(steps):
        dW = delta_weight(A, B, lora_scaling(len(A), alpha))
        changes.append(dW.detach())
        optimizer.zero_grad()
        ((dW - target).square() + (dW - target) ** 6).mean().backward()
        optimizer.step()
    return changes


def factors(seed: int, start_at_zero: bool) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(2, 5, generator=draw, dtype=torch.float64)
    B = torch.randn(7, 2, generator=draw, dtype=torch.float64)
    return A, 0 * B if start_at_zero else B


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.floats(0.5, 50), st.floats(0.5, 50))
def test_the_exchanged_lora_has_the_same_change_after_every_step(
    seed: int, start_at_zero: bool, alpha: float, new_alpha: float
) -> None:
    A, B = factors(seed, start_at_zero)
    first = trained(A, B, alpha, 0.02)
    new_A, new_B, new_rate = exchange_alpha(A, B, alpha, 0.02, new_alpha)
    for one, other in zip(first, trained(new_A, new_B, new_alpha, new_rate), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9)


def test_without_the_exchange_another_alpha_learns_something_else() -> None:
    A, B = factors(0, True)
    first, other = trained(A, B, 4, 0.02)[-1], trained(A, B, 16, 0.02)[-1]
    assert float((first - other).norm()) > 0.1 * float(first.norm())


def test_the_same_alpha_changes_nothing() -> None:
    A, B = factors(1, False)
    new_A, new_B, rate = exchange_alpha(A, B, 8, 0.1, 8)
    assert torch.equal(new_A, A)
    assert torch.equal(new_B, B)
    assert rate == pytest.approx(0.1)
