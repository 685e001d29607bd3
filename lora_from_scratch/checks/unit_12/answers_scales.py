"""Unit 12, quantisation: mistakes with the cost of the scales and with double quantisation, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.quantization.int8 import (
    DynamicInt8,
    blockwise_absmax,
    check_blocksize,
    dequantize_dynamic,
    dynamic_map,
    quantize_dynamic,
)

# --- bits_per_weight ---------------------------------------------------------------------------------


def possible(bits: int, blocksize: int, nested_blocksize: int) -> None:
    sizes = (blocksize, nested_blocksize)
    if not 1 <= bits <= 32 or any(size < 1 or size & (size - 1) for size in sizes):
        raise ValueError("impossible")


@right("bits_per_weight")
def counts_a_large_weight(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    n = blocksize * nested_blocksize
    total = n * bits + (nested_blocksize * 8 + 32 if double_quant else nested_blocksize * 32)
    return Fraction(total, n).__float__()


@right("bits_per_weight")
def in_numpys_numbers(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    scale = 8 + np.float64(32) / nested_blocksize if double_quant else np.float64(32)
    return bits + scale / blocksize


@right("bits_per_weight")
def as_a_sum_over_tables(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    tables = [(bits, 1), (32, blocksize)]  # bits of an entry, and how many weights share it
    if double_quant:
        tables[1:] = [(8, blocksize), (32, nested_blocksize * blocksize)]
    return sum(size / shared for size, shared in tables)


@right("bits_per_weight")
def by_quantising_a_weight(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    """The sizes of tensors, as they would be stored."""
    possible(bits, blocksize, nested_blocksize)
    n = blocksize * nested_blocksize
    codes, scales = torch.empty(n, bits, device="meta"), torch.empty(n // blocksize, device="meta")
    stored = [scales]
    if double_quant:
        stored = [scales.byte(), torch.empty(len(scales) // nested_blocksize, device="meta")]
    return (codes.numel() + 8 * sum(one.nbytes for one in stored)) / n


@wrong("bits_per_weight", "You accept codes of less than 1 bit or more than 32. Raise a ValueError.")
def any_bits(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(4, blocksize, nested_blocksize)
    return bits + (8 / blocksize + 32 / (blocksize * nested_blocksize) if double_quant else 32 / blocksize)


@wrong("bits_per_weight", "You also count the one offset of a matrix. It is left out.")
def with_the_offset(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    if double_quant:
        return bits + 8 / blocksize + 64 / (blocksize * nested_blocksize)
    return bits + 32 / blocksize


@wrong("bits_per_weight", "You count only the codes. The scales have to be stored too.")
def codes_only(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return float(bits)


@wrong("bits_per_weight", "You count a scale for each weight. A whole block shares one.")
def a_scale_for_each_weight(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return bits + (8 + 32 / nested_blocksize if double_quant else 32)


@wrong("bits_per_weight", "You count the scales in bytes and the codes in bits. Return bits.")
def scales_in_bytes(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return bits + (1 / blocksize + 4 / (blocksize * nested_blocksize) if double_quant else 4 / blocksize)


@wrong("bits_per_weight", "You leave out the second scales. They are few, but they count.")
def no_second_scales(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return bits + (8 if double_quant else 32) / blocksize


@wrong(
    "bits_per_weight",
    "You divide a second scale among `nested_blocksize` weights. It serves that many *scales*, each of which serves a "
    "block.",
)
def second_scales_shared_by_weights(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return bits + (8 / blocksize + 32 / nested_blocksize if double_quant else 32 / blocksize)


@wrong(
    "bits_per_weight",
    "You count the old scales in 32 bits in addition to the new ones in 8. The new ones replace the old ones.",
)
def old_scales_as_well(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    nested = 8 / blocksize + 32 / (blocksize * nested_blocksize)
    return bits + 32 / blocksize + (nested if double_quant else 0)


@wrong("bits_per_weight", "You always count double quantisation, even if `double_quant` is false.")
def always_double(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return bits + 8 / blocksize + 32 / (blocksize * nested_blocksize)


@wrong("bits_per_weight", "You never count double quantisation, even if `double_quant` is true.")
def never_double(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return bits + 32 / blocksize


@wrong(
    "bits_per_weight", "This is the cost of the scales alone. Return the cost of a weight including its share of them."
)
def overhead_only(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return 8 / blocksize + 32 / (blocksize * nested_blocksize) if double_quant else 32 / blocksize


@wrong("bits_per_weight", "The scales are float32, with 32 bits; you count 16.")
def scales_of_16_bits(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return bits + (8 / blocksize + 16 / (blocksize * nested_blocksize) if double_quant else 16 / blocksize)


@wrong("bits_per_weight", caught_by="no error")
def any_blocks_will_do(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    blocksize = max(blocksize, 1)
    return bits + (8 / blocksize + 32 / (blocksize * nested_blocksize) if double_quant else 32 / blocksize)


# --- double_quantize ---------------------------------------------------------------------------------


@right("double_quantize")
def to_the_exactly_nearest_value(absmax: Tensor, blocksize: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """As on a GPU, without first rounding to 65,536 steps."""
    offset = absmax.double().mean()
    rest = (absmax.double() - offset).float()
    second = blockwise_absmax(rest, blocksize)
    z = rest / second.repeat_interleave(blocksize)[: len(rest)].clamp(min=1e-30)
    return (z[:, None] - dynamic_map()).abs().argmin(dim=1).byte(), second, offset.float()


@right("double_quantize")
def with_numpys_mean(absmax: Tensor, blocksize: int = 256) -> list:
    offset = absmax.numpy().mean(dtype=np.float64)
    codes, second = quantize_dynamic(torch.from_numpy((absmax.numpy() - offset).astype(np.float32)), blocksize)
    return [codes, second, torch.tensor(offset).float()]


@right("double_quantize")
def block_by_block(absmax: Tensor, blocksize: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    check_blocksize(blocksize)
    offset = torch.tensor(sum(absmax.tolist()) / len(absmax)) if len(absmax) else torch.tensor(float("nan"))
    parts = [quantize_dynamic(part - offset, blocksize) for part in absmax.split(blocksize)]
    return torch.cat([part.codes for part in parts]), torch.cat([part.absmax for part in parts]), offset


@right("double_quantize")
def by_searching_the_map(absmax: Tensor, blocksize: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    rest = absmax - absmax.mean()
    second = blockwise_absmax(rest, blocksize)
    values = dynamic_map()
    borders = (values[1:] + values[:-1]) / 2
    codes = [
        torch.bucketize(part / scale.clamp(min=1e-30), borders)
        for part, scale in zip(rest.split(blocksize), second, strict=True)
    ]
    return torch.cat(codes).byte(), second, absmax.mean()


@wrong("double_quantize", "The codes take more than a byte each: they should be uint8.")
def codes_as_integers(absmax: Tensor, blocksize: int = 256) -> tuple:
    codes, second = quantize_dynamic(absmax - absmax.mean(), blocksize)
    return codes.int(), second, absmax.mean()


@wrong(
    "double_quantize",
    "You replace scales that are not finite, or accept that there are none. Raise a ValueError, as `quantize_dynamic` "
    "does.",
)
def any_scales(absmax: Tensor, blocksize: int = 256) -> tuple:
    absmax = absmax.nan_to_num(0.0) if len(absmax) else torch.zeros(1)
    return *quantize_dynamic(absmax - absmax.mean(), blocksize), absmax.mean()


@wrong(
    "double_quantize",
    "You quantise the scales without subtracting the offset. They are all positive: half of the codes are never used.",
)
def without_an_offset(absmax: Tensor, blocksize: int = 256) -> tuple:
    return *quantize_dynamic(absmax, blocksize), torch.tensor(0.0)


@wrong("double_quantize", "You store the offset, but you quantise the scales without subtracting it.")
def stores_it_without_subtracting(absmax: Tensor, blocksize: int = 256) -> tuple:
    return *quantize_dynamic(absmax, blocksize), absmax.mean()


@wrong(
    "double_quantize", "You subtract the mean, but store an offset of 0: it is missing when the scales are restored."
)
def subtracts_it_without_storing(absmax: Tensor, blocksize: int = 256) -> tuple:
    return *quantize_dynamic(absmax - absmax.mean(), blocksize), torch.tensor(0.0)


@wrong("double_quantize", "Your offset is the smallest scale, so all the differences are still positive.")
def offset_is_the_smallest(absmax: Tensor, blocksize: int = 256) -> tuple:
    return *quantize_dynamic(absmax - absmax.min(), blocksize), absmax.min()


@wrong("double_quantize", "Your offset is the median; it has to be the mean.")
def offset_is_the_median(absmax: Tensor, blocksize: int = 256) -> tuple:
    return *quantize_dynamic(absmax - absmax.quantile(0.5), blocksize), absmax.quantile(0.5)


@wrong(
    "double_quantize",
    "You subtract the scales from the offset. When they are restored, every difference has the wrong sign.",
)
def the_difference_turned_round(absmax: Tensor, blocksize: int = 256) -> tuple:
    return *quantize_dynamic(absmax.mean() - absmax, blocksize), absmax.mean()


@wrong("double_quantize", "You do not use the given block size.")
def its_own_blocks(absmax: Tensor, blocksize: int = 256) -> tuple:
    return *quantize_dynamic(absmax - absmax.mean(), 256), absmax.mean()


@wrong("double_quantize", "You take the mean of each block. There is one offset for all scales of a weight.")
def an_offset_for_each_block(absmax: Tensor, blocksize: int = 256) -> tuple:
    means = torch.stack([block.mean() for block in absmax.split(blocksize)])
    rest = absmax - means.repeat_interleave(blocksize)[: len(absmax)]
    return *quantize_dynamic(rest, blocksize), means if len(means) > 1 else means[0]


@wrong("double_quantize", "You return the restored scales. Return the codes.")
def there_and_back(absmax: Tensor, blocksize: int = 256) -> tuple:
    codes, second = quantize_dynamic(absmax - absmax.mean(), blocksize)
    return dequantize_dynamic(DynamicInt8(codes, second), blocksize) + absmax.mean(), second, absmax.mean()


@wrong("double_quantize", caught_by="three results")
def without_the_offset_at_the_end(absmax: Tensor, blocksize: int = 256) -> tuple:
    return tuple(quantize_dynamic(absmax - absmax.mean(), blocksize))


@wrong("double_quantize", caught_by="changes its input")
def subtracts_in_place(absmax: Tensor, blocksize: int = 256) -> tuple:
    offset = absmax.mean()
    absmax -= offset
    return *quantize_dynamic(absmax, blocksize), offset


@wrong("double_quantize", caught_by="another dtype")
def offset_in_float64(absmax: Tensor, blocksize: int = 256) -> tuple:
    offset = absmax.double().mean()
    return *quantize_dynamic((absmax - offset).float(), blocksize), offset
