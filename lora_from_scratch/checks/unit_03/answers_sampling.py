"""Unit 03, GPT-2, sampling: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.gpt2.generation import filter_top_k, filter_top_p, sample_next_token

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


@right("filter_top_p")
def each_token_against_all_others(logits: Tensor, p: float) -> Tensor:
    _check_p(p)
    if p == 1:
        return logits + 0
    probability, place = logits.softmax(-1), torch.arange(logits.shape[-1])
    larger = logits[..., None, :] > logits[..., :, None]  # (..., V, V): column s before row t
    tied = (logits[..., None, :] == logits[..., :, None]) & (place[None, :] < place[:, None])
    before = ((larger | tied) * probability[..., None, :]).sum(-1)
    return torch.where(before < p, logits, -math.inf)


@right("filter_top_p")
def the_length_of_the_shortest_sum(logits: Tensor, p: float) -> Tensor:
    _check_p(p)
    if p == 1:
        return logits.clone()
    out = torch.full_like(logits, -math.inf)
    for row, kept in zip(logits.flatten(0, -2) if logits.ndim > 1 else [logits], out.view(-1, out.shape[-1])):
        ordered = row.softmax(-1).sort(descending=True)
        count = int(torch.searchsorted(ordered.values.cumsum(-1), p)) + 1
        kept[ordered.indices[:count]] = row[ordered.indices[:count]]
    return out


@wrong(
    "filter_top_p",
    "Among equally likely tokens you keep too many: you compare logits with that of the last token that is kept, and "
    "all equal ones pass. The set should be as small as possible: decide by the place in the sorted order.",
)
def all_of_equal_logits(logits: Tensor, p: float) -> Tensor:
    return logits.masked_fill(
        logits
        < filter_top_p(logits, p).masked_fill(filter_top_p(logits, p) == -math.inf, math.inf).amin(-1, keepdim=True),
        -math.inf,
    )


@wrong(
    "filter_top_p",
    "At p = 1 you return the caller's own tensor. Whoever writes into the result changes the logits as well: return a "
    "copy.",
)
@changed(filter_top_p, ("return logits.clone()", "return logits"))
def the_callers_tensor_at_p_1() -> None: ...


@wrong(
    "filter_top_p",
    "p = 1 should keep everything, but in floating point the probabilities before an unlikely token can already sum "
    "to 1, and you drop it. Handle p = 1 by itself.",
)
@changed(filter_top_p, ("    if p == 1:\n        return logits.clone()\n", ""))
def tokens_lost_to_rounding_at_p_1() -> None: ...


@wrong(
    "filter_top_p",
    "With several rows you treat all of their logits as one row. Each row has its own softmax and its own set.",
)
def all_rows_as_one(logits: Tensor, p: float) -> Tensor:
    return filter_top_p(logits.flatten(), p).view(logits.shape)


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


@right("sample_next_token")
def a_race_of_exponential_times(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    _checked(temperature)
    if temperature == 0:
        return int(logits.sort(descending=True).indices[0])
    probability = _filtered(logits / temperature, top_k, top_p).softmax(-1)
    times = torch.empty_like(probability).exponential_(generator=generator)
    return int((probability / times).argmax())


@right("sample_next_token")
def numpys_choice_with_a_seed_from_the_generator(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    if temperature < 0:
        raise ValueError("the temperature is negative")
    if not temperature:
        return np.argmax(logits.numpy())
    left = _filtered(logits.div(temperature), top_k, top_p).double()
    seed = int(torch.randint(2**62, (), generator=generator))
    return np.random.default_rng(seed).choice(len(logits), p=F.softmax(left, dim=0).numpy())


@wrong(
    "sample_next_token",
    "A filter is left out when its argument is 0 in your code, because `if top_k:` treats 0 like None. Only None means "
    "no filter; 0 has to be refused, which the filters do.",
)
@changed(sample_next_token, ("if top_k is not None:", "if top_k:"), ("if top_p is not None:", "if top_p:"))
def zero_means_no_filter() -> None: ...


@wrong(
    "sample_next_token",
    "Without a generator you make a new one for each token. All new generators start in the same state, so the same "
    "number is drawn each time: pass None on to PyTorch.",
)
@changed(sample_next_token, ("1, generator=generator", "1, generator=generator or torch.Generator()"))
def a_new_generator_for_each_token() -> None: ...


@wrong(
    "sample_next_token",
    "You set the generator back to its seed before you draw, so each token is drawn with the same random number. "
    "Draw from the generator as it is.",
)
def the_generator_set_back(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    if generator is not None:
        generator.manual_seed(generator.initial_seed())
    return sample_next_token(logits, temperature, top_k, top_p, generator)


@wrong(
    "sample_next_token",
    "You return the probability of the token that was drawn. What is asked for is its id.",
)
def the_probability_of_the_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    token = sample_next_token(logits, temperature, top_k, top_p, generator)
    return float(logits.softmax(-1)[token])


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
