"""Adapters of several methods for a tiny model, as directories and merged, for the tests of serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.adalora import AdaLoRA
from lora_from_scratch.methods.dora import DoRA
from lora_from_scratch.methods.lora import LoRA, lora_layers
from lora_from_scratch.methods.lora_plus import LoRAPlus
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.pissa import PiSSA
from tests.helpers import tiny_model

METHODS: dict[str, Method] = {
    "king": LoRA(rank=2, alpha=4),
    "fox": LoRA(rank=3, alpha=7, targets=("c_attn",), rslora=True, seed=1),
    "dove": LoRA(rank=1, alpha=2, targets=("c_attn.q", "c_attn.v", "c_fc"), alpha_pattern={"c_fc": 5}, seed=2),
    "owl": LoRAPlus(rank=5, alpha=3, targets=("mlp.c_proj",), seed=3),
    "hare": DoRA(rank=2, alpha=4, targets=("c_attn", "mlp.c_proj"), seed=4),
    "mole": PiSSA(rank=2, alpha=2, targets=("c_fc",)),
    "wolf": LoRA(rank=1, alpha=3, rank_pattern={"h.1.attn.c_proj": 4}, targets=("attn.c_proj", "c_fc"), seed=5),
    "mouse": AdaLoRA(rank=2, target_rank=1, targets=("c_attn", "c_fc")),
}


def write_adapters(folder: Path, **changes: Any) -> dict[str, GPT2]:
    """Write each adapter as a directory in `folder`, with random numbers; return the model merged with each of them.

    Args:
        changes: of the model's configuration.
    """
    merged, base = {}, tiny_model(**changes)
    for seed, (name, method) in enumerate(METHODS.items()):
        method.adapt(base)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in method.trainable(base).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        method.save(base, folder / name)
        method.merge(base)
        merged[name] = tiny_model(**changes)
        for place, layer in lora_layers(base).items():
            merged[name].get_submodule(place).load_state_dict(layer.base.state_dict())
        method.undo(base)
    return merged
