"""The numbers of a small wrong row, next to the right ones, for messages to the learner."""

from __future__ import annotations

from torch import Tensor

from lora_from_scratch.checks.comparing import same

MOST_SHOWN = 8  # numbers of a row


def first_wrong(seen: Tensor, expected: Tensor, name: str, tolerance: float = 1e-4) -> str:
    """What the first wrong row of a result should be, and what it is; "" if that is too long to be worked on paper.

    Args:
        name: what a row stands for: "text".
    """
    for place, (one, other) in enumerate(zip(seen, expected, strict=True)):
        if not same(one, other, tolerance):
            if other.numel() > MOST_SHOWN:
                return ""
            yours, wanted = (", ".join(f"{value:.4g}" for value in row.flatten().tolist()) for row in (one, other))
            return f" For {name} {place} it should be ({wanted}), but yours is ({yours})."
    return ""
