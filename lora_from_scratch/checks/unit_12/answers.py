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

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.quantization.int8 import check_numbers

TINY = 1e-30

# --- absmax_int8 -------------------------------------------------------------------------------------


def to_int8(x: Tensor, absmax: Tensor, levels: float = 127) -> Tensor:
    return torch.round(x.float() * (levels / absmax.float().clamp(min=TINY))).to(torch.int8)


@right("absmax_int8")
def in_numpy(x: Tensor) -> tuple[np.ndarray, float]:
    values = x.numpy().astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("not finite")
    absmax = np.abs(values).max()
    q = np.rint(values * 127 / absmax) if absmax > 0 else np.zeros_like(values)
    return q.astype(np.int8), float(absmax)


@right("absmax_int8")
def divides_by_the_step(x: Tensor) -> tuple[Tensor, Tensor]:
    check_numbers(x)
    absmax = torch.linalg.vector_norm(x.double(), ord=math.inf)
    step = absmax / 127 if absmax else torch.tensor(1.0)
    return (x.double() / step).round().clamp(-127, 127).char(), absmax


@wrong(
    "absmax_int8",
    "You truncate the fractional part. 0.9 is then almost 1 away from its integer: round to the nearest.",
)
def cuts_off(x: Tensor) -> tuple[Tensor, Tensor]:
    check_numbers(x)
    absmax = x.abs().max().float()
    return (x.float() * (127 / absmax.clamp(min=TINY))).to(torch.int8), absmax


@wrong("absmax_int8", "You always round down, which shifts every number to the left: round to the nearest integer.")
def rounds_down(x: Tensor) -> tuple[Tensor, Tensor]:
    check_numbers(x)
    absmax = x.abs().max().float()
    return torch.floor(x.float() * (127 / absmax.clamp(min=TINY))).to(torch.int8), absmax


@wrong(
    "absmax_int8",
    "A number exactly between two integers is rounded to the even one. Always rounding up shifts the mean.",
)
def half_goes_up(x: Tensor) -> tuple[Tensor, Tensor]:
    check_numbers(x)
    absmax = x.abs().max().float()
    return torch.floor(x.float() * (127 / absmax.clamp(min=TINY)) + 0.5).to(torch.int8), absmax


@wrong(
    "absmax_int8",
    "You take the largest number with its sign. What if the number with the largest absolute value is negative?",
)
def largest_with_its_sign(x: Tensor) -> tuple[Tensor, Tensor]:
    check_numbers(x)
    absmax = x.max().float()
    return to_int8(x, absmax), absmax


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
def in_half_precision(x: Tensor) -> tuple[Tensor, Tensor]:
    check_numbers(x)
    absmax = x.abs().max()
    if not absmax:
        return torch.zeros_like(x, dtype=torch.int8), absmax
    return torch.round(x * (127 / absmax)).to(torch.int8), absmax


@wrong("absmax_int8", "You use one scale for each row. Use one scale for the whole tensor.")
def a_scale_for_each_row(x: Tensor) -> tuple[Tensor, Tensor]:
    check_numbers(x)
    absmax = x.abs().amax(dim=-1, keepdim=x.ndim > 1).float()
    return to_int8(x, absmax), absmax


@wrong("absmax_int8", "The integers are right, but they are stored as floats: no memory is saved.")
def integers_in_floats(x: Tensor) -> tuple[Tensor, Tensor]:
    check_numbers(x)
    absmax = x.abs().max().float()
    return torch.round(x.float() * (127 / absmax.clamp(min=TINY))), absmax


@wrong("absmax_int8", "The second result is the factor that you multiplied by. Return the absmax itself.")
def returns_the_factor(x: Tensor) -> tuple[Tensor, Tensor]:
    check_numbers(x)
    absmax = x.abs().max().float()
    return to_int8(x, absmax), 127 / absmax.clamp(min=TINY)


@wrong("absmax_int8", caught_by="no error")
def takes_anything(x: Tensor) -> tuple[Tensor, Tensor]:
    absmax = x.abs().max().float()
    return to_int8(x.nan_to_num(0), absmax.nan_to_num(1)), absmax


# --- blockwise_absmax --------------------------------------------------------------------------------


def ready(x: Tensor, blocksize: int) -> Tensor:
    """The numbers in one row, after raising for invalid input."""
    check_numbers(x)
    if blocksize & (blocksize - 1):
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


@wrong("blockwise_absmax", caught_by="no error")
def refuses_nothing(x: Tensor, blocksize: int = 64) -> Tensor:
    return filled(x.reshape(-1), blocksize).abs().amax(dim=1)
