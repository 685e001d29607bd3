"""LongLoRA: attention in shifted groups without a leak, longer positions, and what is trained.

Compared with dvlab-research/LongLoRA at d4eb344 (`llama_attn_replace.py`), 32 random tokens in groups of 8: its
`forward_flashattn`, with the CUDA kernel replaced by attention in the segments that it is given, is ours within 2e-7,
and its `forward_noflashattn` is ours within 2e-7 but for tokens 0 to 3, which see the last four.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_from_scratch.gpt2.checkpoint import load_model, save_gpt2
from lora_from_scratch.gpt2.model import GPT2, Attention, causal_attention
from lora_from_scratch.methods.long_lora import (
    LongLoRA,
    ShiftedSparseAttention,
    shifted_sparse_attention,
    stretch_positions,
)
from lora_from_scratch.methods.registry import load_adapter
from tests.any_models import randomise
from tests.helpers import tiny_model
from tests.test_method import assert_same, snapshot


def qkv(heads: int, tokens: int, width: int = 5, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, tokens, width, generator=generator, requires_grad=True) for _ in range(3)]


def segments(tokens: int, group_size: int, shifted: bool) -> list[range]:
    """The groups of one half of the heads, written down from the paper's figure 2."""
    first = group_size // 2 if shifted else group_size
    starts = [0, *range(first, tokens, group_size)] if first else list(range(0, tokens, group_size))
    starts = sorted({start for start in starts if start < tokens})
    return [range(a, b) for a, b in zip(starts, [*starts[1:], tokens], strict=True)]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, group_size: int, keys: Tensor | None = None) -> Tensor:
    """The same, a query at a time; `keys` (B, T) says which tokens are no padding."""
    result = torch.zeros_like(q)
    batch, heads, tokens, width = q.shape
    for h in range(heads):
        for part in segments(tokens, group_size, shifted=h >= heads // 2):
            for i in part:
                for b in range(batch):
                    seen = [j for j in part if j <= i and (j == i or keys is None or keys[b, j])]
                    scores = k[b, h, seen] @ q[b, h, i] / math.sqrt(width)
                    result[b, h, i] = torch.softmax(scores, dim=0) @ v[b, h, seen]
    return result


# --- Attention in groups -------------------------------------------------------------------------------------


@given(st.integers(1, 13), st.integers(1, 8), st.integers(1, 4))
def test_each_half_of_the_heads_attends_within_its_groups(tokens: int, group_size: int, heads: int) -> None:
    q, k, v = (x.detach() for x in qkv(heads, tokens))
    expected = one_by_one(q, k, v, group_size)
    torch.testing.assert_close(shifted_sparse_attention(q, k, v, group_size), expected, atol=1e-5, rtol=1e-5)


@given(st.integers(2, 13), st.integers(1, 8))
def test_padding_is_not_seen_and_no_gradient_is_nan(tokens: int, group_size: int) -> None:
    q, k, v = qkv(2, tokens)
    keys = torch.ones(2, tokens, dtype=torch.bool)
    keys[0, tokens // 2 + 1 :] = False
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask = (causal & keys[:, None, :] | torch.eye(tokens, dtype=torch.bool))[:, None]
    result = shifted_sparse_attention(q, k, v, group_size, mask)
    expected = one_by_one(q.detach(), k.detach(), v.detach(), group_size, keys)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    result.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize(("tokens", "group_size"), [(32, 8), (32, 32), (30, 8), (7, 3), (5, 2)])
def test_no_gradient_flows_from_a_later_token(tokens: int, group_size: int) -> None:
    for position in range(tokens):
        q, k, v = qkv(4, tokens)
        shifted_sparse_attention(q, k, v, group_size)[:, :, : position + 1].square().sum().backward()
        for x in (q, k, v):
            assert x.grad is not None
            assert not x.grad[:, :, position + 1 :].any(), f"token {position} sees a later one"


def test_a_roll_under_the_mask_of_its_slots_would_leak_and_the_test_above_would_see_it() -> None:
    """What the plain version of the paper's code does: tokens 0 to 3 of 32 see the last four."""
    q, k, v = qkv(1, 32)
    rolled = [x.roll(-4, dims=2).unflatten(2, (-1, 8)) for x in (q, k, v)]
    y = causal_attention(*(x.flatten(1, 2) for x in rolled)).flatten(1, 2).roll(4, dims=1)  # (B, T, hd)
    y[:, :4].square().sum().backward()
    assert k.grad is not None
    assert k.grad[:, :, 28:].any()


def test_tokens_of_two_groups_reach_each_other_through_the_other_half_of_the_heads() -> None:
    q, k, v = qkv(2, 16)
    shifted_sparse_attention(q, k, v, 8)[:, :, 8].sum().backward()
    assert v.grad is not None
    reached = v.grad.abs().sum(dim=(0, 3)) > 0  # (H, T)
    assert reached[0].nonzero().flatten().tolist() == [8]
    assert reached[1].nonzero().flatten().tolist() == [4, 5, 6, 7, 8]


def test_one_group_is_full_attention_in_the_first_half_of_the_heads() -> None:
    q, k, v = (x.detach() for x in qkv(4, 9))
    y = shifted_sparse_attention(q, k, v, 9)
    torch.testing.assert_close(y[:, :2], causal_attention(q, k, v)[:, :2], atol=1e-5, rtol=1e-5)


# --- A model -------------------------------------------------------------------------------------------------


def adapted(**options: Any) -> tuple[GPT2, LongLoRA]:
    model, method = tiny_model(), LongLoRA(rank=2, **options)
    method.adapt(model)
    return model, method


def tokens(length: int = 16) -> Tensor:
    return torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(0))


def test_a_whole_model_lets_no_gradient_flow_from_a_later_token_in_training() -> None:
    model, _ = adapted()
    embeds = model.transformer.wte(tokens()).detach().requires_grad_(True)
    for position in (0, 1, 3, 7, 14):
        (gradient,) = torch.autograd.grad(model.train()(inputs_embeds=embeds)[:, position].square().sum(), embeds)
        assert gradient[:, position].any()
        assert not gradient[:, position + 1 :].any()


def test_training_attends_in_groups_and_everything_else_to_all() -> None:
    model, _ = adapted(factor=1)
    base = tiny_model()
    assert torch.equal(model(tokens()), base(tokens()))
    assert not torch.allclose(model.train()(tokens()), base(tokens()), atol=1e-3)


def test_one_group_is_full_attention_in_training_too() -> None:
    model, _ = adapted(factor=1, groups=1)
    assert torch.equal(model.train()(tokens()), tiny_model()(tokens()))


def test_groups_cost_what_is_in_them_and_not_the_square_of_the_text() -> None:
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                sizes.append(result.numel())
            return result

    q, k, v = qkv(2, 256, batch=1)
    with Watch():
        shifted_sparse_attention(q, k, v, 16)
    assert max(sizes) == 2 * 256 * 16


def test_embeddings_norms_and_positions_are_trained_and_counted() -> None:
    model, method = adapted(targets=("c_attn",))
    V, n, d, blocks = 61, 32, 24, 2
    lora = blocks * 2 * (d + 3 * d)
    count = sum(p.numel() for p in method.trainable(model).values())
    assert count == lora + V * d + 2 * n * d + (2 * blocks + 1) * 2 * d
    model, method = adapted(targets=("c_attn",), embeddings_and_norms=False)
    assert sum(p.numel() for p in method.trainable(model).values()) == lora


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_the_positions_are_interpolated_between_the_first_and_the_last(factor: int) -> None:
    table = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    longer = stretch_positions(table, factor)
    assert longer.shape == (8 * factor, 3)
    for i, row in enumerate(longer):
        place = i * 7 / (8 * factor - 1)
        low = min(int(place), 6)
        torch.testing.assert_close(
            row, table[low] + (place - low) * (table[low + 1] - table[low]), atol=1e-5, rtol=1e-5
        )


def test_the_context_is_longer_while_the_model_is_adapted() -> None:
    model, method = adapted(factor=4)
    assert model.config.n_positions == 128
    assert model(tokens(128)).shape == (2, 128, 61)
    method.undo(model)
    assert model.config.n_positions == 32
    assert_same(snapshot(model), snapshot(tiny_model()))
    with pytest.raises(ValueError, match="40 tokens exceed the model's context of 32"):
        model(tokens(40))


def test_a_merged_copy_is_a_plain_model_with_the_longer_context(tmp_path: Path) -> None:
    model, method = adapted(factor=2)
    randomise(method.trainable(model))
    plain = method.merged_copy(model)
    save_gpt2(plain, None, tmp_path)
    again = load_model(tmp_path)
    assert again.config.n_positions == 64
    torch.testing.assert_close(again(tokens(64)), model(tokens(64)), atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, ShiftedSparseAttention) for module in plain.modules())
    assert sum(type(module) is Attention for module in plain.modules()) == 2


def test_an_adapter_brings_its_longer_context(tmp_path: Path) -> None:
    model, method = adapted(factor=2, groups=3)
    randomise(method.trainable(model))
    method.save(model, tmp_path)
    back = tiny_model()
    assert load_adapter(back, tmp_path) == method
    assert torch.equal(back(tokens(64)), model(tokens(64)))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, method = adapted()
        model.gradient_checkpointing = checkpointing
        model.train()(tokens()).square().mean().backward()
        gradients.append({name: p.grad for name, p in method.trainable(model).items()})
    assert_same(*gradients)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0}, "factor must be a whole number of at least 1, got 0"),
        ({"groups": 1.5}, r"groups must be a whole number of at least 1, got 1\.5"),
        ({"modules_to_save": ("ln_f",)}, "modules_to_save must be empty where embeddings and norms are trained"),
        ({"trainable_token_indices": (1,)}, "trainable_token_indices must be empty where"),
    ],
)
def test_a_bad_hyperparameter_is_refused_when_the_method_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongLoRA(**options)
