"""Unit 24, when adapters meet: what is observed of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.new_tensor import new_tensor
from lora_from_scratch.checks.trial import trial
from lora_from_scratch.checks.unit_24.lora_sums import MERGES


def run_sum(answer: Callable[..., Any], As: list[Tensor], Bs: list[Tensor], weights: list[float]) -> Any:
    """The shapes of A and B, and their product: the factors themselves may be scaled in many ways."""
    result = answer(list(zip(As, Bs, strict=True)), weights)
    if not isinstance(result, tuple | list) or [isinstance(part, Tensor) for part in result] != [True, True]:
        return {"result": result}
    A, B = result
    fits = A.ndim == B.ndim == 2 and B.shape[1] == A.shape[0]
    return {"shapes": [list(A.shape), list(B.shape)], "update": B @ A if fits else None}


def run_test(answer: Callable[..., Any], function: str) -> str:
    """Whether the learner's test lets this function pass; other errors than an AssertionError are its own."""
    return trial(answer, MERGES[function])


def run_trim(answer: Callable[..., Any], update: Tensor, density: float) -> Any:
    return new_tensor(answer, update, density)


def run_drop(answer: Callable[..., Any], update: Tensor, drop_rate: float, seed: int) -> Any:
    """What is left of an update without zeros, and whether the random numbers come from where they should."""

    def drawn(s: int) -> Any:
        return answer(update, drop_rate, torch.Generator().manual_seed(s))

    def own(s: int) -> Any:
        torch.manual_seed(s)
        return answer(update, drop_rate)

    first = drawn(seed)
    if not isinstance(first, Tensor) or first.shape != update.shape:
        return {"result": first}
    kept = first != 0
    rows = kept.reshape(len(kept), -1)
    ratios = (first / update)[kept]
    counts = {int((drawn(seed + more) == 0).sum()) for more in range(6)}
    return {
        "a new tensor": first.data_ptr() != update.data_ptr(),
        "the factor of what is kept": float(ratios.mean()) if len(ratios) else 0.0,
        "one factor": bool((ratios - ratios.mean()).abs().max() < 1e-3) if len(ratios) else True,
        "the share that is dropped": abs(float((~kept).float().mean()) - drop_rate) < 0.05,
        "whole rows or columns": drop_rate > 0 and bool(same_everywhere(rows) or same_everywhere(rows.T)),
        "always as many": drop_rate > 0 and len(counts) == 1,
        "the same seed": torch.equal(first, drawn(seed)),
        "another seed": drop_rate > 0 and torch.equal(first, drawn(seed + 1)),
        "PyTorch's, the same seed": torch.equal(own(seed), own(seed)),
        "PyTorch's, another seed": drop_rate > 0 and torch.equal(own(seed), own(seed + 1)),
    }


def same_everywhere(kept: Tensor) -> bool:
    """Whether each row is kept or dropped as a whole."""
    return bool((kept == kept[:, :1]).all())
