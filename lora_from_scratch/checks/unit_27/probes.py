"""Unit 27, rewards instead of references: what is observed of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.observation import Seen


def run_tokens(answer: Callable[..., Any], logits: Tensor, ids: Tensor, begin: Tensor, end: Tensor) -> Any:
    """The log-probabilities, and the gradient of a sum of them in which no two have the same weight."""
    logits.requires_grad_()
    values = answer(logits, ids, begin, end)
    if not isinstance(values, Tensor) or not values.requires_grad:
        return {"values": values, "gradient": None}
    weights = 1 + torch.arange(values.numel()).view(values.shape) / 7
    (values.float() * weights).sum().backward()
    return {"values": values, "gradient": logits.grad}


def same_tokens(case: Case, seen: Seen, expected: Seen) -> bool:
    """A gradient in half precision may differ in its last digit."""
    one: Any = seen.value
    other: Any = expected.value
    half = other["gradient"].dtype == torch.bfloat16
    return same(one["values"], other["values"]) and same(one["gradient"], other["gradient"], 2**-7 if half else 1e-4)


def run_loss(
    answer: Callable[..., Any], log_probabilities: Tensor, advantages: Tensor, lengths: Tensor, **divisor: int
) -> Any:
    """The loss, its gradient, and whether a gradient flows into the advantages."""
    log_probabilities.requires_grad_()
    advantages.requires_grad_()
    loss = answer(log_probabilities, advantages, lengths, **divisor)
    if not isinstance(loss, Tensor) or not loss.requires_grad or loss.numel() != 1:
        return {"loss": loss, "gradient": None}
    loss.sum().backward()
    flows = advantages.grad is not None and bool((advantages.grad != 0).any())
    gradient = log_probabilities.grad
    if gradient is not None:
        gradient = gradient * (log_probabilities != 0)  # what flows into the padding does not matter
    return {"loss": loss, "gradient": gradient, "gradient of the advantages": flows}


def same_loss(case: Case, seen: Seen, expected: Seen) -> bool:
    """The terms of the loss may cancel, so its error is compared with the size of the largest one."""
    one: Any = seen.value
    other: Any = expected.value
    given: Any = case.inputs
    largest = float((given["log_probabilities"].abs().sum(dim=1) * given["advantages"].abs()).max())
    near = torch.is_tensor(one["loss"]) and one["loss"].shape == other["loss"].shape
    return (
        near
        and bool((one["loss"] - other["loss"]).abs() <= 1e-6 * largest)
        and same(one | {"loss": None}, other | {"loss": None})
    )
