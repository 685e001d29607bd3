"""LoftQ (Li et al. 2023, arXiv:2310.08659): initialise the LoRA with the quantisation error.

Plain QLoRA starts at `Q = quant(W)`, which differs from W. A LoRA of rank r can represent the r largest directions of
the error, so Q and B A are chosen together: minimise `||W - Q - B A||` (section 3.1), alternately over the two
(algorithm 1).
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

    `SVD_r(M)` is the matrix of rank r nearest to M. The second step is optimal for its Q (Eckart and Young); the first
    is not optimal, because rounding each weight to its nearest code does not take into account what B A could
    represent. In practice the error falls at every iteration, most of all at the first.

    Args:
        W: (out, in), floating-point, perhaps a parameter, on any device; the computation runs on that device and needs
            no GPU.
        rank: r, from 1 to the smaller side of W.
        iterations: T, at least 1.
        quantize: maps a matrix to Q; `Q.dequantize()` is a matrix again. It is called once per iteration.

    Returns:
        Q of the last iteration, A (r, in) and B (out, r), both float32 and not part of a graph.
        The layer is `Q x + B A x`, without a factor alpha / r.
        How the product is factored into A and B is not specified.

    Raises:
        ValueError: W is not a matrix, rank or iterations are out of range, or `quantize` rejects W (not finite).
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
    """A (r, in) and B (out, r) whose product B A is the nearest matrix of rank r; each has the square root of S."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:rank].sqrt()  # (r,)
    return root[:, None] * Vh[:rank], U[:, :rank] * root


@torch.no_grad()
def begin_with_loftq(
    layer: LoRALinear, W: Tensor, iterations: int = 1, quantize: Callable[[Tensor], QuantizedTensor] = quantize_4bit
) -> None:
    """Initialise a LoRA on a 4-bit layer, in place, with `loftq_init` of the layer's full-precision weight W.

    The layer gets a new Q (`layer.base.quantized`), and its A and B get new values; they remain the same parameters,
    with the same dtype. The layer computes `Q x + s B A x` with its own scaling s = alpha / r, while LoftQ has no s:
    afterwards Q + s B A is what LoftQ's Q + B A should be.

    Args:
        layer: a LoRA of rank r on an `NF4Linear`, not merged.
        W: (out, in), the full weight.
        iterations, quantize: as for `loftq_init`.

    Raises:
        ValueError: `layer.base` is not an `NF4Linear` or its shape differs from W's; or as for `loftq_init`. The layer
            is then unchanged.
    """
    base = layer.base
    if not isinstance(base, NF4Linear) or base.quantized.shape != W.shape:
        raise ValueError(f"the LoRA must be on a 4-bit layer whose weight is {tuple(W.shape)}, got one on {base}")
    Q, A, B = loftq_init(W, layer.rank, iterations, quantize)
    base.quantized = Q
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B / layer.scaling)
