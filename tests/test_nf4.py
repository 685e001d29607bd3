"""Quantisation: numbers of the paper, laws on random input, bad input (bitsandbytes: test_nf4_bitsandbytes.py)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_from_scratch.quantization.int8 import (
    absmax_int8,
    blockwise_absmax,
    dequantize_int8,
    quantize_dynamic,
)
from lora_from_scratch.quantization.nf4 import (
    CELLS,
    CHUNK,
    CODEBOOKS,
    NestedAbsmax,
    bits_per_weight,
    dequantize_nf4,
    double_dequantize,
    double_quantize,
    int4_codebook,
    interval_of,
    nf4_codebook,
    pack_nibbles,
    quantize_nf4,
    unpack_nibbles,
)
from lora_from_scratch.quantization.quantized_tensor import quantize_4bit

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAPER_NF4 = [  # QLoRA, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022833334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


# --- Numbers of the paper --------------------------------------------------------------------------


def test_the_derived_codebook_is_the_one_that_the_paper_prints() -> None:
    assert torch.equal(nf4_codebook(), torch.tensor(PAPER_NF4))


def test_int4_has_equal_steps_and_its_codes_are_the_integers_plus_8() -> None:
    assert torch.equal(int4_codebook(), torch.tensor([(code - 8) / 7 for code in range(16)]))
    codes = unpack_nibbles(quantize_4bit(torch.tensor([-7.0, -6.6, 0.0, 3.2, 7.0, 1.0]), "int4").packed)
    assert (codes.int() - 8).tolist() == [-7, -7, 0, 3, 7, 1]


def test_nf4_has_the_smallest_error_on_normal_weights() -> None:
    weight = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    error = {
        quant_type: (quantize_4bit(weight, quant_type).dequantize() - weight).square().mean().sqrt().item()
        for quant_type in ("nf4", "fp4", "int4")
    }
    assert error["nf4"] == pytest.approx(0.0920, abs=2e-4)
    assert error["fp4"] == pytest.approx(0.1220, abs=2e-4)
    assert error["nf4"] < error["int4"] < error["fp4"]


def test_double_quantisation_hardly_adds_to_the_error() -> None:
    weight = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    plain, double = (quantize_4bit(weight, double_quant=nested).dequantize() - weight for nested in (False, True))
    assert double.norm() < 1.01 * plain.norm()


def test_a_weight_costs_4_5_bits_and_4_127_with_double_quantisation() -> None:
    assert bits_per_weight() == 4.5
    assert bits_per_weight(double_quant=True) == pytest.approx(4.127, abs=1e-4)
    assert bits_per_weight(bits=8, blocksize=256) == 8.125
    for double_quant in (False, True):
        stored = quantize_4bit(torch.ones(1024, 1024), double_quant=double_quant)
        offset = 4 if double_quant else 0
        assert (stored.nbytes - offset) * 8 / 2**20 == bits_per_weight(double_quant=double_quant)


# --- Laws ------------------------------------------------------------------------------------------

weights = st.builds(
    lambda n, seed, power, dtype: (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 10.0**power).to(
        dtype
    ),
    st.integers(1, 700),
    st.integers(0, 10_000),
    st.integers(-3, 3),
    st.sampled_from(DTYPES),
)
blocksizes = st.sampled_from([1, 2, 16, 64, 256, 1024])
quick = settings(max_examples=60, deadline=None)


@quick
@given(weights, blocksizes, st.sampled_from(["nf4", "fp4", "int4"]))
def test_every_weight_gets_the_nearest_value_and_the_largest_of_a_block_is_exact(
    weight: Tensor, blocksize: int, quant_type: str
) -> None:
    quantized = quantize_4bit(weight, quant_type, blocksize)
    codebook = quantized.codebook.double()
    back = quantized.dequantize(torch.float32)
    scale = quantized.scales.repeat_interleave(blocksize)[: weight.numel()]
    best = (weight.double()[:, None] - codebook * scale.double()[:, None]).abs().amin(dim=1)
    error = (back.double() - weight.double()).abs()
    assert (error <= best + 1e-6 * scale).all()
    widest = codebook[codebook.abs() <= 1].sort().values.diff().max()
    assert (error <= (widest / 2 + 1e-6) * scale).all()  # for NF4: at most 0.152 of the absmax
    largest = weight.abs().float() == scale
    assert torch.equal(back[largest], weight.float()[largest])


@quick
@given(weights, blocksizes)
def test_quantising_what_was_dequantised_changes_nothing(weight: Tensor, blocksize: int) -> None:
    packed, absmax = quantize_nf4(weight, blocksize)
    again, absmax_again = quantize_nf4(dequantize_nf4(packed, absmax, weight.shape, blocksize, weight.dtype), blocksize)
    assert torch.equal(again, packed)
    assert torch.equal(absmax_again, absmax)


@quick
@given(weights, blocksizes)
def test_blockwise_absmax_is_the_maximum_of_each_block(weight: Tensor, blocksize: int) -> None:
    absmax = blockwise_absmax(weight, blocksize)
    assert absmax.dtype == torch.float32
    assert absmax.tolist() == [block.abs().max().item() for block in weight.split(blocksize)]


@quick
@given(weights)
def test_absmax_int8_is_off_by_at_most_half_a_step_and_keeps_the_largest(weight: Tensor) -> None:
    q, absmax = absmax_int8(weight)
    back = dequantize_int8(q, absmax)
    assert q.dtype == torch.int8
    assert q.shape == weight.shape
    assert absmax == weight.abs().max()
    rounding = 2 * torch.finfo(torch.float32).eps * absmax  # of x * scale, of q / 127 and of its product with absmax
    assert ((back - weight.float()).abs() <= absmax / 254 + rounding).all()
    largest = weight.abs().argmax()
    assert back[largest] == weight[largest]


@quick
@given(st.lists(st.integers(0, 15), max_size=80).map(lambda codes: codes[: len(codes) // 2 * 2]))
def test_packing_and_unpacking_are_inverses(codes: list[int]) -> None:
    packed = pack_nibbles(torch.tensor(codes, dtype=torch.int64))
    assert packed.shape == (len(codes) // 2, 1)
    assert packed.flatten().tolist() == [16 * a + b for a, b in zip(codes[::2], codes[1::2], strict=True)]
    assert unpack_nibbles(packed).tolist() == codes


@quick
@given(st.integers(1, 600), st.integers(0, 10_000))
def test_double_quantised_scales_are_near_the_scales(blocks: int, seed: int) -> None:
    absmax = torch.rand(blocks, generator=torch.Generator().manual_seed(seed)) + 2
    nested = double_quantize(absmax)
    back = double_dequantize(nested)
    largest = nested.absmax.repeat_interleave(256)[:blocks]
    # half the widest gap of the map, 0.9 / 64 / 2; more at -1, since the map ends at -0.993
    assert ((back - absmax).abs() <= largest * (0.9 / 64 / 2 + 1e-4)).all()
    assert nested.codes.shape == absmax.shape
    assert nested.absmax.shape == (-(-blocks // 256),)


def test_one_large_value_spoils_its_block_and_no_other() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    clean = quantize_4bit(weight).dequantize()
    weight[1, 3] = 1000.0
    spoiled = quantize_4bit(weight).dequantize()
    assert torch.equal(spoiled[[0, 2, 3]], clean[[0, 2, 3]])
    assert not spoiled[1].ne(1000).logical_and(spoiled[1].ne(0)).any()


def test_a_block_of_zeros_packs_to_0x77_and_comes_back_as_zeros() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    packed, absmax = quantize_nf4(weight)
    assert (packed[64:96] == 0x77).all()
    assert absmax[2] == 0
    assert not dequantize_nf4(packed, absmax, weight.shape)[2].any()
    assert not dequantize_int8(*absmax_int8(torch.zeros(3, 3))).any()


def test_a_single_number_without_a_shape_comes_back() -> None:
    assert quantize_4bit(torch.tensor(0.3)).dequantize() == torch.tensor(0.3)


def test_ties_go_to_the_lower_value() -> None:
    eighths = torch.arange(-8, 8) / 8  # the midpoints, odd sixteenths, are exact
    weight = torch.tensor([-16, -1, 1, 3, 1.000001, 0]) / 16
    packed, _ = quantize_nf4(weight, codebook=eighths)
    assert (unpack_nibbles(packed).int() - 8).tolist() == [-8, -1, 0, 1, 1, 0]


@given(
    st.one_of(
        st.sampled_from([book().sort().values for book in CODEBOOKS.values()]),
        st.lists(st.floats(-1.25, 1.25, width=32), min_size=16, max_size=16).map(
            lambda v: torch.tensor(v).sort().values
        ),
    ),
    st.lists(st.floats(-1, 1, width=32), max_size=30),
)
def test_looking_up_an_interval_is_searching_it(values: Tensor, drawn: list[float]) -> None:
    midpoints = (values[1:] + values[:-1]) / 2
    edges = torch.arange(CELLS + 1) / (CELLS / 2) - 1  # of the cells
    hard = torch.cat([midpoints, edges, torch.tensor([*drawn, 1 + 2**-23, -1 - 2**-23])])
    z = torch.cat([hard, hard.nextafter(torch.tensor(2.0)), hard.nextafter(torch.tensor(-2.0))])
    assert torch.equal(interval_of(z, midpoints), torch.bucketize(z, midpoints, out_int32=True))


def test_no_type_of_the_course_needs_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    search = torch.bucketize

    def watched(z: Tensor, midpoints: Tensor, **options: Any) -> Tensor:
        searched.append(len(z))
        return search(z, midpoints, **options)

    monkeypatch.setattr(torch, "bucketize", watched)
    for name in CODEBOOKS:
        quantize_4bit(torch.randn(64, 100), name)
    assert searched == [CELLS + 1] * len(CODEBOOKS)


def test_the_layout_in_memory_does_not_matter_and_gradients_do_not_leak() -> None:
    weight = torch.randn(70, 30, generator=torch.Generator().manual_seed(0))
    packed, absmax = quantize_nf4(weight)
    strided = torch.nn.Parameter(weight.T.contiguous()).T
    packed_too, absmax_too = quantize_nf4(strided)
    assert torch.equal(packed, packed_too)
    assert torch.equal(absmax, absmax_too)
    assert not absmax_too.requires_grad


@pytest.mark.parametrize("n", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
def test_weights_of_several_chunks_are_dequantised_as_the_equation_says(n: int) -> None:
    weight = torch.randn(n, generator=torch.Generator().manual_seed(0))
    for blocksize in (64, 2 * CHUNK):  # a chunk of many blocks, a block of many chunks
        packed, absmax = quantize_nf4(weight, blocksize)
        codes = unpack_nibbles(packed)[:n].long()
        expected = torch.tensor(PAPER_NF4)[codes] * absmax.repeat_interleave(blocksize)[:n]
        assert torch.equal(dequantize_nf4(packed, absmax, (n,), blocksize), expected)


def test_a_quantised_weight_moves_between_devices_whole() -> None:
    for double_quant in (False, True):
        moved = quantize_4bit(torch.ones(100), double_quant=double_quant).to("meta")
        parts = moved.absmax if isinstance(moved.absmax, NestedAbsmax) else (moved.absmax,)
        assert all(part.device.type == "meta" for part in (moved.packed, *parts))


# --- Bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused_with_its_place(value: float) -> None:
    weight = torch.ones(10, 20)
    weight[3, 4] = weight[5, 6] = value
    with pytest.raises(ValueError, match=f"2 of 200 are NaN or infinite, the first is {value} at position 64"):
        quantize_nf4(weight)
    with pytest.raises(ValueError, match="2 of 200"):
        absmax_int8(weight)


def test_finite_weights_whose_sum_is_infinite_are_quantised() -> None:
    largest = torch.full((64,), torch.finfo(torch.float32).max)
    assert torch.equal(blockwise_absmax(largest), largest[:1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64])
def test_a_weight_of_another_dtype_is_refused(dtype: torch.dtype) -> None:
    for quantize in (quantize_nf4, absmax_int8, quantize_4bit, quantize_dynamic):
        with pytest.raises(ValueError, match=f"float32, float16 or bfloat16, got {dtype}; convert first"):
            quantize(torch.ones(64, dtype=dtype))


def test_an_empty_weight_is_refused_with_its_shape() -> None:
    for quantize in (quantize_nf4, absmax_int8, quantize_4bit, quantize_dynamic):
        with pytest.raises(ValueError, match=r"empty tensor, got shape \(0, 4\)"):
            quantize(torch.empty(0, 4))
    with pytest.raises(ValueError, match=r"empty tensor, got shape \(0,\)"):
        double_quantize(torch.empty(0))


@pytest.mark.parametrize("blocksize", [0, -64, 48, 64.0, "64"])
def test_a_block_size_that_is_not_a_power_of_two_is_refused(blocksize: Any) -> None:
    for call in (
        lambda: quantize_nf4(torch.ones(64), blocksize),
        lambda: blockwise_absmax(torch.ones(64), blocksize),
        lambda: dequantize_nf4(torch.zeros(32, 1).byte(), torch.ones(1), (64,), blocksize),
        lambda: double_quantize(torch.ones(64), blocksize),
        lambda: bits_per_weight(blocksize=blocksize),
    ):
        with pytest.raises(ValueError, match=f"blocksize must be a power of two .*, got {blocksize!r}"):
            call()


def test_parts_that_do_not_fit_each_other_are_refused() -> None:
    packed, absmax = quantize_nf4(torch.ones(100))
    with pytest.raises(ValueError, match=r"shape \(4, 30\) takes 60 bytes, got 50"):
        dequantize_nf4(packed, absmax, (4, 30))
    with pytest.raises(ValueError, match=r"blocks of 32 has absmax of shape \(4,\), got \(2,\)"):
        dequantize_nf4(packed, absmax, (100,), blocksize=32)
    with pytest.raises(ValueError, match=r"must be uint8, got torch\.int8"):
        dequantize_nf4(packed.to(torch.int8), absmax, (100,))
    with pytest.raises(ValueError, match=r"shape \(16,\), got shape \(8,\)"):
        quantize_nf4(torch.ones(100), codebook=torch.arange(8.0))
    with pytest.raises(ValueError, match="quant_type must be one of nf4, fp4, int4, got 'nf5'"):
        quantize_4bit(torch.ones(100), "nf5")


def test_codes_that_are_not_nibbles_are_refused() -> None:
    with pytest.raises(ValueError, match="must be even, got 3"):
        pack_nibbles(torch.tensor([1, 2, 3]))
    for codes in (torch.tensor([0, 16]), torch.tensor([-1, 3]), torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match="whole numbers from 0 to 15, got"):
            pack_nibbles(codes)
    with pytest.raises(ValueError, match=r"must be uint8, got torch\.int64"):
        unpack_nibbles(torch.tensor([1]))
    with pytest.raises(ValueError, match="bits must be between 1 and 32, got 0"):
        bits_per_weight(bits=0)
