"""Unit 06, attention with a gate: common mistakes, and alternative right answers."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.gpt2.model import causal_attention
from lora_from_scratch.methods.llama_adapter import gated_prefix_attention, prompt_attention
from lora_from_scratch.methods.prefix_tuning import prefix_attention

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
    "You use the gate as it is, without bounds. It goes through a tanh first, so that its size is at most 1.",
)
def without_the_tanh(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return causal_attention(q, k, v) + gate * prompt_attention(q, prompt_k, prompt_v)


@wrong(
    "gated_prefix_attention",
    "Your gate is a sigmoid: at zero it is half open, so the model does not start out unchanged.",
)
def with_a_sigmoid(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return causal_attention(q, k, v) + torch.sigmoid(gate) * prompt_attention(q, prompt_k, prompt_v)


@wrong(
    "gated_prefix_attention",
    "You form a weighted mean: what the prompt gains, the text loses. Here the text's part stays as it is, and the "
    "prompt's is added to it.",
)
def a_mixture(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    share = torch.tanh(gate)
    return (1 - share) * causal_attention(q, k, v) + share * prompt_attention(q, prompt_k, prompt_v)


@wrong(
    "gated_prefix_attention",
    "Prompt and text share one softmax in your answer, so the prompt takes attention from the text even while its "
    "gate is zero. Each needs a softmax of its own.",
)
def one_softmax(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return prefix_attention(q, k, v, prompt_k, torch.tanh(gate) * prompt_v)


@wrong(
    "gated_prefix_attention",
    "Your gate multiplies everything. While it is zero the result is zero, including the text's part.",
)
def gate_around_both(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return torch.tanh(gate) * (causal_attention(q, k, v) + prompt_attention(q, prompt_k, prompt_v))


@wrong(
    "gated_prefix_attention",
    "Your gate multiplies the scores, before the softmax. A gate of zero then makes all of the prompt's weights "
    "equal, not zero.",
)
def gate_on_the_scores(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return causal_attention(q, k, v) + prompt_attention(torch.tanh(gate) * q, prompt_k, prompt_v)


@wrong(
    "gated_prefix_attention",
    "You use one gate for all heads. Each head has its own, so the gate has to be aligned with the axis of the heads.",
)
def one_gate_for_all(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return causal_attention(q, k, v) + torch.tanh(gate[:, :1]) * prompt_attention(q, prompt_k, prompt_v)


@wrong("gated_prefix_attention", "The gate has no effect: the prompt's part is always added in full.")
def always_open(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return causal_attention(q, k, v) + prompt_attention(q, prompt_k, prompt_v)


@wrong(
    "gated_prefix_attention",
    "You do not divide the scores of the prompt by sqrt(hd), as you do those of the text.",
)
def prompt_not_scaled(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return causal_attention(q, k, v) + torch.tanh(gate) * prompt_attention(q * q.shape[-1] ** 0.5, prompt_k, prompt_v)


@right("gated_prefix_attention")
def with_einsum_and_a_mask(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    def part(keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        scores = torch.einsum("bhtd,bhsd->bhts", q, keys.expand(len(q), -1, -1, -1)) * q.shape[-1] ** -0.5
        return (scores + mask).softmax(dim=-1) @ values

    tokens = q.shape[2]
    future = q.new_full((tokens, tokens), float("-inf")).triu(1)
    opened = (torch.exp(2 * gate) - 1) / (torch.exp(2 * gate) + 1)
    return part(k, v, future) + opened * part(prompt_k, prompt_v, q.new_zeros(()))


@wrong("gated_prefix_attention", "You subtract the prompt's part. It is added to the attention to the text.")
@changed(gated_prefix_attention, (") + torch.tanh", ") - torch.tanh"))
def subtracted(): ...


@wrong("gated_prefix_attention", "The keys and the values of the prompt are swapped.")
@changed(gated_prefix_attention, ("prompt_attention(q, prompt_k, prompt_v)", "prompt_attention(q, prompt_v, prompt_k)"))
def prompt_swapped(): ...


@wrong("gated_prefix_attention", "The prompt's part is missing: your result does not depend on it.")
@changed(gated_prefix_attention, (" + torch.tanh(gate) * prompt_attention(q, prompt_k, prompt_v)", ""))
def no_prompt(): ...


@wrong("gated_prefix_attention", "The text's part is missing: your result does not depend on k and v.")
@changed(gated_prefix_attention, ("causal_attention(q, k, v) + ", ""))
def no_text(): ...


@wrong("gated_prefix_attention", "The values are right, but no gradient reaches the gate and the prompt.")
@changed(
    gated_prefix_attention,
    (
        "torch.tanh(gate) * prompt_attention(q, prompt_k, prompt_v)",
        "(torch.tanh(gate) * prompt_attention(q, prompt_k, prompt_v)).detach()",
    ),
)
def nothing_learned(): ...


@wrong(
    "gated_prefix_attention",
    "The attention to the text has no mask in your answer: its tokens see the text that comes after them.",
)
def text_sees_the_future(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return prompt_attention(q, k, v) + torch.tanh(gate) * prompt_attention(q, prompt_k, prompt_v)


@wrong(
    "gated_prefix_attention",
    "You hide part of the prompt by a causal mask. Every token sees the whole prompt.",
)
def prompt_with_a_mask(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    scores = q @ prompt_k.mT / q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return causal_attention(q, k, v) + torch.tanh(gate) * (weights @ prompt_v)


@wrong(
    "gated_prefix_attention",
    "Every text gets the prompt of the first one. If there are as many prompts as texts, each text has its own.",
)
def the_first_prompt_for_all(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor
) -> Tensor:
    return gated_prefix_attention(q, k, v, prompt_k[:1], prompt_v[:1], gate)


@wrong("gated_prefix_attention", caught_by="dtype")
def gated_in_float32(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    return gated_prefix_attention(*(x.float() for x in (q, k, v, prompt_k, prompt_v, gate)))
