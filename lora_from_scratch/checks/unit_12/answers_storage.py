"""Unit 12, quantisation: mistakes with packing and unpacking, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.quantization.nf4 import check_parts, dequantize_nf4, nf4_codebook, pack_nibbles

# --- pack_nibbles ------------------------------------------------------------------------------------


def allowed(codes: Tensor) -> Tensor:
    if codes.numel() % 2 or codes.is_floating_point() or any(not 0 <= code <= 15 for code in codes.flatten()):
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
    joined = [(flat[i] << 4) + flat[i + 1] for i in range(0, len(flat), 2)]
    return torch.tensor(joined, dtype=torch.uint8).unsqueeze(1)


@right("pack_nibbles")
def as_bytes_of_hexadecimal_digits(codes: Tensor) -> Tensor:
    digits = "".join(f"{code:x}" for code in allowed(codes).flatten().tolist())
    return torch.tensor(list(bytes.fromhex(digits)), dtype=torch.uint8).view(-1, 1)


@right("pack_nibbles")
def as_one_product(codes: Tensor) -> Tensor:
    places = torch.tensor([16.0, 1.0]).repeat(codes.numel() // 2)
    return (allowed(codes).reshape(-1).float() * places).view(-1, 2).sum(1, keepdim=True).byte()


@wrong(
    "pack_nibbles", "You `view` the codes, which only works if they are contiguous. `reshape` copies where it has to."
)
@changed(pack_nibbles, ("codes.reshape(-1, 2)", "codes.view(-1, 2)"))
def only_contiguous(): ...


@wrong("pack_nibbles", "You refuse an empty tensor of codes, or fail on it. No codes make no bytes, (0, 1).")
@changed(pack_nibbles, ("(codes.numel() and not 0", "(not 0"))
def fails_without_codes(): ...


@wrong("pack_nibbles", "You accept codes that are not whole numbers, and cut them off. Raise a ValueError.")
@changed(pack_nibbles, ("codes.is_floating_point() or ", ""))
def cuts_codes_off(): ...


@wrong("pack_nibbles", "You accept negative codes. Raise a ValueError: a code is from 0 to 15.")
@changed(pack_nibbles, ("not 0 <= codes.min() <= codes.max() <= 15", "codes.max() > 15"))
def negative_codes(): ...


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
    even, odd = halves(torch.where(codes > 15, codes % 16, codes))
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


@right("dequantize_nf4")
def a_table_of_pairs(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    """All 256 bytes are looked up at once: each stands for a pair of values."""
    n = checked(packed, absmax, shape, blocksize)
    pairs = torch.cartesian_prod(book(codebook), book(codebook))  # (256, 2), in the order of the bytes
    values = pairs[packed.flatten().long()].flatten()[:n]
    values = torch.nn.functional.pad(values, (0, -n % blocksize)).view(-1, blocksize) * absmax[:, None]
    return values.flatten()[:n].to(dtype).reshape(tuple(shape))


@right("dequantize_nf4")
def in_numpy(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    bits = np.unpackbits(packed.numpy().reshape(-1, 1), axis=1).reshape(-1, 4)[:n]
    weight = book(codebook).numpy()[bits @ np.array([8, 4, 2, 1])] * np.repeat(absmax.numpy(), blocksize)[:n]
    return torch.from_numpy(weight.reshape(tuple(shape))).to(dtype)


@wrong("dequantize_nf4", "You do not check the dtype of the bytes. Raise a ValueError unless they are uint8.")
@changed(dequantize_nf4, ("check_parts(packed,", "packed = packed.to(torch.uint8)\n    check_parts(packed,"))
def bytes_of_any_dtype(): ...


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
@changed(dequantize_nf4, ("(values * scales)", "values"))
def without_the_scales(): ...


@wrong("dequantize_nf4", "You divide by the scales. Quantisation divided by them, so dequantisation has to multiply.")
@changed(dequantize_nf4, ("values * scales", "values / scales"))
def divides_once_more(): ...


@wrong("dequantize_nf4", "All weights get the scale of the first block. Each block has its own.")
@changed(dequantize_nf4, ("absmax.repeat_interleave(blocksize)[:n]", "absmax[0]"))
def the_first_scale_for_all(): ...


@wrong(
    "dequantize_nf4",
    "You repeat the whole sequence of scales. A block consists of consecutive weights with the same scale.",
)
@changed(dequantize_nf4, (".repeat_interleave(blocksize)", ".repeat(blocksize)"))
def scales_in_turn(): ...


@wrong("dequantize_nf4", "You count the blocks in bytes. A block is `blocksize` weights, which are half as many bytes.")
@changed(dequantize_nf4, (".repeat_interleave(blocksize)", ".repeat_interleave(2 * blocksize)"))
def blocks_of_bytes(): ...


@wrong("dequantize_nf4", "You treat a code as an integer with equal steps. Look up its value in the codebook.")
@changed(dequantize_nf4, ("as_codebook(codebook, packed.device)[codes]", "(codes - 8) / 7"))
def codes_as_integers(): ...


@wrong("dequantize_nf4", "You look up the codes in NF4's codebook whatever codebook is given.")
@changed(dequantize_nf4, ("as_codebook(codebook, packed.device)", "nf4_codebook()"))
def nf4_whatever_is_given(): ...


@wrong("dequantize_nf4", "The weight is returned in float32 whatever dtype is requested.")
@changed(dequantize_nf4, (".to(dtype)", ""))
def always_float32(): ...


@wrong(
    "dequantize_nf4",
    "You convert to the other dtype before you multiply, and so round twice. Multiply in float32 and convert at the "
    "end.",
)
@changed(dequantize_nf4, ("values * scales", "values.to(dtype) * scales.to(dtype)"))
def rounds_twice(): ...


@wrong("dequantize_nf4", "You fill the matrix column by column. It was read row by row.")
def fills_the_columns(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = checked(packed, absmax, shape, blocksize)
    values = (book(codebook)[unpacked(packed, n)] * spread(absmax, blocksize, n)).to(dtype)
    return values.reshape(*reversed(shape)).permute(*reversed(range(len(shape)))).contiguous()


@wrong("dequantize_nf4", caught_by="another shape")
@changed(dequantize_nf4, (".view(tuple(shape))", ""))
def stays_flat(): ...


@wrong("dequantize_nf4", caught_by="no error")
def takes_what_does_not_fit(packed, absmax, shape, blocksize=64, dtype=torch.float32, codebook=None):
    n = math.prod(shape)
    scales = absmax.repeat_interleave(blocksize)
    scales = torch.cat([scales, torch.ones(max(0, n - len(scales)))])[:n]
    return (book(codebook)[unpacked(packed, n)] * scales).to(dtype).view(*shape)
