"""A linear layer whose weight is stored in four bits, and a whole model of them (Dettmers et al. 2023, section 3)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.quantization.fast_nf4 import READ_CHUNK
from lora_from_scratch.quantization.nf4 import double_quantize
from lora_from_scratch.quantization.quantized_tensor import (
    BNB_BLOCKSIZES,
    BNB_TYPES,
    NESTED_BLOCKSIZE,
    QuantizedTensor,
    quantize_4bit,
)
from lora_from_scratch.support.linear_layers import is_conv1d, linear_layer, weight_of
from lora_from_scratch.support.tape import Tape, TensorSize
from lora_from_scratch.support.wrapped import plain_name

# --- The layer -----------------------------------------------------------------------------------------


class FourBitProduct(torch.autograd.Function):
    """`y = x W^T + b` for a 4-bit W that is not trained. W is dequantised twice and kept never (QLoRA, eq. 5).

    `F.linear` would keep the dequantised W from the forward to the backward pass, in every layer at the same time: all
    of the memory that quantising had saved. Only the gradient of x needs it, so it is made again there.

    `FourBitProduct.apply(x, bias, quantized)` calls `forward`, and later PyTorch calls `backward`, with the same `ctx`:

    - `forward`: x (..., in), bias (out,) or None, and a `QuantizedTensor` of shape (out, in), whose
      `dequantize(dtype)` makes W. Returns y (..., out). W is made in the dtype of x, which is that of y.
    - `backward`: grad_y = dL/dy (..., out), which need not be contiguous. Returns dL/dx (..., in), dL/dbias (out,) and
      None for the weight, in this order. A gradient that nobody needs, as `ctx.needs_input_grad` says (one truth value
      for each argument of `apply`), is None and costs nothing; without that of x nothing is dequantised.

    Between the two, `ctx` may hold the `QuantizedTensor`, but nothing that `forward` has made, and not x either: no
    gradient depends on x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, quantized: QuantizedTensor) -> Tensor:
        ctx.quantized = quantized
        W = quantized.dequantize(x.dtype)  # (out, in)
        return F.linear(x, W, bias)  # (..., in) -> (..., out)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            W = ctx.quantized.dequantize(grad_y.dtype)
            grad_x = grad_y @ W  # (..., out) -> (..., in)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(dim=0)
        return grad_x, grad_bias, None


class QuantizedLinear(nn.Module):
    """A linear layer with a frozen weight in few bits. It computes in the type of x, or in autocast's.

    Args:
        quantized: the weight, (out, in) as in `nn.Linear`.
        bias: (out,), kept as it is; None: no bias.
        kind: the class of the layer that it stands for, to which `dense` goes back: `nn.Linear` or a Conv1D.

    Raises:
        ValueError: the weight is not a matrix.
    """

    like: Tensor  # nothing, in the dtype and on the device of the layer: its codes have no dtype that could follow it

    def __init__(self, quantized: Any, bias: nn.Parameter | None = None, kind: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        if len(quantized.shape) != 2:
            raise ValueError(f"the weight must be a matrix (out, in), got shape {tuple(quantized.shape)}")
        self.out_features, self.in_features = quantized.shape
        self.quantized = quantized
        self.bias = bias
        self.kind = kind
        nothing = torch.empty(0, dtype=quantized.dtype, device=quantized.packed.device)
        self.register_buffer("like", nothing, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The packed codes, uint8."""
        packed: Tensor = self.quantized.packed
        return packed

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        y: Tensor = FourBitProduct.apply(x.to(dtype), bias, self.quantized)
        return y

    def dense(self) -> nn.Module:
        """The same layer of `kind`, with the weight dequantised and the same bias, in the dtype of this one."""
        weight = self.quantized.dequantize(self.like.dtype)  # (out, in)
        return linear_layer(self.kind, weight, self.bias).train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    # The weight is no parameter, so moving it and saving it has to be said.

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Another device moves the weight; another type concerns the bias and `like` alone, since codes have none."""
        super()._apply(fn, recurse)
        self.quantized = self.quantized.to(fn(self.quantized.packed).device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.quantized.state_dict().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = {key: tensor for key, tensor in state_dict.items() if key.startswith(f"{prefix}weight")}
        errors: list[str] = rest[-1]
        try:
            self.quantized = self.quantized.with_state(own, f"{prefix}weight").to(self.weight.device)
        except ValueError as error:
            errors.append(str(error))
        others = {key: tensor for key, tensor in state_dict.items() if key not in own}
        super()._load_from_state_dict(others, prefix, *rest)


class NF4Linear(QuantizedLinear):
    """A linear layer with a frozen weight in NF4 or FP4, a `QuantizedTensor`. Its state dict is bitsandbytes'."""

    @classmethod
    def from_layer(
        cls, layer: nn.Module, quant_type: str = "nf4", blocksize: int = 64, double_quantization: bool = True
    ) -> NF4Linear:
        """Quantise an `nn.Linear` or `Conv1D`; the bias is shared with it.

        A Conv1D's weight is turned round first: the blocks run along the input, as in bitsandbytes.

        Raises:
            ValueError: the type or the block size is not one of bitsandbytes', or a weight is not finite.
        """
        check_quantization(quant_type, blocksize)
        quantized = quantize_in_parts(weight_of(layer), quant_type, blocksize, double_quantization)
        bias = layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        return cls(quantized, bias, type(layer) if is_conv1d(layer) else nn.Linear).train(layer.training)

    def extra_repr(self) -> str:
        q = self.quantized
        return (
            f"{super().extra_repr()}, quant_type={q.quant_type}, blocksize={q.blocksize}, "
            f"double_quantization={q.nested}"
        )


def quantize_in_parts(
    weight: Tensor, quant_type: str, blocksize: int, double_quantization: bool, part: int = 2**18
) -> QuantizedTensor:
    """`quantize_4bit`, bit for bit, about `part` weights at a time.

    On the way to four bits there are several copies of the weight in 32. Of a whole layer at once they leave holes
    in the memory that C's allocator does not fill again, as large as what is saved (seen with glibc 2.36).

    Raises:
        ValueError: as `quantize_4bit`; the position is counted from the first of the rows that are named.
    """
    rows = blocksize * max(1, part // (blocksize * weight.shape[1]))  # so that no block crosses the border of two parts
    parts: list[QuantizedTensor] = []
    for start in range(0, len(weight), rows):
        some = weight[start : start + rows]
        try:
            parts.append(quantize_4bit(some, quant_type, blocksize))
        except ValueError as error:
            raise ValueError(f"rows {start} to {start + len(some) - 1}: {error}") from None
    packed, scales = torch.cat([q.packed for q in parts]), torch.cat([q.scales for q in parts])
    absmax = double_quantize(scales, NESTED_BLOCKSIZE) if double_quantization else scales
    return replace(parts[0], packed=packed, absmax=absmax, shape=weight.shape)


def check_quantization(quant_type: str, blocksize: int) -> None:
    """Raise a ValueError unless bitsandbytes' format has this type and this block size."""
    if quant_type not in BNB_TYPES:
        raise ValueError(f"quant_type must be one of {', '.join(BNB_TYPES)}, got {quant_type!r}")
    if isinstance(blocksize, bool) or blocksize not in BNB_BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BNB_BLOCKSIZES))}, got {blocksize!r}")


def nf4_layers(model: nn.Module) -> dict[str, NF4Linear]:
    """The layers of a model that are in NF4 or FP4, by name."""
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The layers of a model whose weights are quantised in any way, by name."""
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


# --- What it keeps for the backward pass ---------------------------------------------------------------


@activations.forward.register
def _(module: NF4Linear, x: TensorSize, tape: Tape) -> TensorSize:
    x = tape.cast(x, 2) if tape.autocast else x
    n = module.in_features * module.out_features
    on_the_way_to_W = min(n, READ_CHUNK) * 8 + 8 * n // module.quantized.blocksize  # gone when dL/dx is made
    scratch = n * x.width + max(0, on_the_way_to_W - x.nbytes)
    return tape.add([x], TensorSize(x.rows, module.out_features, x.width), trained=[module.bias], scratch=scratch)
