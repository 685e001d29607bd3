"""Unit 19, merging into four bits: what is observed of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.observation import dtype_of
from lora_from_scratch.checks.trial import trial
from lora_from_scratch.checks.unit_19.splits import SPLITS


def run_quantize(answer: Callable[..., Any], **inputs: Any) -> Any:
    """The three tensors by name; the codes may have any dtype."""
    result = answer(**inputs)
    if not isinstance(result, tuple | list) or [isinstance(part, Tensor) for part in result] != [True] * 3:
        return {"result": result}
    codes, scale, zero = result
    return {"codes": codes.float(), "scale": scale.float(), "zero": zero.float()}


def run_sums(answer: Callable[..., Any], x: Tensor, group_size: int) -> Any:
    """The sums, their dtype, and the gradient of a weighted total of them."""
    sums = answer(x.requires_grad_(), group_size)
    if not isinstance(sums, Tensor):
        return {"result": sums}
    gradient = None
    if sums.requires_grad:
        weights = torch.arange(1, sums.numel() + 1, dtype=sums.dtype).view(sums.shape)
        (gradient,) = torch.autograd.grad((sums * weights).sum(), x)
    return {"sums": sums, "dtype": dtype_of(sums), "gradient": gradient}


class Shifted:
    """What a scripted `quantize` returns: its matrix and an error that is known beforehand."""

    def __init__(self, values: Tensor, iteration: int) -> None:
        self.values, self.iteration = values, iteration

    def dequantize(self) -> Tensor:
        return self.values.clone()


def run_split(
    answer: Callable[..., Any],
    W: Tensor,
    rank: int,
    errors: Tensor,
    iterations: int | None,
    row: Tensor | None = None,
    column: Tensor | None = None,
    parameter: bool = False,
) -> Any:
    """Which iteration is returned, of those in which `quantize` makes the errors that are given one after the other."""
    calls = 0

    def quantize(matrix: Tensor) -> Shifted:
        nonlocal calls
        if not isinstance(matrix, Tensor) or matrix.shape != W.shape:
            raise TypeError("quantize was not called with a matrix of the shape of W")
        calls += 1
        return Shifted(matrix.detach().float() + errors[min(calls, len(errors)) - 1], calls)

    given = {} if iterations is None else {"iterations": iterations}
    weighting = {} if row is None or column is None else {"weighting": (row, column)}
    result = answer(nn.Parameter(W) if parameter else W, rank, quantize, **given, **weighting)
    if not isinstance(result, tuple | list) or len(result) != 3:
        return {"result": result}
    Q, A, B = result
    if not isinstance(A, Tensor) or not isinstance(B, Tensor):
        return {"result": [type(part).__name__ for part in result]}
    fits = A.ndim == B.ndim == 2 and B.shape[1] == A.shape[0]
    return {
        "shapes": [list(A.shape), list(B.shape)],
        "calls": calls,
        "iteration": Q.iteration if isinstance(Q, Shifted) else type(Q).__name__,
        "B A": (B.float() @ A.float()).detach() if fits else None,
        "a gradient": bool(A.requires_grad or B.requires_grad),
    }


def run_test(answer: Callable[..., Any], function: str) -> str:
    """Whether the learner's test lets this function pass; other errors than an AssertionError are its own."""
    return trial(answer, SPLITS[function])


def run_allocation(answer: Callable[..., Any], **inputs: Any) -> Any:
    """The choices; a tensor of them is as good as a list."""
    chosen = answer(**inputs)
    return chosen.tolist() if isinstance(chosen, Tensor) else chosen
