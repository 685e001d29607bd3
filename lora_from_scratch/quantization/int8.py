"""Eight bits a number: absmax quantisation, blocks, and the dynamic map.

Absmax quantisation scales by the largest absolute value and rounds. A single large value (an outlier) then costs all
the others their precision, so the numbers are cut into blocks, each with a scale of its own. Sources: Dettmers et
al. 2023 (QLoRA), section 2, equations 1 and 2; Dettmers et al. 2021 (8-bit Optimizers via Block-wise Quantization),
sections 1.2, 1.3 and 2.1.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TINY = 1e-38  # stands in for a scale of 0, so that 0 / 0 never happens; bitsandbytes' number
GRID = 65535  # bitsandbytes on a CPU first rounds to this many steps between -1 and 1


def absmax_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise to 8-bit integers with one scale for the whole tensor (QLoRA, section 2, equation 1).

    The largest absolute value of `x` becomes 127 or -127. Every other number keeps its proportion to it and is
    rounded to the nearest integer, a tie to the even one (`torch.round`). -128 is never used: the range is symmetric,
    and 0 stays 0. The arithmetic is done in float32, whatever the dtype of `x`.

    Args:
        x: any shape; float32, float16 or bfloat16.

    Returns:
        q: int8, the shape of `x`; all 0 if `x` is all 0.
        absmax: float32, a scalar tensor: the largest absolute value of `x`.

    Raises:
        ValueError: `x` is empty, has another dtype, or holds a value that is not finite.
    """
    check_numbers(x)
    x = x.detach().float()
    absmax = x.abs().max()
    scale = 127 / absmax.clamp(min=127 * TINY)  # finite for a tensor of zeros, too
    return torch.round(x * scale).to(torch.int8), absmax


def dequantize_int8(q: Tensor, absmax: Tensor) -> Tensor:
    """Undo `absmax_int8`: `q / 127 * absmax`, float32 in the shape of `q` (QLoRA, equation 2).

    +-127 gives back +-absmax exactly; any other value is off by at most `absmax / 254`.
    """
    return q.float() / 127 * absmax


def blockwise_absmax(x: Tensor, blocksize: int = 64) -> Tensor:
    """The largest absolute value of every block of `blocksize` consecutive numbers.

    `x` is read row by row (row-major), whatever its shape; the last block may be short.

    Args:
        x: n numbers in any shape; float32, float16 or bfloat16.
        blocksize: a power of two.

    Returns:
        (ceil(n / blocksize),) float32; 0 for a block of zeros.

    Raises:
        ValueError: `x` is empty, has another dtype, or holds a value that is not finite; `blocksize` is not a power of
            two.
    """
    check_blocksize(blocksize)
    check_numbers(x)
    magnitudes = x.detach().reshape(-1).float().abs()  # (n,), row by row
    missing = -len(magnitudes) % blocksize  # zeros that pad the last block: never larger than what is in it
    return F.pad(magnitudes, (0, missing)).view(-1, blocksize).amax(dim=1)


def to_blocks(x: Tensor, blocksize: int) -> Tensor:
    """(blocks, blocksize) float32: `x` row by row; a short last block is padded with zeros."""
    flat = x.detach().reshape(-1).float()
    missing = -flat.numel() % blocksize
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, blocksize)


def check_numbers(x: Tensor) -> None:
    """Raise a ValueError unless `x` holds finite numbers in float32, float16 or bfloat16, at least one."""
    check_dtype(x)
    if x.is_meta:  # shapes without values
        return
    if x.detach().sum(dtype=torch.float32).isfinite():  # quick: the sum with a NaN or an infinity is not finite
        return
    bad = (~torch.isfinite(x.detach().reshape(-1))).nonzero().flatten()
    if len(bad):
        value = x.detach().reshape(-1)[bad[0]].item()
        raise ValueError(
            f"cannot quantise a tensor with values that are not finite: {len(bad)} of {x.numel()} are NaN or infinite, "
            f"the first is {value} at position {int(bad[0])} (row-major); every value must be finite"
        )


def check_dtype(x: Tensor) -> None:
    """Raise a ValueError unless `x` is in float32, float16 or bfloat16 and not empty."""
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"can quantise float32, float16 or bfloat16, got {x.dtype}; convert first: tensor.float()")
    if x.numel() == 0:
        raise ValueError(f"cannot quantise an empty tensor, got shape {tuple(x.shape)}; at least 1 number is needed")


def check_blocksize(blocksize: int) -> None:
    """Raise a ValueError unless `blocksize` is a power of two (1, 2, 4, 8, ...)."""
    if not isinstance(blocksize, int) or blocksize < 1 or blocksize & (blocksize - 1):
        raise ValueError(f"blocksize must be a power of two (such as 32, 64, 128 or 256), got {blocksize!r}")


# --- The dynamic map: 256 values that are dense near zero -------------------------------------------


def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic map: 256 values in [-1, 1], float32, ascending.

    Seven decades. The decade `10^(e - 6)`, e = 0 ... 6, is cut into 2^e equal parts between 0.1 and 1, and the middle
    of each part is a value, once positive and once negative: fine steps for large values, and still a value near
    5.5e-7. That makes 2 * 127; with 0 and 1 it is 256, so the two ends differ: 1, and about -0.993.
    Source: Dettmers et al. 2021, section 1.3 and the appendix on dynamic tree quantisation (`create_dynamic_map` in
    bitsandbytes).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values))


class DynamicInt8(NamedTuple):
    """Numbers in the dynamic map, block by block: `dynamic_map()[codes] * absmax`."""

    codes: Tensor  # (n,) uint8
    absmax: Tensor  # (ceil(n / blocksize),) float32


def quantize_dynamic(x: Tensor, blocksize: int = 256) -> DynamicInt8:
    """Quantise block by block to the nearest value of `dynamic_map`.

    `z = x / absmax` is first rounded to the nearest of 65,536 equal steps from -1 to 1, then to the map, ties low:
    that is what bitsandbytes does on a CPU, by way of a look-up table. (On a GPU it compares `z` itself, which is
    nearer for about 4 of 100,000 numbers and the same for all the others.)

    Args:
        x: n numbers in any shape; float32, float16 or bfloat16.
        blocksize: a power of two.

    Returns:
        The codes, (n,), and the scales; a block of zeros has the codes 0 and the scale 0.

    Raises:
        ValueError: as `blockwise_absmax`.
    """
    absmax = blockwise_absmax(x, blocksize)
    z = to_blocks(x, blocksize) * (1 / absmax)[:, None]  # (blocks, blocksize)
    z = z.nan_to_num(-1.0).clamp(-1, 1)  # a block of zeros is 0 / 0: any code would do, since code * 0 is 0
    step = torch.floor((z + 1) * 0.5 * GRID + 0.5)
    values = _dynamic_map_on(x.device)
    codes = torch.bucketize(step / GRID * 2 - 1, (values[1:] + values[:-1]) / 2)
    return DynamicInt8(codes.view(-1)[: x.numel()].to(torch.uint8), absmax)


def dequantize_dynamic(quantized: DynamicInt8, blocksize: int = 256) -> Tensor:
    """Undo `quantize_dynamic`: (n,) float32."""
    codes, absmax = quantized
    scale = absmax.repeat_interleave(blocksize)[: codes.numel()]  # (n,)
    return _dynamic_map_on(codes.device)[codes.int()] * scale


@functools.cache
def _dynamic_map_on(device: torch.device) -> Tensor:
    """`dynamic_map`, made once for a device: a training step in 4 bits reads it twice per layer. Do not write to it."""
    return dynamic_map().to(device)
