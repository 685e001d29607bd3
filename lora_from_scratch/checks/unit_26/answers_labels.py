"""Unit 26: mistakes that people make, and other right ways. The labels of chats."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import re

import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.finetune.chats import assistant_labels

# --- assistant_labels --------------------------------------------------------------------------------


@right("assistant_labels")
def from_reply_to_reply(input_ids, attention_mask, opening, end_id):
    labels = torch.full(input_ids.shape, -100)
    n = len(opening)
    for row in range(len(input_ids)):
        ids = input_ids[row][attention_mask[row] == 1].tolist()
        place = 0
        while place + n <= len(ids):
            if ids[place : place + n] != list(opening):
                place += 1
                continue
            place += n
            rest = ids[place:]
            length = rest.index(end_id) + 1 if end_id in rest else len(rest)
            labels[row, place : place + length] = input_ids[row, place : place + length]
            place += length
    return labels


@right("assistant_labels")
def with_a_mask(input_ids, attention_mask, opening, end_id):
    reply = torch.zeros_like(input_ids, dtype=torch.bool)
    wanted = torch.tensor(opening)
    for row, ids in enumerate(input_ids):
        on = False
        for place in range(int(attention_mask[row].sum())):
            reply[row, place] = on
            if on and ids[place] == end_id:
                on = False
            elif not on and place + 1 >= len(wanted):
                on = torch.equal(ids[place + 1 - len(wanted) : place + 1], wanted)
    return input_ids.masked_fill(~reply, -100)


@right("assistant_labels")
def with_windows(input_ids, attention_mask, opening, end_id):
    n, (rows, length) = len(opening), input_ids.shape
    labels = torch.where(attention_mask.bool(), input_ids, -100)
    starts = torch.zeros(rows, length + 1, dtype=torch.bool)
    if length >= n:
        starts[:, n:] = (input_ids.unfold(1, n, 1) == torch.tensor(opening)).all(dim=2)
    ends = input_ids == end_id
    on = torch.zeros(rows, dtype=torch.bool)
    for place in range(length):
        on = on | starts[:, place]
        labels[~on, place] = -100
        on = on & ~ends[:, place]
    return labels


@right("assistant_labels")
def as_text(input_ids, attention_mask, opening, end_id):
    labels = []
    for row, mask in zip(input_ids.tolist(), attention_mask.tolist()):
        ids = row[: sum(mask)]
        text = "".join(map(chr, ids))
        pattern = re.escape("".join(map(chr, opening))) + f"([^{re.escape(chr(end_id))}]*{re.escape(chr(end_id))}?)"
        made = [-100] * len(row)
        for found in re.finditer(pattern, text, re.DOTALL):
            made[found.start(1) : found.end(1)] = ids[found.start(1) : found.end(1)]
        labels.append(made)
    return torch.tensor(labels)


@wrong(
    "assistant_labels",
    "The end of a reply is not learned, so that the model never learns to stop. It belongs to the reply.",
)
@changed(
    assistant_labels,
    (
        "labels[row, place] = token\n                inside = token != end_id",
        "inside = token != end_id\n                labels[row, place] = token if inside else -100",
    ),
)
def without_the_end(): ...


@wrong(
    "assistant_labels",
    "You take every token with the padding's id for padding. In SmolLM2 it is the id of the end, which is then never "
    "learned: look at `attention_mask`.",
)
def every_end_is_padding(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    for row, mask in enumerate(attention_mask):
        if int(mask.sum()) < len(mask):
            labels[row, input_ids[row] == input_ids[row, -1]] = -100
    return labels


@wrong("assistant_labels", "You do not look at the mask: the padding after a reply that was cut off is learned.")
def without_the_mask(input_ids, attention_mask, opening, end_id):
    return assistant_labels(input_ids, torch.ones_like(input_ids), opening, end_id)


@wrong("assistant_labels", "You label whole turns: the opening is written by the template, not by the model.")
def with_the_opening(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    n = len(opening)
    for row in range(len(labels)):
        for place in range(n, labels.shape[1]):
            if labels[row, place] != -100 and labels[row, place - 1] == -100:
                labels[row, place - n : place] = input_ids[row, place - n : place]
    return labels


@wrong("assistant_labels", "You label everything after the first opening, the later questions too.")
@changed(assistant_labels, ("inside = token != end_id", "inside = True"))
def everything_after_the_first_opening(): ...


@wrong("assistant_labels", "Only the last reply of a row is learned. All of its replies are.")
def only_the_last_reply(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    for row in labels:
        replies = [p for p in range(1, len(row)) if row[p] != -100 and row[p - 1] == -100]
        if replies:
            row[: replies[-1]] = -100
    return labels


@wrong("assistant_labels", "Only the first reply of a row is learned. All of its replies are.")
def only_the_first_reply(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    for row in labels:
        replies = [p for p in range(1, len(row)) if row[p] != -100 and row[p - 1] == -100]
        if len(replies) > 1:
            row[replies[1] :] = -100
    return labels


@wrong("assistant_labels", "You learn the questions as well: every turn counts in your labels.")
def all_turns(input_ids, attention_mask, opening, end_id):
    return torch.where(attention_mask.bool(), input_ids, -100)


@wrong("assistant_labels", "A reply without an end is not labelled at all. It counts up to the end of the row.")
def only_whole_replies(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    for row in labels:
        learned = (row != -100).nonzero().flatten().tolist()
        if learned and row[learned[-1]] != end_id:
            place = learned[-1]
            while place >= 0 and row[place] != -100:
                row[place] = -100
                place -= 1
    return labels


@wrong("assistant_labels", "Your labels are shifted by one place. The loss shifts them; a label stands at its token.")
def shifted(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)


@wrong("assistant_labels", "The first token of each reply is missing from your labels.")
def without_the_first_token(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    before = torch.cat([torch.full_like(labels[:, :1], -100), labels[:, :-1]], dim=1)
    return torch.where(before == -100, -100, labels)


@wrong("assistant_labels", "You look only for the first token of the opening. It begins the turns of others too.")
@changed(
    assistant_labels,
    ("inside = ids[max(0, place + 1 - len(opening)) : place + 1] == opening", "inside = token == opening[0]"),
)
def the_first_token_of_the_opening(): ...


@wrong("assistant_labels", "You look only for the last token of the opening, which may occur elsewhere.")
@changed(
    assistant_labels,
    ("inside = ids[max(0, place + 1 - len(opening)) : place + 1] == opening", "inside = token == opening[-1]"),
)
def the_last_token_of_the_opening(): ...


@wrong("assistant_labels", "You look for two tokens of the opening at most. It may have any number of tokens.")
@changed(
    assistant_labels,
    (
        "inside = ids[max(0, place + 1 - len(opening)) : place + 1] == opening",
        "inside = ids[max(0, place - 2) : max(0, place - 2) + 2] == opening[:2]",
    ),
)
def two_tokens_of_the_opening(): ...


@wrong("assistant_labels", "What is not learned has to be -100, which the loss ignores. 0 is the id of a token.")
def zero_instead(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    return torch.where(labels == -100, 0, labels)


@wrong("assistant_labels", caught_by="changes its input")
def in_place(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    input_ids.copy_(labels)
    return input_ids
