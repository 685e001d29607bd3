"""Tied-LoRA, NOLA, MultiLoRA, MoRA and GLoRA: formulas written from the papers, and what makes each special.

Compared outside this repository, in float32, with the authors' code on random numbers; differences are relative to the
largest number:

- GLoRA with Arnav0400/ViT-Slim (commit 0fed674): the outputs of layers in all 35 combinations of forms and three sizes,
  within 2e-7;
- NOLA with UCDvision/NOLA (commit 03c7027), with the same seeds, three sizes: the outputs and the gradients of the
  coefficients within 2e-7;
- MoRA with kongds/MoRA (commit de5df31), six sizes: sharing (their type 1) is equal bit for bit, rotation (their type
  6) within 2e-7.

For Tied-LoRA no code was published, and MultiLoRA's was not at hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_from_scratch.methods.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from lora_from_scratch.methods.glora import FORMS, GLoRA, GLoRALinear
from lora_from_scratch.methods.lora import LoRALinear
from lora_from_scratch.methods.mora import ROTATION, SHARING, MoRALinear, side_for_rank
from lora_from_scratch.methods.multilora import MultiLoRALinear
from lora_from_scratch.methods.nola import NOLA, NOLALinear, RandomCombination, draw_matrices, random_combination
from lora_from_scratch.methods.placement import find_targets, target_sizes
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.methods.tied_lora import TiedLoRA, tied_lora_parameter_count
from lora_from_scratch.museum import reseeded_generator
from tests.any_models import logits_of, model_of, randomise


def change_of(layer: Any) -> Tensor:
    """What the layer adds for each unit vector: (out, in)."""
    inputs = layer.base.in_features
    return (layer(torch.eye(inputs)) - layer.base(torch.eye(inputs))).detach().T


# --- Tied-LoRA -------------------------------------------------------------------------------------------


def tied() -> tuple[Any, TiedLoRA]:
    model = model_of("gpt2")
    method = TiedLoRA(targets=("c_attn", "c_proj"), rank=2, alpha=6)
    method.adapt(model)
    return model, method


def test_layers_of_a_kind_share_their_factors_and_have_vectors_of_their_own() -> None:
    model, method = tied()
    layers = list(method.layers(model).values())
    assert len({id(layer.tied) for layer in layers}) == 3  # attn.c_attn, attn.c_proj, mlp.c_proj
    d, wide = 16, 64
    shared = 2 * ((d + 3 * d) + (d + d) + (wide + d))
    own = 2 * ((2 + 3 * d) + (2 + d) + (2 + d))
    assert sum(p.numel() for p in method.trainable(model).values()) == shared + own


def test_a_tied_layer_computes_the_equation_and_its_factors_get_the_gradients_of_all_blocks() -> None:
    model, method = tied()
    randomise(method.trainable(model))
    layer = method.layers(model)["transformer.h.1.attn.c_attn"]
    change = 3 * torch.diag(layer.v) @ layer.tied.B @ torch.diag(layer.u) @ layer.tied.A
    x = torch.randn(4, 16)
    torch.testing.assert_close(layer(x) - layer.base(x), x @ change.T, atol=1e-5, rtol=1e-4)
    logits_of(model, "gpt2").square().mean().backward()
    both = layer.tied.A.grad.clone()
    model.zero_grad()
    parts = []
    for block in range(2):
        for name, other in method.layers(model).items():
            other.requires_grad_(name == f"transformer.h.{block}.attn.c_attn")
        # the same factors, detached everywhere but in one block
        one = method.layers(model)[f"transformer.h.{block}.attn.c_attn"]
        kept = one.factors
        others = [o for n, o in method.layers(model).items() if o is not one]
        for other in others:
            A, B = (t.detach() for t in other.factors())
            other.factors = lambda A=A, B=B: (A, B)
        layer.tied.A.requires_grad_(True)
        (gradient,) = torch.autograd.grad(logits_of(model, "gpt2").square().mean(), layer.tied.A)
        parts.append(gradient)
        for other in others:
            del other.factors
        assert one.factors == kept
    torch.testing.assert_close(both, parts[0] + parts[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("targets", [("c_attn",), ("c_proj",), ("c_attn", "mlp.c_fc", "mlp.c_proj")])
@pytest.mark.parametrize("rank", [1, 3])
def test_tied_loras_count_is_what_it_trains(targets: tuple[str, ...], rank: int) -> None:
    model, method = model_of("gpt2"), TiedLoRA(targets=targets, rank=rank)
    sizes = dict(zip(find_targets(model, targets), target_sizes(model, targets), strict=True))
    method.adapt(model)
    assert tied_lora_parameter_count(sizes, rank) == sum(p.numel() for p in method.trainable(model).values())


# --- NOLA ------------------------------------------------------------------------------------------------


def test_a_combination_is_the_sum_of_its_random_matrices_and_so_is_its_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lora_from_scratch.methods.nola.CHUNK", 40)  # several chunks
    coefficients = torch.randn(7, dtype=torch.float64, requires_grad=True)
    matrices = draw_matrices(7, 12, 7, torch.Generator().manual_seed(5)).double().view(7, 3, 4)
    expected = torch.einsum("k,kij->ij", coefficients, matrices)
    result = RandomCombination.apply(coefficients, (3, 4), 5)
    torch.testing.assert_close(result, expected)
    weights = torch.randn(3, 4, dtype=torch.float64)
    (one,) = torch.autograd.grad((result * weights).sum(), coefficients)
    (other,) = torch.autograd.grad((expected * weights).sum(), coefficients)
    torch.testing.assert_close(one, other)


def test_the_random_matrices_are_uniform_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    matrices = random_combination(torch.eye(16)[3], (50, 100), seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert 0.24 < float(matrices.abs().max()) <= 0.25  # 1 / sqrt(16)
    assert abs(float(matrices.std()) / (0.25 / 3**0.5) - 1) < 0.02


def test_the_museums_combination_is_right_and_its_test_finds_the_fault() -> None:
    coefficients = torch.randn(3)
    faulty = reseeded_generator.faulty_random_combination
    torch.testing.assert_close(faulty(coefficients, (4, 2), 5), random_combination(coefficients, (4, 2), 5))
    with pytest.raises(AssertionError, match="global generator"):
        reseeded_generator.test_random_combination(faulty)
    reseeded_generator.test_random_combination(random_combination)


def test_a_directory_holds_a_seed_and_coefficients_only(tmp_path: Path) -> None:
    model, method = model_of("gpt2"), NOLA(targets=("c_attn",), rank=4, basis=10, projection_seed=3)
    method.adapt(model)
    randomise(method.trainable(model))
    method.save(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(10,)}
    assert sum(tensor.numel() for tensor in tensors.values()) == 2 * 2 * 10  # 2 k in each of two layers
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["projection_seed"] == 3
    back = model_of("gpt2")
    load_adapter(back, tmp_path)
    assert torch.equal(logits_of(back, "gpt2"), logits_of(model, "gpt2"))


def test_layers_and_factors_have_random_matrices_of_their_own() -> None:
    model, method = model_of("gpt2"), NOLA(targets=("c_proj",), rank=2, basis=3)
    method.adapt(model)
    layers: list[NOLALinear] = list(method.layers(model).values())
    seeds = [seed for layer in layers for seed in (layer.seed, layer.seed + 1, layer.seed + 2)]
    assert len(set(seeds)) == len(seeds)
    assert not torch.equal(layers[0].A0, layers[2].A0)


# --- MultiLoRA -------------------------------------------------------------------------------------------


def test_several_loras_are_one_of_the_sum_of_their_ranks() -> None:
    layer = MultiLoRALinear(nn.Linear(7, 6), 3, 2, 0.0, torch.Generator().manual_seed(0))
    randomise(dict(layer.named_parameters()))
    parts = [
        torch.diag(layer.scales[i]) @ layer.lora_B[:, 2 * i : 2 * i + 2] @ layer.lora_A[2 * i : 2 * i + 2]
        for i in range(3)
    ]
    torch.testing.assert_close(change_of(layer), sum(parts), atol=1e-5, rtol=1e-4)
    assert int(torch.linalg.matrix_rank(change_of(layer), tol=1e-4)) == 6


def test_at_the_start_only_the_scales_have_a_gradient() -> None:
    layer = MultiLoRALinear(nn.Linear(7, 6), 3, 2, 0.0)
    layer(torch.randn(5, 7)).square().sum().backward()
    assert layer.scales.grad is not None
    assert layer.scales.grad.any()
    assert not layer.lora_A.grad.any()  # type: ignore[union-attr]
    assert not layer.lora_B.grad.any()  # type: ignore[union-attr]


# --- MoRA ------------------------------------------------------------------------------------------------


def mora(inputs: int, outputs: int, rank: int, variant: str) -> MoRALinear:
    layer = MoRALinear(nn.Linear(inputs, outputs), rank, variant)
    with torch.no_grad():
        layer.mora_M.normal_(generator=torch.Generator().manual_seed(0))
    return layer


def test_the_side_of_the_square_is_rounded() -> None:
    assert side_for_rank(4096, 4096, 8) == 256  # the example of the paper, section 4.1
    assert side_for_rank(128, 128, 4) == 32
    assert side_for_rank(3, 4, 1, even=True) % 2 == 0


@pytest.mark.parametrize(("variant", "rank"), [(SHARING, 32), (ROTATION, 128)])
def test_at_equal_parameters_its_rank_is_far_above_loras(variant: str, rank: int) -> None:
    layer = mora(128, 128, 4, variant)
    lora = LoRALinear(nn.Linear(128, 128), 4)
    assert layer.mora_M.numel() == lora.lora_A.numel() + lora.lora_B.numel()
    assert int(torch.linalg.matrix_rank(change_of(layer), tol=1e-2)) == rank


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([SHARING, ROTATION]))
def test_merging_adds_what_the_layer_adds(inputs: int, outputs: int, variant: str) -> None:
    layer = mora(inputs, outputs, 1, variant)
    change = change_of(layer)
    assert change.shape == (outputs, inputs)
    torch.testing.assert_close(layer.change(layer.base.weight), change, atol=1e-4, rtol=1e-4)  # type: ignore[arg-type]


def test_sharing_adds_up_places_modulo_q_and_repeats_the_result() -> None:
    layer = mora(7, 8, 1, SHARING)  # q = 4
    assert layer.q == 4
    x = torch.arange(1.0, 8.0)
    compressed = torch.tensor([1 + 5, 2 + 6, 3 + 7, 4 + 1.0])  # 7 numbers, filled up with the first
    torch.testing.assert_close(layer.compress(x), compressed)
    z = layer.mora_M @ compressed
    torch.testing.assert_close(layer(x) - layer.base(x), torch.cat([z, z]), atol=1e-5, rtol=1e-4)


def test_rotation_turns_each_piece_by_its_own_angle() -> None:
    layer = mora(8, 8, 1, ROTATION)  # q = 4, two pieces
    assert layer.q == 4
    x = torch.randn(8)
    turned = x[4:].clone()
    for i, angle in enumerate((1.0, 1 / 10_000**0.5)):  # piece 1: position 1
        cos, sin = torch.tensor(angle).cos(), torch.tensor(angle).sin()
        a, b = x[4 + i], x[6 + i]
        turned[i], turned[i + 2] = a * cos - b * sin, b * cos + a * sin
    expected = torch.cat([layer.mora_M @ x[:4], layer.mora_M @ turned])
    torch.testing.assert_close(layer(x) - layer.base(x), expected, atol=1e-5, rtol=1e-4)


# --- GLoRA -----------------------------------------------------------------------------------------------


def glora(bias: bool = True, **forms: str) -> GLoRALinear:
    every = dict.fromkeys(FORMS, "none") | forms
    layer = GLoRALinear(nn.Linear(5, 4, bias=bias), 2, every, torch.Generator().manual_seed(0))
    randomise({name: p for name, p in layer.named_parameters() if name.startswith("glora_")})
    return layer


def test_glora_computes_the_equation_of_the_paper() -> None:
    layer: Any = glora(form_of_weight="lora", form_of_coupling="lora", form_of_bias="vector")
    A, B, C = (getattr(layer, f"glora_{letter}")() for letter in "ABC")
    W, b = layer.base.weight, layer.base.bias
    assert (A.shape, B.shape, C.shape) == ((4, 5), (4, 5), (5, 1))
    x = torch.randn(3, 5)
    bias = b + b * layer.glora_D.X + layer.glora_E.X + (W @ C).flatten()
    torch.testing.assert_close(layer(x), x @ (W + W * A + B).T + bias, atol=1e-5, rtol=1e-4)


def test_special_cases_of_glora_are_other_methods() -> None:
    x = torch.randn(3, 5)
    bitfit: Any = glora(form_of_bias="vector")
    with torch.no_grad():
        bitfit.glora_D.X.zero_()
    torch.testing.assert_close(bitfit(x), bitfit.base(x) + bitfit.glora_E.X)
    scaled: Any = glora(form_of_weight="vector", form_of_bias="vector")
    with torch.no_grad():
        scaled.glora_B.X.zero_()
        scaled.glora_E.X.zero_()
        scaled.glora_D.X.copy_(scaled.glora_A.X.flatten())
    torch.testing.assert_close(scaled(x), (1 + scaled.glora_D.X) * scaled.base(x))  # IA3 with l = 1 + D
    lora: Any = glora(form_of_weight="lora")
    with torch.no_grad():
        lora.glora_A.Xd.zero_()
    torch.testing.assert_close(lora(x), lora.base(x) + x @ (lora.glora_B.Xd @ lora.glora_B.Xu).T)


def test_without_a_bias_glora_changes_the_weight_only() -> None:
    layer = glora(bias=False, form_of_weight="constant", form_of_coupling="vector", form_of_bias="vector")
    assert {name for name, _ in layer.named_parameters()} == {"base.weight", "glora_A.X", "glora_B.X"}
    with pytest.raises(ValueError, match="nothing to train"):
        GLoRA(form_of_weight="none", targets=("q_proj",)).adapt(model_of("llama"))
