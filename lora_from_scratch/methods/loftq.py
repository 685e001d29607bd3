"""LoftQ (Li et al. 2023, arXiv:2310.08659): let the LoRA begin with what quantisation loses.

Plain QLoRA starts at `Q = quant(W)`, which is not W. A LoRA of rank r can hold the r largest directions of the error,
so Q and B A are chosen together: minimise `||W - Q - B A||` (section 3.1), one half at a time (algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_from_scratch.methods.lora import LoRALinear
from lora_from_scratch.quantization.nf4_linear import NF4Linear
from lora_from_scratch.quantization.quantized_tensor import QuantizedTensor, quantize_4bit


def loftq_init(
    W: Tensor, rank: int, iterations: int = 1, quantize: Callable[[Tensor], QuantizedTensor] = quantize_4bit
) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """Alternate `Q = quant(W - B A)` and `B A = SVD_r(W - Q)`, from B A = 0 (algorithm 1).

    `SVD_r(M)` is the nearest matrix of rank r to M. The second half is the best there is for its Q (Eckart and Young);
    the first is not, because rounding each weight to its nearest code takes no account of what B A could hold. In
    practice the error falls at every iteration, most of all at the first.

    Args:
        W: (out, in), floating-point, on any device; the work is done where it is, and needs no GPU.
        rank: r, from 1 to the smaller side of W.
        iterations: T, at least 1.
        quantize: what makes Q of a matrix; `Q.dequantize()` is a matrix again. Called once an iteration.

    Returns:
        Q of the last iteration, A (r, in) and B (out, r), both float32: the layer is `Q x + B A x`, without any
        alpha / r. Which A and B share the product between them is not laid down.

    Raises:
        ValueError: W is not a matrix, rank or iterations are out of their range, or `quantize` refuses W (not finite).
    """
    if W.ndim != 2:
        raise ValueError(f"W must be a matrix (out, in), got shape {tuple(W.shape)}")
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"rank must be between 1 and {min(W.shape)} (the smaller side of W), got {rank}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    W = W.detach().float()
    low_rank = torch.zeros_like(W)  # B A
    for _ in range(iterations):
        Q = quantize(W - low_rank)
        A, B = best_factors(W - Q.dequantize(), rank)
        low_rank = B @ A
    return Q, A, B


def best_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) whose product B A is the nearest matrix of rank r; each gets the root of S."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:rank].sqrt()  # (r,)
    return root[:, None] * Vh[:rank], U[:, :rank] * root


@torch.no_grad()
def begin_with_loftq(
    layer: LoRALinear, W: Tensor, iterations: int = 1, quantize: Callable[[Tensor], QuantizedTensor] = quantize_4bit
) -> None:
    """Let a LoRA on a 4-bit layer begin with `loftq_init` of the weight W that was there before. Changed in place.

    The layer gets a new Q (`layer.base.quantized`), and its A and B get new values; they stay the parameters that
    they are, and in their dtype. The layer computes `Q x + s B A x` with its own scaling s = alpha / r, and LoftQ knows
    of no s: after this, Q + s B A is what LoftQ wants Q + B A to be.

    Args:
        layer: a LoRA of rank r around an `NF4Linear`, not merged.
        W: (out, in), the full weight.
        iterations, quantize: as `loftq_init`.

    Raises:
        ValueError: `layer.base` is no `NF4Linear`, or has another shape than W; or as `loftq_init`. The layer is then
            as it was.
    """
    base = layer.base
    if not isinstance(base, NF4Linear) or base.quantized.shape != W.shape:
        raise ValueError(f"the LoRA must be on a 4-bit layer whose weight is {tuple(W.shape)}, got one on {base}")
    Q, A, B = loftq_init(W, layer.rank, iterations, quantize)
    base.quantized = Q
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B / layer.scaling)
