"""Weights in 2, 3, 4 or 8 bits, in groups along the input that each have a scale and may have a zero.

    W[i, j] = scale[i, k] * levels[code[i, j]] + zero[i, k],        k = j // g, the group of input j

Integers have the levels 0 ... 2^b - 1 and a zero (asymmetric, as in QA-LoRA); NormalFloat has the quantiles of a normal
distribution and no zero (as in LQ-LoRA). A group never crosses the end of a row; the last one of a row may be short.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.quantization.fast_nf4 import CHUNK
from lora_from_scratch.quantization.int8 import TINY, check_numbers
from lora_from_scratch.quantization.nf4 import NestedAbsmax, double_dequantize, double_quantize, nf4_codebook

BITS = (2, 3, 4, 8)
NESTED_BLOCKSIZE = 256

# --- Codes in bytes --------------------------------------------------------------------------------------


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Put codes of a few bits next to each other: eight of them fill `bits` bytes, the first in the highest bits.

    Args:
        codes: (rows, n) whole numbers from 0 to 2^bits - 1.
        bits: 2, 3, 4 or 8.

    Returns:
        (rows, ceil(n / 8) * bits) uint8.
    """
    if bits == 8:
        return codes.to(torch.uint8)
    codes = F.pad(codes.int(), (0, -codes.shape[1] % 8)).view(len(codes), -1, 8)
    words = (codes << _shifts(8, bits, codes.device)).sum(dim=-1, keepdim=True, dtype=torch.int64)  # up to 32 bits each
    return (words >> _shifts(bits, 8, codes.device) & 255).to(torch.uint8).flatten(1)


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_bits`: (rows, n) int32."""
    if bits == 8:
        return packed[:, :n].int()
    parts = packed.view(len(packed), -1, bits).int()
    words = (parts << _shifts(bits, 8, packed.device)).sum(dim=-1, keepdim=True, dtype=torch.int32)
    return (words >> _shifts(8, bits, packed.device) & (2**bits - 1)).flatten(1)[:, :n]


def _shifts(count: int, bits: int, device: torch.device) -> Tensor:
    """How far each of `count` numbers of `bits` bits is from the right end of their word."""
    return torch.arange((count - 1) * bits, -1, -bits, dtype=torch.int32, device=device)


# --- A weight --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowBitTensor:
    """A weight (out, in) in a few bits a number, with G = ceil(in / g) groups in each row."""

    packed: Tensor  # (out, ceil(in / 8) * bits) uint8
    absmax: Tensor | NestedAbsmax  # the scales, (out * G,) float32; or doubly quantised
    zero: Tensor | None  # (out, G) float32; None for NormalFloat
    bits: int
    group_size: int  # g
    shape: torch.Size
    dtype: torch.dtype  # of the weight before, and after `dequantize`

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.group_size)

    @property
    def scale(self) -> Tensor:
        """(out, G) float32."""
        nested = isinstance(self.absmax, NestedAbsmax)
        scales = double_dequantize(self.absmax, NESTED_BLOCKSIZE) if nested else self.absmax  # type: ignore[arg-type]
        assert isinstance(scales, Tensor)
        return scales.view(self.shape[0], self.groups)

    @property
    def codes(self) -> Tensor:
        """(out, in) int32."""
        return unpack_bits(self.packed, self.bits, self.shape[1])

    @property
    def nbytes(self) -> int:
        """The bytes of the codes, the scales and the zeros."""
        return sum(part.nbytes for part in self.tensors())

    def tensors(self) -> list[Tensor]:
        """The codes, the scales and the zeros."""
        scales = [*self.absmax] if isinstance(self.absmax, NestedAbsmax) else [self.absmax]
        return [self.packed, *scales, *([] if self.zero is None else [self.zero])]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, (out, in), in `dtype` (None: the one that it had). Computed in float32, some rows at a time."""
        weight = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.packed.device)
        scale = self.scale
        step = max(1, CHUNK // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            values = self._levels_of(unpack_bits(self.packed[rows], self.bits, self.shape[1]))
            values *= spread(scale[rows], self.group_size, self.shape[1])
            if self.zero is not None:
                values += spread(self.zero[rows], self.group_size, self.shape[1])
            weight[rows] = values
        return weight

    def _levels_of(self, codes: Tensor) -> Tensor:
        """What the codes stand for before they are scaled, float32 in their shape."""
        if self.zero is not None:
            return codes.float()
        levels = normal_float_codebook(self.bits).to(codes.device)
        return levels.index_select(0, codes.flatten()).view_as(codes)

    def to(self, device: torch.device | str) -> LowBitTensor:
        """The same on another device."""
        if isinstance(self.absmax, NestedAbsmax):
            absmax: Tensor | NestedAbsmax = NestedAbsmax(*(part.to(device) for part in self.absmax))
        else:
            absmax = self.absmax.to(device)
        zero = None if self.zero is None else self.zero.to(device)
        return replace(self, packed=self.packed.to(device), absmax=absmax, zero=zero)

    def state_dict(self, name: str = "weight") -> dict[str, Tensor]:
        """The tensors under the names `weight`, `weight.scale` (or the three of `NestedAbsmax`) and `weight.zero`."""
        if isinstance(self.absmax, NestedAbsmax):
            scales = {f"{name}.scale.{part}": tensor for part, tensor in self.absmax._asdict().items()}
        else:
            scales = {f"{name}.scale": self.absmax}
        return {name: self.packed, **scales, **({} if self.zero is None else {f"{name}.zero": self.zero})}

    def with_state(self, state: Mapping[str, Tensor], name: str = "weight") -> LowBitTensor:
        """The weight that `state_dict` of another one of the same kind describes.

        Raises:
            ValueError: a tensor is missing or has another shape or type.
        """
        own = self.state_dict(name)
        for key, tensor in own.items():
            given = state.get(key)
            if given is None or given.shape != tensor.shape or given.dtype != tensor.dtype:
                found = "nothing" if given is None else f"{tuple(given.shape)} of {given.dtype}"
                raise ValueError(f"{key} must have the shape {tuple(tensor.shape)} of {tensor.dtype}, got {found}")
        absmax: Tensor | NestedAbsmax
        if isinstance(self.absmax, NestedAbsmax):
            absmax = NestedAbsmax(*(state[f"{name}.scale.{part}"] for part in self.absmax._fields))
        else:
            absmax = state[f"{name}.scale"]
        return replace(self, packed=state[name], absmax=absmax, zero=state.get(f"{name}.zero"))


def spread(per_group: Tensor, group_size: int, columns: int) -> Tensor:
    """(rows, G) to (rows, columns): the number of each group, for each of its members."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :columns]


# --- Quantising ------------------------------------------------------------------------------------------


def quantize_integer(weight: Tensor, bits: int = 4, group_size: int = 32) -> LowBitTensor:
    """The nearest of 2^bits equal steps from the smallest to the largest weight of each group (min-max quantisation).

        zero = min,   scale = (max - min) / (2^bits - 1),   code = round((W - zero) / scale)

    Xu et al. 2023 (QA-LoRA), section 3.2. The zero is a floating-point number in the unit of the weight; GPTQ's
    zero-point is -zero / scale.

    Args:
        weight: (out, in); float32, float16 or bfloat16.
        bits: 2, 3, 4 or 8.
        group_size: g, weights of a row that share a scale and a zero.

    Raises:
        ValueError: the weight is not a matrix of finite numbers, or `bits` or `group_size` is out of range.
    """
    codes, scale, zero = quantize_groups(weight, bits, group_size)
    return LowBitTensor(pack_bits(codes, bits), scale.flatten(), zero, bits, group_size, weight.shape, weight.dtype)


def quantize_groups(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Min-max quantisation: codes, scales and zeros with scale * code + zero close to W (QA-LoRA, section 3.2).

    A group is `group_size` neighbours in a row, from left to right; the last one of a row may be shorter. The zero of a
    group is its smallest weight, and zero + (2^bits - 1) * scale its largest. Each weight gets the code that is
    nearest. If the weights of a group are all equal, its scale and its codes are 0.

    Args:
        weight: (out, in), finite; float32, float16 or bfloat16. The computation runs in float32.
        bits: b.
        group_size: g.

    Returns:
        The codes (out, in), whole numbers from 0 to 2^bits - 1, in any dtype. The scales and the zeros, both (out, G)
        with G = ceil(in / g).
    """
    groups = in_groups(weight, bits, group_size)  # (out, G, g)
    zero, most = groups.aminmax(dim=2)  # (out, G)
    scale = (most - zero) / (2**bits - 1)
    codes = ((groups - zero[..., None]) / scale.clamp(min=TINY)[..., None]).round_().clamp_(0, 2**bits - 1)
    return codes.flatten(1)[:, : weight.shape[1]], scale, zero


@functools.cache
def normal_float_codebook(bits: int) -> Tensor:
    """The 2^bits values of NormalFloat, quantiles of the normal distribution scaled to [-1, 1], ascending, float32.

    As `nf4_codebook`, and equal to it for 4 bits, with 2^(bits-1) positive and 2^(bits-1) - 1 negative values. As in
    HanGuo97/lq-lora, the outermost quantile is NF4's for every number of bits. Computed once; do not write to it.
    """
    with torch.device("cpu"):  # whatever the default is at the first call
        if bits == 4:
            return nf4_codebook()
        p, half = 0.9677083, 2 ** (bits - 1)
        positive = torch.special.ndtri(torch.linspace(p, 0.5, half + 1).double()[:-1])
        negative = -torch.special.ndtri(torch.linspace(p, 0.5, half).double()[:-1])
        values = torch.cat([negative, torch.zeros(1).double(), positive.flip(0)]).float()
    return values / values.max()


def quantize_normal_float(weight: Tensor, bits: int = 4, group_size: int = 64, double: bool = True) -> LowBitTensor:
    """The nearest value of `normal_float_codebook` for each weight, over the largest absolute value of its group.

    Args:
        weight: (out, in); float32, float16 or bfloat16.
        bits: 2, 3, 4 or 8.
        group_size: weights of a row that share a scale.
        double: whether the scales are quantised to 8 bits as well.

    Raises:
        ValueError: as for `quantize_integer`.
    """
    groups = in_groups(weight, bits, group_size)  # (out, G, g)
    absmax = groups.abs().amax(dim=2)  # (out, G)
    levels = normal_float_codebook(bits).to(weight.device)
    z = groups / absmax.clamp(min=TINY)[..., None]
    codes = torch.bucketize(z, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    packed = pack_bits(codes.flatten(1)[:, : weight.shape[1]], bits)
    scales = double_quantize(absmax.flatten(), NESTED_BLOCKSIZE) if double else absmax.flatten()
    return LowBitTensor(packed, scales, None, bits, group_size, weight.shape, weight.dtype)


def in_groups(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """(out, in) to (out, G, g), in float32; a short last group is filled up with its last weight.

    Raises:
        ValueError: as for `quantize_integer`.
    """
    check_bits(bits, group_size)
    if weight.ndim != 2:
        raise ValueError(f"the weight must be a matrix (out, in), got shape {tuple(weight.shape)}")
    check_numbers(weight)
    rows, columns = weight.shape
    last = weight[:, -1:].expand(rows, -columns % group_size)
    return torch.cat([weight.detach(), last.detach()], dim=1).float().view(rows, -1, group_size)


def check_bits(bits: int, group_size: int) -> None:
    """Raise a ValueError unless these are numbers of bits and of weights in a group."""
    if isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        raise ValueError(f"group_size must be a whole number of at least 1, got {group_size!r}")
