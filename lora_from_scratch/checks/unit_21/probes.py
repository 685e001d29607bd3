"""Unit 21, editing representations: what is observed of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.new_tensor import new_tensor
from lora_from_scratch.checks.trial import trial
from lora_from_scratch.checks.unit_21.edits import EDITS


def run_change(
    answer: Callable[..., Any], h: Tensor, R: Tensor, W: Tensor, b: Tensor, where: Tensor | None, variant: str
) -> Any:
    """The change, and the gradients that reach h, R, W and b from a number that depends on all of its entries."""
    tensors = {"h": h, "R": R, "W": W, "b": b}
    for tensor in tensors.values():
        tensor.requires_grad_()
    change = answer(h, R, W, b, where, variant)
    gradients: list[Tensor | None] = [None] * len(tensors)
    if isinstance(change, Tensor) and change.requires_grad:
        total = (change.square() / 2 + change).sum()
        gradients = list(torch.autograd.grad(total, list(tensors.values()), allow_unused=True))
    return {"change": change, "gradients": dict(zip(tensors, gradients, strict=True))}


def run_rows(answer: Callable[..., Any], R: Tensor) -> Any:
    return new_tensor(answer, R)


def run_test(answer: Callable[..., Any], edit: str) -> str:
    """Whether the learner's test lets this edit pass; other errors than an AssertionError are its own."""
    return trial(answer, EDITS[edit])


OPTIMIZERS: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    "SGD": lambda rows, rate: torch.optim.SGD(rows, lr=rate),
    "AdamW": lambda rows, rate: torch.optim.AdamW(rows, lr=rate, weight_decay=0.1),
}


def run_search(
    answer: Callable[..., Any],
    prompt: Tensor,
    table: Tensor,
    target: Tensor,
    steps: int,
    learning_rate: float,
    optimizer: str,
) -> Any:
    """The result, where P ends, and how often the loss was computed: (E - target)^2 / 2, summed."""
    calls = 0

    def loss_of(E: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (E - target).square().sum() / 2

    rows = prompt.clone().requires_grad_()
    result = answer(loss_of, rows, table, steps, OPTIMIZERS[optimizer]([rows], learning_rate))
    if not isinstance(result, tuple | list) or len(result) != 2:
        return {"result": result}
    tokens, loss = result
    return {"tokens": tokens, "loss": loss, "calls": calls, "P": rows.detach().clone()}
