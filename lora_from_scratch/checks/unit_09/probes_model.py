"""Unit 09, LoRA: what is observed of answers that look at a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.unit_09.probes import DTYPES
from lora_from_scratch.gpt2.model import Conv1D
from lora_from_scratch.methods.lora import FusedLoRALinear, LoRALinear

QKV = ("q", "k", "v")

# --- inject_lora -------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Small(nn.Module):
    """Two blocks and a head: names with dots, numbers in names, names without a dot, and one name that ends others."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.h = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x)
        for block in self.h:
            x = block(x)
        return self.head(x)


def run_inject(answer: Callable[..., Any], names: list[str], wrapped: bool, seed: int, x: Tensor) -> Any:
    """What the model computes afterwards, and which of its modules are new and which are old."""
    torch.manual_seed(seed)
    model = Small()
    before = dict(model.named_modules())
    layers: dict[str, nn.Module] = {}
    for name in names:
        old = before[name]
        assert isinstance(old, nn.Linear)
        layers[name] = lively_lora(old) if wrapped else nn.Linear(old.in_features, old.out_features)
    answer(model, dict(layers))
    there = dict(model.named_modules())
    return {
        "in its place": {name: there.get(name) is layer for name, layer in layers.items()},
        "as before": {name: there.get(name) is module for name, module in before.items() if name not in layers},
        "names": sorted(there),
        "y": model(x),
    }


def lively_lora(base: nn.Linear) -> LoRALinear:
    """A LoRA layer whose B is not zero."""
    layer = LoRALinear(base, 1)
    nn.init.normal_(layer.lora_B)
    return layer


# --- mark_only_lora_as_trainable, lora_state_dict ----------------------------------------------------


class Adapted(nn.Module):
    """LoRA layers among other layers, some of which only have similar names."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.h = nn.ModuleList([LoRALinear(nn.Linear(4, 4), 2), nn.Linear(4, 4)])
        self.exploration = nn.Linear(4, 3)
        self.lora_notes = nn.Linear(4, 2, bias=False)
        self.lora_A_scale = nn.Parameter(torch.ones(2))
        self.no_lora_B = nn.Parameter(torch.ones(2))
        self.held = nn.ModuleDict({"lora_A": nn.Linear(4, 2, bias=False)})
        if fused:
            self.c_attn = FusedLoRALinear(Conv1D(4, 12), ("q", "v"), QKV, rank=1)
        self.out = LoRALinear(Conv1D(4, 6), 1)


MAKES: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: LoRALinear(nn.Linear(3, 4), 2),
    "a list": lambda: nn.ModuleList([LoRALinear(nn.Linear(3, 3), 1), nn.LayerNorm(3), LoRALinear(Conv1D(3, 2), 1)]),
    "a model": lambda: Adapted(),
    "a model with a fused layer": lambda: Adapted(fused=True),
    "no LoRA": lambda: nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)),
}


def made_model(made: str, trained: str, seed: int, dtype: str = "float32") -> nn.Module:
    torch.manual_seed(seed)
    model = MAKES[made]().to(DTYPES[dtype])
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.normal_()
            parameter.requires_grad_(trained == "all" or (trained == "some" and place % 3 == 0))
    return model


def run_mark(answer: Callable[..., Any], made: str, trained: str, seed: int) -> Any:
    """Which parameters are trained afterwards, and whether their values are unchanged."""
    model = made_model(made, trained, seed)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    answer(model)
    return {
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "values as before": {name: torch.equal(p, before[name]) for name, p in model.named_parameters()},
    }


def run_state(answer: Callable[..., Any], made: str, trained: str, seed: int, dtype: str = "float32") -> Any:
    """The tensors by name and their order, which of them are in the graph, and whether the model is unchanged."""
    model = made_model(made, trained, seed, dtype)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    tensors = answer(model)
    if not isinstance(tensors, dict):
        return tensors
    return {
        "state": tensors,
        "order": list(map(str, tensors)),
        "dtypes": {str(name): str(getattr(t, "dtype", None)).removeprefix("torch.") for name, t in tensors.items()},
        "in the graph": sorted(str(name) for name, t in tensors.items() if getattr(t, "requires_grad", False)),
        "the model as before": flags == {name: p.requires_grad for name, p in model.named_parameters()},
    }
