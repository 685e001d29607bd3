"""NF4: four bits a weight, for weights that are normally distributed (Dettmers et al. 2023, QLoRA, section 3).

A weight matrix is cut into blocks of 64. Each block keeps its largest absolute value (its scale, `absmax`), and each
weight keeps the number of the nearest of 16 values between -1 and 1 (its code). Two codes share a byte. With double
quantisation the scales are stored in 8 bits as well. The numbers equal bitsandbytes' (0.50, on a CPU) bit for bit.

This is the version to read. The layers compute with `fast_nf4.py`, which gives the same numbers in less time and
memory; `quantized_tensor.py` holds the parts of a weight together and saves them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.quantization.int8 import (
    TINY,
    DynamicInt8,
    blockwise_absmax,
    check_blocksize,
    dequantize_dynamic,
    quantize_dynamic,
    to_blocks,
)

# --- The codebooks: what the 16 codes stand for ----------------------------------------------------


def nf4_codebook() -> Tensor:
    """The 16 values of NormalFloat 4: quantiles of the normal distribution, scaled to [-1, 1] (QLoRA, section 3).

    Weights are close to normal, so values at equally spaced quantiles are used about equally often. Zero has to be
    one of them (padding, pruned weights), hence two halves: 8 positive values at the quantiles of probabilities in
    equal steps from 0.5, which is left out, to p; 7 negative ones, which are minus the quantiles of probabilities in
    equal steps of their own, again from 0.5 to p; and 0. `p = 0.9677083`, the mean of 1 - 1/32 and 1 - 1/30 to seven
    digits, keeps the outermost quantile finite. The largest value divides all of them. `torch.special.ndtri` is the
    quantile function; all values are right to six digits.

    Returns:
        (16,) float32, ascending, from -1 to 1; code 7 is exactly 0.
    """
    p = 0.9677083  # quantiles in float64 and the division in float32 give bitsandbytes' values to the last bit
    positive = torch.special.ndtri(torch.linspace(p, 0.5, 9).double()[:-1])  # (8,), descending
    negative = -torch.special.ndtri(torch.linspace(p, 0.5, 8).double()[:-1])  # (7,), ascending
    values = torch.cat([negative, torch.zeros(1).double(), positive.flip(0)]).float()
    return values / values.max()


def fp4_codebook() -> Tensor:
    """The 16 values of a 4-bit float with 2 bits of exponent and 1 of mantissa, as in bitsandbytes.

    The code is `sign exponent exponent mantissa`. The table is ordered by code, not by value:
    0, 1/16, 8, 12, 4, 6, 2, 3, then the same negated (-0 among them), all divided by 12.

    Returns:
        (16,) float32.
    """
    normal = [(1 + mantissa / 2) * 2.0**exponent for exponent in (3, 2, 1) for mantissa in (0, 1)]  # 8 12 4 6 2 3
    magnitudes = torch.tensor([0, 1 / 16, *normal])
    return torch.cat([magnitudes, -magnitudes]) / 12


def int4_codebook() -> Tensor:
    """The 16 integers of four bits, -8 ... 7, divided by 7: equal steps. Code = integer + 8.

    As with `absmax_int8`, absmax scaling never uses the lowest integer: -8 / 7 is outside [-1, 1].

    Returns:
        (16,) float32, ascending.
    """
    return torch.arange(-8, 8) / 7


CODEBOOKS = {"nf4": nf4_codebook, "fp4": fp4_codebook, "int4": int4_codebook}


# --- Two codes in a byte ---------------------------------------------------------------------------


def pack_nibbles(codes: Tensor) -> Tensor:
    """Put two 4-bit codes in each byte, the even position in the high half: `byte = even << 4 | odd`.

    Args:
        codes: an even number n (perhaps 0) of whole numbers from 0 to 15, any shape, read row by row.

    Returns:
        (n / 2, 1) uint8: a column, as in bitsandbytes.

    Raises:
        ValueError: n is odd, or a code is not a whole number from 0 to 15.
    """
    if codes.numel() % 2:
        raise ValueError(f"two codes make a byte, so their number must be even, got {codes.numel()}; add one code")
    if codes.is_floating_point() or (codes.numel() and not 0 <= codes.min() <= codes.max() <= 15):
        raise ValueError(f"codes must be whole numbers from 0 to 15, got {range_of(codes)}")
    pairs = codes.reshape(-1, 2).to(torch.uint8)  # (n / 2, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`: uint8 of any shape to (2 * bytes,) uint8, from 0 to 15.

    Raises:
        ValueError: `packed` is not uint8.
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes must be uint8, got {packed.dtype}")
    packed = packed.reshape(-1)
    return torch.stack([packed >> 4, packed & 0x0F], dim=1).view(-1)


def range_of(codes: Tensor) -> str:
    """What the codes are, for a message: "0 to 16 as torch.int64"."""
    return f"{codes.min().item()} to {codes.max().item()} as {codes.dtype}" if codes.numel() else f"{codes.dtype}"


# --- Quantise and dequantise -----------------------------------------------------------------------


def quantize_nf4(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise a weight to NF4, or with another codebook to another 4-bit type (QLoRA, section 3).

    Row by row, in blocks of `blocksize`: scale the block to [-1, 1] by its absmax in float32, take for each weight
    the code of the nearest value of the codebook (a tie goes to the lower value), pack two codes in a byte. An odd
    number of weights is padded with one weight of 0. In NF4 the code of 0 is 7, so a block of zeros packs to 0x77.

    Args:
        weight: n numbers in any shape; float32, float16 or bfloat16.
        blocksize: a power of two.
        codebook: (16,) values in the order of their codes; None: `nf4_codebook()`.

    Returns:
        packed: (ceil(n / 2), 1) uint8.
        absmax: (ceil(n / blocksize),) float32.

    Raises:
        ValueError: the weight is empty, has another dtype, or holds a value that is not finite; `blocksize` is not
            a power of two; the codebook does not have 16 values.
    """
    values, code_of = as_codebook(codebook, weight.device).sort(stable=True)  # FP4's codes are not ascending
    midpoints = (values[1:] + values[:-1]) / 2  # (15,): they cut the line into 16 intervals, one for each code
    absmax = blockwise_absmax(weight, blocksize)
    if weight.numel() % blocksize:
        absmax[-1:].clamp_(min=TINY)  # bitsandbytes stores this for a short block of zeros
    z = normalize_blocks(weight, absmax, blocksize)  # (n,)
    z = F.pad(z, (0, z.numel() % 2))
    interval = torch.bucketize(z, midpoints)  # a z on a midpoint belongs to the lower interval
    return pack_nibbles(code_of[interval]), absmax


def normalize_blocks(weight: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """(n,) float32 in [-1, 1]: every weight over the absmax of its block; zeros stay zeros.

    As in bitsandbytes, whole blocks are multiplied by `1 / absmax`, and a short last block is divided by `absmax`: the
    two can differ in the last bit, and next to a midpoint that bit decides.
    """
    blocks = to_blocks(weight, blocksize)
    scale = absmax.clamp(min=TINY)
    z = blocks * (1 / scale)[:, None]  # (blocks, blocksize)
    if weight.numel() % blocksize:
        z[-1] = blocks[-1] / scale[-1]
    return z.view(-1)[: weight.numel()]


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
    codebook: Tensor | None = None,
) -> Tensor:
    """Undo `quantize_nf4`: each code's value times the absmax of its block, in float32, then to `dtype`.

    Args:
        packed: ceil(n / 2) bytes, uint8, any shape.
        absmax: (ceil(n / blocksize),) float32.
        shape: the shape of the weight, n numbers.
        blocksize: a power of two, the one it was quantised with.
        dtype: of the result.
        codebook: (16,) values in the order of their codes; None: `nf4_codebook()`.

    Returns:
        The weight, in `shape` and `dtype`.

    Raises:
        ValueError: the number of bytes or of scales does not fit the shape, `packed` is not uint8, or `blocksize`
            is not a power of two.
    """
    check_parts(packed, absmax, tuple(shape), blocksize)
    n = math.prod(shape)
    codes = unpack_nibbles(packed)[:n].int()  # of an odd number of weights, the last byte holds one code too many
    values = as_codebook(codebook, packed.device)[codes]  # (n,), in [-1, 1]
    scales = absmax.repeat_interleave(blocksize)[:n]  # (n,)
    return (values * scales).to(dtype).view(tuple(shape))


def as_codebook(codebook: Tensor | None, device: torch.device) -> Tensor:
    """(16,) float32 on the device: the codebook that was given, or NF4's."""
    if codebook is None:
        codebook = nf4_codebook()
    if codebook.shape != (16,):
        raise ValueError(f"a 4-bit codebook has 16 values, shape (16,), got shape {tuple(codebook.shape)}")
    return codebook.to(device=device, dtype=torch.float32)


def check_parts(packed: Tensor, absmax: Tensor, shape: tuple[int, ...], blocksize: int) -> None:
    """Raise a ValueError unless the packed codes and the scales are those of a weight of this shape."""
    check_blocksize(blocksize)
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes must be uint8, got {packed.dtype}")
    n = math.prod(shape)
    size, blocks = -(-n // 2), -(-n // blocksize)
    if packed.numel() != size:
        raise ValueError(f"a 4-bit weight of shape {shape} takes {size} bytes, got {packed.numel()}")
    if absmax.shape != (blocks,):
        raise ValueError(
            f"a weight of shape {shape} in blocks of {blocksize} has absmax of shape ({blocks},), "
            f"got {tuple(absmax.shape)}; blocksize has to be the one that it was quantised with"
        )


# --- Double quantisation ---------------------------------------------------------------------------


class NestedAbsmax(NamedTuple):
    """Scales in 8 bits: `dynamic_map()[codes] * absmax + offset`, one `absmax` for 256 scales."""

    codes: Tensor  # (blocks,) uint8
    absmax: Tensor  # (ceil(blocks / 256),) float32
    offset: Tensor  # scalar float32, the mean of the scales


def double_quantize(absmax: Tensor, blocksize: int = 256) -> NestedAbsmax:
    """Quantise the scales themselves to 8 bits (QLoRA, section 3, "Double Quantization").

    The scales are all positive, while nearly half of the values of the 8-bit map (`dynamic_map`) are negative. So their
    mean, the offset, is subtracted first; what is left lies around 0 and is quantised with `quantize_dynamic`.

    Args:
        absmax: (blocks,) float32, the scales of `quantize_nf4`.
        blocksize: how many scales share a second scale, a power of two.

    Returns:
        Codes (blocks,) uint8, second scales (ceil(blocks / blocksize),) float32, and the offset, a scalar float32.

    Raises:
        ValueError: there are no scales, one is not finite, or `blocksize` is not a power of two.
    """
    offset = absmax.mean()
    codes, absmax2 = quantize_dynamic(absmax - offset, blocksize)
    return NestedAbsmax(codes, absmax2, offset)


def double_dequantize(nested: NestedAbsmax, blocksize: int = 256) -> Tensor:
    """Undo `double_quantize`: (blocks,) float32."""
    return dequantize_dynamic(DynamicInt8(nested.codes, nested.absmax), blocksize) + nested.offset


def bits_per_weight(
    bits: int = 4, blocksize: int = 64, double_quant: bool = False, nested_blocksize: int = 256
) -> float:
    """What a weight costs with its share of the scales, in bits (QLoRA, section 3, "Double Quantization").

    Each block of `blocksize` weights has one scale: a float32, or with double quantisation one byte. Then each
    `nested_blocksize` scales share a second scale, a float32. The single offset of a matrix is not counted.
    NF4 in blocks of 64: 4.5 bits plain, 4.127 with double quantisation.

    Args:
        bits: of a code.
        blocksize: weights that share a scale, a power of two.
        double_quant: whether the scales are quantised as well.
        nested_blocksize: scales that share a second scale, a power of two.

    Raises:
        ValueError: `bits` is not 1 to 32, or a block size is not a power of two.
    """
    if not 1 <= bits <= 32:
        raise ValueError(f"bits must be between 1 and 32, got {bits}")
    check_blocksize(blocksize)
    check_blocksize(nested_blocksize)
    if double_quant:
        return bits + 8 / blocksize + 32 / (blocksize * nested_blocksize)
    return bits + 32 / blocksize
