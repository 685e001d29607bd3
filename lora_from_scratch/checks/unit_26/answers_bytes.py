"""Unit 26: mistakes that people make, and other right ways. The bytes of a GGUF file."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import struct

import numpy as np
import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.quantization.q4_1 import dequantize_q4_1

# --- dequantize_q4_1 ---------------------------------------------------------------------------------


@right("dequantize_q4_1")
def block_by_block(data):
    if data.dtype != torch.uint8 or data.shape[1] % 20 != 0:
        raise ValueError("no blocks")
    rows = []
    for row in data:
        weights = []
        for start in range(0, len(row), 20):
            scale, minimum, *codes = struct.unpack("<ee16B", bytes(row[start : start + 20].tolist()))
            weights += [scale * (code & 15) + minimum for code in codes]
            weights += [scale * (code >> 4) + minimum for code in codes]
        rows.append(weights)
    return torch.tensor(rows, dtype=torch.float32)


@right("dequantize_q4_1")
def in_numpy(data):
    if data.dtype != torch.uint8 or data.shape[1] % 20:
        raise ValueError("no blocks")
    blocks = np.ascontiguousarray(data.numpy()).reshape(-1, 20)
    numbers = np.frombuffer(blocks[:, :4].tobytes(), dtype="<f2").reshape(-1, 2).astype(np.float32)
    codes = np.concatenate([blocks[:, 4:] % 16, blocks[:, 4:] // 16], axis=1).astype(np.float32)
    return torch.from_numpy((numbers[:, :1] * codes + numbers[:, 1:]).reshape(len(data), -1))


@right("dequantize_q4_1")
def with_a_record_of_numpy(data):
    if str(data.dtype) != "torch.uint8" or data.shape[-1] % 20:
        raise ValueError("no blocks")
    kind = np.dtype([("d", "<f2"), ("m", "<f2"), ("codes", "u1", 16)])
    blocks = np.frombuffer(data.contiguous().numpy().tobytes(), dtype=kind)
    weights = np.empty((len(blocks), 32), dtype=np.float32)
    for half, codes in enumerate((blocks["codes"] & 15, blocks["codes"] >> 4)):
        weights[:, 16 * half : 16 * half + 16] = blocks["d"].astype(np.float32)[:, None] * codes
    weights += blocks["m"].astype(np.float32)[:, None]
    return torch.from_numpy(weights).reshape(data.shape[0], data.shape[1] // 20 * 32)


@right("dequantize_q4_1")
def as_three_axes(data):
    width = data.shape[1]
    if data.dtype is not torch.uint8 or width != width // 20 * 20:
        raise ValueError("no blocks")
    blocks = data.unflatten(1, (-1, 20))
    d = blocks[..., 0:2].contiguous().view(torch.float16).to(torch.float32)
    m = blocks[..., 2:4].contiguous().view(torch.float16).to(torch.float32)
    halves = torch.stack([blocks[..., 4:].remainder(16), blocks[..., 4:].div(16, rounding_mode="floor")], dim=2)
    return torch.addcmul(m, d, halves.flatten(2).float()).flatten(1)


@wrong(
    "dequantize_q4_1",
    "You put the two codes of a byte side by side. The low halves are weights 0 to 15, the high ones 16 to 31.",
)
@changed(
    dequantize_q4_1,
    (
        "torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], dim=1)",
        "torch.stack([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], dim=2).flatten(1)",
    ),
)
def two_neighbours_in_a_byte(): ...


@wrong("dequantize_q4_1", "The halves of your bytes are exchanged: the low four bits come first, unlike in unit 12.")
@changed(dequantize_q4_1, ("[blocks[:, 4:] & 15, blocks[:, 4:] >> 4]", "[blocks[:, 4:] >> 4, blocks[:, 4:] & 15]"))
def the_high_half_first(): ...


@wrong("dequantize_q4_1", "Your scale and your minimum are exchanged: the scale comes first.")
@changed(dequantize_q4_1, ("numbers[:, :1] * codes + numbers[:, 1:]", "numbers[:, 1:] * codes + numbers[:, :1]"))
def the_minimum_first(): ...


@wrong("dequantize_q4_1", "You subtract the minimum. It is the smallest weight itself, and it is added.")
@changed(dequantize_q4_1, ("codes + numbers[:, 1:]", "codes - numbers[:, 1:]"))
def the_minimum_is_subtracted(): ...


@wrong("dequantize_q4_1", "The minimum is missing from your weights.")
@changed(dequantize_q4_1, ("codes + numbers[:, 1:]", "codes"))
def without_the_minimum(): ...


@wrong(
    "dequantize_q4_1", "You use eight as the code of zero. Q4_1 has a minimum instead, which is the weight of code 0."
)
@changed(dequantize_q4_1, ("numbers[:, :1] * codes + numbers[:, 1:]", "numbers[:, :1] * (codes.float() - 8)"))
def eight_is_zero(): ...


@wrong("dequantize_q4_1", "The minimum is not multiplied by the scale: a weight is d * code + m, not d * (code + m).")
@changed(dequantize_q4_1, ("numbers[:, :1] * codes + numbers[:, 1:]", "numbers[:, :1] * (codes + numbers[:, 1:])"))
def the_scale_for_both(): ...


@wrong("dequantize_q4_1", "Your result is in float16. The weights are computed in float32.")
@changed(dequantize_q4_1, (".view(torch.float16).float()", ".view(torch.float16)"))
def in_float16(): ...


@wrong(
    "dequantize_q4_1",
    "You read the scale and the minimum as bfloat16. Both have 16 bits, but the bits mean other things.",
)
@changed(dequantize_q4_1, (".view(torch.float16)", ".view(torch.bfloat16)"))
def as_bfloat16(): ...


@wrong("dequantize_q4_1", "Only the first block of each row is in your result. A row has several.")
def the_first_block_of_a_row(data):
    return dequantize_q4_1(data if data.shape[-1] % 20 else data[:, :20])


@wrong("dequantize_q4_1", "All blocks are in one row of your result. The matrix has as many rows as the data.")
def one_long_row(data):
    return dequantize_q4_1(data).view(1, -1)


@wrong("dequantize_q4_1", "Data that are not whole blocks, or not bytes, should raise a ValueError.")
def whatever_is_given(data):
    data = data.to(torch.uint8)
    return dequantize_q4_1(data[:, : data.shape[1] // 20 * 20])
