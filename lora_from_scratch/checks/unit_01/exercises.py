"""Unit 01, rank: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import as_tensor, dtypes_differ, is_number, same
from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data, Seen
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
    def case(name: str, part: str, matrix: Tensor, *sentences: str, **more: Data) -> Case:
        return Case(name, {"matrix": matrix, **more}, part, sentences)

    part, zero, bad = "elimination", "what counts as zero", "invalid input"
    step, exact, order = "Step k looks for the entry", "Entries below the diagonal", "columns: (n,), int64"
    pivots = "the pivots are its diagonal"
    example = torch.tensor([[1.0, 2], [3, -4]], dtype=torch.float64)
    yield case("the matrix [[1, 2], [3, -4]]", part, example, "Example: the matrix", "Gaussian elimination")
    yield case("the matrix [[1, 2, 3], [4, 5, 6], [7, 8, 9]]", part, COUNTING, step, pivots)
    yield case(
        "a random 4 x 4 matrix", part, draw.normal(4, 4, dtype=torch.float64), step, order, "Because columns are"
    )
    yield case("a wide 3 x 6 matrix, mostly negative", part, negative(draw, 3, 6), step, order, "echelon: (m, n)")
    whole = draw.integers(-9, 9, 6, 3) + 10 * TALL
    yield case("a tall 6 x 3 matrix of whole numbers", part, whole, "echelon: (m, n)", step)
    yield case("several largest entries: [[1, 2, -2], [2, 1, 2]]", part, TIES, step)
    yield case("1 / 49 * 49, which is not quite 1", part, SEVENTHS, exact)
    half = torch.tensor([[4.0, 1, 0], [2, 3, 1]], dtype=torch.bfloat16) * draw.choice((0.5, 1, 2))
    yield case("a matrix in bfloat16", part, half, "echelon: (m, n)")
    yield case("a matrix of whole numbers in float32", part, half.float(), "echelon: (m, n)", order)
    nothing, default = "not above the tolerance", "None means"
    yield case("a wide 3 x 6 matrix of rank 2", zero, draw.low_rank(3, 6, 2), nothing, exact)
    yield case("a tall 6 x 3 matrix of rank 1", zero, draw.low_rank(6, 3, 1), nothing, exact)
    yield case("zeros", zero, torch.zeros(2, 3), nothing, "at least 0")
    diagonal = torch.diag(torch.tensor([1.0, 4, 2]))
    boundary = (nothing, "tolerance: an entry of at most")
    yield case("pivots 4, 2, 1 and a tolerance of 2", zero, diagonal, *boundary, tolerance=2.0)
    yield case("pivots 1e10 and 1e-7 and a tolerance of 0", zero, APART, *boundary, "at least 0", tolerance=0.0)
    yield case("pivots -1e10 and -1e-7", zero, -APART, default, nothing)
    flat = torch.zeros(2, 4, dtype=torch.float64)
    flat[0, 0], flat[1, 1] = 2.0**20, 3 * EPS * 2.0**20
    yield case("the second pivot is 3 eps times the first in a 2 x 4 matrix", zero, flat, default, nothing)
    refused = ("or the tolerance is negative", "ValueError: as `require_matrix`")
    yield case("a vector", bad, torch.ones(3), *refused[::-1])
    yield case("an entry that is not a number", bad, torch.tensor([[1.0, math.nan], [0, 1]]), *refused[::-1])
    for tolerance in (-1.0, math.inf, math.nan):
        yield case(f"a tolerance of {tolerance}", bad, COUNTING, *refused, "at least 0", tolerance=tolerance)


EPS = torch.finfo(torch.float64).eps
TALL = torch.tensor([[0, 0, 0], [0, 7, 0], [0, 0, 0], [0, 0, 0], [5, 0, 0], [0, 0, 3]])
TIES = torch.tensor([[1, 2, -2], [2, 1, 2]])
# 1 - 1 / 49 * 49 is 1.1e-16; the other entries come out without rounding. `same` overlooks what is below 1e-12.
SEVENTHS = 2.0**14 * torch.tensor([[49.0, 0], [1, 3]], dtype=torch.float64)
APART = torch.diag(torch.tensor([1e10, 1e-7], dtype=torch.float64))  # the default tolerance is 4e-6


def negative(draw: Draw, m: int, n: int) -> Tensor:
    """Random numbers of which the one with the largest absolute value is negative."""
    matrix = torch.rand((m, n), generator=draw.generator, dtype=torch.float64) - 2
    matrix[0, 0] = draw.number(0.5, 1.0)
    return matrix


def echelon_agrees(case: Case, seen: Seen, expected: Seen) -> bool:
    """The same form, order and dtypes, the same rows that are zero, and zeros that are exact."""
    if not same(seen.value, expected.value) or dtypes_differ(seen.value, expected.value) or not_quite_zero(seen):
        return False
    return same(rows_left(seen), rows_left(expected))


def not_quite_zero(seen: Seen) -> list[list[int]]:
    """Where the echelon form is not exactly zero below its diagonal."""
    assert isinstance(seen.value, list)
    return as_tensor(seen.value[0]).tril(-1).nonzero().tolist()


def rows_left(seen: Seen) -> Tensor:
    """Which rows of the echelon form are not exactly zero."""
    assert isinstance(seen.value, list)
    return as_tensor(seen.value[0]).any(dim=1)


def explain_echelon(case: Case, seen: Seen, expected: Seen) -> tuple[str, str] | None:
    assert isinstance(seen.value, list)
    assert isinstance(expected.value, list)
    (found, order), (right, right_order) = map(as_tensor, seen.value), map(as_tensor, expected.value)
    if found.shape != right.shape or order.shape != right_order.shape or not found.isfinite().all():
        return None
    if (wrong := (order != right_order).nonzero().flatten().tolist()) and same(found, right):
        return "order wrong", (
            f"echelon is right, columns is not: from which column of M does column {wrong[0]} of your result come?"
        )
    if wrong:
        return "another pivot", (
            f"In step {wrong[0]}, counted from 0, another column has to be moved into place; the order before is "
            "right. Which entry has the largest absolute value of those left (the first of them, if several do)?"
        )
    if same(found, right) and (places := not_quite_zero(seen)):
        row, column = places[0]
        return "not exactly zero", (
            f"The entry at row {row}, column {column} is {float(found[row, column]):.1e}. The subtraction leaves a "
            "rounding error there; below the diagonal the entries are to be exactly 0."
        )
    return explain_row(found.double(), right.double())


def explain_row(found: Tensor, right: Tensor) -> tuple[str, str] | None:
    """The first row that is wrong, if the order of the columns is right."""
    pairs = zip(found, right, strict=True)
    wrong = (place for place, (one, other) in enumerate(pairs) if not same(one, other) or one.any() != other.any())
    row = next(wrong, None)
    if row is None:
        return None
    before = f"Row {row} is the first that is wrong, counted from 0, and the order of the columns is right."
    if found[row, :row].any():
        return "not cleared", f"{before} Left of the diagonal it should be zero: what do you subtract from this row?"
    if not right[row].any():
        return "goes on", f"{before} It should be zero: no entry that was left by then is above the tolerance."
    if not found[row].any():
        return "ends early", f"{before} It should not be zero: an entry that was left by then is above the tolerance."
    return "another row", (
        f"{before} Is it the row with the largest entry that is left, as a whole, and as the steps before have left it?"
    )


# --- Rank --------------------------------------------------------------------------------------------


def rank_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, matrix: Tensor, *sentences: str, **more: Data) -> Case:
        return Case(name, {"matrix": matrix, **more}, part, sentences)

    part, limit, bad = "rank", "tolerance", "invalid input"
    rows, result, default = "The numerical rank", "A whole number from 0", "The tolerance draws"
    example, given = "in float64 its numerical rank", "tolerance: as in `row_echelon`"
    yield case("the matrix [[1, 2, 3], [4, 5, 6], [7, 8, 9]]", part, COUNTING, rows)
    yield case("a random 3 x 5 matrix", part, draw.normal(3, 5), rows, result)
    yield case("a 6 x 4 matrix of rank 2", part, draw.low_rank(6, 4, 2), rows, default)
    yield case("the columns of the identity, swapped", part, torch.eye(4)[[1, 2, 3, 0]], rows)
    yield case("rows whose entries add up to 0", part, torch.tensor([[1.0, -1, 0], [0, 2, -2], [3, 0, -1]]), rows)
    yield case("two rows, each of them repeated", part, draw.normal(2, 5)[[0, 1, 0, 1]], rows)
    yield case("zeros", part, torch.zeros(2, 3), result)
    tiny, huge = 1e-20 * draw.low_rank(5, 5, 3), 1e20 * draw.low_rank(5, 5, 3)
    yield case("a 5 x 5 matrix of rank 3 with tiny entries", limit, tiny, default)
    yield case("a 5 x 5 matrix of rank 3 with huge entries", limit, huge, default)
    yield case("a 6 x 6 matrix of rank 2 in float32", limit, draw.low_rank(6, 6, 2).float(), default)
    yield case("the Hilbert matrix 12 x 12 in float64", limit, hilbert(12, torch.float64), example)
    yield case("the Hilbert matrix 12 x 12 in float32", limit, hilbert(12, torch.float32), example)
    diagonal = torch.diag(torch.tensor([1.0, 8, 0.25, 2]))
    yield case("pivots 8, 2, 1, 0.25 and a tolerance of 0.5", limit, diagonal, given, tolerance=0.5)
    two = torch.diag(torch.tensor([1, 1e-30], dtype=torch.float64))
    yield case("pivots 1 and 1e-30 and a tolerance of 0", limit, two, given, tolerance=0.0)
    yield case("a tensor with three axes", bad, torch.ones(2, 2, 2), "ValueError: see `row_echelon`")
    yield case("a negative tolerance", bad, COUNTING, "ValueError: see `row_echelon`", tolerance=-1.0)


def explain_count(case: Case, seen: Seen, expected: Seen) -> tuple[str, str] | None:
    """For a number that counts something: whether it is too large or too small, and by how much."""
    if not is_number(seen.value) or as_tensor(seen.value).ndim or not is_number(expected.value):
        return None
    off = float(as_tensor(seen.value).double() - as_tensor(expected.value).double())
    if math.isnan(off):
        return None
    return "too large" if off > 0 else "too small", (
        f"Your result is {'too large' if off > 0 else 'too small'} by {abs(off):,.4g}. {ASK[case_kind(expected, case)]}"
    )


ASK = {
    "rank": "Write down the echelon form of this matrix: which of its rows do you count, and which should you?",
    "deficiency": "How high could the rank of a matrix of this shape be, how high is it, and which of them is wrong?",
    "numbers": "Write down the shapes of B and A for these sizes, and count the numbers in each.",
}


def case_kind(expected: Seen, case: Case) -> str:
    return "numbers" if "rank" in case.inputs else "deficiency" if case.part == "the deficiency" else "rank"


def deficiency_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, matrix: Tensor, *sentences: str, **more: Data) -> Case:
        return Case(name, {"matrix": matrix, **more}, "the deficiency", sentences or ("How many independent rows",))

    m, n = draw.integer(3, 4), draw.integer(6, 8)
    yield case("the matrix [[1, 2, 3], [4, 5, 6], [7, 8, 9]]", COUNTING)
    yield case("a random square matrix", draw.normal(m, m))
    yield case("a wide matrix of rank 1", draw.low_rank(m, n, 1))
    yield case("a tall matrix of rank 1", draw.low_rank(n, m, 1))
    yield case("a wide matrix of full rank", draw.normal(m, n))
    yield case("zeros", torch.zeros(3, 5))
    diagonal, given = torch.diag(torch.tensor([1.0, 8, 0.25, 2])), "tolerance: as in `row_echelon`"
    yield case("pivots 8, 2, 1, 0.25 and a tolerance of 1.5", diagonal, given, tolerance=1.5)
    two = torch.diag(torch.tensor([1, 1e-30], dtype=torch.float64))
    yield case("pivots 1 and 1e-30 and a tolerance of 0", two, given, tolerance=0.0)
    yield Case("a vector", {"matrix": torch.ones(3)}, "invalid input", ("ValueError: see `row_echelon`",))


# --- Sums of outer products --------------------------------------------------------------------------


def try_outer(
    answer: Callable[..., Any], B: Tensor, A: Tensor, gradients: bool = False, layout: str = "contiguous"
) -> Any:
    """The product; or, on request, the gradients of the sum of its squares with respect to B and A.

    Args:
        layout: "transposed": both factors are views with the strides of a transposed matrix; "expanded": B is one
            column, repeated without a copy.
    """
    if layout == "transposed":
        B, A = B.T.contiguous().T, A.T.contiguous().T
    if layout == "expanded":
        B = B[:, :1].expand(-1, A.shape[0])
    if not gradients:
        return answer(B, A)
    B, A = B.requires_grad_(), A.requires_grad_()
    (answer(B, A) ** 2).sum().backward()
    return {"gradient of B": B.grad, "gradient of A": A.grad}


def outer_cases(draw: Draw) -> Iterator[Case]:
    m, n = draw.integer(4, 5), draw.integer(6, 7)

    def factors(r: int, dtype: torch.dtype = torch.float64) -> dict[str, Data]:
        return {"B": draw.normal(m, r, dtype=dtype), "A": draw.normal(r, n, dtype=dtype)}

    part, kinds, bad = "the product", "dtypes", "invalid input"
    total, shapes = "The product `B A`", ("its columns are the left", "its rows are the right")
    yield Case("one column and one row", factors(1), part, (total,))
    yield Case("two columns and two rows", factors(2), part, (total, *shapes))
    yield Case("three columns and three rows in float32", factors(3, torch.float32), part, (total, *shapes))
    square: dict[str, Data] = {"B": draw.normal(3, 3), "A": draw.normal(3, 3)}
    yield Case("square factors", square, part, (total, *shapes))
    yield Case("factors that are views of transposed matrices", {**factors(3), "layout": "transposed"}, part, (total,))
    yield Case("a column that is repeated without a copy", {**factors(3), "layout": "expanded"}, part, (total,))
    yield Case("no column and no row: r is 0", factors(0), part, ("r may be 0",))
    promoted = ("in the dtype that B and A promote to",)
    two = factors(2)
    yield Case("B in float32 and A in float64", {**two, "B": draw.normal(m, 2)}, kinds, promoted)
    yield Case("B in float64 and A in float32", {**two, "A": draw.normal(2, n)}, kinds, promoted)
    whole: dict[str, Data] = {"B": draw.integers(-9, 9, m, 2), "A": draw.integers(-9, 9, 2, n)}
    yield Case("whole numbers", whole, kinds, promoted)
    none: dict[str, Data] = {"B": torch.zeros(m, 0, dtype=torch.bfloat16), "A": torch.zeros(0, n)}
    yield Case("r is 0, B in bfloat16 and A in float32", none, kinds, promoted)
    none = {"B": torch.zeros(m, 0), "A": torch.zeros(0, n, dtype=torch.bfloat16)}
    yield Case("r is 0, B in float32 and A in bfloat16", none, kinds, promoted)
    yield Case("the gradients of the factors", {**factors(2), "gradients": True}, "gradients", ("Gradients flow",))
    refused = ("ValueError: B or A does not",)
    for columns, rows in ((2, 3), (3, 2)):
        unequal: dict[str, Data] = {"B": draw.normal(4, columns), "A": draw.normal(rows, 5)}
        yield Case(f"{columns} columns and {rows} rows", unequal, bad, refused)
    yield Case("B is a vector", {"B": draw.normal(2), "A": draw.normal(2, 5)}, bad, refused)
    yield Case("A is a vector", {"B": draw.normal(4, 2), "A": draw.normal(2)}, bad, refused)
    three: dict[str, Data] = {"B": draw.normal(4, 2, 3), "A": draw.normal(2, 5)}
    yield Case("B has three axes", three, bad, refused)
    three = {"B": draw.normal(4, 2), "A": draw.normal(2, 5, 3)}
    yield Case("A has three axes", three, bad, refused)


def explain_outer(case: Case, seen: Seen, expected: Seen) -> tuple[str, str] | None:
    if isinstance(seen.value, dict) and isinstance(expected.value, dict):
        off = [name for name, right in expected.value.items() if not same(seen.value.get(name), right)]
        if not off:
            return None
        missing = [name for name in off if seen.value.get(name) is None]
        if missing:
            return "no gradient", f"The {missing[0]} is None: somewhere it is cut off from the result."
        return "another gradient", f"The {off[0]} is wrong although the product is right. Do you use each factor once?"
    B, A, found = case.inputs["B"], case.inputs["A"], seen.value
    if not isinstance(found, Tensor) or not isinstance(B, Tensor) or not isinstance(A, Tensor):
        return None
    if found.shape != (B.shape[0], A.shape[1]) or same(found, expected.value) or not B.shape[1]:
        return None
    if case.inputs.get("layout") == "expanded":
        B = B[:, :1].expand(-1, A.shape[0])
    terms = torch.stack([torch.outer(b, a).flatten() for b, a in zip(B.T.double(), A.double(), strict=True)], dim=1)
    times = torch.linalg.lstsq(terms, found.double().flatten()[:, None]).solution
    if not same((terms @ times).flatten(), found.double().flatten()):
        return "not the r terms", "Your result is not made of the r terms: which row of A goes with which column of B?"
    weights = ", ".join(f"{time:.3g}" for time in times.flatten().tolist())
    return "terms counted wrongly", (
        f"Your result contains the terms this many times: {weights}. Each of them belongs to the sum once."
    )


# --- Numbers to store --------------------------------------------------------------------------------


def count_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, out_features: int, in_features: int, rank: int, *sentences: str) -> Case:
        inputs: dict[str, Data] = {"out_features": out_features, "in_features": in_features, "rank": rank}
        return Case(name, inputs, part, sentences)

    small, large, r = draw.integer(20, 40), draw.integer(50, 90), draw.integer(3, 9)
    sides = (
        "out_features: the number",
        "in_features: the number",
        "B has `out_features` rows",
        "A has one row per unit",
    )
    yield case("q of GPT-2 small, rank 4", "the count", 768, 768, 4, "How many numbers it takes")
    yield case("a wide matrix", "the count", small, large, r, *sides)
    yield case("a tall matrix", "the count", large, small, r, *sides)
    yield case("rank 1", "the count", small, large, 1, "rank: between 1", *sides)
    yield case("the largest possible rank", "the count", large, small, small, "rank: between 1")
    refused = ("ValueError: the rank is out of range", "rank: between 1")
    yield case("a rank above the smaller side, tall", "invalid input", large, small, small + 1, *refused)
    yield case("a rank above the smaller side, wide", "invalid input", small, large, small + 1, *refused)
    yield case("rank 0", "invalid input", small, large, 0, *refused)
    yield case("rank -1", "invalid input", small, large, -1, *refused)


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
        agree=echelon_agrees,
        tolerance=0,
        dtypes=True,
        explain=explain_echelon,
        background=("matrix: M, (m, n)",),
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
        explain=explain_count,
        background=("On paper, a change", "is invertible, so its rank", "In floating point every", "matrix: M, (m, n)"),
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
        explain=explain_count,
        background=("matrix: M, (m, n)",),
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
        dtypes=True,
        explain=explain_outer,
        background=("Every term has rank at most 1", "This is all that", "B: (m, r);", "A: (r, n);"),
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
        explain=explain_count,
        background=("For a square matrix",),
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
