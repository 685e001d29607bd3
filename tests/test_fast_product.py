"""The fused products of LoRA are the equation, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_from_scratch.methods.fast_product import add_product

quick = settings(max_examples=40, deadline=None)


@quick
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    out=st.integers(1, 40),
    rank=st.integers(1, 9),
    scaling=st.sampled_from([0.0, 0.25, 1.0, -3.0]),
    seed=st.integers(0, 10_000),
)
def test_the_fused_product_and_its_gradients_are_those_of_y_plus_s_h_b_transposed(
    shape: list[int], out: int, rank: int, scaling: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((*shape, out), (*shape, rank), (out, rank))
    y, h, B = (torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes)
    fused, equation = add_product(y, h, B, scaling), y + scaling * (h @ B.T)
    assert fused.shape == equation.shape
    torch.testing.assert_close(fused, equation, rtol=1e-12, atol=1e-12)
    grad = torch.randn(fused.shape, generator=generator, dtype=torch.float64)
    ours, expected = (torch.autograd.grad(result, (y, h, B), grad) for result in (fused, equation))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_product_leaves_its_arguments_as_they_are_and_keeps_their_dtype(dtype: torch.dtype) -> None:
    y, h, B = torch.randn(2, 3, 8).to(dtype), torch.randn(2, 3, 4).to(dtype), torch.randn(8, 4).to(dtype)
    before = [tensor.clone() for tensor in (y, h, B)]
    assert add_product(y, h, B, 0.5).dtype == dtype
    assert all(map(torch.equal, (y, h, B), before))
