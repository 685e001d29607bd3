"""Testing a piece of advice about LoRA: a fair comparison, and a verdict that takes account of the seeds' spread.

`benchmarks/folklore.py` applies these functions to the advice that circulates; its table is `benchmarks/folklore.md`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from statistics import fmean
from typing import Any

from torch import Tensor

from lora_from_scratch.compare.capstone.choosing import best_learning_rate

HOLDS = "holds here"
FAILS = "does not hold here"
UNDECIDED = "cannot be decided at this size"


def verdict(differences: Sequence[float], margin: float | None = None) -> str:
    """Judge a claim by a difference between two settings that was measured with several seeds.

    The mean of the differences is compared with their spread, which is the largest minus the smallest. There are two
    kinds of claims.

    Without a margin, the claim is that one setting is better, and differences in its favour are positive:

    - it holds if the mean is above the spread;
    - it does not hold if the mean is below minus the spread.

    With a margin, the claim is that the settings are equally good, apart from differences that do not matter:

    - it holds if no difference is larger than the margin, whatever its sign;
    - it does not hold if the mean, whatever its sign, is larger than the margin and also larger than the spread.

    In all other cases the claim cannot be decided.

    Args:
        differences: one per seed, at least two.
        margin: the largest difference that does not matter, at least 0.

    Returns:
        "holds here", "does not hold here" or "cannot be decided at this size".

    Raises:
        ValueError: there are fewer than two differences, one is not finite, or the margin is negative.
    """
    if len(differences) < 2 or not all(math.isfinite(d) for d in differences):
        raise ValueError(f"give at least two differences, all of them finite, got {list(differences)}")
    if margin is not None and margin < 0:
        raise ValueError(f"margin must be at least 0, got {margin}")
    mean, spread = fmean(differences), max(differences) - min(differences)
    if margin is None:
        holds, fails = mean > spread, mean < -spread
    else:
        holds, fails = max(map(abs, differences)) <= margin, abs(mean) > max(margin, spread)
    return HOLDS if holds else FAILS if fails else UNDECIDED


def matched_rank(rank: int, layers: Sequence[tuple[int, int]], other_layers: Sequence[tuple[int, int]]) -> int:
    """The rank at which LoRA on other layers trains as many parameters as a given LoRA, as nearly as possible.

    Beside a layer with a weight of shape (out, in), LoRA trains r (in + out) parameters (Hu et al. 2021, section 4.1).

    Args:
        rank: of the LoRA on `layers`.
        layers: the shapes (out, in) of the weights that it adapts.
        other_layers: the shapes of the weights that the LoRA in question adapts.

    Returns:
        The rank whose number of parameters is nearest; of two that are equally near, the lower. It is at least 1.
    """
    budget = rank * sum(out + into for out, into in layers)
    per_rank = sum(out + into for out, into in other_layers)
    below, rest = divmod(budget, per_rank)
    return max(1, below + (2 * rest > per_rank))


def relative_change_by_block(weights: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[int, float]:
    """How much fine-tuning changed each block, relative to the size of its weights.

    For a block it is the Frobenius norm of all its changes together, divided by the Frobenius norm of all the weights
    that were changed, as if each were one long vector. A weight of the block that has no change does not count.

    Args:
        weights: by name. The number of the block is the component after "h": 3 in "transformer.h.3.mlp.c_fc".
        changes: some or all of the same names, each with a tensor of the shape of the weight.

    Returns:
        By the number of the block, in ascending order.
    """
    squares: dict[int, tuple[float, float]] = {}
    for name, change in changes.items():
        parts = name.split(".")
        block = int(parts[parts.index("h") + 1])
        above, below = squares.get(block, (0.0, 0.0))
        squares[block] = above + float(change.square().sum()), below + float(weights[name].square().sum())
    return {block: math.sqrt(above / below) for block, (above, below) in sorted(squares.items())}


def best_rate_ratio(losses: Mapping[float, float], other_losses: Mapping[float, float]) -> float:
    """The best learning rate of a method divided by the best learning rate of another.

    For LoRA and full fine-tuning it is said to be about ten (Schulman et al. 2025). If the best rate of one of the two
    is the smallest or the largest that was tried, a better one may lie beyond it, and the ratio is not known.

    Args:
        losses, other_losses: the loss on held-out data by learning rate, in any order; NaN if the run diverged. They
            may have different rates.

    Raises:
        ValueError: the best rate of one of the two is the smallest or the largest that was tried, or all of its runs
            diverged.
    """
    best = []
    for tried in (losses, other_losses):
        rate, trusted = best_learning_rate(tried)
        if not trusted:
            raise ValueError(f"the best learning rate, {rate:g}, is at the edge of those tried; try others beyond it")
        best.append(rate)
    return best[0] / best[1]


def steps_per_epoch(examples: int, micro_batch: int, accumulation: int = 1, processes: int = 1) -> int:
    """The number of optimiser steps in which every example is seen once.

    One step uses an effective batch: each process adds up the gradients of `accumulation` micro-batches. The last batch
    of an epoch may be smaller than the others, and is a step all the same.
    """
    return -(-examples // (micro_batch * accumulation * processes))


def read_claims() -> list[dict[str, Any]]:
    """The results of `benchmarks/folklore.py` that ship with the package: one dictionary per claim.

    Each has "key", "claim", "source", "compared", "sides" (by name, the values of the seeds), "differences", "unit",
    "margin" (null for a claim that something is better) and "verdict". If a claim has not been tested yet, its verdict
    is "not run yet" and it has no sides.
    """
    claims: list[dict[str, Any]] = _document()["claims"]
    return claims


def rate_sweeps() -> dict[str, list[dict[float, float]]]:
    """The losses by learning rate of "lora" and of "full" fine-tuning, one dictionary per seed, from the same file."""
    sweeps = _document()["sweeps"]
    return {
        name: [{float(rate): loss for rate, loss in one.items()} for one in seeds] for name, seeds in sweeps.items()
    }


def _document() -> dict[str, Any]:
    text = resources.files("lora_from_scratch").joinpath("assets", "folklore.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document
