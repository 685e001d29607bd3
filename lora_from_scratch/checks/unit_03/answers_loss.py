"""Unit 03, GPT-2, the loss: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.gpt2.model import next_token_loss

# --- next_token_loss ---------------------------------------------------------------------------------


@right("next_token_loss")
def logarithms_gathered(logits: Tensor, labels: Tensor) -> Tensor:
    logp = logits.double().log_softmax(-1)[:, :-1]
    targets = labels[:, 1:]
    counts = (targets >= 0).double()
    picked = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -(picked * counts).sum() / max(float(counts.sum()), 1.0)


@right("next_token_loss")
def flattened_with_pytorchs_ignore_index(logits: Tensor, labels: Tensor) -> Tensor:
    targets = labels[:, 1:].reshape(-1)
    if (targets == -100).all():
        return logits.sum() * 0
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), targets)


@right("next_token_loss")
def text_by_text(logits: Tensor, labels: Tensor) -> Tensor:
    total, number = 0 * logits.sum(), 0
    for text, label in zip(logits, labels, strict=True):
        for t in range(1, len(label)):
            if label[t] != -100:
                total = total + text[t - 1].logsumexp(0) - text[t - 1, label[t]]
                number += 1
    return total / max(number, 1)


@right("next_token_loss")
def ones_in_the_place_of_the_labels(logits: Tensor, labels: Tensor) -> Tensor:
    V, targets = logits.shape[-1], labels[:, 1:]
    ones = torch.eye(V + 1)[torch.where(targets == -100, V, targets)][..., :V]  # (B, T - 1, V), zeros where ignored
    surprise = -torch.einsum("btv,btv->", ones, F.log_softmax(logits[:, :-1], dim=-1))
    return surprise / ones.sum().clamp(min=1)


def _mean(logits: Tensor, targets: Tensor) -> Tensor:
    """The correct mean over positions that are already aligned."""
    padded = torch.cat([torch.zeros_like(targets[:, :1]), targets], dim=1)
    return next_token_loss(torch.cat([logits, logits[:, :1]], dim=1), padded)


@wrong(
    "next_token_loss",
    "Nothing is shifted: your loss asks every position for the token that it has just read. A model that repeats its "
    "input would be perfect.",
)
def not_shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return _mean(logits, labels)


@wrong(
    "next_token_loss",
    "The labels are shifted twice: your loss asks for the token after the next. One shift is enough, in one place.",
)
def shifted_twice(logits: Tensor, labels: Tensor) -> Tensor:
    return _mean(logits[:, :-2], labels[:, 2:])


@wrong(
    "next_token_loss",
    "The labels are shifted the wrong way: your loss asks every position for the token *before* it, which the model "
    "has already seen.",
)
def shifted_backwards(logits: Tensor, labels: Tensor) -> Tensor:
    return _mean(logits[:, 1:], labels[:, :-1])


@wrong(
    "next_token_loss",
    "Labels of -100 count in your loss, as if they were a token. Padding and prompts must not be learned.",
)
def padding_counts_as_token_0(logits: Tensor, labels: Tensor) -> Tensor:
    return _mean(logits[:, :-1], labels[:, 1:].clamp(min=0))


@wrong(
    "next_token_loss",
    "Labels of -100 are left out of the sum, but still counted in the denominator: a text with much padding gets a "
    "loss that is too small.",
)
def divided_by_every_position(logits: Tensor, labels: Tensor) -> Tensor:
    targets = labels[:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum") / targets.numel()


@wrong(
    "next_token_loss",
    "You divide by the number of all labels that count, including the first of each text. But nothing predicts the "
    "first token: it is not in the sum.",
)
def the_first_label_is_counted(logits: Tensor, labels: Tensor) -> Tensor:
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


@wrong("next_token_loss", "If no label counts, your loss is 0 divided by 0. It should be 0, with a gradient of zero.")
def nan_where_nothing_counts(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@wrong("next_token_loss", "This is the sum. The mean does not grow with the number of tokens in the batch.")
def the_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


@wrong(
    "next_token_loss",
    "You take the mean for each text, and then the mean of those: a label in a short text counts more than one in a "
    "long text. All labels that count must have the same weight.",
)
def a_mean_of_means(logits: Tensor, labels: Tensor) -> Tensor:
    rows = [next_token_loss(logits[row : row + 1], labels[row : row + 1]) for row in range(len(labels))]
    return torch.stack(rows).mean()


@wrong("next_token_loss", "Your loss is in bits, with a logarithm to base 2. In nats it is the natural logarithm.")
def in_bits(logits: Tensor, labels: Tensor) -> Tensor:
    return next_token_loss(logits, labels) / math.log(2)


@wrong("next_token_loss", "This is the perplexity, the exponential of the loss.")
def the_perplexity(logits: Tensor, labels: Tensor) -> Tensor:
    return next_token_loss(logits, labels).exp()


@wrong(
    "next_token_loss",
    "You leave out the labels that are 0 or less. Token 0 is a token like any other: only -100 is ignored.",
)
def token_0_is_ignored(logits: Tensor, labels: Tensor) -> Tensor:
    return next_token_loss(logits, torch.where(labels > 0, labels, -100))


@wrong(
    "next_token_loss",
    "You take the logarithm of a softmax. Where logits are large, probabilities are rounded to 0, and their logarithm "
    "is minus infinity: `log_softmax` and `F.cross_entropy` avoid that.",
)
def logarithm_of_the_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    targets = labels[:, 1:]
    counts = targets != -100
    picked = logits[:, :-1].softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -picked[counts].log().sum() / counts.sum().clamp(min=1)


@wrong(
    "next_token_loss",
    "`F.cross_entropy` expects logits and applies the softmax itself. You apply it twice.",
)
def softmax_twice(logits: Tensor, labels: Tensor) -> Tensor:
    return next_token_loss(logits.softmax(dim=-1), labels)


@wrong(
    "next_token_loss",
    "The number is right, but no gradient flows through it, so nothing could be trained: the loss has to stay a "
    "tensor (no `.item()`, `float()` or `.detach()`).",
)
def no_gradient(logits: Tensor, labels: Tensor) -> float:
    return next_token_loss(logits, labels).item()
