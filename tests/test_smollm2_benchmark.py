"""The benchmark on SmolLM2: the page, the choice of a learning rate, and what rounding weights again does."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import smollm2
from benchmarks.smollm2_rates import best_rate
from benchmarks.smollm2_weights import block_weights, q4_1, round_again, steps
from lora_from_scratch.methods.lora import LoRA


class Blocks(nn.Module):
    """One linear layer of a block, under the name that a Llama gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(64, 48)})])})


def test_a_best_rate_at_the_edge_is_refused() -> None:
    losses: dict[str, float | None] = {"1e-03": 0.8, "3e-03": 0.7}
    with pytest.raises(ValueError, match="at the edge"):
        best_rate(losses)
    assert best_rate({**losses, "1e-02": None}) == 3e-3


def test_rounding_again_keeps_small_updates_out_and_large_ones_in() -> None:
    pytest.importorskip("gguf")
    torch.manual_seed(0)
    base = Blocks()
    (_, weight), *_ = block_weights(base)
    weight.copy_(q4_1(weight))
    step = float(steps(weight).mean())
    small, large = copy.deepcopy(base), copy.deepcopy(base)
    next(block_weights(small))[1].add_(0.05 * step * torch.randn(48, 64))
    next(block_weights(large))[1].add_(5 * step * torch.randn(48, 64))
    lost, kept = round_again(small, base), round_again(large, base)
    assert lost.below_half_a_step > 0.99
    assert lost.codes_changed < 0.02
    assert lost.error > 0.8  # what rounding adds is about minus the update
    assert lost.in_steps == pytest.approx(0.05, rel=0.2)
    assert kept.below_half_a_step < 0.2
    assert kept.codes_changed > 0.8
    assert kept.error < 0.2


def test_the_weights_of_an_adapted_model_have_the_names_of_the_base() -> None:
    base, adapted = Blocks(), Blocks()
    LoRA(rank=2).adapt(adapted)
    names = [[name for name, _ in block_weights(model)] for model in (base, adapted)]
    assert names[0] == names[1] == ["layers.0.q_proj.weight"]


def test_the_page_has_a_row_for_each_method_and_every_claim_is_a_recorded_number() -> None:
    document: dict[str, Any] = json.loads(smollm2.NUMBERS.read_text(encoding="utf-8"))
    text = smollm2.page(document)
    assert text == smollm2.PAGE.read_text(encoding="utf-8")
    for name, losses in document["rates"].items():
        assert f"\n| {name} " in text
        best_rate(losses)
    assert max(run["peak_bytes"] for run in document["runs"]) < 6 * 2**30
    assert "has no biases" in document["bitfit"]
