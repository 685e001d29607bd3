"""Many LoRAs in one batch: each row as if its adapter were alone; and where what is given does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.adapters import Adapter
from lora_from_scratch.methods.lora import LoRA, delta_weight
from lora_from_scratch.serving.batched_lora import (
    BatchedLoRALinear,
    Factors,
    ServedAdapters,
    batched_lora,
    lora_factors,
    read_lora,
    switch_task,
)
from tests.helpers import tiny_model, transformers_twin
from tests.test_lora import randomise
from tests.test_method import assert_same, snapshot

few = settings(max_examples=25, deadline=None)

METHODS = {
    "king": LoRA(rank=2, alpha=4),
    "fox": LoRA(rank=3, alpha=7, targets=("c_attn",), rslora=True, seed=1),
    "dove": LoRA(rank=1, alpha=2, targets=("c_attn.q", "c_attn.v", "c_fc"), alpha_pattern={"c_fc": 5}, seed=2),
}


def tokens(rows: int = 5, length: int = 7) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(7))


def adapted(name: str) -> GPT2:
    """The base model with one adapter, whose A and B are random."""
    model = tiny_model()
    METHODS[name].adapt(model)
    torch.manual_seed(METHODS[name].seed)
    randomise(model)
    return model


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    places = {name: tmp_path_factory.mktemp(name) for name in METHODS}
    for name, place in places.items():
        METHODS[name].save(adapted(name), place)
    return places


def served(directories: dict[str, Path]) -> tuple[GPT2, ServedAdapters]:
    model = tiny_model()
    return model, ServedAdapters(model, {name: read_lora(model, place) for name, place in directories.items()})


# --- One at a time ---------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 99))
@few
def test_batched_adapters_equal_one_at_a_time(rows: int, adapters: int, length: int, each: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, index = torch.randn(rows, length, 7), torch.randint(-1, adapters, (rows,))
    A, B = torch.randn(adapters, 2, 7), torch.randn(adapters, 5, 2)
    scaling = torch.rand(adapters) if each else 0.5
    result = batched_lora(x, A, B, scaling, index)
    assert result.shape == (rows, length, 5)
    for row, adapter in enumerate(index.tolist()):
        s = float(scaling[adapter]) if isinstance(scaling, Tensor) else scaling
        alone = x[row] @ delta_weight(A[adapter], B[adapter], s).T if adapter >= 0 else torch.zeros(length, 5)
        torch.testing.assert_close(result[row], alone, atol=1e-5, rtol=1e-5)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 99))
@few
def test_a_layer_takes_adapters_of_different_ranks_and_some_that_leave_it_alone(
    ranks: list[int], rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    ranks[seed % len(ranks)] = 1  # at least one has something to do here
    adapters = [(torch.randn(r, 6), torch.randn(4, r)) if r else None for r in ranks]
    layer, x = BatchedLoRALinear(torch.nn.Linear(6, 4), adapters), torch.randn(rows, 2, 6)
    assert torch.equal(layer(x), layer.base(x))
    layer.adapter_index = torch.randint(-1, len(ranks), (rows,))
    for row, number in enumerate(layer.adapter_index.tolist()):
        factors = adapters[number] if number >= 0 else None
        change = x[row] @ (factors[1] @ factors[0]).T if factors else 0
        torch.testing.assert_close(layer(x)[row], layer.base(x)[row] + change, atol=1e-5, rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from([*METHODS, None]), min_size=1, max_size=6))
def test_each_row_of_a_served_model_is_as_if_its_adapter_were_alone(
    directories: dict[str, Path], names: list[str | None]
) -> None:
    model, adapters = served(directories)
    with adapters.rows(names), torch.no_grad():
        together = model(tokens(len(names)))
    for row, name in enumerate(names):
        alone = (adapted(name) if name else tiny_model())(tokens(len(names))[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_a_mixed_batch_is_continued_as_each_prompt_by_its_own_adapter(directories: dict[str, Path]) -> None:
    names: list[str | None] = ["dove", None, "king", "fox", "king"]
    prompts = [row[: 2 + number].tolist() for number, row in enumerate(tokens())]
    model, adapters = served(directories)
    with adapters.rows(names):
        together = generate(model, prompts, max_new_tokens=8)
    for name, prompt, text in zip(names, prompts, together, strict=True):
        assert generate(adapted(name) if name else tiny_model(), [prompt], max_new_tokens=8) == [text]


def test_outside_of_rows_and_after_removing_the_model_is_the_base_bit_for_bit(directories: dict[str, Path]) -> None:
    model = tiny_model()
    before, modules = snapshot(model), [id(module) for module in model.modules()]
    adapters = ServedAdapters(model, {name: read_lora(model, place) for name, place in directories.items()})
    with adapters.rows(["king"] * 5):
        assert not torch.allclose(model(tokens()), tiny_model()(tokens()), atol=1e-3)
    assert torch.equal(model(tokens()), tiny_model()(tokens()))
    for _ in range(2):
        adapters.remove()
    assert_same(snapshot(model), before)
    assert [id(module) for module in model.modules()] == modules


def test_a_mixed_batch_equals_pefts(directories: dict[str, Path]) -> None:
    peft: Any = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(transformers_twin(tiny_model()), directories["king"], adapter_name="king")
    theirs.load_adapter(directories["fox"], adapter_name="fox")
    theirs.eval()
    names = ["king", None, "fox", "fox", "king"]
    expected = theirs(tokens(), adapter_names=[name or "__base__" for name in names]).logits
    model, adapters = served(directories)
    with adapters.rows(names):
        torch.testing.assert_close(model(tokens()), expected, atol=1e-5, rtol=1e-5)


# --- One after the other -----------------------------------------------------------------------------------


def test_a_switched_model_is_the_one_that_is_adapted_and_merged(directories: dict[str, Path]) -> None:
    model = tiny_model()
    parameters = {name: id(p) for name, p in model.named_parameters()}
    factors: dict[str, Factors] = {"": {}}
    factors |= {name: read_lora(tiny_model(), place) for name, place in directories.items()}
    now = ""
    for name in ("king", "fox", "", "dove", "king"):
        switch_task(model, factors[now], factors[name])
        now = name
        expected = adapted(name) if name else tiny_model()
        torch.testing.assert_close(model(tokens()), expected(tokens()), atol=1e-4, rtol=1e-4)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


def test_a_switch_that_does_not_fit_changes_nothing() -> None:
    model, good = tiny_model(), lora_factors(adapted("king"))
    before = snapshot(model)
    A, B = next(iter(good.values()))
    for bad in ({"transformer.h.9.attn.c_attn": (A, B)}, {next(iter(good)): (A[:, 1:], B)}):
        for old, new in ((good, good | bad), (bad, good)):
            with pytest.raises(ValueError, match=r"adapter '(old|new)' is for a"):
                switch_task(model, old, new)
    assert_same(snapshot(model), before)


# --- What does not fit -----------------------------------------------------------------------------------


def test_an_unknown_name_and_a_batch_of_another_size_are_refused(directories: dict[str, Path]) -> None:
    model, adapters = served(directories)
    with pytest.raises(ValueError, match="no adapter 'wolf'; there are king, fox, dove"), adapters.rows(["wolf"]):
        pass
    with adapters.rows(["king", "fox"]), pytest.raises(ValueError, match="must have 2 rows, one for each name, got 5"):
        model(tokens())
    assert torch.equal(model(tokens()), tiny_model()(tokens()))


def test_what_cannot_be_served_is_named_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    A, B = torch.ones(2, 24), torch.ones(72, 2)
    cases: list[tuple[dict[str, Factors], str]] = [
        ({}, "at least one LoRA, got none"),
        ({"king": {"transformer.h.9.attn.c_attn": (A, B)}}, "'king' is for a layer transformer.h.9.attn.c_attn, which"),
        ({"king": {"transformer.h.1.attn.c_attn": (A[:, 1:], B)}}, "of 23 to 72 features; this model's has 24 to 72"),
    ]
    model = tiny_model()
    modules = [id(module) for module in model.modules()]
    for factors, message in cases:
        with pytest.raises(ValueError, match=message):
            ServedAdapters(model, factors)
    Adapter(width=2).save(_adapted_by(Adapter(width=2)), tmp_path)
    with pytest.raises(ValueError, match=r"must hold a LoRA, got one of the method adapter"):
        read_lora(model, tmp_path)
    assert [id(module) for module in model.modules()] == modules
    with pytest.raises(ValueError, match=r"adapted by LoRA\(rank=2.*; undo that first"):
        ServedAdapters(adapted("king"), {})


def _adapted_by(method: Adapter) -> GPT2:
    model = tiny_model()
    method.adapt(model)
    return model
