"""Adapters against their equations, written here once more, and against the laws that they must keep."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_from_scratch.methods.registry import load_adapter
from torch import Tensor, nn

from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.adapters import (
    PLACES,
    Adapter,
    BottleneckAdapter,
    NormedAdapter,
    ParallelAdapter,
    adapter_parameter_count,
    insert_adapters,
    remove_adapters,
)
from lora_from_scratch.methods.method import Method, adaptation_of
from tests.helpers import tiny_model
from tests.test_method import assert_same, snapshot

few = settings(max_examples=20, deadline=None)
every_variant = pytest.mark.parametrize("variant", list(PLACES))


def tokens(rows: int = 3, length: int = 10) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(5))


def adapted(variant: str, randomised: bool = False, **options: int) -> tuple[GPT2, Adapter]:
    model, method = tiny_model(), Adapter(width=5, variant=variant, **options)  # type: ignore[arg-type]
    method.adapt(model)
    if randomised:
        randomise(method.trainable(model).values())
    return model, method


def randomise(parameters: Iterable[Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in parameters:
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))


# --- The equations ---------------------------------------------------------------------------------------


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(...)), in the exponential's own terms."""
    z = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return x / (1 + torch.exp(-2 * z))


def normed(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + shift


def formula(kind: str, x: Tensor, p: dict[str, Tensor], s: float) -> Tensor:
    """What an adapter has to give, from its tensors by name; sums written out as einsum."""

    def through(name: str, h: Tensor) -> Tensor:
        return torch.einsum("oi,...i->...o", p[f"{name}.weight"], h) + p.get(f"{name}.bias", torch.zeros(()))

    if kind == "bottleneck":
        return x + through("up", gelu(through("down", x)))
    if kind == "normed":
        return x + through("up", through("down", normed(x, p["norm.weight"], p["norm.bias"])).clamp(min=0))
    return s * through("up", through("down", x).clamp(min=0))


@pytest.mark.parametrize("kind", ["bottleneck", "normed", "parallel"])
@given(d=st.integers(2, 9), width=st.integers(1, 9), rows=st.integers(1, 4), seed=st.integers(0, 999))
@few
def test_an_adapter_and_its_gradients_are_those_of_its_equation(
    kind: str, d: int, width: int, rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    s = 0.5 + seed / 500
    adapter: nn.Module = ParallelAdapter(d, width, s)
    if kind != "parallel":
        adapter = BottleneckAdapter(d, width) if kind == "bottleneck" else NormedAdapter(d, width)
    adapter.double()
    randomise(adapter.parameters())
    x = torch.randn(rows, 3, d, dtype=torch.float64, requires_grad=True)
    copies = {name: p.detach().clone().requires_grad_() for name, p in adapter.named_parameters()}
    x_copy = x.detach().clone().requires_grad_()
    ours, expected = adapter(x), formula(kind, x_copy, copies, s)
    torch.testing.assert_close(ours, expected)
    weighting = torch.randn_like(ours)
    (ours * weighting).sum().backward()
    (expected * weighting).sum().backward()
    torch.testing.assert_close(x.grad, x_copy.grad)
    for name, p in adapter.named_parameters():
        torch.testing.assert_close(p.grad, copies[name].grad, msg=name)


@every_variant
def test_each_variant_puts_its_adapters_where_its_paper_says(variant: str) -> None:
    """The block, written out from the base's own modules and the learned tensors."""
    model, method = adapted(variant, randomised=True)
    learned, base = method.state_dict(model), tiny_model()
    x = base.transformer.wte(tokens()) + base.transformer.wpe(torch.arange(10))

    def adapter(layer: int, place: str, kind: str, x: Tensor) -> Tensor:
        prefix = f"transformer.h.{layer}.{place}adapter."
        return formula(kind, x, {n[len(prefix) :]: t for n, t in learned.items() if n.startswith(prefix)}, 1.0)

    for i, block in enumerate(base.transformer.h):
        a = block.attn(block.ln_1(x))  # type: ignore[operator]
        x = x + (adapter(i, "attn.", "bottleneck", a) if variant == "houlsby" else a)
        z = block.ln_2(x)  # type: ignore[operator]
        m = block.mlp(z)  # type: ignore[operator]
        if variant in ("houlsby", "pfeiffer"):
            m = adapter(i, "mlp.", "bottleneck", m)
        elif variant == "parallel":
            m = m + adapter(i, "mlp.", "parallel", z)
        x = x + m
        if variant == "lin":
            x = adapter(i, "", "normed", x)
    expected = base.transformer.ln_f(x) @ base.transformer.wte.weight.T
    torch.testing.assert_close(model(tokens()), expected, atol=2e-4, rtol=1e-4)


def test_the_scaling_of_a_parallel_adapter_scales_what_it_adds() -> None:
    adapter, twice = ParallelAdapter(6, 3, 1.5), ParallelAdapter(6, 3, 3.0)
    randomise(adapter.parameters())
    twice.load_state_dict(adapter.state_dict())
    x = torch.randn(4, 6)
    torch.testing.assert_close(twice(x), 2 * adapter(x))


def test_a_bottleneck_of_24_costs_49152_weights_and_not_a_million() -> None:
    adapter = BottleneckAdapter(1024, 24)
    assert adapter.down.weight.numel() + adapter.up.weight.numel() == 49_152
    assert adapter_parameter_count(1024, 24, bias=False) == 49_152
    assert sum(p.numel() for p in adapter.parameters()) == adapter_parameter_count(1024, 24) == 49_152 + 24 + 1024
    assert 1024 * 1024 == 1_048_576


@given(d=st.integers(1, 12), width=st.integers(1, 12), n=st.integers(1, 5))
@few
def test_the_formula_of_the_count_counts_the_modules(d: int, width: int, n: int) -> None:
    for module, expected in [
        (BottleneckAdapter(d, width), adapter_parameter_count(d, width, n)),
        (NormedAdapter(d, width), adapter_parameter_count(d, width, n, norms=n)),
        (ParallelAdapter(d, width), adapter_parameter_count(d, width, n, bias=False)),
    ]:
        assert n * sum(p.numel() for p in module.parameters()) == expected


# --- The start -------------------------------------------------------------------------------------------


@every_variant
def test_at_the_start_nothing_moves_by_more_than_a_thousandth(variant: str) -> None:
    model = tiny_model(std=0.1)
    before = model(tokens())
    Adapter(width=24, variant=variant).adapt(model)
    difference = (model(tokens()) - before).abs().max().item()
    assert difference < 1e-3
    assert difference > 0 or variant == "parallel"


@given(seed=st.integers(0, 999), scale=st.floats(0.01, 10))
@few
def test_a_new_adapter_is_nearly_the_identity_and_a_new_parallel_one_adds_exactly_nothing(
    seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(8, 64, generator=generator)
    for adapter in (BottleneckAdapter(64, 24, generator), NormedAdapter(64, 24, generator)):
        assert (adapter(x) - x).abs().max() < 1e-3 * max(1, scale)
    assert not ParallelAdapter(64, 24, 4.0, generator)(x).any()


def test_a_new_bottleneck_is_drawn_from_a_normal_of_a_thousandth_cut_off_at_two_of_them() -> None:
    adapter = BottleneckAdapter(300, 200, torch.Generator().manual_seed(0))
    for layer in (adapter.down, adapter.up):
        assert not layer.bias.any()
        assert 1.99e-3 < layer.weight.abs().max() <= 2e-3
        assert layer.weight.std().item() == pytest.approx(0.8796e-3, rel=0.01)  # of such a normal


def test_the_seed_alone_decides_how_adapters_start() -> None:
    first, again, other = (adapted("houlsby", seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert_same(first, again)
    name = "transformer.h.0.attn.adapter.down.weight"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("attn", "mlp")])


# --- The protocol ----------------------------------------------------------------------------------------


@every_variant
def test_training_moves_the_adapters_and_not_one_bit_of_the_base(variant: str) -> None:
    model, method = adapted(variant)
    before, names = snapshot(model), set(method.trainable(model))
    assert all(".adapter." in name for name in names)
    train_tiny(model, method, steps=20)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == names
    assert all(p.grad is None and not p.requires_grad for n, p in model.named_parameters() if n not in names)


@every_variant
def test_undo_gives_back_the_same_objects_and_bits(variant: str) -> None:
    model = tiny_model().train()
    before, objects = snapshot(model), [(name, id(module)) for name, module in model.named_modules()]
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    method = Adapter(width=3, variant=variant, layers=[1])
    method.adapt(model)
    assert all(module.training for module in model.modules())
    train_tiny(model, method)
    method.undo(model)
    assert_same(snapshot(model), before)
    assert [(name, id(module)) for name, module in model.named_modules()] == objects
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    method.adapt(model)


@every_variant
def test_what_is_saved_and_loaded_gives_the_same_logits_bit_for_bit(variant: str, tmp_path: Path) -> None:
    model, method = adapted(variant)
    train_tiny(model, method)
    method.save(model, tmp_path / "saved")
    twin = tiny_model()
    assert load_adapter(twin, tmp_path / "saved") == method
    assert torch.equal(twin(tokens()), model(tokens()))
    method.undo(twin)
    assert torch.equal(twin(tokens()), tiny_model()(tokens()))


@every_variant
def test_an_adapted_model_generates_with_a_cache_as_without(variant: str) -> None:
    model, _ = adapted(variant, randomised=True)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    with_cache = generate(model, prompts, max_new_tokens=8)
    assert with_cache == generate(model, prompts, max_new_tokens=8, use_cache=False)
    assert with_cache != generate(tiny_model(), prompts, max_new_tokens=8)


@every_variant
def test_gradient_checkpointing_changes_no_gradient_of_an_adapter(variant: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, method = adapted(variant, randomised=True)
        model.train().gradient_checkpointing = checkpointing
        model(tokens()).square().mean().backward()
        gradients.append([p.grad for p in method.trainable(model).values()])
    for a, b in zip(*gradients, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_adapters_can_be_left_out_of_layers() -> None:
    model = tiny_model(n_layer=4)
    method = Adapter(width=3, layers=[3, 1, 1])
    method.adapt(model)
    assert sorted({name.split(".")[2] for name in method.trainable(model)}) == ["1", "3"]
    assert len(insert_adapters(tiny_model(), 3, "pfeiffer")) == 2


@pytest.mark.parametrize("variants", [("pfeiffer", "pfeiffer"), ("houlsby", "lin"), ("parallel", "houlsby", "lin")])
def test_adapters_that_were_put_in_more_than_once_all_come_out(variants: tuple[str, ...]) -> None:
    model = tiny_model()
    objects = [(name, id(module)) for name, module in model.named_modules()]
    for variant in variants:
        insert_adapters(model, 3, variant)
    remove_adapters(model)
    assert [(name, id(module)) for name, module in model.named_modules()] == objects


def test_adapters_cannot_be_merged() -> None:
    model, method = adapted("houlsby")
    with pytest.raises(ValueError, match="adapter cannot be merged"):
        method.merge(model)


def test_bad_hyperparameters_are_refused_with_the_value_and_what_is_allowed() -> None:
    for options, message in [
        ({"width": 0}, "width must be a whole number of at least 1, got 0"),
        ({"width": 2.5}, "width must be a whole number of at least 1, got 2.5"),
        ({"variant": "hulsby"}, "variant must be one of houlsby, pfeiffer, lin, parallel, got 'hulsby'"),
        ({"variant": "parallel", "scaling": 0}, "scaling must be a positive number, got 0"),
        ({"variant": "parallel", "scaling": math.nan}, "scaling must be a positive number, got nan"),
        ({"scaling": 4}, "scaling=4 is for the variant 'parallel'; 'houlsby' has none"),
        ({"layers": ("first",)}, "layers must be whole numbers, counted from 0, got 'first'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Adapter(**options)  # type: ignore[arg-type]
    for method, message in [
        (Adapter(width=25), r"width must be between 1 and 24 \(a bottleneck .* got 25"),
        (Adapter(layers=(0, 2)), r"layers must be from 0 to 1 \(the model has 2\), got 2"),
        (Adapter(layers=(-1,)), "layers must be from 0 to 1 .* got -1"),
    ]:
        model = tiny_model()
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(ValueError, match=message):
            method.adapt(model)
        assert [name for name, _ in model.named_modules()] == names
        assert adaptation_of(model) is None


def test_an_adapter_of_another_model_and_an_unknown_field_are_refused_by_name(tmp_path: Path) -> None:
    model, method = adapted("pfeiffer")
    method.save(model, tmp_path)
    with pytest.raises(ValueError, match=r"down.weight \(5, 24\) instead of \(5, 12\)"):
        load_adapter(tiny_model(n_embd=12), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"width"', '"depth": 3, "width"'))
    with pytest.raises(ValueError, match=r"depth=3, which is not supported.*width"):
        load_adapter(tiny_model(), tmp_path)


def train_tiny(model: GPT2, method: Method, steps: int = 4) -> None:
    optimizer = torch.optim.AdamW(method.trainable(model).values(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        model(tokens()).log_softmax(-1)[..., 7].mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
