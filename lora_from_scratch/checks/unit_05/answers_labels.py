"""Unit 05, prompts, labels: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong

# --- prompt_labels -----------------------------------------------------------------------------------


@right("prompt_labels")
def by_putting_together(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return torch.hstack([labels.new_full((len(labels), num_virtual_tokens), -100), labels])


@right("prompt_labels")
def in_numpy(labels: Tensor, num_virtual_tokens: int) -> np.ndarray:
    return np.pad(labels.numpy(), ((0, 0), (num_virtual_tokens, 0)), constant_values=-100)


@right("prompt_labels")
def written_into_a_larger_one(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    rows, tokens = labels.shape
    longer = torch.full((rows, num_virtual_tokens + tokens), -100)
    longer[:, num_virtual_tokens:] = labels
    return longer


@right("prompt_labels")
def as_lists(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return torch.tensor([[-100] * num_virtual_tokens + row for row in labels.tolist()])


@wrong("prompt_labels", caught_by="changes its input")
def first_shifts_the_callers_labels(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    longer = F.pad(labels, (num_virtual_tokens, 0), value=-100)
    labels.fill_(-100)
    return longer


@wrong(
    "prompt_labels",
    "You mark the virtual positions with -1. The loss ignores another number, and -1 is no token at all.",
)
def padded_with_minus_one(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return F.pad(labels, (num_virtual_tokens, 0), value=-1)


@wrong(
    "prompt_labels",
    "Your labels are int32. The loss takes token ids in int64: keep the dtype of the labels that are given.",
)
def in_int32(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return F.pad(labels, (num_virtual_tokens, 0), value=-100).int()


@wrong(
    "prompt_labels",
    "Your virtual positions count in the loss: 0 is a token like any other, and the prompt would be trained to predict "
    "it.",
)
def padded_with_zero(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return F.pad(labels, (num_virtual_tokens, 0))


@wrong(
    "prompt_labels",
    "Labels are token ids: whole numbers (int64). A single -100.0 with a decimal point makes the whole tensor "
    "floating-point, and the loss does not accept that.",
)
def floating_point(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return torch.cat([torch.full((len(labels), num_virtual_tokens), -100.0), labels], dim=1)


@wrong(
    "prompt_labels", "The new labels come after the text's own. They have to come first, because the virtual tokens do."
)
def padded_behind(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return F.pad(labels, (0, num_virtual_tokens), value=-100)


@wrong(
    "prompt_labels",
    "One label too few: you allowed for the shift. The loss does the shifting; here every position has a label.",
)
def one_too_few(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return F.pad(labels, (num_virtual_tokens - 1, 0), value=-100)


@wrong("prompt_labels", "You shift the text's labels by one. The loss already shifts them.")
def shifted_as_well(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return F.pad(labels[:, 1:], (num_virtual_tokens, 1), value=-100)


@wrong(
    "prompt_labels",
    "You prepend whole rows. Every text has P more positions; the number of texts stays the same.",
)
def rows_instead_of_columns(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return F.pad(labels, (0, 0, num_virtual_tokens, 0), value=-100)


@wrong(
    "prompt_labels",
    "All of your labels are -100, so there is nothing left to learn from. The text's own labels stay as they are.",
)
def nothing_counts(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return torch.full((len(labels), num_virtual_tokens + labels.shape[1]), -100)


@wrong(
    "prompt_labels",
    "The labels are as long as before: you overwrite the first of them. There are now P more positions than before.",
)
def overwritten(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    covered = labels.clone()
    covered[:, :num_virtual_tokens] = -100
    return covered


@wrong(
    "prompt_labels", "You repeat the first label of each text at the virtual positions, where it counts in the loss."
)
def the_first_label_repeated(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return torch.cat([labels[:, :1].expand(-1, num_virtual_tokens), labels], dim=1)
