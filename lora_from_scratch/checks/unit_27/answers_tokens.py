"""Unit 27: mistakes that people make, and other right ways. The log-probabilities of a text's tokens."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import torch
from torch.nn import functional as F

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.finetune.rewards import token_log_probabilities

# --- token_log_probabilities -------------------------------------------------------------------------


@right("token_log_probabilities")
def by_cross_entropy(logits, ids, begin, end):
    loss = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    place = torch.arange(ids.shape[1] - 1) + 1
    return -loss * ((place >= begin.unsqueeze(1)) & (place < end.unsqueeze(1)))


@right("token_log_probabilities")
def one_token_at_a_time(logits, ids, begin, end):
    rows, longest = ids.shape
    values = []
    for row in range(rows):
        for place in range(1, longest):
            if begin[row] <= place < end[row]:
                scores = logits[row, place - 1].float()
                values.append(scores[ids[row, place]] - torch.logsumexp(scores, dim=0))
            else:
                values.append(torch.zeros(()))
    return torch.stack(values).view(rows, longest - 1)


@right("token_log_probabilities")
def with_one_hot_vectors(logits, ids, begin, end):
    every = F.log_softmax(logits.float(), dim=-1)[:, :-1]
    hot = F.one_hot(ids[:, 1:], logits.shape[-1]).float()
    places = torch.arange(1, ids.shape[1]).expand(len(ids), -1)
    inside = (places < end[:, None]).float() - (places < begin[:, None]).float()
    return torch.einsum("ntv,ntv,nt->nt", every, hot, inside)


@right("token_log_probabilities")
def labels_that_are_ignored(logits, ids, begin, end):
    labels = ids.clone()
    for row, (first, last) in enumerate(zip(begin.tolist(), end.tolist())):
        labels[row, :first] = -100
        labels[row, last:] = -100
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none")
    return -flat.view(len(ids), -1)


@right("token_log_probabilities")
def each_row_is_padded(logits, ids, begin, end):
    rows = []
    for scores, row, first, last in zip(logits.float(), ids, begin.tolist(), end.tolist()):
        own = scores[first - 1 : last - 1].log_softmax(-1)[range(last - first), row[first:last]]
        rows.append(F.pad(own, (first - 1, len(row) - last)))
    return torch.stack(rows)


@wrong(
    "token_log_probabilities",
    "You read the log-probability of a token from the logits at its own place. They predict the next token.",
)
@changed(token_log_probabilities, ("logits[:, :-1]", "logits[:, 1:]"))
def not_shifted(): ...


@wrong("token_log_probabilities", "You shift the wrong way: the logits at place t predict the token at t + 1.")
def shifted_the_wrong_way(logits, ids, begin, end):
    every = logits.float().log_softmax(-1)[:, 1:]
    chosen = every.gather(-1, ids[:, :-1, None])[..., 0]
    place = torch.arange(1, ids.shape[1])
    return chosen.masked_fill((place < begin[:, None]) | (place >= end[:, None]), 0.0)


@wrong("token_log_probabilities", "The prompt was given, not chosen by the model. Its tokens do not count.")
@changed(token_log_probabilities, ("(place >= begin[:, None]) & (place < end[:, None])", "place < end[:, None]"))
def the_prompt_counts(): ...


@wrong("token_log_probabilities", "The padding after the end of a text counts in your result.")
@changed(token_log_probabilities, ("(place >= begin[:, None]) & (place < end[:, None])", "place >= begin[:, None]"))
def the_padding_counts(): ...


@wrong("token_log_probabilities", "The first token of each text is missing: the token at `begin` belongs to it.")
@changed(token_log_probabilities, ("place >= begin", "place > begin"))
def the_first_token_is_missing(): ...


@wrong("token_log_probabilities", "You count one token too many: `end` is the place after the last one.")
@changed(token_log_probabilities, ("place < end", "place <= end"))
def one_token_too_many(): ...


@wrong(
    "token_log_probabilities",
    "Your mask is a place late. Column 0 of the result is the token at place 1.",
)
@changed(token_log_probabilities, ("torch.arange(1, ids.shape[1]", "torch.arange(ids.shape[1] - 1"))
def the_mask_is_late(): ...


@wrong("token_log_probabilities", "You return logits. They become log-probabilities when they are normalised.")
@changed(token_log_probabilities, (".log_softmax(dim=-1)", ""))
def only_logits(): ...


@wrong("token_log_probabilities", "You return probabilities. Their logarithms are wanted.")
@changed(token_log_probabilities, (".log_softmax(dim=-1)", ".softmax(dim=-1)"))
def probabilities(): ...


@wrong(
    "token_log_probabilities", "You normalise along the texts' places. The probabilities of the vocabulary sum to 1."
)
@changed(token_log_probabilities, (".log_softmax(dim=-1)", ".log_softmax(dim=1)"))
def along_the_places(): ...


@wrong(
    "token_log_probabilities",
    "The logarithm of a probability that has become 0 is minus infinity. Log-softmax does not go through it.",
)
@changed(token_log_probabilities, (".log_softmax(dim=-1)", ".softmax(dim=-1).log()"))
def the_logarithm_of_softmax(): ...


@wrong("token_log_probabilities", "You compute in half precision, which has only two or three digits. Convert first.")
@changed(token_log_probabilities, (".float()", ""))
def in_half_precision(): ...


@wrong("token_log_probabilities", "You return the negative log-likelihood. The sign is the wrong one.")
@changed(token_log_probabilities, ("return chosen", "return -chosen"))
def the_negative(): ...


@wrong("token_log_probabilities", "No gradient flows through your result, so nothing could be learned from it.")
def without_a_gradient(logits, ids, begin, end):
    with torch.no_grad():
        return token_log_probabilities(logits, ids, begin, end)


@wrong("token_log_probabilities", "You sum over the tokens. What is wanted is each token by itself.")
def summed_over_the_text(logits, ids, begin, end):
    return token_log_probabilities(logits, ids, begin, end).sum(dim=1)


@wrong("token_log_probabilities", "You keep the log-probability of the most likely token, not of the one written.")
@changed(token_log_probabilities, ("every.gather(-1, ids[:, 1:, None]).squeeze(-1)", "every.amax(dim=-1)"))
def the_most_likely_token(): ...


@wrong("token_log_probabilities", "You use the first row's begin and end for all rows. Each text has its own.")
def the_first_row_s_mask(logits, ids, begin, end):
    return token_log_probabilities(logits, ids, begin[:1].expand_as(begin), end[:1].expand_as(end))
