"""Adapters that the real peft writes, one feature of its LoRA each: read exactly, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import adaptation_of
from lora_from_scratch.methods.registry import load_adapter
from tests.test_method import some_tokens, tiny_gpt2
from tests.test_peft_format import assert_close, hugging_face, read_by_peft

peft = pytest.importorskip("peft")

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "DoRA with rsLoRA on all layers": {"use_dora": True, "use_rslora": True, "target_modules": "all-linear"},
    "DoRA with patterns": {"use_dora": True, "rank_pattern": {"h.0.attn.c_attn": 3}, "alpha_pattern": {"h.1": 9}},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA with another scaling": {"init_lora_weights": "pissa", "lora_alpha": 5, "target_modules": ["c_proj"]},
    "Gaussian start": {"init_lora_weights": "gaussian"},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "MiCA": {"init_lora_weights": "mica"},
    "all biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "biases and DoRA": {"bias": "lora_only", "use_dora": True},
    "a bias of B": {"lora_bias": True},
    "a bias of B and biases": {"lora_bias": True, "bias": "lora_only"},
    "excluded modules": {"target_modules": ["c_attn", "c_proj"], "exclude_modules": ["mlp.c_proj"]},
    "an excluded pattern": {"exclude_modules": r".*h\.0\..*"},
    "layers to transform": {"layers_to_transform": [1]},
    "a layer to transform": {"layers_to_transform": 0},
    "layers pattern": {"layers_to_transform": [1], "layers_pattern": "h"},
    "layers patterns": {"layers_to_transform": 1, "layers_pattern": ["layer", "h"]},
    "layers and a rank of a layer left out": {"layers_to_transform": [0], "rank_pattern": {"h.1.attn.c_attn": 3}},
    "rank pattern": {"rank_pattern": {"h.0.attn.c_attn": 3}},
    "alpha pattern": {"alpha_pattern": {"h.0.attn.c_attn": 3}},
    "rank pattern that matches nothing": {"rank_pattern": {"q_proj": 3}},
    "alpha pattern that matches nothing": {"alpha_pattern": {"lm_head": 3}},
    "rank pattern with an anchor": {"rank_pattern": {"^h.0.attn.c_attn": 3}},
    "a target that matches nothing": {"target_modules": ["c_attn", "q_proj"]},
    "a regular expression": {"target_modules": r".*\.h\.[01]\..*c_attn"},
    "all linear layers": {"target_modules": "all-linear"},
    "a trained normalisation": {"modules_to_save": ["ln_f"]},
    "a trained embedding": {"modules_to_save": ["wte"]},
    "trained positions": {"modules_to_save": ["wpe"]},
    "a trained MLP": {"modules_to_save": ["mlp"], "target_modules": ["c_attn", "c_proj"]},
    "a LoRA on the token embedding": {"target_modules": ["c_attn", "wte"]},
    "a LoRA on the positions": {"target_modules": ["c_attn", "wpe"]},
    "trained tokens": {"trainable_token_indices": [3, 0]},
    "trained tokens by name": {"trainable_token_indices": {"wte": [4]}},
    "alpha 0": {"lora_alpha": 0},
    "a negative alpha": {"lora_alpha": -3},
    "a fraction for alpha": {"lora_alpha": 2.5},
    "a negative alpha in a pattern": {"alpha_pattern": {"h.0": -2.0}, "use_rslora": True},
    "a rank above the smaller side": {"r": 100, "lora_alpha": 100},
    "a rank above the smaller side in rsLoRA": {"r": 100, "use_rslora": True, "target_modules": ["mlp.c_proj", "c_fc"]},
    "dropout": {"lora_dropout": 0.3},
    "dropout of everything": {"lora_dropout": 1.0},
    "QA-LoRA, which peft ignores here": {"use_qalora": True},
    "feature extraction": {"task_type": "FEATURE_EXTRACTION"},
    "no task": {"task_type": None},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an adapted output head": ({"target_modules": ["c_attn", "lm_head"]}, r"unexpected \(lm_head\.lora_A"),
    "a trained output head": ({"modules_to_save": ["lm_head"]}, "lm_head"),
    "tied weights": ({"modules_to_save": ["wte"], "ensure_weight_tying": True}, "ensure_weight_tying"),
    "OLoRA on a Conv1D": ({"init_lora_weights": "olora", "target_modules": ["attn.c_proj"]}, "olora"),
    "activated LoRA": ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
}
# PiSSA by a random SVD: peft draws it again when it loads, so the file alone does not say what the adapter computes.
REFUSED["PiSSA by a random SVD"] = ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4")


def written_by_peft(directory: Path, **fields: Any) -> None:
    """An adapter of peft on a tiny GPT-2, with random values for everything that is trained."""
    usual = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    config = peft.LoraConfig(**usual | {"init_lora_weights": False} | fields)
    model = peft.get_peft_model(hugging_face(tiny_gpt2()), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(directory))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields", FEATURES.values(), ids=FEATURES.keys())
def test_an_adapter_of_peft_is_read_and_travels_back(fields: dict[str, Any], tmp_path: Path) -> None:
    written_by_peft(tmp_path / "theirs", **fields)
    theirs = read_by_peft(tiny_gpt2(), tmp_path / "theirs")
    model = tiny_gpt2()
    method = load_adapter(model, tmp_path / "theirs")
    tokens = some_tokens()
    assert_close(model(tokens), theirs(tokens).logits)
    if fields != {"lora_alpha": 0}:
        assert not torch.allclose(model(tokens), tiny_gpt2()(tokens), atol=1e-3)

    method.save(model, tmp_path / "ours")
    assert_close(read_by_peft(tiny_gpt2(), tmp_path / "ours")(tokens).logits, model(tokens))
    again = tiny_gpt2()
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("fields", "name"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_read_is_refused_by_name_and_the_model_stays_as_it_was(
    fields: dict[str, Any], name: str, tmp_path: Path
) -> None:
    written_by_peft(tmp_path, **fields)
    model = tiny_gpt2()
    with pytest.raises(ValueError, match=name) as raised:
        load_adapter(model, tmp_path)
    assert "\n" not in str(raised.value)
    assert adaptation_of(model) is None
    assert torch.equal(model(some_tokens()), tiny_gpt2()(some_tokens()))


@pytest.mark.parametrize(
    "fields",
    [
        {"targets": ("c_attn", "q_proj")},
        {"rank_pattern": {"q_proj": 2}},
        {"modules_to_save": ("lm_head",)},
        {"trainable_token_indices": (10**6,)},
    ],
    ids=str,
)
def test_what_a_person_types_has_to_match_something(fields: dict[str, Any]) -> None:
    model = tiny_gpt2()
    with pytest.raises(ValueError, match=r"matches no|no such module|must be from 0"):
        LoRA(**fields).adapt(model)
    assert adaptation_of(model) is None


def test_a_trained_embedding_that_is_tied_cannot_be_merged() -> None:
    model = tiny_gpt2()
    method = LoRA(modules_to_save=("wte",))
    method.adapt(model)
    with pytest.raises(ValueError, match=r"cannot merge the trained transformer\.wte"):
        method.merge(model)
