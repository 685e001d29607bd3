"""Choosing among methods by measurements, without claiming more than they show."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_from_scratch.compare.capstone.budget import over_budget


def pareto_front(costs: Tensor, quality: Tensor) -> list[int]:
    """The Pareto front: the indices of the candidates that no other candidate beats, in increasing order.

    One candidate beats (dominates) another if it is nowhere worse, in no cost and not in quality, and better
    somewhere. Two that are equal in every respect do not beat each other: both are on the front or neither is.

    Args:
        costs: (n, k), the costs of n candidates in k resources, in any dtype; less is better.
        quality: (n,), more is better.

    Raises:
        ValueError: the number of qualities and the number of rows of costs differ.
    """
    if costs.dim() != 2 or quality.shape != costs.shape[:1]:
        raise ValueError(f"costs must be (n, k) and quality (n,), got {tuple(costs.shape)} and {tuple(quality.shape)}")
    values = torch.cat([costs.double(), -quality.double()[:, None]], dim=1)  # (n, k + 1), less is better everywhere
    nowhere_worse = (values[:, None] <= values[None]).all(dim=-1)  # (n, n): is i nowhere worse than j?
    better_somewhere = (values[:, None] < values[None]).any(dim=-1)
    beaten = (nowhere_worse & better_somewhere).any(dim=0)  # (n,)
    return [place for place in range(len(values)) if not beaten[place]]


def choose_method(candidates: Mapping[str, Mapping[str, float]], budget: Mapping[str, float]) -> str:
    """The candidate of the highest quality within the budget; among equals, the one that trains fewest parameters.

    Args:
        candidates: costs and "quality" of each candidate, by name; a higher quality is better.
        budget: the limits of the costs, as in `over_budget`.

    Raises:
        ValueError: no candidate is within the budget, or some candidate has no cost for one of its limits.
    """
    affordable = {name: values for name, values in candidates.items() if not over_budget(values, budget)}
    if not affordable:
        raise ValueError(f"none of {', '.join(candidates)} is within the budget; raise it or try other settings")
    return max(affordable, key=lambda name: (affordable[name]["quality"], -affordable[name]["trained_parameters"]))


def best_learning_rate(losses: Mapping[float, float]) -> tuple[float, bool]:
    """The learning rate with the lowest loss, and whether the sweep can be trusted.

    It can if rates were tried on both sides of the best one: a best rate at the edge of the sweep may be far from the
    optimum, and a method judged by it looks worse than it is.

    Args:
        losses: the loss on held-out data for each rate tried, in any order; NaN if the run diverged, which is worse
            than any loss. A rate that diverged counts as a neighbour.

    Returns:
        The rate, and True if both a smaller and a larger rate were tried.

    Raises:
        ValueError: nothing was tried, or every run diverged.
    """
    finished = {rate: loss for rate, loss in losses.items() if not math.isnan(loss)}
    if not finished:
        raise ValueError(f"no run of {len(losses)} has a loss: try smaller learning rates")
    best = min(finished, key=lambda rate: finished[rate])
    return best, min(losses) < best < max(losses)


def paired_bootstrap(one: Tensor, other: Tensor, places: Tensor) -> float:
    """The share of resampled test sets on which the first system beats the second (Koehn 2004, section 3).

    A test set is one sample of cards; another sample would give another difference. Each row of `places` is a sample
    of the existing cards with replacement, the *same* cards for both systems. Near 1, the first system is better
    whatever the cards; near 1/2, the cards decide. A sample on which both are equal counts half.

    Args:
        one, other: (n,), the scores of both systems on the same n cards; more is better.
        places: (samples, n), int64, from 0 to n - 1: the cards of each draw.

    Raises:
        ValueError: the systems have scores for different numbers of cards.
    """
    if one.shape != other.shape or one.dim() != 1:
        raise ValueError(f"both need one score for each card, got shapes {tuple(one.shape)} and {tuple(other.shape)}")
    difference = (one - other).double()[places].mean(dim=1)  # (samples,)
    wins = (difference > 0).double() + 0.5 * (difference == 0)
    return float(wins.mean())
