"""Bits for each matrix, chosen greedily: what LQ-LoRA's integer programme (`lq_lora.allocate`) is compared with."""

from __future__ import annotations

from torch import Tensor


def allocate_greedily(errors: Tensor, sizes: Tensor, budget: float) -> list[int]:
    """Choose a configuration for each matrix, one change after the other, so that the sizes stay within a budget.

    Start with the smallest choice for each matrix. A change replaces the choice of one matrix by another one that is
    larger and has a smaller error; it may skip choices in between. Its value is the decrease of the error divided by
    the increase of the size. Of all changes with which the sum of the sizes still fits, make the one with the largest
    value, and go on until no change is left.

    Args:
        errors, sizes: (matrices, choices). More size need not mean less error.
        budget: the largest sum of sizes, in the same unit. It may be used up completely.

    Returns:
        The index of the choice for each matrix.

    Raises:
        ValueError: even the smallest choices do not fit.
    """
    chosen = sizes.argmin(dim=1)  # (matrices,)
    if (least := float(sizes.amin(dim=1).sum())) > budget:
        raise ValueError(f"nothing fits into the budget of {budget:g}: the least is {least:g}")
    while True:
        gain = errors.gather(1, chosen[:, None]) - errors  # (matrices, choices)
        cost = sizes - sizes.gather(1, chosen[:, None])
        left = budget - sizes.gather(1, chosen[:, None]).sum()
        value = (gain / cost).where((gain > 0) & (cost > 0) & (cost <= left), 0)
        if value.max() <= 0:
            return chosen.tolist()
        matrix, choice = divmod(int(value.argmax()), errors.shape[1])
        chosen[matrix] = choice
