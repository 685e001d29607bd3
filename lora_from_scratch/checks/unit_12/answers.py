"""Unit 12, quantisation: mistakes that people make with eight bits and with blocks, and other right ways.

The files `unit_12_*.py` have those of the other exercises.
"""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.quantization.int8 import absmax_int8, check_numbers

TINY = 1e-30

# --- absmax_int8 -------------------------------------------------------------------------------------


def to_int8(x: Tensor, absmax: Tensor) -> Tensor:
    return torch.round(x.float() * (127 / absmax.float().clamp(min=TINY))).to(torch.int8)


@right("absmax_int8")
def in_numpy(x: Tensor) -> tuple[np.ndarray, np.float32]:
    check_numbers(x)
    values = x.float().numpy().astype(np.float64)
    absmax = np.abs(values).max()
    q = np.rint(values * 127 / absmax) if absmax > 0 else np.zeros_like(values)
    return q.astype(np.int8), np.float32(absmax)


@right("absmax_int8")
def divides_by_the_step(x: Tensor) -> tuple[Tensor, Tensor]:
    check_numbers(x)
    absmax = torch.linalg.vector_norm(x.double(), ord=math.inf)
    step = absmax / 127 if absmax else torch.tensor(1.0)
    return (x.double() / step).round().clamp(-127, 127).char(), absmax.float()


@right("absmax_int8")
def number_by_number(x: Tensor) -> tuple[Tensor, Tensor]:
    check_numbers(x)
    numbers = x.flatten().tolist()
    absmax = max(map(abs, numbers))
    q = [round(127 * number / absmax) if absmax else 0 for number in numbers]  # round() takes ties to the even one
    return torch.tensor(q, dtype=torch.int8).view(x.shape), torch.tensor(absmax)


@right("absmax_int8")
def among_all_levels(x: Tensor) -> tuple[Tensor, Tensor]:
    """By `bucketize`: the borders between the levels are the halves; those of odd levels go to their even neighbour."""
    check_numbers(x)
    absmax = torch.maximum(x.float().max(), -x.float().min())
    z = x.double() * 127 / absmax if absmax > 0 else torch.zeros(x.shape).double()
    below = torch.floor(z)
    rest = z - below
    up = (rest > 0.5) | ((rest == 0.5) & (below % 2 == 1))
    return (below + up).to(torch.int8), absmax


@wrong("absmax_int8", "You take only the numbers for absmax that are not negative. Take absolute values first.")
@changed(absmax_int8, ("x.abs().max()", "x.clamp(min=0).max()"))
def only_positive_numbers(): ...


@wrong(
    "absmax_int8",
    "absmax has the dtype of x. It should be float32, whatever the dtype of x.",
)
@changed(
    absmax_int8,
    ("torch.int8), absmax", "torch.int8), absmax.to(dtype)"),
    ("    x = x.detach().float()", "    dtype = x.dtype\n    x = x.detach().float()"),
)
def absmax_in_the_dtype_of_x(): ...


@wrong("absmax_int8", "Your absmax keeps axes of size 1. It is a scalar, without axes.")
@changed(absmax_int8, ("torch.int8), absmax", "torch.int8), absmax.view(1)"))
def absmax_with_an_axis(): ...


@wrong(
    "absmax_int8", "You round to the step first and then cut: 127 is one level too far in your code, so you end at 126."
)
@changed(absmax_int8, ("scale = 127 /", "scale = 126 /"))
def ends_at_126(): ...


@wrong(
    "absmax_int8",
    "You accept other dtypes than float32, float16 and bfloat16. `check_numbers` refuses them.",
)
@changed(absmax_int8, ("check_numbers(x)", "check_numbers(x.float())"))
def any_dtype(): ...


@wrong(
    "absmax_int8",
    "You accept float64. Only float32, float16 and bfloat16 are allowed; `check_numbers` refuses the others.",
)
@changed(absmax_int8, ("check_numbers(x)", "check_numbers(x.float() if x.is_floating_point() else x)"))
def any_floating_point(): ...


@wrong(
    "absmax_int8",
    "You truncate the fractional part. 0.9 is then almost 1 away from its integer: round to the nearest.",
)
@changed(absmax_int8, ("torch.round(x * scale)", "(x * scale)"))
def cuts_off(): ...


@wrong("absmax_int8", "You always round down, which shifts every number to the left: round to the nearest integer.")
@changed(absmax_int8, ("torch.round(x * scale)", "torch.floor(x * scale)"))
def rounds_down(): ...


@wrong(
    "absmax_int8",
    "A number exactly between two integers is rounded to the even one. Always rounding up shifts the mean.",
)
@changed(absmax_int8, ("torch.round(x * scale)", "torch.floor(x * scale + 0.5)"))
def half_goes_up(): ...


@wrong(
    "absmax_int8",
    "You take the largest number with its sign. What if the number with the largest absolute value is negative?",
)
@changed(absmax_int8, ("x.abs().max()", "x.max()"))
def largest_with_its_sign(): ...


@wrong(
    "absmax_int8",
    "Your range ends at 128, which int8 does not have: the largest number overflows and becomes the smallest.",
)
def ends_at_128(x: Tensor) -> tuple[Tensor, Tensor]:
    check_numbers(x)
    absmax = x.abs().max().float()
    q = torch.round(x.float() * (128 / absmax.clamp(min=TINY))).int()
    return (q % 256).to(torch.uint8).view(torch.int8), absmax


@wrong(
    "absmax_int8",
    "You map the range from the smallest number to the largest, so 0 is no longer mapped to 0. Here the scale is "
    "symmetric.",
)
def from_smallest_to_largest(x: Tensor) -> tuple[Tensor, Tensor]:
    check_numbers(x)
    low, high = x.float().min(), x.float().max()
    q = torch.round((x.float() - low) / (high - low).clamp(min=TINY) * 254 - 127)
    return q.to(torch.int8), x.abs().max().float()


@wrong(
    "absmax_int8",
    "You compute in the dtype of x. In float16 the scale is rounded to 11 bits, and the product can overflow.",
)
@changed(absmax_int8, ("x.detach().float()", "x.detach()"))
def in_half_precision(): ...


@wrong("absmax_int8", "You use one scale for each row. Use one scale for the whole tensor.")
@changed(absmax_int8, ("x.abs().max()", "x.abs().amax(dim=-1, keepdim=x.ndim > 1)"))
def a_scale_for_each_row(): ...


@wrong("absmax_int8", "The integers are right, but they are stored as floats: no memory is saved.")
@changed(absmax_int8, (".to(torch.int8)", ""))
def integers_in_floats(): ...


@wrong("absmax_int8", "The second result is the factor that you multiplied by. Return the absmax itself.")
@changed(absmax_int8, (".to(torch.int8), absmax", ".to(torch.int8), scale"))
def returns_the_factor(): ...


@wrong("absmax_int8", caught_by="no error")
def takes_anything(x: Tensor) -> tuple[Tensor, Tensor]:
    absmax = x.abs().max().float()
    return to_int8(x.nan_to_num(0), absmax.nan_to_num(1)), absmax


# --- blockwise_absmax --------------------------------------------------------------------------------


def ready(x: Tensor, blocksize: int) -> Tensor:
    """The numbers in one row, after raising for invalid input."""
    check_numbers(x)
    if blocksize < 1 or blocksize & (blocksize - 1):
        raise ValueError("a power of two")
    return x.reshape(-1).float()


def filled(flat: Tensor, blocksize: int, value: float = 0.0) -> Tensor:
    return F.pad(flat, (0, -len(flat) % blocksize), value=value).view(-1, blocksize)


@right("blockwise_absmax")
def block_by_block(x: Tensor, blocksize: int = 64) -> Tensor:
    return torch.stack([block.abs().max() for block in ready(x, blocksize).split(blocksize)])


@right("blockwise_absmax")
def with_plain_lists(x: Tensor, blocksize: int = 64) -> Tensor:
    numbers = [abs(number) for number in ready(x, blocksize).tolist()]
    return torch.tensor([max(numbers[start : start + blocksize]) for start in range(0, len(numbers), blocksize)])


@right("blockwise_absmax")
def numpys_reduceat(x: Tensor, blocksize: int = 64) -> np.ndarray:
    flat = np.abs(ready(x, blocksize).numpy())
    return np.maximum.reduceat(flat, np.arange(0, len(flat), blocksize))


@wrong(
    "blockwise_absmax", "You take the largest number of each block with its sign: a large negative number is missed."
)
def signed_maximum(x: Tensor, blocksize: int = 64) -> Tensor:
    return filled(ready(x, blocksize), blocksize, -math.inf).amax(dim=1)


@wrong("blockwise_absmax", "You take the maximum first and the absolute value afterwards: reverse the order.")
def absolute_value_too_late(x: Tensor, blocksize: int = 64) -> Tensor:
    return filled(ready(x, blocksize), blocksize, -math.inf).amax(dim=1).abs()


@wrong("blockwise_absmax", "You leave out the numbers that do not fill a whole block. They need a scale as well.")
def drops_the_rest(x: Tensor, blocksize: int = 64) -> Tensor:
    flat = ready(x, blocksize)
    return flat[: len(flat) // blocksize * blocksize].view(-1, blocksize).abs().amax(dim=1)


@wrong(
    "blockwise_absmax",
    "You fill up the last block with ones. They are larger than the small weights in it, and become their scale.",
)
def fills_up_with_ones(x: Tensor, blocksize: int = 64) -> Tensor:
    return filled(ready(x, blocksize), blocksize, 1.0).abs().amax(dim=1)


@wrong(
    "blockwise_absmax", "You compute one scale for each row. A block continues into the next row, whatever the shape."
)
def one_for_each_row(x: Tensor, blocksize: int = 64) -> Tensor:
    ready(x, blocksize)
    rows = x.float() if x.ndim == 2 else filled(x.float(), blocksize)
    return rows.abs().amax(dim=1)


@wrong(
    "blockwise_absmax",
    "Your blocks contain every k-th number. A block contains consecutive numbers: the first `blocksize` numbers, then "
    "the next.",
)
def every_kth_number(x: Tensor, blocksize: int = 64) -> Tensor:
    return filled(ready(x, blocksize), blocksize).view(blocksize, -1).abs().amax(dim=0)


@wrong("blockwise_absmax", "You read the numbers column by column. Read them row by row.")
def down_the_columns(x: Tensor, blocksize: int = 64) -> Tensor:
    ready(x, blocksize)
    flat = x.T.reshape(-1) if x.ndim == 2 else x
    return filled(flat.float(), blocksize).abs().amax(dim=1)


@wrong("blockwise_absmax", "This is the mean absolute value of each block. The scale is the largest one.")
def mean_of_each_block(x: Tensor, blocksize: int = 64) -> Tensor:
    return torch.stack([block.abs().mean() for block in ready(x, blocksize).split(blocksize)])


@wrong("blockwise_absmax", "You compute a single scale for the whole tensor, so one outlier affects all the numbers.")
def a_single_scale(x: Tensor, blocksize: int = 64) -> Tensor:
    return ready(x, blocksize).abs().max().view(1)


@wrong(
    "blockwise_absmax",
    "A block of zeros has scale 0. The code that divides by it has to handle that; the scale itself must not be "
    "changed.",
)
def one_for_a_block_of_zeros(x: Tensor, blocksize: int = 64) -> Tensor:
    absmax = filled(ready(x, blocksize), blocksize).abs().amax(dim=1)
    return torch.where(absmax == 0, 1.0, absmax)


@right("blockwise_absmax")
def by_scattering(x: Tensor, blocksize: int = 64) -> Tensor:
    flat = ready(x, blocksize).abs()
    block = torch.arange(len(flat)) // blocksize
    return torch.zeros(int(block[-1]) + 1).scatter_reduce(0, block, flat, "amax")


@wrong("blockwise_absmax", "Your result has the dtype of x. It should be float32.")
def in_the_dtype_of_x(x: Tensor, blocksize: int = 64) -> Tensor:
    return filled(ready(x, blocksize), blocksize).abs().amax(dim=1).to(x.dtype)


@wrong("blockwise_absmax", "You accept any block size. Raise a ValueError unless it is a power of two.")
def any_blocksize(x: Tensor, blocksize: int = 64) -> Tensor:
    check_numbers(x)
    return filled(x.reshape(-1).float(), max(blocksize, 1)).abs().amax(dim=1)


@wrong("blockwise_absmax", "You accept numbers that are not finite, or none. `check_numbers` raises the error for you.")
def any_numbers(x: Tensor, blocksize: int = 64) -> Tensor:
    if blocksize < 1 or blocksize & (blocksize - 1):
        raise ValueError("a power of two")
    return filled(x.reshape(-1).float(), blocksize).abs().amax(dim=1)


@wrong("blockwise_absmax", caught_by="no error")
def refuses_nothing(x: Tensor, blocksize: int = 64) -> Tensor:
    return filled(x.reshape(-1).float(), max(blocksize, 1)).abs().amax(dim=1)
