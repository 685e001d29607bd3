"""LoRA's two products in less time and memory than the equation takes. Tested equal to it."""

from __future__ import annotations

import torch
from torch import Tensor


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Each element becomes 0 with probability p, the others x / (1 - p); in training only.

    The same as `F.dropout`, but what it keeps for the backward pass is the mask, one byte an element. On a
    CPU `F.dropout` keeps the scaled mask in the type of x: four bytes.
    """
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def add_product(y: Tensor, h: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y + s h B^T in one kernel, without a second and a third tensor of the size of y.

    Args:
        y: (..., out).
        h: (..., r).
        B: (out, r).
    """
    out, rank = B.shape
    return torch.addmm(y.reshape(-1, out), h.reshape(-1, rank), B.T, alpha=scaling).view_as(y)
