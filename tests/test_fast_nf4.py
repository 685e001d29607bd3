"""What the layers compute with is the plain NF4, bit for bit, on random and on hard weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_from_scratch.quantization.fast_nf4 import (
    CELLS,
    CHUNK,
    READ_CHUNK,
    fast_dequantize_nf4,
    fast_quantize_nf4,
    interval_of,
)
from lora_from_scratch.quantization.nf4 import CODEBOOKS, dequantize_nf4, quantize_nf4
from lora_from_scratch.quantization.quantized_tensor import quantize_4bit

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKSIZES = [1, 2, 16, 64, 256, 1024]
quick = settings(max_examples=80, deadline=None)

codebooks = st.one_of(
    st.none(),
    st.sampled_from([book() for book in CODEBOOKS.values()]),
    st.lists(st.floats(-1.25, 1.25, width=32), min_size=16, max_size=16).map(torch.tensor),
)


def hard_numbers(codebook: Tensor) -> Tensor:
    """Exact codes, ties between two codes, the neighbours of both, both zeros, and denormal numbers."""
    values = codebook.sort().values
    exact = torch.cat([values, (values[1:] + values[:-1]) / 2])
    near = [exact.nextafter(torch.tensor(end)) for end in (-9.0, 9.0)]
    return torch.cat([exact, *near, torch.tensor([0.0, -0.0, 1e-40, -1e-45, 1.0, -1.0])])


@st.composite
def weights(draw: st.DrawFn, codebook: Tensor | None) -> Tensor:
    """Random and hard numbers, blocks of zeros among them, in any float dtype, scaled to any size."""
    n = draw(st.integers(1, 700))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    hard = hard_numbers(CODEBOOKS["nf4"]() if codebook is None else codebook)
    chosen = hard[torch.randint(len(hard), (n,), generator=generator)]
    weight = torch.where(torch.rand(n, generator=generator) < draw(st.sampled_from([0, 0.5, 1])), chosen, 0.0)
    weight += torch.randn(n, generator=generator) * (weight == 0) * draw(st.sampled_from([0.0, 0.3]))
    start = draw(st.integers(0, n))
    weight[start : start + draw(st.integers(0, 200))] = 0
    weight[::64] = 1  # with a scale of 1, ties stay ties
    scale = draw(st.sampled_from([1.0, 3.0, 0.1, 1e-3, 1e-30, 7e-39, 1e-44]))
    return (weight * scale).to(draw(st.sampled_from(DTYPES)))


def bits(x: Tensor) -> Tensor:
    """The bit patterns, so that -0 differs from 0."""
    return x.contiguous().view(-1).view(torch.uint8)


def assert_same_bits(fast: Tensor, plain: Tensor) -> None:
    assert fast.dtype == plain.dtype
    assert fast.shape == plain.shape
    assert torch.equal(bits(fast), bits(plain))


# --- Equal to the plain one ------------------------------------------------------------------------


@quick
@given(data=st.data(), codebook=codebooks, blocksize=st.sampled_from(BLOCKSIZES))
def test_the_fast_codes_and_scales_are_the_plain_ones(
    data: st.DataObject, codebook: Tensor | None, blocksize: int
) -> None:
    weight = data.draw(weights(codebook))
    fast, plain = fast_quantize_nf4(weight, blocksize, codebook), quantize_nf4(weight, blocksize, codebook)
    for ours, expected in zip(fast, plain, strict=True):
        assert_same_bits(ours, expected)


@quick
@given(
    n=st.integers(0, 700),
    seed=st.integers(0, 10_000),
    codebook=codebooks,
    blocksize=st.sampled_from(BLOCKSIZES),
    scale=st.sampled_from([1.0, 1e-3, 1e-38, 1e38, 0.0]),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
)
def test_the_fast_way_back_is_the_plain_one(
    n: int, seed: int, codebook: Tensor | None, blocksize: int, scale: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(256, (-(-n // 2), 1), generator=generator).to(torch.uint8)
    absmax = torch.rand(-(-n // blocksize), generator=generator) * scale
    given_ = (packed, absmax, (n,), blocksize, dtype, codebook)
    assert_same_bits(fast_dequantize_nf4(*given_), dequantize_nf4(*given_))


@pytest.mark.parametrize("chunk", [CHUNK, READ_CHUNK])
@pytest.mark.parametrize("rest", [-1, 0, 1, 64 + 77])
def test_weights_of_several_chunks_are_the_plain_ones_too(chunk: int, rest: int) -> None:
    n = 2 * chunk + rest
    weight = torch.randn(n, generator=torch.Generator().manual_seed(0))
    for blocksize in (64, 2 * chunk):  # a chunk of many blocks, a block of many chunks
        packed, absmax = quantize_nf4(weight, blocksize)
        for fast, plain in zip(fast_quantize_nf4(weight, blocksize), (packed, absmax), strict=True):
            assert_same_bits(fast, plain)
        for dtype in DTYPES:
            back = fast_dequantize_nf4(packed, absmax, (n,), blocksize, dtype)
            assert_same_bits(back, dequantize_nf4(packed, absmax, (n,), blocksize, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CODEBOOKS)
def test_every_number_in_half_precision_gets_the_plain_code(name: str, dtype: torch.dtype) -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    for weight in (every, every[every.abs() <= 1]):
        for fast, plain in zip(
            fast_quantize_nf4(weight, 1024, CODEBOOKS[name]()),
            quantize_nf4(weight, 1024, CODEBOOKS[name]()),
            strict=True,
        ):
            assert_same_bits(fast, plain)


def message_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the messages are compared)
        call(*arguments)
    return str(caught.value)


def test_both_refuse_the_same_in_the_same_words() -> None:
    nan, inf = torch.ones(100), torch.ones(100)
    nan[3], inf[70] = math.nan, -math.inf
    book = torch.arange(8.0)
    weights: list[Any] = [
        (nan,),
        (inf,),
        (torch.empty(0, 4),),
        (nan.double(),),
        (torch.ones(64), 48),
        (torch.ones(64), 64, book),
    ]
    for given_ in weights:
        assert message_of(fast_quantize_nf4, *given_) == message_of(quantize_nf4, *given_)
    packed, absmax = quantize_nf4(torch.ones(100))
    shape = (100,)
    parts: list[Any] = [(packed, absmax, (4, 30)), (packed, absmax, shape, 32), (packed.int(), absmax, shape)]
    parts += [(packed, absmax, shape, 48), (packed, absmax, shape, 64, torch.float32, book)]
    for wrong in parts:
        assert message_of(fast_dequantize_nf4, *wrong) == message_of(dequantize_nf4, *wrong)


# --- The look-up -----------------------------------------------------------------------------------


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
