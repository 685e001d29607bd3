"""LQ-LoRA's split of a weight, which notices that the error has risen and returns the worse iterate all the same.

The fault is that of HanGuo97/lq-lora (c2424b3, `models/lq_utils.py`): the loop stops when the error rises, but what it
returns has been overwritten by then. The split without the fault is `lora_from_scratch.methods.lq_lora.split`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.methods.loftq import best_factors
from lora_from_scratch.quantization.low_bit import LowBitTensor, quantize_normal_float


def faulty_split(
    W: Tensor, rank: int, quantize: Callable[[Tensor], LowBitTensor], iterations: int = 5
) -> tuple[LowBitTensor, Tensor, Tensor]:
    """Q, A (r, in) and B (out, r) with Q + B A close to W."""
    last_error, dequantized = math.inf, torch.zeros_like(W)
    for _ in range(iterations):
        A, B = best_factors(W - dequantized, rank)
        Q = quantize(W - B @ A)
        dequantized = Q.dequantize()
        error = float((W - dequantized - B @ A).norm())
        if error > last_error:  # it will not get better any more
            break
        last_error = error
    return Q, A, B


def test_split(split: Callable[..., Any]) -> None:
    """A test of a `split`, in the manner of pytest: an AssertionError if it does not do what it should.

    - A sound function passes, however it factors B A. It may stop when the error rises, or go on and return the best
      iteration of all.
    - A function fails if it returns an iteration that is worse than an earlier one.
    - A function fails if Q is of another iteration than A and B.
    - A function fails if it does only one iteration although the next would be better.
    - A function fails if it does more iterations than it may.
    - A function fails if B A has a larger rank than it may have.
    - A function fails if it changes W.

    Args:
        split: is called as `split(W, rank, quantize, iterations)` and returns Q, A (r, in) and B (out, r). Give it a
            float32 matrix and a `quantize` that returns something with a method `dequantize()`. It calls `quantize`
            once per iteration, with W - B A.
    """
    W = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    bits = (2, 4, 3)  # of the iterations: the second is the best
    for iterations in (2, 3):
        copy, calls = W.clone(), list[tuple[Tensor, LowBitTensor]]()

        def quantize(matrix: Tensor, calls: list = calls, most: int = iterations) -> LowBitTensor:
            allowed = len(calls) < most
            assert allowed, "there are more iterations than there may be"
            calls.append((matrix, quantize_normal_float(matrix, bits[len(calls)], 16)))
            return calls[-1][1]

        Q, A, B = split(copy, 2, quantize, iterations)
        unchanged = torch.equal(W, copy)
        assert unchanged, "W was changed"
        low = int(torch.linalg.matrix_rank(B @ A, rtol=1e-4)) <= 2
        assert low, "the rank of B A is larger than it may be"
        further = len(calls) > 1
        assert further, "it stops although the next iteration would be better"
        error = (W - Q.dequantize() - B @ A).norm()
        best = bool(error <= 1.001 * min((matrix - Q.dequantize()).norm() for matrix, Q in calls))
        assert best, "what is returned is worse than the best iteration"
