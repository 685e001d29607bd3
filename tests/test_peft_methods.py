"""Methods that peft has beside LoRA: the same logits and gradients, and adapters that travel both ways."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_from_scratch.methods.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from lora_from_scratch.methods.fourierft import FourierFT
from lora_from_scratch.methods.glora import GLoRA
from lora_from_scratch.methods.ia3 import IA3
from lora_from_scratch.methods.layernorm_tuning import LayerNormTuning
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.oft import OFT
from lora_from_scratch.methods.randlora import RandLoRA
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.methods.vera import VeRA, VeRALinear, draw_projections
from tests.any_models import logits_of, model_of, weighted_mean
from tests.test_any_model import NAMED

peft = pytest.importorskip("peft")
KINDS = ["gpt2", "llama", "qwen2", "vit"]
NORMS = {"gpt2": ["ln_1", "ln_f"], "llama": ["input_layernorm", "norm"], "qwen2": ["norm"], "vit": ["layernorm_after"]}
INSIDE = {"gpt2": ["mlp.c_proj"], "llama": ["down_proj"], "qwen2": ["up_proj"], "vit": ["fc1"]}


def vera(kind: str) -> tuple[Method, Any]:
    config = peft.VeraConfig(
        r=5, target_modules=list(NAMED[kind]), projection_prng_key=7, fan_in_fan_out=kind == "gpt2"
    )
    return VeRA(targets=NAMED[kind], rank=5, projection_seed=7), config


def randlora(kind: str) -> tuple[Method, Any]:
    config = peft.RandLoraConfig(
        r=5,
        randlora_alpha=5,
        target_modules=list(NAMED[kind]),
        projection_prng_key=7,
        fan_in_fan_out=kind == "gpt2",
    )
    return RandLoRA(targets=NAMED[kind], rank=5, alpha=5, projection_seed=7), config


def fourierft(kind: str) -> tuple[Method, Any]:
    config = peft.FourierFTConfig(
        n_frequency=20, target_modules=list(NAMED[kind]), init_weights=True, fan_in_fan_out=kind == "gpt2"
    )
    return FourierFT(targets=NAMED[kind], n_frequency=20, scaling=150), config


def ia3(kind: str) -> tuple[Method, Any]:
    config = peft.IA3Config(
        target_modules=list(NAMED[kind]), feedforward_modules=INSIDE[kind], fan_in_fan_out=kind == "gpt2"
    )
    return IA3(targets=NAMED[kind], feedforward=INSIDE[kind]), config


def layernorm(kind: str) -> tuple[Method, Any]:
    return LayerNormTuning(targets=NORMS[kind]), peft.LNTuningConfig(target_modules=NORMS[kind])


def glora(kind: str) -> tuple[Method, Any]:
    ours = GLoRA(targets=NAMED[kind], rank=2, form_of_coupling="lora")
    return ours, peft.GloraConfig(target_modules=list(NAMED[kind]), r=2, config_C="lora", config_D_E="vector")


def glora_of_vectors(kind: str) -> tuple[Method, Any]:
    ours = GLoRA(targets=NAMED[kind], form_of_weight="vector", form_of_bias="constant")
    config = peft.GloraConfig(
        target_modules=list(NAMED[kind]), r=4, config_A_B="vector", config_C="vector", config_D_E="constant"
    )
    return ours, config


def oft(kind: str) -> tuple[Method, Any]:
    config = peft.OFTConfig(target_modules=list(NAMED[kind]), oft_block_size=5, use_cayley_neumann=False)
    return OFT(targets=NAMED[kind], block_size=5), config


def oft_with_one_block(kind: str) -> tuple[Method, Any]:
    config = peft.OFTConfig(
        target_modules=list(NAMED[kind]), oft_block_size=4, block_share=True, use_cayley_neumann=False
    )
    return OFT(targets=NAMED[kind], block_size=4, block_share=True), config


METHODS: dict[str, Callable[[str], tuple[Method, Any]]] = {
    "vera": vera,
    "randlora": randlora,
    "fourierft": fourierft,
    "ia3": ia3,
    "layernorm": layernorm,
    "glora": glora,
    "glora of vectors": glora_of_vectors,
    "oft": oft,
    "oft with one block": oft_with_one_block,
}
NO_CONV1D = ("glora", "oft")  # peft refuses it for these


def read_by_peft(kind: str, directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # VeRA without its matrices, and every normalisation, make peft warn
        warnings.filterwarnings("error", message=".*missing adapter keys")
        return peft.PeftModel.from_pretrained(model_of(kind), str(directory), is_trainable=True).eval()


def shift(model: Any) -> None:
    """Add random numbers to everything that is trained."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def gradients(model: Any, kind: str) -> tuple[Tensor, list[Tensor]]:
    """The logits, and the gradients of what is trained, in the model's order."""
    logits = logits_of(model, kind)
    weighted_mean(logits).backward()
    return logits.detach(), [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]


def assert_equal(ours: Any, theirs: Any, kind: str) -> None:
    """Logits and gradients within 1e-5."""
    logits, own = gradients(ours, kind)
    expected, other = gradients(theirs, kind)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    by_size = {len(wanted): [g for g in other if len(g) == len(wanted)] for wanted in other}
    assert len(own) == len(other)
    for gradient in own:  # modules may list their parameters in another order
        same = [wanted for wanted in by_size[len(gradient)] if torch.allclose(gradient, wanted, atol=1e-5, rtol=1e-4)]
        assert same
    assert any(gradient.any() for gradient in own)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in METHODS for kind in KINDS if kind != "gpt2" or name.split()[0] not in NO_CONV1D],
)
def test_logits_and_gradients_equal_pefts_and_adapters_travel_both_ways(name: str, kind: str, tmp_path: Path) -> None:
    method, config = METHODS[name](kind)
    model = model_of(kind)
    method.adapt(model)
    torch.testing.assert_close(logits_of(model, kind), logits_of(model_of(kind), kind), atol=0, rtol=0)
    shift(model)
    method.save(model, tmp_path / "ours")
    assert_equal(model, read_by_peft(kind, tmp_path / "ours"), kind)

    theirs = peft.get_peft_model(model_of(kind), config).eval()
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == sum(
        p.numel() for p in method.trainable(model).values()
    )
    shift(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    back = model_of(kind)
    read = load_adapter(back, tmp_path / "theirs")
    assert read.name == name.split()[0]
    assert not torch.allclose(logits_of(back, kind), logits_of(model_of(kind), kind), atol=1e-2)
    assert_equal(back, theirs, kind)


# --- VeRA ------------------------------------------------------------------------------------------------


def test_the_random_matrices_of_a_seed_are_pefts() -> None:
    method, config = vera("gpt2")
    model = model_of("gpt2")
    method.adapt(model)
    theirs = peft.get_peft_model(model_of("gpt2"), config)
    shared = next(module for module in model.modules() if isinstance(module, VeRALinear)).shared
    assert torch.equal(shared.A, theirs.base_model.vera_A["default"])
    assert torch.equal(shared.B, theirs.base_model.vera_B["default"])


def test_all_layers_share_one_pair_of_matrices_also_after_a_move() -> None:
    model = model_of("gpt2")
    VeRA(rank=3).adapt(model)
    model.to(torch.float64)
    layers = [module for module in model.modules() if isinstance(module, VeRALinear)]
    assert len({layer.shared.A.data_ptr() for layer in layers}) == 1
    assert layers[0].shared.A.dtype == torch.float64


@pytest.mark.parametrize("saved", [False, True])
def test_the_random_matrices_can_be_left_out_of_the_directory(saved: bool, tmp_path: Path) -> None:
    method = VeRA(targets=("c_attn",), rank=6, save_projection=saved)
    model = model_of("gpt2")
    method.adapt(model)
    shift(model)
    method.save(model, tmp_path)
    sizes = {name: tensor.numel() for name, tensor in load_file(tmp_path / WEIGHTS_FILE).items()}
    assert ("base_model.vera_A" in sizes) == saved
    if not saved:
        assert sum(sizes.values()) == 2 * (6 + 48)  # r + out for each of two layers
    back = model_of("gpt2")
    load_adapter(back, tmp_path)
    assert torch.equal(logits_of(back, "gpt2"), logits_of(model, "gpt2"))


def test_saved_matrices_count_and_not_those_of_the_seed(tmp_path: Path) -> None:
    method = VeRA(targets=("c_attn",), rank=6, save_projection=True)
    model = model_of("gpt2")
    method.adapt(model)
    shift(model)
    method.save(model, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"projection_prng_key": 5}))
    back = model_of("gpt2")
    load_adapter(back, tmp_path)
    assert torch.equal(logits_of(back, "gpt2"), logits_of(model, "gpt2"))


def test_the_bounds_of_the_random_matrices() -> None:
    A, B = draw_projections(64, 96, 80, seed=0)
    assert A.shape == (64, 96)
    assert B.shape == (80, 64)
    for matrix in (A, B):
        bound = (6 / matrix.shape[1]) ** 0.5
        assert 0.98 * bound < float(matrix.abs().max()) <= bound
