"""Unit 03, GPT-2, attention: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong

# --- split_heads -------------------------------------------------------------------------------------


@right("split_heads")
def chunks_stacked(x: Tensor, n_head: int) -> Tensor:
    return torch.stack(x.chunk(n_head, dim=-1), dim=1)


@right("split_heads")
def numbers_copied_one_by_one_in_numpy(x: Tensor, n_head: int) -> np.ndarray:
    B, T, d = x.shape
    hd = d // n_head
    heads = np.zeros((B, n_head, T, hd))
    for h in range(n_head):
        heads[:, h] = x.numpy()[:, :, h * hd : (h + 1) * hd]
    return heads


@right("split_heads")
def unflattened_and_moved(x: Tensor, n_head: int) -> Tensor:
    return x.unflatten(-1, (n_head, -1)).movedim(2, 1)


@right("split_heads")
def columns_picked_by_index(x: Tensor, n_head: int) -> Tensor:
    columns = torch.arange(x.shape[-1]).view(n_head, -1)
    return torch.einsum("bthc->bhtc", x[:, :, columns])


@wrong(
    "split_heads",
    "For a contiguous x your result is right. With another order in memory `view` cannot merge the texts and the "
    "tokens into one axis: leave these axes as they are, or use `reshape`.",
)
def for_a_contiguous_x_only(x: Tensor, n_head: int) -> Tensor:
    B, T, d = x.shape
    return x.view(B * T, n_head, d // n_head).view(B, T, n_head, -1).transpose(1, 2)


@wrong(
    "split_heads",
    "The shape is right, but the numbers are not where they belong: a single `view` straight to the final shape mixes "
    "up the tokens. A `view` follows the order of the numbers in memory, where the tokens come before the heads.",
)
def one_view_to_the_final_shape(x: Tensor, n_head: int) -> Tensor:
    B, T, d = x.shape
    return x.reshape(B, n_head, T, d // n_head)


@wrong(
    "split_heads",
    "The last axis is split correctly, but the heads still come after the tokens: attention works on the last two "
    "axes, which have to be the tokens and the columns of one head.",
)
def heads_not_moved(x: Tensor, n_head: int) -> Tensor:
    B, T, d = x.shape
    return x.reshape(B, T, n_head, d // n_head)


@wrong(
    "split_heads",
    "A head has to get adjacent columns. Yours gets every n-th column: the order of the two new axes decides which of "
    "them varies fastest.",
)
def every_nth_column(x: Tensor, n_head: int) -> Tensor:
    B, T, d = x.shape
    return x.reshape(B, T, d // n_head, n_head).permute(0, 3, 1, 2)


@wrong(
    "split_heads",
    "You use the number of heads as the width of a head. n_head is the number of heads; their width follows from it.",
)
def width_and_number_swapped(x: Tensor, n_head: int) -> Tensor:
    B, T, d = x.shape
    return x.reshape(B, T, d // n_head, n_head).transpose(1, 2)


@wrong(
    "split_heads",
    "The heads come before the batch. The texts of the batch come first, then the heads of each text.",
)
def heads_before_the_batch(x: Tensor, n_head: int) -> Tensor:
    return torch.stack(x.chunk(n_head, dim=-1), dim=0)


@wrong(
    "split_heads",
    "In your result each head is (columns, tokens); tokens should come before columns. Which two axes do you swap?",
)
def columns_before_tokens(x: Tensor, n_head: int) -> Tensor:
    B, T, d = x.shape
    return x.reshape(B, T, n_head, d // n_head).permute(0, 2, 3, 1)


# --- causal_mask -------------------------------------------------------------------------------------


@right("causal_mask")
def a_triangle_of_ones(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    return torch.ones(tokens, keys, dtype=torch.bool, device=device).tril(diagonal=keys - tokens)


@right("causal_mask")
def row_by_row_in_numpy(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    mask = np.zeros((tokens, keys), dtype=bool)
    for t in range(tokens):
        mask[t, : keys - tokens + t + 1] = True
    return torch.from_numpy(mask).to(device)


@right("causal_mask")
def lists_of_booleans(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    cached = keys - tokens
    return torch.tensor([[s <= cached + t for s in range(keys)] for t in range(tokens)], device=device)


@right("causal_mask")
def cached_keys_beside_a_square(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    cached = torch.ones(tokens, keys - tokens, device=device)
    return torch.cat([cached, torch.ones(tokens, tokens, device=device).tril()], dim=1) > 0


@wrong(
    "causal_mask",
    "The zeros and ones are right, but as numbers. Return booleans: `masked_fill` and `~` need them.",
)
def numbers_for_booleans(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    return torch.ones(tokens, keys, device=device).tril(diagonal=keys - tokens)


def _places(tokens: int, keys: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    return torch.arange(keys - tokens, keys, device=device)[:, None], torch.arange(keys, device=device)[None, :]


@wrong(
    "causal_mask",
    "Off by one: your tokens do not see themselves. A token may attend to itself and to all tokens before it; "
    "otherwise the first token would see nothing, and a softmax over nothing is NaN.",
)
def no_token_sees_itself(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    query, key = _places(tokens, keys, device)
    return key < query


@wrong(
    "causal_mask",
    "Off by one: your tokens see the next token, which is what they have to predict. In training such a model reaches "
    "a very low loss, because it learns to copy.",
)
def the_next_token_is_seen(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    query, key = _places(tokens, keys, device)
    return key <= query + 1


@wrong("causal_mask", "True has to mean that a key may be seen. Your mask marks what is forbidden.")
def true_where_forbidden(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    query, key = _places(tokens, keys, device)
    return key > query


@wrong(
    "causal_mask",
    "The mask is the wrong way round: your tokens see what comes after them. Rows are queries and columns are keys.",
)
def the_future_is_seen(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    query, key = _places(tokens, keys, device)
    return key >= query


@wrong(
    "causal_mask",
    "Without a cache your mask is right. With one, you align the first query with the first key: but the cached keys "
    "come before all of the queries, and it is the last query that aligns with the last key.",
)
def aligned_with_the_first_key(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    return torch.ones(tokens, keys, dtype=torch.bool, device=device).tril()


@wrong("causal_mask", "Your mask allows everything: every token sees the whole text, including the future.")
def everything_is_seen(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    return torch.ones(tokens, keys, dtype=torch.bool, device=device)


@wrong(
    "causal_mask",
    "That is what could be added to the scores later: zeros and minus infinities. Return booleans, which are simpler "
    "and can be combined with other masks.",
)
def zeros_and_minus_infinity(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    query, key = _places(tokens, keys, device)
    return torch.zeros(tokens, keys, device=device).masked_fill(key > query, -math.inf)


@wrong(
    "causal_mask",
    "Your mask is square. It needs a row for each query and a column for each key, including cached ones.",
)
def square_whatever_the_cache(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


# --- causal_attention --------------------------------------------------------------------------------


def _seen(q: Tensor, k: Tensor) -> Tensor:
    tokens, keys = q.shape[-2], k.shape[-2]
    return torch.ones(tokens, keys, dtype=torch.bool).tril(diagonal=keys - tokens)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor, axis: int = -1) -> Tensor:
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~seen, -math.inf)
    return torch.softmax(scores, dim=axis) @ v


@right("causal_attention")
def pytorchs_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_seen(q, k))


@right("causal_attention")
def query_by_query_in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    T, S = q.shape[2], k.shape[2]
    rows = []
    for t in range(T):
        past = S - T + t + 1
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t], k[:, :, :past]) / q.shape[-1] ** 0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        rows.append(torch.einsum("bhs,bhsd->bhd", weights, v[:, :, :past]))
    return torch.stack(rows, dim=2)


@right("causal_attention")
def a_large_negative_number_for_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + torch.where(_seen(q, k), 0.0, -1e9)
    return torch.softmax(scores, dim=-1) @ v


@right("causal_attention")
def cached_and_new_keys_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T, cached = q.shape[2], k.shape[2] - q.shape[2]
    old = torch.einsum("bhtd,bhsd->bhts", q, k[:, :, :cached]) * q.shape[-1] ** -0.5
    new = torch.einsum("bhtd,bhsd->bhts", q, k[:, :, cached:]) * q.shape[-1] ** -0.5
    new = new + torch.full((T, T), -math.inf).triu(1)
    total = torch.logaddexp(old.logsumexp(-1, keepdim=True), new.logsumexp(-1, keepdim=True))
    return (old - total).exp() @ v[:, :, :cached] + (new - total).exp() @ v[:, :, cached:]


@right("causal_attention")
def head_by_head_in_numpy(q: Tensor, k: Tensor, v: Tensor) -> np.ndarray:
    T, S, hd = q.shape[2], k.shape[2], q.shape[3]
    Q, K, V = (one.double().numpy() for one in (q, k, v))
    out = np.zeros(Q.shape)
    for place in np.ndindex(*Q.shape[:2]):
        weights = np.exp(Q[place] @ K[place].T / np.sqrt(hd)) * np.tri(T, S, S - T)
        out[place] = weights / weights.sum(axis=1, keepdims=True) @ V[place]
    return out


@wrong(
    "causal_attention",
    "Your result is right if q, k and v are contiguous. As `split_heads` returns them they are not, and `view` cannot "
    "merge their axes: multiply them with all four axes (PyTorch treats the first two as a batch), or use `reshape`.",
)
def for_contiguous_inputs_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, width = k.shape[-2], q.shape[-1]
    flat = (q.view(-1, q.shape[-2], width), k.view(-1, keys, width), v.view(-1, keys, width))
    return _attend(*flat, width**-0.5, _seen(q, k)).view(q.shape)


@wrong(
    "causal_attention",
    "Keys and queries are exchanged: your scores have a row for each key. A row belongs to a query, and its softmax "
    "runs over the keys.",
)
def queries_and_keys_swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(k, q, v, q.shape[-1] ** -0.5, _seen(q, k))


@wrong("causal_attention", "You average the keys. The keys decide the weights; what is averaged are the values.")
def keys_for_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, k, q.shape[-1] ** -0.5, _seen(q, k))


@wrong("causal_attention", "Those are the weights. They still have to be applied to the values.")
def only_the_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~_seen(q, k), -math.inf), dim=-1)


@wrong(
    "causal_attention",
    "The scores are not scaled. A sum of many products grows with their number, and a softmax of large scores puts "
    "all its weight on one key.",
)
def not_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, v, 1.0, _seen(q, k))


@wrong(
    "causal_attention",
    "You scale by the width of the whole model. A score is the product of two vectors of *one head*: how many entries "
    "do they have?",
)
def scaled_by_the_width_of_the_model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, v, (q.shape[1] * q.shape[-1]) ** -0.5, _seen(q, k))


@wrong(
    "causal_attention",
    "You divide the scores by the width of a head itself. The standard deviation of the scores has to become 1, and "
    "that of a sum does not grow as fast as the number of its terms.",
)
def divided_by_the_width_without_the_root(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, v, 1 / q.shape[-1], _seen(q, k))


@wrong("causal_attention", "You multiply where you should divide: the scores become larger, not smaller.")
def multiplied_by_the_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, v, q.shape[-1] ** 0.5, _seen(q, k))


@wrong(
    "causal_attention",
    "Your softmax runs over the queries. For each query, its weights over the *keys* have to sum to 1.",
)
def softmax_over_the_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, v, q.shape[-1] ** -0.5, _seen(q, k), axis=-2)


@wrong("causal_attention", "There is no mask: your tokens see the future, which they have to predict.")
def no_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, v, q.shape[-1] ** -0.5, torch.ones_like(_seen(q, k)))


@wrong(
    "causal_attention",
    "Your mask sets the forbidden scores to 0. The exponential of 0 is 1, so those keys keep a share. Which score has "
    "the exponential 0?",
)
def forbidden_scores_become_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) * _seen(q, k), dim=-1) @ v


@wrong(
    "causal_attention",
    "You remove the forbidden weights after the softmax, and what is left does not sum to 1. Mask the scores instead.",
)
def masked_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) * _seen(q, k)) @ v


@wrong(
    "causal_attention",
    "Without a cache your answer is right. With one, you treat the first query as the first token: but the cached "
    "keys come before all of the queries.",
)
def mask_aligned_with_the_first_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, v, q.shape[-1] ** -0.5, torch.ones_like(_seen(q, k)).tril())


@wrong(
    "causal_attention",
    "The mask is the wrong way round: your tokens see only what comes after them.",
)
def mask_turned_round(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, v, q.shape[-1] ** -0.5, ~_seen(q, k))
