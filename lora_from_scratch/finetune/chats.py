"""Chats as training data: who says what, as token ids, and which of the tokens count in the loss.

The format is ChatML, in which SmolLM2-Instruct and many others were trained: each turn is `<|im_start|>`, the role, a
line break, the text, `<|im_end|>` and a line break.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_from_scratch.gpt2.model import IGNORE_INDEX


def assistant_labels(input_ids: Tensor, attention_mask: Tensor, opening: Sequence[int], end_id: int) -> Tensor:
    """Labels with which a model learns the replies of the assistant in chats, and nothing else.

    - A reply begins after `opening`, the tokens that every turn of the assistant starts with.
    - It ends with the next `end_id`, which is part of it: otherwise the model would not learn to stop.
    - A row may have several replies, or none; all of them are learned.
    - A reply that the end of the row cuts off counts up to there.
    - Everything else is labelled -100: the other turns with their own `end_id`, each `opening`, and the padding.
    - Padding is on the right, where `attention_mask` is 0. Its id may be any, even `end_id`, as in SmolLM2.

    The labels are not shifted: a label has the place of its token.

    Example: with the opening (1, 7) and the end 2, the row 1 5 8 2 1 7 8 9 2 has the labels -100 six times, 8 9 2.

    Args:
        input_ids: (B, T) int64.
        attention_mask: (B, T), 1 for a token and 0 for padding.
        opening: n >= 1 token ids.
        end_id: the token that ends every turn.

    Returns:
        The labels, (B, T) int64.
    """
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    opening, lengths = list(opening), attention_mask.sum(dim=1).tolist()
    for row, ids in enumerate(input_ids.tolist()):
        inside = False
        for place, token in enumerate(ids[: lengths[row]]):
            if inside:
                labels[row, place] = token
                inside = token != end_id
            else:
                inside = ids[max(0, place + 1 - len(opening)) : place + 1] == opening
    return labels
