"""Unit 10, fine-tuning with LoRA: what is observed of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.model import Conv1D

SIZES = {"h.0.fc": (4, 6), "h.0.proj": (4, 4), "h.1.fc": (4, 6), "h.1.proj": (4, 4), "head": (4, 3)}


def run_on_sizes(answer: Callable[..., Any], sizes: list[list[int]], **given: Any) -> Any:
    return answer([(inputs, outputs) for inputs, outputs in sizes], **given)


def run_peft(answer: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """The tensors by name, and the order of the names."""
    state = answer(tensors)
    return {"state": state, "order": list(map(str, state))} if isinstance(state, dict) else state


class Small(nn.Module):
    """Two kinds of layers, one of them square, and a `Linear` beside the `Conv1D`."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.ModuleDict({"fc": Conv1D(4, 6), "proj": Conv1D(4, 4)}) for _ in range(2)])
        self.head = nn.Linear(4, 3)


def small_model(seed: int, whole: bool) -> nn.Module:
    """With standard normal parameters, or in bfloat16 with whole numbers from -50 to 50."""
    generator = torch.Generator().manual_seed(seed)
    model = Small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
            if whole:
                parameter.copy_(torch.randint(-50, 51, parameter.shape, generator=generator))
    return model.to(torch.bfloat16) if whole else model


def run_switch(
    answer: Callable[..., Any], old: dict[str, Any], new: dict[str, Any], seed: int, steps: str, whole: bool = False
) -> dict[str, Any]:
    """All the values of the model afterwards, and whether invalid input raised."""
    model = small_model(seed, whole)
    parameters = dict(model.named_parameters())
    theirs = [{name: (A, B) for name, (A, B) in factors.items()} for factors in (old, new)]
    refused = False
    try:
        answer(model, *theirs)
        if steps == "there and back":
            answer(model, *reversed(theirs))
    except ValueError:
        if steps != "refuse":
            raise
        refused = True
    after = dict(model.named_parameters())
    return {
        "refused": refused,
        "weights": after,
        "dtypes": {name: str(p.dtype).removeprefix("torch.") for name, p in after.items()},
        "the same parameters": {name: after.get(name) is parameter for name, parameter in parameters.items()},
        "still trained": all(p.requires_grad and p.grad_fn is None for p in after.values()),
    }
