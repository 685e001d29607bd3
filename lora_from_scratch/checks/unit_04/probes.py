"""Unit 04, full fine-tuning: what the checks observe of an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2


def try_labels(answer: Callable[..., Any], **texts: Any) -> Any:
    """The two rows of token ids, each given as a list of whole numbers or as a tensor."""
    result = answer(**texts)
    return [as_row(row) for row in result] if isinstance(result, list | tuple) else result


def as_row(row: Any) -> Any:
    whole = isinstance(row, list | tuple) and all(isinstance(number, int) for number in row)
    return torch.tensor(row, dtype=torch.int64) if whole else row


def try_schedule(answer: Callable[..., Any], at: list[int], steps: int, warmup_steps: int) -> Any:
    return [answer(step, steps, warmup_steps) for step in at]


def try_freezing(answer: Callable[..., Any], blocks: int, layers: int, frozen_before: bool = False) -> Any:
    """Which parts of a tiny GPT-2 are trained after the call."""
    model = GPT2(GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=blocks, n_head=1))
    model.requires_grad_(not frozen_before)
    answer(model, layers)
    body = model.transformer
    parts: dict[str, nn.Module] = {"token embedding": body.wte, "position embedding": body.wpe}
    parts |= {f"block {number}": block for number, block in enumerate(body.h)}
    parts["last LayerNorm"] = body.ln_f
    return {name: trained(part) for name, part in parts.items()}


def trained(part: nn.Module) -> str:
    flags = {p.requires_grad for p in part.parameters()}
    return "partly" if len(flags) > 1 else "trained" if flags == {True} else "frozen"


def try_memory(
    answer: Callable[..., Any],
    rows: int,
    width: int,
    dtype: str,
    frozen: Sequence[str],
    half: Sequence[str] = (),
    tied: bool = False,
) -> Any:
    """Bytes for an embedding, a linear layer with a bias, and on request an output layer tied to the embedding.

    Args:
        frozen: the names of parameters that are not trained.
        half: the names of parameters that are in bfloat16, whatever the dtype of the others is.
    """
    model = nn.Module()
    embedding = nn.Embedding(rows, width)
    model.add_module("embedding", embedding)
    model.add_module("middle", nn.Linear(width, 2 * width))
    if tied:
        head = nn.Linear(width, rows, bias=False)
        head.weight = embedding.weight
        model.add_module("head", head)
    model.to(getattr(torch, dtype))
    for name in half:
        model.get_parameter(name).data = model.get_parameter(name).data.bfloat16()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return answer(model)
