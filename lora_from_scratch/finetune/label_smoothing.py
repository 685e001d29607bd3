"""Label smoothing (Szegedy et al. 2016, arXiv:1512.00567, section 7) for the training loop in `training.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.finetune.training import Batch
from lora_from_scratch.gpt2.model import IGNORE_INDEX
from lora_from_scratch.support.wrapped import Wrapper


class LabelSmoothing(Wrapper):
    """A language model whose outputs make `next_token_loss` the loss with label smoothing.

    The smoothed loss of one token y with probabilities p over a vocabulary of V tokens is

        l = -(1 - smoothing) ln p_y - smoothing / V * sum_v ln p_v.

    `Trainer` computes `-ln softmax(logits)[label]`. So this module returns two logits for each position, whose softmax
    is exp(-l) and 1 - exp(-l), and the labels become class 0 (`labels_of`). The token that a position has to predict is
    the next one of `input_ids`, as it is in every batch of `Completions`.

    Args:
        inside: the language model.
        smoothing: above 0 and below 1.

    Raises:
        ValueError: the smoothing is out of range.
    """

    def __init__(self, inside: nn.Module, smoothing: float) -> None:
        super().__init__(inside)
        if not 0 < smoothing < 1:
            raise ValueError(f"label smoothing must be above 0 and below 1, got {smoothing}")
        self.smoothing = smoothing

    def forward(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Map token ids (B, T) to two logits for each position, (B, T, 2). Those of the last position are zeros."""
        logits = self.inside(input_ids, **options)[:, :-1].float()  # (B, T - 1, V)
        loss = F.cross_entropy(
            logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none", label_smoothing=self.smoothing
        ).view(logits.shape[:2])
        # The loss is at least the entropy of the smoothed labels, so that the logarithm is of a number above 0.
        pairs = torch.stack([-loss, torch.log(-torch.expm1(-loss))], dim=-1)  # (B, T - 1, 2)
        return F.pad(pairs, (0, 0, 0, 1))


def labels_of(batch: Batch) -> Batch:
    """The batch for a model inside `LabelSmoothing`: 0 instead of every label that is not -100."""
    return batch._replace(labels=batch.labels.where(batch.labels == IGNORE_INDEX, 0))
