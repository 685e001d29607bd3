"""Checkpoints that are damaged or belong to another model: what is wrong is named, in one line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_from_scratch.gpt2.checkpoint import load_gpt2, load_model, save_gpt2
from tests.checkpoints import assert_same_model
from tests.helpers import tiny_model

Weights = dict[str, Tensor]


def without(weights: Weights, name: str) -> Weights:
    return {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: without(w, "transformer.h.1.attn.c_attn.bias"), r"missing: transformer\.h\.1\.attn\.c_attn\.bias"),
        (lambda w: {"transformer.ln_f.bias": w["transformer.ln_f.bias"]}, r"missing: .* and 23 more"),
        (lambda w: w | {"score.weight": torch.ones(2)}, r"unexpected: transformer\.score\.weight"),
        (
            lambda w: w | {"transformer.ln_f.bias": torch.ones(25)},
            r"wrong shape: transformer\.ln_f\.bias \(25,\) instead of \(24,\)",
        ),
        (
            lambda w: w | {"transformer.ln_f.bias": torch.ones(24, dtype=torch.int8)},
            r"not floating-point: transformer\.ln_f\.bias",
        ),
        (
            lambda w: w | {"lm_head.weight": w["transformer.wte.weight"] + 1},
            r"lm_head\.weight that differs",
        ),
        (lambda w: w | {"wte.weight": w["transformer.wte.weight"].clone()}, r"contain transformer\.wte\.weight twice"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved: Path, change: Callable[[Weights], Weights], message: str) -> None:
    save_file(change(load_file(saved / "model.safetensors")), saved / "model.safetensors")
    with pytest.raises(ValueError, match=message) as raised:
        load_gpt2(saved)
    assert "\n" not in str(raised.value)


def test_a_file_without_tensors_is_named(saved: Path) -> None:
    save_file({}, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"there are no tensors in .*model\.safetensors"):
        load_gpt2(saved)


def test_a_head_equal_to_the_embedding_is_accepted(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()}, saved / "model.safetensors")
    assert_same_model(load_model(saved), tiny_model(vocab_size=300))


def as_bin(directory: Path, content: Any) -> Path:
    (directory / "model.safetensors").unlink()
    torch.save(content, directory / "pytorch_model.bin")
    return directory / "pytorch_model.bin"


@pytest.mark.parametrize("kept", [0, 7, 100, 5000, -1])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_weight_file_that_is_cut_short_is_a_value_error_of_one_line(saved: Path, kind: str, kept: int) -> None:
    if kind == "pytorch_model.bin":
        as_bin(saved, load_file(saved / "model.safetensors"))
    (saved / kind).write_bytes((saved / kind).read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{kind} is damaged") as raised:
        load_gpt2(saved)
    assert "\n" not in str(raised.value)


def test_a_weight_file_of_noise_is_a_value_error(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(bytes(range(256)) * 20)
    with pytest.raises(ValueError, match="is damaged"):
        load_gpt2(saved)


class Bomb:
    """A pickle that runs code when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the pickle ran its code",))


@pytest.mark.parametrize("plain", [False, True])
def test_a_bin_file_never_runs_code(saved: Path, plain: bool) -> None:
    path = as_bin(saved, {"wte.weight": Bomb()})
    if plain:
        path.write_bytes(pickle.dumps({"wte.weight": Bomb()}, protocol=2))
    with pytest.raises(ValueError, match=r"refused for safety|is damaged"):
        load_gpt2(saved)


@pytest.mark.parametrize("content", [[1, 2], {"wte.weight": 3}], ids=str)
def test_a_bin_file_without_named_tensors_is_a_value_error(saved: Path, content: Any) -> None:
    as_bin(saved, content)
    with pytest.raises(ValueError, match="does not contain named tensors"):
        load_gpt2(saved)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ("{", ValueError, "not the index of a sharded checkpoint"),
        ("[]", ValueError, "not the index of a sharded checkpoint"),
        ('{"weight_map": {"a": 3}}', ValueError, "names 3, which is not a file in the same directory"),
        ('{"weight_map": {"a": "../other.safetensors"}}', ValueError, "not a file in the same directory"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', FileNotFoundError, "model-00001-of-00002"),
    ],
)
def test_a_damaged_index_or_a_missing_shard_is_named(
    saved: Path, index: str, error: type[Exception], message: str
) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(index)
    with pytest.raises(error, match=message):
        load_gpt2(saved)


@pytest.mark.parametrize(
    ("remove", "message"),
    [("config.json", "no config.json"), ("model.safetensors", "no weights"), ("vocab.json", "vocab.json missing")],
)
def test_a_missing_file_is_named(saved: Path, remove: str, message: str) -> None:
    (saved / remove).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load_gpt2(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type must be 'gpt2', got 'llama'"),
        ({"n_head": 5}, "multiple of n_head"),
        ({"n_layer": 3}, r"missing: transformer\.h\.2\."),
        ({"n_embd": 12}, "wrong shape"),
        ({"scale_attn_by_inverse_layer_idx": True}, "not supported"),
    ],
)
def test_a_configuration_of_another_model_is_a_value_error(saved: Path, changes: dict[str, Any], message: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        load_gpt2(saved)


def test_a_tokenizer_with_more_tokens_than_the_model_knows_is_a_value_error(saved: Path) -> None:
    save_gpt2(tiny_model(vocab_size=100), None, saved)
    with pytest.raises(ValueError, match=r"has \d+ tokens, more than the model's vocabulary of 100"):
        load_gpt2(saved)
