"""Unit 01, rank: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.linear_algebra.rank import require_matrix, row_echelon

# --- row_echelon -------------------------------------------------------------------------------------


def default_tolerance(matrix: Tensor) -> float:
    dtype = matrix.dtype if matrix.is_floating_point() else torch.float64
    return max(matrix.shape) * torch.finfo(dtype).eps * float(matrix.abs().max())


def check_tolerance(matrix: Tensor, tolerance: float | None) -> float:
    if tolerance is None:
        return default_tolerance(matrix)
    if not math.isfinite(tolerance) or tolerance < 0:
        raise ValueError(f"no tolerance: {tolerance}")
    return tolerance


def start(matrix: Tensor, tolerance: float | None) -> tuple[Tensor, Tensor, float]:
    M = require_matrix(matrix).clone()
    return M, torch.arange(M.shape[1]), check_tolerance(M, tolerance)


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
    matrix = require_matrix(matrix)
    M = matrix.numpy().copy()
    m, n = M.shape
    order = np.arange(n)
    limit = check_tolerance(matrix, tolerance)
    for k in range(min(m, n)):
        i, j = np.unravel_index(np.abs(M[k:, k:]).argmax(), M[k:, k:].shape)
        i, j = i + k, j + k
        if abs(M[i, j]) <= limit:
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
    matrix = require_matrix(matrix)
    M = [[float(x) for x in row] for row in matrix]
    limit = check_tolerance(matrix, tolerance)
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
    rows = [row if i < done else [0.0] * n for i, row in enumerate(M)]
    return torch.tensor(rows, dtype=matrix.dtype), torch.tensor(columns)


@right("row_echelon")
def without_moving_anything_until_the_end(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    """Rows and columns stay in place; two lists say in which order they were used."""
    M = require_matrix(matrix).clone()
    limit, (m, n) = check_tolerance(M, tolerance), M.shape
    rows, columns = list(range(m)), list(range(n))
    for k in range(min(m, n)):
        block = M[rows[k:]][:, columns[k:]].abs()
        i, j = (block == block.max()).nonzero()[0].tolist()
        if block[i, j] <= limit:
            M[rows[k:]] = 0
            break
        rows[k], rows[k + i] = rows[k + i], rows[k]
        columns[k], columns[k + j] = columns[k + j], columns[k]
        p, q = rows[k], columns[k]
        for row in rows[k + 1 :]:
            M[row] = M[row] - M[row, q] / M[p, q] * M[p]
            M[row, q] = 0
    return M[rows][:, columns].contiguous(), torch.tensor(columns)


@right("row_echelon")
def recursively(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    """The first step, then the same for the block that is left, whose columns are reordered above too."""
    M = require_matrix(matrix).clone()
    limit, (m, n) = check_tolerance(M, tolerance), M.shape
    order = torch.arange(n)
    if float(M.abs().max()) <= limit:
        return torch.zeros_like(M), order
    i, j = np.unravel_index(int(M.abs().reshape(-1).argmax()), (m, n))
    order[0], order[j] = int(order[j]), int(order[0])
    M = M[[int(i), *[row if row != i else 0 for row in range(1, m)]]][:, order]
    M[1:, 1:] -= M[1:, :1] / M[0, 0] * M[:1, 1:]
    M[1:, 0] = 0
    if m > 1 and n > 1:
        M[1:, 1:], below = recursively(M[1:, 1:], limit)
        M[0, 1:] = M[0, 1:][below]
        order = torch.cat([order[:1], order[1:][below]])
    return M, order


@wrong("row_echelon", "You swap rows, but never columns: the largest entry may be in another column.")
@changed(row_echelon, ("divmod(int(echelon[k:, k:].abs().argmax()), n - k)", "(int(echelon[k:, k].abs().argmax()), 0)"))
def swaps_rows_only(): ...


@wrong("row_echelon", "You take whatever entry is at (k, k) as the pivot: it may be small, or zero.")
@changed(row_echelon, ("divmod(int(echelon[k:, k:].abs().argmax()), n - k)", "(0, 0)"))
def no_pivoting(): ...


@wrong("row_echelon", "You look for the largest entry, but pivots are compared by absolute value: -5 is better than 3.")
@changed(row_echelon, ("echelon[k:, k:].abs()", "echelon[k:, k:]"))
def forgets_the_absolute_value(): ...


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
@changed(
    row_echelon,
    ("echelon[:, [k, column]] = echelon[:, [column, k]]", "echelon[k:, [k, column]] = echelon[k:, [column, k]]"),
)
def swaps_below_only(): ...


@wrong(
    "row_echelon",
    "After your swap the same row is there twice: `M[k]` is a view of M, not a copy, and changes with it.",
)
@changed(row_echelon, ("echelon[[k, row]] = echelon[[row, k]]", "echelon[k], echelon[row] = echelon[row], echelon[k]"))
def swaps_windows(): ...


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
@changed(row_echelon, ("echelon[k + 1 :] -= ", "echelon[k + 1 :] += "))
def adds_the_rows(): ...


@wrong("row_echelon", "You ignore the tolerance that was passed in and always use the default.")
def only_the_default_tolerance(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    return row_echelon(matrix)


@wrong(
    "row_echelon",
    "An entry equal to the tolerance counts as zero. Think of a matrix of zeros, where the tolerance itself is 0.",
)
@changed(row_echelon, (".abs() <= tolerance", ".abs() < tolerance"))
def strictly_below_the_tolerance(): ...


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


@wrong(
    "row_echelon",
    "A tolerance of 0 is a tolerance: you replace it by the default. `None` is the only value that asks for that.",
)
@changed(row_echelon, ("if tolerance is None", "if not tolerance"))
def zero_is_no_tolerance(): ...


@wrong("row_echelon", "You accept a tolerance that is negative, infinite or not a number. Raise a ValueError.")
@changed(row_echelon, ("if not 0 <= tolerance < math.inf:", "if False:"))
def takes_any_tolerance(): ...


@wrong("row_echelon", "A negative tolerance raises no ValueError. Nothing is of negative size.")
@changed(row_echelon, ("if not 0 <= tolerance < math.inf:", "if not tolerance < math.inf:"))
def takes_a_negative_tolerance(): ...


@wrong("row_echelon", "You accept an infinite tolerance, for which everything counts as zero. Raise a ValueError.")
@changed(row_echelon, ("if not 0 <= tolerance < math.inf:", "if not 0 <= tolerance:"))
def takes_an_infinite_tolerance(): ...


@wrong(
    "row_echelon",
    "Below the pivot the subtraction leaves a rounding error instead of 0: a / p * p need not be a. Those entries are "
    "known, so write them.",
)
@changed(row_echelon, ("        echelon[k + 1 :, k] = 0", "        pass"))
def trusts_the_subtraction(): ...


@wrong("row_echelon", "You end in the right place, but what is left is not set to 0: rounding errors stay there.")
@changed(row_echelon, ("            echelon[k:] = 0\n", ""))
def leaves_what_counts_as_zero(): ...


@wrong("row_echelon", "If several entries are the largest, you take the last of them. The first counts, row by row.")
@changed(
    row_echelon,
    (
        "divmod(int(echelon[k:, k:].abs().argmax()), n - k)",
        "divmod((m - k) * (n - k) - 1 - int(echelon[k:, k:].abs().flip(0, 1).argmax()), n - k)",
    ),
)
def takes_the_last_of_several(): ...


@wrong(
    "row_echelon",
    "If several entries are the largest, you take the one in the first column. The first counts *row by row*.",
)
@changed(
    row_echelon,
    (
        "divmod(int(echelon[k:, k:].abs().argmax()), n - k)",
        "divmod(int(echelon[k:, k:].T.abs().argmax()), m - k)[::-1]",
    ),
)
def looks_column_by_column(): ...


@wrong(
    "row_echelon",
    "Your default tolerance is taken from the largest entry, not from the largest *absolute value*: with negative "
    "entries it is too small.",
)
@changed(
    row_echelon,
    (
        "rounding_tolerance(matrix, matrix.abs().max().item())",
        "rounding_tolerance(matrix, max(0, matrix.max().item()))",
    ),
)
def tolerance_of_the_largest_entry(): ...


@wrong("row_echelon", "Your default tolerance takes the shorter side of the matrix; it is the longer one that counts.")
@changed(
    row_echelon,
    (
        "rounding_tolerance(matrix, matrix.abs().max().item())",
        "min(matrix.shape) * torch.finfo(matrix.dtype).eps * matrix.abs().max().item()",
    ),
)
def tolerance_of_the_shorter_side(): ...


@wrong(
    "row_echelon",
    "Your default tolerance is a fixed number. Rounding errors grow with the entries, and with the size of the matrix.",
)
@changed(row_echelon, ("rounding_tolerance(matrix, matrix.abs().max().item())", "1e-10"))
def a_tolerance_for_all(): ...


@wrong(
    "row_echelon",
    "You compute in the matrix's own dtype. In bfloat16, with 8 binary digits, hardly a subtraction is right: "
    "`require_matrix` gives the computing dtype.",
)
def in_its_own_dtype(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    echelon, columns = row_echelon(matrix, tolerance)
    return echelon.to(matrix.dtype) if matrix.is_floating_point() else echelon, columns


@wrong(
    "row_echelon",
    "You return float64 whatever the matrix was. A float32 matrix stays in float32, and so does its echelon form.",
)
def always_in_float64(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    echelon, columns = row_echelon(matrix, tolerance)
    return echelon.double(), columns


@wrong(
    "row_echelon",
    "You find the pivot in all rows, those already finished included. Look at the rows and columns from k on.",
)
@changed(
    row_echelon,
    ("echelon[k:, k:].abs().argmax()), n - k)", "echelon[:, k:].abs().argmax()), n - k)"),
    ("row, column = row + k, column + k", "row, column = row, column + k"),
)
def looks_in_finished_rows(): ...


@wrong("row_echelon", "The place of the largest entry is counted within the block that is left: add k to both numbers.")
@changed(row_echelon, ("        row, column = row + k, column + k\n", ""))
def counts_within_the_block(): ...


@wrong("row_echelon", "You multiply the pivot row by the entry, without dividing by the pivot: nothing becomes zero.")
@changed(row_echelon, ("echelon[k + 1 :, k] / echelon[k, k]", "echelon[k + 1 :, k] * 1"))
def forgets_to_divide(): ...


@wrong("row_echelon", caught_by="changes its input")
def works_in_the_callers_matrix(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    echelon, columns = row_echelon(matrix, tolerance)
    matrix.copy_(echelon)
    return echelon, columns


@wrong("row_echelon", caught_by="another type")
def without_the_columns(matrix: Tensor, tolerance: float | None = None) -> Tensor:
    return row_echelon(matrix, tolerance)[0]
