"""Which triplets AdaLoRA keeps (Zhang et al. 2023, arXiv:2303.10512): their importance, the budget, and the choice.

A triplet is one entry of E with its row of A and its column of B. In every training step the importance of each number
is updated (`smoothed_sensitivity`), and each triplet gets a score (`triplet_scores`). From time to time the best are
chosen (`allocate`), as many as the budget of that step allows (`cubic_budget`). `adalora.py` trains with these.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def smoothed_sensitivity(
    parameter: Tensor, gradient: Tensor, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """The sensitivity and the uncertainty of each number of a parameter after one more step (eq. 9 and 10).

    The sensitivity of a single batch is |w g|, for a number w with the gradient g: about how much the loss would change
    if w were set to zero. It differs from batch to batch, so two running means are kept:

    - The new sensitivity is beta1 times the old one plus 1 - beta1 times that of this batch.
    - The new uncertainty is beta2 times the old one plus 1 - beta2 times the distance of this batch's sensitivity from
      the new smoothed one.

    The given tensors keep their values.

    Args:
        parameter, gradient: of any shape.
        sensitivity, uncertainty: of the same shape, from the step before; zeros before the first step.
        beta1, beta2: at least 0 and below 1.

    Returns:
        The new sensitivity and the new uncertainty, of the same shape.
    """
    now = (parameter * gradient).abs()
    smoothed = (beta1 * sensitivity).add(now, alpha=1 - beta1)
    return smoothed, (beta2 * uncertainty).add((now - smoothed).abs(), alpha=1 - beta2)


def triplet_scores(sensitivity: Mapping[str, Tensor], uncertainty: Mapping[str, Tensor]) -> Tensor:
    """The score of each triplet of one matrix (eq. 7, 8 and 11).

    The importance of a number is the product of its sensitivity and its uncertainty. The score of triplet i is the
    importance of E_i, plus the mean importance of row i of A, plus the mean importance of column i of B.

    Args:
        sensitivity, uncertainty: of the numbers of A, E and B, by the names "lora_A" (r, in), "lora_E" (r, 1) and
            "lora_B" (out, r).

    Returns:
        (r,).
    """
    A, E, B = (sensitivity[part] * uncertainty[part] for part in ("lora_A", "lora_E", "lora_B"))
    return E.flatten() + A.mean(dim=1) + B.mean(dim=0)


def cubic_budget(step: int, first: int, last: int, whole: int, target: int) -> int:
    """How many triplets of all matrices together are kept after a step (eq. 12).

    - Up to the step `first` all are kept: the budget is `whole`.
    - From the step `last` on it is `target`.
    - In between it is target + (whole - target) (1 - (step - first) / (last - first))^3, rounded down.

    Args:
        step: counted from 1.
        first, last: the steps between which the budget falls, the smaller one first.
        whole, target: numbers of triplets, the larger one first.
    """
    if step <= first:
        return whole
    if step >= last:
        return target
    left = 1 - (step - first) / (last - first)
    return int((whole - target) * left**3) + target


def allocate(scores: list[Tensor], budget: int) -> list[Tensor]:
    """Which triplets are kept: the best `budget` ones of all matrices together.

    So a matrix may keep all of its triplets, or none. Exactly `budget` are kept. Among triplets with the same score the
    first ones are: those of the first matrix before those of the second, and in a matrix those with the smaller number.

    Args:
        scores: of each matrix, (r_i,). The r_i may differ.
        budget: from 0 to the number of all triplets.

    Returns:
        A mask for each matrix, (r_i,): 1 where a triplet is kept, and 0 where it is cut.
    """
    order = torch.cat(scores).argsort(descending=True, stable=True)
    kept = torch.zeros(len(order), device=order.device)
    kept[order[:budget]] = 1
    return list(kept.split([len(score) for score in scores]))
