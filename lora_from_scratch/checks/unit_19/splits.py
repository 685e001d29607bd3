"""Unit 19: functions that split a weight, on which the learner's test is tried, sound ones and faulty ones.

They use nothing of the exercises, whose solutions are missing where submissions are graded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.methods.loftq import best_factors

Quantize = Callable[[Tensor], Any]
Iterate = tuple[Any, Tensor, Tensor]
Split = Callable[[Tensor, int, Quantize, int], Iterate]


def iterates(W: Tensor, rank: int, quantize: Quantize, number: int, until_worse: bool = True) -> list[Iterate]:
    """So many iterations, or those up to the first that is worse than the one before, which is included."""
    found: list[Iterate] = []
    dequantized = torch.zeros_like(W)
    for _ in range(number):
        A, B = best_factors(W - dequantized, rank)
        Q = quantize(W - B @ A)
        dequantized = Q.dequantize()
        found.append((Q, A, B))
        if until_worse and len(found) > 1 and error(W, found[-1]) >= error(W, found[-2]):
            break
    return found


def error(W: Tensor, iterate: Iterate) -> float:
    Q, A, B = iterate
    return float((W - Q.dequantize() - B @ A).square().sum())


def best(W: Tensor, found: list[Iterate]) -> Iterate:
    return min(found, key=lambda one: error(W, one))


def stops(W: Tensor, rank: int, quantize: Quantize, iterations: int) -> Iterate:
    return best(W, iterates(W, rank, quantize, iterations))


def goes_on(W: Tensor, rank: int, quantize: Quantize, iterations: int) -> Iterate:
    return best(W, iterates(W, rank, quantize, iterations, until_worse=False))


def orthonormal(W: Tensor, rank: int, quantize: Quantize, iterations: int) -> Iterate:
    Q, A, B = stops(W, rank, quantize, iterations)
    U, R = torch.linalg.qr(B)
    return Q, R @ A, U


def rescaled(W: Tensor, rank: int, quantize: Quantize, iterations: int) -> Iterate:
    """The same B A with the factors scaled against each other."""
    Q, A, B = goes_on(W, rank, quantize, iterations)
    return Q, -4 * A, B / -4


def last_after_the_rise(W: Tensor, rank: int, quantize: Quantize, iterations: int) -> Iterate:
    """The fault of the museum."""
    return iterates(W, rank, quantize, iterations)[-1]


def last_of_all(W: Tensor, rank: int, quantize: Quantize, iterations: int) -> Iterate:
    return iterates(W, rank, quantize, iterations, until_worse=False)[-1]


def first_of_all(W: Tensor, rank: int, quantize: Quantize, iterations: int) -> Iterate:
    return iterates(W, rank, quantize, iterations, until_worse=False)[0]


def worst_of_all(W: Tensor, rank: int, quantize: Quantize, iterations: int) -> Iterate:
    return max(iterates(W, rank, quantize, iterations, until_worse=False), key=lambda one: error(W, one))


def older_Q(W: Tensor, rank: int, quantize: Quantize, iterations: int) -> Iterate:
    found = iterates(W, rank, quantize, iterations)
    _, A, B = best(W, found)
    return found[0][0], A, B


def newer_factors(W: Tensor, rank: int, quantize: Quantize, iterations: int) -> Iterate:
    """Q of the best iteration, and the A and B that the next one would have."""
    Q, _, _ = stops(W, rank, quantize, iterations)
    return Q, *best_factors(3 * (W - Q.dequantize()), rank)


def only_one(W: Tensor, rank: int, quantize: Quantize, iterations: int) -> Iterate:
    return iterates(W, rank, quantize, 1)[0]


def one_too_many(W: Tensor, rank: int, quantize: Quantize, iterations: int) -> Iterate:
    return goes_on(W, rank, quantize, iterations + 1)


def larger_rank(W: Tensor, rank: int, quantize: Quantize, iterations: int) -> Iterate:
    return stops(W, rank + 1, quantize, iterations)


def in_place(W: Tensor, rank: int, quantize: Quantize, iterations: int) -> Iterate:
    found = stops(W.clone(), rank, quantize, iterations)
    W -= found[2] @ found[1]
    return found


SOUND: dict[str, Split] = {
    "it stops when the error rises, and returns the one before": stops,
    "it does all iterations, and returns the best": goes_on,
    "B has orthonormal columns": orthonormal,
    "A is made larger, and B smaller": rescaled,
}
FAULTY: dict[str, Split] = {
    "it stops when the error rises, and returns the last iteration": last_after_the_rise,
    "it does all iterations, and returns the last": last_of_all,
    "it does all iterations, and returns the first": first_of_all,
    "it returns the iteration with the largest error": worst_of_all,
    "Q is of the first iteration, A and B of the best": older_Q,
    "Q is of the best iteration, A and B are from another one": newer_factors,
    "it always does one iteration": only_one,
    "it does one iteration more than it may": one_too_many,
    "the rank of B A is one larger than it may be": larger_rank,
    "B A is subtracted from the given W": in_place,
}
SPLITS = SOUND | FAULTY
