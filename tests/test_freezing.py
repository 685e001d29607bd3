"""Freezing all but the last blocks, and the memory that what is trained costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_from_scratch.finetune.accounting import trainable_memory
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, next_token_loss
from lora_from_scratch.methods.full_finetuning import freeze_all_but_last
from tests.helpers import tiny_model


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_only_the_last_blocks_and_the_last_norm_move(layers: int) -> None:
    model = tiny_model(n_layer=3)
    model.transformer.h[2].requires_grad_(False)  # whatever was before
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    freeze_all_but_last(model, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    next_token_loss(model(torch.arange(8)[None]), torch.arange(8)[None]).backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    open_blocks = [f"transformer.h.{layer}." for layer in range(3)][3 - layers :]
    assert moved == {name for name in before if name.startswith((*open_blocks, "transformer.ln_f."))}


def test_the_last_two_blocks_of_gpt2_medium_are_the_papers_25_million() -> None:
    with torch.device("meta"):
        model = GPT2(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    freeze_all_but_last(model, 2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(trained / 1e6, 2) == 25.19  # Hu et al. 2021, table 3, FT-Top2


@pytest.mark.parametrize("layers", [-1, 4])
def test_blocks_that_there_are_not_are_refused_and_the_model_stays_as_it_was(layers: int) -> None:
    model = tiny_model(n_layer=3)
    with pytest.raises(ValueError, match="layers must be from 0 to 3"):
        freeze_all_but_last(model, layers)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_memory_is_what_the_gradients_and_the_state_of_adamw_hold(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5, bias=False), nn.Linear(5, 7)).to(dtype)
    model[2].weight = model[0].weight  # shared
    model[1].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 5, dtype=dtype)).sum().backward()
    optimizer.step()
    held = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert trainable_memory(model) == {
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(tensor.nbytes for tensor in held),
    }


def test_what_is_frozen_costs_nothing() -> None:
    assert trainable_memory(tiny_model().requires_grad_(False)) == {"gradients": 0, "optimizer": 0}
