"""Unit 05, prompts: what the checks observe of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.observation import dtype_of
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, KVCache, next_token_loss
from lora_from_scratch.methods.prompt_tuning import COMMON_TOKENS

CONFIG = GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2)


def run_prepend(answer: Callable[..., Any], embeddings: Tensor, inputs: Tensor) -> Any:
    """[E; X], and the gradients that reach E and X (None: no gradient can flow)."""
    embeddings.requires_grad_(True)
    inputs.requires_grad_(True)
    whole = answer(embeddings, inputs)
    if not isinstance(whole, Tensor) or not whole.requires_grad:
        return {"whole": whole, "gradients": [None, None]}
    weighting = torch.arange(1.0, whole.numel() + 1).view(whole.shape)
    flowed = torch.autograd.grad((weighting * whole).sum(), [embeddings, inputs], allow_unused=True)
    return {"whole": whole, "gradients": list(flowed)}


def try_labels(answer: Callable[..., Any], labels: Tensor, num_virtual_tokens: int) -> Any:
    """The labels and their dtype: the loss accepts only whole numbers."""
    result = answer(labels, num_virtual_tokens)
    return [result, dtype_of(result)]


def run_initial(
    answer: Callable[..., Any], table: Tensor, num_virtual_tokens: int, init: str, init_ids: list[int], seed: int
) -> Any:
    """The initial prompt for one seed, what depends on the seed, and whether it is attached to the table's graph."""

    def start(source: int | torch.Generator | None) -> Tensor:
        generator = torch.Generator().manual_seed(source) if isinstance(source, int) else source
        drawn: Tensor = answer(table, num_virtual_tokens, init, tuple(init_ids), generator)
        return drawn

    table.requires_grad_(True)
    first = start(seed)
    seen: dict[str, Any] = {
        "shape": list(first.shape),
        "in the graph": first.requires_grad,
        "shares memory with the table": shares_memory(first, table),
        "the same again": torch.equal(first, start(seed)),
        "another seed differs": not torch.equal(first, start(seed + 1)),
        "without a generator": without_a_generator(start, seed),
    }
    generator = torch.Generator().manual_seed(seed)
    one, next_one = start(generator), start(generator)
    seen["the next differs"] = not torch.equal(one, next_one)
    table.requires_grad_(False)
    first = first.detach()
    if first.ndim != 2 or first.shape[1] != table.shape[1]:
        return seen
    return seen | ({"E": first} if init == "text" else of_random(first) if init == "random" else of_rows(first, table))


def without_a_generator(start: Callable[[None], Tensor], seed: int) -> list[bool]:
    """Whether PyTorch's own seed gives the same prompt again, and whether the next one differs."""
    torch.manual_seed(seed)
    first, second = start(None), start(None)
    torch.manual_seed(seed)
    return [torch.equal(first, start(None)), not torch.equal(first, second)]


def shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def of_random(first: Tensor) -> dict[str, Any]:
    """Mean and standard deviation of at least 3,600 numbers, rounded to a multiple of 1/2 and of 1/4."""
    return {
        "mean": round(2 * float(first.mean())) / 2,
        "standard deviation": round(4 * float(first.std())) / 4,
        "some beyond two": bool((first.abs() > 2.2).any()),
        "different rows": len(first.unique(dim=0)),
    }


def of_rows(first: Tensor, table: Tensor) -> dict[str, Any]:
    """Which rows of the table they are."""
    equal = torch.ones(len(first), len(table), dtype=torch.bool)  # (P, V)
    for ours, theirs in zip(first.T, table.T, strict=True):  # much faster than `all(dim=-1)`
        equal &= ours[:, None] == theirs[None]
    ids = equal.float().argmax(dim=1)
    uses = torch.bincount(ids, minlength=len(table))
    return {
        "rows of the table": bool(equal.any(dim=1).all()),
        "among the common tokens": bool((ids < COMMON_TOKENS).all()),
        "the most often that one token comes": int(uses.max()),
        "in order": bool((ids[1:] > ids[:-1]).all()),
    }


def run_soft(
    answer: Callable[..., Any],
    E: Tensor,
    what: str,
    ids: Tensor,
    seed: int,
    positions: bool = False,
    mask: Tensor | None = None,
) -> Any:
    """What `enter` returns, or what a tiny GPT-2 with such a soft prompt computes."""
    torch.manual_seed(seed)
    soft, model = answer(E), GPT2(CONFIG).requires_grad_(False)
    where = torch.arange(ids.shape[1]).expand(len(ids), -1) if positions else None  # (B, T)
    if what == "enter":
        wider = torch.ones(len(ids), len(E) + ids.shape[1], dtype=torch.long) if positions else None
        moved = None if where is None else where + len(E)
        return soft.enter(model.transformer.wte(ids), wider, moved, None)
    soft.put_into(model)
    if what == "pieces":
        cache = KVCache()
        return [model(piece, cache=cache) for piece in ids.split([4, 2], dim=1)]
    logits = model(ids, attention_mask=mask, position_ids=where)
    if what == "logits":  # the logits at padding do not count
        return logits if mask is None else logits[mask.bool()]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trained:
        next_token_loss(logits, ids).backward()
    return {
        "trained": {name: list(p.shape) for name, p in trained.items()},
        "values": [p.detach() for p in trained.values()],
        "gradients": [p.grad for p in trained.values()],
        "length": soft.length,
        "a parameter": isinstance(soft.embeddings, nn.Parameter),
    }
