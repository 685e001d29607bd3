"""LLaMA-Adapter against the paper's equation, and against peft, which computes something else on a GPT-2.

What every method with virtual tokens has to keep is in test_prompt_tuning.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_from_scratch.methods.registry import load_adapter
from torch import Tensor

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, causal_attention, next_token_loss
from lora_from_scratch.methods.adapter_files import CONFIG_FILE
from lora_from_scratch.methods.llama_adapter import GatedPrefixAttention, LlamaAdapter, gated_prefix_attention
from tests.helpers import tiny_model, transformers_twin
from tests.test_prompt_tuning import P, adapted, assert_close, read_by_peft, tokens


def hidden(seed: int = 1) -> Tensor:
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(seed))


def by_the_paper(layer: GatedPrefixAttention, x: Tensor) -> Tensor:
    """Zhang et al. 2023, equations 3 to 8, head by head and query by query, from the raw weights."""
    W, b = layer.base.c_attn.weight, layer.base.c_attn.bias  # (d, 3 d), (3 d,)
    heads, d = layer.base.n_head, x.shape[-1]
    width = d // heads
    rows = []
    for text in x:
        q, k, v = (text @ W + b).split(d, dim=-1)  # (T, d)
        _, prompt_k, prompt_v = (layer.adaption_prompt[0] @ W + b).split(d, dim=-1)  # (P, d)
        out = torch.zeros_like(text)
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            gate = math.tanh(float(layer.adaption_gate.flatten()[head]))
            for t in range(len(text)):
                of_text = torch.softmax(k[: t + 1, own] @ q[t, own] / math.sqrt(width), dim=0)
                of_prompt = torch.softmax(prompt_k[:, own] @ q[t, own] / math.sqrt(width), dim=0)
                out[t, own] = of_text @ v[: t + 1, own] + gate * of_prompt @ prompt_v[:, own]
        rows.append(out @ layer.base.c_proj.weight + layer.base.c_proj.bias)
    return torch.stack(rows)


def layer_of(model: GPT2) -> GatedPrefixAttention:
    layer = model.transformer.h[-1].attn
    assert isinstance(layer, GatedPrefixAttention)
    return layer


def test_the_layer_computes_the_papers_equation() -> None:
    layer = layer_of(adapted(LlamaAdapter(P, top_layers=1)))
    with torch.no_grad():
        assert_close(layer(hidden()), by_the_paper(layer, hidden()))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(0, 1000))
def test_a_zero_gate_is_attention_without_a_prompt_exactly(
    batch: int, heads: int, length: int, prompt: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, length, 4, generator=generator)
    pk, pv = 9 * torch.randn(2, 1, heads, prompt, 4, generator=generator)
    gate = torch.zeros(1, heads, 1, 1)
    plain = causal_attention(q, k, v)
    assert torch.equal(gated_prefix_attention(q, k, v, pk, pv, gate), plain)
    gate[:, 0] = 1.5
    opened = gated_prefix_attention(q, k, v, pk, pv, gate)
    assert torch.equal(opened[:, 1:], plain[:, 1:])  # each head has a gate of its own
    weights = torch.softmax(q[:, 0] @ pk[:, 0].mT / 2, dim=-1)
    torch.testing.assert_close(opened[:, 0], plain[:, 0] + math.tanh(1.5) * weights @ pv[:, 0])


@pytest.mark.parametrize("as_peft", [False, True])
def test_nothing_changes_at_the_start(as_peft: bool) -> None:
    model = tiny_model()
    before = model(tokens())
    LlamaAdapter(P, as_peft=as_peft).adapt(model)
    assert torch.equal(model(tokens()), before)


def test_only_the_gates_learn_at_first_and_then_the_prompts_as_well() -> None:
    model, method = tiny_model(), LlamaAdapter(P, top_layers=2)
    method.adapt(model)
    next_token_loss(model(tokens()), tokens()).backward()
    for name, parameter in method.trainable(model).items():
        assert parameter.grad is not None
        assert parameter.grad.any() == name.endswith("adaption_gate"), name


def test_prompts_are_in_the_top_layers_and_by_default_in_all_but_the_lowest_two() -> None:
    def adapted_layers(layers: int | None, n_layer: int) -> list[int]:
        model = tiny_model(n_layer=n_layer)
        LlamaAdapter(P, top_layers=layers).adapt(model)
        return [i for i, block in enumerate(model.transformer.h) if isinstance(block.attn, GatedPrefixAttention)]

    assert adapted_layers(1, 4) == [3]
    assert adapted_layers(4, 4) == [0, 1, 2, 3]
    assert adapted_layers(None, 4) == [2, 3]
    assert adapted_layers(None, 1) == [0]


def test_a_model_of_the_size_of_llama_7b_has_the_papers_number_of_parameters() -> None:
    """1.2 M (Zhang et al. 2023, section 1): 10 x 4096 in each of 30 layers; and 32 gates a layer."""
    with torch.device("meta"):
        model = GPT2(GPT2Config(vocab_size=8, n_positions=8, n_embd=4096, n_layer=32, n_head=32))
    method = LlamaAdapter()
    method.adapt(model)
    assert sum(p.numel() for p in method.trainable(model).values()) == 30 * (10 * 4096 + 32)


# --- With the real peft --------------------------------------------------------------------------------


def test_peft_on_a_gpt2_leaves_out_the_tanh_and_the_output_projection_of_the_papers_equation() -> None:
    peft = pytest.importorskip("peft")
    config = peft.AdaptionPromptConfig(adapter_len=P, adapter_layers=1, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(transformers_twin(tiny_model()), config).eval()
    attention = theirs.base_model.model.transformer.h[-1].attn
    layer = layer_of(adapted(LlamaAdapter(P, top_layers=1)))
    gate = 0.4
    with torch.no_grad():
        layer.adaption_gate.fill_(math.atanh(gate))  # tanh of this is peft's gate
        attention.adaption_gate.fill_(gate)
        attention.adaption_prompt.copy_(layer.adaption_prompt)
        base = layer.base(hidden())
        prompt_part = attention(hidden())[0] - base  # what peft adds
        projection = layer.base.c_proj
        assert_close(base + prompt_part @ projection.weight, by_the_paper(layer, hidden()))  # what was missing
        assert_close(layer(hidden()), by_the_paper(layer, hidden()))
        assert (attention(hidden())[0] - by_the_paper(layer, hidden())).abs().max() > 0.1


def test_in_pefts_form_logits_and_gradients_equal_pefts_and_adapters_travel_both_ways(tmp_path: Path) -> None:
    method = LlamaAdapter(P, top_layers=1, as_peft=True)
    model = adapted(method)
    method.save(model, tmp_path / "ours")
    theirs = read_by_peft(tmp_path / "ours", trainable=True)
    labels = tokens()
    output = theirs(tokens(), labels=labels)
    assert_close(model(tokens()), output.logits)
    next_token_loss(model(tokens()), labels).backward()
    output.loss.backward()
    expected = {n.removeprefix("base_model.model."): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert expected.keys() == method.trainable(model).keys()
    for name, parameter in method.trainable(model).items():
        assert parameter.grad is not None
        assert parameter.grad.any()
        assert_close(parameter.grad, expected[name])
    with torch.no_grad():
        theirs.base_model.model.transformer.h[-1].attn.adaption_gate.add_(0.7)
    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny_model()
    assert load_adapter(again, tmp_path / "theirs") == method
    assert_close(again(tokens()), theirs(tokens()).logits)


def test_peft_refuses_the_papers_form_instead_of_computing_something_else(tmp_path: Path) -> None:
    method = LlamaAdapter(P, top_layers=1)
    method.save(adapted(method), tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="size mismatch"):
        read_by_peft(tmp_path / "adapter")


# --- Bad input -----------------------------------------------------------------------------------------


def test_bad_hyperparameters_are_named() -> None:
    with pytest.raises(ValueError, match="num_virtual_tokens must be a whole number of at least 1, got 0"):
        LlamaAdapter(0)
    with pytest.raises(ValueError, match="top_layers must be a whole number of at least 1, got 0"):
        LlamaAdapter(top_layers=0)
    model = tiny_model()
    with pytest.raises(ValueError, match="top_layers must be between 1 and 2, the model's number of layers, got 3"):
        LlamaAdapter(top_layers=3).adapt(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_len": None}, "num_virtual_tokens must be a whole number of at least 1, got None"),
        ({"adapter_len": 5}, r"adaption_prompt \(1, 3, 24\) instead of \(1, 5, 24\)"),
        ({"adapter_layers": 2}, "2 missing"),
        ({"target_modules": "mlp"}, "target_modules='mlp', which is not supported"),
        ({"gate_kind": "relu"}, "gate_kind='relu', which is not supported"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    method = LlamaAdapter(P, top_layers=1)
    method.save(adapted(method), tmp_path / "adapter")
    file = tmp_path / "adapter" / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_adapter(tiny_model(), tmp_path / "adapter")
