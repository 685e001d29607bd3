"""Merging several adapters of one base into one: sums, TIES and DARE; and what merging and training leave behind.

The update of an adapter is what it adds to a weight of the base. A weighted sum of updates is task arithmetic (Ilharco
et al. 2023, arXiv:2212.04089). For LoRA the sum is a LoRA again, of rank r_1 + r_2 + ... (`sum_of_loras`). TIES (Yadav
et al. 2023, arXiv:2306.01708) and DARE (Yu et al. 2024, arXiv:2311.03099) reduce the interference between updates: TIES
keeps the largest entries of each (`trim`) and averages those that agree on a sign (`merge_agreeing`); DARE drops random
entries and rescales the others (`drop_and_rescale`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sum_of_loras(pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """One LoRA whose update is the weighted sum of the updates of several: B A = w_1 B_1 A_1 + w_2 B_2 A_2 + ...

    Terms such as B_1 A_2, which mix two of them, do not occur. How the weights are divided between A and B is up to
    you.

    Args:
        pairs: (A_i, B_i) of each LoRA, A_i (r_i, in) and B_i (out, r_i). Their ranks r_i may differ.
        weights: w_i, one for each LoRA. They need not add up to 1, and may be negative.

    Returns:
        A (r_1 + r_2 + ..., in) and B (out, r_1 + r_2 + ...).
    """
    A = torch.cat([A for A, _ in pairs])
    B = torch.cat([weight * B for (_, B), weight in zip(pairs, weights, strict=True)], dim=1)
    return A, B


def trim(update: Tensor, density: float) -> Tensor:
    """TIES, step 1: keep the entries with the largest magnitudes, and set the others to zero (Yadav et al., section 4).

    The kept entries keep their values and signs. Of entries with the same magnitude, the first ones are kept.

    Args:
        update: of any shape.
        density: the share of all entries that is kept, from 0 to 1. Their number is rounded to the nearest integer.

    Returns:
        A new tensor of the same shape.
    """
    order = update.abs().flatten().argsort(descending=True, stable=True)
    places = order[: round(density * update.numel())]
    trimmed = torch.zeros_like(update).flatten()
    trimmed[places] = update.flatten()[places]
    return trimmed.view_as(update)


def merge_agreeing(updates: Tensor) -> Tensor:
    """TIES, steps 2 and 3: elect a sign for each entry, and average the entries that have it (Yadav et al., section 4).

    The sign of an entry is elected by the sum over the updates, so that large values count more. The mean is over the
    updates whose entry has the elected sign: the others and zeros do not count. Where no sign is elected, because the
    sum is zero, the result is zero.

    Args:
        updates: (n, ...), the trimmed updates of n adapters.

    Returns:
        The merged update, (...).
    """
    elected = updates.sum(dim=0).sign()
    agrees = updates.sign() == elected  # where 0 is elected, only zeros agree
    return (updates * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


def drop_and_rescale(update: Tensor, drop_rate: float, generator: torch.Generator | None = None) -> Tensor:
    """DARE: drop entries of an update at random, and rescale the others (Yu et al. 2024, section 3.2).

    Each entry by itself becomes zero with the probability `drop_rate`. The others are divided by 1 - `drop_rate`, so
    that the mean over many draws is the update.

    Args:
        update: of any shape.
        drop_rate: at least 0 and below 1.
        generator: where the random numbers come from. None: PyTorch's own.

    Returns:
        A new tensor of the same shape.
    """
    kept = torch.rand(update.shape, generator=generator) >= drop_rate
    return update * kept / (1 - drop_rate)


def intruder_dimensions(W: Tensor, tuned: Tensor, leading: int, threshold: float = 0.6) -> int:
    """How many leading directions of a fine-tuned weight are new (Shuttleworth et al. 2024, arXiv:2410.21228).

    A left singular vector of the fine-tuned weight is an intruder dimension if it is like none of the left singular
    vectors of W: its cosine with each of them is below the threshold. A vector and its opposite are the same direction.

    Args:
        W: (out, in), before fine-tuning.
        tuned: (out, in), after fine-tuning.
        leading: so many singular vectors of `tuned` are looked at, those with the largest singular values.
        threshold: a cosine, from 0 to 1.

    Returns:
        The number of intruders, a whole number from 0 to `leading`.
    """
    before, _, _ = torch.linalg.svd(W, full_matrices=False)  # (out, k)
    after, _, _ = torch.linalg.svd(tuned, full_matrices=False)
    cosines = (before.T @ after[:, :leading]).abs()
    return int((cosines.amax(dim=0) < threshold).sum())
