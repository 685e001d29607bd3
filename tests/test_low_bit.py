"""Weights in 2, 3, 4 and 8 bits: packing, integers in groups, NormalFloat."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_from_scratch.quantization.low_bit import (
    BITS,
    LowBitTensor,
    normal_float_codebook,
    pack_bits,
    quantize_groups,
    quantize_integer,
    quantize_normal_float,
    unpack_bits,
)
from lora_from_scratch.quantization.low_bit_linear import LowBitLinear
from lora_from_scratch.quantization.nf4 import nf4_codebook
from lora_from_scratch.quantization.quantized_tensor import quantize_4bit


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# --- Packing -----------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 30), st.sampled_from(BITS), st.integers(0, 99))
def test_what_is_packed_and_unpacked_is_the_same(rows: int, n: int, bits: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, n), generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-n // 8) * bits if bits < 8 else n)
    assert torch.equal(unpack_bits(packed, bits, n), codes.int())


@pytest.mark.parametrize("bits", BITS)
def test_the_bits_stand_one_behind_the_other(bits: int) -> None:
    codes = torch.randint(2**bits, (1, 16), generator=torch.Generator().manual_seed(1))
    text = "".join(f"{code:0{bits}b}" for code in codes[0].tolist())
    assert "".join(f"{byte:08b}" for byte in pack_bits(codes, bits)[0].tolist()) == text


# --- Integers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("columns", "group"), [(32, 8), (30, 8), (5, 32), (7, 1)])
def test_each_weight_is_the_nearest_of_the_steps_of_its_group(bits: int, columns: int, group: int) -> None:
    W = normal(6, columns)
    q = quantize_integer(W, bits, group)
    back = q.dequantize()
    for start in range(0, columns, group):
        part, got = W[:, start : start + group], back[:, start : start + group]
        least, most = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        steps = least + (most - least) / (2**bits - 1) * torch.arange(2.0**bits)  # (6, 2^bits)
        nearest = (part[:, :, None] - steps[:, None, :]).abs().amin(dim=2)
        torch.testing.assert_close((got - part).abs(), nearest, atol=1e-6, rtol=1e-5)
        assert ((got[:, :, None] - steps[:, None, :]).abs().amin(dim=2) < 1e-6).all()


@pytest.mark.parametrize(("columns", "group"), [(32, 8), (30, 8), (5, 32), (7, 1)])
def test_codes_scales_and_zeros_are_those_of_the_packed_weight(columns: int, group: int) -> None:
    W = normal(6, columns)
    codes, scale, zero = quantize_groups(W, 3, group)
    q = quantize_integer(W, 3, group)
    assert torch.equal(codes.int(), q.codes)
    assert torch.equal(scale, q.scale)
    assert q.zero is not None
    assert torch.equal(zero, q.zero)
    for k, start in enumerate(range(0, columns, group)):
        part = W[:, start : start + group]
        torch.testing.assert_close(zero[:, k], part.amin(1))
        torch.testing.assert_close(zero[:, k] + 7 * scale[:, k], part.amax(1))


def test_a_group_of_equal_weights_is_exact_and_a_bfloat16_weight_stays_one() -> None:
    W = torch.full((2, 8), 0.3, dtype=torch.bfloat16)
    q = quantize_integer(W, 2, 4)
    assert q.dequantize().dtype == torch.bfloat16
    assert torch.equal(q.dequantize(), W)
    assert torch.equal(q.dequantize(torch.float32), W.float())


@pytest.mark.parametrize("bits", BITS)
def test_the_bytes_are_those_of_codes_scales_and_zeros(bits: int) -> None:
    q = quantize_integer(normal(16, 64), bits, 32)
    assert q.nbytes == 16 * 64 * bits // 8 + 2 * 4 * 16 * 2
    n = quantize_normal_float(normal(16, 64), bits, 16)
    assert n.nbytes == 16 * 64 * bits // 8 + 16 * 4 + 4 + 4  # a byte for each scale, one scale of the scales, the mean


# --- NormalFloat -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
def test_in_four_bits_it_is_nf4(double: bool) -> None:
    W = normal(16, 128)
    assert torch.equal(normal_float_codebook(4), nf4_codebook())
    expected = quantize_4bit(W, blocksize=64, double_quant=double).dequantize()
    torch.testing.assert_close(quantize_normal_float(W, 4, 64, double).dequantize(), expected, atol=0, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_the_values_are_quantiles_of_the_normal_distribution(bits: int) -> None:
    values = normal_float_codebook(bits)
    assert len(values) == 2**bits
    assert torch.equal(values, values.sort().values)
    assert (values[0], values[-1]) == (-1, 1)
    assert values[2 ** (bits - 1) - 1] == 0
    areas = torch.distributions.Normal(0.0, 1.0).cdf(values * torch.special.ndtri(torch.tensor(0.9677083)))
    for half in (areas[: 2 ** (bits - 1)], areas[2 ** (bits - 1) - 1 :]):
        torch.testing.assert_close(half.diff(), half.diff()[:1].expand(len(half) - 1), atol=1e-5, rtol=1e-4)


def test_more_bits_and_smaller_groups_are_nearer() -> None:
    W = normal(64, 256)
    for quantize in (quantize_integer, quantize_normal_float):
        errors = [(W - quantize(W, bits, 64).dequantize()).norm() for bits in BITS]
        assert errors == sorted(errors, reverse=True)
        assert (W - quantize(W, 3, 16).dequantize()).norm() < errors[1]


# --- The layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["integer", "normal"])
def test_the_layer_computes_with_the_weight_and_its_state_goes_into_another(kind: str, bias: bool) -> None:
    def quantized(weight: Tensor) -> LowBitTensor:
        return quantize_integer(weight, 3, 8) if kind == "integer" else quantize_normal_float(weight, 3, 8)

    torch.manual_seed(0)
    dense, other = nn.Linear(20, 6, bias=bias), nn.Linear(20, 6, bias=bias)
    layer = LowBitLinear.in_place_of(dense, quantized(dense.weight))
    x = torch.randn(4, 20, requires_grad=True)
    y = layer(x)
    weight = layer.quantized.dequantize()
    torch.testing.assert_close(y, nn.functional.linear(x, weight, dense.bias))
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * y.detach() @ weight)
    again = LowBitLinear.in_place_of(other, quantized(other.weight))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), y)
    state = layer.state_dict() | {"weight": layer.weight[:, :-1]}
    with pytest.raises(RuntimeError, match=r"weight must have the shape \(6, 9\) of torch.uint8, got \(6, 8\)"):
        again.load_state_dict(state)
    assert torch.equal(layer.to(torch.bfloat16).quantized.dequantize(), weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4), 5), "bits must be one of 2, 3, 4, 8, got 5"),
        ((torch.zeros(3, 4), True), "bits must be one of 2, 3, 4, 8, got True"),
        ((torch.zeros(3, 4), 4, 0), "group_size must be a whole number of at least 1, got 0"),
        ((torch.zeros(3), 4), r"the weight must be a matrix \(out, in\), got shape \(3,\)"),
        ((torch.full((2, 2), torch.inf), 4), "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[Tensor, int], message: str) -> None:
    for quantize in (quantize_integer, quantize_normal_float):
        with pytest.raises(ValueError, match=message):
            quantize(*arguments)
