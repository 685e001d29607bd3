"""Unit 06, prefix tuning: mistakes that people make in attention with a prefix, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

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


@wrong(
    "prefix_attention",
    "Your prefix stands behind the text. The causal mask then takes it for the future, and hides the text's end or the "
    "prefix from most of the tokens.",
)
def behind_the_text(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    k = torch.cat([k, prefix_k.expand(len(k), -1, -1, -1)], dim=2)
    v = torch.cat([v, prefix_v.expand(len(v), -1, -1, -1)], dim=2)
    return causal_attention(q, k, v)


@wrong(
    "prefix_attention",
    "You have two softmaxes, one for the text and one for the prefix, and add what they give. Here the two compete in "
    "one softmax. (What you wrote is nearly LLaMA-Adapter, later in this unit.)",
)
def a_softmax_each(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return causal_attention(q, k, v) + prompt_attention(q, prefix_k, prefix_v)


@wrong(
    "prefix_attention",
    "Your mask counts from the first key. The first key is the prefix's now, so the tokens see a part of the prefix "
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


@wrong("prefix_attention", "The prefix has no effect on what comes out.")
def without_the_prefix(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return causal_attention(q, k, v)


@wrong(
    "prefix_attention",
    "Your prefix takes its share of the attention and gives nothing for it: only its keys are used, not its values.",
)
def keys_without_values(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return causal_attention(q, in_front(prefix_k, k), in_front(0 * prefix_v, v))


@wrong("prefix_attention", "Keys and values of the prefix are exchanged.")
def exchanged(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return causal_attention(q, in_front(prefix_v, k), in_front(prefix_k, v))


@wrong(
    "prefix_attention",
    "The values are right, but no gradient reaches the prefix, and the prefix is all that is learned.",
)
def nothing_to_learn(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return prefix_attention(q, k, v, prefix_k.detach(), prefix_v.detach())


@wrong(
    "prefix_attention",
    "Every text of the batch gets the prefix of the first one. Where there are as many prefixes as texts, each has its "
    "own.",
)
def the_first_prefix_for_all(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    return prefix_attention(q, k, v, prefix_k[:1], prefix_v[:1])


# --- prefix_share ------------------------------------------------------------------------------------


def all_scores(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    """Of the prefix, then of the text; the future at minus infinity."""
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
    return 1 - weights[..., prefix_k.shape[2] :].sum(-1)


@wrong(
    "prefix_share",
    "You divide by the sum over the whole text. A token competes only for the attention of what it may see: itself and "
    "what stands before it.",
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


@wrong("prefix_share", "The scores are not divided by sqrt(hd), so that your shares are too near to 0 or to 1.")
def share_not_scaled(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    return prefix_share(q * q.shape[-1] ** 0.5, k, prefix_k)


@wrong(
    "prefix_share",
    "You divide the prefix's exponentials by the text's. A share is a part of the whole: the whole has the prefix in "
    "it as well.",
)
def over_the_text_alone(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    scores, length = all_scores(q, k, prefix_k), prefix_k.shape[2]
    return scores[..., :length].exp().sum(-1) / scores[..., length:].exp().sum(-1)


@wrong(
    "prefix_share",
    "You count keys: P of them in front, and the text's behind. Whether a token gives them any attention depends on "
    "its query.",
)
def by_counting_keys(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    length = prefix_k.shape[2]
    share = length / (length + 1 + torch.arange(q.shape[2]))
    return share.expand(q.shape[:3]).clone()


@wrong(
    "prefix_share",
    "Your exponentials are too large for a float, and infinity divided by infinity is not a number. A softmax "
    "subtracts the largest score first.",
)
def exponentials_by_hand(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    exponentials = all_scores(q, k, prefix_k).exp()
    return exponentials[..., : prefix_k.shape[2]].sum(-1) / exponentials.sum(-1)


@wrong("prefix_share", "You return the weight of the first virtual token only. All P of them belong to the prefix.")
def the_first_virtual_token(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    return all_scores(q, k, prefix_k).softmax(-1)[..., 0]


@wrong(
    "prefix_share",
    "You average over the heads. Each head has a softmax, and a share, of its own: the result is (B, H, T).",
)
def averaged_over_the_heads(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    return prefix_share(q, k, prefix_k).mean(dim=1)


# --- gated_prefix_attention --------------------------------------------------------------------------


@right("gated_prefix_attention")
def with_a_softmax_written_out(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor
) -> Tensor:
    weights = torch.softmax(
        torch.einsum("bhtd,bhpd->bhtp", q, prompt_k.expand(len(q), -1, -1, -1)) / q.shape[-1] ** 0.5, -1
    )
    return causal_attention(q, k, v) + gate.tanh() * weights @ prompt_v


@right("gated_prefix_attention")
def with_two_kernels(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    text = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    prompt_k, prompt_v = (p.expand(len(q), -1, -1, -1) for p in (prompt_k, prompt_v))
    return text + F.scaled_dot_product_attention(q, prompt_k, gate.tanh() * prompt_v)


@right("gated_prefix_attention")
def one_head_after_the_other(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor
) -> Tensor:
    opened = torch.tanh(gate).flatten()
    heads = []
    for head in range(q.shape[1]):
        own = slice(head, head + 1)
        heads.append(opened[head] * prompt_attention(q[:, own], prompt_k[:, own], prompt_v[:, own]))
    return torch.cat(heads, dim=1) + causal_attention(q, k, v)


@wrong(
    "gated_prefix_attention",
    "Your gate is used as it is learned, without bounds. It goes through a tanh first, so that the prompt counts at "
    "most once.",
)
def without_the_tanh(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return causal_attention(q, k, v) + gate * prompt_attention(q, prompt_k, prompt_v)


@wrong(
    "gated_prefix_attention",
    "Your gate is a sigmoid: at zero it is half open, and the model does not start as what it was.",
)
def with_a_sigmoid(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return causal_attention(q, k, v) + torch.sigmoid(gate) * prompt_attention(q, prompt_k, prompt_v)


@wrong(
    "gated_prefix_attention",
    "You mix: what the prompt gets, the text loses. Here the text's part stays whole, and the prompt's comes on top.",
)
def a_mixture(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    share = torch.tanh(gate)
    return (1 - share) * causal_attention(q, k, v) + share * prompt_attention(q, prompt_k, prompt_v)


@wrong(
    "gated_prefix_attention",
    "Prompt and text share one softmax in yours, so the prompt takes attention from the text even while its gate is "
    "shut. Each has a softmax of its own.",
)
def one_softmax(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return prefix_attention(q, k, v, prompt_k, torch.tanh(gate) * prompt_v)


@wrong(
    "gated_prefix_attention",
    "Your gate multiplies everything. While it is shut nothing comes out at all, of the text neither.",
)
def gate_around_both(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return torch.tanh(gate) * (causal_attention(q, k, v) + prompt_attention(q, prompt_k, prompt_v))


@wrong(
    "gated_prefix_attention",
    "Your gate multiplies the scores, in front of the softmax. A shut gate then makes all of the prompt's weights "
    "equal, and not zero.",
)
def gate_on_the_scores(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return causal_attention(q, k, v) + prompt_attention(torch.tanh(gate) * q, prompt_k, prompt_v)


@wrong(
    "gated_prefix_attention",
    "You use one gate for all heads. Each head has its own, and it must meet the heads' axis.",
)
def one_gate_for_all(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return causal_attention(q, k, v) + torch.tanh(gate[:, :1]) * prompt_attention(q, prompt_k, prompt_v)


@wrong("gated_prefix_attention", "The gate has no effect: the prompt's part is always added in full.")
def always_open(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return causal_attention(q, k, v) + prompt_attention(q, prompt_k, prompt_v)


@wrong(
    "gated_prefix_attention",
    "In yours the scores of the prompt are not divided by sqrt(hd), as those of the text are.",
)
def prompt_not_scaled(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return causal_attention(q, k, v) + torch.tanh(gate) * prompt_attention(q * q.shape[-1] ** 0.5, prompt_k, prompt_v)
