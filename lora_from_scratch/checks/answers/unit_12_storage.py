"""Unit 12, quantisation: mistakes with packing, unpacking and the cost of the scales, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.int8 import DynamicInt8, blockwise_absmax, dequantize_dynamic, dynamic_map, quantize_dynamic
from lora_from_scratch.nf4 import check_parts, nf4_codebook

# --- pack_nibbles ------------------------------------------------------------------------------------


def allowed(codes: Tensor) -> Tensor:
    if codes.numel() % 2 or codes.min() < 0 or codes.max() > 15:
        raise ValueError("no such codes")
    return codes


def halves(codes: Tensor) -> tuple[Tensor, Tensor]:
    flat = allowed(codes).reshape(-1).to(torch.uint8)
    return flat[::2], flat[1::2]


@right("pack_nibbles")
def by_multiplication(codes: Tensor) -> np.ndarray:
    pairs = allowed(codes).numpy().astype(np.uint8).reshape(-1, 2)
    return (pairs @ np.array([[16], [1]], dtype=np.uint8)).astype(np.uint8)


@right("pack_nibbles")
def in_a_loop(codes: Tensor) -> Tensor:
    flat = allowed(codes).flatten().tolist()
    return torch.tensor([[(flat[i] << 4) + flat[i + 1]] for i in range(0, len(flat), 2)], dtype=torch.uint8)


@wrong(
    "pack_nibbles", "The two halves are swapped: the code at the even position, the first of a pair, is the high one."
)
def low_half_first(codes: Tensor) -> Tensor:
    even, odd = halves(codes)
    return (odd << 4 | even)[:, None]


@wrong("pack_nibbles", "You pair the first half of the codes with the second. Neighbours share a byte.")
def first_half_with_the_second(codes: Tensor) -> Tensor:
    one, two = allowed(codes).reshape(-1).to(torch.uint8).chunk(2)
    return (one << 4 | two)[:, None]


@wrong("pack_nibbles", "The bytes are right; the result is a column of shape (n / 2, 1), as bitsandbytes has it.")
def a_flat_row(codes: Tensor) -> Tensor:
    even, odd = halves(codes)
    return even << 4 | odd


@wrong("pack_nibbles", "You add the two codes without moving one of them: 1 and 2 are then the same byte as 2 and 1.")
def adds_them(codes: Tensor) -> Tensor:
    even, odd = halves(codes)
    return (even + odd)[:, None]


@wrong("pack_nibbles", "You move the first code by one decimal place. Half of a byte has 16 values, not 10.")
def decimal_places(codes: Tensor) -> Tensor:
    even, odd = halves(codes)
    return (even * 10 + odd)[:, None]


@wrong("pack_nibbles", "You move the first code out of the byte altogether. How many bits does half of a byte have?")
def out_of_the_byte(codes: Tensor) -> Tensor:
    even, odd = halves(codes)
    return (even.int() << 8 | odd).to(torch.uint8)[:, None]


@wrong("pack_nibbles", "You keep the bits that both have, which are none. Joining is the other operation.")
def keeps_what_both_have(codes: Tensor) -> Tensor:
    even, odd = halves(codes)
    return ((even << 4) & odd)[:, None]


@wrong("pack_nibbles", "The numbers are right, but each of them takes more than a byte: what is the dtype?")
def in_whole_integers(codes: Tensor) -> Tensor:
    even, odd = halves(codes)
    return (even.long() << 4 | odd.long())[:, None]


@wrong("pack_nibbles", "An odd number of codes is refused here. Who fills it up, and with what, is decided elsewhere.")
def fills_up_by_itself(codes: Tensor) -> Tensor:
    flat = codes.reshape(-1)
    even, odd = halves(torch.cat([flat, flat.new_zeros(len(flat) % 2)]))
    return (even << 4 | odd)[:, None]


@wrong(
    "pack_nibbles", "A code of 16 needs five bits. What does not fit has to be refused: it would change its neighbour."
)
def takes_codes_that_do_not_fit(codes: Tensor) -> Tensor:
    even, odd = halves(codes % 16)
    return (even << 4 | odd)[:, None]


# --- dequantize_nf4 ----------------------------------------------------------------------------------


def book(codebook: Tensor | None) -> Tensor:
    return nf4_codebook() if codebook is None else codebook


def unpacked(packed: Tensor, n: int) -> Tensor:
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).view(-1)[:n].long()


def spread(absmax: Tensor, blocksize: int, n: int) -> Tensor:
    return absmax.repeat_interleave(blocksize)[:n]


def checked(packed: Tensor, absmax: Tensor, shape: Sequence[int], blocksize: int) -> int:
    check_parts(packed, absmax, tuple(shape), blocksize)
    return math.prod(shape)


@right("dequantize_nf4")
def all_at_once(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    values = book(codebook)[unpacked(packed, n)] * spread(absmax, blocksize, n)
    return values.to(dtype).reshape(tuple(shape))


@right("dequantize_nf4")
def one_by_one(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    table, bytes_ = book(codebook).tolist(), packed.flatten().tolist()
    codes = [code for byte in bytes_ for code in divmod(byte, 16)][:n]
    values = [table[code] * float(absmax[place // blocksize]) for place, code in enumerate(codes)]
    return torch.tensor(values).to(dtype).view(*shape)


@wrong("dequantize_nf4", "You take the low half of each byte first. The first of two weights is in the high half.")
def halves_of_a_byte_swapped(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    flat = packed.reshape(-1)
    codes = torch.stack([flat & 15, flat >> 4], dim=1).view(-1)[:n].long()
    return (book(codebook)[codes] * spread(absmax, blocksize, n)).to(dtype).view(*shape)


@wrong("dequantize_nf4", "You put all high halves before all low ones. The two weights of a byte are neighbours.")
def high_halves_before_low_ones(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    flat = packed.reshape(-1)
    codes = torch.cat([flat >> 4, flat & 15])[:n].long()
    return (book(codebook)[codes] * spread(absmax, blocksize, n)).to(dtype).view(*shape)


@wrong("dequantize_nf4", "These are the values of the codebook, between -1 and 1. Each block still needs its scale.")
def without_the_scales(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    return book(codebook)[unpacked(packed, n)].to(dtype).view(*shape)


@wrong("dequantize_nf4", "You divide by the scales. Quantising divided by them: this is the way back.")
def divides_once_more(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    return (book(codebook)[unpacked(packed, n)] / spread(absmax, blocksize, n)).to(dtype).view(*shape)


@wrong("dequantize_nf4", "All weights get the scale of the first block. Each block has its own.")
def the_first_scale_for_all(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    return (book(codebook)[unpacked(packed, n)] * absmax[0]).to(dtype).view(*shape)


@wrong(
    "dequantize_nf4",
    "You lay the scales out one after the other and begin again. A block is a run of neighbours that have the same "
    "scale.",
)
def scales_in_turn(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    return (book(codebook)[unpacked(packed, n)] * absmax.repeat(blocksize)[:n]).to(dtype).view(*shape)


@wrong(
    "dequantize_nf4", "You count the blocks in bytes. A block is `blocksize` weights, and that is half as many bytes."
)
def blocks_of_bytes(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    block = torch.arange(n) // (2 * blocksize)
    return (book(codebook)[unpacked(packed, n)] * absmax[block]).to(dtype).view(*shape)


@wrong("dequantize_nf4", "You read a code as an integer with equal steps. What it stands for is in the codebook.")
def codes_as_integers(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    return ((unpacked(packed, n) - 8) / 7 * spread(absmax, blocksize, n)).to(dtype).view(*shape)


@wrong("dequantize_nf4", "You look the codes up in NF4's table whatever codebook is given.")
def nf4_whatever_is_given(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    return (nf4_codebook()[unpacked(packed, n)] * spread(absmax, blocksize, n)).to(dtype).view(*shape)


@wrong("dequantize_nf4", "The weight comes back in float32 whatever dtype is asked for.")
def always_float32(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    return (book(codebook)[unpacked(packed, n)] * spread(absmax, blocksize, n)).view(*shape)


@wrong(
    "dequantize_nf4",
    "You go to the other dtype before you multiply, and round twice. Multiply in float32, convert at the end.",
)
def rounds_twice(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    return (book(codebook).to(dtype)[unpacked(packed, n)] * spread(absmax, blocksize, n).to(dtype)).view(*shape)


@wrong("dequantize_nf4", "You fill the matrix column by column. It was read row by row.")
def fills_the_columns(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    values = (book(codebook)[unpacked(packed, n)] * spread(absmax, blocksize, n)).to(dtype)
    return values.reshape(*reversed(shape)).permute(*reversed(range(len(shape)))).contiguous()


@wrong("dequantize_nf4", caught_by="shape")
def stays_flat(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    return (book(codebook)[unpacked(packed, n)] * spread(absmax, blocksize, n)).to(dtype)


@wrong("dequantize_nf4", caught_by="no error")
def takes_what_does_not_fit(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = math.prod(shape)
    scales = absmax.repeat_interleave(blocksize)
    scales = torch.cat([scales, torch.ones(max(0, n - len(scales)))])[:n]
    return (book(codebook)[unpacked(packed, n)] * scales).to(dtype).view(*shape)


# --- bits_per_weight ---------------------------------------------------------------------------------


def possible(bits: int, blocksize: int, nested_blocksize: int) -> None:
    if not 1 <= bits <= 32 or blocksize & (blocksize - 1) or nested_blocksize & (nested_blocksize - 1):
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


@wrong("bits_per_weight", "You count the codes only. The scales have to be stored, too.")
def codes_only(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return float(bits)


@wrong("bits_per_weight", "You count a scale for each weight. A whole block shares one.")
def a_scale_for_each_weight(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return bits + (8 + 32 / nested_blocksize if double_quant else 32)


@wrong("bits_per_weight", "You count the scales in bytes and the codes in bits. Bits are asked for.")
def scales_in_bytes(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return bits + (1 / blocksize + 4 / (blocksize * nested_blocksize) if double_quant else 4 / blocksize)


@wrong("bits_per_weight", "You leave out the second scales. They are few, but they are there.")
def no_second_scales(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return bits + (8 if double_quant else 32) / blocksize


@wrong(
    "bits_per_weight",
    "You share a second scale out over `nested_blocksize` weights. It serves so many *scales*, and each of them serves "
    "a block.",
)
def second_scales_shared_by_weights(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return bits + (8 / blocksize + 32 / nested_blocksize if double_quant else 32 / blocksize)


@wrong("bits_per_weight", "You count the old scales in 32 bits beside the new ones in 8. The new ones replace the old.")
def old_scales_as_well(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    nested = 8 / blocksize + 32 / (blocksize * nested_blocksize)
    return bits + 32 / blocksize + (nested if double_quant else 0)


@wrong("bits_per_weight", "You answer for double quantisation whether it is asked for or not.")
def always_double(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return bits + 8 / blocksize + 32 / (blocksize * nested_blocksize)


@wrong("bits_per_weight", "You answer without double quantisation whether it is asked for or not.")
def never_double(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return bits + 32 / blocksize


@wrong("bits_per_weight", "This is what the scales cost. What does a weight cost with its share of them?")
def overhead_only(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return 8 / blocksize + 32 / (blocksize * nested_blocksize) if double_quant else 32 / blocksize


@wrong("bits_per_weight", "The scales are float32, of 32 bits; you count them in 16.")
def scales_of_16_bits(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    possible(bits, blocksize, nested_blocksize)
    return bits + (8 / blocksize + 16 / (blocksize * nested_blocksize) if double_quant else 16 / blocksize)


@wrong("bits_per_weight", caught_by="no error")
def any_blocks_will_do(bits=4, blocksize=64, double_quant=False, nested_blocksize=256):
    return bits + (8 / blocksize + 32 / (blocksize * nested_blocksize) if double_quant else 32 / blocksize)


# --- double_quantize ---------------------------------------------------------------------------------


@right("double_quantize")
def to_the_exactly_nearest_value(absmax: Tensor, blocksize: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """As on a GPU: no rounding to 65,536 steps first."""
    offset = absmax.double().mean()
    rest = (absmax.double() - offset).float()
    second = blockwise_absmax(rest, blocksize)
    z = rest / second.repeat_interleave(blocksize)[: len(rest)].clamp(min=1e-30)
    return (z[:, None] - dynamic_map()).abs().argmin(dim=1).byte(), second, offset.float()


@right("double_quantize")
def with_numpys_mean(absmax: Tensor, blocksize: int = 256) -> list:
    offset = absmax.numpy().mean(dtype=np.float64)
    codes, second = quantize_dynamic(torch.from_numpy((absmax.numpy() - offset).astype(np.float32)), blocksize)
    return [codes, second, float(offset)]


@wrong(
    "double_quantize", "You quantise the scales as they are. They are all positive: half of the codes are never used."
)
def without_an_offset(absmax: Tensor, blocksize: int = 256) -> tuple:
    return *quantize_dynamic(absmax, blocksize), torch.tensor(0.0)


@wrong("double_quantize", "You store the offset, but what you quantise are the scales as they are: take it away first.")
def stores_it_without_subtracting(absmax: Tensor, blocksize: int = 256) -> tuple:
    return *quantize_dynamic(absmax, blocksize), absmax.mean()


@wrong("double_quantize", "You subtract the mean, but the offset that you store is 0: on the way back it is missing.")
def subtracts_it_without_storing(absmax: Tensor, blocksize: int = 256) -> tuple:
    return *quantize_dynamic(absmax - absmax.mean(), blocksize), torch.tensor(0.0)


@wrong("double_quantize", "Your offset is the smallest scale, so what is left is still all positive.")
def offset_is_the_smallest(absmax: Tensor, blocksize: int = 256) -> tuple:
    return *quantize_dynamic(absmax - absmax.min(), blocksize), absmax.min()


@wrong("double_quantize", "Your offset is the median; it has to be the mean, which is what others will read it as.")
def offset_is_the_median(absmax: Tensor, blocksize: int = 256) -> tuple:
    return *quantize_dynamic(absmax - absmax.quantile(0.5), blocksize), absmax.quantile(0.5)


@wrong(
    "double_quantize", "You subtract the scales from the offset. On the way back every scale lies on the wrong side."
)
def the_difference_turned_round(absmax: Tensor, blocksize: int = 256) -> tuple:
    return *quantize_dynamic(absmax.mean() - absmax, blocksize), absmax.mean()


@wrong("double_quantize", "You use another block size than the one that is given.")
def its_own_blocks(absmax: Tensor, blocksize: int = 256) -> tuple:
    return *quantize_dynamic(absmax - absmax.mean(), 256), absmax.mean()


@wrong("double_quantize", "You take the mean of each block. There is one offset for all scales of a weight.")
def an_offset_for_each_block(absmax: Tensor, blocksize: int = 256) -> tuple:
    means = torch.stack([block.mean() for block in absmax.split(blocksize)])
    rest = absmax - means.repeat_interleave(blocksize)[: len(absmax)]
    return *quantize_dynamic(rest, blocksize), means if len(means) > 1 else means[0]


@wrong("double_quantize", "You return the scales after the way there and back. What has to be stored are the codes.")
def there_and_back(absmax: Tensor, blocksize: int = 256) -> tuple:
    codes, second = quantize_dynamic(absmax - absmax.mean(), blocksize)
    return dequantize_dynamic(DynamicInt8(codes, second), blocksize) + absmax.mean(), second, absmax.mean()


@wrong("double_quantize", caught_by="number of results")
def without_the_offset_at_the_end(absmax: Tensor, blocksize: int = 256) -> tuple:
    return tuple(quantize_dynamic(absmax - absmax.mean(), blocksize))


@wrong("double_quantize", caught_by="changes its input")
def subtracts_in_place(absmax: Tensor, blocksize: int = 256) -> tuple:
    offset = absmax.mean()
    absmax -= offset
    return *quantize_dynamic(absmax, blocksize), offset
