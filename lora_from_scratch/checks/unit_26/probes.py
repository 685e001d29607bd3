"""Unit 26, a real model: what is observed of an answer. The models are small, and none of them is a real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Beside(nn.Module):
    """What is put in a layer's place: the layer, with a matrix that is trained."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.new = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.new
        return y


def block(*names: str) -> nn.Module:
    """A module with a linear layer under each of these names, two parts at most: "attn.k_proj"."""
    made = nn.Module()
    for name in names:
        parent, _, child = name.rpartition(".")
        if parent and not hasattr(made, parent):
            made.add_module(parent, nn.Module())
        made.get_submodule(parent).add_module(child, nn.Linear(4, 4, bias="up" in name))
    made.add_module("norm", nn.LayerNorm(4))
    return made


class LanguageModel(nn.Module):
    """Two blocks, an embedding, and a head that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.h = nn.ModuleList(block("attn.q_proj", "attn.k_proj", "mlp.up_proj", "mlp.down") for _ in range(2))
        self.score = nn.Linear(4, 6, bias=False)
        self.score.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.score


def classifier() -> nn.Module:
    """A model without the method, whose last layer is called as the head of others."""
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Linear(4, 2))


def with_lookalikes() -> nn.Module:
    """Modules that have the name of a target and are no linear layer, and names that only contain one."""
    made = block("attn.k_proj", "attn.my_k_proj", "k_proj.out")
    made.add_module("down", nn.Embedding(4, 4))
    made.add_module("lm_head", nn.Linear(4, 3))
    made.add_module("conv", nn.Conv1d(2, 2, 1))
    return made


MODELS: dict[str, Callable[[], nn.Module]] = {
    "a language model with a tied head": LanguageModel,
    "a classifier": classifier,
    "a model with similar names": with_lookalikes,
}


def run_add_lora(answer: Callable[..., Any], model: str, targets: Any) -> Any:
    """What of a model has changed, whether `answer` succeeds or raises a ValueError."""
    torch.manual_seed(0)
    made = MODELS[model]()
    before = dict(made.named_modules())
    parameters = dict(made.named_parameters())
    parameters[next(iter(parameters))].requires_grad_(False)
    calls: list[nn.Module] = []

    def make_layer(layer: nn.Linear) -> nn.Module:
        calls.append(layer)
        return Beside(layer)

    returned, error = None, ""
    try:
        returned = answer(made, targets, make_layer)
    except ValueError:
        error = "ValueError"
    now = dict(made.named_modules())
    placed = {name: module for name, module in now.items() if isinstance(module, Beside)}
    return {
        "error": error,
        "replaced": sorted(placed),
        "calls": len(calls),
        "contains": [placed[name].layer is before.get(name) for name in sorted(placed)],
        "others": all(now.get(name) is module for name, module in before.items() if name not in placed),
        "old parameters trained": sorted(name for name, p in parameters.items() if p.requires_grad),
        "new parameters trained": [placed[name].new.requires_grad for name in sorted(placed)],
        "returned": list(returned) if isinstance(returned, list | tuple) else returned,
    }
