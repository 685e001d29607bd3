"""Unit 03, GPT-2: what the checks observe of an answer, and when it agrees."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.observation import Seen

DRAWS = 24  # how often a token is drawn: enough to see every token whose probability is near one half


def run_block(
    answer: Callable[..., Any], x: Tensor, norm_1: Tensor, attention: Tensor, norm_2: Tensor, mlp: Tensor
) -> Any:
    """Run the block on parts built from plain data: norms with a weight and a bias, attention as a causal mean.

    Returns:
        The stream after the block; and, for each part, what it was called with.
    """
    read: dict[str, list[Tensor]] = {name: [] for name in ("norm_1", "attention", "norm_2", "mlp")}

    def recorded(name: str, part: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def called(h: Tensor) -> Tensor:
            read[name].append(h.detach().clone())
            return part(h)

        return called

    def norm(values: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda h: F.layer_norm(h, h.shape[-1:], values[0].to(h.dtype), values[1].to(h.dtype))

    def mean_of_the_past(h: Tensor) -> Tensor:
        return h.cumsum(dim=1) / torch.arange(1, h.shape[1] + 1)[:, None] @ attention.to(h.dtype)

    parts = (norm(norm_1), mean_of_the_past, norm(norm_2), lambda h: torch.tanh(h @ mlp.to(h.dtype)))
    y = answer(x, *(recorded(name, part) for name, part in zip(read, parts, strict=True)))
    return {"y": y, "read": read}


def same_stream(case: Case, seen: Seen, expected: Seen) -> bool:
    """Only the result counts; a part may be called as often as an answer likes."""
    one, other = seen.value, expected.value
    return isinstance(one, dict) and isinstance(other, dict) and same(one["y"], other["y"])


def run_loss(answer: Callable[..., Any], logits: Tensor, labels: Tensor) -> Any:
    """The loss, and the gradient that training would use (None if no gradient can flow)."""
    logits.requires_grad_(True)
    loss = answer(logits, labels)
    flows = isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1
    gradient = torch.autograd.grad(loss, logits)[0] if flows else None
    return {"loss": loss, "gradient": gradient}


def run_top_p(answer: Callable[..., Any], logits: Tensor, p: float) -> Any:
    """The result, and whether it is a tensor of its own: its caller may write into it."""
    result = answer(logits, p)
    own = not isinstance(result, Tensor) or result.data_ptr() != logits.data_ptr()
    return {"logits": result, "a new tensor": own}


def same_nucleus(case: Case, seen: Seen, expected: Seen) -> bool:
    """The same number of equally likely tokens is kept in each row, whichever they are."""
    one, other, logits = seen.value, expected.value, case.inputs["logits"]
    if not isinstance(one, dict) or not isinstance(other, dict) or not same(one["a new tensor"], other["a new tensor"]):
        return False
    kept, wanted = one["logits"], other["logits"]
    if not isinstance(kept, Tensor) or not isinstance(wanted, Tensor) or not isinstance(logits, Tensor):
        return False
    if kept.shape != wanted.shape or not same(kept.sort(dim=-1).values, wanted.sort(dim=-1).values):
        return False
    return same(kept, logits.masked_fill(kept == -math.inf, -math.inf))


def draw_often(answer: Callable[..., Any], logits: Tensor, seed: int, own: bool = False, **options: Any) -> Any:
    """Which tokens are drawn at all, and whether the same seed gives the same tokens again.

    Args:
        own: give no generator; the seed is then PyTorch's own.
    """

    def drawn() -> list[int]:
        if own:
            torch.manual_seed(seed)
            return [int(answer(logits, **options)) for _ in range(DRAWS)]
        generator = torch.Generator().manual_seed(seed)
        return [int(answer(logits, generator=generator, **options)) for _ in range(DRAWS)]

    tokens = drawn()
    again = drawn() if own or not options else tokens
    return {"tokens that come": sorted(set(tokens)), "the same again": tokens == again}
