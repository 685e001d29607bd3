"""The model against transformers' GPT-2, and its parts against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.gpt2.checkpoint import load_gpt2, load_model
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import (
    GPT2,
    KVCache,
    causal_attention,
    gelu,
    merge_heads,
    next_token_loss,
    split_heads,
)
from tests.helpers import real_checkpoint, tiny_config, tiny_model, transformers_twin

NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def random_ids(model: GPT2, batch: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=generator)


# --- Against transformers --------------------------------------------------------------------------


def saved_by_transformers(directory: Path, **shape: Any) -> Any:
    """A random checkpoint that transformers made, biases and norms random as well."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(**NO_DROPOUT, **shape)).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(std=0.05))
    peer.save_pretrained(directory)
    return peer


def assert_same_logits_and_gradients(ours: GPT2, theirs: Any, ids: Tensor) -> None:
    """Within 1e-4 (logits) and within 1e-4 of the largest entry of each tensor (gradients)."""
    labels = ids.clone()
    labels[:, :2] = -100
    logits = ours(ids)
    loss = next_token_loss(logits, labels)
    loss.backward()
    expected = theirs(ids, labels=labels)
    expected.loss.backward()
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        peer = gradients.pop(name)
        assert parameter.grad is not None
        assert peer.abs().max() > 0, f"{name} has no gradient to compare"
        torch.testing.assert_close(parameter.grad, peer, atol=1e-4 * float(peer.abs().max()), rtol=0, msg=name)
    assert not gradients, "transformers has parameters that we lack"


@pytest.mark.parametrize(
    "shape",
    [
        {"vocab_size": 67, "n_positions": 20, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
        {
            "vocab_size": 101,
            "n_positions": 33,
            "n_embd": 40,
            "n_layer": 3,
            "n_head": 1,
            "n_inner": 72,
            "layer_norm_epsilon": 1e-3,
            "initializer_range": 0.2,
        },
    ],
)
def test_logits_and_gradients_equal_those_of_transformers_on_random_checkpoints(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    theirs = saved_by_transformers(tmp_path, **shape)
    ours = load_model(tmp_path)
    assert_same_logits_and_gradients(ours, theirs, random_ids(ours, batch=3, tokens=shape["n_positions"]))


def test_logits_and_gradients_equal_those_of_transformers_at_the_size_of_gpt2_small(tmp_path: Path) -> None:
    theirs = saved_by_transformers(tmp_path)
    ours = load_model(tmp_path)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 124_439_808
    assert_same_logits_and_gradients(ours, theirs, random_ids(ours, batch=1, tokens=12))


def test_logits_and_gradients_equal_those_of_transformers_on_the_bundled_checkpoint() -> None:
    transformers = pytest.importorskip("transformers")
    model, tokenizer = load_gpt2(real_checkpoint())
    theirs = transformers.GPT2LMHeadModel.from_pretrained(real_checkpoint(), dtype=torch.float32).eval()
    texts = ["Once upon a time there was a king who had three sons.", "She said: \u201cI am not afraid of you!\u201d"]
    shortest = min(len(ids) for ids in tokenizer.encode_batch(texts))
    ids = torch.tensor([ids[:shortest] for ids in tokenizer.encode_batch(texts)])
    assert_same_logits_and_gradients(model, theirs, ids)
    longest = random_ids(model, batch=1, tokens=model.config.n_positions)
    with torch.no_grad():
        torch.testing.assert_close(model(longest), theirs(longest).logits, atol=1e-4, rtol=0)


def test_padded_batches_give_the_logits_of_transformers() -> None:
    model = tiny_model()
    ids = random_ids(model, batch=3, tokens=9)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0  # padding on the left
    mask[1, 6:] = 0  # padding on the right
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = model(ids, attention_mask=mask)
        theirs = transformers_twin(model)(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-5, rtol=1e-5)


@given(
    labels=st.lists(st.lists(st.sampled_from([-100, 0, 1, 5]), min_size=4, max_size=4), min_size=1, max_size=3),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=50)
def test_next_token_loss_equals_that_of_transformers(labels: list[list[int]], seed: int) -> None:
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    logits = torch.randn(len(labels), 4, 6, generator=torch.Generator().manual_seed(seed))
    target = torch.tensor(labels)
    if (target[:, 1:] == -100).all():  # transformers divides 0 by 0 here
        assert next_token_loss(logits, target) == 0
    else:
        torch.testing.assert_close(
            next_token_loss(logits, target), loss_utils.ForCausalLMLoss(logits, target, vocab_size=6)
        )


def test_the_loss_of_labels_that_all_do_not_count_has_a_zero_gradient() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    next_token_loss(logits, torch.full((2, 3), -100)).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))  # type: ignore[arg-type]


# --- The parts, against PyTorch's ------------------------------------------------------------------


@given(tokens=st.integers(1, 6), cached=st.integers(0, 5), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_causal_attention_equals_pytorchs_with_and_without_cached_keys(tokens: int, cached: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 3, tokens, 4, generator=generator)
    k, v = torch.randn(2, 2, 3, cached + tokens, 4, generator=generator)
    visible = torch.ones(tokens, cached + tokens, dtype=torch.bool).tril(diagonal=cached)
    torch.testing.assert_close(causal_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, attn_mask=visible))


@given(x=st.lists(st.floats(-30, 30), min_size=1, max_size=20))
def test_gelu_equals_pytorchs_tanh_approximation(x: list[float]) -> None:
    values = torch.tensor(x, dtype=torch.float64)
    torch.testing.assert_close(gelu(values), F.gelu(values, approximate="tanh"))


@given(n_head=st.integers(1, 4), head_width=st.integers(1, 4), tokens=st.integers(1, 4))
def test_merge_heads_undoes_split_heads(n_head: int, head_width: int, tokens: int) -> None:
    x = torch.randn(2, tokens, n_head * head_width)
    heads = split_heads(x, n_head)
    assert torch.equal(heads[:, n_head - 1], x[:, :, -head_width:])
    assert torch.equal(merge_heads(heads), x)


# --- Padding, positions, cache ---------------------------------------------------------------------


def test_a_padded_row_gives_the_logits_that_it_gives_alone() -> None:
    model = tiny_model()
    ids = random_ids(model, batch=2, tokens=7)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    with torch.no_grad():
        padded = model(ids, attention_mask=mask)
        torch.testing.assert_close(padded[:1, 3:], model(ids[:1, 3:]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(padded[1:], model(ids[1:]), atol=1e-5, rtol=1e-5)
        assert padded.isfinite().all()


def test_position_ids_choose_the_rows_of_the_position_table() -> None:
    model = tiny_model()
    ids = random_ids(model, batch=1, tokens=4)
    positions = torch.tensor([[5, 0, 9, 2]])
    moved = model.transformer.wte(ids) + model.transformer.wpe(positions) - model.transformer.wpe.weight[:4]
    with torch.no_grad():
        torch.testing.assert_close(model(ids, position_ids=positions), model(inputs_embeds=moved))


@pytest.mark.parametrize("padded", [False, True])
def test_reading_a_text_in_pieces_with_a_cache_gives_the_logits_of_reading_it_at_once(padded: bool) -> None:
    model = tiny_model()
    ids = random_ids(model, batch=2, tokens=10)
    mask = torch.ones(2, 10, dtype=torch.long)
    if padded:
        mask[0, :3] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask)
        cache, start, pieces = KVCache(), 0, []
        for end in (4, 5, 6, 10):
            seen = mask[:, :end] if padded else None
            pieces.append(model(ids[:, start:end], attention_mask=seen, cache=cache))
            assert len(cache) == end
            start = end
    torch.testing.assert_close(torch.cat(pieces, dim=1)[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=1e-5)


def test_reordering_the_cache_moves_the_texts() -> None:
    model = tiny_model()
    ids = random_ids(model, batch=3, tokens=5)
    rows = torch.tensor([2, 0, 0, 1])
    cache = KVCache()
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
        cache.reorder(rows)
        torch.testing.assert_close(model(ids[rows, 4:], cache=cache), model(ids[rows])[:, 4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(torch.zeros(1, 33, dtype=torch.long)), "33 tokens exceed .* context of 32"),
        (
            lambda model: model(torch.zeros(2, 4, dtype=torch.long), attention_mask=torch.ones(2, 3)),
            r"must have shape \(2, 4\)",
        ),
        (lambda model: model(torch.zeros(2, 4, dtype=torch.long), attention_mask=torch.ones(4)), r"got \(4,\)"),
        (lambda model: model(), "give input_ids"),
    ],
)
def test_what_does_not_fit_is_a_value_error(call: Callable[[GPT2], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny_model())


# --- Training --------------------------------------------------------------------------------------


def gradients(model: GPT2, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    next_token_loss(model(ids), ids).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = GPT2(tiny_config(embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.1)).train()
    ids = random_ids(model, batch=2, tokens=8)
    torch.manual_seed(1)
    plain = gradients(model, ids)
    model.gradient_checkpointing = True
    torch.manual_seed(1)
    checkpointed = gradients(model, ids)
    assert len(plain) == len(checkpointed) == len(list(model.parameters()))
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other)


def test_the_bf16_path_on_a_cpu_has_the_gradients_of_fp32_within_bf16s_precision() -> None:
    model = tiny_model(std=0.1).train()
    ids = random_ids(model, batch=2, tokens=8)
    exact = gradients(model, ids)
    rounded = gradients(model.to(torch.bfloat16), ids)
    for one, other in zip(exact, rounded, strict=True):
        assert (one - other.float()).norm() <= 0.05 * one.norm() + 1e-4


def test_a_new_model_has_the_initialisation_of_the_paper() -> None:
    model = GPT2(GPT2Config(vocab_size=500, n_positions=64, n_embd=128, n_layer=8, n_head=4))
    weights = dict(model.named_parameters())
    for name in ("wte.weight", "h.3.attn.c_attn.weight", "h.3.mlp.c_fc.weight"):
        assert weights[f"transformer.{name}"].std().item() == pytest.approx(0.02, rel=0.05), name
    for name in ("h.3.attn.c_proj.weight", "h.3.mlp.c_proj.weight"):
        assert weights[f"transformer.{name}"].std().item() == pytest.approx(0.02 / 4, rel=0.05), name
    for name, weight in weights.items():
        assert not (name.endswith("bias") and weight.any()), name
