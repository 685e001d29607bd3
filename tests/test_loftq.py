"""LoftQ against peft's, which asks for a GPU: its calls for one are sent to the CPU here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lora_from_scratch.methods.loftq import LoftQ, loftq_init
from lora_from_scratch.methods.lora import lora_layers
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.quantization.nf4_linear import nf4_layers
from lora_from_scratch.support.linear_layers import weight_of
from tests.any_models import VOCABULARY, logits_of, randomise, weighted_mean

peft = pytest.importorskip("peft")
NAMES = ("q_proj", "o_proj", "up_proj", "down_proj")


def llama() -> Any:
    """Its rows are whole blocks: of shorter ones bitsandbytes 0.50 dequantises wrongly on a CPU."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter.ndim == 1) + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


class OnTheCPU(TorchFunctionMode):
    """Whatever is to go to CUDA goes to the CPU."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def here(argument: Any) -> Any:
            return "cpu" if isinstance(argument, str | torch.device) and "cuda" in str(argument) else argument

        return func(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})


def in_peft(iterations: int, rank: int, alpha: int) -> Any:
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(NAMES), init_lora_weights="loftq",
        loftq_config=peft.LoftQConfig(loftq_bits=4, loftq_iter=iterations),
    )  # fmt: skip
    with OnTheCPU(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(llama(), config).eval()


def ours(iterations: int, rank: int, alpha: float) -> tuple[Any, LoftQ]:
    model = llama()
    method = LoftQ(targets=NAMES, rank=rank, alpha=alpha, iterations=iterations, double_quantization=False)
    method.adapt(model)
    return model, method


def peft_layers(model: Any) -> dict[str, Any]:
    """By our names."""
    layers = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    return {name: module for name, module in layers.items() if hasattr(module, "lora_A")}


def change_in_peft(layer: Any) -> Tensor:
    """B A, without the scaling."""
    change: Tensor = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    return change


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_q_and_b_a_are_pefts(iterations: int) -> None:
    model, _ = ours(iterations, rank=4, alpha=4)
    theirs = peft_layers(in_peft(iterations, rank=4, alpha=4))
    assert theirs.keys() == lora_layers(model).keys()
    for name, layer in lora_layers(model).items():
        other = theirs[name]
        assert torch.equal(nf4_layers(model)[f"{name}.base"].quantized.dequantize(), other.base_layer.weight)
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, change_in_peft(other), atol=1e-6, rtol=1e-5)


def test_logits_and_gradients_equal_pefts_once_it_has_quantised_the_other_layers_too() -> None:
    """PEFT leaves the layers without a LoRA in full; all of ours are in four bits."""
    model, method = ours(2, rank=4, alpha=4)
    theirs: Any = in_peft(2, rank=4, alpha=4)
    base = theirs.get_base_model()
    with torch.no_grad():
        for name, layer in nf4_layers(model).items():
            if not name.endswith(".base"):
                base.get_submodule(name).weight.copy_(weight_of(layer.dense()))
    randomise({n: p for n, p in model.named_parameters() if p.requires_grad}, size=0.2)
    for name, lora in lora_layers(model).items():
        other = peft_layers(theirs)[name]
        other.lora_A["default"].weight.data = lora.lora_A.detach().clone()
        other.lora_B["default"].weight.data = lora.lora_B.detach().clone()
    logits = logits_of(model, "llama")
    torch.testing.assert_close(logits, logits_of(theirs, "llama"), atol=1e-5, rtol=1e-5)
    weighted_mean(logits).backward()
    weighted_mean(logits_of(theirs, "llama")).backward()
    for name, lora in lora_layers(model).items():
        for factor in ("lora_A", "lora_B"):
            expected = getattr(peft_layers(theirs)[name], factor)["default"].weight.grad
            torch.testing.assert_close(getattr(lora, factor).grad, expected, atol=1e-5, rtol=1e-5)
    assert len(method.trainable(model)) == 2 * len(lora_layers(model))


def test_with_another_alpha_our_start_stays_the_same_and_pefts_moves_away_from_w() -> None:
    dense = llama()
    model, _ = ours(1, rank=4, alpha=16)
    theirs = peft_layers(in_peft(1, rank=4, alpha=16))
    for name, layer in lora_layers(model).items():
        W = weight_of(dense.get_submodule(name))
        Q, A, B = loftq_init(W, 4)
        nearest = (W - Q.dequantize() - B @ A).norm()
        base = nf4_layers(model)[f"{name}.base"].quantized.dequantize()
        torch.testing.assert_close((W - base - layer.change(W)).norm(), nearest, atol=1e-5, rtol=1e-5)
        other = theirs[name]
        distance = (W - other.base_layer.weight - other.scaling["default"] * change_in_peft(other)).norm()
        assert distance > 1.5 * nearest


def test_q_is_made_again_when_an_adapter_is_loaded(tmp_path: Path) -> None:
    model, method = ours(3, rank=4, alpha=8)
    method.save(model, tmp_path)
    back = llama()
    assert load_adapter(back, tmp_path) == method
    for name, layer in nf4_layers(model).items():
        assert torch.equal(layer.weight, nf4_layers(back)[name].weight)
    assert torch.equal(logits_of(back, "llama"), logits_of(model, "llama"))
