"""The protocol that every method keeps, tried on full fine-tuning and on LoRA."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from lora_from_scratch.methods.registry import METHODS, load_adapter, method_class
from torch import Tensor

from lora_from_scratch.gpt2.model import GPT2, GPT2Config, next_token_loss
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method, adaptation_of

TINY = GPT2Config(
    vocab_size=128, n_positions=64, n_embd=32, n_layer=2, n_head=4, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
)
METHODS_TRIED: list[Method] = [
    FullFineTuning(),
    LoRA(rank=3, dropout=0.1),
    LoRA(rank=2, targets=("c_attn.q", "c_attn.v")),
]
every_method = pytest.mark.parametrize("method", METHODS_TRIED, ids=["full", "lora", "lora on q and v"])


def tiny_gpt2(seed: int = 0) -> GPT2:
    torch.manual_seed(seed)
    return GPT2(TINY).eval()


def some_tokens(rows: int = 3, length: int = 12) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (rows, length), generator=torch.Generator().manual_seed(7))


def train(model: GPT2, method: Method, steps: int = 5, seed: int = 0) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(method.trainable(model).values(), lr=1e-2, weight_decay=0.1)
    tokens = some_tokens() if seed == 0 else some_tokens().flip(0, 1)
    model.train()
    for _ in range(steps):
        next_token_loss(model(tokens), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def snapshot(model: GPT2) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(now: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(now[name], tensor), name


@every_method
def test_nothing_changes_when_a_model_is_adapted(method: Method) -> None:
    model, tokens = tiny_gpt2(), some_tokens()
    before = model(tokens)
    method.adapt(model)
    assert torch.equal(model(tokens), before)


@every_method
def test_undo_gives_the_base_back_bit_for_bit_with_the_same_objects_and_flags(method: Method) -> None:
    model = tiny_gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    before, objects = snapshot(model), list(model.named_parameters())
    modules = [id(module) for module in model.modules()]
    method.adapt(model)
    train(model, method)
    model(some_tokens()).sum().backward()  # gradients are left behind as well
    method.undo(model)
    assert_same(snapshot(model), before)
    assert [(n, id(p)) for n, p in model.named_parameters()] == [(n, id(p)) for n, p in objects]
    assert [id(module) for module in model.modules()] == modules
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"transformer.wpe.weight"}
    assert all(p.grad is None for p in model.parameters())
    assert adaptation_of(model) is None
    method.adapt(model)  # and it can be adapted again


@every_method
def test_training_moves_all_that_is_trainable_and_not_one_bit_of_the_rest(method: Method) -> None:
    model = tiny_gpt2()
    method.adapt(model)
    before, names = snapshot(model), set(method.trainable(model))
    train(model, method, steps=20)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == names
    frozen = [p for name, p in model.named_parameters() if name not in names]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


@every_method
def test_what_was_learned_makes_another_copy_of_the_base_equal_bit_for_bit(method: Method, tmp_path: Path) -> None:
    pytest.importorskip("lora_from_scratch.gpt2.checkpoint")
    model, tokens = tiny_gpt2(), some_tokens()
    method.adapt(model)
    train(model, method)
    by_state, by_file = tiny_gpt2(), tiny_gpt2()
    method.adapt(by_state)
    method.load_state_dict(by_state, method.state_dict(model))
    assert torch.equal(by_state(tokens), model(tokens))
    method.save(model, tmp_path / "saved")
    loaded = load_adapter(by_file, tmp_path / "saved")
    assert torch.equal(by_file(tokens), model(tokens))
    loaded.undo(by_file)
    assert_same(snapshot(by_file), snapshot(tiny_gpt2()))


@every_method
def test_a_state_is_a_copy_and_loading_another_switches_the_task(method: Method) -> None:
    model, tokens = tiny_gpt2(), some_tokens()
    method.adapt(model)
    train(model, method, seed=0)
    first, first_logits = method.state_dict(model), model(tokens)
    train(model, method, seed=1)
    second, second_logits = method.state_dict(model), model(tokens)
    assert not torch.allclose(first_logits, second_logits, atol=1e-3)
    method.load_state_dict(model, first)
    assert torch.equal(model(tokens), first_logits)
    method.load_state_dict(model, second)
    assert torch.equal(model(tokens), second_logits)


@every_method
def test_an_optimiser_goes_on_with_a_state_that_was_loaded(method: Method) -> None:
    model = tiny_gpt2()
    method.adapt(model)
    before = method.trainable(model)
    method.load_state_dict(model, method.state_dict(model))
    after = method.trainable(model)
    assert all(before[name] is after[name] for name in before)


@every_method
def test_a_deep_copy_of_an_adapted_model_is_undone_by_itself(method: Method) -> None:
    model = tiny_gpt2()
    method.adapt(model)
    train(model, method)
    logits = model(some_tokens())
    twin = copy.deepcopy(model)
    method.undo(twin)
    assert_same(snapshot(twin), snapshot(tiny_gpt2()))
    assert torch.equal(model(some_tokens()), logits)


def test_a_model_is_not_adapted_twice() -> None:
    model = tiny_gpt2()
    LoRA(rank=2).adapt(model)
    with pytest.raises(ValueError, match=r"already adapted by LoRA\(rank=2.*undo"):
        FullFineTuning().adapt(model)


def test_a_method_refuses_a_model_that_another_one_adapted() -> None:
    model = tiny_gpt2()
    with pytest.raises(ValueError, match="not adapted"):
        LoRA().trainable(model)
    LoRA(rank=2).adapt(model)
    with pytest.raises(ValueError, match=r"adapted by LoRA\(rank=2.*not by LoRA\(rank=4"):
        LoRA(rank=4).state_dict(model)


def test_a_failed_adaptation_leaves_the_model_as_it_was() -> None:
    model = tiny_gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    names = [name for name, _ in model.named_modules()]
    for method in (LoRA(rank=33), LoRA(targets=("c_attn", "nothing")), LoRA(rank_pattern={"h.1.mlp.c_proj": 40})):
        with pytest.raises(ValueError):  # noqa: PT011
            method.adapt(model)
        assert [name for name, _ in model.named_modules()] == names
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"transformer.wpe.weight"}
        assert adaptation_of(model) is None


def test_a_state_that_does_not_fit_is_refused_by_name_and_nothing_is_loaded() -> None:
    model, method = tiny_gpt2(), LoRA(rank=2, targets=("c_attn",))
    method.adapt(model)
    before, good = snapshot(model), method.state_dict(model)
    a, b = "transformer.h.0.attn.c_attn.lora_A", "transformer.h.1.attn.c_attn.lora_B"
    with pytest.raises(ValueError, match=f"1 missing \\({a}\\)"):
        method.load_state_dict(model, {name: t + 1 for name, t in good.items() if name != a})
    with pytest.raises(ValueError, match=r"1 unexpected \(extra\)"):
        method.load_state_dict(model, {**{name: t + 1 for name, t in good.items()}, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"1 of another shape \\({b} \\(96, 3\\) instead of \\(96, 2\\)\\)"):
        method.load_state_dict(model, {**{name: t + 1 for name, t in good.items()}, b: torch.zeros(96, 3)})
    assert_same(snapshot(model), before)


def test_full_fine_tuning_trains_every_parameter_and_cannot_be_merged() -> None:
    model, method = tiny_gpt2(), FullFineTuning()
    model.transformer.wte.weight.requires_grad_(False)
    method.adapt(model)
    assert dict(model.named_parameters()).keys() == method.trainable(model).keys()
    with pytest.raises(ValueError, match="full cannot be merged"):
        method.merge(model)


def test_full_fine_tuning_without_a_copy_of_the_base_says_that_there_is_no_way_back() -> None:
    model, method = tiny_gpt2(), FullFineTuning(keep_base=False)
    method.adapt(model)
    record = adaptation_of(model)
    assert record is not None
    assert record.kept == {}
    with pytest.raises(ValueError, match="keep_base=False"):
        method.undo(model)
    assert adaptation_of(model) is record


def test_methods_are_found_by_name_and_an_unknown_name_lists_them() -> None:
    for name in METHODS:
        assert method_class(name).name == name
    with pytest.raises(ValueError, match="unknown method 'lorra'; the methods are full, lora"):
        method_class("lorra")
