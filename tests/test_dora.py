"""DoRA: its law, and the same numbers as peft's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.checks.unit_15.probes import LargestNewTensor
from lora_from_scratch.methods.dora import DoRA, DoRALinear, row_norms
from lora_from_scratch.methods.lora import LoRALinear
from lora_from_scratch.methods.registry import load_adapter
from tests.any_models import logits_of, model_of, randomise, weighted_mean
from tests.test_any_model import NAMED, adapted, read_by_peft

KINDS = ["gpt2", "llama", "qwen2", "gpt-neox", "vit", "mlp"]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.floats(-3, 3), st.integers(0, 999))
def test_the_norms_are_those_of_the_rows_of_the_changed_weight(
    out: int, inputs: int, rank: int, scaling: float, seed: int
) -> None:
    torch.manual_seed(seed)
    W, A, B = torch.randn(out, inputs), torch.randn(rank, inputs), torch.randn(out, rank)
    V = W.double() + scaling * B.double() @ A.double()
    torch.testing.assert_close(row_norms(W, A, B, scaling).double(), V.norm(dim=1), atol=2e-3, rtol=1e-4)


def test_the_norms_need_no_tensor_of_the_size_of_the_weight() -> None:
    torch.manual_seed(0)
    W, A, B = torch.randn(30, 40), torch.randn(2, 40), torch.randn(30, 2)
    with LargestNewTensor(W, A, B) as largest:
        row_norms(W, A, B, 2.0)
    assert 0 < largest.elements <= B.numel()
    with LargestNewTensor(W, A, B) as largest:
        (W + 2.0 * B @ A).norm(dim=1)
    assert largest.elements == W.numel()


def layer(bias: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    made: Any = DoRALinear(nn.Linear(6, 4, bias=bias), 2, 3.0, **options)
    with torch.no_grad():
        made.lora_B.normal_()
        made.lora_magnitude.add_(torch.randn(4))
    return made


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_computes_the_equation_of_the_paper(bias: bool) -> None:
    dora = layer(bias)
    V = dora.base.weight + dora.scaling * dora.lora_B @ dora.lora_A
    W = dora.lora_magnitude[:, None] * V / V.norm(dim=1, keepdim=True)
    x = torch.randn(5, 3, 6)
    torch.testing.assert_close(dora(x), F.linear(x, W, dora.base.bias))


def test_the_norm_is_a_constant_for_the_gradient() -> None:
    dora, x = layer(), torch.randn(5, 6)
    norms: Tensor = dora.norms()
    dora(x).square().sum().backward()
    A, B = (p.detach().clone().requires_grad_(True) for p in (dora.lora_A, dora.lora_B))
    V = dora.base.weight.detach() + dora.scaling * B @ A
    F.linear(x, dora.lora_magnitude.detach()[:, None] * V / norms[:, None], dora.base.bias).square().sum().backward()
    torch.testing.assert_close(dora.lora_A.grad, A.grad)
    torch.testing.assert_close(dora.lora_B.grad, B.grad)


def test_dropout_is_on_the_way_through_a_and_b_only() -> None:
    dora = layer(dropout=0.5).train()
    with torch.no_grad():
        dora.lora_B.zero_()
    x = torch.randn(5, 6)
    assert torch.equal(dora(x), dora(x))


def test_a_row_of_zeros_stays_finite() -> None:
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight[0] = 0
    dora = DoRALinear(linear, 1)
    y = dora(torch.ones(1, 3))
    y.sum().backward()
    assert torch.equal(y, linear(torch.ones(1, 3)))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (dora.lora_A, dora.lora_B, dora.lora_magnitude))


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """What a forward pass keeps for the backward pass, each storage once, without the parameters."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(x)
    assert y.requires_grad
    return sum(kept.values())


def test_beside_loras_it_keeps_one_tensor_of_the_size_of_the_output() -> None:
    x = torch.randn(50, 64)
    lora, dora = LoRALinear(nn.Linear(64, 32), 2), DoRALinear(nn.Linear(64, 32), 2)
    extra = kept_bytes(dora, x) - kept_bytes(lora, x)
    assert 50 * 32 * 4 <= extra <= 50 * 32 * 4 + 3 * 32 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_pefts_and_adapters_travel_both_ways(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    method = DoRA(rank=2, alpha=6, targets=NAMED[kind])
    model = adapted(kind, method)
    method.save(model, tmp_path / "ours")
    theirs = read_by_peft(kind, tmp_path / "ours")
    compare(model, method, theirs, kind)

    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=list(NAMED[kind]), use_dora=True, fan_in_fan_out=kind.startswith("gpt2")
    )
    theirs = peft.get_peft_model(model_of(kind), config).eval()
    torch.testing.assert_close(logits_of(theirs, kind), logits_of(model_of(kind), kind))
    randomise({name: p for name, p in theirs.named_parameters() if p.requires_grad}, seed=2)
    theirs.save_pretrained(tmp_path / "theirs")
    back = model_of(kind)
    compare(back, load_adapter(back, tmp_path / "theirs"), theirs, kind)


def compare(model: Any, method: Any, theirs: Any, kind: str) -> None:
    """Logits, and the gradients of A, B and m, within 1e-5."""
    names = {
        name: name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    logits, expected = logits_of(model, kind), logits_of(theirs, kind)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    weighted_mean(logits).backward()
    weighted_mean(expected).backward()
    given = dict(theirs.named_parameters())
    wanted = {short.replace("_magnitude_vector", "_magnitude"): given[name].grad for name, short in names.items()}
    ours = method.trainable(model)
    assert ours.keys() == wanted.keys()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5, rtol=1e-4)


def test_a_part_of_a_fused_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="DoRA adapts whole layers"):
        DoRA(targets=("c_attn.q",)).adapt(model_of("gpt2"))
