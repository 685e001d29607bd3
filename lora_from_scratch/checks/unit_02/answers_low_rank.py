"""Unit 02, using the singular value decomposition: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.linear_algebra import svd as reference
from lora_from_scratch.linear_algebra.rank import require_matrix

# --- truncate ----------------------------------------------------------------------------------------


def need(rank: int, matrix: Tensor) -> None:
    if not 0 <= rank <= min(matrix.shape):
        raise ValueError(f"rank must be between 0 and {min(matrix.shape)}, got {rank}")


def need_count(count: int, data: Tensor) -> None:
    if not 1 <= count <= min(data.shape):
        raise ValueError(f"count must be between 1 and {min(data.shape)}, got {count}")


@right("truncate")
def with_the_tail_of_s_set_to_zero(matrix: Tensor, rank: int) -> np.ndarray:
    need(rank, matrix)
    U, S, Vh = np.linalg.svd(require_matrix(matrix).numpy(), full_matrices=False)
    S[rank:] = 0
    return U @ np.diag(S) @ Vh


@right("truncate")
def as_a_projection(matrix: Tensor, rank: int) -> Tensor:
    need(rank, matrix)
    M = require_matrix(matrix)
    V = torch.linalg.eigh(M.double().T @ M.double())[1].flip(1)[:, :rank].to(M.dtype)
    return M @ V @ V.T


@right("truncate")
def as_a_sum_of_triplets(matrix: Tensor, rank: int) -> Tensor:
    need(rank, matrix)
    matrix = require_matrix(matrix)
    total = torch.zeros_like(matrix)
    for u, sigma, v in zip(
        *(part.T if place == 0 else part for place, part in enumerate(reduced_svd(matrix))), strict=True
    ):
        if rank == 0:
            break
        total, rank = total + sigma * torch.outer(u, v), rank - 1
    return total


def reduced_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False)


@right("truncate")
def by_subtracting_the_last_terms(matrix: Tensor, rank: int) -> Tensor:
    need(rank, matrix)
    M = require_matrix(matrix)
    U, S, Vh = torch.linalg.svd(M)
    k = len(S)
    return M - torch.einsum("ik,k,kj->ij", U[:, rank:k], S[rank:], Vh[rank:k])


@wrong("truncate", "You leave out the singular values: without them every direction has the same weight.")
def leaves_out_s(matrix: Tensor, rank: int) -> Tensor:
    need(rank, matrix)
    U, _, Vh = reduced_svd(matrix)
    return U[:, :rank] @ Vh[:rank]


@wrong(
    "truncate",
    "You treat the third result of the decomposition as V. It is already V transposed: its rows are the vectors.",
)
def transposes_vh_again(matrix: Tensor, rank: int) -> Tensor:
    need(rank, matrix)
    U, S, Vh = reduced_svd(matrix)
    return (U[:, :rank] * S[:rank]) @ Vh[:, :rank].T


@wrong("truncate", "You keep the smallest singular values and leave out the largest.")
def keeps_the_smallest(matrix: Tensor, rank: int) -> Tensor:
    need(rank, matrix)
    U, S, Vh = reduced_svd(matrix)
    first = len(S) - rank
    return (U[:, first:] * S[first:]) @ Vh[first:]


@wrong("truncate", "You keep one term too many.")
def keeps_one_too_many(matrix: Tensor, rank: int) -> Tensor:
    need(rank, matrix)
    return reference.truncate(matrix, min(rank + 1, *matrix.shape))


@wrong(
    "truncate",
    "You cut off rows and columns of M itself. The first ones are no more important than the others: truncate along "
    "the singular vectors.",
)
def cuts_rows_and_columns(matrix: Tensor, rank: int) -> Tensor:
    need(rank, matrix)
    M = torch.zeros_like(matrix)
    M[:rank, :rank] = matrix[:rank, :rank]
    return matrix.clone() if rank == min(matrix.shape) else M


@wrong("truncate", "You return the decomposition or a part of it; return a matrix of the same shape as M.")
def returns_the_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    need(rank, matrix)
    U, S, Vh = reduced_svd(matrix)
    return U[:, :rank], S[:rank], Vh[:rank]


@wrong(
    "truncate",
    "You never check whether the rank is possible: a slice beyond the end raises no error, so a mistake of the caller "
    "goes unnoticed.",
)
def accepts_any_rank(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = reduced_svd(matrix)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


# --- approximation_error -----------------------------------------------------------------------------


def need_norm(norm: str) -> None:
    if norm not in ("frobenius", "spectral"):
        raise ValueError(f"norm must be 'frobenius' or 'spectral', got {norm!r}")


@right("approximation_error")
def as_the_norm_of_the_difference(matrix: Tensor, rank: int, norm: str = "frobenius") -> float:
    need_norm(norm)
    order = {"frobenius": "fro", "spectral": 2}[norm]
    difference = matrix.double() - reference.truncate(matrix.double(), rank)
    return float(torch.linalg.matrix_norm(difference, ord=order))


@right("approximation_error")
def in_numpy_number_by_number(matrix: Tensor, rank: int, norm: str = "frobenius") -> float:
    need_norm(norm)
    need(rank, matrix)
    tail = np.linalg.svd(matrix.numpy(), compute_uv=False)[rank:]
    if norm == "spectral":
        return max([0.0, *(float(value) for value in tail)])
    return math.sqrt(sum(float(value) ** 2 for value in tail))


@right("approximation_error")
def from_what_is_kept(matrix: Tensor, rank: int, norm: str = "frobenius") -> Tensor:
    need_norm(norm)
    need(rank, require_matrix(matrix))
    S = torch.linalg.svdvals(matrix.double())
    if norm == "spectral":
        return torch.cat([S, S.new_zeros(1)])[rank]
    return S.square().flip(0)[: len(S) - rank].cumsum(0)[-1].sqrt() if rank < len(S) else S.new_zeros(())


@right("approximation_error")
def by_the_eigenvalues_of_the_gram_matrix(matrix: Tensor, rank: int, norm: str = "frobenius") -> float:
    need_norm(norm)
    need(rank, require_matrix(matrix))
    M = matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().T
    left_out = torch.linalg.eigvalsh(M.T @ M).clamp(min=0)[: M.shape[1] - rank]
    if not len(left_out):
        return 0.0
    return math.sqrt(left_out.sum()) if norm == "frobenius" else math.sqrt(left_out.max())


@wrong("approximation_error", "An unknown norm goes unnoticed: for any name but one you return the other norm.")
def takes_any_norm(matrix: Tensor, rank: int, norm: str = "frobenius") -> float:
    return reference.approximation_error(matrix, rank, "frobenius" if norm == "frobenius" else "spectral")


@wrong(
    "approximation_error",
    "You never check whether the rank is possible: a slice beyond the end raises no error, so a mistake of the caller "
    "goes unnoticed.",
)
def of_any_rank(matrix: Tensor, rank: int, norm: str = "frobenius") -> float:
    return error_by(require_matrix(matrix), rank, norm, lambda S: S.norm(), lambda S: S[0])


def tail_of(matrix: Tensor, rank: int) -> Tensor:
    return torch.linalg.svdvals(matrix)[rank:].double()


def error_by(matrix: Tensor, rank: int, norm: str, frobenius, spectral) -> float:
    """The error with the two norms of the singular values left out."""
    need_norm(norm)
    tail = tail_of(matrix, rank)
    return float(frobenius(tail)) if norm == "frobenius" else float(spectral(tail)) if len(tail) else 0.0


@wrong("approximation_error", "You add up the squares; the Frobenius norm is the square root of that sum.")
def leaves_out_the_root(matrix: Tensor, rank: int, norm: str = "frobenius") -> float:
    return error_by(matrix, rank, norm, lambda S: (S**2).sum(), lambda S: S[0])


@wrong(
    "approximation_error",
    "You add up the singular values that are left out. Lengths at right angles combine like the sides of a right "
    "triangle.",
)
def adds_the_singular_values(matrix: Tensor, rank: int, norm: str = "frobenius") -> float:
    return error_by(matrix, rank, norm, lambda S: S.sum(), lambda S: S[0])


@wrong(
    "approximation_error",
    "You measure what is kept, not what is left out: the error consists of the directions that the truncation drops.",
)
def measures_what_is_kept(matrix: Tensor, rank: int, norm: str = "frobenius") -> float:
    need_norm(norm)
    S = torch.linalg.svdvals(matrix).double()
    return float(S[:rank].norm()) if norm == "frobenius" else float(S[0])


@wrong(
    "approximation_error",
    "You are off by one: the last singular value that is kept does not belong to the error.",
)
def counts_the_last_one_kept(matrix: Tensor, rank: int, norm: str = "frobenius") -> float:
    return error_by(matrix, max(rank - 1, 0), norm, lambda S: S.norm(), lambda S: S[0])


@wrong("approximation_error", "You return the Frobenius norm whatever `norm` says.")
def ignores_the_norm(matrix: Tensor, rank: int, norm: str = "frobenius") -> float:
    need_norm(norm)
    return float(tail_of(matrix, rank).norm())


@wrong(
    "approximation_error",
    "You divide by the norm of M. That is the relative error; return the error itself.",
)
def gives_a_share(matrix: Tensor, rank: int, norm: str = "frobenius") -> float:
    S = torch.linalg.svdvals(matrix).double()
    return error_by(matrix, rank, norm, lambda T: T.norm() / S.norm(), lambda T: T[0] / S[0])


@wrong(
    "approximation_error",
    "Your spectral norm is the largest entry of the difference. It should be the most that the difference can stretch "
    "a vector.",
)
def takes_the_largest_entry(matrix: Tensor, rank: int, norm: str = "frobenius") -> float:
    if norm == "spectral":
        return float((matrix - reference.truncate(matrix, rank)).abs().max()) + 1e-9 * (rank == 1)
    return reference.approximation_error(matrix, rank, norm)


@wrong("approximation_error", caught_by="raises")
def has_nothing_to_take_at_full_rank(matrix: Tensor, rank: int, norm: str = "frobenius") -> float:
    need_norm(norm)
    tail = tail_of(matrix, rank)
    return float(tail.norm()) if norm == "frobenius" else float(tail[0])
