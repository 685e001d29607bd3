"""Prefix tuning against peft, against another formula, and where it differs from no prefix at all.

What every method with virtual tokens has to keep is in test_prompt_tuning.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_from_scratch.methods.registry import load_adapter
from safetensors.torch import load_file
from torch import Tensor

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, causal_attention, next_token_loss
from lora_from_scratch.methods.adapter_files import WEIGHTS_FILE
from lora_from_scratch.methods.prefix_tuning import (
    PrefixEncoder,
    PrefixTuning,
    fold_prefix,
    prefix_attention,
    prefix_parameter_count,
    prefix_share,
    split_prefix,
)
from tests.helpers import tiny_config, tiny_model, transformers_twin
from tests.test_prompt_tuning import P, adapted, assert_close, read_by_peft, tokens, without_first

WAYS = {"with MLP": PrefixTuning(P, hidden=7), "without MLP": PrefixTuning(P, reparametrise=False)}
both_ways = pytest.mark.parametrize("method", WAYS.values(), ids=WAYS.keys())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(0, 1000))
def test_attention_with_a_prefix_is_a_weighted_mean_of_attention_to_the_text_and_to_the_prefix(
    batch: int, heads: int, length: int, prefix: int, seed: int
) -> None:
    """He et al. 2022 (arXiv:2110.04366), section 3.1: the weight is the prefix's share of the softmax."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, length, 5, generator=generator, dtype=torch.float64)
    pk, pv = torch.randn(2, 1, heads, prefix, 5, generator=generator, dtype=torch.float64)
    of_text = (q @ k.mT / 5**0.5).exp().tril()  # (B, H, T, T)
    of_prefix = (q @ pk.mT / 5**0.5).exp()  # (B, H, T, P)
    share = of_prefix.sum(-1, keepdim=True) / (of_prefix.sum(-1, keepdim=True) + of_text.sum(-1, keepdim=True))
    torch.testing.assert_close(prefix_share(q, k, pk), share[..., 0])
    to_prefix = of_prefix / of_prefix.sum(-1, keepdim=True) @ pv
    expected = (1 - share) * causal_attention(q, k, v) + share * to_prefix
    torch.testing.assert_close(prefix_attention(q, k, v, pk, pv), expected)


def test_a_zero_prefix_is_not_the_same_as_no_prefix() -> None:
    model, method = tiny_model(), PrefixTuning(P, reparametrise=False)
    model.transformer.wpe.weight.data.zero_()  # so that only the prefix can matter, not that the text begins at P
    before = model(tokens())
    method.adapt(model)
    with torch.no_grad():
        method.trainable(model)["virtual_tokens.embedding"].zero_()
    assert (model(tokens()) - before).abs().max() > 0.1
    q = torch.randn(1, 1, 1, 4)
    nothing = torch.zeros(1, 1, P, 4)  # a token that sees itself and P zeros gets 1 / (1 + P) of it, if its score is 0
    halved = prefix_attention(0 * q, q, q, nothing, nothing)
    torch.testing.assert_close(halved, q / (1 + P))


def test_every_layer_has_its_own_keys_and_values() -> None:
    config = tiny_config()
    prefix = torch.arange(P * 2 * 2 * 24.0).view(P, 96)
    layers = split_prefix(prefix, config.n_layer, config.n_head)
    for layer, (k, v) in enumerate(layers):
        assert k.shape == v.shape == (1, 3, P, 8)
        for head in range(3):
            column = 2 * layer * 24 + head * 8
            assert torch.equal(k[0, head], prefix[:, column : column + 8])
            assert torch.equal(v[0, head], prefix[:, column + 24 : column + 32])


def test_folding_throws_the_mlp_away_and_changes_nothing(tmp_path: Path) -> None:
    method = PrefixTuning(P, hidden=7)
    model = adapted(method)
    encoder = model.virtual_tokens
    assert isinstance(encoder, PrefixEncoder)
    state = {name: p.detach() for name, p in encoder.named_parameters()}
    hidden = torch.tanh(state["embedding"] @ state["transform.0.weight"].T + state["transform.0.bias"])  # (P, m)
    made = hidden @ state["transform.2.weight"].T + state["transform.2.bias"]
    folded = fold_prefix(encoder)
    torch.testing.assert_close(folded, made)
    plain = PrefixTuning(P, reparametrise=False)
    again = tiny_model()
    plain.adapt(again)
    plain.load_state_dict(again, {"virtual_tokens.embedding": folded})
    assert torch.equal(again(tokens()), model(tokens()))
    method.save(model, tmp_path / "adapter")
    assert {n: t.shape for n, t in load_file(tmp_path / "adapter" / WEIGHTS_FILE).items()} == {
        "prompt_embeddings": (P, 2 * 2 * 24)
    }


def test_gpt2_medium_with_five_virtual_tokens_has_the_papers_number_of_parameters() -> None:
    """Li and Liang 2021, section 6.1: about 250 thousand, 0.1 % of 345 M."""
    with torch.device("meta"):
        model = GPT2(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    method = PrefixTuning(5, reparametrise=False)
    method.adapt(model)
    assert sum(p.numel() for p in method.trainable(model).values()) == 245_760
    assert prefix_parameter_count(24, 1024, 5) == 245_760


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.none() | st.integers(1, 7))
def test_the_count_of_a_prefix_is_that_of_its_encoders_parameters(
    n_layer: int, n_head: int, length: int, hidden: int | None
) -> None:
    config = GPT2Config(vocab_size=5, n_positions=20, n_embd=6 * n_head, n_layer=n_layer, n_head=n_head)
    encoder = PrefixEncoder(config, length, hidden)
    assert prefix_parameter_count(n_layer, 6 * n_head, length, hidden) == sum(p.numel() for p in encoder.parameters())


def test_a_new_encoder_does_not_import_sympy_which_takes_seconds() -> None:
    code = (
        "import sys, torch; before = 'sympy' in sys.modules\n"
        "from lora_from_scratch.methods.prefix_tuning import seeded_linear\n"
        "seeded_linear(3, 4, None)\n"
        "assert before or 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_first_values_depend_on_the_seed_alone() -> None:
    def start(seed: int) -> list[Tensor]:
        method, model = PrefixTuning(P, hidden=50, seed=seed), tiny_model()
        before = torch.get_rng_state()
        method.adapt(model)
        assert torch.equal(torch.get_rng_state(), before)
        return list(method.trainable(model).values())

    for one, same, other in zip(start(0), start(0), start(1), strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
    weight = start(0)[1].detach()
    assert weight.abs().max() <= 24**-0.5
    assert abs(float(weight.std()) * (3 * 24) ** 0.5 - 1) < 0.1  # a uniform distribution's


# --- With the real peft --------------------------------------------------------------------------------


def pefts_prefix(model: GPT2, method: PrefixTuning) -> Any:
    """peft's prefix tuning with the same weights and the same prefix."""
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=P,
        task_type="CAUSAL_LM",
        prefix_projection=method.reparametrise,
        encoder_hidden_size=method.hidden,
    )
    theirs = peft.get_peft_model(transformers_twin(tiny_model()), config).eval()
    state = {name.removeprefix("virtual_tokens."): p for name, p in method.state_dict(model).items()}
    state["embedding.weight"] = state.pop("embedding")
    theirs.prompt_encoder.default.load_state_dict(state)
    return theirs


@both_ways
def test_logits_and_gradients_of_a_prefix_equal_pefts(method: PrefixTuning) -> None:
    model = adapted(method)
    theirs = pefts_prefix(model, method)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    labels = without_first(torch.where(mask.bool(), tokens(), -100))
    output = theirs(tokens(), attention_mask=mask, labels=labels)
    ours = model(tokens(), attention_mask=mask)
    assert_close(ours[mask.bool()], output.logits[mask.bool()])
    next_token_loss(ours, labels).backward()
    output.loss.backward()
    for name, parameter in method.trainable(model).items():
        short = name.removeprefix("virtual_tokens.")
        expected = theirs.prompt_encoder.default.get_parameter("embedding.weight" if short == "embedding" else short)
        assert parameter.grad is not None
        assert parameter.grad.any()
        assert_close(parameter.grad, expected.grad)


@both_ways
def test_prefixes_travel_to_peft_and_back(method: PrefixTuning, tmp_path: Path) -> None:
    model = adapted(method)
    method.save(model, tmp_path / "ours")
    theirs = read_by_peft(tmp_path / "ours")
    assert_close(theirs(tokens()).logits, model(tokens()))
    theirs = pefts_prefix(adapted(method, seed=3), method)
    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny_model()
    assert load_adapter(again, tmp_path / "theirs") == PrefixTuning(P, reparametrise=False)
    assert_close(again(tokens()), theirs(tokens()).logits)


def test_a_bad_width_of_the_mlp_is_named() -> None:
    with pytest.raises(ValueError, match="hidden must be a whole number of at least 1, got 0"):
        PrefixTuning(hidden=0)
