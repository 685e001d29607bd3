"""A 4-bit weight with everything needed to read it back, in memory and in bitsandbytes' state dict."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.quantization.fast_nf4 import fast_dequantize_nf4, fast_quantize_nf4
from lora_from_scratch.quantization.int8 import FLOAT_DTYPES, dynamic_map
from lora_from_scratch.quantization.nf4 import CODEBOOKS, NestedAbsmax, double_dequantize, double_quantize

NESTED_BLOCKSIZE = 256
BNB_TYPES = ("nf4", "fp4")
BNB_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}  # "float32": torch.float32, ...


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight of `shape`, n numbers, in four bits each."""

    packed: Tensor  # (ceil(n / 2), 1) uint8
    absmax: Tensor | NestedAbsmax  # (ceil(n / blocksize),) float32; or doubly quantised
    quant_type: str  # "nf4", "fp4" or "int4"
    blocksize: int
    shape: torch.Size
    dtype: torch.dtype  # of the weight before, and after `dequantize`

    @property
    def codebook(self) -> Tensor:
        """(16,) float32: what each code stands for."""
        return _codebook(self.quant_type)

    @property
    def nested(self) -> bool:
        """Whether the scales are quantised as well."""
        return isinstance(self.absmax, NestedAbsmax)

    @property
    def scales(self) -> Tensor:
        """(ceil(n / blocksize),) float32: the scale of each block, dequantised if need be."""
        if isinstance(self.absmax, NestedAbsmax):
            return double_dequantize(self.absmax, NESTED_BLOCKSIZE)
        return self.absmax

    @property
    def nbytes(self) -> int:
        """The bytes of the codes and of all the scales."""
        return sum(part.nbytes for part in self.tensors())

    def tensors(self) -> list[Tensor]:
        """The codes and all the scales."""
        return [self.packed, *(self.absmax if isinstance(self.absmax, NestedAbsmax) else (self.absmax,))]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in `shape`, in `dtype` (None: the one that it had)."""
        return fast_dequantize_nf4(
            self.packed, self.scales, self.shape, self.blocksize, dtype or self.dtype, codebook=self.codebook
        )

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same on another device."""
        if isinstance(self.absmax, NestedAbsmax):
            absmax: Tensor | NestedAbsmax = NestedAbsmax(*(part.to(device) for part in self.absmax))
        else:
            absmax = self.absmax.to(device)
        return replace(self, packed=self.packed.to(device), absmax=absmax)

    def state_dict(self, name: str = "weight") -> dict[str, Tensor]:
        """Tensors only, under the names that bitsandbytes uses for a 4-bit weight called `name`.

        `weight`, `weight.absmax`, `weight.quant_map`, with double quantisation `weight.nested_absmax` and
        `weight.nested_quant_map`, and what is not a tensor as JSON in the bytes of
        `weight.quant_state.bitsandbytes__nf4`.

        Raises:
            ValueError: bitsandbytes has no such type (int4) or block size.
        """
        if self.quant_type not in BNB_TYPES or self.blocksize not in BNB_BLOCKSIZES:
            raise ValueError(
                f"bitsandbytes' format has the types {', '.join(BNB_TYPES)} and the block sizes "
                f"{', '.join(map(str, BNB_BLOCKSIZES))}; got {self.quant_type} with blocks of {self.blocksize}"
            )
        numbers: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": _name(self.dtype),
            "shape": list(self.shape),
        }
        state = {name: self.packed}
        if isinstance(self.absmax, NestedAbsmax):
            state[f"{name}.absmax"] = self.absmax.codes
            state[f"{name}.nested_absmax"] = self.absmax.absmax
            state[f"{name}.nested_quant_map"] = dynamic_map()
            numbers |= {
                "nested_blocksize": NESTED_BLOCKSIZE,
                "nested_dtype": "float32",
                "nested_offset": self.absmax.offset.item(),
            }
        else:
            state[f"{name}.absmax"] = self.absmax
        state[f"{name}.quant_map"] = self.codebook
        state[f"{name}.quant_state.bitsandbytes__{self.quant_type}"] = _to_bytes(numbers)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], name: str = "weight") -> QuantizedTensor:
        """Read what `state_dict`, or bitsandbytes, wrote for the weight called `name`; other entries are ignored.

        Raises:
            ValueError: an entry is missing, cannot be read, does not fit the others, or is not supported.
        """
        numbers = _read_numbers(state, name)
        packed = _entry(state, name).contiguous().view(torch.uint8).reshape(-1, 1)
        scales = _entry(state, f"{name}.absmax").reshape(-1)
        absmax: Tensor | NestedAbsmax = scales
        if "nested_offset" in numbers:
            _check_map(state, f"{name}.nested_quant_map", dynamic_map())
            absmax2 = _entry(state, f"{name}.nested_absmax").reshape(-1)
            absmax = NestedAbsmax(scales, absmax2, torch.tensor(float(numbers["nested_offset"]), device=scales.device))
        shape = torch.Size(numbers["shape"])
        quantized = cls(packed, absmax, numbers["quant_type"], numbers["blocksize"], shape, _DTYPES[numbers["dtype"]])
        _check_map(state, f"{name}.quant_map", quantized.codebook)
        quantized._check_sizes(name)
        return quantized

    def with_state(self, state: Mapping[str, Tensor], name: str = "weight") -> QuantizedTensor:
        """`from_state_dict`, for a weight of this one's shape.

        Raises:
            ValueError: as `from_state_dict`, or the shape is another one.
        """
        quantized = self.from_state_dict(state, name)
        if quantized.shape != self.shape:
            raise ValueError(f"{name} has shape {tuple(quantized.shape)} instead of {tuple(self.shape)}")
        return quantized

    def _check_sizes(self, name: str) -> None:
        n = math.prod(self.shape)
        blocks = -(-n // self.blocksize)
        want = {name: (self.packed, -(-n // 2), torch.uint8)}
        if isinstance(self.absmax, NestedAbsmax):
            want[f"{name}.absmax"] = (self.absmax.codes, blocks, torch.uint8)
            want[f"{name}.nested_absmax"] = (self.absmax.absmax, -(-blocks // NESTED_BLOCKSIZE), torch.float32)
        else:
            want[f"{name}.absmax"] = (self.absmax, blocks, torch.float32)
        for key, (tensor, numel, dtype) in want.items():
            if tensor.numel() != numel or tensor.dtype != dtype:
                raise ValueError(
                    f"{key} of a weight of shape {tuple(self.shape)} in blocks of {self.blocksize} must hold "
                    f"{numel} x {_name(dtype)}, got {tensor.numel()} x {_name(tensor.dtype)}"
                )


def quantize_4bit(
    weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False
) -> QuantizedTensor:
    """Quantise a weight to four bits, as `quantize_nf4` does, and its scales as `double_quantize` does if asked to.

    Args:
        weight: any shape; float32, float16 or bfloat16.
        quant_type: "nf4", "fp4" or "int4".
        blocksize: a power of two.
        double_quant: whether to quantise the scales to 8 bits as well.

    Raises:
        ValueError: the type is unknown, or as `quantize_nf4`.
    """
    packed, absmax = fast_quantize_nf4(weight, blocksize, codebook=_codebook(quant_type))
    scales = double_quantize(absmax, NESTED_BLOCKSIZE) if double_quant else absmax
    return QuantizedTensor(packed, scales, quant_type, blocksize, weight.shape, weight.dtype)


# --- Helpers ---------------------------------------------------------------------------------------


def _codebook(quant_type: str) -> Tensor:
    if quant_type not in CODEBOOKS:
        raise ValueError(f"quant_type must be one of {', '.join(CODEBOOKS)}, got {quant_type!r}")
    return CODEBOOKS[quant_type]()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _to_bytes(numbers: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8)


def _entry(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise ValueError(f"the state dict of a 4-bit weight needs the entry {key!r}, which is missing")
    return state[key]


def _read_numbers(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The JSON beside the tensors; every number that the arithmetic relies on is checked."""
    prefix = f"{name}.quant_state.bitsandbytes__"
    keys = [key for key in state if key.startswith(prefix)]
    if len(keys) != 1:
        raise ValueError(f"the state dict of a 4-bit weight needs one entry {prefix}nf4 or {prefix}fp4, got {keys}")
    try:
        numbers = json.loads(bytes(state[keys[0]].tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{keys[0]} does not hold readable JSON: {error}") from None
    allowed: dict[str, Any] = {"quant_type": BNB_TYPES, "blocksize": BNB_BLOCKSIZES, "dtype": tuple(_DTYPES)}
    if isinstance(numbers, dict) and "nested_offset" in numbers:
        allowed |= {"nested_blocksize": (NESTED_BLOCKSIZE,), "nested_dtype": ("float32",)}
        _check_number(numbers["nested_offset"], f"{keys[0]}: nested_offset")
    for field, values in allowed.items():
        given = numbers.get(field) if isinstance(numbers, dict) else None
        if given not in values:
            raise ValueError(f"{keys[0]}: {field} must be one of {', '.join(map(str, values))}, got {given!r}")
    shape = numbers.get("shape")
    if not isinstance(shape, list) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"{keys[0]}: shape must be a list of whole numbers of at least 1, got {shape!r}")
    return numbers


def _check_number(value: Any, what: str) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {value!r}")


def _check_map(state: Mapping[str, Tensor], key: str, expected: Tensor) -> None:
    given = _entry(state, key)
    if given.shape != expected.shape or not torch.allclose(given.float().cpu(), expected, atol=1e-3, rtol=0):
        raise ValueError(f"{key} is another table of values than the one of this type; only the usual one is supported")
