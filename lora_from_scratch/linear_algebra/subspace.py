"""Comparing subspaces: what an update adds to a weight (Hu et al. 2021, section 7 and appendices G, H).

Inputs are not modified, and results carry no gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_from_scratch.linear_algebra.rank import require_matrix, require_rank, rounding_tolerance


def effective_rank(matrix: Tensor) -> float:
    """The rank as a smooth number: the exponential of the entropy of the singular values.

    `exp(-sum_k p_k ln p_k)` with `p_k = S_k / (S_1 + S_2 + ...)` and `0 ln 0 = 0` (Roy and Vetterli 2007,
    definition 1; other papers call other things "effective rank"). It is r for r equal singular values,
    and never more than the rank. It does not change when M is multiplied by a number. No tolerance is needed: a tiny
    singular value adds almost nothing.

    Args:
        matrix: M, (m, n), of any real dtype.

    Returns:
        A number from 1 to min(m, n); 0 for the zero matrix.

    Raises:
        ValueError: see `require_matrix`.
    """
    S = torch.linalg.svdvals(require_matrix(matrix)).double()
    if S[0] == 0:
        return 0.0
    p = S / S.sum()
    return float(torch.special.entr(p).sum().exp())  # entr(p) = -p ln p, and 0 at 0


def subspace_similarity(A: Tensor, B: Tensor, i: int, j: int) -> float:
    """How much of one subspace lies in another: phi in the LoRA paper (section 7.2, equation 4; appendix G).

    `phi = |V_A^T V_B|_F^2 / min(i, j)`, where V_A (n, i) holds the i right singular vectors of A with the largest
    singular values and V_B (n, j) those of B. It is the mean squared cosine of the angles between the two subspaces: 1
    if the smaller lies in the larger, 0 if they are orthogonal. For two subspaces of the same dimension p it is
    `1 - d^2 / p`, where d is their projection distance on the Grassmannian (the set of all subspaces of that
    dimension).

    Both matrices are laid out as `lora_A`, (r, in), or as a whole update, (out, in). For the subspace of the *outputs*
    of `lora_B` (out, r), pass its transpose.

    Args:
        A: (r_A, n), of any real dtype.
        B: (r_B, n), the same n; its dtype may be another.
        i: number of directions of A, between 1 and its numerical rank.
        j: number of directions of B, between 1 and its numerical rank.

    Returns:
        A number between 0 and 1, unchanged when (A, i) and (B, j) are swapped.

    Raises:
        ValueError: see `require_matrix`; A and B do not have the same number of columns; or i or j is out of range.
            Beyond the rank (singular values of at most `max(shape) * eps * S_1`) directions are arbitrary.
    """
    A, B = require_same_columns(A, B)
    _, _, V_A = top_directions(A, i, "i", "A")  # (i, n): rows, so V_A here is the transpose of the equation's
    _, _, V_B = top_directions(B, j, "j", "B")  # (j, n)
    cosines = V_A.double() @ V_B.double().T  # (i, j)
    return min(1.0, float(cosines.square().sum()) / min(i, j))  # rounding can give 1 + 1e-16


def similarity_grid(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    """`subspace_similarity` for every pair of sizes at once: the heat maps of the LoRA paper (figures 3 and 4).

    Entry (i - 1, j - 1) is phi(A, B, i, j), for i from 1 to `rows` and j from 1 to `columns`. One singular value
    decomposition of A and one of B are enough: going from i to i + 1 adds the squared cosines of one more direction of
    A and leaves the other singular vectors unchanged.

    Args:
        A: (r_A, n), of any real dtype.
        B: (r_B, n), the same n; its dtype may be another.
        rows: the largest i, between 1 and the numerical rank of A.
        columns: the largest j, between 1 and the numerical rank of B.

    Returns:
        (rows, columns), float64.

    Raises:
        ValueError: as `subspace_similarity`.
    """
    A, B = require_same_columns(A, B)
    _, _, V_A = top_directions(A, rows, "rows", "A")  # (rows, n)
    _, _, V_B = top_directions(B, columns, "columns", "B")  # (columns, n)
    cosines = V_A.double() @ V_B.double().T  # (rows, columns)
    sums = cosines.square().cumsum(dim=0).cumsum(dim=1)  # over the first i directions of A and the first j of B
    i = torch.arange(1, rows + 1)[:, None]
    j = torch.arange(1, columns + 1)[None, :]
    return sums / torch.minimum(i, j)


def amplification_factor(W: Tensor, delta_W: Tensor, rank: int) -> float:
    """How much stronger an update is than the original weight, in the update's own directions.

    `|U^T delta_W V|_F / |U^T W V|_F`, where U (m, r) and V (n, r) hold the left and right singular vectors of
    `delta_W` with the r largest singular values (Hu et al. 2021, section 7.3 and table 7). If r is the rank of
    `delta_W`, the numerator is `|delta_W|_F`. The paper's case, r = 4 on the queries of layer 48 of GPT-3, is
    6.91 / 0.32, which it prints as 21.5.

    Args:
        W: (m, n), the original weight.
        delta_W: (m, n), the update, for LoRA `s B A`; its dtype may differ from W's.
        rank: r, between 1 and the numerical rank of `delta_W`.

    Returns:
        A positive number; infinity if W is exactly zero in these directions.

    Raises:
        ValueError: see `require_matrix`; the shapes differ; or the rank is out of range (an update of zero has rank 0).
    """
    W, delta_W = require_matrix(W, "W"), require_matrix(delta_W, "delta_W")
    if W.shape != delta_W.shape:
        raise ValueError(f"W and delta_W must have one shape, got {tuple(W.shape)} and {tuple(delta_W.shape)}")
    U, S, Vh = top_directions(delta_W, rank, "rank", "delta_W")
    update = float(S.double().norm())  # U^T delta_W V = diag(S)
    before = float((U.T @ W.to(U) @ Vh.T).double().norm())  # (r, r)
    return update / before if before > 0 else math.inf


def top_directions(
    matrix: Tensor, count: int, name: str = "count", of: str = "the matrix"
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix M (m, n) and their vectors, as far as they are well defined.

    Args:
        matrix: M, from `require_matrix`.
        count: how many, between 1 and the numerical rank of M.
        name, of: how error messages refer to the count and the matrix.

    Returns:
        U (m, count), S (count,), Vh (count, n): the left vectors are columns of U, the right ones *rows* of Vh.

    Raises:
        ValueError: M is zero, or the count is out of range.
    """
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    known = int(S.gt(rounding_tolerance(matrix, float(S[0]))).sum())
    if known == 0:
        raise ValueError(f"{of} must not be zero: a zero matrix has no directions")
    require_rank(count, known, smallest=1, name=f"{name} (at most the numerical rank of {of})")
    return U[:, :count], S[:count], Vh[:count]


def require_same_columns(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Apply `require_matrix` to both and raise a ValueError unless they have the same number of columns."""
    A, B = require_matrix(A, "A"), require_matrix(B, "B")
    if A.shape[1] != B.shape[1]:
        raise ValueError(f"A and B must have the same number of columns, got {tuple(A.shape)} and {tuple(B.shape)}")
    return A, B
