"""Unit 02, deflation: common mistakes, and alternative right answers."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.linear_algebra import svd as reference
from lora_from_scratch.linear_algebra.rank import require_matrix, require_rank, rounding_tolerance

# --- svd_by_deflation --------------------------------------------------------------------------------


def most_of(matrix: Tensor, rank: int | None) -> int:
    return min(matrix.shape) if rank is None else require_rank(rank, min(matrix.shape))


@right("svd_by_deflation")
def torchs_svd_cut_at_the_tolerance(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    matrix = require_matrix(matrix)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    k = min(int((S > rounding_tolerance(matrix, float(S[0]))).sum()), most_of(matrix, rank))
    return U[:, :k], S[:k], Vh[:k]


@right("svd_by_deflation")
def projecting_the_matrix_itself_twice(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    matrix = require_matrix(matrix)
    m, n = matrix.shape
    us, sigmas, vs, left = [], [], [], matrix.clone()
    generator = torch.Generator().manual_seed(5)
    for _ in range(most_of(matrix, rank)):
        u, sigma, v = reference.dominant_singular_triplet(left, generator)
        if float(sigma) <= rounding_tolerance(matrix, float(sigmas[0] if sigmas else sigma)):
            break
        us, sigmas, vs = [*us, -u], [*sigmas, sigma], [*vs, -v]
        U, V = torch.stack(us, 1), torch.stack(vs, 1)
        left = matrix
        for _ in range(2):
            left = left - U @ (U.T @ left)
            left = left - (left @ V) @ V.T
    if not us:
        return matrix.new_zeros(m, 0), matrix.new_zeros(0), matrix.new_zeros(0, n)
    return torch.stack(us, 1), torch.stack(sigmas), torch.stack(vs)


@right("svd_by_deflation")
def in_numpy(matrix: Tensor, rank: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    most = most_of(matrix, rank) if matrix.ndim == 2 else require_matrix(matrix)
    U, S, Vh = np.linalg.svd(require_matrix(matrix).numpy(), full_matrices=False)
    k = int((S[0] * max(matrix.shape) * np.finfo(S.dtype).eps < S).sum())
    return U[:, : min(k, most)], S[: min(k, most)], Vh[: min(k, most)]


@right("svd_by_deflation")
def deflating_a_copy_in_place(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    matrix = require_matrix(matrix)
    most, left = most_of(matrix, rank), matrix.clone()
    triplets: list[tuple[Tensor, Tensor, Tensor]] = []
    generator = torch.Generator().manual_seed(1)
    while len(triplets) < most:
        triplet = reference.dominant_singular_triplet(left, generator)
        if triplet[1] <= rounding_tolerance(matrix, float((triplets or [triplet])[0][1])):
            break
        triplets.append(triplet)
        left -= triplet[1] * triplet[0][:, None] * triplet[2]
        for u, _, v in triplets * 2:
            left -= torch.outer(u, u @ left)
            left -= torch.outer(left @ v, v)
    parts = [torch.stack(part) if part else None for part in (list(part) for part in zip(*triplets, strict=True))]
    if not triplets:
        return matrix[:, :0], matrix[0, :0], matrix[:0]
    return parts[0].T, parts[1], parts[2]


def deflate(matrix: Tensor, rank: int | None, subtract=None, threshold=None) -> tuple[Tensor, Tensor, Tensor]:
    """Deflation with one step changed."""
    matrix = require_matrix(matrix)
    most = most_of(matrix, rank)
    U, S, Vh = matrix[:, :0], matrix[0, :0], matrix[:0]
    generator = torch.Generator().manual_seed(0)
    residual = matrix
    while len(S) < most:
        u, sigma, v = reference.dominant_singular_triplet(residual, generator=generator)
        first = float(S[0] if len(S) else sigma)
        if sigma <= (rounding_tolerance(matrix, first) if threshold is None else threshold):
            break
        U, S, Vh = torch.column_stack([U, u]), torch.cat([S, sigma[None]]), torch.vstack([Vh, v])
        if subtract is not None:
            residual = subtract(residual, u, sigma, v)
        else:
            residual = residual - sigma * torch.outer(u, v)
            residual = residual - U @ (U.T @ residual)
            residual = residual - (residual @ Vh.T) @ Vh
    return U, S, Vh


@wrong(
    "svd_by_deflation",
    "You find the same triplet again and again: subtract each one from the matrix before you look for the next.",
)
def never_subtracts(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return deflate(matrix, rank, lambda residual, u, sigma, v: residual)


@wrong(
    "svd_by_deflation",
    "You subtract u v^T by itself. How strong is that direction in M? That is how much of it has to be subtracted.",
)
def subtracts_without_sigma(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return deflate(matrix, rank, lambda residual, u, sigma, v: residual - torch.outer(u, v))


@wrong(
    "svd_by_deflation",
    "Where the singular values differ by many orders of magnitude, your later vectors are not orthogonal to the "
    "earlier ones: the subtraction leaves rounding errors along the old directions, and beside a tiny sigma they "
    "are large.",
)
def never_projects_the_old_directions_out(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return deflate(matrix, rank, lambda residual, u, sigma, v: residual - sigma * torch.outer(u, v))


@wrong(
    "svd_by_deflation",
    "You always return min(m, n) triplets. Once only rounding error is left of the matrix, stop.",
)
def never_stops_early(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    matrix = require_matrix(matrix)
    k = most_of(matrix, rank)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :k], S[:k], Vh[:k]


@wrong(
    "svd_by_deflation",
    "Your threshold for zero is a fixed number. How large rounding errors are depends on the size of the matrix and "
    "on its dtype: choose it relative to the largest singular value.",
)
def stops_at_a_fixed_threshold(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return deflate(matrix, rank, threshold=1e-6)


@wrong(
    "svd_by_deflation",
    "Your third result has the right singular vectors as columns; it should have them as rows, so that the product of "
    "all three is M.",
)
def returns_v_not_transposed(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = reference.svd_by_deflation(matrix, rank)
    return U, S, Vh.T


@wrong("svd_by_deflation", "You ignore `rank`, the largest number of triplets to return.")
def ignores_the_rank(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    most_of(require_matrix(matrix), rank)
    return reference.svd_by_deflation(matrix)


@wrong(
    "svd_by_deflation",
    "You project the old directions out on one side only: the columns of U are orthogonal, the rows of Vh are not (or "
    "the other way round). R has to lose both.",
)
def projects_on_the_left_only(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return project(matrix, rank, left=True, right=False)


@wrong(
    "svd_by_deflation",
    "You project the old right directions out, but not the old left ones: the rows of Vh are orthogonal, the columns "
    "of U are not.",
)
def projects_on_the_right_only(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return project(matrix, rank, left=False, right=True)


def project(matrix: Tensor, rank: int | None, left: bool, right: bool) -> tuple[Tensor, Tensor, Tensor]:
    us: list[Tensor] = []
    vs: list[Tensor] = []

    def subtract(residual: Tensor, u: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
        us.append(u)
        vs.append(v)
        residual = residual - sigma * torch.outer(u, v)
        U, V = torch.stack(us, 1), torch.stack(vs, 1)
        residual = residual - U @ (U.T @ residual) if left else residual
        return residual - (residual @ V) @ V.T if right else residual

    return deflate(matrix, rank, subtract)


@wrong("svd_by_deflation", "A rank of 0 asks for no triplet at all; you return all of them. Only None asks for all.")
def zero_means_all(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return reference.svd_by_deflation(matrix, rank or None)


@wrong("svd_by_deflation", "You accept a rank that is negative or larger than the smaller side. Raise a ValueError.")
def accepts_any_rank(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    matrix = require_matrix(matrix)
    return reference.svd_by_deflation(matrix, None if rank is None else max(0, min(rank, *matrix.shape)))


@wrong(
    "svd_by_deflation", "You compare the rank with the larger side. There are only as many triplets as the smaller has."
)
def up_to_the_larger_side(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    matrix = require_matrix(matrix)
    most = None if rank is None else min(require_rank(rank, max(matrix.shape)), *matrix.shape)
    return reference.svd_by_deflation(matrix, most)


@wrong("svd_by_deflation", "Your results are in float64. They should be in the computing dtype of the matrix.")
def deflates_in_float64(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = reference.svd_by_deflation(matrix, rank)
    return U.double(), S.double(), Vh.double()


@wrong("svd_by_deflation", "Your singular values come smallest first; the largest belongs first.")
def smallest_first(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = reference.svd_by_deflation(matrix, rank)
    return U.flip(1), S.flip(0), Vh.flip(0)


@wrong("svd_by_deflation", "You return the singular values multiplied into U. The columns of U should have length 1.")
def u_times_s(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = reference.svd_by_deflation(matrix, rank)
    return U * S, S, Vh


@wrong("svd_by_deflation", "A vector is no matrix: raise a ValueError, as `require_matrix` does.")
def of_a_vector_too(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return reference.svd_by_deflation(torch.atleast_2d(matrix), rank)


@wrong("svd_by_deflation", caught_by="changes its input")
def deflates_the_callers_matrix(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = reference.svd_by_deflation(matrix, rank)
    matrix -= (U * S @ Vh).to(matrix.dtype)
    return U, S, Vh
