"""Unit 01, counting independent rows: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.linear_algebra.rank import row_echelon


def default_tolerance(matrix: Tensor) -> float:
    dtype = matrix.dtype if matrix.is_floating_point() else torch.float64
    return max(matrix.shape) * torch.finfo(dtype).eps * float(matrix.abs().max())


# --- rank --------------------------------------------------------------------------------------------


def two_axes(matrix: Tensor, tolerance: float | None = None) -> Tensor:
    if matrix.ndim != 2:
        raise ValueError("not a matrix")
    if tolerance is not None and tolerance < 0:
        raise ValueError("a negative tolerance")
    return matrix


def counted(matrix: Tensor, tolerance: float) -> int:
    """Number of pivots above the tolerance."""
    return int(row_echelon(two_axes(matrix), tolerance)[0].any(dim=1).sum())


@right("rank")
def counts_the_diagonal(matrix: Tensor, tolerance: float | None = None) -> Tensor:
    echelon, _ = row_echelon(matrix, tolerance)
    return torch.count_nonzero(echelon.diagonal())


@right("rank")
def by_singular_values(matrix: Tensor, tolerance: float | None = None) -> int:
    values = torch.linalg.svdvals(two_axes(matrix, tolerance))
    if tolerance is None:
        tolerance = max(matrix.shape) * torch.finfo(matrix.dtype).eps * float(values[0])
    return sum(1 for value in values.tolist() if value > tolerance)


@right("rank")
def numpys(matrix: Tensor, tolerance: float | None = None) -> np.integer:
    return np.linalg.matrix_rank(two_axes(matrix, tolerance).numpy(), tol=tolerance)


@right("rank")
def goes_up_the_rows(matrix: Tensor, tolerance: float | None = None) -> int:
    echelon, _ = row_echelon(matrix, tolerance)
    return max((place for place, row in enumerate(echelon.tolist(), 1) if any(row)), default=0)


@right("rank")
def by_the_rank_of_the_transpose(matrix: Tensor, tolerance: float | None = None) -> int:
    return int((row_echelon(two_axes(matrix, tolerance).T, tolerance)[0].abs().amax(dim=1) > 0).sum())


@wrong("rank", "That is the number of axes. Tensor libraries sometimes call it rank too, but it is something else.")
def number_of_axes(matrix: Tensor, tolerance: float | None = None) -> int:
    return two_axes(matrix, tolerance).ndim


@wrong("rank", "That is the largest rank that a matrix of this shape can have. How many of its rows are independent?")
def smaller_side(matrix: Tensor, tolerance: float | None = None) -> int:
    return min(two_axes(matrix, tolerance).shape)


@wrong("rank", "You count the nonzero rows of the matrix itself. A row can be a sum of others without being zero.")
def rows_that_are_not_zero(matrix: Tensor, tolerance: float | None = None) -> int:
    return int(two_axes(matrix, tolerance).any(dim=1).sum())


@wrong("rank", "You count distinct rows. Rows can depend on each other without any two of them being equal.")
def different_rows(matrix: Tensor, tolerance: float | None = None) -> int:
    rows = {tuple(row) for row in two_axes(matrix, tolerance).tolist()}
    return len(rows - {(0.0,) * matrix.shape[1]})


@wrong("rank", "You count entries of the echelon form, not rows: a row counts once, however many entries it has.")
def counts_entries(matrix: Tensor, tolerance: float | None = None) -> int:
    return int(torch.count_nonzero(row_echelon(matrix, tolerance)[0]))


@wrong("rank", "You count the rows that are zero. Those are the ones that are missing.")
def counts_zero_rows(matrix: Tensor, tolerance: float | None = None) -> int:
    return int((~row_echelon(matrix, tolerance)[0].any(dim=1)).sum())


@wrong(
    "rank",
    "You count everything that is not exactly zero. Rounding leaves something behind almost everywhere: what is too "
    "small to count?",
)
def nothing_counts_as_zero(matrix: Tensor, tolerance: float | None = None) -> int:
    return counted(matrix, 0.0 if tolerance is None else tolerance)


@wrong(
    "rank",
    "Your tolerance is the same for every matrix. What is negligible beside entries of 1e20 is huge beside entries of "
    "1e-20.",
)
def a_fixed_tolerance(matrix: Tensor, tolerance: float | None = None) -> int:
    return counted(matrix, 1e-8 if tolerance is None else tolerance)


@wrong(
    "rank",
    "Your tolerance depends on the entries, which is right, but not on the dtype: float64 resolves much smaller "
    "differences.",
)
def float32s_tolerance(matrix: Tensor, tolerance: float | None = None) -> int:
    two_axes(matrix, tolerance)
    limit = max(matrix.shape) * torch.finfo(torch.float32).eps * float(matrix.abs().max())
    return counted(matrix, limit if tolerance is None else tolerance)


@wrong("rank", "You do not pass the tolerance on: a caller who gives one gets the result for the default.")
def forgets_the_tolerance(matrix: Tensor, tolerance: float | None = None) -> int:
    return counted(matrix, default_tolerance(matrix))


@wrong(
    "rank",
    "You count the diagonal entries of the matrix itself. Before the elimination they say nothing about the rank.",
)
def diagonal_of_the_matrix(matrix: Tensor, tolerance: float | None = None) -> int:
    return int(torch.count_nonzero(two_axes(matrix, tolerance).diagonal()))


@wrong(
    "rank",
    "A tolerance of 0 is a tolerance: you replace it by the default. `None` is the only value that asks for that.",
)
def zero_means_the_default(matrix: Tensor, tolerance: float | None = None) -> int:
    return counted(matrix, tolerance or default_tolerance(two_axes(matrix, tolerance)))


@wrong(
    "rank",
    "You add up the entries of each row of the echelon form. In a row such as (0, 2, -2) they cancel, yet the row is "
    "not zero.",
)
def rows_by_their_sums(matrix: Tensor, tolerance: float | None = None) -> int:
    return int((row_echelon(matrix, tolerance)[0].sum(dim=1) != 0).sum())


@wrong("rank", "You count columns of the echelon form that are not zero. Its rows are what counts.")
def columns_that_are_not_zero(matrix: Tensor, tolerance: float | None = None) -> int:
    return int(row_echelon(matrix, tolerance)[0].any(dim=0).sum())


@wrong(
    "rank",
    "You compute in float64 even for a float32 matrix. Its entries were rounded to float32 before: what is small "
    "beside that rounding does not count.",
)
def in_float64(matrix: Tensor, tolerance: float | None = None) -> int:
    return int(row_echelon(two_axes(matrix).double(), tolerance)[0].any(dim=1).sum())


@wrong("rank", "You return whether there is an independent row; the question is how many.")
def whether_any(matrix: Tensor, tolerance: float | None = None) -> int:
    return int(row_echelon(matrix, tolerance)[0].any())


@wrong("rank", "You are off by one: you return the position of the last row that is not zero, counted from 0.")
def position_of_the_last_row(matrix: Tensor, tolerance: float | None = None) -> int:
    return max(int(row_echelon(matrix, tolerance)[0].any(dim=1).sum()) - 1, 0)


@wrong(
    "rank",
    "You hand something other than a matrix on to the elimination as if it were one, or never let it check the input: "
    "that has to raise a ValueError.",
)
def refuses_no_input(matrix: Tensor, tolerance: float | None = None) -> int:
    return int(
        row_echelon(matrix.reshape(len(matrix), -1), None if tolerance is None else abs(tolerance))[0].any(1).sum()
    )


@wrong("rank", caught_by="shape")
def gives_the_rows(matrix: Tensor, tolerance: float | None = None) -> Tensor:
    return row_echelon(matrix, tolerance)[0].any(dim=1)


# --- rank_deficiency ---------------------------------------------------------------------------------


@right("rank_deficiency")
def from_singular_values(matrix: Tensor, tolerance: float | None = None) -> int:
    return min(matrix.shape) - by_singular_values(matrix, tolerance)


@right("rank_deficiency")
def zero_rows_of_the_shorter_side(matrix: Tensor, tolerance: float | None = None) -> int:
    m, n = two_axes(matrix).shape
    wide = matrix if m <= n else matrix.T
    return int((~row_echelon(wide, tolerance)[0].any(dim=1)).sum())


@right("rank_deficiency")
def from_numpys_rank(matrix: Tensor, tolerance: float | None = None) -> int:
    return min(len(matrix), len(two_axes(matrix).T)) - int(np.linalg.matrix_rank(matrix.numpy(), tol=tolerance))


@right("rank_deficiency")
def zeros_on_the_diagonal(matrix: Tensor, tolerance: float | None = None) -> Tensor:
    pivots = row_echelon(matrix, tolerance)[0].diagonal()
    return (pivots == 0).sum()


def library_rank(matrix: Tensor, tolerance: float | None = None) -> int:
    return int(row_echelon(matrix, tolerance)[0].any(dim=1).sum())


@wrong("rank_deficiency", "You compare with the larger side. A 3 x 5 matrix cannot have 5 independent columns.")
def from_the_larger_side(matrix: Tensor, tolerance: float | None = None) -> int:
    return max(matrix.shape) - library_rank(matrix, tolerance)


@wrong(
    "rank_deficiency",
    "You compare with the number of columns: that is the dimension of the null space. A wide matrix of full rank "
    "lacks none.",
)
def nullity(matrix: Tensor, tolerance: float | None = None) -> int:
    return matrix.shape[1] - library_rank(matrix, tolerance)


@wrong(
    "rank_deficiency", "You compare with the number of rows. A tall matrix of full rank has more rows than its rank."
)
def missing_rows(matrix: Tensor, tolerance: float | None = None) -> int:
    return matrix.shape[0] - library_rank(matrix, tolerance)


@wrong("rank_deficiency", "This is the rank: how many independent rows there are, not how many are missing.")
def the_rank_itself(matrix: Tensor, tolerance: float | None = None) -> int:
    return library_rank(matrix, tolerance)


@wrong(
    "rank_deficiency",
    "The difference is the wrong way round: the number of missing rows is not negative.",
)
def negative(matrix: Tensor, tolerance: float | None = None) -> int:
    return library_rank(matrix, tolerance) - min(matrix.shape)


@wrong(
    "rank_deficiency", "You do not pass the tolerance on: what counts as zero is then not what the caller asked for."
)
def deficiency_without_tolerance(matrix: Tensor, tolerance: float | None = None) -> int:
    return min(matrix.shape) - library_rank(matrix)


@wrong(
    "rank_deficiency",
    "A tolerance of 0 is a tolerance: you replace it by the default. `None` is the only value that asks for that.",
)
def deficiency_without_zero(matrix: Tensor, tolerance: float | None = None) -> int:
    return min(matrix.shape) - library_rank(matrix, tolerance or None)


@wrong("rank_deficiency", "A vector is no matrix: raise a ValueError, as `row_echelon` does, instead of reshaping it.")
def takes_a_vector(matrix: Tensor, tolerance: float | None = None) -> int:
    matrix = torch.atleast_2d(matrix)
    return min(matrix.shape) - library_rank(matrix, tolerance)


@wrong(
    "rank_deficiency", "You count the zero rows of the matrix itself. A row can depend on others without being zero."
)
def zero_rows_of_the_matrix(matrix: Tensor, tolerance: float | None = None) -> int:
    return int((~row_echelon(matrix, tolerance)[0].any(dim=1)).sum() * 0 + (~matrix.any(dim=1)).sum())


@wrong("rank_deficiency", "You say whether rows are missing; the question is how many.")
def whether_deficient(matrix: Tensor, tolerance: float | None = None) -> int:
    return int(library_rank(matrix, tolerance) < min(matrix.shape))


@wrong("rank_deficiency", "This is the fraction of rows that are missing. How many rows is that?")
def as_a_share(matrix: Tensor, tolerance: float | None = None) -> float:
    return 1 - library_rank(matrix, tolerance) / min(matrix.shape)
