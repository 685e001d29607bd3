"""Unit 12, quantisation: the inputs of the cases, and the probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import as_tensor, dtypes_differ, same
from lora_from_scratch.checks.exercise import Case, Draw
from lora_from_scratch.checks.observation import Data, Seen, dtype_of
from lora_from_scratch.quantization.int8 import dynamic_map
from lora_from_scratch.quantization.nf4 import fp4_codebook, nf4_codebook

REFUSED = "what is refused"

# --- Eight bits --------------------------------------------------------------------------------------


def try_int8(answer: Callable[..., Any], x: Tensor) -> Any:
    """Both results and their dtypes."""
    result = answer(x)
    if not isinstance(result, tuple | list) or len(result) != 2:
        return result
    return {"q": result[0], "absmax": result[1], "dtypes": [dtype_of(one) for one in result]}


def without_ties(x: Tensor) -> Tensor:
    """Zeros in the place of numbers (almost) between two integers: half of the largest, where rounding decides."""
    z = 127 * x.double() / x.double().abs().max()
    return torch.where(((z - z.floor()) - 0.5).abs() < 1e-3, 0, x)


def int8_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, x: Tensor, *sentences: str, part: str = "the numbers") -> Case:
        return Case(name, {"x": x}, part, sentences)

    one, largest, nearest = "with one scale for the whole tensor", "becomes 127 or -127", "keeps its proportion"
    q, absmax, never = "q: int8", "absmax: float32", "-128 is never used"
    first = torch.tensor([127, 0.4, -0.6, 63.2, -126.7])
    yield case("127, 0.4, -0.6, 63.2, -126.7", first, one, largest, nearest, q, absmax)
    yield case("a random 3 x 4 matrix", draw.normal(3, 4), one, nearest, "x: any shape", q)
    negative = draw.normal(9)
    negative[draw.integer(0, 8)] = -draw.number(5, 6)
    yield case("the number with the largest absolute value is negative", negative, largest, never, absmax)
    yield case("all numbers are negative", -draw.number(1, 2) - draw.normal(5).abs(), largest, never, absmax)
    ties = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    yield case("numbers exactly between two integers", ties, "a tie to the even one")
    yield case("a single number", torch.tensor(-draw.number(0.1, 9)), "x: any shape", absmax)
    yield case("a transposed matrix", draw.normal(2, 3, 4).transpose(0, 2), "x: any shape", q)
    ends, any_dtype = "the ends of the range", "The arithmetic is done in float32"
    yield case("zeros", torch.zeros(2, 3), "all 0 if `x` is all 0", never, part=ends)
    yield case("tiny numbers", 1e-20 * draw.normal(6), largest, part=ends)
    large = 60000 * (2 * torch.rand(100, generator=draw.generator) - 1)
    large[draw.integer(0, 99)] = 60000
    yield case(
        "float16, close to its largest value",
        without_ties(large.half()),
        any_dtype,
        "float32, float16 or",
        absmax,
        part=ends,
    )
    fine = without_ties((3 * draw.normal(40)).bfloat16())
    yield case("bfloat16", fine, any_dtype, "float32, float16 or", absmax, part=ends)
    for name, value in (("one of the numbers is not a number", math.nan), ("one of them is infinite", -math.inf)):
        broken = draw.normal(5)
        broken[3] = value
        yield case(name, broken, "ValueError", part=REFUSED)
    yield case("no numbers", torch.zeros(0, 3), "ValueError", part=REFUSED)
    yield case("whole numbers", torch.tensor([1, 2]), "ValueError", "float32, float16 or", part=REFUSED)
    yield case("float64", draw.normal(5).double(), "ValueError", "float32, float16 or", part=REFUSED)


def absmax_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, x: Tensor, blocksize: int | None, *sentences: str, part: str = "whole blocks") -> Case:
        size: dict[str, Data] = {} if blocksize is None else {"blocksize": blocksize}
        return Case(name, {"x": x, **size}, part, sentences)

    largest, rows, short, result = (
        "The largest absolute value of",
        "row by row",
        "may be short",
        "(ceil(n / blocksize),)",
    )
    power, numbers = "blocksize: a power of two", "x: n numbers in any shape"
    yield case("eight numbers in blocks of 4", torch.tensor([1.0, -5, 2, 0, 3, 3, 4, -2]), 4, largest, result, power)
    yield case("128 random numbers, blocks of 64", draw.normal(128), None, largest, result)
    yield case("4 x 6 in blocks of 8, which span rows", draw.normal(4, 6), 8, rows, numbers)
    yield case("2 x 3 x 4, transposed, in blocks of 4", draw.normal(4, 3, 2).transpose(0, 2), 4, rows, numbers)
    yield case("blocks of one number", draw.normal(5), 1, power, largest)
    half = (9 * draw.normal(8)).half(), (9 * draw.normal(8)).bfloat16()
    yield case("float16", half[0], 4, "float32, float16 or", result)
    yield case("bfloat16", half[1], 4, "float32, float16 or", result)
    zeros = draw.normal(12)
    zeros[4:8] = 0
    yield case("a block of zeros", zeros, 4, "0 for a block of zeros")
    small, last = draw.normal(11), "the last block"
    small[8:] = -0.01 - 0.1 * torch.rand(3, generator=draw.generator)
    yield case("11 numbers in blocks of 4", small, 4, short, result, part=last)
    yield case("3 x 5 numbers in blocks of 2", draw.normal(3, 5), 2, short, rows, part=last)
    yield case("fewer numbers than a block holds", 0.1 * draw.normal(5), 64, short, result, part=last)
    for name, value in (("one of the numbers is infinite", -math.inf), ("one of them is not a number", math.nan)):
        broken = draw.normal(8)
        broken[5] = value
        yield case(name, broken, 4, "`x` is empty", part=REFUSED)
    yield case("no numbers", torch.zeros(0), 4, "`x` is empty", part=REFUSED)
    yield case("whole numbers", torch.tensor([1, 2]), 2, "`x` is empty", "float32, float16 or", part=REFUSED)
    for size in (48, 0, -4):
        yield case(f"blocks of {size}", draw.normal(96), size, "`blocksize` is not a power", power, part=REFUSED)


# --- Four bits ---------------------------------------------------------------------------------------


def codebook_cases(draw: Draw) -> Iterator[Case]:
    halves = "Zero has to be one of them", "7 negative ones", "and 0.", "`p =", "The largest value divides"
    all_of_them = ("The 16 values", *halves, "right to six digits", "ascending, from -1 to 1", "code 7 is")
    yield Case("the 16 values", {}, sentences=all_of_them)


def packing_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, codes: Tensor, *sentences: str, part: str = "the bytes") -> Case:
        return Case(name, {"codes": codes}, part, sentences)

    byte, column, codes = "`byte = even << 4 | odd`", "(n / 2, 1) uint8", "codes: an even number"
    yield case("the codes 1, 2, 3, 4", torch.tensor([1, 2, 3, 4]), byte, column)
    yield case("10 random codes", draw.integers(0, 15, 10), byte, column)
    yield case("4 x 6 codes", draw.integers(0, 15, 4, 6), codes, byte)
    yield case("3 x 4 codes, transposed", draw.integers(0, 15, 4, 3).T, codes, byte)
    yield case("3 x 2 codes out of a larger table", draw.integers(0, 15, 3, 5)[:, 1:3], codes, byte)
    yield case("the codes 15, 15, 15, 0 as uint8", torch.tensor([15, 15, 15, 0]).byte(), byte, column)
    yield case("the same code four times", torch.full((4,), draw.integer(0, 15)), byte, codes)
    yield case("the codes 0, 15 as int8", torch.tensor([0, 15]).char(), byte, codes)
    yield case("no codes", torch.zeros(0, dtype=torch.int64), codes, column)
    odd, strange = "ValueError: n is odd", "codes: an even number"
    yield case("an odd number of codes", draw.integers(0, 15, 7), odd, strange, part=REFUSED)
    yield case("a code of 16", torch.tensor([3, 16]), odd, strange, part=REFUSED)
    yield case("a code of -1", torch.tensor([-1, 3]), odd, strange, part=REFUSED)
    yield case("a code of 1.5", torch.tensor([1.5, 3]), odd, strange, part=REFUSED)


EIGHTHS = torch.arange(-8, 8) / 8  # a codebook whose midpoints are exact


def away_from_zero(draw: Draw, n: int) -> Tensor:
    """Numbers from 0.1 to 1 with random signs, so that FP4's two zeros play no role."""
    signs = 2.0 * draw.integers(0, 1, n) - 1
    return signs * (0.1 + 0.9 * torch.rand(n, generator=draw.generator))


def quantize_cases(draw: Draw) -> Iterator[Case]:
    usual, ends, others = "codes and scales", "zeros and short blocks", "another codebook"

    def case(name: str, weight: Tensor, *sentences: str, part: str = usual, **more: Data) -> Case:
        return Case(name, {"weight": weight, **more}, part, sentences)

    nearest, packed, absmax, any_shape = "take for each weight", "packed: (ceil", "absmax: (ceil", "weight: n numbers"
    own, none = "codebook: (16,) values", "None: `nf4_codebook()`"
    name = "the codebook times two, as one block"
    yield case(name, 2 * nf4_codebook(), nearest, packed, absmax, none, "Quantise a weight to NF4", blocksize=16)
    yield case("128 random weights, blocks of 64", 0.02 * draw.normal(128), nearest, packed, absmax)
    weight = draw.normal(64) * torch.tensor([1e-3, 1, 50, 0.1]).repeat_interleave(16)
    weight[5] = -4e-3
    name = "blocks of small and of large weights"
    yield case(name, weight.view(8, 8), nearest, any_shape, "blocksize: a power", absmax, blocksize=16)
    yield case("a transposed weight", draw.normal(6, 8).T, any_shape, nearest, blocksize=16)
    half = draw.normal(64).bfloat16()
    yield case("in bfloat16", half, "float32, float16 or", nearest, absmax, blocksize=32)
    yield case("in float16", draw.normal(64).half(), "float32, float16 or", nearest, absmax, blocksize=32)
    zeros = draw.normal(48)
    zeros[16:32] = 0
    yield case("a block of zeros", zeros, "packs to 0x77", part=ends, blocksize=16)
    yield case("zeros only, in a short block", torch.zeros(6), "packs to 0x77", absmax, part=ends, blocksize=16)
    yield case("22 weights in blocks of 16", draw.normal(2, 11), absmax, packed, part=ends, blocksize=16)
    yield case("an odd number of weights", draw.normal(5), "is padded with one weight", packed, part=ends, blocksize=4)
    fp4: dict[str, Data] = {"blocksize": 16, "codebook": fp4_codebook()}
    yield case("FP4's codebook, which is not in ascending order", away_from_zero(draw, 32), own, part=others, **fp4)
    halves = torch.cat([torch.tensor([-16.0]), 2 * draw.integers(-8, 6, 15) + 1]) / 16
    tied: dict[str, Data] = {"blocksize": 16, "codebook": EIGHTHS}
    yield case("weights exactly between two values of the codebook", halves, nearest, own, part=others, **tied)
    downwards: dict[str, Data] = {"blocksize": 16, "codebook": EIGHTHS.flip(0)}
    yield case("the same, and the codebook in descending order", halves, nearest, own, part=others, **downwards)
    close = torch.tensor([1.515625, 8.0625]).bfloat16()  # the quotient is above 3/16, but not in bfloat16
    name = "a weight in bfloat16 just above the middle of two values"
    yield case(name, close, nearest, "float32, float16 or", part=others, blocksize=2, codebook=EIGHTHS)
    bad, power = "the weight is empty", "`blocksize` is not a power of two"
    for name, value in (("one of the weights is not a number", math.nan), ("a weight is infinite", math.inf)):
        broken = draw.normal(16)
        broken[7] = value
        yield case(name, broken, bad, part=REFUSED, blocksize=16)
    yield case("no weights", torch.zeros(0), bad, part=REFUSED)
    yield case("whole numbers", torch.arange(8), bad, "float32, float16 or", part=REFUSED, blocksize=8)
    yield case("blocks of 48", draw.normal(96), power, "blocksize: a power", part=REFUSED, blocksize=48)
    fifteen: dict[str, Data] = {"codebook": EIGHTHS[1:], "blocksize": 16}
    yield case("a codebook of 15 values", draw.normal(16), "the codebook does not have", own, part=REFUSED, **fifteen)


def try_dequantizing(answer: Callable[..., Any], dtype: str = "float32", **inputs: Any) -> Any:
    return answer(dtype=getattr(torch, dtype), **inputs)


def dequantize_cases(draw: Draw) -> Iterator[Case]:
    def parts(*shape: int, blocksize: int, **more: Data) -> dict[str, Data]:
        n = math.prod(shape)
        packed = draw.integers(0, 255, -(-n // 2), 1).to(torch.uint8)
        absmax = 0.5 + 3 * torch.rand(-(-n // blocksize), generator=draw.generator)
        return {"packed": packed, "absmax": absmax, "shape": list(shape), "blocksize": blocksize, **more}

    def case(name: str, given: dict[str, Data], *sentences: str, part: str = "the weights") -> Case:
        return Case(name, given, part, sentences)

    product, result, none = "Undo `quantize_nf4`", "The weight, in `shape`", "None: `nf4_codebook()`"
    scales, bytes_, shape = "absmax: (ceil(n", "packed: ceil(n / 2)", "shape: the shape of the weight"
    yield case("8 weights in one block", parts(8, blocksize=8), product, result, none)
    yield case("128 weights in blocks of 64", parts(128, blocksize=64), product, scales)
    yield case(
        "6 x 8 weights in blocks of 16", parts(6, 8, blocksize=16), product, result, shape, "the one it was quan"
    )
    flat = parts(2, 3, 4, blocksize=8)
    packed = flat["packed"]
    assert isinstance(packed, Tensor)
    yield case("2 x 3 x 4 weights, and the bytes in a row", {**flat, "packed": packed.flatten()}, bytes_, shape)
    yield case("22 weights in blocks of 16", parts(2, 11, blocksize=16), scales, product, part="short blocks")
    yield case("an odd number of weights", parts(3, 5, blocksize=4), bytes_, shape, part="short blocks")
    others, dtype = "codebook and dtype", "dtype: of the result"
    yield case("to bfloat16", parts(4, 16, blocksize=16, dtype="bfloat16"), dtype, product, result, part=others)
    yield case("to float64", parts(2, 8, blocksize=16, dtype="float64"), dtype, result, part=others)
    own = parts(4, 8, blocksize=8, codebook=fp4_codebook())
    yield case("FP4's codebook", own, "codebook: (16,) values", part=others)
    wrong, fits = parts(4, 8, blocksize=8), "the number of bytes or of scales"
    yield case("more bytes than the shape needs", {**wrong, "shape": [4, 6]}, fits, shape, part=REFUSED)
    yield case("fewer scales than blocks", {**wrong, "absmax": torch.ones(3)}, fits, scales, part=REFUSED)
    yield case("more scales than blocks", {**wrong, "absmax": torch.ones(5)}, fits, scales, part=REFUSED)
    assert isinstance(wrong["packed"], Tensor)
    yield case("bytes as int64", {**wrong, "packed": wrong["packed"].long()}, fits, bytes_, part=REFUSED)
    yield case("blocks of 6", {**parts(12, blocksize=6)}, fits, "the one it was quan", part=REFUSED)


# --- The cost of the scales --------------------------------------------------------------------------


def double_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, absmax: Tensor, *sentences: str, part: str = "the results", **more: Data) -> Case:
        return Case(name, {"absmax": absmax, **more}, part, sentences)

    def scales(n: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=draw.generator)

    offset, left, results, given = (
        "So their mean, the offset",
        "what is left lies",
        "Codes (blocks,)",
        "absmax: (blocks,)",
    )
    eight, size = "Quantise the scales themselves", "blocksize: how many scales"
    yield case("12 scales from 2 to 4", scales(12, 2, 4), offset, left, eight, results, given)
    yield case("300 scales: a full block of 256 and a short one", scales(300, 0.02, 0.3), results, left, size)
    mixed = torch.cat([scales(8, 1, 1.1), scales(8, 2, 6)])
    yield case("16 scales in blocks of 8", mixed, size, offset, blocksize=8)
    lopsided = scales(20, 0.5, 0.6)
    lopsided[draw.integer(0, 19)] = 9.0
    yield case("one scale is much larger than the others", lopsided, offset, left)
    yield case("equal scales", torch.full((8,), 0.25), left, offset)
    none = "there are no scales"
    broken = scales(8, 1, 2)
    broken[2] = math.nan
    yield case("a scale that is not finite", broken, none, part=REFUSED)
    yield case("no scales", torch.zeros(0), none, part=REFUSED)
    yield case("blocks of 48", scales(96, 1, 2), none, size, part=REFUSED, blocksize=48)


def nearly_the_same_codes(case: Case, seen: Seen, expected: Seen) -> bool:
    """A mean that is rounded differently may move a code to its neighbour; the rest has to be the same.

    Codes of nearly the same value count as the same: near 0 the map is finer than rounding. In a block whose second
    scale is 0 any code is as good as any other.
    """
    assert isinstance(seen.value, list)
    assert isinstance(expected.value, list)
    if len(seen.value) != len(expected.value) or not same(seen.value[1:], expected.value[1:]):
        return False
    codes, wanted = as_tensor(seen.value[0]), as_tensor(expected.value[0])
    if codes.shape != wanted.shape or dtypes_differ(seen.value, expected.value):
        return False
    second = as_tensor(expected.value[1]).repeat_interleave(int(str(case.inputs.get("blocksize", 256))))[: len(wanted)]
    values = dynamic_map()
    differ = (values[codes.long()] - values[wanted.long()]).abs() * (second > 0) > 1e-4
    neighbours = (codes.double() - wanted.double()).abs() <= 1
    return bool(neighbours[differ].all()) and int(differ.sum()) <= 1 + len(differ) // 50


def bits_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, given: dict[str, Data], *sentences: str, part: str = "plain") -> Case:
        return Case(name, given, part, sentences)

    def power(smallest: int, largest: int) -> int:
        return 2 ** draw.integer(smallest, largest)

    share, one, second = "with its share of the scales", "Each block of `blocksize`", "Then each `nested_blocksize`"
    yield case("NF4 in blocks of 64", {}, "NF4 in blocks of 64", share, one)
    yield case(
        "8 bits in blocks of 256", {"bits": 8, "blocksize": 256}, "bits: of a code", "blocksize: weights that", one
    )
    other: dict[str, Data] = {"bits": draw.integer(2, 8), "blocksize": power(3, 7)}
    yield case("other bits and blocks", other, "bits: of a code", share)
    yield case("32 bits, and a scale for each weight", {"bits": 32, "blocksize": 1}, "bits: of a code", one)
    yield case("one bit", {"bits": 1, "blocksize": 8}, "bits: of a code", one)
    twice = "double quantisation"
    double_nf4: dict[str, Data] = {"double_quant": True}
    yield case(
        "NF4, doubly quantised", double_nf4, "NF4 in blocks of 64", one, second, "offset of a matrix", part=twice
    )
    double: dict[str, Data] = {"bits": 3, "blocksize": power(3, 5), "nested_blocksize": power(4, 7)}
    nested = "nested_blocksize: scales that"
    yield case("other blocks, doubly quantised", {**double, "double_quant": True}, nested, second, part=twice)
    yield case("the same, plain", double, "double_quant: whether", part=twice)
    bad = "ValueError: `bits` is not"
    for name, value in (("blocks of 48", 48), ("blocks of 0", 0)):
        yield case(name, {"blocksize": value}, bad, "blocksize: weights that", part=REFUSED)
    nested_bad: dict[str, Data] = {"nested_blocksize": 100, "double_quant": True}
    yield case("second scales for 100 scales", nested_bad, bad, nested, part=REFUSED)
    for bits in (0, 33):
        yield case(f"codes of {bits} bits", {"bits": bits}, bad, "bits: of a code", part=REFUSED)
