"""LoRA against its definition, against the paper's numbers and against the laws that it must keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_from_scratch.methods.fast_product import dropout
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2.model import GPT2, Conv1D, GPT2Config
from lora_from_scratch.methods.lora import (
    FusedLoRALinear,
    LoRA,
    LoRALinear,
    delta_weight,
    inject_lora,
    lora_layers,
    lora_scaling,
    lora_state_dict,
    mark_only_lora_as_trainable,
)
from lora_from_scratch.methods.placement import find_targets
from tests.test_method import assert_same, snapshot, some_tokens, tiny_gpt2, train

few = settings(max_examples=25, deadline=None)


@st.composite
def random_layers(draw: st.DrawFn) -> tuple[LoRALinear, Tensor]:
    """A LoRA layer with random A and B on a random Linear or Conv1D, and an input for it."""
    inputs, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    base: nn.Module = nn.Linear(inputs, outputs, bias=draw(st.booleans()))
    if draw(st.booleans()):
        base = Conv1D(inputs, outputs)
        nn.init.normal_(base.weight)
        nn.init.normal_(base.bias)
    rank = draw(st.integers(1, min(inputs, outputs)))
    layer = LoRALinear(base, rank, draw(st.floats(0.1, 64)), rslora=draw(st.booleans()))
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    return layer, torch.randn(*shape, inputs)


def randomise(model: nn.Module, scale: float = 0.3) -> None:
    """Random A and B everywhere."""
    with torch.no_grad():
        for tensor in lora_state_dict(model).values():
            tensor.normal_(std=scale)


# --- The layer -----------------------------------------------------------------------------------------


@given(random_layers())
@few
def test_a_layer_computes_w_x_plus_b_plus_s_b_a_x(case: tuple[Any, Tensor]) -> None:
    layer, x = case
    assert torch.equal(layer(x), layer.base(x))  # B = 0
    randomise(layer)
    A, B, s = layer.lora_A, layer.lora_B, layer.scaling
    expected = layer.base(x) + s * torch.einsum("or,ri,...i->...o", B, A, x)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


@given(random_layers())
@few
def test_merged_equals_unmerged_and_unmerging_gives_every_bit_back(case: tuple[Any, Tensor]) -> None:
    layer, x = case
    randomise(layer)
    weight = layer.base.weight
    assert isinstance(weight, Tensor)
    before, unmerged = weight.detach().clone(), layer(x)
    for _ in range(3):
        layer.merge()
        layer.merge()  # twice is like once
        torch.testing.assert_close(layer(x), unmerged, atol=1e-3, rtol=1e-4)
        assert torch.equal(layer(x), layer.base(x))
        layer.unmerge()
        layer.unmerge()
    assert torch.equal(weight, before)
    assert layer.base.weight is weight
    assert torch.equal(layer(x), unmerged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unmerging_is_exact_in_half_precision_too(dtype: torch.dtype) -> None:
    base = nn.Linear(64, 64).to(dtype)
    layer = LoRALinear(base, 4)
    randomise(layer)
    assert layer.lora_A.dtype == dtype
    before = base.weight.detach().clone()
    layer.merge()
    assert not torch.equal(base.weight, before)
    layer.unmerge()
    assert torch.equal(base.weight, before)


def test_scaling_is_alpha_over_r_and_for_rslora_alpha_over_its_root() -> None:
    assert lora_scaling(4, 32) == 8
    assert lora_scaling(16, 32, rslora=True) == 8


def test_delta_weight_is_out_by_in() -> None:
    A, B = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0], [100.0]])
    assert delta_weight(A, B, 0.5).tolist() == [[5, 10, 15], [50, 100, 150]]


def test_a_starts_uniform_within_one_over_the_root_of_in_and_b_at_zero() -> None:
    layer = LoRALinear(nn.Linear(400, 300), 100, generator=torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(400)
    assert 0.99 * bound < layer.lora_A.max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not layer.lora_B.any()


def test_dropout_acts_on_the_input_of_a_by_element_and_in_training_only() -> None:
    base = nn.Linear(50, 50, bias=False)
    layer = LoRALinear(base, 50, 50, dropout=0.25)
    with torch.no_grad():
        base.weight.zero_()
        layer.lora_A.copy_(torch.eye(50))
        layer.lora_B.copy_(torch.eye(50))
    x = torch.rand(200, 50) + 1
    torch.manual_seed(0)
    kept = layer.train()(x) / x  # A = B = 1: what comes out is the dropped-out input
    assert sorted(set(kept.round(decimals=4).unique().tolist())) == pytest.approx([0, 1 / 0.75], abs=1e-3)
    assert (kept == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert len(kept.unique(dim=0)) == 200  # no mask is shared by two rows
    torch.testing.assert_close(layer.eval()(x), x)


def test_dropout_has_the_gradient_of_its_own_mask() -> None:
    x = torch.rand(40, 50, requires_grad=True)
    y = dropout(x, 0.3, training=True)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x, y)
    assert dropout(x, 0.3, training=False) is x
    assert dropout(x, 0.0, training=True) is x


# --- Which layers --------------------------------------------------------------------------------------


def test_targets_are_ends_of_names_a_pattern_or_all_linear_layers() -> None:
    model = tiny_gpt2()
    every = [
        f"transformer.h.{i}.{name}"
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert list(find_targets(model, ("c_attn", "c_proj", "c_fc"))) == every
    assert list(find_targets(model, "all-linear")) == every
    assert list(find_targets(model, ("c_proj",))) == every[1::2]
    assert list(find_targets(model, ["mlp.c_proj"])) == [every[3], every[7]]
    assert list(find_targets(model, [every[4]])) == [every[4]]
    assert list(find_targets(model, r".*h\.1\.(attn\.c_proj|mlp\.c_fc)")) == [every[5], every[6]]
    assert find_targets(model, ("c_attn.v", "c_attn.q")) == {every[0]: ("q", "v"), every[4]: ("q", "v")}
    assert find_targets(model, r".*h\.1.*c_attn\.[kv]") == {every[4]: ("k", "v")}
    assert find_targets(model, ("c_attn.v", "c_attn")) == {every[0]: (), every[4]: ()}  # the whole has its parts


@pytest.mark.parametrize("targets", [("q_proj",), ("c_attn", "attn"), ("attn.c_fc",), ("_attn",), "c_attn"])
def test_a_target_that_matches_nothing_is_named_with_what_there_is(targets: tuple[str, ...] | str) -> None:
    wrong = targets if isinstance(targets, str) else targets[-1]
    with pytest.raises(ValueError, match=f"'{wrong}' matches nothing.*transformer.h..n..attn.c_attn") as error:
        find_targets(tiny_gpt2(), targets)
    assert "\n" not in str(error.value)


def test_bad_hyperparameters_are_refused_with_the_value_and_what_is_allowed() -> None:
    for arguments, message in [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 2.5}, "rank must be a whole number of at least 1, got 2.5"),
        ({"rank_pattern": {"c_fc": -1}}, "rank of the pattern 'c_fc' must be .* got -1"),
        ({"alpha": 0}, "alpha must be a positive number, got 0"),
        ({"alpha": float("nan")}, "alpha must be a positive number, got nan"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"targets": ()}, "targets must name at least one layer"),
    ]:
        with pytest.raises(ValueError, match=message):
            LoRA(**arguments)  # type: ignore[arg-type]
    for method, message in [
        (LoRA(rank=33), r"attn.c_attn: rank must be between 1 and 32 \(the smaller side of W\), got 33"),
        (LoRA(rank=17, targets=("c_attn.q", "c_attn.k")), "between 1 and 16 .2 parts share .* got 17"),
        (LoRA(targets="(c_attn"), "not a regular expression"),
        (LoRA(targets=("c_fc",), alpha_pattern={"c_attn": 2}), "'c_attn' matches none of the targets.*c_fc"),
    ]:
        with pytest.raises(ValueError, match=message):
            method.adapt(tiny_gpt2())
    with pytest.raises(ValueError, match="rank must be between 1 and 5"):
        LoRALinear(nn.Linear(5, 7), 6)


def test_rank_and_alpha_patterns_pick_layers_and_the_first_match_counts() -> None:
    model = tiny_gpt2()
    LoRA(
        rank=4,
        alpha=8,
        targets=("c_attn", "c_fc"),
        rank_pattern={"h.0.mlp.c_fc": 3, "c_fc": 2},
        alpha_pattern={r"h\.1\..*": 1},
    ).adapt(model)
    found = {name: (layer.rank, layer.scaling) for name, layer in lora_layers(model).items()}
    assert found == {
        "transformer.h.0.attn.c_attn": (4, 8 / 4),
        "transformer.h.0.mlp.c_fc": (3, 8 / 3),
        "transformer.h.1.attn.c_attn": (4, 1 / 4),
        "transformer.h.1.mlp.c_fc": (2, 1 / 2),
    }


@pytest.mark.parametrize(
    ("n_layer", "n_embd", "n_head", "expected"),
    [(12, 768, 12, 147_456), (24, 1024, 16, 393_216), (36, 1280, 20, 737_280)],
    ids=["small", "medium", "large"],
)
def test_rank_4_on_q_and_v_trains_as_many_parameters_as_the_paper_says(
    n_layer: int, n_embd: int, n_head: int, expected: int
) -> None:
    with torch.device("meta"):
        model = GPT2(GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_head))
    method = LoRA(rank=4, targets=("c_attn.q", "c_attn.v"))
    method.adapt(model)
    assert sum(p.numel() for p in method.trainable(model).values()) == expected


# --- Fused q, k and v ----------------------------------------------------------------------------------


def merged_linear(x: Tensor, base: Conv1D, A: Tensor, B: Tensor, enabled: tuple[bool, ...], s: float) -> Tensor:
    """loralib's `MergedLinear` (its `merge_AB` and `zero_pad`), written again: a grouped convolution of A's
    output with B, spread over the rows that are enabled."""
    groups = sum(enabled)
    delta = F.conv1d(A[None], B[..., None], groups=groups)[0]  # (n d, in)
    rows = torch.tensor(enabled).repeat_interleave(base.out_features // len(enabled))
    padded = torch.zeros(base.out_features, base.in_features)
    padded[rows] = delta
    return F.linear(x, base.weight.T + s * padded, base.bias)


@given(
    st.sampled_from([("q",), ("v",), ("q", "v"), ("v", "k"), ("q", "k", "v")]), st.integers(1, 2), st.integers(0, 99)
)
@few
def test_lora_on_parts_of_c_attn_is_loralibs_merged_linear(parts: tuple[str, ...], rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    base = Conv1D(8, 24)
    nn.init.normal_(base.weight)
    nn.init.normal_(base.bias)
    layer = FusedLoRALinear(base, parts, ("q", "k", "v"), rank=rank, alpha=6)
    randomise(layer)
    x = torch.randn(5, 8)
    enabled = tuple(part in parts for part in ("q", "k", "v"))
    expected = merged_linear(x, base, layer.lora_A, layer.lora_B, enabled, 6 / rank)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
    untouched = [8 * i + j for i, on in enumerate(enabled) if not on for j in range(8)]
    assert torch.equal(layer(x)[:, untouched], base(x)[:, untouched])
    layer.merge()
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_rank_4_on_q_and_on_v_is_another_model_than_rank_4_on_c_attn_of_the_same_size() -> None:
    fused, whole = tiny_gpt2(), tiny_gpt2()
    on_parts, on_all = LoRA(rank=4, targets=("c_attn.q", "c_attn.v")), LoRA(rank=4, targets=("c_attn",))
    on_parts.adapt(fused)
    on_all.adapt(whole)
    count = [sum(p.numel() for p in m.trainable(g).values()) for m, g in ((on_parts, fused), (on_all, whole))]
    assert count[0] == count[1]
    randomise(fused)
    layer = lora_layers(fused)["transformer.h.0.attn.c_attn"]
    A, B = layer.factors()
    assert torch.linalg.matrix_rank(delta_weight(A, B, layer.scaling)) == 8
    assert not delta_weight(A, B, layer.scaling)[32:64].any()  # k


# --- The model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [("c_attn", "c_proj", "c_fc"), ("c_attn.q", "c_attn.v", "mlp.c_proj")])
def test_a_merged_model_gives_the_same_logits_and_unmerges_bit_for_bit(targets: tuple[str, ...]) -> None:
    model, method, tokens = tiny_gpt2(), LoRA(rank=4, targets=targets), some_tokens()
    method.adapt(model)
    train(model, method)
    before, logits = snapshot(model), model(tokens)
    method.merge(model)
    method.merge(model)
    assert not torch.equal(
        snapshot(model)["transformer.h.0.attn.c_attn.base.weight"], before["transformer.h.0.attn.c_attn.base.weight"]
    )
    torch.testing.assert_close(model(tokens), logits, atol=1e-5, rtol=1e-5)
    method.unmerge(model)
    method.unmerge(model)
    assert_same(snapshot(model), before)
    assert torch.equal(model(tokens), logits)
    method.merge(model)
    method.undo(model)  # out of the merged state as well
    assert_same(snapshot(model), snapshot(tiny_gpt2()))


def test_a_merged_copy_is_a_plain_gpt2_with_the_same_logits() -> None:
    model, method, tokens = tiny_gpt2(), LoRA(rank=4), some_tokens()
    method.adapt(model)
    train(model, method)
    before = snapshot(model)
    plain = method.merged_copy(model)
    assert plain.state_dict().keys() == tiny_gpt2().state_dict().keys()
    assert not lora_layers(plain)
    assert all(p.requires_grad for p in plain.parameters())
    torch.testing.assert_close(plain(tokens), model(tokens), atol=1e-5, rtol=1e-5)
    assert_same(snapshot(model), before)


def test_a_task_is_switched_in_a_merged_model() -> None:
    model, method, tokens = tiny_gpt2(), LoRA(rank=4), some_tokens()
    method.adapt(model)
    train(model, method, seed=0)
    state, logits = method.state_dict(model), model(tokens)
    train(model, method, seed=1)
    method.merge(model)
    method.load_state_dict(model, state)
    assert all(layer.merged for layer in lora_layers(model).values())
    torch.testing.assert_close(model(tokens), logits, atol=1e-5, rtol=1e-5)
    method.unmerge(model)
    assert torch.equal(model(tokens), logits)


def test_the_seed_alone_decides_how_a_starts() -> None:
    def starts(seed: int) -> dict[str, Tensor]:
        model, method = tiny_gpt2(), LoRA(rank=4, seed=seed)
        torch.rand(3)  # PyTorch's own stream does not matter
        method.adapt(model)
        return method.state_dict(model)

    assert_same(starts(0), starts(0))
    assert not torch.equal(*(starts(seed)["transformer.h.0.attn.c_attn.lora_A"] for seed in (0, 1)))
    first = starts(0)
    assert not torch.equal(first["transformer.h.0.attn.c_attn.lora_A"], first["transformer.h.1.attn.c_attn.lora_A"])


def test_without_the_protocol_lora_can_be_put_into_any_model_and_marked() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    inject_lora(model, {"0": LoRALinear(model[0], 2), "2": LoRALinear(model[2], 2)})
    mark_only_lora_as_trainable(model)
    names = {"0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names
    assert lora_state_dict(model).keys() == names


def test_the_training_flag_of_the_model_is_kept() -> None:
    for training in (True, False):
        model, method = tiny_gpt2().train(training), LoRA(dropout=0.5)
        method.adapt(model)
        assert all(layer.training == training for layer in lora_layers(model).values())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, method = tiny_gpt2().train(), LoRA(rank=4, dropout=0.2)
        method.adapt(model)
        randomise_with_seed(model)
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(3)
        model(some_tokens()).square().mean().backward()
        gradients.append([p.grad for p in method.trainable(model).values()])
    for a, b in zip(*gradients, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def randomise_with_seed(model: nn.Module) -> None:
    torch.manual_seed(11)
    randomise(model)
