"""The exhibit of unit 17, and the laws of the functions that its learners write."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lora_from_scratch.methods.glora import scale_and_shift
from lora_from_scratch.methods.mora import compress, decompress
from lora_from_scratch.methods.multilora import scaled_B
from lora_from_scratch.museum import zero_start


def test_the_exhibit_learns_nothing_until_its_first_restart() -> None:
    torch.manual_seed(0)
    layer = zero_start.FaultyReLoRALayer(torch.randn(6, 5), rank=2)
    x = torch.randn(7, 5)
    optimizer = torch.optim.Adam([layer.A, layer.B], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    assert not layer.A.any()
    assert not layer.B.any()
    layer.restart()
    layer(x).square().sum().backward()
    assert layer.B.grad is not None
    assert layer.B.grad.any()


def test_the_exhibit_fails_the_test_of_the_museum_and_the_mended_layer_passes() -> None:
    zero_start.test_relora_layer(zero_start.ReLoRALayer)
    with pytest.raises(AssertionError, match="no gradient reaches A or B at the start"):
        zero_start.test_relora_layer(zero_start.FaultyReLoRALayer)


@pytest.mark.parametrize("cycles", [1, 3])
def test_the_updates_of_several_cycles_add_up_to_a_matrix_of_their_common_rank(cycles: int) -> None:
    torch.manual_seed(0)
    W = torch.randn(20, 16, dtype=torch.float64)
    layer = zero_start.ReLoRALayer(W, rank=2).double()
    for _ in range(cycles):
        with torch.no_grad():
            layer.B.normal_()
        layer.restart()
    assert int(torch.linalg.matrix_rank(layer.W - W)) == 2 * cycles


@pytest.mark.parametrize("q", [1, 4, 12])
def test_decompress_is_the_transpose_of_compress_where_q_divides_the_width(q: int) -> None:
    torch.manual_seed(0)
    x, z = torch.randn(12, dtype=torch.float64), torch.randn(q, dtype=torch.float64)
    assert torch.allclose(compress(x, q) @ z, x @ decompress(z, 12))


def test_scaled_loras_are_one_lora() -> None:
    torch.manual_seed(0)
    A, B, c = torch.randn(3, 2, 7), torch.randn(3, 5, 2), torch.randn(3, 5)
    several = sum(c[i].diag() @ B[i] @ A[i] for i in range(3))
    assert torch.allclose(
        scaled_B(torch.cat(list(B), dim=1), c) @ torch.cat(list(A)), torch.as_tensor(several), atol=1e-5
    )


def test_the_coupling_of_glora_is_a_shift_of_the_input() -> None:
    torch.manual_seed(0)
    W, b, x, shift = torch.randn(4, 6), torch.randn(4), torch.randn(3, 6), torch.randn(6, 1)
    assert torch.allclose(F.linear(x, *scale_and_shift(W, b, C=shift)), F.linear(x + shift[:, 0], W, b), atol=1e-5)
