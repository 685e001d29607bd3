"""The textbook arithmetic of fine-tuning, against real tensors, real optimisers, real files and papers' numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from lora_from_scratch.finetune.counting import (
    activation_bytes,
    checkpoint_bytes,
    count_parameters,
    tensor_bytes,
    training_memory,
)
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.lora import LoRA

GPT3 = {"n_layer": 96, "n_embd": 12288, "n_head": 96, "n_positions": 2048}  # Brown et al. 2020, table 2.1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float64]),
)
def test_a_tensors_bytes_are_pytorchs(shape: list[int], dtype: torch.dtype) -> None:
    assert tensor_bytes(shape, dtype.itemsize) == torch.empty(shape, dtype=dtype).nbytes


def tied_model() -> nn.Sequential:
    """An embedding of 7 x 4, a batch normalisation, and an output layer that is the embedding."""
    model = nn.Sequential(nn.Embedding(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 7))
    model[2].weight = model[0].weight
    return model


def test_a_shared_tensor_counts_once_and_a_buffer_not_at_all() -> None:
    assert count_parameters(tied_model()) == (28 + 8 + 7, 28 + 8 + 7)


def test_frozen_parameters_count_only_in_the_total() -> None:
    model = tied_model()
    model[0].requires_grad_(False)
    assert count_parameters(model) == (15, 43)


@pytest.mark.parametrize(
    ("layers", "width", "heads", "total", "trained"),
    [(12, 768, 12, 124_439_808, 147_456), (24, 1024, 16, 354_823_168, 393_216), (36, 1280, 20, 774_030_080, 737_280)],
)
def test_gpt2_and_lora_on_it_have_the_known_numbers_of_parameters(
    layers: int, width: int, heads: int, total: int, trained: int
) -> None:
    with torch.device("meta"):
        model = GPT2(GPT2Config(n_layer=layers, n_embd=width, n_head=heads))
    assert count_parameters(model) == (total, total)
    lora = LoRA(rank=4, targets=("c_attn.q", "c_attn.v"))
    lora.adapt(model)
    assert count_parameters(model) == (trained, total + trained)


def test_gpt3_costs_what_the_lora_paper_says() -> None:
    with torch.device("meta"):
        model = GPT2(GPT2Config(**GPT3))
    _, total = count_parameters(model)
    assert round(total / 1e9) == 175
    assert checkpoint_bytes(model.bfloat16()) == pytest.approx(350e9, rel=0.01)
    LoRA(rank=4, targets=("c_attn.q", "c_attn.v")).adapt(model)
    trained, _ = count_parameters(model)
    assert trained == 18_874_368  # printed as 18.9 M, or 18 M
    assert checkpoint_bytes(model, only_trained=True) == pytest.approx(35e6, rel=0.1)
    # 1.2 TB lies between two ways to count in 16 bits: without gradients and with them.
    full = training_memory(total, total, precision="bfloat16")
    assert full["weights"] + full["optimizer"] < 1.2e12 < sum(full.values())
    assert sum(training_memory(total, trained, precision="bfloat16").values()) == pytest.approx(350e9, rel=0.01)


def test_the_memory_of_training_is_what_pytorch_holds_after_a_step() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    model(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    trained, total = count_parameters(model)
    states = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert training_memory(total, trained, 12) == {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(t.nbytes for t in states),
        "activations": 12,
    }


@pytest.mark.parametrize(("precision", "bytes_each"), [("float32", 16), ("bfloat16", 8), ("mixed", 16)])
def test_a_trained_parameter_costs_as_many_bytes_as_zero_counts(precision: str, bytes_each: int) -> None:
    # Rajbhandari et al. 2020, section 3.1: "16 Psi bytes" in mixed precision.
    assert sum(training_memory(1000, 1000, precision=precision).values()) == 1000 * bytes_each


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="trained must be at most 10, the number of parameters, got 11"):
        training_memory(10, 11)
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, mixed, got 'int8'"):
        training_memory(10, 1, precision="int8")


@pytest.mark.parametrize(("heads", "width", "tokens", "attention"), [(96, 12288, 2048, 80), (128, 20480, 2048, 64)])
def test_activations_are_the_papers_formula(heads: int, width: int, tokens: int, attention: int) -> None:
    # Korthikanti et al. 2022: s b h (34 + 5 a s / h) a layer; section 5 says 80 for GPT-3 and 64 for MT-NLG.
    assert activation_bytes(3, tokens, width, heads, 7) == 7 * 3 * tokens * width * (34 + attention)


def test_a_checkpoint_is_as_large_as_the_file_but_for_its_header(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20).bfloat16())
    model[0].requires_grad_(False)
    for only_trained in (False, True):
        tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad or not only_trained}
        save_file(tensors, tmp_path / "model.safetensors")
        size = (tmp_path / "model.safetensors").stat().st_size
        assert 0 < size - checkpoint_bytes(model, only_trained) < 400


def test_a_checkpoint_holds_a_shared_tensor_once() -> None:
    assert checkpoint_bytes(tied_model()) == 4 * 43
