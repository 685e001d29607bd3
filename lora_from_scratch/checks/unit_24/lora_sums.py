"""Unit 24: functions that merge LoRAs, on which the learner's test is tried, sound ones and faulty ones.

They use nothing of the exercises, whose solutions are missing where submissions are graded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Pairs = Sequence[tuple[Tensor, Tensor]]
Merge = Callable[[Pairs, Sequence[float]], tuple[Tensor, Tensor]]


def stacked(pairs: Pairs, on_A: Sequence[float], on_B: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The LoRAs beside each other, with these factors on A and on B."""
    A = torch.cat([factor * A for factor, (A, _) in zip(on_A, pairs, strict=True)])
    return A, torch.cat([factor * B for factor, (_, B) in zip(on_B, pairs, strict=True)], dim=1)


def ones(weights: Sequence[float]) -> list[float]:
    return [1.0 for _ in weights]


def weights_on_B(pairs: Pairs, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    return stacked(pairs, ones(weights), weights)


def weights_on_A(pairs: Pairs, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    return stacked(pairs, weights, ones(weights))


def roots_on_both(pairs: Pairs, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    roots = [abs(weight) ** 0.5 for weight in weights]
    return stacked(pairs, roots, [root if w >= 0 else -root for root, w in zip(roots, weights, strict=True)])


def last_first(pairs: Pairs, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    return weights_on_B(list(reversed(pairs)), list(reversed(weights)))


def compressed(pairs: Pairs, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """With orthonormal columns in B, whose number is the rank of the sum."""
    A, B = weights_on_B(pairs, weights)
    Q, R = torch.linalg.qr(B)
    return R @ A, Q


def factors_added(pairs: Pairs, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The fault of the museum."""
    A, B = (torch.zeros_like(one) for one in pairs[0])
    for (one, other), weight in zip(pairs, weights, strict=True):
        root = abs(weight) ** 0.5
        A, B = A + (root if weight >= 0 else -root) * one, B + root * other
    return A, B


def unweighted(pairs: Pairs, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    return stacked(pairs, ones(weights), ones(weights))


def weighted_twice(pairs: Pairs, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    return stacked(pairs, weights, weights)


def normalised(pairs: Pairs, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    return weights_on_B(pairs, [weight / sum(weights) for weight in weights])


def without_signs(pairs: Pairs, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    return weights_on_B(pairs, [abs(weight) for weight in weights])


def out_of_step(pairs: Pairs, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The A in another order than the B: every B_i meets the A of another LoRA."""
    _, B = weights_on_B(pairs, weights)
    return torch.cat([A for A, _ in reversed(pairs)]), B


def balanced_in_place(pairs: Pairs, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The products stay the same, but not the factors."""
    for A, B in pairs:
        A *= 2
        B /= 2
    return weights_on_B(pairs, weights)


def in_place(pairs: Pairs, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    for (_, B), weight in zip(pairs, weights, strict=True):
        B *= weight
    return unweighted(pairs, weights)


SOUND: dict[str, Merge] = {
    "the weights are on B": weights_on_B,
    "the weights are on A": weights_on_A,
    "roots of the weights are on both": roots_on_both,
    "the last LoRA comes first": last_first,
    "B is made orthonormal": compressed,
}
FAULTY: dict[str, Merge] = {
    "all A are added up, and all B": factors_added,
    "the A are in another order than the B": out_of_step,
    "the weights are not used": unweighted,
    "the weights are on A and on B": weighted_twice,
    "the weights are divided by their sum": normalised,
    "the weights lose their signs": without_signs,
    "the weights are multiplied into the given B": in_place,
    "the given A are doubled and the given B halved": balanced_in_place,
}
MERGES = SOUND | FAULTY
