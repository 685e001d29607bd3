"""NF4 for the layers: the numbers of `nf4.py`, bit for bit, in less time and memory. Read that file first.

Three things are faster here. Two codes are looked up at once, as the byte that holds them. The nearest value of a
codebook is looked up as well, instead of being searched for. And large weights are processed in chunks, so that
what is in between stays in the processor's cache and in memory that the process has already.

On the way back, the threads divide a chunk by its blocks in every step, so that each works on what it has itself in
its cache. (`index_select` of single numbers, which is quicker on one thread, does not use several.)
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
READ_CHUNK = 2**19  # weights dequantised at a time: 4 MiB on the way; in smaller chunks threads wait more often


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
    """`nf4.dequantize_nf4`, two weights at a time and chunk by chunk; a short last block in the plain way."""
    if blocksize == 1 or torch.compiler.is_compiling():  # a byte holds two blocks; compiled, the plain way is fast
        return dequantize_nf4(packed, absmax, shape, blocksize, dtype, codebook)
    n = math.prod(shape)
    check_parts(packed, absmax, tuple(shape), blocksize)
    packed, codebook = packed.reshape(-1), as_codebook(codebook, packed.device)
    weight = torch.empty(n, dtype=dtype, device=packed.device)
    whole = n - n % blocksize
    blocks = max(min(READ_CHUNK, whole) // blocksize, 1)  # at a time
    pairs = values_of_bytes(codebook).expand(blocks, 256)
    index = torch.empty(blocks, blocksize // 2, dtype=torch.int64, device=packed.device)  # used again and again
    items = torch.empty(index.shape, dtype=torch.float64, device=packed.device)
    for part, some, scales in zip(
        weight[:whole].view(-1, blocksize).split(blocks),
        packed[: whole // 2].view(-1, blocksize // 2).split(blocks),
        absmax[: whole // blocksize, None].split(blocks),
        strict=True,
    ):
        m = len(part)
        values = torch.gather(pairs[:m], 1, index[:m].copy_(some), out=items[:m]).view(torch.float32)
        if dtype == torch.float32:
            torch.mul(values, scales, out=part)
        else:
            part.copy_(values.mul_(scales))  # faster than both at once
    if whole < n:
        rest = packed[whole // 2 :], absmax[whole // blocksize :], (n - whole,)
        weight[whole:] = dequantize_nf4(*rest, blocksize, dtype, codebook)
    return weight.view(tuple(shape))


def values_of_bytes(codebook: Tensor) -> Tensor:
    """The two float32 values that each byte stands for, as one item of 8 bytes.

    Returns:
        (256,) in the dtype float64, which has the right size; the items are not numbers.
    """
    return torch.cartesian_prod(codebook, codebook).view(torch.float64).view(256)
