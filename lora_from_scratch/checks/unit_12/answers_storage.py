"""Unit 12, quantisation: mistakes with packing and unpacking, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.quantization.nf4 import check_parts, nf4_codebook

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


@wrong("pack_nibbles", "The two halves are swapped: the first code of a pair goes into the high half.")
def low_half_first(codes: Tensor) -> Tensor:
    even, odd = halves(codes)
    return (odd << 4 | even)[:, None]


@wrong("pack_nibbles", "You pair the first half of the codes with the second half. Neighbours share a byte.")
def first_half_with_the_second(codes: Tensor) -> Tensor:
    one, two = allowed(codes).reshape(-1).to(torch.uint8).chunk(2)
    return (one << 4 | two)[:, None]


@wrong(
    "pack_nibbles", "The bytes are right; but the result has to be a column of shape (n / 2, 1), as in bitsandbytes."
)
def a_flat_row(codes: Tensor) -> Tensor:
    even, odd = halves(codes)
    return even << 4 | odd


@wrong(
    "pack_nibbles", "You add the two codes without shifting one of them: 1 and 2 then give the same byte as 2 and 1."
)
def adds_them(codes: Tensor) -> Tensor:
    even, odd = halves(codes)
    return (even + odd)[:, None]


@wrong("pack_nibbles", "You shift the first code by one decimal place. Half a byte has 16 values, not 10.")
def decimal_places(codes: Tensor) -> Tensor:
    even, odd = halves(codes)
    return (even * 10 + odd)[:, None]


@wrong("pack_nibbles", "You shift the first code out of the byte altogether. How many bits does half a byte have?")
def out_of_the_byte(codes: Tensor) -> Tensor:
    even, odd = halves(codes)
    return (even.int() << 8 | odd).to(torch.uint8)[:, None]


@wrong("pack_nibbles", "You keep the bits that both codes have, which are none. Use the operation that joins them.")
def keeps_what_both_have(codes: Tensor) -> Tensor:
    even, odd = halves(codes)
    return ((even << 4) & odd)[:, None]


@wrong("pack_nibbles", "The numbers are right, but each of them takes more than a byte: what is the dtype?")
def in_whole_integers(codes: Tensor) -> Tensor:
    even, odd = halves(codes)
    return (even.long() << 4 | odd.long())[:, None]


@wrong("pack_nibbles", "Raise an error if the number of codes is odd. Padding is the caller's decision.")
def fills_up_by_itself(codes: Tensor) -> Tensor:
    flat = codes.reshape(-1)
    even, odd = halves(torch.cat([flat, flat.new_zeros(len(flat) % 2)]))
    return (even << 4 | odd)[:, None]


@wrong("pack_nibbles", "A code of 16 needs five bits. Raise an error: it would change the neighbouring code.")
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


@wrong("dequantize_nf4", "These are the values of the codebook, between -1 and 1. Multiply each block by its scale.")
def without_the_scales(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    return book(codebook)[unpacked(packed, n)].to(dtype).view(*shape)


@wrong("dequantize_nf4", "You divide by the scales. Quantisation divided by them, so dequantisation has to multiply.")
def divides_once_more(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    return (book(codebook)[unpacked(packed, n)] / spread(absmax, blocksize, n)).to(dtype).view(*shape)


@wrong("dequantize_nf4", "All weights get the scale of the first block. Each block has its own.")
def the_first_scale_for_all(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    return (book(codebook)[unpacked(packed, n)] * absmax[0]).to(dtype).view(*shape)


@wrong(
    "dequantize_nf4",
    "You repeat the whole sequence of scales. A block consists of consecutive weights with the same scale.",
)
def scales_in_turn(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    return (book(codebook)[unpacked(packed, n)] * absmax.repeat(blocksize)[:n]).to(dtype).view(*shape)


@wrong("dequantize_nf4", "You count the blocks in bytes. A block is `blocksize` weights, which are half as many bytes.")
def blocks_of_bytes(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    block = torch.arange(n) // (2 * blocksize)
    return (book(codebook)[unpacked(packed, n)] * absmax[block]).to(dtype).view(*shape)


@wrong("dequantize_nf4", "You treat a code as an integer with equal steps. Look up its value in the codebook.")
def codes_as_integers(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    return ((unpacked(packed, n) - 8) / 7 * spread(absmax, blocksize, n)).to(dtype).view(*shape)


@wrong("dequantize_nf4", "You look up the codes in NF4's codebook whatever codebook is given.")
def nf4_whatever_is_given(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    return (nf4_codebook()[unpacked(packed, n)] * spread(absmax, blocksize, n)).to(dtype).view(*shape)


@wrong("dequantize_nf4", "The weight is returned in float32 whatever dtype is requested.")
def always_float32(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    return (book(codebook)[unpacked(packed, n)] * spread(absmax, blocksize, n)).view(*shape)


@wrong(
    "dequantize_nf4",
    "You convert to the other dtype before you multiply, and so round twice. Multiply in float32 and convert at the "
    "end.",
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
