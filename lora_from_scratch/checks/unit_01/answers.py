"""Unit 01, rank: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.linear_algebra.rank import row_echelon

# --- row_echelon -------------------------------------------------------------------------------------


def default_tolerance(matrix: Tensor) -> float:
    dtype = matrix.dtype if matrix.is_floating_point() else torch.float64
    return max(matrix.shape) * torch.finfo(dtype).eps * float(matrix.abs().max())


def start(matrix: Tensor, tolerance: float | None) -> tuple[Tensor, Tensor, float]:
    M = matrix.clone() if matrix.is_floating_point() else matrix.double()
    return M, torch.arange(M.shape[1]), default_tolerance(matrix) if tolerance is None else tolerance


def largest(M: Tensor, k: int) -> tuple[int, int]:
    row, column = divmod(int(M[k:, k:].abs().argmax()), M.shape[1] - k)
    return row + k, column + k


def swap(M: Tensor, columns: Tensor, k: int, row: int, column: int) -> None:
    M[[k, row]] = M[[row, k]]
    M[:, [k, column]] = M[:, [column, k]]
    columns[[k, column]] = columns[[column, k]]


def clear(M: Tensor, k: int) -> None:
    M[k + 1 :] -= torch.outer(M[k + 1 :, k] / M[k, k], M[k])
    M[k + 1 :, k] = 0


@right("row_echelon")
def row_by_row_in_numpy(matrix: Tensor, tolerance: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    M = matrix.numpy().astype(np.float64)
    m, n = M.shape
    order = np.arange(n)
    if tolerance is None:
        tolerance = default_tolerance(matrix)
    for k in range(min(m, n)):
        i, j = np.unravel_index(np.abs(M[k:, k:]).argmax(), M[k:, k:].shape)
        i, j = i + k, j + k
        if abs(M[i, j]) <= tolerance:
            M[k:] = 0
            break
        M[[k, i]] = M[[i, k]]
        M[:, [k, j]] = M[:, [j, k]]
        order[[k, j]] = order[[j, k]]
        for row in range(k + 1, m):
            M[row] -= M[row, k] / M[k, k] * M[k]
            M[row, k] = 0
    return M, order


@right("row_echelon")
def with_lists(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, list[int]]:
    """On nested lists of Python numbers."""
    M = [[float(x) for x in row] for row in matrix]
    limit = default_tolerance(matrix) if tolerance is None else tolerance
    m, n = len(M), len(M[0])
    columns, done = list(range(n)), 0
    while done < min(m, n):
        size, i, j = max(((abs(M[i][j]), -i, -j) for i in range(done, m) for j in range(done, n)))
        i, j = -i, -j
        if size <= limit:
            break
        M[done], M[i] = M[i], M[done]
        for row in M:
            row[done], row[j] = row[j], row[done]
        columns[done], columns[j] = columns[j], columns[done]
        for i in range(done + 1, m):
            ratio = M[i][done] / M[done][done]
            M[i] = [0.0 if c <= done else x - ratio * p for c, (x, p) in enumerate(zip(M[i], M[done], strict=True))]
        done += 1
    return torch.tensor([row if i < done else [0.0] * n for i, row in enumerate(M)]), torch.tensor(columns)


@wrong("row_echelon", "You swap rows, but never columns: the largest entry may be in another column.")
def swaps_rows_only(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    M, columns, limit = start(matrix, tolerance)
    for k in range(min(M.shape)):
        row = k + int(M[k:, k].abs().argmax())
        if M[row, k].abs() <= limit:
            M[k:] = 0
            break
        swap(M, columns, k, row, k)
        clear(M, k)
    return M, columns


@wrong("row_echelon", "You take whatever entry is at (k, k) as the pivot: it may be small, or zero.")
def no_pivoting(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    M, columns, limit = start(matrix, tolerance)
    for k in range(min(M.shape)):
        if M[k, k].abs() <= limit:
            M[k:] = 0
            break
        clear(M, k)
    return M, columns


@wrong("row_echelon", "You look for the largest entry, but pivots are compared by absolute value: -5 is better than 3.")
def forgets_the_absolute_value(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    M, columns, limit = start(matrix, tolerance)
    for k in range(min(M.shape)):
        row, column = divmod(int(M[k:, k:].argmax()), M.shape[1] - k)
        row, column = row + k, column + k
        if M[row, column].abs() <= limit:
            M[k:] = 0
            break
        swap(M, columns, k, row, column)
        clear(M, k)
    return M, columns


@wrong("row_echelon", "You swap the columns of the matrix, but the order that you return does not reflect it.")
def forgets_the_order(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    echelon, columns = row_echelon(matrix, tolerance)
    return echelon, torch.arange(len(columns))


@wrong(
    "row_echelon",
    "The order that you return says where each column of M went; it has to say where each column of the result came "
    "from.",
)
def gives_the_inverse_order(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    echelon, columns = row_echelon(matrix, tolerance)
    return echelon, columns.argsort()


@wrong(
    "row_echelon",
    "You swap columns only in the rows that are left. Swap the whole column, including the finished rows above.",
)
def swaps_below_only(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    M, columns, limit = start(matrix, tolerance)
    for k in range(min(M.shape)):
        row, column = largest(M, k)
        if M[row, column].abs() <= limit:
            M[k:] = 0
            break
        M[[k, row]] = M[[row, k]]
        M[k:, [k, column]] = M[k:, [column, k]]
        columns[[k, column]] = columns[[column, k]]
        clear(M, k)
    return M, columns


@wrong(
    "row_echelon",
    "After your swap the same row is there twice: `M[k]` is a view of M, not a copy, and changes with it.",
)
def swaps_windows(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    M, columns, limit = start(matrix, tolerance)
    for k in range(min(M.shape)):
        row, column = largest(M, k)
        if M[row, column].abs() <= limit:
            M[k:] = 0
            break
        M[k], M[row] = M[row], M[k]
        M[:, [k, column]] = M[:, [column, k]]
        columns[[k, column]] = columns[[column, k]]
        clear(M, k)
    return M, columns


@wrong(
    "row_echelon",
    "You clear the column above the pivot as well. That is the reduced form; here only the rows below change.",
)
def gauss_jordan(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    M, columns, limit = start(matrix, tolerance)
    for k in range(min(M.shape)):
        row, column = largest(M, k)
        if M[row, column].abs() <= limit:
            M[k:] = 0
            break
        swap(M, columns, k, row, column)
        clear(M, k)
        M[:k] -= torch.outer(M[:k, k] / M[k, k], M[k])
    return M, columns


@wrong(
    "row_echelon",
    "You divide each row by its pivot. Here the pivots stay as they are: their size shows how much is left.",
)
def pivots_of_one(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    M, columns, limit = start(matrix, tolerance)
    for k in range(min(M.shape)):
        row, column = largest(M, k)
        if M[row, column].abs() <= limit:
            M[k:] = 0
            break
        swap(M, columns, k, row, column)
        M[k] = M[k] / M[k, k]
        clear(M, k)
    return M, columns


@wrong("row_echelon", "You add the multiple of the pivot row. To make the entry zero it has to be subtracted.")
def adds_the_rows(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    M, columns, limit = start(matrix, tolerance)
    for k in range(min(M.shape)):
        row, column = largest(M, k)
        if M[row, column].abs() <= limit:
            M[k:] = 0
            break
        swap(M, columns, k, row, column)
        M[k + 1 :] += torch.outer(M[k + 1 :, k] / M[k, k], M[k])
        M[k + 1 :, k] = 0
    return M, columns


@wrong("row_echelon", "You ignore the tolerance that was passed in and always use the default.")
def only_the_default_tolerance(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    return row_echelon(matrix)


@wrong(
    "row_echelon",
    "An entry equal to the tolerance counts as zero. Think of a matrix of zeros, where the tolerance itself is 0.",
)
def strictly_below_the_tolerance(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    M, columns, limit = start(matrix, tolerance)
    for k in range(min(M.shape)):
        row, column = largest(M, k)
        if M[row, column].abs() < limit:
            M[k:] = 0
            break
        swap(M, columns, k, row, column)
        clear(M, k)
    return M, columns


@wrong(
    "row_echelon", "When only rounding error is left, you still divide by it: rounding errors become rows of their own."
)
def never_stops(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    M, columns, _ = start(matrix, tolerance)
    for k in range(min(M.shape)):
        row, column = largest(M, k)
        swap(M, columns, k, row, column)
        M[k + 1 :] -= torch.outer(M[k + 1 :, k] / M[k, k], M[k])
    return M / M.abs().max(), columns


@wrong("row_echelon", caught_by="changes its input")
def works_in_the_callers_matrix(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    echelon, columns = row_echelon(matrix, tolerance)
    matrix.copy_(echelon)
    return echelon, columns


@wrong("row_echelon", caught_by="another type")
def without_the_columns(matrix: Tensor, tolerance: float | None = None) -> Tensor:
    return row_echelon(matrix, tolerance)[0]


# --- rank --------------------------------------------------------------------------------------------


def two_axes(matrix: Tensor) -> Tensor:
    if matrix.ndim != 2:
        raise ValueError("not a matrix")
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
    values = torch.linalg.svdvals(two_axes(matrix))
    if tolerance is None:
        tolerance = max(matrix.shape) * torch.finfo(matrix.dtype).eps * float(values[0])
    return sum(1 for value in values.tolist() if value > tolerance)


@right("rank")
def numpys(matrix: Tensor, tolerance: float | None = None) -> np.integer:
    return np.linalg.matrix_rank(two_axes(matrix).numpy(), tol=tolerance)


@wrong("rank", "That is the number of axes. Tensor libraries sometimes call it rank too, but it is something else.")
def number_of_axes(matrix: Tensor, tolerance: float | None = None) -> int:
    return two_axes(matrix).ndim


@wrong("rank", "That is the largest rank that a matrix of this shape can have. How many of its rows are independent?")
def smaller_side(matrix: Tensor, tolerance: float | None = None) -> int:
    return min(two_axes(matrix).shape)


@wrong("rank", "You count the nonzero rows of the matrix itself. A row can be a sum of others without being zero.")
def rows_that_are_not_zero(matrix: Tensor, tolerance: float | None = None) -> int:
    return int(two_axes(matrix).any(dim=1).sum())


@wrong("rank", "You count distinct rows. Rows can depend on each other without any two of them being equal.")
def different_rows(matrix: Tensor, tolerance: float | None = None) -> int:
    rows = {tuple(row) for row in two_axes(matrix).tolist()}
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
    two_axes(matrix)
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
    return int(torch.count_nonzero(two_axes(matrix).diagonal()))


@wrong("rank", caught_by="shape")
def gives_the_rows(matrix: Tensor, tolerance: float | None = None) -> Tensor:
    return row_echelon(matrix, tolerance)[0].any(dim=1)


# --- rank_deficiency ---------------------------------------------------------------------------------


@right("rank_deficiency")
def from_singular_values(matrix: Tensor, tolerance: float | None = None) -> int:
    return min(matrix.shape) - by_singular_values(matrix, tolerance)


@right("rank_deficiency")
def zero_rows_of_the_shorter_side(matrix: Tensor, tolerance: float | None = None) -> int:
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return int((~row_echelon(wide, tolerance)[0].any(dim=1)).sum())


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


@wrong("rank_deficiency", "You say whether rows are missing; the question is how many.")
def whether_deficient(matrix: Tensor, tolerance: float | None = None) -> int:
    return int(library_rank(matrix, tolerance) < min(matrix.shape))


@wrong("rank_deficiency", "This is the fraction of rows that are missing. How many rows is that?")
def as_a_share(matrix: Tensor, tolerance: float | None = None) -> float:
    return 1 - library_rank(matrix, tolerance) / min(matrix.shape)


# --- outer_product_sum -------------------------------------------------------------------------------


def same_r(B: Tensor, A: Tensor) -> None:
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise ValueError("the factors do not fit")


@right("outer_product_sum")
def the_matrix_product(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return B @ A


@right("outer_product_sum")
def all_terms_at_once(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return (B[:, :, None] * A[None]).sum(dim=1)


@right("outer_product_sum")
def by_einstein(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return torch.einsum("ik,kj->ij", B.double(), A.double())


@wrong(
    "outer_product_sum",
    "You sum the columns of B and the rows of A first, and multiply once. That pairs column k with rows other than "
    "row k.",
)
def sums_first(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return torch.outer(B.sum(dim=1), A.sum(dim=0))


@wrong("outer_product_sum", "You return only the first term; the others have to be added.")
def first_term_only(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return torch.outer(B[:, 0], A[0]) if B.shape[1] else torch.zeros(B.shape[0], A.shape[1])


@wrong("outer_product_sum", "You keep only the last term: the loop overwrites the sum instead of adding to it.")
def last_term_only(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    total = torch.zeros(B.shape[0], A.shape[1])
    for k in range(B.shape[1]):
        total = torch.outer(B[:, k], A[k])
    return total


@wrong("outer_product_sum", "You take the mean of the terms. They have to be added up.")
def mean_of_the_terms(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return B @ A / max(B.shape[1], 1)


@wrong("outer_product_sum", "The result is transposed: entry (i, j) belongs to row i of B and column j of A.")
def turned_round(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return A.T @ B.T


@wrong(
    "outer_product_sum",
    "The values are right, but no gradient flows back to B and A: somewhere they are detached from the graph. LoRA "
    "trains exactly these two.",
)
def without_gradients(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    total = torch.zeros(B.shape[0], A.shape[1], dtype=B.dtype, requires_grad=True)
    for k in range(B.shape[1]):
        total = (total + torch.outer(B[:, k].detach(), A[k].detach())).detach()
    return total


@wrong(
    "outer_product_sum",
    "Gradients flow back to A, but not to B. Both factors are trained.",
)
def gradient_of_one_factor(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return B.detach() @ A


@wrong(
    "outer_product_sum",
    "Two columns and three rows: `zip` silently stops at the shorter of the two. Raise a ValueError instead.",
)
def stops_at_the_shorter(B: Tensor, A: Tensor) -> Tensor:
    total = torch.zeros(B.shape[0], A.shape[1], dtype=B.dtype)
    for column, row in zip(B.T, A):
        total = total + torch.outer(column, row)
    return total


@wrong(
    "outer_product_sum", "With r = 0 there are no terms, and the sum of no terms is a matrix of zeros, not an error."
)
def needs_a_term(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    total = torch.outer(B[:, 0], A[0])
    for k in range(1, B.shape[1]):
        total = total + torch.outer(B[:, k], A[k])
    return total


@wrong("outer_product_sum", caught_by="another type")
def a_list_of_terms(B: Tensor, A: Tensor) -> list[Tensor]:
    return [torch.outer(B[:, k], A[k]) for k in range(B.shape[1])]


# --- low_rank_parameter_count ------------------------------------------------------------------------


def possible(out_features: int, in_features: int, rank: int) -> None:
    if rank < 1 or rank > min(out_features, in_features):
        raise ValueError("no such rank")


@right("low_rank_parameter_count")
def counts_two_tensors(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, rank)
    with torch.device("meta"):
        return torch.empty(out_features, rank).numel() + torch.empty(rank, in_features).numel()


@right("low_rank_parameter_count")
def one_term_at_a_time(out_features: int, in_features: int, rank: int) -> int:
    if rank not in range(1, min(out_features, in_features) + 1):
        raise ValueError(f"rank {rank}")
    return sum(out_features + in_features for _ in range(rank))


@wrong("low_rank_parameter_count", "These are the numbers of the full matrix. How many are in its two factors?")
def the_full_matrix(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, rank)
    return out_features * in_features


@wrong(
    "low_rank_parameter_count", "You count only one factor. There are two: B has as many rows as W, A as many columns."
)
def only_a(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, rank)
    return rank * in_features


@wrong(
    "low_rank_parameter_count",
    "You count only one factor. There are two: the one you leave out has as many columns as W.",
)
def only_b(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, rank)
    return rank * out_features


@wrong("low_rank_parameter_count", "The rank belongs to both factors: without parentheses it multiplies one of them.")
def without_parentheses(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, rank)
    return rank * out_features + in_features


@wrong(
    "low_rank_parameter_count", "You count each of the r terms multiplied out. Each is stored as a column and a row."
)
def terms_multiplied_out(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, rank)
    return rank * out_features * in_features


@wrong("low_rank_parameter_count", "You treat the matrix as square: B has as many rows as W, A has as many columns.")
def as_if_square(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, rank)
    return 2 * rank * out_features


@wrong(
    "low_rank_parameter_count",
    "You also count a scale for each term. It is already contained in B and A: nothing stands between the two factors.",
)
def with_singular_values(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, rank)
    return rank * (out_features + in_features + 1)


@wrong(
    "low_rank_parameter_count",
    "A rank above the smaller side cannot raise the rank of the product: raise a ValueError.",
)
def any_rank_will_do(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, min(rank, out_features, in_features))
    return rank * (out_features + in_features)


@wrong(
    "low_rank_parameter_count",
    "With rank 0 there is nothing to store and nothing to train: that has to raise a ValueError too.",
)
def rank_zero_is_free(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, max(rank, 1))
    return rank * (out_features + in_features)


@wrong(
    "low_rank_parameter_count", "Some ranks are impossible, too small or too large: those have to raise a ValueError."
)
def refuses_nothing(out_features: int, in_features: int, rank: int) -> int:
    return rank * (out_features + in_features)
