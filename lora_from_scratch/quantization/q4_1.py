"""Q4_1: the four-bit format of many GGUF files, which llama.cpp and its relatives read.

A weight matrix is stored row by row, in blocks of 32 weights. Each block has a scale and a minimum in float16, and a
code from 0 to 15 for each weight: 20 bytes, or 5 bits for each weight. The layout is `block_q4_1` in llama.cpp's
ggml-common.h. It is not NF4: the 16 values of a block are equally spaced, and they need not be symmetric about zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK, BYTES = 32, 20  # the weights of a block, and the bytes that it takes


def dequantize_q4_1(data: Tensor) -> Tensor:
    """The weights of a matrix that a GGUF file stores in the format Q4_1.

    A block of 32 weights takes 20 bytes, in this order:

    - bytes 0 and 1 are the scale d, a float16;
    - bytes 2 and 3 are the minimum m, a float16;
    - bytes 4 to 19 are the codes, two in a byte: the low four bits of byte 4 + i are the code of weight i, its high
      four bits that of weight i + 16.

    A weight is d * code + m, computed in float32.

    Example: scale 0.5, minimum -1 and the byte 0x31 in place 4 give weight 0 = -0.5 and weight 16 = 0.5.

    Args:
        data: (rows, 20 n) uint8, the n blocks of each row side by side.

    Returns:
        (rows, 32 n) float32.

    Raises:
        ValueError: the data are not uint8, or a row is not made of whole blocks.
    """
    if data.dtype != torch.uint8 or data.shape[-1] % BYTES:
        raise ValueError(f"expected uint8 in rows of {BYTES} n bytes, got {data.dtype} of shape {tuple(data.shape)}")
    blocks = data.reshape(-1, BYTES)
    numbers = blocks[:, :4].contiguous().view(torch.float16).float()  # (blocks, 2): scale and minimum
    codes = torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], dim=1)  # (blocks, 32)
    weights = numbers[:, :1] * codes + numbers[:, 1:]
    return weights.view(len(data), -1)


def quantize_q4_1(weight: Tensor) -> Tensor:
    """Store a weight (rows, 32 n) in the format Q4_1: (rows, 20 n) uint8.

    The codes 0 and 15 stand for the smallest and the largest weight of a block; the others are rounded to the nearest
    code.

    Raises:
        ValueError: a row is not made of whole blocks of 32.
    """
    if weight.shape[-1] % BLOCK:
        raise ValueError(f"expected rows of {BLOCK} n weights, got the shape {tuple(weight.shape)}")
    blocks = weight.float().reshape(-1, BLOCK)
    smallest, largest = blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)
    scale = (largest - smallest) / 15
    codes = ((blocks - smallest) / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(0, 15)
    codes = codes.to(torch.uint8)
    numbers = torch.cat([scale, smallest], dim=1).half().view(torch.uint8)  # (blocks, 4)
    packed = codes[:, :16] | codes[:, 16:] << 4
    return torch.cat([numbers, packed], dim=1).view(len(weight), -1)
