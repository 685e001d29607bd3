"""QLoRA, adapters and BitFit on models that are not ours, and the methods that refuse them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_from_scratch.methods.adapter_files import CONFIG_FILE
from lora_from_scratch.methods.adapters import Adapter, AdapterAfter
from lora_from_scratch.methods.bitfit import BitFit
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.galore import GaLore
from lora_from_scratch.methods.loftq import LoftQ
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method, adaptation_of
from lora_from_scratch.methods.placement import linear_layers
from lora_from_scratch.methods.qlora import QLoRA, quantize_model
from lora_from_scratch.methods.registry import load_adapter, method_classes
from lora_from_scratch.quantization.nf4_linear import nf4_layers
from lora_from_scratch.support.linear_layers import weight_of
from tests.any_models import ARCHITECTURES, WIDTH, inputs_of, logits_of, model_of, randomise, weighted_mean
from tests.helpers import tiny_model, transformers_twin
from tests.test_method import assert_same, snapshot

METHODS: dict[str, Method] = {
    "lora": LoRA(rank=2, alpha=4, targets="all-linear"),
    "qlora": QLoRA(rank=2, alpha=4, targets="all-linear"),
    "loftq": LoftQ(rank=2, alpha=4, targets="all-linear"),
    "houlsby": Adapter(width=4),
    "pfeiffer": Adapter(width=4, variant="pfeiffer"),
    "lin": Adapter(width=4, variant="lin"),
    "parallel": Adapter(width=4, variant="parallel", scaling=2.0),
    "bitfit": BitFit(),
    "two biases": BitFit(variant="two"),
    "full": FullFineTuning(),
    "galore": GaLore(rank=2, rest=True),
}
DOES_NOT_FIT = {("llama", "bitfit"), ("llama", "two biases"), ("qwen2", "two biases"), ("gpt-neox", "two biases")}
CASES = [(kind, name) for kind in ARCHITECTURES for name in METHODS if (kind, name) not in DOES_NOT_FIT]
every_case = pytest.mark.parametrize(("kind", "name"), CASES)


def adapted(kind: str, method: Method) -> Any:
    """With whatever might have been learned."""
    model = model_of(kind)
    method.adapt(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in method.trainable(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def assert_refused(kind: str, method: Method, message: str) -> None:
    model = model_of(kind)
    with pytest.raises(ValueError, match=message) as error:
        method.adapt(model)
    assert "\n" not in str(error.value)
    assert adaptation_of(model) is None
    assert_same(snapshot(model), snapshot(model_of(kind)))
    assert all(p.requires_grad for p in model.parameters())


# --- Every method that fits -----------------------------------------------------------------------------------


@every_case
def test_a_method_changes_what_the_model_says_trains_what_it_lists_and_is_undone_bit_for_bit(
    kind: str, name: str
) -> None:
    method, model, base = METHODS[name], adapted(kind, METHODS[name]), model_of(kind)
    assert not torch.allclose(logits_of(model, kind), logits_of(base, kind), atol=1e-3)
    weighted_mean(logits_of(model, kind)).backward()
    learned = method.trainable(model)
    assert learned
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (parameter_name in learned), parameter_name
    modules, parameters = dict(model_of(kind).named_modules()), dict(base.named_parameters())
    method.undo(model)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in modules.items()}
    assert_same(snapshot(model), snapshot(base))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert [n for n, _ in model.named_parameters()] == list(parameters)
    assert torch.equal(logits_of(model, kind), logits_of(base, kind))


@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if not METHODS[case[1]].saves_model])
def test_what_is_saved_and_loaded_gives_the_same_logits_bit_for_bit(kind: str, name: str, tmp_path: Path) -> None:
    method, back = METHODS[name], model_of(kind)
    model = adapted(kind, method)
    method.save(model, tmp_path)
    assert load_adapter(back, tmp_path) == method
    assert torch.equal(logits_of(back, kind), logits_of(model, kind))


@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if METHODS[case[1]].can_merge])
def test_a_merged_copy_computes_the_same_and_transformers_saves_and_loads_it(
    kind: str, name: str, tmp_path: Path
) -> None:
    method, model = METHODS[name], adapted(kind, METHODS[name])
    logits = logits_of(model, kind)
    plain = method.merged_copy(model)
    assert torch.equal(logits_of(model, kind), logits)
    assert {n: type(m) for n, m in plain.named_modules()} == {n: type(m) for n, m in model_of(kind).named_modules()}
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again, kind), logits_of(plain, kind))
    torch.testing.assert_close(logits_of(again, kind), logits, atol=1e-4, rtol=1e-4)


def test_what_needs_our_gpt2_refuses_every_other_model_in_one_line() -> None:
    asked = {name: cls for name, cls in method_classes().items() if cls.needs_gpt2}
    assert {"prompt", "prefix", "llama-adapter", "spafit"} <= set(asked)
    for name, cls in asked.items():
        for kind in ("gpt2", "llama", "mlp"):
            assert_refused(
                kind,
                cls(),
                f"^{name} works inside the GPT-2 of lora_from_scratch.gpt2 .* got a {type(model_of(kind)).__name__}$",
            )


# --- QLoRA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "bert", "mlp"])
def test_every_linear_layer_but_the_head_is_in_four_bits_and_dense_gives_its_own_kind_back(kind: str) -> None:
    model, base = model_of(kind), model_of(kind)
    head = {"vit": "classifier", "bert": "classifier"}.get(kind)
    before = quantize_model(model)
    assert list(before) == [name for name in linear_layers(base) if name != head]
    assert list(nf4_layers(model)) == list(before)
    for name, layer in nf4_layers(model).items():
        dense, original = layer.dense(), base.get_submodule(name)
        assert type(dense) is type(original)
        assert dense.extra_repr() == original.extra_repr()
        assert dense.weight.shape == original.weight.shape
        assert dense.bias is layer.bias
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(dense(x), layer(x), atol=1e-5, rtol=1e-5)
        error = (weight_of(dense) - weight_of(original)).abs().max()
        assert 0 < error < 0.2 * weight_of(original).abs().max()  # half of the widest step between two codes is 0.15


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_quantised_models_lora_is_a_lora_on_the_dequantised_one_in_peft(kind: str, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    method = QLoRA(rank=2, alpha=4, targets="all-linear")
    model = adapted(kind, method)
    method.save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text()).get("fan_in_fan_out", False) == (kind == "gpt2")
    dense = model_of(kind)
    layers = nf4_layers(model)
    with torch.no_grad():
        for name, layer in layers.items():
            weight_of(dense.get_submodule(name.removesuffix(".base"))).copy_(layer.quantized.dequantize())
    theirs = peft.PeftModel.from_pretrained(dense, str(tmp_path), is_trainable=True).eval()
    torch.testing.assert_close(logits_of(model, kind), logits_of(theirs, kind), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "vit"])
def test_a_start_by_loftq_is_nearer_to_the_full_model(kind: str) -> None:
    full, distances = logits_of(model_of(kind), kind), []
    for method in (QLoRA, LoftQ):
        model, more = model_of(kind), dict[str, Any](iterations=3) if method is LoftQ else {}
        patterns = {"classifier": 2} if kind == "vit" else {}
        method(8, 8, "all-linear", rank_pattern=patterns, **more).adapt(model)
        distances.append((logits_of(model, kind) - full).norm().item())
    assert distances[1] < distances[0]


# --- Adapters -------------------------------------------------------------------------------------------------

PLACES = {
    "gpt2": ("transformer.h.{}", "attn", "mlp"),
    "llama": ("model.layers.{}", "self_attn", "mlp"),
    "qwen2": ("model.layers.{}", "self_attn", "mlp"),
    "gpt-neox": ("gpt_neox.layers.{}", "attention", "mlp"),
    "vit": ("vit.layers.{}", "attention", "mlp"),
    "bert": ("bert.encoder.layer.{}", "attention.output.dense", "output.dense"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_the_variants_stand_behind_attention_mlp_and_block(kind: str) -> None:
    block, attention, mlp = PLACES[kind]
    for variant, parts in {"houlsby": [attention, mlp], "pfeiffer": [mlp], "lin": [""]}.items():
        model = model_of(kind)
        Adapter(width=3, variant=variant, layers=[1]).adapt(model)
        wrapped = [name for name, module in model.named_modules() if isinstance(module, AdapterAfter)]
        assert wrapped == [f"{block.format(1)}.{part}".rstrip(".") for part in parts]
        assert [p.shape for n, p in model.named_parameters() if n.endswith("down.weight")] == [(3, WIDTH)] * len(parts)


@pytest.mark.parametrize("variant", ["houlsby", "pfeiffer", "lin", "parallel"])
def test_on_our_gpt2_named_places_are_those_of_the_variant_bit_for_bit(variant: str) -> None:
    model, other = tiny_model(), tiny_model()
    Adapter(width=5, variant=variant).adapt(model)
    names = {"houlsby": ("attn", "mlp"), "lin": ("h.0", "h.1")}.get(variant, ("mlp",))
    Adapter(width=5, variant=variant, places=names).adapt(other)
    assert_same(snapshot(other), snapshot(model))


def test_an_adapter_behind_an_attention_leaves_the_attention_weights_alone() -> None:
    model, base = adapted("llama", Adapter(width=4)), model_of("llama")
    for m in (model, base):
        m.set_attn_implementation("eager")
    seen, expected = (m(**inputs_of("llama"), output_attentions=True).attentions for m in (model, base))
    assert [a.shape for a in seen] == [a.shape for a in expected]
    assert torch.equal(seen[0], expected[0])


def test_the_modules_of_any_model_can_be_named() -> None:
    for variant in ("pfeiffer", "parallel"):
        method = Adapter(width=4, variant=variant, places=("2",))
        model, base = adapted("mlp", method), model_of("mlp")
        x = inputs_of("mlp")["input"]
        adapter, h = model[2].adapter, base[1](base[0](x))
        y = adapter(base[2](h)) if variant == "pfeiffer" else base[2](h) + adapter(h)
        torch.testing.assert_close(model(x), base[4](base[3](y)))
        method.undo(model)
        assert torch.equal(model(x), base(x))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mlp", {}, "a Sequential has no blocks that are known here, which are GPT2Block, .*; name .* in `places`"),
        ("t5", {}, "a T5ForConditionalGeneration has no blocks that are known here"),
        ("mlp", {"places": ("attn",)}, r"the model has no module 'attn'; print\(model\)"),
        ("mlp", {"places": ("1",)}, "1 is a Tanh without linear layers"),
        ("mlp", {"places": ("4",), "variant": "parallel"}, "4 takes 16 numbers and returns 4"),
        ("mlp", {"places": ("4",), "width": 5}, "4: width must be between 1 and 4"),
        ("llama", {"width": 17}, "model.layers.0.self_attn: width must be between 1 and 16"),
        ("llama", {"layers": [2]}, r"layers must be from 0 to 1 \(the model has 2\), got 2"),
        ("bert", {"variant": "parallel"}, "output.dense takes 24 numbers and returns 16"),
    ],
)
def test_places_that_do_not_fit_are_refused_in_one_line(kind: str, options: dict[str, Any], message: str) -> None:
    assert_refused(kind, Adapter(**{"width": 4} | options), message)


def test_places_and_layers_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="places and layers exclude each other"):
        Adapter(places=("mlp",), layers=[1])


# --- BitFit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in ARCHITECTURES if k != "llama"])
def test_every_bias_of_any_model_is_trained(kind: str) -> None:
    model = model_of(kind)
    BitFit().adapt(model)
    assert list(BitFit().trainable(model)) == [n for n, _ in model.named_parameters() if n.endswith(".bias")]


def test_the_two_biases_are_those_of_queries_and_of_the_first_layer_of_the_mlp() -> None:
    for kind, names in {
        "gpt2": [f"transformer.h.{i}.{name}" for i in range(2) for name in ("attn.c_attn.bias_q", "mlp.c_fc.bias")],
        "vit": [f"vit.layers.{i}.{name}" for i in range(2) for name in ("attention.q_proj.bias", "mlp.fc1.bias")],
        "bert": [
            f"bert.encoder.layer.{i}.{name}"
            for i in range(2)
            for name in ("attention.self.query.bias", "intermediate.dense.bias")
        ],
    }.items():
        model = model_of(kind)
        BitFit(variant="two").adapt(model)
        assert list(BitFit(variant="two").trainable(model)) == names


def test_the_two_biases_of_transformers_gpt2_are_those_of_ours() -> None:
    ours, method = tiny_model(), BitFit(variant="two")
    theirs = transformers_twin(ours)
    tokens = torch.randint(0, 61, (2, 6), generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in (ours, theirs):
        method.adapt(model)
        randomise(method.trainable(model))
        output = model(tokens)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        weighted_mean(logits).backward()
        gradients.append({name: p.grad for name, p in method.trainable(model).items()} | {"logits": logits})
    assert gradients[0].keys() == gradients[1].keys()
    for name, tensor in gradients[0].items():
        torch.testing.assert_close(tensor, gradients[1][name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "variant", "message"),
    [
        ("llama", "all", "^a LlamaForCausalLM has no biases, and BitFit trains nothing else$"),
        ("llama", "two", "^a LlamaForCausalLM has no biases, and BitFit trains nothing else$"),
        (
            "qwen2",
            "two",
            r"layers.0.mlp.gate_proj has no bias, so .* 'two' does not fit; 'all' trains those that exist",
        ),
        ("gpt-neox", "two", "the queries of gpt_neox.layers.0 have no bias apart from .* 'all' fits"),
        ("mlp", "two", "a Sequential has no blocks that are known here.*; the variant 'all' fits any model"),
    ],
)
def test_biases_that_are_not_there_are_refused_in_one_line(kind: str, variant: str, message: str) -> None:
    assert_refused(kind, BitFit(variant=variant), message)
