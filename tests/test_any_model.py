"""LoRA on models that are not ours, against peft: logits, gradients, which layers, and files in both directions."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_from_scratch.methods.adapter_files import CONFIG_FILE
from lora_from_scratch.methods.lora import LoRA, lora_layers
from lora_from_scratch.methods.method import adaptation_of
from lora_from_scratch.methods.placement import find_targets
from lora_from_scratch.methods.registry import load_adapter
from tests.any_models import ARCHITECTURES, inputs_of, logits_of, model_of, randomise, weighted_mean
from tests.test_method import assert_same, snapshot

EVERY = [*ARCHITECTURES, "mlp"]
TASK_TYPES = dict.fromkeys(["gpt2", "llama", "qwen2", "gpt-neox"], "CAUSAL_LM") | {
    "vit": None,
    "mlp": None,
    "t5": "SEQ_2_SEQ_LM",
    "gpt2 classifier": "SEQ_CLS",
    "bert": "SEQ_CLS",
}
NAMED = {  # some layers by name
    "gpt2": ("c_attn", "mlp.c_proj"),
    "llama": ("q_proj", "down_proj"),
    "qwen2": ("q_proj", "k_proj", "up_proj"),
    "gpt-neox": ("query_key_value", "dense_4h_to_h"),
    "vit": ("q_proj", "fc1", "classifier"),
    "mlp": ("0", "4"),
    "t5": ("q", "wo"),
}
every_model = pytest.mark.parametrize("kind", EVERY)


def with_peft(kind: str, method: LoRA) -> Any:
    """peft's LoRA with the same hyperparameters and random A and B."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        target_modules=method.targets if isinstance(method.targets, str) else list(method.targets),
        use_rslora=method.rslora,
        fan_in_fan_out=kind.startswith("gpt2"),
        task_type=TASK_TYPES[kind],
    )
    model = peft.get_peft_model(model_of(kind), config).eval()
    randomise({name: p for name, p in model.named_parameters() if p.requires_grad}, seed=2)
    return model


def read_by_peft(kind: str, directory: Path) -> Any:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)  # "found missing adapter keys", another `fan_in_fan_out`
        return peft.PeftModel.from_pretrained(model_of(kind), str(directory), is_trainable=True).eval()


def adapted(kind: str, method: LoRA) -> Any:
    """With random A and B."""
    model = model_of(kind)
    method.adapt(model)
    randomise(method.trainable(model))
    return model


def assert_equal(model: Any, method: LoRA, theirs: Any, kind: str) -> None:
    """Logits, and the gradient of every trained tensor, within 1e-5."""
    logits, expected = logits_of(model, kind), logits_of(theirs, kind)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    weighted_mean(logits).backward()
    weighted_mean(expected).backward()
    gradients = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    ours = method.trainable(model)
    assert ours.keys() == gradients.keys()
    for name, parameter in ours.items():
        assert parameter.grad is not None
        largest = float(gradients[name].abs().max())
        assert largest > 0, name
        difference = float((parameter.grad - gradients[name]).abs().max())
        assert difference <= min(1e-5, 1e-3 * largest), (name, difference, largest)


# --- The same function as peft's ---------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", [*EVERY, "t5"])
def test_logits_and_gradients_equal_pefts_and_adapters_travel_both_ways(
    kind: str, rslora: bool, tmp_path: Path
) -> None:
    method = LoRA(rank=2, alpha=6, targets=NAMED[kind], rslora=rslora)
    model = adapted(kind, method)
    assert not torch.allclose(logits_of(model, kind), logits_of(model_of(kind), kind), atol=0.01)
    method.save(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG_FILE).read_text()).get("task_type") == TASK_TYPES[kind]
    assert_equal(model, method, read_by_peft(kind, tmp_path / "ours"), kind)

    theirs = with_peft(kind, method)
    theirs.save_pretrained(tmp_path / "theirs")
    back = model_of(kind)
    read = load_adapter(back, tmp_path / "theirs")
    assert isinstance(read, LoRA)
    assert_equal(back, read, theirs, kind)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "vit", "mlp", "gpt2 classifier", "bert"])
def test_an_adapter_of_all_linear_layers_has_the_same_logits_in_peft(kind: str, tmp_path: Path) -> None:
    method = LoRA(rank=2, targets="all-linear")
    model = adapted(kind, method)
    method.save(model, tmp_path / "ours")
    assert_equal(model, method, read_by_peft(kind, tmp_path / "ours"), kind)
    if TASK_TYPES[kind] != "SEQ_CLS":  # peft trains the classifier too
        theirs, back = with_peft(kind, method), model_of(kind)
        theirs.save_pretrained(tmp_path / "theirs")
        assert_equal(back, load_adapter(back, tmp_path / "theirs"), theirs, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", TASK_TYPES)
def test_all_linear_means_the_layers_that_it_means_in_peft(kind: str) -> None:
    theirs = with_peft(kind, LoRA(rank=1, targets="all-linear"))
    names = [name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")]
    assert list(find_targets(model_of(kind), "all-linear")) == names


def test_q_and_v_of_the_fused_matrix_of_another_gpt2_are_an_equal_lora_in_peft(tmp_path: Path) -> None:
    method = LoRA(rank=2, alpha=6, targets=("c_attn.q", "c_attn.v"))
    model = adapted("gpt2", method)
    method.save(model, tmp_path)
    theirs = read_by_peft("gpt2", tmp_path)
    torch.testing.assert_close(logits_of(model, "gpt2"), logits_of(theirs, "gpt2"), atol=1e-5, rtol=1e-5)


# --- The laws of our own model --------------------------------------------------------------------------------


@every_model
def test_a_new_lora_changes_nothing_by_one_bit(kind: str) -> None:
    model, before = model_of(kind), logits_of(model_of(kind), kind)
    LoRA(rank=2, targets="all-linear").adapt(model)
    assert torch.equal(logits_of(model, kind), before)


@every_model
def test_merging_keeps_the_function_and_unmerging_and_undoing_give_every_bit_back(kind: str) -> None:
    method = LoRA(rank=2, alpha=6, targets="all-linear")
    model, base = adapted(kind, method), model_of(kind)
    modules, flags = dict(base.named_modules()), {n: p.requires_grad for n, p in base.named_parameters()}
    before, logits = snapshot(model), logits_of(model, kind)
    method.merge(model)
    torch.testing.assert_close(logits_of(model, kind), logits, atol=1e-4, rtol=1e-4)
    method.unmerge(model)
    assert_same(snapshot(model), before)
    assert torch.equal(logits_of(model, kind), logits)
    method.merge(model)
    method.undo(model)
    assert_same(snapshot(model), snapshot(base))
    assert {name: type(module) for name, module in model.named_modules()} == {n: type(m) for n, m in modules.items()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(logits_of(model, kind), logits_of(base, kind))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_merged_copy_is_a_plain_model_that_transformers_saves_and_loads(kind: str, tmp_path: Path) -> None:
    method = LoRA(rank=2, alpha=6, targets="all-linear")
    model = adapted(kind, method)
    logits = logits_of(model, kind)
    plain = method.merged_copy(model)
    assert torch.equal(logits_of(model, kind), logits)
    assert adaptation_of(plain) is None
    assert not lora_layers(plain)
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == model_of(kind).state_dict().keys()
    assert torch.equal(logits_of(again, kind), logits_of(plain, kind))
    torch.testing.assert_close(logits_of(again, kind), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "mlp"])
def test_what_is_saved_and_loaded_is_the_same_method_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    method = LoRA(rank=2, alpha=6, targets="all-linear")
    model, back = adapted(kind, method), model_of(kind)
    method.save(model, tmp_path)
    assert load_adapter(back, tmp_path) == method
    assert torch.equal(logits_of(back, kind), logits_of(model, kind))


def test_only_what_is_learned_moves_in_training() -> None:
    method = LoRA(rank=2, targets="all-linear")
    model = model_of("llama")
    method.adapt(model)
    before, learned = snapshot(model), method.trainable(model)
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-2)
    for _ in range(3):
        tokens = inputs_of("llama")["input_ids"]
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, before[name])}
    assert moved == set(learned)


# --- Models that do not fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt-neox", "vit", "mlp"])
def test_targets_that_a_model_does_not_have_are_refused_in_one_line_with_those_that_it_has(kind: str) -> None:
    model = model_of(kind)
    with pytest.raises(
        ValueError, match=r"'c_attn' matches nothing; the model has (\w|[.()])+, .*targets='all-linear'"
    ) as error:
        LoRA(targets=("c_attn",)).adapt(model)
    assert "\n" not in str(error.value)
    assert adaptation_of(model) is None
    assert_same(snapshot(model), snapshot(model_of(kind)))


def test_a_model_without_linear_layers_is_refused() -> None:
    for model in (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.LayerNorm(4)):
        with pytest.raises(ValueError, match=r"'all-linear' matches nothing; the model has no linear layers$"):
            LoRA(targets="all-linear").adapt(model)


def test_an_adapter_of_another_architecture_is_refused_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    method = LoRA(rank=2, targets=("q_proj",))
    method.save(adapted("llama", method), tmp_path)
    for kind in ("gpt2", "gpt-neox", "vit"):
        model = model_of(kind)
        with pytest.raises(ValueError, match=r"matches nothing|were they made for another one") as error:
            load_adapter(model, tmp_path)
        assert "\n" not in str(error.value)
        assert_same(snapshot(model), snapshot(model_of(kind)))


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_head_that_is_the_embedding_too_is_adapted_when_named_and_never_merged(kind: str) -> None:
    method = LoRA(rank=2, targets=("lm_head",))
    model = adapted(kind, method)
    before = logits_of(model, kind)
    with pytest.raises(ValueError, match=r"cannot merge into lm_head: .*(wte|embed_tokens).weight is the same tensor"):
        method.merge(model)
    assert torch.equal(logits_of(model, kind), before)
    method.undo(model)
    assert torch.equal(logits_of(model, kind), logits_of(model_of(kind), kind))


def test_a_lora_in_pytorchs_own_transformer_is_not_passed_over_in_eval_mode() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    model, x = copy.deepcopy(base), torch.randn(2, 5, 16)
    method = LoRA(rank=2, targets="all-linear")
    method.adapt(model)
    assert [name.rpartition(".")[2] for name in lora_layers(model)] == ["linear1", "linear2"] * 2
    randomise(method.trainable(model))
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(y, model.train()(x))
        torch.testing.assert_close(y, method.merged_copy(model.eval())(x))
        assert not torch.allclose(y, base(x), atol=0.01)
        method.undo(model)
        assert torch.equal(model(x), base(x))


def test_lora_is_imported_without_transformers_and_peft() -> None:
    code = "import sys, lora_from_scratch.methods.lora as _; print({'transformers', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
