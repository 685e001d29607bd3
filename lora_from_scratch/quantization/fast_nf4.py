"""NF4 for the layers: the numbers of `nf4.py`, bit for bit, in less time and memory. Read that file first.

Three things are faster here. Two codes are looked up at once, as the byte that holds them. The nearest value of a
codebook is looked up as well, instead of being searched for. And large weights are processed in chunks, so that
what is in between stays in the processor's cache and in memory that the process has already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.quantization.int8 import TINY, check_blocksize, check_dtype, check_numbers, to_blocks
from lora_from_scratch.quantization.nf4 import as_codebook, check_parts, dequantize_nf4, normalize_blocks

CELLS = 2048  # of the line from -1 to 1, in `interval_of`: narrow enough that no two of FP4's midpoints share one
CHUNK = 2**17  # weights processed at a time: 512 KiB of float32, which fit into the cache


def fast_quantize_nf4(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`nf4.quantize_nf4`, with a look-up in place of the search for the nearest value, and chunk by chunk."""
    check_blocksize(blocksize)
    check_dtype(weight)
    values, code_of = as_codebook(codebook, weight.device).sort(stable=True)
    midpoints = (values[1:] + values[:-1]) / 2  # (15,)
    low = code_of.to(torch.uint8)  # the code of each interval, for the half of a byte that it is in
    high = low << 4
    flat, n = weight.detach().reshape(-1), weight.numel()
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-n // blocksize), device=weight.device)
    step = max(CHUNK, blocksize)
    for start in range(0, n, step):
        part = flat[start : start + step]
        scales = to_blocks(part, blocksize).abs().amax(dim=1)
        if not scales.sum().isfinite():
            check_numbers(weight)  # which names the first that is not finite
        if part.numel() % blocksize:
            scales[-1:].clamp_(min=TINY)
        z = normalize_blocks(part, scales, blocksize)
        interval = interval_of(F.pad(z, (0, z.numel() % 2)), midpoints).view(-1, 2)
        pairs = high.index_select(0, interval[:, 0]) | low.index_select(0, interval[:, 1])
        packed[start // 2 : start // 2 + len(pairs)] = pairs
        absmax[start // blocksize : start // blocksize + len(scales)] = scales
    return packed[:, None], absmax


def interval_of(z: Tensor, midpoints: Tensor) -> Tensor:
    """How many of the midpoints lie below each z: `torch.bucketize`, by a look-up instead of a search.

    The line from -1 to 1 is cut into equal cells. A cell without a midpoint lies in one interval; in a cell with one, a
    comparison decides. Midpoints and z are rounded to cells in the same way, which never puts the smaller of two
    numbers into the later cell, so the answer is exact. If two midpoints share a cell, `torch.bucketize` is used.

    Args:
        z: (n,) float32, none of them NaN.
        midpoints: (m,) float32, ascending.

    Returns:
        (n,) int32, from 0 to m.
    """
    cell = _cell_of(midpoints)
    if len(cell.unique()) < len(cell):
        return torch.bucketize(z, midpoints, out_int32=True)
    every_cell = torch.arange(CELLS + 1, device=z.device)
    below = torch.bucketize(every_cell, cell, out_int32=True)  # midpoints in the cells before each cell
    inside = torch.full((CELLS + 1,), math.inf, device=z.device).index_copy(0, cell.long(), midpoints)
    cell = _cell_of(z)
    return below.index_select(0, cell).add_(z > inside.index_select(0, cell))


def _cell_of(z: Tensor) -> Tensor:
    """(n,) int32: the cell of each number; those beyond -1 and 1 belong to the first and the last."""
    return (z * (CELLS / 2)).add_(CELLS / 2).clamp_(0, CELLS).int()


def fast_dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
    codebook: Tensor | None = None,
) -> Tensor:
    """`nf4.dequantize_nf4`, two weights at a time and chunk by chunk."""
    n = math.prod(shape)
    check_parts(packed, absmax, tuple(shape), blocksize)
    pairs = values_of_bytes(as_codebook(codebook, packed.device))  # (256,)
    packed = packed.reshape(-1)
    weight = torch.empty(n + n % 2, dtype=dtype, device=packed.device)
    step = max(CHUNK, blocksize)
    index = torch.empty(min(len(packed), step // 2), dtype=torch.int32, device=packed.device)  # used again and again
    if dtype == torch.float32:
        items = weight.view(torch.float64)  # the pairs go straight to their places and are scaled there
    else:
        items = torch.empty(len(index), dtype=torch.float64, device=packed.device)
    for start in range(0, n, step):
        part, some = weight[start : min(start + step, n)], packed[start // 2 : (start + step) // 2]
        first = start // 2 if dtype == torch.float32 else 0
        here = items[first : first + len(some)]
        torch.index_select(pairs, 0, index[: len(some)].copy_(some), out=here)
        scales = absmax[start // blocksize : (start + step) // blocksize]
        scale_blocks(here.view(torch.float32)[: part.numel()], scales, blocksize, out=part)
    return weight[:n].view(tuple(shape))


def values_of_bytes(codebook: Tensor) -> Tensor:
    """The two float32 values that each byte stands for, as one item of 8 bytes.

    Returns:
        (256,) in the dtype float64, which has the right size; the items are not numbers.
    """
    every_byte = torch.arange(256, dtype=torch.uint8, device=codebook.device)
    one = torch.ones(1, device=codebook.device)  # one block of 512 weights, not scaled
    return dequantize_nf4(every_byte, one, (512,), blocksize=512, codebook=codebook).view(torch.float64)


def scale_blocks(values: Tensor, absmax: Tensor, blocksize: int, out: Tensor) -> None:
    """Multiply each block of (m,) by its own scale, into `out` (m,); the last block may be short.

    Unless `out` is in float32, `values` is overwritten: multiplying first and converting then is faster than both at
    once.
    """
    whole = values.numel() // blocksize
    cut = whole * blocksize
    into = out if out.dtype == values.dtype else values
    torch.mul(values[:cut].view(whole, blocksize), absmax[:whole, None], out=into[:cut].view(whole, blocksize))
    if cut < values.numel():
        torch.mul(values[cut:], absmax[-1], out=into[cut:])
    if into is values:
        out.copy_(values)
