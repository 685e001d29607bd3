"""FourierFT: formulas written from the paper, what its update can be, where it starts, and its directories."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_from_scratch.compare.atlas import multiply_adds
from lora_from_scratch.gpt2.checkpoint import load_model
from lora_from_scratch.methods.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from lora_from_scratch.methods.fourierft import (
    SIZES,
    FourierFT,
    FourierFTLinear,
    draw_places,
    fourier_delta_weight,
)
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.support.linear_layers import in_and_out
from tests.any_models import logits_of, model_of, randomise
from tests.helpers import real_checkpoint, tiny_model

PI2 = 2 * math.pi
SHAPES = [(6, 10), (9, 4), (7, 7), (1, 5), (8, 8)]  # (out, in), even and odd
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def drawn(shape: tuple[int, int], n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random c (n,), in float64, and places (n,)."""
    c = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return c, draw_places(n, *shape, seed)


def rows_and_columns(places: Tensor, shape: tuple[int, int]) -> list[tuple[int, int]]:
    return [divmod(place, shape[1]) for place in places.tolist()]


# --- The equation ----------------------------------------------------------------------------------------


@every_shape
def test_the_update_is_a_sum_of_cosines(shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    c, places = drawn(shape, 5)
    expected = torch.zeros(shape, dtype=torch.float64)
    for value, (j, k) in zip(c.tolist(), rows_and_columns(places, shape), strict=True):
        for p in range(outputs):
            for q in range(inputs):
                expected[p, q] += 30 / (outputs * inputs) * value * math.cos(PI2 * (p * j / outputs + q * k / inputs))
    torch.testing.assert_close(fourier_delta_weight(c, places, shape, 30.0), expected)


@every_shape
def test_thin_matrices_give_the_same_outputs_without_the_update_itself(shape: tuple[int, int]) -> None:
    """cos(a + b) = cos a cos b - sin a sin b: x goes to 2 n numbers, is multiplied by c, and goes to the outputs."""
    outputs, inputs = shape
    c, places = drawn(shape, 5)
    c.requires_grad_(True)
    j, k = torch.tensor(rows_and_columns(places, shape), dtype=torch.float64).T
    a = PI2 * torch.arange(outputs, dtype=torch.float64)[:, None] * j / outputs  # (out, n)
    b = PI2 * torch.arange(inputs, dtype=torch.float64) * k[:, None] / inputs  # (n, in)
    A = torch.cat([b.cos(), b.sin()])  # (2 n, in)
    B = torch.cat([a.cos(), -a.sin()], dim=1)  # (out, 2 n)
    x = torch.randn(3, inputs, dtype=torch.float64)
    thin = 30 / (inputs * outputs) * (torch.cat([c, c]) * (x @ A.T)) @ B.T
    dense = x @ fourier_delta_weight(c, places, shape, 30.0).T
    torch.testing.assert_close(dense, thin)
    weights = torch.randn_like(thin)
    gradients = [torch.autograd.grad((y * weights).sum(), c)[0] for y in (dense, thin)]
    torch.testing.assert_close(*gradients)


def test_the_thin_matrices_are_cheaper_only_below_the_number_in_the_docstring() -> None:
    def thin(n: int, d: int) -> int:
        return 2 * n * (d + d)

    assert thin(191, 768) < 768 * 768
    assert thin(192, 768) == 768 * 768
    assert thin(1000, 768) > 5 * 768 * 768


def test_a_layer_adds_the_update_to_its_output_and_to_its_weight() -> None:
    layer = FourierFTLinear(nn.Linear(10, 6), *drawn((6, 10), 7), scaling=50.0)
    assert isinstance(layer.base, nn.Linear)
    x = torch.randn(2, 4, 10)
    dW = fourier_delta_weight(layer.fourierft_spectrum, layer.places, (6, 10), 50.0)
    y = layer(x)
    torch.testing.assert_close(y, layer.base(x) + x @ dW.T)
    before = layer.base.weight.detach().clone()
    layer.merge()
    torch.testing.assert_close(layer.base.weight, before + dW)
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_transformed_in_float32(dtype: torch.dtype) -> None:
    c, places = drawn((6, 10), 7)
    exact = fourier_delta_weight(c.to(dtype).double(), places, (6, 10), 50.0)
    result = fourier_delta_weight(c.to(dtype), places, (6, 10), 50.0)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), exact, atol=1e-5, rtol=1e-5)


def test_each_token_costs_one_more_product_with_a_weight() -> None:
    model = tiny_model()
    base, _ = multiply_adds(model)
    method = FourierFT(targets=("c_attn", "c_fc"), n_frequency=9)
    method.adapt(model)
    sizes = [math.prod(in_and_out(layer.base)) for layer in method.layers(model).values()]
    tokens = min(128, model.config.n_positions)
    assert multiply_adds(model)[0] == base + tokens * sum(sizes)


# --- What the update can be ------------------------------------------------------------------------------


def mirrored(F: Tensor) -> Tensor:
    """F' with F'[j, k] = F[-j mod out, -k mod in]."""
    return F.flip(0, 1).roll((1, 1), (0, 1))


@settings(max_examples=60, deadline=None, database=None)
@given(shape=st.sampled_from(SHAPES), share=st.floats(0.01, 1), seed=st.integers(0, 999))
def test_the_rank_is_that_of_the_mirrored_spectrum_and_at_most_2_n(
    shape: tuple[int, int], share: float, seed: int
) -> None:
    n = max(1, int(share * math.prod(shape)))
    c, places = drawn(shape, n, seed)
    F = torch.zeros(math.prod(shape), dtype=torch.float64).index_copy(0, places, c).view(shape)
    dW = fourier_delta_weight(c, places, shape, 1000.0)
    rank = int(torch.linalg.matrix_rank(dW))
    assert rank == int(torch.linalg.matrix_rank(F + mirrored(F)))
    assert rank <= min(2 * n, *shape)
    torch.testing.assert_close(dW, mirrored(dW))  # an even matrix


def test_entries_in_rows_and_columns_of_their_own_give_the_full_rank_2_n() -> None:
    shape = (20, 30)
    places = torch.tensor([j * 30 + k for j, k in ((1, 2), (3, 7), (6, 11), (8, 4))])
    dW = fourier_delta_weight(torch.ones(4, dtype=torch.float64), places, shape, 1.0)
    assert int(torch.linalg.matrix_rank(dW)) == 8


@pytest.mark.parametrize(("place", "rank"), [((0, 0), 1), ((0, 3), 1), ((4, 3), 1), ((2, 5), 1), ((3, 3), 2)])
def test_an_entry_gives_rank_two_unless_its_row_or_column_is_its_own_mirror(place: tuple[int, int], rank: int) -> None:
    shape = (8, 10)  # rows 0 and 4 and columns 0 and 5 mirror themselves
    dW = fourier_delta_weight(torch.ones(1, dtype=torch.float64), torch.tensor([place[0] * 10 + place[1]]), shape, 1.0)
    assert int(torch.linalg.matrix_rank(dW)) == rank


def test_the_default_number_of_entries_reaches_nearly_full_rank_in_the_bundled_model() -> None:
    c, places = drawn((256, 256), 1000)
    assert int(torch.linalg.matrix_rank(fourier_delta_weight(c, places, (256, 256), 300.0))) > 250


@every_shape
def test_all_entries_together_reach_about_half_of_all_matrices(shape: tuple[int, int]) -> None:
    numbers = math.prod(shape)
    places = torch.arange(numbers)
    reached = torch.stack(
        [fourier_delta_weight(c, places, shape, 1.0).flatten() for c in torch.eye(numbers, dtype=torch.float64)]
    )
    own_mirrors = math.prod(1 if size % 2 else 2 for size in shape)
    if shape[0] == 1:
        own_mirrors = 1 if shape[1] % 2 else 2
    assert int(torch.linalg.matrix_rank(reached)) == (numbers + own_mirrors) // 2


def test_of_two_mirrored_places_one_is_superfluous() -> None:
    one, other = 2 * 10 + 3, (6 - 2) * 10 + (10 - 3)
    c = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(
        fourier_delta_weight(c, torch.tensor([one]), (6, 10), 1.0),
        fourier_delta_weight(c, torch.tensor([other]), (6, 10), 1.0),
    )


# --- Places ----------------------------------------------------------------------------------------------


def test_layers_of_one_size_share_their_places_and_the_global_generator_is_left_alone() -> None:
    model = model_of("gpt2")
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    method = FourierFT(n_frequency=30, entry_seed=5)
    method.adapt(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    by_size: dict[tuple[int, int], list[FourierFTLinear]] = {}
    for layer in method.layers(model).values():
        by_size.setdefault(in_and_out(layer.base), []).append(layer)
    assert {size: len(layers) for size, layers in by_size.items()} == {
        (16, 48): 2, (16, 16): 2, (16, 64): 2, (64, 16): 2
    }  # fmt: skip
    for (inputs, outputs), layers in by_size.items():
        assert len({layer.places.data_ptr() for layer in layers}) == 1
        assert len(layers[0].places.unique()) == 30
        assert 0 <= int(layers[0].places.min()) <= int(layers[0].places.max()) < inputs * outputs


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("seed", [777, 2024])
def test_the_places_of_a_seed_are_pefts(kind: str, seed: int) -> None:
    peft = pytest.importorskip("peft")
    config = peft.FourierFTConfig(
        n_frequency=25, random_loc_seed=seed, target_modules="all-linear", fan_in_fan_out=kind == "gpt2"
    )
    theirs = peft.get_peft_model(model_of(kind), config).base_model.model
    model, method = model_of(kind), FourierFT(n_frequency=25, entry_seed=seed)
    method.adapt(model)
    assert method.layers(model)
    for name, layer in method.layers(model).items():
        inputs, _ = in_and_out(layer.base)
        rows, columns = theirs.get_submodule(name).indices["default"]
        assert torch.equal(layer.places, rows * inputs + columns)


def test_what_is_trained_is_n_numbers_for_each_layer_whatever_its_size() -> None:
    model, method = model_of("gpt2"), FourierFT(n_frequency=30)
    method.adapt(model)
    assert [tuple(p.shape) for p in method.trainable(model).values()] == 8 * [(30,)]


# --- The start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_by_default_nothing_changes_and_yet_everything_gets_a_gradient(kind: str) -> None:
    model, method = model_of(kind), FourierFT(n_frequency=12)
    method.adapt(model)
    logits = logits_of(model, kind)
    assert torch.equal(logits, logits_of(model_of(kind), kind))
    logits.square().mean().backward()
    for parameter in method.trainable(model).values():
        assert parameter.grad is not None
        assert (parameter.grad != 0).all()


def test_the_random_start_has_the_documented_size_and_follows_its_seed() -> None:
    places = draw_places(1000, 300, 200, seed=3)
    c = FourierFT(start="random").first_values(torch.Generator().manual_seed(0))
    dW = fourier_delta_weight(c, places, (300, 200), 300.0)
    assert float(dW.std()) == pytest.approx(300 * math.sqrt(1000 / 2) / (300 * 200), rel=0.05)
    models = [model_of("gpt2") for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        FourierFT(n_frequency=20, start="random", seed=seed).adapt(model)
    one, same, other = (logits_of(model, "gpt2") for model in models)
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=1e-2)


def test_pefts_default_start_changes_the_bundled_model_and_ours_does_not() -> None:
    peft = pytest.importorskip("peft")
    from tests.test_peft_format import hugging_face

    base = load_model(real_checkpoint()).eval()
    tokens = torch.randint(0, base.config.vocab_size, (2, 10), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        before = base(tokens)
        torch.manual_seed(0)
        config = peft.FourierFTConfig(target_modules="all-linear", fan_in_fan_out=True)
        theirs = peft.get_peft_model(hugging_face(base), config).eval()
        assert float((theirs(tokens).logits - before).abs().max()) > 0.1
        FourierFT().adapt(base)
        assert torch.equal(base(tokens), before)


def test_from_a_start_at_zero_only_the_product_of_scaling_and_learning_rate_counts() -> None:
    updates = []
    for scaling, rate in ((300.0, 1e-2), (30.0, 1e-1)):
        c, places = torch.zeros(20, dtype=torch.float64, requires_grad=True), draw_places(20, 6, 10, seed=0)
        optimizer = torch.optim.Adam([c], lr=rate, eps=1e-30)
        target = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for _ in range(10):
            optimizer.zero_grad()
            (fourier_delta_weight(c, places, (6, 10), scaling) - target).square().sum().backward()
            optimizer.step()
        updates.append(fourier_delta_weight(c, places, (6, 10), scaling).detach())
    assert updates[0].abs().max() > 0.1
    torch.testing.assert_close(*updates)


# --- Directories -----------------------------------------------------------------------------------------


def saved(directory: Path, method: FourierFT, kind: str = "gpt2") -> Any:
    model = model_of(kind)
    method.adapt(model)
    randomise(method.trainable(model))
    method.save(model, directory)
    return model


def test_a_directory_has_pefts_fields_and_only_those_that_differ_from_its_defaults(tmp_path: Path) -> None:
    saved(tmp_path, FourierFT(targets=("c_attn",), n_frequency=30, entry_seed=5))
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config == {
        "peft_type": "FOURIERFT",
        "task_type": "CAUSAL_LM",
        "target_modules": ["c_attn"],
        "fan_in_fan_out": True,
        "n_frequency": 30,
        "scaling": 300.0,
        "init_weights": True,
        "random_loc_seed": 5,
    }
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert tensors.pop(SIZES).tolist() == [[16, 48], [16, 48]]
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(30,)}


@pytest.mark.parametrize("start", ["base", "random"])
def test_what_is_loaded_is_the_same_method(start: str, tmp_path: Path) -> None:
    method = FourierFT(targets=("attn.c_attn",), n_frequency=30, entry_seed=5, start=start)
    model, back = saved(tmp_path, method), model_of("gpt2")
    read = load_adapter(back, tmp_path)
    assert read == FourierFT(targets=list(method.layers(model)), n_frequency=30, entry_seed=5, start=start)
    assert torch.equal(logits_of(back, "gpt2"), logits_of(model, "gpt2"))


def test_fields_that_are_left_out_have_pefts_defaults(tmp_path: Path) -> None:
    saved(tmp_path, FourierFT(targets=("c_attn",), n_frequency=30, scaling=7, entry_seed=5))
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    for field in ("scaling", "random_loc_seed", "init_weights"):
        del config[field]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    method = load_adapter(model_of("gpt2"), tmp_path)
    assert isinstance(method, FourierFT)
    assert (method.scaling, method.entry_seed, method.start) == (150.0, 777, "random")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_pefts_defaults_are_read_and_its_merged_weights_are_ours(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    targets = {"gpt2": ["attn.c_proj", "mlp.c_proj", "mlp.c_fc"], "llama": ["q_proj", "down_proj"]}[kind]
    config = peft.FourierFTConfig(n_frequency=40, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that fan_in_fan_out is set for a Conv1D
        theirs = peft.get_peft_model(model_of(kind), config).eval()
    theirs.save_pretrained(tmp_path)
    model = model_of(kind)
    method = load_adapter(model, tmp_path)
    assert isinstance(method, FourierFT)
    assert (method.n_frequency, method.scaling, method.entry_seed, method.start) == (40, 150.0, 777, "random")
    torch.testing.assert_close(logits_of(model, kind), logits_of(theirs, kind), atol=1e-5, rtol=1e-5)
    ours, merged = dict(method.merged_copy(model).named_parameters()), theirs.merge_and_unload()
    for name, parameter in merged.named_parameters():  # of a Conv1D too: peft transposes the update
        torch.testing.assert_close(ours[name], parameter, atol=1e-6, rtol=1e-5)


def test_an_adapter_for_layers_of_another_size_is_refused_though_its_tensors_would_fit(tmp_path: Path) -> None:
    saved(tmp_path, FourierFT(targets=("c_attn",), n_frequency=30))
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    other = tiny_model(n_layer=2, n_embd=20, n_head=2)
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn with \(in, out\) = .*another model"):
        load_adapter(other, tmp_path)
    assert all(tuple(t.shape) == (30,) for name, t in tensors.items() if name != SIZES)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_frequency_pattern", {"c_attn": 7}, "n_frequency_pattern"),
        ("bias", "fourier_only", "bias"),
        ("modules_to_save", ["ln_f"], "modules_to_save"),
        ("random_loc_seed", None, "entry_seed"),
        ("n_frequency", 0, "n_frequency"),
    ],
)
def test_fields_that_are_not_supported_are_refused(field: str, value: object, message: str, tmp_path: Path) -> None:
    saved(tmp_path, FourierFT(targets=("c_attn",), n_frequency=30))
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=message):
        load_adapter(model_of("gpt2"), tmp_path)


# --- Hyperparameters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_frequency": 0},
        {"n_frequency": 2.5},
        {"n_frequency": True},
        {"scaling": 0},
        {"scaling": float("inf")},
        {"scaling": "300"},
        {"entry_seed": -1},
        {"start": "zeros"},
        {"targets": ()},
    ],
    ids=str,
)
def test_a_hyperparameter_out_of_its_range_is_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} must"):
        FourierFT(**wrong)


def test_more_entries_than_a_weight_has_are_refused_by_name_and_the_model_stays_as_it_was() -> None:
    model = model_of("gpt2")
    with pytest.raises(
        ValueError, match=r"n_frequency must be at most 256, .* of transformer\.h\.0\.attn\.c_proj, got"
    ):
        FourierFT(n_frequency=257).adapt(model)
    assert torch.equal(logits_of(model, "gpt2"), logits_of(model_of("gpt2"), "gpt2"))
    FourierFT(n_frequency=256).adapt(model)


def test_samples_fit_the_smallest_model() -> None:
    for seed in range(20):
        model = tiny_model(n_embd=4, n_head=1)
        FourierFT.sample(Random(seed), model.config).adapt(model)
