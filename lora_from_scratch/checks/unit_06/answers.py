"""Unit 06, attention with a prefix: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.gpt2.model import causal_attention
from lora_from_scratch.methods.llama_adapter import prompt_attention
from lora_from_scratch.methods.prefix_tuning import prefix_attention, prefix_share

# --- prefix_attention --------------------------------------------------------------------------------


def in_front(prefix: Tensor, text: Tensor) -> Tensor:
    return torch.cat([prefix.expand(len(text), *prefix.shape[1:]), text], dim=2)


@right("prefix_attention")
def with_pytorchs_kernel_and_a_mask(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    tokens, length = q.shape[2], prefix_k.shape[2]
    allowed = torch.cat([torch.ones(tokens, length), torch.ones(tokens, tokens).tril()], dim=1).bool()
    return F.scaled_dot_product_attention(q, in_front(prefix_k, k), in_front(prefix_v, v), attn_mask=allowed)


@right("prefix_attention")
def as_a_mixture_of_two_attentions(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    share = prefix_share(q, k, prefix_k)[..., None]
    return (1 - share) * causal_attention(q, k, v) + share * prompt_attention(q, prefix_k, prefix_v)


@right("prefix_attention")
def one_token_after_the_other(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    keys, values, length = in_front(prefix_k, k), in_front(prefix_v, v), prefix_k.shape[2]
    rows = []
    for t in range(q.shape[2]):
        seen = length + t + 1
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t], keys[:, :, :seen]) * q.shape[-1] ** -0.5
        rows.append(torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), values[:, :, :seen]))
    return torch.stack(rows, dim=2)


@right("prefix_attention")
def with_scores_in_two_blocks(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    scale, tokens = q.shape[-1] ** -0.5, q.shape[2]
    to_prefix = torch.einsum("bhtd,bhpd->bhtp", q, prefix_k.expand(len(q), -1, -1, -1)) * scale
    to_text = torch.einsum("bhtd,bhsd->bhts", q, k) * scale + torch.full((tokens, tokens), -math.inf).triu(1)
    total = torch.logaddexp(to_prefix.logsumexp(-1, keepdim=True), to_text.logsumexp(-1, keepdim=True))
    return (to_prefix - total).exp() @ prefix_v + (to_text - total).exp() @ v


@wrong(
    "prefix_attention",
    "Your tokens do not see themselves: the last key that a token sees is its own.",
)
def does_not_see_itself(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    keys, values, length = in_front(prefix_k, k), in_front(prefix_v, v), prefix_k.shape[2]
    allowed = torch.ones(q.shape[2], keys.shape[2]).tril(length - 1).bool()
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=allowed)


@wrong("prefix_attention", "Keys and values are swapped, those of the prefix and those of the text.")
def keys_for_values(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return prefix_attention(q, v, k, prefix_v, prefix_k)


@wrong(
    "prefix_attention",
    "Keys and values have different orders in your answer: the prefix has to precede the text in both.",
)
def two_orders(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return causal_attention(q, in_front(prefix_k, k), torch.cat([v, prefix_v.expand(len(v), -1, -1, -1)], dim=2))


@wrong("prefix_attention", "You use keys as values: the weights are applied to the values, of prefix and text.")
def keys_as_values(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return prefix_attention(q, k, k, prefix_k, prefix_k)


@wrong(
    "prefix_attention",
    "You also send queries of the prefix through the attention, and return their outputs. It has keys and values only.",
)
def an_output_for_the_prefix(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return causal_attention(in_front(prefix_k, q), in_front(prefix_k, k), in_front(prefix_v, v))


@wrong("prefix_attention", "The gradient reaches the values of the prefix, but not its keys.")
def keys_out_of_the_graph(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return prefix_attention(q, k, v, prefix_k.detach(), prefix_v)


@wrong("prefix_attention", caught_by="raises")
def for_contiguous_tensors_only(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    batch, heads, tokens, width = q.shape
    queries = q.view(batch * heads, 1, tokens, width)
    keys, values = (x.reshape(batch * heads, 1, -1, width) for x in (in_front(prefix_k, k), in_front(prefix_v, v)))
    return causal_attention(queries, keys, values).reshape(q.shape)


@wrong("prefix_attention", caught_by="dtype")
def computed_in_float32(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return prefix_attention(q.float(), k.float(), v.float(), prefix_k.float(), prefix_v.float())


@wrong(
    "prefix_attention",
    "Your prefix comes after the text. The causal mask then treats it as the future, and hides it or the end of the "
    "text from most of the tokens.",
)
def behind_the_text(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    k = torch.cat([k, prefix_k.expand(len(k), -1, -1, -1)], dim=2)
    v = torch.cat([v, prefix_v.expand(len(v), -1, -1, -1)], dim=2)
    return causal_attention(q, k, v)


@wrong(
    "prefix_attention",
    "You use two softmaxes, one for the text and one for the prefix, and add their results. Here the two compete in a "
    "single softmax. (What you wrote is nearly LLaMA-Adapter, which comes later in this unit.)",
)
def a_softmax_each(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return causal_attention(q, k, v) + prompt_attention(q, prefix_k, prefix_v)


@wrong(
    "prefix_attention",
    "Your mask counts from the first key. That key now belongs to the prefix, so the tokens see part of the prefix "
    "and too little of the text: the last token has to see everything.",
)
def the_mask_from_the_first_key(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    keys, values = in_front(prefix_k, k), in_front(prefix_v, v)
    allowed = torch.ones(q.shape[2], keys.shape[2]).tril().bool()
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=allowed)


@wrong("prefix_attention", "Your tokens see the text that comes after them: the causal mask is missing.")
def sees_the_future(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, in_front(prefix_k, k), in_front(prefix_v, v))


@wrong("prefix_attention", "The scores are not divided by sqrt(hd).")
def not_scaled(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return causal_attention(q * q.shape[-1] ** 0.5, in_front(prefix_k, k), in_front(prefix_v, v))


@wrong("prefix_attention", "The prefix has no effect on your result.")
def without_the_prefix(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return causal_attention(q, k, v)


@wrong(
    "prefix_attention",
    "Your prefix takes its share of the attention but contributes nothing: you use its keys, but not its values.",
)
def keys_without_values(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return causal_attention(q, in_front(prefix_k, k), in_front(0 * prefix_v, v))


@wrong("prefix_attention", "You have swapped the keys and the values of the prefix.")
def exchanged(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return causal_attention(q, in_front(prefix_v, k), in_front(prefix_k, v))


@wrong(
    "prefix_attention",
    "The values are right, but no gradient reaches the prefix, which is all that is trained.",
)
def nothing_to_learn(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return prefix_attention(q, k, v, prefix_k.detach(), prefix_v.detach())


@wrong(
    "prefix_attention",
    "Every text of the batch gets the prefix of the first one. If there are as many prefixes as texts, each text has "
    "its own.",
)
def the_first_prefix_for_all(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return prefix_attention(q, k, v, prefix_k[:1], prefix_v[:1])


# --- prefix_share ------------------------------------------------------------------------------------


def all_scores(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    """Scores of the prefix, then those of the text; minus infinity for the future."""
    tokens, length = q.shape[2], prefix_k.shape[2]
    scores = q @ in_front(prefix_k, k).mT / q.shape[-1] ** 0.5
    hidden = torch.cat([torch.zeros(tokens, length), torch.ones(tokens, tokens).triu(1)], dim=1).bool()
    return scores.masked_fill(hidden, -math.inf)


@right("prefix_share")
def by_log_sum_exp(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    scores, length = all_scores(q, k, prefix_k), prefix_k.shape[2]
    return torch.sigmoid(scores[..., :length].logsumexp(-1) - scores[..., length:].logsumexp(-1))


@right("prefix_share")
def what_attention_says_of_ones(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    """Values of 1 for the prefix and 0 for the text: the attention's output is the share."""
    return prefix_attention(q, k, torch.zeros_like(k), prefix_k, torch.ones_like(prefix_k))[..., 0]


@right("prefix_share")
def what_is_left_of_one_in_float64(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    weights = all_scores(q.double(), k.double(), prefix_k.double()).softmax(-1)
    return (1 - weights[..., prefix_k.shape[2] :].sum(-1)).to(q.dtype)


@wrong(
    "prefix_share",
    "You divide by the sum over the whole text. The softmax of a token runs only over what it may see: the prefix, "
    "the earlier tokens and itself.",
)
def with_the_future(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    weights = (q @ in_front(prefix_k, k).mT / q.shape[-1] ** 0.5).softmax(-1)
    return weights[..., : prefix_k.shape[2]].sum(-1)


@wrong("prefix_share", "This is the share of the text. The two shares add up to 1.")
def share_of_the_text(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    return 1 - prefix_share(q, k, prefix_k)


@wrong("prefix_share", "You take the mean of the weights on the prefix. A share is their sum.")
def mean_of_the_weights(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    return all_scores(q, k, prefix_k).softmax(-1)[..., : prefix_k.shape[2]].mean(-1)


@wrong("prefix_share", "The scores are not divided by sqrt(hd), so your shares are too close to 0 or 1.")
def share_not_scaled(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    return prefix_share(q * q.shape[-1] ** 0.5, k, prefix_k)


@wrong(
    "prefix_share",
    "You divide the prefix's exponentials by the text's. A share is a part of the whole, and the whole includes the "
    "prefix as well.",
)
def over_the_text_alone(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    scores, length = all_scores(q, k, prefix_k), prefix_k.shape[2]
    return scores[..., :length].exp().sum(-1) / scores[..., length:].exp().sum(-1)


@wrong(
    "prefix_share",
    "You count keys: P of them in the prefix, and those of the text. How much attention a token gives them depends on "
    "its query.",
)
def by_counting_keys(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    length = prefix_k.shape[2]
    share = length / (length + 1 + torch.arange(q.shape[2]))
    return share.expand(q.shape[:3]).clone()


@wrong(
    "prefix_share",
    "Your exponentials overflow, and infinity divided by infinity is NaN. A softmax first subtracts the largest score.",
)
def exponentials_by_hand(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    exponentials = all_scores(q, k, prefix_k).exp()
    return exponentials[..., : prefix_k.shape[2]].sum(-1) / exponentials.sum(-1)


@wrong("prefix_share", "You return the weight of the first virtual token only. All P of them belong to the prefix.")
def the_first_virtual_token(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    return all_scores(q, k, prefix_k).softmax(-1)[..., 0]


@wrong(
    "prefix_share",
    "You average over the heads. Each head has its own softmax and therefore its own share: the result is (B, H, T).",
)
def averaged_over_the_heads(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    return prefix_share(q, k, prefix_k).mean(dim=1)


@right("prefix_share")
def with_exponentials_after_the_largest(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    scores, length = all_scores(q, k, prefix_k), prefix_k.shape[2]
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return weights[..., :length].sum(-1) / weights.sum(-1)


@right("prefix_share")
def token_by_token_in_numpy(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    texts, keys = q.numpy(), in_front(prefix_k, k).numpy()
    length, share = prefix_k.shape[2], np.zeros(q.shape[:3], dtype=q.numpy().dtype)
    for b, h, t in np.ndindex(*share.shape):
        scores = keys[b, h, : length + t + 1] @ texts[b, h, t] / math.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        share[b, h, t] = weights[:length].sum() / weights.sum()
    return torch.from_numpy(share)


@wrong(
    "prefix_share",
    "Your tokens do not see themselves: the text that a token may see includes the token itself.",
)
def without_itself(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    tokens, length = q.shape[2], prefix_k.shape[2]
    scores = q @ in_front(prefix_k, k).mT / q.shape[-1] ** 0.5
    hidden = torch.cat([torch.zeros(tokens, length), torch.ones(tokens, tokens).triu(0)], dim=1).bool()
    return scores.masked_fill(hidden, -math.inf).softmax(-1)[..., :length].sum(-1)


@wrong(
    "prefix_share",
    "Hidden scores are set to 0 in your answer. A score of 0 has the exponential 1, so it still gets a weight.",
)
def hidden_scores_of_zero(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    scores = all_scores(q, k, prefix_k)
    return scores.masked_fill(scores.isinf(), 0.0).softmax(-1)[..., : prefix_k.shape[2]].sum(-1)


@wrong("prefix_share", "Your softmax runs over the tokens (the queries). For each query it runs over the keys.")
def softmax_over_the_queries(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    scores = all_scores(q, k, prefix_k)
    return scores.softmax(-2)[..., : prefix_k.shape[2]].sum(-1)


@wrong(
    "prefix_share",
    "Your softmax runs over the prefix alone, so its weights always sum to 1. The text competes in the same softmax.",
)
def over_the_prefix_alone(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    return torch.softmax(q @ prefix_k.mT / q.shape[-1] ** 0.5, dim=-1).sum(-1)


@wrong(
    "prefix_share",
    "Every text of the batch gets the share of the first one's prefix. If there are as many prefixes as texts, each "
    "text has its own.",
)
def share_of_the_first_prefix(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    return prefix_share(q, k, prefix_k[:1])


@wrong("prefix_share", caught_by="dtype")
def share_in_float32(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    return prefix_share(q.float(), k.float(), prefix_k.float())
