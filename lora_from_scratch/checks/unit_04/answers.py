"""Unit 04, full fine-tuning, labels: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import itertools

import numpy as np
import torch

from lora_from_scratch.checks.bank import right, wrong

# --- completion_labels -------------------------------------------------------------------------------


@right("completion_labels")
def token_by_token(prompt_ids, completion_ids):
    ids, labels = [], []
    for token in prompt_ids:
        ids.append(token)
        labels.append(-100)
    for token in completion_ids:
        ids.append(token)
        labels.append(token)
    return ids, labels


@right("completion_labels")
def as_tensors(prompt_ids, completion_ids):
    ids = torch.tensor(list(prompt_ids) + list(completion_ids), dtype=torch.int64)
    labels = ids.clone()
    labels[: len(prompt_ids)] = -100
    return ids, labels


@right("completion_labels")
def with_arrays(prompt_ids, completion_ids):
    ids = np.array([*prompt_ids, *completion_ids], dtype=np.int64)
    return ids, np.where(np.arange(len(ids)) < len(prompt_ids), -100, ids)


@right("completion_labels")
def decided_by_the_place(prompt_ids, completion_ids):
    ids = list(itertools.chain(prompt_ids, completion_ids))
    return ids, [token if place >= len(prompt_ids) else -100 for place, token in enumerate(ids)]


@wrong(
    "completion_labels",
    "Your labels include the prompt: the model would be trained to write cards, which it is always given.",
)
def prompt_counts(prompt_ids, completion_ids):
    ids = [*prompt_ids, *completion_ids]
    return ids, list(ids)


@wrong(
    "completion_labels",
    "Your labels are shifted. The loss shifts as well, so each position would have to predict the token after the "
    "next.",
)
def shifted_already(prompt_ids, completion_ids):
    labels = [-100] * len(prompt_ids) + list(completion_ids)
    return [*prompt_ids, *completion_ids], [*labels[1:], -100]


@wrong(
    "completion_labels",
    "Your labels are shifted to the right: each position would be compared with the token that it has just read.",
)
def shifted_to_the_right(prompt_ids, completion_ids):
    labels = [-100] * len(prompt_ids) + list(completion_ids)
    return [*prompt_ids, *completion_ids], [-100, *labels[:-1]]


@wrong(
    "completion_labels",
    "You mark the positions that do not count with 0. 0 is a token like any other, so they do count.",
)
def zeros_instead(prompt_ids, completion_ids):
    return [*prompt_ids, *completion_ids], [0] * len(prompt_ids) + list(completion_ids)


@wrong("completion_labels", "You mark the positions that do not count with -1; the loss ignores a different number.")
def minus_one_instead(prompt_ids, completion_ids):
    return [*prompt_ids, *completion_ids], [-1] * len(prompt_ids) + list(completion_ids)


@wrong(
    "completion_labels",
    "The end-of-text token does not count in your labels, so the model never learns to stop.",
)
def never_stops(prompt_ids, completion_ids):
    return [*prompt_ids, *completion_ids], [-100] * len(prompt_ids) + list(completion_ids[:-1]) + [-100]


@wrong(
    "completion_labels",
    "One label too many is -100: the first token of the completion has to be predicted too, from the last token of "
    "the prompt.",
)
def first_token_missing(prompt_ids, completion_ids):
    return [*prompt_ids, *completion_ids], [-100] * (len(prompt_ids) + 1) + list(completion_ids[1:])


@wrong(
    "completion_labels",
    "The last token of the prompt counts in your labels. Its position does make a prediction, but a label is the "
    "token that is predicted, and that one is never predicted here.",
)
def last_of_the_prompt_counts(prompt_ids, completion_ids):
    labels = [-100] * len(prompt_ids) + list(completion_ids)
    if prompt_ids:
        labels[len(prompt_ids) - 1] = prompt_ids[-1]
    return [*prompt_ids, *completion_ids], labels


@wrong(
    "completion_labels",
    "You decide by the token whether it counts. A completion may contain tokens of the prompt, and there they do "
    "count: decide by position.",
)
def by_value(prompt_ids, completion_ids):
    ids = [*prompt_ids, *completion_ids]
    return ids, [-100 if token in prompt_ids else token for token in ids]


@wrong(
    "completion_labels",
    "You have it the wrong way round: the prompt counts in your labels, and the completion does not.",
)
def the_wrong_half(prompt_ids, completion_ids):
    return [*prompt_ids, *completion_ids], list(prompt_ids) + [-100] * len(completion_ids)


@wrong(
    "completion_labels",
    "Inputs and labels must have the same length, with one label for each position, including those of the prompt.",
)
def labels_of_the_completion(prompt_ids, completion_ids):
    return [*prompt_ids, *completion_ids], list(completion_ids)


@wrong("completion_labels", "The tokens of the prompt are missing from the inputs: the model would never see the card.")
def without_the_prompt(prompt_ids, completion_ids):
    return list(completion_ids), list(completion_ids)


@wrong("completion_labels", "The completion comes before the prompt. The prompt has to come first.")
def the_other_order(prompt_ids, completion_ids):
    return [*completion_ids, *prompt_ids], list(completion_ids) + [-100] * len(prompt_ids)


@wrong("completion_labels", "You also mask the prompt in the inputs. It must be masked in the labels only.")
def prompt_hidden(prompt_ids, completion_ids):
    labels = [-100] * len(prompt_ids) + list(completion_ids)
    return labels, list(labels)


@wrong("completion_labels", caught_by="changes its input")
def extends_the_prompt(prompt_ids, completion_ids):
    labels = [-100] * len(prompt_ids) + list(completion_ids)
    prompt_ids += completion_ids
    return prompt_ids, labels
