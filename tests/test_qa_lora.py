"""QA-LoRA: the equation, and the merge that stays in its bits.

Compared with yuhuixu1993/qa-lora at 91604c7 (`merge.py`): run on random numbers it gives our zeros within 2e-8, once
the mean is taken for the sum and -zero / scale for the zero-point.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_from_scratch.finetune.accounting import memory_of
from lora_from_scratch.gpt2.checkpoint import load_model, save_gpt2
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.lora import LoRA, LoRALinear
from lora_from_scratch.methods.qa_lora import QALoRA, QALoRALinear, merge_into_zeros, sum_groups
from lora_from_scratch.methods.qlora import QLoRA, quantize_model
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.quantization.low_bit import LowBitTensor, quantize_integer
from lora_from_scratch.quantization.low_bit_linear import LowBitLinear
from lora_from_scratch.quantization.nf4_linear import quantized_layers
from tests.any_models import logits_of, model_of, randomise
from tests.helpers import real_checkpoint, tiny_model
from tests.test_method import assert_same, snapshot


def layer_of(bits: int = 4, group_size: int = 8, inputs: int = 20, outputs: int = 6) -> QALoRALinear:
    torch.manual_seed(0)
    base = nn.Linear(inputs, outputs)
    quantized = LowBitLinear.in_place_of(base, quantize_integer(base.weight, bits, group_size))
    rank = min(2, quantized.quantized.groups)
    layer = QALoRALinear(quantized, rank=rank, alpha=3 * rank)  # s = 3
    randomise({"A": layer.lora_A, "B": layer.lora_B})
    return layer


def trained(method: QALoRA, model: Any) -> Any:
    method.adapt(model)
    randomise(method.trainable(model), size=0.05)
    return model


def logits(model: GPT2) -> Tensor:
    tokens = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result: Tensor = model(tokens)
    return result


# --- The equation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [1, 4, 8, 20, 32])
def test_the_layer_computes_the_equation(group_size: int) -> None:
    layer = layer_of(group_size=group_size)
    groups = -(-20 // group_size)
    P = torch.zeros(groups, 20)
    for j in range(20):
        P[j // group_size, j] = 1
    x = torch.randn(5, 3, 20)
    torch.testing.assert_close(sum_groups(x, group_size), x @ P.T)
    expected = x @ (3 * layer.lora_B @ layer.lora_A @ P).T
    torch.testing.assert_close(layer(x) - layer.base(x), expected, atol=1e-5, rtol=1e-4)
    assert layer.lora_A.shape == (min(2, groups), groups)


def test_with_groups_of_one_it_is_lora() -> None:
    layer = layer_of(group_size=1)
    lora = LoRALinear(layer.base, rank=2, alpha=6)
    lora.load_state_dict(layer.state_dict())
    x = torch.randn(5, 20)
    torch.testing.assert_close(layer(x), lora(x))


def test_it_learns_r_numbers_for_each_group_and_each_output() -> None:
    model = load_model(real_checkpoint())
    d, blocks = model.config.n_embd, model.config.n_layer
    method = QALoRA(targets=("c_attn", "c_fc"), rank=4, group_size=32)
    method.adapt(model)
    groups = d // 32
    count = blocks * 4 * ((groups + 3 * d) + (groups + 4 * d))
    assert sum(p.numel() for p in method.trainable(model).values()) == count


def test_pefts_pooling_is_ours_times_the_number_of_groups_over_their_size() -> None:
    variants = pytest.importorskip("peft.tuners.lora.variants")
    layer = layer_of(group_size=5)
    x = torch.randn(7, 20)

    def holding(weight: Tensor) -> dict[str, Any]:
        return {"default": SimpleNamespace(weight=weight)}

    theirs = SimpleNamespace(
        lora_A=holding(layer.lora_A), lora_B=holding(layer.lora_B), lora_dropout={"default": nn.Identity()},
        scaling={"default": 3.0}, qalora_group_size={"default": 5}, in_features=20, training=False,
    )  # fmt: skip
    result = variants.QALoraLinearVariant.forward(theirs, "default", x, torch.zeros(7, 6))
    torch.testing.assert_close(result, (layer(x) - layer.base(x)) * 4 / 5, atol=1e-5, rtol=1e-4)


# --- The merge ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [4, 8])
def test_a_merged_weight_is_made_of_the_same_codes_and_the_same_scales(bits: int, group_size: int) -> None:
    layer = layer_of(bits, group_size)
    x, before = torch.randn(5, 20), layer.base.quantized
    y = layer(x)
    layer.merge()
    after = layer.base.quantized
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)
    assert after.packed is before.packed
    assert after.absmax is before.absmax
    W = after.dequantize()
    for start in range(0, 20, group_size):
        values = [len(row.unique()) for row in W[:, start : start + group_size]]
        assert max(values) <= 2**bits
    again = quantize_integer(W, bits, group_size)  # what is in b bits already is not changed by quantising it
    torch.testing.assert_close(again.dequantize(), W, atol=1e-6, rtol=1e-6)
    layer.unmerge()
    assert layer.base.quantized is before or torch.equal(layer.base.quantized.zero, before.zero)  # type: ignore[arg-type]
    assert torch.equal(layer(x), y)


def test_the_merged_zeros_add_to_every_weight_of_a_group_what_its_sum_was_multiplied_by() -> None:
    torch.manual_seed(0)
    zero, A, B, x = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2), torch.randn(3, 20)
    change = (merge_into_zeros(zero, A, B, 0.7) - zero).repeat_interleave(4, dim=1)
    torch.testing.assert_close(x @ change.T, 0.7 * sum_groups(x, 4) @ A.T @ B.T, atol=1e-5, rtol=1e-5)


def test_the_zero_points_of_gptq_change_by_the_change_over_the_scale() -> None:
    """The rule of the authors' `merge.py`, for the mean of a group in place of its sum."""
    layer = layer_of(group_size=4)
    q = layer.base.quantized
    assert q.zero is not None
    zero_point = -q.zero / q.scale
    of_the_mean = (4 * layer.lora_B) @ layer.lora_A  # B A as it would be learned on means
    expected = zero_point - 3 * of_the_mean / 4 / q.scale
    layer.merge()
    merged = layer.base.quantized.zero
    assert merged is not None
    torch.testing.assert_close(-merged / q.scale, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_merged_model_stays_as_small_and_computes_the_same(bits: int) -> None:
    method = QALoRA(bits=bits)
    model = trained(method, load_model(real_checkpoint()))
    adapted, layers = logits(model), quantized_layers(model)
    assert len(layers) == 4 * model.config.n_layer
    size = sum(layer.quantized.nbytes for layer in layers.values())
    method.merge(model)
    assert quantized_layers(model) == layers
    assert all(isinstance(layer.quantized, LowBitTensor) and layer.quantized.bits == bits for layer in layers.values())
    assert sum(layer.quantized.nbytes for layer in layers.values()) == size
    torch.testing.assert_close(logits(model), adapted, atol=1e-4, rtol=1e-4)


def test_a_qlora_that_is_merged_and_quantised_again_loses_what_qa_lora_keeps(tmp_path: Path) -> None:
    lost = {}
    for name, method in {"qa-lora": QALoRA(), "qlora": QLoRA()}.items():
        model = load_model(real_checkpoint())
        method.adapt(model)
        randomise(method.trainable(model), size=0.02)
        before = logits(model)
        if isinstance(method, QLoRA):
            plain = method.merged_copy(model)
            quantize_model(plain)
            lost[name] = float((logits(plain) - before).abs().max())
        else:
            method.merge(model)
            lost[name] = float((logits(model) - before).abs().max())
    assert lost["qa-lora"] < 1e-4
    assert lost["qlora"] > 100 * lost["qa-lora"]


def test_a_merged_copy_is_a_plain_model_whose_weights_have_few_values(tmp_path: Path) -> None:
    method = QALoRA(bits=2, group_size=8, rank=2)
    model = trained(method, tiny_model())
    plain = method.merged_copy(model)
    save_gpt2(plain, None, tmp_path)  # refuses anything but a plain GPT-2
    again = load_model(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-4, rtol=1e-4)
    weight = again.transformer.h[0].attn.c_attn.weight.T  # type: ignore[union-attr]
    assert all(len(row[:8].unique()) <= 4 for row in weight)  # type: ignore[union-attr]
    assert all(p.requires_grad for p in plain.parameters())


# --- Any model, memory, and what is refused ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt-neox"])
def test_it_works_on_any_model(kind: str, tmp_path: Path) -> None:
    method = QALoRA(rank=2, alpha=4, targets="all-linear", bits=3, group_size=8)
    model, base, back = trained(method, model_of(kind)), model_of(kind), model_of(kind)
    adapted = logits_of(model, kind)
    method.save(model, tmp_path)
    assert load_adapter(back, tmp_path) == method
    assert torch.equal(logits_of(back, kind), adapted)
    method.merge(model)
    torch.testing.assert_close(logits_of(model, kind), adapted, atol=1e-4, rtol=1e-4)
    method.undo(model)
    assert_same(snapshot(model), snapshot(base))
    assert torch.equal(logits_of(model, kind), logits_of(base, kind))


def test_a_keeps_sums_of_groups_for_its_gradient_and_not_the_whole_input() -> None:
    kept = {}
    for name, method in {"qa-lora": QALoRA(group_size=8, rank=2), "lora": LoRA(rank=2)}.items():
        model = tiny_model()
        method.adapt(model)
        kept[name] = memory_of(model.train(), 2, 16, precision="fp32").activations
    assert kept["qa-lora"] < kept["lora"]


def test_without_keep_base_the_full_weights_are_gone() -> None:
    method, model = QALoRA(rank=2, group_size=8, keep_base=False), tiny_model()
    method.adapt(model)
    with pytest.raises(ValueError, match="keep_base=False"):
        method.undo(model)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (QALoRA(targets=("c_attn.q",), rank=1), "got a part of .*c_attn; give the layer as a target"),
        (QALoRA(rank=4, group_size=8), "rank must be between 1 and 3 .*number of groups"),
        (QALoRA(targets=("nothing",)), "'nothing' matches nothing"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_and_the_model_stays_as_it_was(method: QALoRA, message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        method.adapt(model)
    assert_same(snapshot(model), snapshot(tiny_model()))


def test_a_model_that_is_quantised_in_another_way_is_refused() -> None:
    model = tiny_model()
    quantize_model(model)
    with pytest.raises(ValueError, match="c_attn is quantised already, in another way"):
        QALoRA(rank=1).adapt(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8, got 5"),
        ({"group_size": 0}, "group_size must be a whole number of at least 1, got 0"),
        ({"rank": 0}, "rank must be .* got 0"),
    ],
)
def test_a_bad_hyperparameter_is_refused_when_the_method_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QALoRA(**options)
