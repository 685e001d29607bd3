"""The rank of a matrix: how many independent rows it has, found by Gaussian elimination.

Every function takes a matrix M of shape (m, n) and does not modify it. Results carry no gradients, except that of
`outer_product_sum`, which is plain arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# --- Validation, shared with svd.py ------------------------------------------------------------------


def require_matrix(matrix: Tensor, name: str = "matrix") -> Tensor:
    """Return the matrix in the computing dtype, detached from the graph; copied only where necessary.

    float32 and float64 stay as they are, integers and booleans become float64, float16 and bfloat16 become float32.
    This is "the computing dtype" of the other docstrings.

    Raises:
        ValueError: it is not a tensor, does not have exactly two axes, has no entries, is complex, or holds NaN or
            infinity.
    """
    if not isinstance(matrix, Tensor):
        raise ValueError(f"{name} must be a torch tensor, got {type(matrix).__name__}: wrap it in torch.tensor(...)")
    if matrix.ndim != 2:
        raise ValueError(
            f"{name} must have two axes (rows, columns), got {matrix.ndim} in shape {tuple(matrix.shape)}: "
            "the rank of a matrix is not the number of axes of a tensor"
        )
    if matrix.numel() == 0:
        raise ValueError(f"{name} must have at least one row and one column, got shape {tuple(matrix.shape)}")
    if matrix.is_complex():
        raise ValueError(f"{name} must be real, got {matrix.dtype}: use .real, or torch.linalg for complex matrices")
    finite = torch.isfinite(matrix)
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite, got {matrix[row, column].item()} at row {row}, column {column}")
    if not matrix.is_floating_point():
        return matrix.detach().to(torch.float64)
    return matrix.detach().to(matrix.dtype if matrix.dtype in (torch.float32, torch.float64) else torch.float32)


def require_rank(rank: int, largest: int, smallest: int = 0, name: str = "rank") -> int:
    """Return the rank if it is a whole number from `smallest` to `largest`; otherwise raise a ValueError."""
    if isinstance(rank, bool) or not isinstance(rank, int) or not smallest <= rank <= largest:
        raise ValueError(f"{name} must be a whole number between {smallest} and {largest}, got {rank!r}")
    return rank


def rounding_tolerance(matrix: Tensor, scale: float) -> float:
    """`max(m, n) * eps * scale`: what counts as zero in a floating-point matrix whose entries have the size `scale`.

    `eps` is the gap between 1 and the next number of the matrix's dtype (1.2e-7 in float32, 2.2e-16 in float64).
    The formula is the default of numpy and torch's `matrix_rank`, where the scale is the largest singular value.
    """
    return max(matrix.shape) * torch.finfo(matrix.dtype).eps * scale


# --- Rank --------------------------------------------------------------------------------------------


def row_echelon(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    """Gaussian elimination with complete pivoting.

    Step k looks for the entry of largest absolute value among the rows and columns from k on (the first, row by
    row, if several are equal), swaps it to position (k, k), and subtracts multiples of row k from the rows below so
    that they are zero in column k. When that largest entry is not above the tolerance, everything that is left counts
    as zero, is set to exactly 0, and the elimination ends.

    Because columns are swapped too, their order is returned (Golub and Van Loan, section 3.4.6).

    Example: the matrix [[1, 2], [3, -4]] becomes [[-4, 3], [0, 2.5]], with the columns in the order [1, 0].

    Args:
        matrix: M, (m, n).
        tolerance: an entry of at most this absolute value counts as zero; at least 0. None means
            `max(m, n) * eps * max |M_ij|` (`rounding_tolerance`).

    Returns:
        echelon: (m, n), the computing dtype. Entries below the diagonal and the rows after the last pivot are exactly
            0; the pivots are its diagonal.
        columns: (n,), int64: column j of `echelon` comes from column `columns[j]` of M.

    Raises:
        ValueError: as `require_matrix`; or the tolerance is negative or not a finite number.
    """
    matrix = require_matrix(matrix)
    if tolerance is None:
        tolerance = rounding_tolerance(matrix, matrix.abs().max().item())
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a finite number of at least 0, got {tolerance}")
    m, n = matrix.shape
    echelon, columns = matrix.clone(), torch.arange(n, device=matrix.device)
    for k in range(min(m, n)):
        row, column = divmod(int(echelon[k:, k:].abs().argmax()), n - k)  # counted from (k, k)
        row, column = row + k, column + k
        if echelon[row, column].abs() <= tolerance:
            echelon[k:] = 0
            break
        echelon[[k, row]] = echelon[[row, k]]
        echelon[:, [k, column]] = echelon[:, [column, k]]
        columns[[k, column]] = columns[[column, k]]
        multiples = echelon[k + 1 :, k] / echelon[k, k]  # (m - k - 1,), none above 1 in absolute value
        echelon[k + 1 :] -= torch.outer(multiples, echelon[k])
        echelon[k + 1 :, k] = 0  # what the subtraction gives but for rounding
    return echelon, columns


def rank(matrix: Tensor, tolerance: float | None = None) -> int:
    """The numerical rank: how many rows of the echelon form are not zero.

    On paper, a change of 1e-20 in one entry can raise the rank. In floating point every entry carries such a change, so
    the question becomes: how many independent rows are there that rounding alone cannot explain? The tolerance draws
    the line. Example: the Hilbert matrix `1 / (i + j + 1)` of size 12 x 12 is invertible, so its rank is 12; in float64
    its numerical rank is only 11 and in float32 only 6.

    Args:
        matrix: M, (m, n).
        tolerance: as in `row_echelon`.

    Returns:
        A whole number from 0 (only for the zero matrix, with the default tolerance) to min(m, n).

    Raises:
        ValueError: see `row_echelon`.
    """
    echelon, _ = row_echelon(matrix, tolerance)
    return int(echelon.any(dim=1).sum())


def rank_deficiency(matrix: Tensor, tolerance: float | None = None) -> int:
    """How many independent rows or columns a matrix lacks to have full rank, the highest that its shape allows.

    Args:
        matrix: M, (m, n).
        tolerance: as in `row_echelon`.

    Raises:
        ValueError: see `row_echelon`.
    """
    return min(require_matrix(matrix).shape) - rank(matrix, tolerance)


# --- Matrices of low rank ----------------------------------------------------------------------------


def outer_product_sum(B: Tensor, A: Tensor) -> Tensor:
    """The product `B A`, written as a sum of r matrices of rank 1: `sum_k B[:, k] A[k, :]^T`.

    Every term has rank at most 1, so the sum has rank at most r, however large m and n are. This is all that
    "low-rank" in LoRA means (Hu et al. 2021, section 4.1: the update of W is B A).

    Args:
        B: (m, r); its columns are the left factors.
        A: (r, n); its rows are the right factors. r may be 0: the sum of no terms is the zero matrix.

    Returns:
        (m, n), in the dtype that B and A promote to. Gradients flow to both.

    Raises:
        ValueError: B or A does not have two axes, or B does not have as many columns as A has rows.
    """
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise ValueError(
            f"B must be (m, r) and A (r, n) with the same r, got B {tuple(B.shape)} and A {tuple(A.shape)}"
        )
    total = torch.zeros(B.shape[0], A.shape[1], dtype=torch.promote_types(B.dtype, A.dtype), device=B.device)
    for column, row in zip(B.T, A, strict=True):  # (m,), (n,)
        total = total + torch.outer(column, row)
    return total


def low_rank_parameter_count(out_features: int, in_features: int, rank: int) -> int:
    """How many numbers it takes to store `B A` as its two factors instead of multiplied out.

    B has `out_features` rows and one column per unit of rank; A has one row per unit of rank and `in_features` columns.
    For a square matrix the two hold fewer numbers than the product only while the rank is below half the side.

    Args:
        out_features: the number of rows of B.
        in_features: the number of columns of A.
        rank: between 1 and the smaller side: a larger one cannot raise the rank of the product any further.

    Raises:
        ValueError: the rank is out of range.
    """
    require_rank(rank, min(out_features, in_features), smallest=1)
    return rank * (out_features + in_features)


def check_rank(rank: int, largest: int, why: str) -> None:
    """Raise an error if a rank is out of range.

    Args:
        why: what sets the limit, for the message: "the smaller side of W".

    Raises:
        ValueError: the rank is not from 1 to `largest`.
    """
    if not 1 <= rank <= largest:
        raise ValueError(f"rank must be between 1 and {largest} ({why}), got {rank}")
