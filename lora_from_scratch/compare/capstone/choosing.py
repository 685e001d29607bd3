"""Choosing among methods by what was measured, and not by more than was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_from_scratch.compare.capstone.budget import over_budget


def pareto_front(costs: Tensor, quality: Tensor) -> list[int]:
    """The candidates that no other one beats: the Pareto front, as places in increasing order.

    One candidate beats (dominates) another if it is nowhere worse, in no cost and not in quality, and better
    somewhere. Two that are equal in everything do not beat each other: both are on the front or neither is.

    Args:
        costs: (n, k), of n candidates in k resources; less is better.
        quality: (n,), more is better.

    Raises:
        ValueError: there are not as many qualities as rows of costs.
    """
    if costs.dim() != 2 or quality.shape != costs.shape[:1]:
        raise ValueError(f"costs must be (n, k) and quality (n,), got {tuple(costs.shape)} and {tuple(quality.shape)}")
    values = torch.cat([costs, -quality[:, None]], dim=1)  # (n, k + 1), less is better everywhere
    nowhere_worse = (values[:, None] <= values[None]).all(dim=-1)  # (n, n): is i nowhere worse than j?
    better_somewhere = (values[:, None] < values[None]).any(dim=-1)
    beaten = (nowhere_worse & better_somewhere).any(dim=0)  # (n,)
    return [place for place in range(len(values)) if not beaten[place]]


def choose_method(candidates: Mapping[str, Mapping[str, float]], budget: Mapping[str, float]) -> str:
    """The candidate of the highest quality within the budget; of several, the one that trains the fewest parameters.

    Args:
        candidates: by name, each with its costs and, under "quality", how good it is (more is better).
        budget: the most that each cost may be (`over_budget`).

    Raises:
        ValueError: no candidate is within the budget.
    """
    affordable = {name: values for name, values in candidates.items() if not over_budget(values, budget)}
    if not affordable:
        raise ValueError(f"none of {', '.join(candidates)} is within the budget; it has to be raised, or more tried")
    return max(affordable, key=lambda name: (affordable[name]["quality"], -affordable[name]["trained_parameters"]))


def best_learning_rate(losses: Mapping[float, float]) -> tuple[float, bool]:
    """The learning rate with the lowest loss, and whether the sweep can be believed.

    It can if the best rate has a neighbour on both sides: a best rate at the edge of what was tried may be far from
    the best that there is, and a method that is judged by it looks worse than it is.

    Args:
        losses: the loss on held-out data for each rate that was tried, in any order; NaN where the run diverged,
            which is worse than any loss. A rate that diverged is a neighbour like any other.

    Returns:
        the rate, and True if there is a smaller and a larger one among those that were tried.

    Raises:
        ValueError: nothing was tried, or every run diverged.
    """
    finished = {rate: loss for rate, loss in losses.items() if not math.isnan(loss)}
    if not finished:
        raise ValueError(f"no run of {len(losses)} has a loss: try smaller learning rates")
    best = min(finished, key=lambda rate: finished[rate])
    return best, min(losses) < best < max(losses)


def paired_bootstrap(one: Tensor, other: Tensor, places: Tensor) -> float:
    """In what share of resampled test sets does the first system beat the second? (Koehn 2004, section 3)

    A test set is one draw of cards; another draw would give another difference. Each row of `places` is such a draw
    from the cards that there are, with repetition, the *same* cards for both systems. Near 1 the first is better
    whatever the cards, near 1/2 the cards decide. A draw on which both are equal counts half.

    Args:
        one, other: (n,), the scores of both systems on the same n cards; more is better.
        places: (samples, n), int64, from 0 to n - 1: the cards of each draw.

    Raises:
        ValueError: the two have not the same number of cards.
    """
    if one.shape != other.shape or one.dim() != 1:
        raise ValueError(f"both need a score for each of the same cards, got {tuple(one.shape)}, {tuple(other.shape)}")
    difference = (one - other).double()[places].mean(dim=1)  # (samples,)
    wins = (difference > 0).double() + 0.5 * (difference == 0)
    return float(wins.mean())
