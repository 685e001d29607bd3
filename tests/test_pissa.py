"""PiSSA and OLoRA: how they begin, what they learn, and the same numbers as peft's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_from_scratch.methods.adapter_files import write_adapter
from lora_from_scratch.methods.lora import lora_layers
from lora_from_scratch.methods.pissa import PiSSA, as_lora, initial_qr, initial_svd, pissa_layers
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.support.linear_layers import weight_of
from tests.any_models import logits_of, model_of, randomise
from tests.test_any_model import NAMED, assert_equal, read_by_peft

both = pytest.mark.parametrize("decomposition", ["svd", "qr"])


def adapted(kind: str, method: PiSSA) -> Any:
    """After some training: A and B are near where they began."""
    model = model_of(kind)
    method.adapt(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in method.trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def test_the_first_product_is_the_best_approximation_of_its_rank() -> None:
    W = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    A, B = initial_svd(W, 2, 4.0)
    S = torch.linalg.svdvals(W)
    assert (A.shape, B.shape) == ((2, 5), (7, 2))
    torch.testing.assert_close((W - 4.0 * B @ A).norm(), S[2:].norm())
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))  # the two share the singular values


def test_the_first_product_of_olora_is_the_start_of_the_qr() -> None:
    W = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    A, B = initial_qr(W, 2, 4.0)
    torch.testing.assert_close(B.T @ B, torch.eye(2))
    torch.testing.assert_close(B @ A[:, :2], W[:, :2])  # the first columns of W need no others


@both
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mlp"])
def test_the_base_holds_the_rest_and_the_sum_is_the_weight(kind: str, decomposition: str) -> None:
    model, before = model_of(kind), model_of(kind)
    method = PiSSA(rank=2, alpha=6, targets=NAMED[kind], decomposition=decomposition)
    method.adapt(model)
    torch.testing.assert_close(logits_of(model, kind), logits_of(before, kind), atol=1e-5, rtol=1e-4)
    for name, layer in lora_layers(model).items():
        W = weight_of(before.get_submodule(name))
        rest = weight_of(layer.base)
        torch.testing.assert_close(rest + layer.scaling * layer.lora_B @ layer.lora_A, W)
        assert not torch.allclose(rest, W, atol=1e-2)


@both
def test_the_directions_that_begin_are_trained_and_the_rest_is_not(decomposition: str) -> None:
    model = model_of("gpt2")
    method = PiSSA(rank=2, targets=("c_attn",), decomposition=decomposition)
    method.adapt(model)
    assert set(method.trainable(model)) == {
        f"transformer.h.{block}.attn.c_attn.lora_{letter}" for block in range(2) for letter in "AB"
    }


@both
@pytest.mark.parametrize("rslora", [False, True])
def test_as_a_plain_lora_of_twice_the_rank_it_loads_in_peft(decomposition: str, rslora: bool, tmp_path: Path) -> None:
    method = PiSSA(
        rank=2,
        alpha=6,
        targets=("c_attn", "mlp.c_proj"),
        rslora=rslora,
        decomposition=decomposition,
        rank_pattern={"c_proj": 3},
        alpha_pattern={"h.0.mlp.c_proj": 5.0},
    )
    model = adapted("gpt2", method)
    config, tensors = as_lora(method, model)
    write_adapter(tmp_path, config, tensors)
    theirs = read_by_peft("gpt2", tmp_path)
    torch.testing.assert_close(logits_of(theirs, "gpt2"), logits_of(model, "gpt2"), atol=1e-5, rtol=1e-4)
    back = model_of("gpt2")
    assert type(load_adapter(back, tmp_path)).name == "lora"
    torch.testing.assert_close(logits_of(back, "gpt2"), logits_of(model, "gpt2"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "decomposition"), [("gpt2", "svd"), ("llama", "svd"), ("llama", "qr"), ("vit", "svd"), ("mlp", "qr")]
)
def test_logits_and_gradients_equal_pefts_and_adapters_travel_both_ways(
    kind: str, decomposition: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    method = PiSSA(rank=2, alpha=6, targets=NAMED[kind], decomposition=decomposition)
    model = adapted(kind, method)
    method.save(model, tmp_path / "ours")
    assert_equal(model, method, read_by_peft(kind, tmp_path / "ours"), kind)

    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=list(NAMED[kind]),
        init_lora_weights={"svd": "pissa", "qr": "olora"}[decomposition],
        fan_in_fan_out=kind.startswith("gpt2"),
    )
    theirs = peft.get_peft_model(model_of(kind), config).eval()
    fresh = model_of(kind)
    method.adapt(fresh)
    for name, layer in pissa_layers(fresh).items():  # signs of singular vectors may differ, the product may not
        other = theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(
            layer.lora_B @ layer.lora_A, other.lora_B["default"].weight @ other.lora_A["default"].weight
        )
    randomise({name: p for name, p in theirs.named_parameters() if p.requires_grad}, seed=2)
    theirs.save_pretrained(tmp_path / "theirs")
    back = model_of(kind)
    assert_equal(back, load_adapter(back, tmp_path / "theirs"), theirs, kind)  # type: ignore[arg-type]


def test_olora_on_a_conv1d_is_not_given_to_peft_which_would_read_it_wrongly(tmp_path: Path) -> None:
    method = PiSSA(rank=2, targets=("c_attn",), decomposition="qr")
    model = adapted("gpt2", method)
    method.save(model, tmp_path)
    peft = pytest.importorskip("peft")
    with pytest.raises(Exception, match="LORA_FROM_SCRATCH_OLORA"):
        peft.PeftModel.from_pretrained(model_of("gpt2"), str(tmp_path))
    back = model_of("gpt2")
    load_adapter(back, tmp_path)
    assert torch.equal(logits_of(back, "gpt2"), logits_of(model, "gpt2"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dropout": 0.1}, "dropout must be 0"),
        ({"decomposition": "lu"}, "decomposition must be one of svd, qr"),
        ({"targets": ("c_attn.q",)}, "PiSSA adapts whole layers"),
        ({"targets": ("lm_head",)}, "cannot merge into lm_head"),
    ],
    ids=str,
)
def test_what_cannot_be_split_is_refused_and_the_model_stays_as_it_was(fields: dict[str, Any], message: str) -> None:
    model = model_of("gpt2")
    with pytest.raises(ValueError, match=message):
        PiSSA(**fields).adapt(model)
    assert not lora_layers(model)
    assert torch.equal(logits_of(model, "gpt2"), logits_of(model_of("gpt2"), "gpt2"))
