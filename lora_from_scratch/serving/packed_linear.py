"""A linear layer whose weight is stored in the order in which the processor's matrix kernel reads it.

A matrix product reads its operands in small blocks. A general kernel first copies ("packs") the weight into such
blocks, on every call. For the few rows of a decoding batch this costs about as much as the product itself, so a server
packs each weight of the base once, when it starts. oneDNN, which PyTorch contains, has kernels for packed weights;
PyTorch's compiler uses the same two operators when it freezes a model. The packed copy takes as much memory as the
weight.

With 16 rows on one core, a layer from 768 to 2304 took 0.7 of the usual time, and GPT-2's output head 0.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.support.linear_layers import weight_of

ROWS = 32  # the number of rows for which oneDNN chooses the blocks; other numbers are computed with the same blocks


class PackedLinear(nn.Module):
    """Computes x W^T + b.

    On a device or with a number format for which there is no packed kernel, the weight is used as it is.

    Args:
        weight: W, (out, in). It is not modified, and not kept if it is packed.
        bias: b, (out,).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        pack = _can_be_packed(weight)
        self.weight = None if pack else weight.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS) if pack else None
        self.bias = None if bias is None else bias.detach()

    @classmethod
    def of(cls, layer: Any) -> PackedLinear:
        """Make one from an `nn.Linear` or a Conv1D, which is not modified."""
        return cls(weight_of(layer), layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if self.packed is None:
            assert self.weight is not None
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def _can_be_packed(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
