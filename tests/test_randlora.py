"""RandLoRA: the paper's equation, the rank that its sums can have, what it keeps, and its random matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_from_scratch.methods.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from lora_from_scratch.methods.lora import LoRALinear
from lora_from_scratch.methods.randlora import RandLoRA, RandLoRALinear, draw_bases
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.methods.vera import Projections
from tests.any_models import logits_of, model_of, randomise

SIDES = st.integers(2, 9)


def layer_of(inputs: int, outputs: int, rank: int, spare: int = 0, learned: bool = True) -> RandLoRALinear:
    """A layer in float64 whose shared matrices are for layers larger by `spare`, with random learned numbers."""
    small, large = sorted((inputs, outputs))
    shared = Projections(*draw_bases(rank, small + spare, large + spare, seed=3))
    layer = RandLoRALinear(nn.Linear(inputs, outputs), shared, alpha=3 * rank).double()
    randomise({name: p for name, p in layer.named_parameters() if learned or name.startswith("base")})
    return layer


def change_of(layer: RandLoRALinear) -> Tensor:
    """What the layer adds for each unit vector: (out, in)."""
    unit = torch.eye(int(layer.base.in_features), dtype=torch.float64)  # type: ignore[arg-type]
    return (layer(unit) - layer.base(unit)).detach().T


def rank_of(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-9))


# --- The equation ----------------------------------------------------------------------------------------


@given(SIDES, SIDES, st.integers(1, 6), st.integers(0, 5))
def test_a_layer_adds_the_sum_of_the_paper(inputs: int, outputs: int, rank: int, spare: int) -> None:
    layer = layer_of(inputs, outputs, rank, spare)
    small, large = min(inputs, outputs), max(inputs, outputs)
    n = math.ceil(small / rank)
    A = layer.shared.A[:, 0, :small]
    columns = layer.shared.B[:large, :n].reshape(large, n * rank)
    total = torch.zeros(large, small, dtype=torch.float64)
    for j in range(n):
        B_j = torch.stack([columns[:, k * n + j] for k in range(rank)], dim=1)  # (large, r)
        total += B_j @ torch.diag(layer.randlora_lambda[:, j]) @ A @ torch.diag(layer.randlora_gamma[j])
    expected = 3 * (total if inputs <= outputs else total.T)
    torch.testing.assert_close(change_of(layer), expected.detach())
    weight: Any = layer.base.weight
    W = weight.clone()
    layer.merge()
    torch.testing.assert_close(weight - W, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(6, 9), (9, 6), (6, 6)])
def test_the_gradients_are_those_of_the_products_written_out(sizes: tuple[int, int]) -> None:
    gradients = []
    for forward in (RandLoRALinear.forward, LoRALinear.forward):
        layer, x = layer_of(*sizes, rank=4), torch.linspace(-1, 1, 3 * sizes[0], dtype=torch.float64).view(3, -1)
        x.requires_grad_()
        forward(layer, x).square().sum().backward()
        gradients.append([x.grad, layer.randlora_lambda.grad, layer.randlora_gamma.grad])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(("rank", "count"), [(1, 16 * 17), (4, 4 * 20), (6, 3 * 22), (16, 32), (99, 99 + 16)])
def test_a_layer_learns_n_times_r_plus_d_numbers_and_fewer_for_a_larger_rank_below_d(rank: int, count: int) -> None:
    for targets in (("c_attn",), ("mlp.c_proj",), ("mlp.c_fc",)):  # 16 x 48, 64 x 16 and 16 x 64
        model, method = model_of("gpt2"), RandLoRA(targets=targets, rank=rank)
        method.adapt(model)
        assert sum(p.numel() for p in method.trainable(model).values()) == 2 * count


# --- Its rank --------------------------------------------------------------------------------------------


@given(SIDES, SIDES, st.integers(1, 6), st.integers(0, 5))
def test_the_change_has_full_rank_at_random_coefficients(inputs: int, outputs: int, rank: int, spare: int) -> None:
    assert rank_of(change_of(layer_of(inputs, outputs, rank, spare))) == min(inputs, outputs)


@given(SIDES, SIDES, st.integers(1, 6))
def test_the_change_has_rank_r_while_all_gammas_are_equal(inputs: int, outputs: int, rank: int) -> None:
    layer = layer_of(inputs, outputs, rank)
    with torch.no_grad():
        layer.randlora_gamma.copy_(layer.randlora_gamma[:1].expand_as(layer.randlora_gamma))
    assert rank_of(change_of(layer)) == min(rank, inputs, outputs)


def test_the_first_step_makes_a_change_of_rank_r_and_the_next_ones_do_not() -> None:
    layer = layer_of(12, 15, rank=2, learned=False)
    layer.base.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x, goal = (torch.randn(40, side, generator=generator, dtype=torch.float64) for side in (12, 15))
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    ranks = [rank_of(change_of(layer))]
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - goal).square().sum().backward()
        optimizer.step()
        ranks.append(rank_of(change_of(layer)))
    assert ranks[:2] == [0, 2]
    assert ranks[2] > 2
    assert ranks[3] == 12


# --- What it keeps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(24, 32), (32, 24)])
def test_the_backward_pass_is_left_nothing_as_large_as_the_scaled_matrix(sizes: tuple[int, int]) -> None:
    layer, kept = layer_of(*sizes, rank=4), []
    layer.base.requires_grad_(False)
    mine = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in mine:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(torch.randn(3, sizes[0], dtype=torch.float64, requires_grad=True))
    assert max(kept, default=0) <= 3 * 24  # of x or of B^T x, the narrower
    assert 24 * 24 > 3 * 32
    y.sum().backward()


# --- The random matrices ---------------------------------------------------------------------------------


def test_the_random_matrices_are_uniform_with_deviation_one_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    A, B = draw_bases(8, small=60, large=90, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert (A.shape, B.shape) == ((8, 1, 60), (90, 8, 8))
    for matrix in (A, B):
        assert matrix.dtype == torch.float32
        assert float(matrix.std()) == pytest.approx(1, abs=0.01)
        assert float(matrix.abs().max()) == pytest.approx(3**0.5, rel=0.05)
    assert all(torch.equal(one, two) for one, two in zip(draw_bases(8, 60, 90, 5), (A, B), strict=True))
    assert not torch.equal(draw_bases(8, 60, 90, 6)[1], B)


def test_all_layers_share_one_pair_of_matrices_also_after_a_move() -> None:
    model = model_of("gpt2")
    RandLoRA(rank=3).adapt(model)
    model.to(torch.float64)
    layers = [module for module in model.modules() if isinstance(module, RandLoRALinear)]
    assert (
        len({layer.shared.B.data_ptr() for layer in layers})
        == len({layer.shared.A.data_ptr() for layer in layers})
        == 1
    )
    assert all(layer.all_B().data_ptr() == layer.shared.B.data_ptr() for layer in layers)  # a view
    assert layers[0].shared.A.dtype == torch.float64


def saved(directory: Path, **options: Any) -> Any:
    model, method = model_of("gpt2"), RandLoRA(targets=("c_attn",), rank=6, alpha=6, **options)
    method.adapt(model)
    randomise(dict(method.trainable(model)))
    method.save(model, directory)
    return model


@pytest.mark.parametrize("with_matrices", [False, True])
def test_the_random_matrices_can_be_left_out_of_the_directory(with_matrices: bool, tmp_path: Path) -> None:
    model, back = saved(tmp_path, projection_seed=4, save_projection=with_matrices), model_of("gpt2")
    sizes = {name: tensor.numel() for name, tensor in load_file(tmp_path / WEIGHTS_FILE).items()}
    assert ("base_model.randlora_A" in sizes) == ("base_model.randlora_B" in sizes) == with_matrices
    if not with_matrices:
        assert sum(sizes.values()) == 2 * 3 * (6 + 16)  # n (r + d) for each of two layers
    load_adapter(back, tmp_path)
    assert torch.equal(logits_of(back, "gpt2"), logits_of(model, "gpt2"))


def test_saved_matrices_count_and_not_those_of_the_seed(tmp_path: Path) -> None:
    model, back = saved(tmp_path, save_projection=True), model_of("gpt2")
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"projection_prng_key": 5}))
    load_adapter(back, tmp_path)
    assert torch.equal(logits_of(back, "gpt2"), logits_of(model, "gpt2"))


# --- PEFT ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gpt2", "grouped llama"])
@pytest.mark.parametrize("rank", [3, 8])
def test_the_random_matrices_of_a_seed_and_the_start_are_pefts(kind: str, rank: int) -> None:
    peft = pytest.importorskip("peft")
    targets = {"gpt2": ["c_attn", "c_fc", "c_proj"], "grouped llama": ["k_proj", "down_proj"]}[kind]
    config = peft.RandLoraConfig(r=rank, target_modules=targets, projection_prng_key=7, fan_in_fan_out=kind == "gpt2")
    theirs, model = peft.get_peft_model(model_of(kind), config), model_of(kind)
    RandLoRA(targets=targets, rank=rank, projection_seed=7).adapt(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RandLoRALinear)}
    for name, layer in layers.items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        assert torch.equal(layer.shared.A, other.randlora_A["default"])
        assert torch.equal(layer.shared.B, other.randlora_B["default"])
        assert torch.equal(layer.randlora_lambda, other.randlora_lambda["default"])
        assert torch.equal(layer.randlora_gamma, other.randlora_gamma["default"])
        assert layer.scaling == other.scaling["default"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_peft_reads_our_saved_matrices_and_we_read_those_that_it_repeats_in_each_layer(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, back = saved(tmp_path / "ours", save_projection=True), model_of("gpt2")
    file = tmp_path / "ours" / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"projection_prng_key": 5}))  # not where they are from
    with pytest.warns(UserWarning, match=r"missing adapter keys.*h\.1\.attn\.c_attn\.randlora_A"):
        theirs = peft.PeftModel.from_pretrained(model_of("gpt2"), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits_of(theirs, "gpt2"), logits_of(model, "gpt2"), atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    sizes = [(tmp_path / name / WEIGHTS_FILE).stat().st_size for name in ("ours", "theirs")]
    assert sizes[1] > 2 * sizes[0]
    load_adapter(back, tmp_path / "theirs")
    assert torch.equal(logits_of(back, "gpt2"), logits_of(model, "gpt2"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_merged_model_is_pefts_merged_model(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, method = model_of(kind), RandLoRA(rank=6, alpha=6, projection_seed=2)
    method.adapt(model)
    randomise(dict(method.trainable(model)))
    method.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(model_of(kind), str(tmp_path)).merge_and_unload()
    ours = dict(method.merged_copy(model).named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours[name], parameter, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours[next(n for n in ours if "down_proj" in n or "c_fc.weight" in n)], torch.zeros(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("field", ["sparse", "very_sparse"])
def test_matrices_of_zeros_and_ones_are_read_from_pefts_directory_and_not_drawn(field: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.RandLoraConfig(r=6, randlora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True, **{field: True})
    theirs = peft.get_peft_model(model_of("gpt2"), config).eval()
    randomise({name: p for name, p in theirs.named_parameters() if p.requires_grad})
    theirs.save_pretrained(tmp_path)
    back = model_of("gpt2")
    load_adapter(back, tmp_path)
    torch.testing.assert_close(logits_of(back, "gpt2"), logits_of(theirs, "gpt2"), atol=1e-5, rtol=1e-5)
    tensors = {n: t for n, t in load_file(tmp_path / WEIGHTS_FILE).items() if not n.endswith((".randlora_A", "_B"))}
    config_read = json.loads((tmp_path / CONFIG_FILE).read_text()) | {"save_projection": False}
    with pytest.raises(ValueError, match=f"has {field}=True, which is not supported"):
        RandLoRA.from_adapter(config_read, tensors, model_of("gpt2"))
