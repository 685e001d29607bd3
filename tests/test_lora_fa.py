"""LoRA-FA: A stays, x is not kept, and what is saved is a LoRA."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lora_from_scratch.methods.lora import LoRA, LoRALinear, lora_layers
from lora_from_scratch.methods.lora_fa import LoRAFA
from lora_from_scratch.methods.registry import load_adapter
from tests.any_models import logits_of, model_of, randomise
from tests.test_dora import kept_bytes


def test_only_b_is_trained_and_a_is_the_one_that_lora_draws() -> None:
    model, other = model_of("gpt2"), model_of("gpt2")
    method = LoRAFA(rank=2, seed=3)
    method.adapt(model)
    LoRA(rank=2, seed=3).adapt(other)
    assert method.trainable(model)
    assert all(name.endswith(".lora_B") for name in method.trainable(model))
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.lora_A, lora_layers(other)[name].lora_A)


def test_the_gradient_of_b_is_loras() -> None:
    gradients: list[dict[str, Tensor]] = []
    for method in (LoRAFA(rank=2), LoRA(rank=2)):
        model = model_of("gpt2")
        method.adapt(model)
        randomise({name: p for name, p in method.trainable(model).items() if name.endswith("B")})
        logits_of(model, "gpt2").square().mean().backward()
        gradients.append(
            {n: p.grad for n, p in method.trainable(model).items() if n.endswith("B") and p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_of_the_input_a_layer_keeps_r_numbers_a_token_instead_of_all() -> None:
    x = torch.randn(50, 64, requires_grad=True)
    lora, fa = (
        LoRALinear(nn.Linear(64, 32).requires_grad_(False), 2),
        LoRALinear(nn.Linear(64, 32).requires_grad_(False), 2),
    )
    fa.lora_A.requires_grad_(False)
    assert kept_bytes(lora, x) - kept_bytes(fa, x) == x.nbytes
    assert kept_bytes(fa, x) <= 50 * 2 * 4 + 32 * 2 * 4


def test_its_directory_is_read_as_a_lora(tmp_path: Path) -> None:
    model, method = model_of("gpt2"), LoRAFA(rank=2)
    method.adapt(model)
    randomise(method.trainable(model))
    method.save(model, tmp_path)
    back = model_of("gpt2")
    assert type(load_adapter(back, tmp_path)) is LoRA
    assert torch.equal(logits_of(back, "gpt2"), logits_of(model, "gpt2"))
