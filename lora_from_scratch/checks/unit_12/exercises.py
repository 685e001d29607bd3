"""Unit 12, quantisation: what is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import as_tensor, same
from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data, Seen, dtype_of
from lora_from_scratch.quantization.int8 import absmax_int8, blockwise_absmax, dynamic_map
from lora_from_scratch.quantization.nf4 import (
    bits_per_weight,
    dequantize_nf4,
    double_quantize,
    fp4_codebook,
    nf4_codebook,
    pack_nibbles,
    quantize_nf4,
)

TITLE = "Quantisation"


# --- Eight bits --------------------------------------------------------------------------------------


def try_int8(answer: Callable[..., Any], x: Tensor) -> Any:
    """Both results and the dtype of the first."""
    result = answer(x)
    return [*result, dtype_of(result[0])] if isinstance(result, tuple | list) else result


def int8_cases(draw: Draw) -> Iterator[Case]:
    yield Case("127, 0.4, -0.6, 63.2, -126.7", {"x": torch.tensor([127, 0.4, -0.6, 63.2, -126.7])}, "the numbers")
    yield Case("a random 3 x 4 matrix", {"x": draw.normal(3, 4)}, "the numbers")
    negative = draw.normal(9)
    negative[draw.integer(0, 8)] = -draw.number(5, 6)
    yield Case("the number with the largest absolute value is negative", {"x": negative}, "the numbers")
    ties = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    yield Case("numbers exactly between two integers", {"x": ties}, "the numbers")
    yield Case("zeros", {"x": torch.zeros(2, 3)}, "the ends of the range")
    yield Case("tiny numbers", {"x": 1e-20 * draw.normal(6)}, "the ends of the range")
    large = 60000 * (2 * torch.rand(100, generator=draw.generator) - 1)
    large[draw.integer(0, 99)] = 60000
    yield Case("float16, close to its largest value", {"x": large.half()}, "the ends of the range")
    broken = draw.normal(5)
    broken[3] = float("nan")
    yield Case("one of the numbers is not a number", {"x": broken}, "what is refused")


def absmax_cases(draw: Draw) -> Iterator[Case]:
    eight = torch.tensor([1.0, -5, 2, 0, 3, 3, 4, -2])
    yield Case("eight numbers in blocks of 4", {"x": eight, "blocksize": 4}, "whole blocks")
    yield Case("128 random numbers, blocks of 64", {"x": draw.normal(128)}, "whole blocks")
    yield Case("4 x 6 in blocks of 8, which span rows", {"x": draw.normal(4, 6), "blocksize": 8}, "whole blocks")
    zeros = draw.normal(12)
    zeros[4:8] = 0
    yield Case("a block of zeros", {"x": zeros, "blocksize": 4}, "whole blocks")
    small = draw.normal(11)
    small[8:] = -0.01 - 0.1 * torch.rand(3, generator=draw.generator)
    yield Case("11 numbers in blocks of 4", {"x": small, "blocksize": 4}, "the last block")
    yield Case("3 x 5 numbers in blocks of 2", {"x": draw.normal(3, 5), "blocksize": 2}, "the last block")
    yield Case("fewer numbers than a block holds", {"x": 0.1 * draw.normal(5), "blocksize": 64}, "the last block")
    broken = draw.normal(8)
    broken[5] = -float("inf")
    yield Case("one of the numbers is infinite", {"x": broken, "blocksize": 4}, "what is refused")
    yield Case("blocks of 48", {"x": draw.normal(96), "blocksize": 48}, "what is refused")


# --- Four bits ---------------------------------------------------------------------------------------


def codebook_cases(draw: Draw) -> Iterator[Case]:
    yield Case("the 16 values", {})


def try_packing(answer: Callable[..., Any], codes: Tensor) -> Any:
    packed = answer(codes)
    return [packed, dtype_of(packed)]


def packing_cases(draw: Draw) -> Iterator[Case]:
    yield Case("the codes 1, 2, 3, 4", {"codes": torch.tensor([1, 2, 3, 4])}, "the bytes")
    yield Case("10 random codes", {"codes": draw.integers(0, 15, 10)}, "the bytes")
    yield Case("4 x 6 codes", {"codes": draw.integers(0, 15, 4, 6)}, "the bytes")
    yield Case("the codes 15, 15, 15, 0 as uint8", {"codes": torch.tensor([15, 15, 15, 0]).byte()}, "the bytes")
    yield Case("an odd number of codes", {"codes": draw.integers(0, 15, 7)}, "what is refused")
    yield Case("a code of 16", {"codes": torch.tensor([3, 16])}, "what is refused")


EIGHTHS = torch.arange(-8, 8) / 8  # a codebook whose midpoints are exact


def away_from_zero(draw: Draw, n: int) -> Tensor:
    """Numbers from 0.1 to 1 with random signs, so that FP4's two zeros play no role."""
    signs = 2.0 * draw.integers(0, 1, n) - 1
    return signs * (0.1 + 0.9 * torch.rand(n, generator=draw.generator))


def quantize_cases(draw: Draw) -> Iterator[Case]:
    usual, ends, others = "codes and scales", "zeros and short blocks", "another codebook"
    yield Case("the codebook times two, as one block", {"weight": 2 * nf4_codebook(), "blocksize": 16}, usual)
    yield Case("128 random weights, blocks of 64", {"weight": 0.02 * draw.normal(128)}, usual)
    sizes = torch.tensor([1e-3, 1, 50, 0.1]).repeat_interleave(16)
    weight = draw.normal(64) * sizes
    weight[5] = -4e-3
    yield Case("blocks of small and of large weights", {"weight": weight.view(8, 8), "blocksize": 16}, usual)
    zeros = draw.normal(48)
    zeros[16:32] = 0
    yield Case("a block of zeros", {"weight": zeros, "blocksize": 16}, ends)
    yield Case("22 weights in blocks of 16", {"weight": draw.normal(2, 11), "blocksize": 16}, ends)
    yield Case("an odd number of weights", {"weight": draw.normal(5), "blocksize": 4}, ends)
    fp4: dict[str, Data] = {"weight": away_from_zero(draw, 32), "blocksize": 16, "codebook": fp4_codebook()}
    yield Case("FP4's codebook, which is not in ascending order", fp4, others)
    halves = torch.cat([torch.tensor([-16.0]), 2 * draw.integers(-8, 6, 15) + 1]) / 16
    ties: dict[str, Data] = {"weight": halves, "blocksize": 16, "codebook": EIGHTHS}
    yield Case("weights exactly between two values of the codebook", ties, others)
    broken = draw.normal(16)
    broken[7] = float("nan")
    yield Case("one of the weights is not a number", {"weight": broken, "blocksize": 16}, "what is refused")


def try_dequantizing(answer: Callable[..., Any], dtype: str = "float32", **inputs: Any) -> Any:
    weight = answer(dtype=getattr(torch, dtype), **inputs)
    return [weight, dtype_of(weight)]


def dequantize_cases(draw: Draw) -> Iterator[Case]:
    def parts(*shape: int, blocksize: int, **more: Data) -> dict[str, Data]:
        n = int(torch.tensor(shape).prod())
        packed = draw.integers(0, 255, -(-n // 2), 1).to(torch.uint8)
        absmax = 0.5 + 3 * torch.rand(-(-n // blocksize), generator=draw.generator)
        return {"packed": packed, "absmax": absmax, "shape": list(shape), "blocksize": blocksize, **more}

    usual = "the weights"
    yield Case("8 weights in one block", parts(8, blocksize=8), usual)
    yield Case("128 weights in blocks of 64", parts(128, blocksize=64), usual)
    yield Case("6 x 8 weights in blocks of 16", parts(6, 8, blocksize=16), usual)
    yield Case("22 weights in blocks of 16", parts(2, 11, blocksize=16), "short blocks")
    yield Case("an odd number of weights", parts(3, 5, blocksize=4), "short blocks")
    yield Case("to bfloat16", parts(4, 16, blocksize=16, dtype="bfloat16"), "codebook and dtype")
    yield Case("FP4's codebook", parts(4, 8, blocksize=8, codebook=fp4_codebook()), "codebook and dtype")
    wrong = parts(4, 8, blocksize=8)
    yield Case("more bytes than the shape needs", {**wrong, "shape": [4, 6]}, "what is refused")
    yield Case("fewer scales than blocks", {**wrong, "absmax": torch.ones(3)}, "what is refused")


# --- The cost of the scales --------------------------------------------------------------------------


def double_cases(draw: Draw) -> Iterator[Case]:
    def scales(n: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=draw.generator)

    yield Case("12 scales from 2 to 4", {"absmax": scales(12, 2, 4)})
    yield Case("300 scales: a full block of 256 and a short one", {"absmax": scales(300, 0.02, 0.3)})
    mixed = torch.cat([scales(8, 1, 1.1), scales(8, 2, 6)])
    yield Case("16 scales in blocks of 8", {"absmax": mixed, "blocksize": 8})
    lopsided = scales(20, 0.5, 0.6)
    lopsided[draw.integer(0, 19)] = 9.0
    yield Case("one scale is much larger than the others", {"absmax": lopsided})
    yield Case("equal scales", {"absmax": torch.full((8,), 0.25)})


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
    if codes.shape != wanted.shape:
        return False
    second = as_tensor(expected.value[1]).repeat_interleave(int(str(case.inputs.get("blocksize", 256))))[: len(wanted)]
    values = dynamic_map()
    differ = (values[codes.long()] - values[wanted.long()]).abs() * (second > 0) > 1e-4
    neighbours = (codes.double() - wanted.double()).abs() <= 1
    return bool(neighbours[differ].all()) and int(differ.sum()) <= 1 + len(differ) // 50


def bits_cases(draw: Draw) -> Iterator[Case]:
    def power(smallest: int, largest: int) -> int:
        return 2 ** draw.integer(smallest, largest)

    yield Case("NF4 in blocks of 64", {}, "plain")
    yield Case("8 bits in blocks of 256", {"bits": 8, "blocksize": 256}, "plain")
    plain: dict[str, Data] = {"bits": draw.integer(2, 8), "blocksize": power(3, 7)}
    yield Case("other bits and blocks", plain, "plain")
    yield Case("NF4, doubly quantised", {"double_quant": True}, "double quantisation")
    double: dict[str, Data] = {"bits": 3, "blocksize": power(3, 5), "nested_blocksize": power(4, 7)}
    yield Case("other blocks, doubly quantised", {**double, "double_quant": True}, "double quantisation")
    yield Case("the same, plain", double, "double quantisation")
    yield Case("blocks of 48", {"blocksize": 48}, "what is refused")
    yield Case("codes of no bits", {"bits": 0}, "what is refused")


EXERCISES = [
    Exercise(
        absmax_int8,
        idea="quantisation",
        difficulty=2,
        minutes=7,
        points=2,
        hints=(
            "By what must the tensor be multiplied so that its largest absolute value becomes 127?",
            "First convert to float32, then absolute value, maximum, product, `torch.round`, and finally "
            "`.to(torch.int8)`.",
            "For zeros the maximum is 0: use `.clamp(min=...)` with a tiny value before you divide by it. "
            "`check_numbers(x)`, imported above, raises the errors.",
        ),
        cases=int8_cases,
        probe=try_int8,
    ),
    Exercise(
        blockwise_absmax,
        idea="blocks and scales",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "If the numbers filled whole blocks, a `view` as a table with one block per row would be enough.",
            "How many numbers are missing from the last block? Fill it up with a value that can never be the largest.",
            "`-n % blocksize` are missing, and `F.pad(x, (0, missing))` appends zeros. Then use `.amax(dim=1)`.",
        ),
        cases=absmax_cases,
    ),
    Exercise(
        nf4_codebook,
        idea="codebooks",
        difficulty=3,
        minutes=10,
        points=3,
        hints=(
            "Make three pieces, the negative values, zero and the positive values, and concatenate them in order.",
            "`torch.special.ndtri` is the quantile function: it maps a probability to a number. Above 0.5 the result "
            "is positive.",
            "`torch.linspace(p, 0.5, 9)[:-1]` are eight probabilities in descending order; `.flip(0)` reverses a "
            "tensor. Divide by the maximum at the very end.",
        ),
        cases=codebook_cases,
    ),
    Exercise(
        pack_nibbles,
        idea="storage",
        difficulty=2,
        minutes=6,
        points=2,
        hints=(
            "First arrange the codes in pairs: a table with two columns, one pair per row.",
            "`<< 4` moves a code to the high half of a byte; `|` joins the two halves.",
            "Slices keep the column: `pairs[:, :1]` has shape (n / 2, 1). Check the codes first, then convert to "
            "uint8.",
        ),
        cases=packing_cases,
        probe=try_packing,
    ),
    Exercise(
        quantize_nf4,
        idea="codebooks",
        difficulty=4,
        minutes=15,
        points=4,
        hints=(
            "There are four steps: the scales of the blocks, the weights divided by their scale, the index of the "
            "nearest value, two codes per byte. You have written the first and the last.",
            "Where does the nearest value change? At the midpoint of two neighbours. `torch.bucketize(z, midpoints)` "
            "says between which midpoints z lies, provided that the midpoints ascend; so `sort` the codebook, and keep "
            "the order.",
            "`blockwise_absmax`, `normalize_blocks` (imported above), `bucketize`, `code_of[...]` where `values, "
            "code_of = codebook.sort()`, and `pack_nibbles`. If the number of z is odd, append a 0.",
        ),
        cases=quantize_cases,
    ),
    Exercise(
        dequantize_nf4,
        idea="codebooks",
        difficulty=3,
        minutes=12,
        points=3,
        hints=(
            "Bytes to codes, codes to values, values times the scale of their block, and then the shape.",
            "`packed >> 4` is the high half and `packed & 15` the low one; `torch.stack(..., dim=1)` and flattening "
            "interleave them. Indexing the codebook with an integer tensor looks up all values at once.",
            "`absmax.repeat_interleave(blocksize)` gives each weight its scale. Cut both to n, the product of the "
            "shape. `check_parts`, imported above, checks that the parts fit together.",
        ),
        cases=dequantize_cases,
        probe=try_dequantizing,
    ),
    Exercise(
        bits_per_weight,
        idea="blocks and scales",
        difficulty=1,
        minutes=5,
        points=2,
        hints=(
            "How many weights share one scale of 32 bits? Each of them pays an equal share.",
            "With double quantisation, the scale has 8 bits. How many weights share a second scale of 32 bits?",
            "A second scale serves `nested_blocksize` scales, and each of these serves `blocksize` weights.",
        ),
        cases=bits_cases,
        tolerance=1e-6,
    ),
    Exercise(
        double_quantize,
        idea="blocks and scales",
        difficulty=2,
        minutes=6,
        points=2,
        hints=(
            "There are three steps: the offset, the scales minus the offset, and the 8-bit codes of the result.",
            "`quantize_dynamic`, imported above, returns the codes and the second scales.",
            "Put the codes, second scales and offset into a `NestedAbsmax`, in this order.",
        ),
        cases=double_cases,
        agree=nearly_the_same_codes,
    ),
]

PREDICTIONS = [
    Prediction(
        name="after_an_outlier",
        question=(
            "A weight matrix is quantised to 8 bits with one scale. Now a single weight is set to 300 times the "
            "previous maximum, and the matrix is quantised again. What happens to all the other weights?"
        ),
        choices={
            "nothing": "almost nothing: 8 bits have 255 levels, enough for one more weight",
            "coarser": "they are kept, with a step a few times as wide as before",
            "zero": "every one of them becomes 0",
        },
        answer="zero",
        explanation=(
            "The outlier determines the scale: one level is now 300 / 127, more than twice the previously largest "
            "weight, so even that weight rounds to 0. The outlier is restored exactly, and the rest of the matrix is "
            "lost."
        ),
        replies={
            "nothing": "The 255 levels are evenly spaced up to the largest weight, which is now the outlier.",
            "coarser": "The step is 300 times as wide as before.",
        },
        idea="blocks and scales",
    ),
    Prediction(
        name="order_of_the_errors",
        question=(
            "The weights of the bundled GPT-2 are quantised to 4 bits in blocks of 64, with three codebooks: NF4, INT4 "
            "(equal steps) and FP4 (a tiny floating-point number, whose steps grow with the number). Order the three "
            "by their root-mean-square error."
        ),
        choices={
            "a": "NF4 is smallest, then FP4, then INT4",
            "b": "NF4 is smallest, then INT4, then FP4",
            "c": "FP4 is smallest, then NF4, then INT4",
            "d": "INT4 is smallest, then NF4, then FP4",
        },
        answer="b",
        explanation=(
            "NF4 has its values where the weights are. FP4 has four of its codes at or next to zero, then a gap up to "
            "a sixth of the absmax, where a third of the weights are, and a gap of a third at the top: together that "
            "costs more than INT4's equal steps."
        ),
        replies={
            "a": "NF4 is the best, but the gaps of FP4 cost more than the equal steps of INT4.",
            "c": "FP4 is the worst of the three. Its steps grow with the number, but too fast.",
            "d": (
                "Equal steps suit numbers that are spread evenly. Weights are roughly normal: most of them are "
                "near zero."
            ),
        },
        measured="all matrices of the bundled GPT-2",
        idea="codebooks",
    ),
]
