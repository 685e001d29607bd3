"""Unit 03, GPT-2, loss and sampling: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.gpt2.generation import filter_top_k, filter_top_p, sample_next_token
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


# --- filter_top_p ------------------------------------------------------------------------------------


def _check_p(p: float) -> None:
    if not 0 < p <= 1:
        raise ValueError("p")


def _dropping(logits: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the probabilities in descending order, drop those for which `drop` is True."""
    values, where = logits.sort(dim=-1, descending=True)
    dropped = drop(values.softmax(-1))
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, where, dropped), -math.inf)


@right("filter_top_p")
def from_the_unlikely_end(logits: Tensor, p: float) -> Tensor:
    _check_p(p)
    values, where = logits.sort(dim=-1)
    dropped = values.softmax(-1).cumsum(-1) <= 1 - p
    dropped[..., -1] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, where, dropped), -math.inf)


@right("filter_top_p")
def token_by_token_in_numpy(logits: Tensor, p: float) -> np.ndarray:
    _check_p(p)
    rows = logits.double().numpy().reshape(-1, logits.shape[-1])
    out = np.full_like(rows, -np.inf)
    for row, kept in zip(rows, out, strict=True):
        probability = np.exp(row - row.max())
        probability /= probability.sum()
        total = 0.0
        for token in np.argsort(-row):
            if total >= p:
                break
            kept[token] = row[token]
            total += probability[token]
    return out.reshape(logits.shape)


@wrong(
    "filter_top_p",
    "You keep one token too few: the one that reaches p is kept. If the most likely token alone reaches p, you leave "
    "nothing to draw from.",
)
def one_too_few(logits: Tensor, p: float) -> Tensor:
    _check_p(p)
    return logits.clone() if p == 1 else _dropping(logits, lambda probability: probability.cumsum(-1) > p)


@wrong(
    "filter_top_p",
    "You keep one token too few, except that you always keep the first: the token that reaches p is kept, whichever "
    "it is.",
)
def one_too_few_but_never_none(logits: Tensor, p: float) -> Tensor:
    _check_p(p)

    def drop(probability: Tensor) -> Tensor:
        dropped = probability.cumsum(-1) > p
        dropped[..., 0] = False
        return dropped

    return logits.clone() if p == 1 else _dropping(logits, drop)


@wrong(
    "filter_top_p",
    "You keep one token too many: if the tokens before it already reach p together, a token has to be dropped.",
)
def one_too_many(logits: Tensor, p: float) -> Tensor:
    _check_p(p)

    def drop(probability: Tensor) -> Tensor:
        return F.pad((probability.cumsum(-1) - probability >= p)[..., :-1], (1, 0))

    return _dropping(logits, drop)


@wrong(
    "filter_top_p", "You give dropped tokens a logit of 0, and 0 is a logit like any other: they can still be drawn."
)
def zero_for_minus_infinity(logits: Tensor, p: float) -> Tensor:
    return filter_top_p(logits, p).masked_fill(filter_top_p(logits, p) == -math.inf, 0.0)


@wrong(
    "filter_top_p",
    "You decide in the sorted order what to drop, but apply it to the tokens in their original order: map the "
    "decision back to each token's position.",
)
def dropped_where_the_sorted_ones_stood(logits: Tensor, p: float) -> Tensor:
    _check_p(p)
    probability = logits.sort(dim=-1, descending=True).values.softmax(-1)
    return logits.masked_fill(probability.cumsum(-1) - probability >= p, -math.inf)


@wrong("filter_top_p", "You return the logits sorted by size: it is no longer known which token is which.")
def returned_in_sorted_order(logits: Tensor, p: float) -> Tensor:
    return filter_top_p(logits, p).sort(dim=-1, descending=True).values


@wrong(
    "filter_top_p", "You sort the wrong way round: your filter starts from the least likely tokens, and keeps those."
)
def the_least_likely_first(logits: Tensor, p: float) -> Tensor:
    _check_p(p)
    values, where = logits.sort(dim=-1)
    probability = values.softmax(-1)
    dropped = probability.cumsum(-1) - probability >= p
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, where, dropped), -math.inf)


@wrong(
    "filter_top_p",
    "You keep the tokens whose own probability is at least p. It is the *sum* of the probabilities, from the most "
    "likely down, that is compared with p.",
)
def each_probability_against_p(logits: Tensor, p: float) -> Tensor:
    _check_p(p)
    return logits.clone() if p == 1 else logits.masked_fill(logits.softmax(-1) < p, -math.inf)


@wrong("filter_top_p", "You return probabilities. Logits come in and logits go out, so that filters can be chained.")
def probabilities_returned(logits: Tensor, p: float) -> Tensor:
    return filter_top_p(logits, p).softmax(dim=-1)


@wrong(
    "filter_top_p",
    "You accept a p outside its range. Raise a ValueError instead, with a message that gives the reason.",
)
def anything_is_accepted(logits: Tensor, p: float) -> Tensor:
    return _dropping(logits, lambda probability: probability.cumsum(-1) - probability >= p)


@wrong("filter_top_p", caught_by="changes its input")
def dropped_in_the_callers_tensor(logits: Tensor, p: float) -> Tensor:
    logits.copy_(filter_top_p(logits, p))
    return logits


# --- sample_next_token -------------------------------------------------------------------------------

Generator = torch.Generator | None


def _multinomial(logits: Tensor, generator: Generator) -> int:
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


def _filtered(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    logits = logits if top_k is None else filter_top_k(logits, top_k)
    return logits if top_p is None else filter_top_p(logits, top_p)


def _checked(temperature: float) -> None:
    if temperature < 0:
        raise ValueError("temperature")


@right("sample_next_token")
def the_first_whose_sum_passes_a_uniform_number(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    _checked(temperature)
    if temperature == 0:
        return logits.tolist().index(max(logits.tolist()))
    probability = _filtered(logits.double() / temperature, top_k, top_p).softmax(-1)
    uniform = torch.rand((), generator=generator, dtype=torch.float64)
    return int((probability.cumsum(-1) <= uniform).sum().clamp(max=len(logits) - 1))


@right("sample_next_token")
def the_largest_after_gumbel_noise(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    _checked(temperature)
    if temperature == 0:
        return logits.argmax()
    noise = -(-torch.rand(len(logits), generator=generator).clamp(min=1e-30).log()).log()
    return (_filtered(logits / temperature, top_k, top_p) + noise).argmax()


@wrong(
    "sample_next_token",
    "You multiply by the temperature: a low temperature should make likely tokens even more likely.",
)
def multiplied_by_temperature(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    _checked(temperature)
    if temperature == 0:
        return int(logits.argmax())
    return _multinomial(_filtered(logits * temperature, top_k, top_p), generator)


@wrong("sample_next_token", "The temperature has no effect in your code, except for 0.")
def no_temperature(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    _checked(temperature)
    if temperature == 0:
        return int(logits.argmax())
    return _multinomial(_filtered(logits, top_k, top_p), generator)


@wrong(
    "sample_next_token",
    "You filter before applying the temperature. Top-p adds up the probabilities after it has been applied.",
)
def filtered_before_the_temperature(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    _checked(temperature)
    if temperature == 0:
        return int(logits.argmax())
    return _multinomial(_filtered(logits, top_k, top_p) / temperature, generator)


@wrong("sample_next_token", "You always take the most likely token: nothing is sampled.")
def always_the_likeliest(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    _checked(temperature)
    return int(logits.argmax())


@wrong(
    "sample_next_token", "Your filters are in the wrong order: top-k comes first, and top-p works on what it leaves."
)
def p_before_k(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    if top_p is not None and temperature > 0:
        logits = filter_top_p(logits / temperature, top_p) * temperature
    return sample_next_token(logits, temperature, top_k, None, generator)


@wrong("sample_next_token", "Your code leaves top-p out.")
def top_p_forgotten(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    return sample_next_token(logits, temperature, top_k, None, generator)


@wrong("sample_next_token", "Your code leaves top-k out.")
def top_k_forgotten(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    return sample_next_token(logits, temperature, None, top_p, generator)


@wrong(
    "sample_next_token",
    "You draw all tokens that the filters leave with equal probability. Likely ones should come up more often.",
)
def all_that_are_left_alike(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    _checked(temperature)
    if temperature == 0:
        return int(logits.argmax())
    kept = _filtered(logits / temperature, top_k, top_p) > -math.inf
    return int(torch.multinomial(kept.float(), 1, generator=generator))


@wrong(
    "sample_next_token",
    "Your draw does not use the generator: its results cannot be reproduced, and the same seed gives different texts.",
)
def another_source_of_randomness(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    return sample_next_token(logits, temperature, top_k, top_p, None)


@wrong("sample_next_token", "At temperature 0 you divide by 0. Take the most likely token in that case.")
def divided_by_zero(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    _checked(temperature)
    return _multinomial(_filtered(logits / temperature, top_k, top_p), generator)


@wrong("sample_next_token", "You accept a temperature below 0: it would make the least likely token the most likely.")
def a_temperature_below_zero_is_accepted(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    if temperature == 0:
        return int(logits.argmax())
    return _multinomial(_filtered(logits / temperature, top_k, top_p), generator)
