"""Unit 03, GPT-2, the model: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong

Part = Callable[[Tensor], Tensor]

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
    return torch.ones(tokens, keys, dtype=torch.bool).tril(diagonal=keys - tokens)


@right("causal_mask")
def cell_by_cell(tokens: int, keys: int, device: torch.device | None = None) -> np.ndarray:
    mask = np.zeros((tokens, keys), dtype=bool)
    for t in range(tokens):
        mask[t, : keys - tokens + t + 1] = True
    return mask


def _places(tokens: int, keys: int) -> tuple[Tensor, Tensor]:
    return torch.arange(keys - tokens, keys)[:, None], torch.arange(keys)[None, :]


@wrong(
    "causal_mask",
    "Off by one: your tokens do not see themselves. A token may attend to itself and to all tokens before it; "
    "otherwise the first token would see nothing, and a softmax over nothing is NaN.",
)
def no_token_sees_itself(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    query, key = _places(tokens, keys)
    return key < query


@wrong(
    "causal_mask",
    "Off by one: your tokens see the next token, which is what they have to predict. In training such a model reaches "
    "a very low loss, because it learns to copy.",
)
def the_next_token_is_seen(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    query, key = _places(tokens, keys)
    return key <= query + 1


@wrong("causal_mask", "True has to mean that a key may be seen. Your mask marks what is forbidden.")
def true_where_forbidden(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    query, key = _places(tokens, keys)
    return key > query


@wrong(
    "causal_mask",
    "The mask is the wrong way round: your tokens see what comes after them. Rows are queries and columns are keys.",
)
def the_future_is_seen(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    query, key = _places(tokens, keys)
    return key >= query


@wrong(
    "causal_mask",
    "Without a cache your mask is right. With one, you align the first query with the first key: but the cached keys "
    "come before all of the queries, and it is the last query that aligns with the last key.",
)
def aligned_with_the_first_key(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    return torch.ones(tokens, keys, dtype=torch.bool).tril()


@wrong("causal_mask", "Your mask allows everything: every token sees the whole text, including the future.")
def everything_is_seen(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    return torch.ones(tokens, keys, dtype=torch.bool)


@wrong(
    "causal_mask",
    "That is what could be added to the scores later: zeros and minus infinities. Return booleans, which are simpler "
    "and can be combined with other masks.",
)
def zeros_and_minus_infinity(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    query, key = _places(tokens, keys)
    return torch.zeros(tokens, keys).masked_fill(key > query, -math.inf)


@wrong(
    "causal_mask",
    "Your mask is square. It needs a row for each query and a column for each key, including cached ones.",
)
def square_whatever_the_cache(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


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


# --- gelu --------------------------------------------------------------------------------------------

ROOT = math.sqrt(2 / math.pi)


@right("gelu")
def pytorchs_tanh_approximation(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@right("gelu")
def numpy_in_float64(x: Tensor) -> np.ndarray:
    x64 = x.numpy().astype(np.float64)
    return 0.5 * x64 * (1 + np.tanh(ROOT * (x64 + 0.044715 * np.power(x64, 3))))


@right("gelu")
def a_sigmoid_of_twice_the_argument(x: Tensor) -> Tensor:
    return x * torch.sigmoid(2 * ROOT * (x + 0.044715 * x**3))


@wrong(
    "gelu",
    "This is the exact GELU, defined by the normal distribution. GPT-2 was trained with its tanh approximation, and "
    "the two differ in the fourth decimal: enough to change the logits.",
)
def the_exact_one(x: Tensor) -> Tensor:
    return F.gelu(x)


@wrong("gelu", "This is the sigmoid approximation, which is coarser. GPT-2 uses the one with the tanh.")
def the_sigmoid_approximation(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


@wrong(
    "gelu", "The factor in front is missing: for a large x the result should be x, but yours is about twice as large."
)
def no_half(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**3)))


@wrong("gelu", "The cubic term is missing, or it is outside the tanh: check the parentheses.")
def no_cube(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(ROOT * x))


@wrong("gelu", "The cubic term has to be inside the parentheses that are multiplied by the square root.")
def cube_outside_the_bracket(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(ROOT * x + 0.044715 * x**3))


@wrong("gelu", "The constant is a square root; yours is 2 / pi itself.")
def no_root(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(2 / math.pi * (x + 0.044715 * x**3)))


@wrong("gelu", "That is the fraction of x that passes. It still has to be multiplied by x.")
def only_the_gate(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(ROOT * (x + 0.044715 * x**3)))


@wrong(
    "gelu", "You set negative numbers to zero, like a ReLU. A GELU lets a little of them through: its curve is smooth."
)
def a_relu(x: Tensor) -> Tensor:
    return torch.relu(x)


@wrong(
    "gelu",
    "For large numbers the exponential of your tanh overflows, and infinity divided by infinity is NaN. PyTorch's own "
    "tanh handles this.",
)
def a_tanh_that_overflows(x: Tensor) -> Tensor:
    z = ROOT * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + (z.exp() - (-z).exp()) / (z.exp() + (-z).exp()))


# --- transformer_block -------------------------------------------------------------------------------


@right("transformer_block")
def on_a_copy_in_place(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    stream = x.clone()
    stream += attention(norm_1(stream))
    stream += mlp(norm_2(stream))
    return stream


@right("transformer_block")
def as_a_loop_in_float64(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    stream = x.double()
    for norm, part in ((norm_1, attention), (norm_2, mlp)):
        stream = stream + part(norm(stream.float())).double()
    return stream


@wrong(
    "transformer_block",
    "You normalise the sum, after each part: that is the original Transformer (post-norm). In GPT-2 the normalisation "
    "comes first, and the stream itself is never normalised.",
)
def normalised_afterwards(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    x = norm_1(x + attention(x))
    return norm_2(x + mlp(x))


@wrong(
    "transformer_block",
    "The residual connections are missing: the stream itself does not pass through the block.",
)
def no_residual(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    return mlp(norm_2(attention(norm_1(x))))


@wrong("transformer_block", "The attention replaces the stream; it should be added to it.")
def no_residual_around_the_attention(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    x = attention(norm_1(x))
    return x + mlp(norm_2(x))


@wrong("transformer_block", "The MLP replaces the stream; it should be added to it.")
def no_residual_around_the_mlp(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    return mlp(norm_2(x + attention(norm_1(x))))


@wrong(
    "transformer_block",
    "Your MLP reads what the attention read. It should read the stream after the attention has added to it; only some "
    "other models (such as GPT-J) run the two in parallel.",
)
def side_by_side(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    return x + attention(norm_1(x)) + mlp(norm_2(x))


@wrong(
    "transformer_block",
    "You add to the normalised stream. Each part reads the normalised stream, but its result is added to the stream "
    "itself.",
)
def added_to_the_normalised(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    x = norm_1(x)
    x = x + attention(x)
    x = norm_2(x)
    return x + mlp(x)


@wrong("transformer_block", "Both parts get the same normalisation. Each has its own, with its own weights.")
def one_norm_for_both(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    x = x + attention(norm_1(x))
    return x + mlp(norm_1(x))


@wrong("transformer_block", "The MLP comes first in your block. The attention has to come before it.")
def mlp_first(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    x = x + mlp(norm_2(x))
    return x + attention(norm_1(x))


@wrong("transformer_block", "Nothing is normalised before the MLP reads it.")
def second_norm_forgotten(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    x = x + attention(norm_1(x))
    return x + mlp(x)


@wrong("transformer_block", caught_by="changes its input")
def added_in_the_callers_tensor(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    x += attention(norm_1(x))
    x += mlp(norm_2(x))
    return x
