"""Why LoRA's alpha and the learning rate are interchangeable under Adam (Hu et al. 2021, section 4.1)."""

from __future__ import annotations

import math

from torch import Tensor


def exchange_alpha(
    A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float
) -> tuple[Tensor, Tensor, float]:
    """The initial A, B and learning rate with which a LoRA with another alpha learns exactly the same.

    Two LoRAs of the same rank, `dW = s B A` with s = alpha / r, are trained with Adam on the same batches. The second
    has `new_alpha`; its A and B are those of the first, both multiplied by the same number c. There is one c and one
    learning rate for which the two have the same dW at the start and after every step. They follow from two facts:

    - dW must be the same now, and it is the product of s, B and A;
    - Adam divides each gradient by its own size, so an entry moves by an amount set by the learning rate, however large
      or small its gradient is. The steps of A and B must be multiplied by the same factor as A and B themselves.

    This is the paper's remark (Hu et al. 2021, section 4.1) that with Adam, tuning alpha is roughly the same as tuning
    the learning rate if the initialisation is scaled appropriately. Apart from Adam's eps, it is exact without weight
    decay and without gradient clipping.

    Args:
        A: (r, in).
        B: (out, r), which is usually zero before the first step, but need not be.
        alpha: of the first LoRA, positive.
        learning_rate: of the first LoRA.
        new_alpha: of the second LoRA, positive; its rank is the same.

    Returns:
        A (r, in), B (out, r) and the learning rate of the second LoRA; the given A and B are not modified.
    """
    c = math.sqrt(alpha / new_alpha)
    return c * A, c * B, c * learning_rate
