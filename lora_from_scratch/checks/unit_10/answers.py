"""Unit 10, fine-tuning with LoRA: mistakes that people make, and other right ways. The costs."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import bisect
import math

import numpy as np
import torch
from torch import nn

from lora_from_scratch.checks.bank import right, wrong

# --- lora_parameter_count ----------------------------------------------------------------------------


@right("lora_parameter_count")
def counted_on_tensors(sizes: list, rank: int) -> int:
    with torch.device("meta"):
        pairs = [(nn.Linear(i, rank, bias=False), nn.Linear(rank, o, bias=False)) for i, o in sizes]
    return sum(layer.weight.numel() for pair in pairs for layer in pair)


@right("lora_parameter_count")
def rank_times_all_sides(sizes: list, rank: int) -> int:
    return rank * sum(map(sum, sizes))


@right("lora_parameter_count")
def one_row_after_the_other(sizes: list, rank: int) -> int:
    total = 0
    for inputs, outputs in sizes:
        for _ in range(rank):
            total += inputs  # a row of A
        for _ in range(outputs):
            total += rank  # a row of B
    return total


@right("lora_parameter_count")
def numpy_product_of_a_table(sizes: list, rank: int) -> int:
    return int((np.array(sizes).reshape(-1, 2) @ np.full(2, rank)).sum())


@wrong(
    "lora_parameter_count", "You count the rank only once for all matrices. Each has r rows in A and r columns in B."
)
def the_rank_is_left_out(sizes: list, rank: int) -> int:
    return sum(i + o for i, o in sizes)


@wrong(
    "lora_parameter_count",
    "You multiply in and out: that is the number of entries of the full change. Only its factors are trained.",
)
def multiplied_out(sizes: list, rank: int) -> int:
    return sum(rank * i * o for i, o in sizes)


@wrong("lora_parameter_count", "That is the number of weights in the matrices themselves, which LoRA leaves unchanged.")
def the_frozen_weights(sizes: list, rank: int) -> int:
    return sum(i * o for i, o in sizes)


@wrong("lora_parameter_count", "You count A and leave out B.")
def only_the_first(sizes: list, rank: int) -> int:
    return sum(rank * i for i, _ in sizes)


@wrong("lora_parameter_count", "You count B and leave out A.")
def only_the_second(sizes: list, rank: int) -> int:
    return sum(rank * o for _, o in sizes)


@wrong(
    "lora_parameter_count",
    "You count the inputs twice, as if every matrix were square. A depends on the number of inputs, B on the number of "
    "outputs.",
)
def all_square(sizes: list, rank: int) -> int:
    return sum(2 * rank * i for i, _ in sizes)


@wrong("lora_parameter_count", "You count an r x r matrix between A and B. LoRA does not have one.")
def a_core_between(sizes: list, rank: int) -> int:
    return sum(rank * (i + o) + rank * rank for i, o in sizes)


@wrong(
    "lora_parameter_count",
    "You multiply the count of the first matrix by the number of matrices. They may differ in size.",
)
def the_first_for_all(sizes: list, rank: int) -> int:
    return len(sizes) * rank * sum(sizes[0]) if len(sizes) > 1 else rank * sum(sizes[0])


@wrong("lora_parameter_count", "You count a bias for each matrix. LoRA's two matrices have none.")
def with_biases(sizes: list, rank: int) -> int:
    return sum(rank * (i + o) + o for i, o in sizes)


# --- rank_for_budget ---------------------------------------------------------------------------------


def cost(sizes: list, rank: int = 1) -> int:
    return rank * sum(i + o for i, o in sizes)


def payable(sizes: list, budget: int) -> None:
    if budget < cost(sizes):
        raise ValueError(f"not even r = 1 fits into {budget}")


def smallest_side(sizes: list) -> int:
    return min(min(size) for size in sizes)


@right("rank_for_budget")
def one_rank_after_the_other(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    rank = 1
    while rank < smallest_side(sizes) and cost(sizes, rank + 1) <= budget:
        rank += 1
    return rank


@right("rank_for_budget")
def the_best_of_all_that_fit(sizes: list, budget: int) -> int:
    fitting = [rank for rank in range(1, smallest_side(sizes) + 1) if cost(sizes, rank) <= budget]
    if not fitting:
        raise ValueError("the budget is too small")
    return fitting[-1]


@right("rank_for_budget")
def by_bisection(sizes: list, budget: int) -> int:
    ranks = range(1, min(map(min, sizes)) + 1)
    rank = bisect.bisect_right(ranks, budget, key=lambda r: cost(sizes, r))
    if not rank:
        raise ValueError("not even one")
    return rank


@right("rank_for_budget")
def pays_one_rank_at_a_time(sizes: list, budget: int) -> int:
    rank, left = 0, np.int64(budget)
    while left >= cost(sizes) and rank < np.min(sizes):
        rank, left = rank + 1, left - cost(sizes)
    if rank == 0:
        raise ValueError
    return rank


@wrong(
    "rank_for_budget",
    "You compare with the inputs of each matrix only. The smaller side may be the number of outputs.",
)
def limited_by_the_inputs(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return min(budget // cost(sizes), *(i for i, _ in sizes), 10**9)


@wrong(
    "rank_for_budget",
    "You compare with the outputs of each matrix only. The smaller side may be the number of inputs.",
)
def limited_by_the_outputs(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return min(budget // cost(sizes), *(o for _, o in sizes), 10**9)


@wrong("rank_for_budget", "The highest rank of a matrix is its smaller side itself, not one less.")
def one_below_the_side(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return min(budget // cost(sizes), smallest_side(sizes) - 1)


@wrong("rank_for_budget", "A budget that is exactly enough for r = 1 is refused. It may be used up.")
def refuses_a_budget_for_one(sizes: list, budget: int) -> int:
    if budget <= cost(sizes):
        raise ValueError
    return min(budget // cost(sizes), smallest_side(sizes))


@wrong(
    "rank_for_budget",
    "Your rank exceeds the budget when the division has a remainder: round down.",
)
def rounded_up(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return min(math.ceil(budget / cost(sizes)), smallest_side(sizes))


@wrong("rank_for_budget", "You round to the nearest integer. If that rounds up, the budget is exceeded.")
def rounded(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return min(math.floor(budget / cost(sizes) + 0.5), smallest_side(sizes))


@wrong("rank_for_budget", "A budget that is met exactly is not exceeded: one rank more than yours is allowed.")
def never_the_whole_budget(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return max(1, min((budget - 1) // cost(sizes), smallest_side(sizes)))


@wrong(
    "rank_for_budget", "With a large budget your rank exceeds the highest possible rank of a matrix, its smaller side."
)
def without_the_limit_of_the_matrix(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return budget // cost(sizes)


@wrong("rank_for_budget", "You limit the rank by the larger side of a matrix. The limit is the smaller side.")
def limited_by_the_larger_side(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return min(budget // cost(sizes), *(max(size) for size in sizes))


@wrong(
    "rank_for_budget",
    "You use only the first matrix to find the highest possible rank. All of the matrices get this rank.",
)
def limited_by_the_first_matrix(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return min(budget // cost(sizes), *sizes[0])


@wrong("rank_for_budget", "You give the whole budget to each matrix. They share it.")
def a_budget_for_each(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return min(min(budget // (i + o), i, o) for i, o in sizes)


@wrong(
    "rank_for_budget",
    "You divide the budget into equal parts. At the same rank a larger matrix costs more: add up the costs of all "
    "matrices.",
)
def equal_shares(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return max(1, min(min(budget // len(sizes) // (i + o), i, o) for i, o in sizes))


@wrong(
    "rank_for_budget",
    "You compute the cost as if each rank needed in x out parameters. The change is stored as two factors.",
)
def as_if_multiplied_out(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return max(1, min(budget // sum(i * o for i, o in sizes), smallest_side(sizes)))


@wrong(
    "rank_for_budget",
    "Raise a ValueError if the budget is too small for r = 1: a LoRA of rank 0 would silently learn nothing.",
)
def zero_is_a_rank(sizes: list, budget: int) -> int:
    return min(budget // cost(sizes), smallest_side(sizes))


@wrong("rank_for_budget", "You return at least rank 1, whatever the budget. Raise a ValueError if it is too small.")
def at_least_one(sizes: list, budget: int) -> int:
    return max(1, min(budget // cost(sizes), smallest_side(sizes)))
