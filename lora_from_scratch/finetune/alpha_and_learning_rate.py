"""Alpha and the learning rate are one knob: how LoRA's training depends on them under Adam (Hu et al. 2021, 4.1)."""

from __future__ import annotations

import math

from torch import Tensor


def exchange_alpha(
    A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float
) -> tuple[Tensor, Tensor, float]:
    """Where and how fast a LoRA with another alpha has to be trained so that it learns exactly the same.

    Two LoRAs of one rank, `dW = s B A` with s = alpha / r, are trained by Adam on the same batches. The second has
    `new_alpha`; its A and B are those of the first, both multiplied by one number c. For one c and one learning rate
    the two have the same dW at the start and after every step. Find them from two facts:

    - dW has to be the same now, and is a product of s, B and A;
    - Adam divides each gradient by its own size, so an entry moves by as much as the learning rate says, however large
      or small its gradient is. What A and B are multiplied by, their steps have to be multiplied by as well.

    That is the paper's remark (Hu et al. 2021, section 4.1): with Adam, tuning alpha is roughly the same as tuning the
    learning rate, if the start is scaled appropriately. It is exact but for Adam's eps, without weight decay and
    without clipping of the gradient.

    Args:
        A: (r, in).
        B: (out, r), zero before the first step.
        alpha: of the first LoRA, positive.
        learning_rate: of the first LoRA.
        new_alpha: of the second LoRA, positive; its rank is the same.

    Returns:
        A (r, in), B (out, r) and the learning rate of the second LoRA.
    """
    c = math.sqrt(alpha / new_alpha)
    return c * A, c * B, c * learning_rate
