"""AdaLoRA: the schedule, the choice of triplets, and the same weights as peft's after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_from_scratch.methods.adalora import AdaLoRA, AdaLoRALinear
from lora_from_scratch.methods.registry import load_adapter
from tests.any_models import logits_of, model_of, weighted_mean

TARGETS = {"gpt2": ("c_attn", "mlp.c_proj"), "llama": ("q_proj", "down_proj")}


def method_and_config(kind: str, steps: int) -> tuple[AdaLoRA, Any]:
    """Ours and peft's, with 2 steps before and 3 after the ranks fall."""
    peft = pytest.importorskip("peft")
    ours = AdaLoRA(
        targets=TARGETS[kind],
        rank=4,
        target_rank=2,
        alpha=7,
        initial_share=2 / steps,
        final_share=3 / steps,
        interval=2,
        orthogonality=0.3,
    )
    theirs = peft.AdaLoraConfig(
        target_modules=list(TARGETS[kind]),
        init_r=4,
        target_r=2,
        lora_alpha=7,
        tinit=2,
        tfinal=3,
        deltaT=2,
        total_step=steps,
        orth_reg_weight=0.3,
        fan_in_fan_out=kind == "gpt2",
    )
    return ours, theirs


def penalty(model: Any) -> Any:
    """The penalty as peft adds it to the loss of a language model."""
    terms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            covariance = p @ p.T if "lora_A" in name else p.T @ p
            terms.append(torch.norm(covariance - torch.eye(len(covariance)), p="fro"))
    return 0.3 * sum(terms) / len(terms)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TARGETS)
def test_after_training_the_weights_are_pefts(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    steps = 12
    method, config = method_and_config(kind, steps)
    model = model_of(kind)
    method.adapt(model)
    method.save(model, tmp_path / "start")
    theirs = peft.get_peft_model(model_of(kind), config).eval()
    layers = method.layers(model)
    with torch.no_grad():
        for name, layer in layers.items():
            other = theirs.base_model.model.get_submodule(name)
            for part in ("lora_A", "lora_B", "lora_E"):
                getattr(other, part)["default"].copy_(getattr(layer, part))
    method.before_training(model, [], steps)
    one = torch.optim.AdamW(method.trainable(model).values(), lr=0.02)
    two = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    for step in range(1, steps + 1):
        extra = method.extra_loss(model)
        assert extra is not None
        torch.testing.assert_close(extra, penalty(theirs))
        (weighted_mean(logits_of(model, kind)) * 100 + extra).backward()
        (weighted_mean(logits_of(theirs, kind)) * 100 + penalty(theirs)).backward()
        one.step()
        two.step()
        method.after_step(model, step, one)
        theirs.base_model.update_and_allocate(step)
        one.zero_grad()
        two.zero_grad()
        for name, layer in layers.items():
            other = theirs.base_model.model.get_submodule(name)
            for part in ("lora_A", "lora_B", "lora_E"):
                torch.testing.assert_close(getattr(layer, part), getattr(other, part)["default"], atol=1e-5, rtol=1e-4)
    assert sum(method.ranks(model).values()) == 2 * len(layers)

    theirs.save_pretrained(str(tmp_path / "theirs"))  # without the triplets that were cut
    back = model_of(kind)
    load_adapter(back, tmp_path / "theirs")
    torch.testing.assert_close(logits_of(back, kind), logits_of(theirs, kind), atol=1e-5, rtol=1e-5)
    method.save(model, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(model_of(kind), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits_of(read, kind), logits_of(model, kind), atol=1e-5, rtol=1e-5)


@given(
    st.integers(1, 400), st.integers(1, 8), st.integers(1, 8), st.integers(1, 30), st.floats(0, 0.5), st.floats(0, 0.4)
)
def test_the_budget_falls_from_everything_to_the_target(
    steps: int, rank: int, target: int, matrices: int, initial: float, final: float
) -> None:
    method = AdaLoRA(rank=max(rank, target), target_rank=target, initial_share=initial, final_share=final)
    budgets = [method.budget(step, steps, matrices) for step in range(steps + 1)]
    first, last = method.phases(steps)
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == target * matrices
    assert all(budget == target * matrices for budget in budgets[last:])
    if last > first:
        assert all(budget == max(rank, target) * matrices for budget in budgets[: first + 1])


@pytest.mark.parametrize(("steps", "step", "left"), [(100, 10, 1.0), (100, 40, 0.125), (100, 70, 0.0)])
def test_the_budget_follows_the_cubic(steps: int, step: int, left: float) -> None:
    method = AdaLoRA(rank=12, target_rank=4, initial_share=0.1, final_share=0.3)
    assert method.budget(step, steps, 10) == int(80 * left) + 40


def test_exactly_the_budget_is_kept_even_when_all_triplets_are_equal() -> None:
    model = model_of("gpt2")
    method = AdaLoRA(targets=("c_attn",), rank=4, target_rank=1, orthogonality=0)
    method.adapt(model)
    method.before_training(model, [], 10)
    with torch.no_grad():
        for layer in method.layers(model).values():
            layer.lora_E.fill_(1.0)
    for parameter in method.trainable(model).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(method.trainable(model).values(), lr=0.0)
    for step in range(1, 11):
        method.after_step(model, step, optimizer)
    assert sum(method.ranks(model).values()) == 2


def test_a_triplet_that_was_cut_is_trained_and_can_come_back_before_the_last_phase() -> None:
    model = model_of("gpt2")
    method = AdaLoRA(targets=("h.0.attn.c_attn",), rank=2, target_rank=1, initial_share=0, final_share=0.3, interval=1)
    method.adapt(model)
    method.before_training(model, [], 10)
    (layer,) = method.layers(model).values()
    optimizer = torch.optim.SGD(method.trainable(model).values(), lr=0.0)

    def step(number: int, strong: int) -> None:
        with torch.no_grad():
            layer.lora_E.fill_(1.0)
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.grad = torch.zeros_like(parameter)
        layer.lora_E.grad = torch.zeros_like(layer.lora_E)
        layer.lora_E.grad[strong] = 100.0**number
        method.after_step(model, number, optimizer)

    step(5, strong=0)
    assert layer.lora_E.flatten().tolist() == [1, 0]
    step(6, strong=1)
    assert layer.lora_E.flatten().tolist() == [0, 1]
    step(8, strong=0)  # too late
    assert layer.lora_E.flatten().tolist() == [0, 1]


def test_the_layer_computes_the_equation() -> None:
    torch.manual_seed(0)
    layer = AdaLoRALinear(nn.Linear(5, 4), 3, 6.0, 0.0, torch.Generator().manual_seed(0))
    x = torch.randn(2, 5)
    assert torch.equal(layer(x), layer.base(x))
    with torch.no_grad():
        layer.lora_E.normal_()
    change = layer.lora_B @ torch.diag(layer.lora_E.flatten()) @ layer.lora_A * 6 / (3 + 1e-5)
    torch.testing.assert_close(layer(x), layer.base(x) + x @ change.T)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 4, "target_rank": 5}, "target_rank must be at most the rank of 4"),
        ({"initial_share": 0.5, "final_share": 0.5}, "below 1 together"),
        ({"interval": 0}, "interval must be a whole number of at least 1"),
        ({"targets": ("c_attn.q",)}, "adapts whole layers"),
    ],
    ids=str,
)
def test_bad_hyperparameters_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaLoRA(**fields).adapt(model_of("gpt2"))
