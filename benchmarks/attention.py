"""Attention in training: the explicit equation against PyTorch's fused kernel, forward and backward.

    python -m benchmarks.attention [--pairs 15] [--batch 16] [--tokens 256]

A ratio below 1 means that the explicit equation is faster. Heads and width are the bundled model's. The script stops if
the two results differ.
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    shape, pairs = (options.batch, 8, options.tokens, 32), options.pairs
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
        torch.testing.assert_close(causal_attention(q, k, v), fused(q, k, v), atol=2e-2, rtol=2e-2)
        for attention in (fused, causal_attention):
            seconds(attention, q, k, v)  # the first time is slower
        ratios = [seconds(causal_attention, q, k, v) / seconds(fused, q, k, v) for _ in range(pairs)]
        print(
            f"{dtype}: explicit / fused = {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}, {pairs} pairs)"
        )


if __name__ == "__main__":
    main()
