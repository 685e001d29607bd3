"""Attention in training: the explicit equation against PyTorch's fused kernel, forward and backward.

    python -m benchmarks.attention

A ratio below 1 means that the explicit equation is faster. The shape is the bundled model's, batch 16 x 256.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.gpt2.model import causal_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def seconds(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> float:
    started = time.perf_counter()
    attention(q, k, v).sum().backward()
    return time.perf_counter() - started


def main(pairs: int = 15) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (torch.randn(16, 8, 256, 32, dtype=dtype, requires_grad=True) for _ in range(3))
        for attention in (fused, causal_attention):
            seconds(attention, q, k, v)  # the first time is slower
        ratios = [seconds(causal_attention, q, k, v) / seconds(fused, q, k, v) for _ in range(pairs)]
        print(
            f"{dtype}: explicit / fused = {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}, {pairs} pairs)"
        )


if __name__ == "__main__":
    main()
