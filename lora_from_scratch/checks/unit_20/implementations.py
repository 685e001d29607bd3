"""Implementations of attention in groups on which a learner's test is tried.

Each is a function of q, k, v (B, H, T, hd) and the group size. The faulty ones have in common that an output depends on
a later token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]
Mask = Callable[[int, int, int], Tensor]  # (heads, tokens, group size) to (H, T, T), True where a query may attend


def with_mask(mask: Mask) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor, group_size: int) -> Tensor:
        allowed = mask(q.shape[1], q.shape[2], group_size)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    return attention


def causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def groups(tokens: int, group_size: int, shift: int) -> Tensor:
    """(T, T): whether two tokens are in the same group, if the borders are moved to the front by `shift`."""
    number = (torch.arange(tokens) + (group_size - shift) % group_size) // group_size
    return number[:, None] == number[None]


def by_halves(first: Tensor, second: Tensor, heads: int) -> Tensor:
    half = heads // 2
    return torch.cat([first.expand(half, -1, -1), second.expand(heads - half, -1, -1)])


# --- Sound -----------------------------------------------------------------------------------------------


def full(heads: int, tokens: int, group_size: int) -> Tensor:
    return causal(tokens).expand(heads, -1, -1)


def groups_only(heads: int, tokens: int, group_size: int) -> Tensor:
    return full(heads, tokens, group_size) & groups(tokens, group_size, 0)


def shifted(heads: int, tokens: int, group_size: int) -> Tensor:
    same = by_halves(groups(tokens, group_size, 0), groups(tokens, group_size, group_size // 2), heads)
    return full(heads, tokens, group_size) & same


def window(heads: int, tokens: int, group_size: int) -> Tensor:
    return full(heads, tokens, group_size).triu(1 - group_size)


def only_itself(q: Tensor, k: Tensor, v: Tensor, group_size: int) -> Tensor:
    return v * torch.tanh((q * k).sum(-1, keepdim=True))


def running_sum(q: Tensor, k: Tensor, v: Tensor, group_size: int) -> Tensor:
    """Attention without a softmax."""
    return torch.einsum("bhti,bhtij->bhtj", q, torch.einsum("bhti,bhtj->bhtij", k, v).cumsum(2))


# --- Faulty ----------------------------------------------------------------------------------------------


def rolled_without_a_mask(heads: int, tokens: int, group_size: int) -> Tensor:
    length = tokens + -tokens % group_size
    order = torch.arange(length).roll(-(group_size // 2))
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for group in order.split(group_size):
        for place, query in enumerate(group):
            allowed[query, group[: place + 1]] = True
    return by_halves(causal(tokens) & groups(tokens, group_size, 0), allowed[:tokens, :tokens], heads)


def rolled_in_the_last_head_only(heads: int, tokens: int, group_size: int) -> Tensor:
    allowed = shifted(heads, tokens, group_size).clone()
    allowed[-1] = rolled_without_a_mask(heads, tokens, group_size)[-1]
    return allowed


def rolled_where_groups_are_not_whole(heads: int, tokens: int, group_size: int) -> Tensor:
    whole = tokens % group_size == 0
    return (shifted if whole else rolled_without_a_mask)(heads, tokens, group_size)


def whole_groups(heads: int, tokens: int, group_size: int) -> Tensor:
    same = groups(tokens, group_size, 0), groups(tokens, group_size, group_size // 2)
    return by_halves(*same, heads)


def one_token_ahead(heads: int, tokens: int, group_size: int) -> Tensor:
    return torch.ones(heads, tokens, tokens, dtype=torch.bool).tril(1)


def the_last_group_sees_itself(heads: int, tokens: int, group_size: int) -> Tensor:
    allowed = shifted(heads, tokens, group_size).clone()
    allowed[:, -2:, -2:] = True
    return allowed


def the_first_token_sees_the_second(heads: int, tokens: int, group_size: int) -> Tensor:
    allowed = shifted(heads, tokens, group_size).clone()
    allowed[:, 0, 1] = True
    return allowed


def masked_after_the_softmax(q: Tensor, k: Tensor, v: Tensor, group_size: int) -> Tensor:
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
    return weights.tril() @ v


def a_little_of_all_values(q: Tensor, k: Tensor, v: Tensor, group_size: int) -> Tensor:
    return with_mask(shifted)(q, k, v, group_size) + 0.01 * v.mean(dim=2, keepdim=True)


def scaled_by_all_queries(q: Tensor, k: Tensor, v: Tensor, group_size: int) -> Tensor:
    return with_mask(shifted)(q / q.std(dim=2, keepdim=True), k, v, group_size)


SOUND: dict[str, Attention] = {
    "full causal attention": with_mask(full),
    "causal attention within groups": with_mask(groups_only),
    "groups, shifted in half of the heads": with_mask(shifted),
    "causal attention to the last g tokens": with_mask(window),
    "each token attends to itself alone": only_itself,
    "a running sum in place of a softmax": running_sum,
}
FAULTY: dict[str, Attention] = {
    "half of the heads rolled, without a mask": with_mask(rolled_without_a_mask),
    "one head rolled without a mask": with_mask(rolled_in_the_last_head_only),
    "rolled without a mask if the last group is not whole": with_mask(rolled_where_groups_are_not_whole),
    "a whole group, whatever the order": with_mask(whole_groups),
    "the next token is seen": with_mask(one_token_ahead),
    "the last two tokens see each other": with_mask(the_last_group_sees_itself),
    "the first token sees the second": with_mask(the_first_token_sees_the_second),
    "masked after the softmax": masked_after_the_softmax,
    "a hundredth of the mean of all values is added": a_little_of_all_values,
    "the queries are divided by the standard deviation of all of them": scaled_by_all_queries,
}
IMPLEMENTATIONS = SOUND | FAULTY
