"""Unit 27: mistakes that people make, and other right ways. The loss, and the divergence from the base."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.finetune.rewards import policy_gradient_loss, sampled_divergence

# --- policy_gradient_loss ----------------------------------------------------------------------------


@right("policy_gradient_loss")
def one_text_at_a_time(log_probabilities, advantages, lengths, divisor=None):
    total = 0.0
    for row, advantage, length in zip(log_probabilities, advantages.tolist(), lengths.tolist()):
        if length:
            total = total - advantage * row.sum() / (divisor or length)
    return total / len(lengths)


@right("policy_gradient_loss")
def as_one_product(log_probabilities, advantages, lengths, divisor=None):
    with torch.no_grad():
        below = lengths.clamp(min=1) if divisor is None else torch.full_like(lengths, divisor)
        weights = advantages / (below * len(lengths))
    return -(weights @ log_probabilities).sum()


@right("policy_gradient_loss")
def token_by_token(log_probabilities, advantages, lengths, divisor=None):
    below = lengths if divisor is None else torch.full_like(lengths, divisor)
    each = log_probabilities / below.masked_fill(below == 0, 1)[:, None]
    return (each * -advantages.detach()[:, None]).sum() / log_probabilities.shape[0]


@right("policy_gradient_loss")
def by_einsum(log_probabilities, advantages, lengths, divisor=None):
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0) if divisor is None else torch.ones(len(lengths)) / divisor
    return torch.einsum("nt,n,n->n", log_probabilities, advantages.data, inverse).mean().neg()


@right("policy_gradient_loss")
def through_a_ratio_of_one(log_probabilities, advantages, lengths, divisor=None):
    ratio = (log_probabilities - log_probabilities.detach()).exp() - 1 + log_probabilities.detach()
    below = divisor or lengths.clamp(min=1)
    return -(ratio.sum(1) * advantages.detach() / below).mean()


@wrong("policy_gradient_loss", "The sign is the wrong one: minimising your loss makes the rewarded texts less likely.")
@changed(policy_gradient_loss, ("return -(", "return ("))
def the_wrong_sign(): ...


@wrong("policy_gradient_loss", "A gradient flows into the advantages. They are constants: detach them.")
@changed(policy_gradient_loss, (".detach()", ""))
def advantages_with_a_gradient(): ...


@wrong("policy_gradient_loss", "You detach the log-probabilities: no gradient is left that could change the model.")
def nothing_to_learn(log_probabilities, advantages, lengths, divisor=None):
    return policy_gradient_loss(log_probabilities.detach(), advantages, lengths, divisor)


@wrong("policy_gradient_loss", "You do not divide by the length of a text.")
@changed(policy_gradient_loss, ("lengths.clamp(min=1) if divisor is None", "1 if divisor is None"))
def summed_over_the_tokens(): ...


@wrong("policy_gradient_loss", "You ignore `divisor`, and always divide by the text's own length.")
@changed(policy_gradient_loss, ("if divisor is None else divisor", "if divisor is None else lengths.clamp(min=1)"))
def the_divisor_is_ignored(): ...


@wrong("policy_gradient_loss", "With a divisor you divide by the length as well. It takes the place of the length.")
@changed(policy_gradient_loss, ("else divisor", "else divisor * lengths.clamp(min=1)"))
def divided_twice(): ...


@wrong(
    "policy_gradient_loss", "You divide by the width of the tensor, padding included. A text's length is in `lengths`."
)
@changed(policy_gradient_loss, ("lengths.clamp(min=1) if divisor", "log_probabilities.shape[1] if divisor"))
def padding_counts(): ...


@wrong("policy_gradient_loss", "An empty text gives you 0 / 0. Its part of the loss is 0.")
@changed(policy_gradient_loss, (".clamp(min=1)", ""))
def an_empty_text_is_not_a_number(): ...


@wrong("policy_gradient_loss", "You sum over the texts. The loss is their mean.")
@changed(policy_gradient_loss, (".mean()", ".sum()"))
def the_sum_over_texts(): ...


@wrong("policy_gradient_loss", "You leave empty texts out of the mean. They count with the value 0.")
def empty_texts_do_not_count(log_probabilities, advantages, lengths, divisor=None):
    kept = lengths > 0
    return policy_gradient_loss(log_probabilities[kept], advantages[kept], lengths[kept], divisor)


@wrong("policy_gradient_loss", "You use probabilities. The loss is made of their logarithms.")
def of_probabilities(log_probabilities, advantages, lengths, divisor=None):
    written = log_probabilities != 0
    return policy_gradient_loss(log_probabilities.exp() * written, advantages, lengths, divisor)


@wrong("policy_gradient_loss", "You return one value per text. The loss is one number, their mean.")
@changed(policy_gradient_loss, (".mean()", ""))
def one_value_per_text(): ...


@wrong("policy_gradient_loss", "You use only texts with positive advantages. The others should become less likely.")
@changed(policy_gradient_loss, ("advantages.detach()", "advantages.detach().clamp(min=0)"))
def only_the_good_ones(): ...


@wrong(
    "policy_gradient_loss",
    "You average over all tokens of the batch, so that a long text weighs more than a short one.",
)
def the_mean_over_all_tokens(log_probabilities, advantages, lengths, divisor=None):
    below = lengths.sum() if divisor is None else divisor * len(lengths)
    return -(advantages.detach() * log_probabilities.sum(dim=1)).sum() / below


# --- sampled_divergence ------------------------------------------------------------------------------


@right("sampled_divergence")
def token_after_token(log_probabilities, base_log_probabilities, lengths):
    total = torch.zeros(())
    for own, base in zip(log_probabilities.flatten(), base_log_probabilities.flatten()):
        ratio = torch.exp(base) / torch.exp(own)
        total = total + ratio - 1 - torch.log(ratio)
    return total / lengths.sum()


@right("sampled_divergence")
def with_expm1(log_probabilities, base_log_probabilities, lengths):
    difference = base_log_probabilities - log_probabilities
    return torch.sum(torch.expm1(difference) - difference) / torch.sum(lengths)


@right("sampled_divergence")
def means_of_the_texts_weighted(log_probabilities, base_log_probabilities, lengths):
    d = (base_log_probabilities - log_probabilities).double()
    means = (d.exp() - 1 - d).sum(1) / lengths.clamp(min=1)
    return ((means * lengths).sum() / lengths.sum()).float()


@right("sampled_divergence")
def three_sums(log_probabilities, base_log_probabilities, lengths):
    log_ratio = base_log_probabilities - log_probabilities
    places = log_ratio.numel()
    return (log_ratio.exp().sum() - places - log_ratio.sum()) / lengths.sum()


@wrong(
    "sampled_divergence",
    "You take the mean of ln(p / base). Its expectation is right, but a single token makes it negative.",
)
@changed(sampled_divergence, ("log_ratio.exp() - 1 - log_ratio", "-log_ratio"))
def the_mean_of_the_logarithm(): ...


@wrong("sampled_divergence", "You have p and base the wrong way round in the ratio: it is base / p.")
@changed(
    sampled_divergence, ("base_log_probabilities - log_probabilities", "log_probabilities - base_log_probabilities")
)
def the_inverse_ratio(): ...


@wrong("sampled_divergence", "You take half of the squared logarithm. That is close to k3 only for small differences.")
@changed(sampled_divergence, ("log_ratio.exp() - 1 - log_ratio", "log_ratio**2 / 2"))
def half_the_square(): ...


@wrong("sampled_divergence", "You average over all places, padding included. The number of tokens is in `lengths`.")
@changed(sampled_divergence, ("k3.sum() / lengths.sum()", "k3.mean()"))
def the_mean_with_padding(): ...


@wrong(
    "sampled_divergence", "You average per text first, so that a token of a short text counts more than one of a long."
)
@changed(sampled_divergence, ("k3.sum() / lengths.sum()", "(k3.sum(dim=1) / lengths.clamp(min=1)).mean()"))
def texts_count_equally(): ...


@wrong("sampled_divergence", "You divide by the number of texts. The result is per token.")
@changed(sampled_divergence, ("lengths.sum()", "len(lengths)"))
def per_text(): ...


@wrong("sampled_divergence", "You return the sum over the tokens. The result is their mean.")
@changed(sampled_divergence, (" / lengths.sum()", ""))
def the_sum(): ...


@wrong("sampled_divergence", "The - 1 is missing in k3. Without it two equal models have a divergence of 1.")
@changed(sampled_divergence, (".exp() - 1 - log_ratio", ".exp() - log_ratio"))
def without_minus_one(): ...


@wrong("sampled_divergence", "The logarithm is added in your k3. It is subtracted.")
@changed(sampled_divergence, ("- 1 - log_ratio", "- 1 + log_ratio"))
def the_logarithm_is_added(): ...


@wrong("sampled_divergence", "The inputs are logarithms already. You take their exponential only where p is needed.")
@changed(
    sampled_divergence,
    ("base_log_probabilities - log_probabilities", "base_log_probabilities.exp() - log_probabilities.exp()"),
)
def a_difference_of_probabilities(): ...


@wrong("sampled_divergence", "You weight each token by its probability. It was sampled by p, which does that already.")
@changed(sampled_divergence, ("k3.sum()", "(log_probabilities.exp() * k3).sum()"))
def weighted_by_p(): ...


@wrong("sampled_divergence", "You compute k3 once, of the sum over a text. It is computed for each token.")
@changed(
    sampled_divergence,
    ("base_log_probabilities - log_probabilities", "(base_log_probabilities - log_probabilities).sum(1)"),
)
def once_per_text(): ...


@wrong("sampled_divergence", "You return one number per text. It is one number for all.")
@changed(sampled_divergence, ("k3.sum() / lengths.sum()", "k3.sum(dim=1) / lengths.sum()"))
def one_number_per_text(): ...
