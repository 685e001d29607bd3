"""Unit 01, rank: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.linear_algebra.rank import (
    low_rank_parameter_count,
    outer_product_sum,
    rank,
    rank_deficiency,
    row_echelon,
)

TITLE = "Rank"
COUNTING = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.float64)


def hilbert(size: int, dtype: torch.dtype) -> Tensor:
    """(size, size), `H_ij = 1 / (i + j + 1)`, i and j from 0."""
    i = torch.arange(size, dtype=torch.float64)
    return (1 / (i[:, None] + i + 1)).to(dtype)


# --- Elimination -------------------------------------------------------------------------------------


def echelon_cases(draw: Draw) -> Iterator[Case]:
    yield Case("the matrix [[1, 2, 3], [4, 5, 6], [7, 8, 9]]", {"matrix": COUNTING}, "elimination")
    yield Case("a random 4 x 4 matrix", {"matrix": draw.normal(4, 4, dtype=torch.float64)}, "elimination")
    yield Case("a wide 3 x 6 matrix, mostly negative", {"matrix": negative(draw, 3, 6)}, "elimination")
    yield Case(
        "a tall 6 x 3 matrix of whole numbers", {"matrix": draw.integers(-9, 9, 6, 3) + 10 * TALL}, "elimination"
    )
    yield Case("a wide 3 x 6 matrix of rank 2", {"matrix": draw.low_rank(3, 6, 2)}, "what counts as zero")
    yield Case("a tall 6 x 3 matrix of rank 1", {"matrix": draw.low_rank(6, 3, 1)}, "what counts as zero")
    yield Case("zeros", {"matrix": torch.zeros(2, 3)}, "what counts as zero")
    diagonal = torch.diag(torch.tensor([1.0, 4, 2]))
    yield Case("pivots 4, 2, 1 and a tolerance of 2", {"matrix": diagonal, "tolerance": 2.0}, "what counts as zero")


TALL = torch.tensor([[0, 0, 0], [0, 7, 0], [0, 0, 0], [0, 0, 0], [5, 0, 0], [0, 0, 3]])


def negative(draw: Draw, m: int, n: int) -> Tensor:
    """Random numbers of which the one with the largest absolute value is almost always negative."""
    matrix = torch.rand((m, n), generator=draw.generator, dtype=torch.float64) - 2
    matrix[0, 0] = draw.number(0.5, 1.0)
    return matrix


# --- Rank --------------------------------------------------------------------------------------------


def rank_cases(draw: Draw) -> Iterator[Case]:
    yield Case("the matrix [[1, 2, 3], [4, 5, 6], [7, 8, 9]]", {"matrix": COUNTING}, "rank")
    yield Case("a random 3 x 5 matrix", {"matrix": draw.normal(3, 5)}, "rank")
    yield Case("a 6 x 4 matrix of rank 2", {"matrix": draw.low_rank(6, 4, 2)}, "rank")
    yield Case("the columns of the identity, swapped", {"matrix": torch.eye(4)[[1, 2, 3, 0]]}, "rank")
    yield Case("two rows, each of them repeated", {"matrix": draw.normal(2, 5)[[0, 1, 0, 1]]}, "rank")
    yield Case("zeros", {"matrix": torch.zeros(2, 3)}, "rank")
    tiny = 1e-20 * draw.low_rank(5, 5, 3)
    yield Case("a 5 x 5 matrix of rank 3 with tiny entries", {"matrix": tiny}, "tolerance")
    yield Case("a 5 x 5 matrix of rank 3 with huge entries", {"matrix": 1e20 * draw.low_rank(5, 5, 3)}, "tolerance")
    yield Case("a 6 x 6 matrix of rank 2 in float32", {"matrix": draw.low_rank(6, 6, 2).float()}, "tolerance")
    yield Case("the Hilbert matrix 12 x 12 in float64", {"matrix": hilbert(12, torch.float64)}, "tolerance")
    diagonal = torch.diag(torch.tensor([1.0, 8, 0.25, 2]))
    yield Case("pivots 8, 2, 1, 0.25 and a tolerance of 0.5", {"matrix": diagonal, "tolerance": 0.5}, "tolerance")
    yield Case("a tensor with three axes", {"matrix": torch.ones(2, 2, 2)}, "what is refused")


def deficiency_cases(draw: Draw) -> Iterator[Case]:
    m, n = draw.integer(3, 4), draw.integer(6, 8)
    yield Case("the matrix [[1, 2, 3], [4, 5, 6], [7, 8, 9]]", {"matrix": COUNTING})
    yield Case("a random square matrix", {"matrix": draw.normal(m, m)})
    yield Case("a wide matrix of rank 1", {"matrix": draw.low_rank(m, n, 1)})
    yield Case("a tall matrix of rank 1", {"matrix": draw.low_rank(n, m, 1)})
    yield Case("a wide matrix of full rank", {"matrix": draw.normal(m, n)})
    yield Case("zeros", {"matrix": torch.zeros(3, 5)})
    diagonal = torch.diag(torch.tensor([1.0, 8, 0.25, 2]))
    yield Case("pivots 8, 2, 1, 0.25 and a tolerance of 1.5", {"matrix": diagonal, "tolerance": 1.5})


# --- Sums of outer products --------------------------------------------------------------------------


def try_outer(answer: Callable[..., Any], B: Tensor, A: Tensor, gradients: bool = False) -> Any:
    """The product; or, on request, the gradients of the sum of its squares with respect to B and A."""
    if not gradients:
        return answer(B, A)
    B, A = B.requires_grad_(), A.requires_grad_()
    (answer(B, A) ** 2).sum().backward()
    return {"gradient of B": B.grad, "gradient of A": A.grad}


def outer_cases(draw: Draw) -> Iterator[Case]:
    m, n = draw.integer(4, 5), draw.integer(6, 7)

    def factors(r: int, dtype: torch.dtype = torch.float64) -> dict[str, Data]:
        return {"B": draw.normal(m, r, dtype=dtype), "A": draw.normal(r, n, dtype=dtype)}

    yield Case("one column and one row", factors(1), "the product")
    yield Case("two columns and two rows", factors(2), "the product")
    yield Case("three columns and three rows in float32", factors(3, torch.float32), "the product")
    square = {"B": draw.normal(3, 3), "A": draw.normal(3, 3)}
    yield Case("square factors", square, "the product")
    yield Case("no column and no row: r is 0", factors(0), "the product")
    yield Case("the gradients of the factors", {**factors(2), "gradients": True}, "gradients")
    unequal = {"B": draw.normal(4, 2), "A": draw.normal(3, 5)}
    yield Case("two columns and three rows", unequal, "what is refused")


# --- Numbers to store --------------------------------------------------------------------------------


def count_cases(draw: Draw) -> Iterator[Case]:
    def sizes(out_features: int, in_features: int, rank: int) -> dict[str, Data]:
        return {"out_features": out_features, "in_features": in_features, "rank": rank}

    small, large, r = draw.integer(20, 40), draw.integer(50, 90), draw.integer(3, 9)
    yield Case("q of GPT-2 small, rank 4", sizes(768, 768, 4), "the count")
    yield Case("a wide matrix", sizes(small, large, r), "the count")
    yield Case("a tall matrix", sizes(large, small, r), "the count")
    yield Case("rank 1", sizes(small, large, 1), "the count")
    yield Case("the largest possible rank", sizes(large, small, small), "the count")
    yield Case("a rank above the smaller side", sizes(large, small, small + 1), "what is refused")
    yield Case("rank 0", sizes(small, large, 0), "what is refused")


EXERCISES = [
    Exercise(
        row_echelon,
        idea="rank",
        difficulty=4,
        minutes=25,
        points=5,
        hints=(
            "Follow the steps of the docstring one by one: find the entry, swap rows, swap columns, subtract.",
            "`echelon[k:, k:].abs().argmax()` counts in a block of n - k columns: `divmod` gives row and column.",
            "All rows below can be cleared at once: subtract the outer product of their multipliers and row k.",
        ),
        cases=echelon_cases,
    ),
    Exercise(
        rank,
        idea="rank",
        difficulty=2,
        minutes=5,
        points=2,
        hints=(
            "`row_echelon` has done most of the work: the rank can be read off its result.",
            "In an echelon form, what distinguishes an independent row from one that the elimination has used up?",
            "`echelon.any(dim=1)` is True for each row that has an entry other than 0. The result is an `int`.",
        ),
        cases=rank_cases,
        tolerance=0,
    ),
    Exercise(
        rank_deficiency,
        idea="rank",
        difficulty=1,
        minutes=4,
        points=1,
        hints=(
            "What is the largest rank that a matrix of this shape can have?",
            "A wide matrix cannot have more independent columns than it has rows; for a tall one it is the other way "
            "round.",
            "It is the difference of two numbers; you have just written a function for the second one.",
        ),
        cases=deficiency_cases,
        tolerance=0,
    ),
    Exercise(
        outer_product_sum,
        idea="low rank",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "Column k of B goes with row k of A, and with no other. What shape does the product of the two have?",
            "`torch.outer(column, row)` is one term. Start with zeros of the final shape and add the terms.",
            "Rows of `B.T` are columns of B: `zip(B.T, A)` iterates over both. Check the shapes first and raise a "
            "ValueError.",
        ),
        cases=outer_cases,
        probe=try_outer,
    ),
    Exercise(
        low_rank_parameter_count,
        idea="low rank",
        difficulty=1,
        minutes=5,
        points=2,
        hints=(
            "Write down the shapes of B and A first. How many numbers are in each?",
            "The two factors are stored separately: nothing is multiplied out.",
            "A rank below 1 or above the smaller side raises a ValueError before anything is counted.",
        ),
        cases=count_cases,
        tolerance=0,
    ),
]

PREDICTIONS = [
    Prediction(
        name="rank_of_counting",
        question=(
            "Nine different numbers, three rows, no row a multiple of another: what is the rank of "
            "[[1, 2, 3], [4, 5, 6], [7, 8, 9]]?"
        ),
        choices={"one": "1", "two": "2", "three": "3"},
        answer="two",
        explanation=(
            "The middle row is the mean of the other two, so only two rows are independent. Rows can be dependent "
            "although no two of them are multiples of each other."
        ),
        replies={
            "one": (
                "For rank 1 every row would have to be a multiple of one row, and (4, 5, 6) is no multiple of "
                "(1, 2, 3)."
            ),
            "three": (
                "That no row is a multiple of another is not enough: (1, 2, 3) - 2 · (4, 5, 6) + (7, 8, 9) = (0, 0, 0)."
            ),
        },
        idea="rank",
    ),
    Prediction(
        name="rank_of_a_trained_weight",
        question=(
            "The bundled GPT-2 has 24 large matrices, each with 256 as its smaller side. They began as random numbers "
            "and were trained for hours. What are their numerical ranks now?"
        ),
        choices={
            "low": "below 32 for most of them: training has found the few directions that matter",
            "middle": "somewhere between 32 and 255, different for each",
            "full": "256 for all of them",
        },
        answer="full",
        explanation=(
            "Every trained matrix has full rank: no row is a combination of the others to within rounding. The rank "
            "asks whether anything at all is left, however small, and in a trained matrix something always is. What "
            "has low rank in LoRA is not the weight."
        ),
        replies={
            "low": "A few directions may matter most, but the rank also counts those that matter little.",
            "middle": (
                "For that, some rows would have to be combinations of others to within rounding, which neither a "
                "random start nor training brings about."
            ),
        },
        measured="the bundled GPT-2",
        idea="low rank",
    ),
]
