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
    for u, sigma, v in zip(*(part.T if place == 0 else part for place, part in enumerate(_svd(matrix))), strict=True):
        if rank == 0:
            break
        total, rank = total + sigma * torch.outer(u, v), rank - 1
    return total


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
    U, _, Vh = _svd(matrix)
    return U[:, :rank] @ Vh[:rank]


@wrong(
    "truncate",
    "You treat the third result of the decomposition as V. It is already V transposed: its rows are the vectors.",
)
def transposes_vh_again(matrix: Tensor, rank: int) -> Tensor:
    need(rank, matrix)
    U, S, Vh = _svd(matrix)
    return (U[:, :rank] * S[:rank]) @ Vh[:, :rank].T


@wrong("truncate", "You keep the smallest singular values and leave out the largest.")
def keeps_the_smallest(matrix: Tensor, rank: int) -> Tensor:
    need(rank, matrix)
    U, S, Vh = _svd(matrix)
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
    U, S, Vh = _svd(matrix)
    return U[:, :rank], S[:rank], Vh[:rank]


@wrong(
    "truncate",
    "You never check whether the rank is possible: a slice beyond the end raises no error, so a mistake of the caller "
    "goes unnoticed.",
)
def accepts_any_rank(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = _svd(matrix)
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


# --- rank_for_energy ---------------------------------------------------------------------------------


def need_energy(energy: float) -> None:
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, got {energy}")


@right("rank_for_energy")
def counting_up_in_numpy(matrix: Tensor, energy: float) -> int:
    need_energy(energy)
    squares = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    kept, rank = 0.0, 0
    while kept < energy * squares.sum() * (1 - 1e-9):
        kept, rank = kept + squares[rank], rank + 1
    return rank


@right("rank_for_energy")
def by_the_error_of_eckart_and_young(matrix: Tensor, energy: float) -> int:
    need_energy(energy)
    whole = float(matrix.double().norm())
    allowed = math.sqrt(1 - energy) * whole + 1e-6 * whole
    return next(r for r in range(min(matrix.shape) + 1) if reference.approximation_error(matrix, r) <= allowed)


@right("rank_for_energy")
def by_what_is_left_out_from_the_end(matrix: Tensor, energy: float) -> int:
    need_energy(energy)
    squares = (torch.linalg.svdvals(require_matrix(matrix).double()) ** 2).tolist()
    whole, left, rank = sum(squares), 0.0, len(squares)
    while rank and left + squares[rank - 1] <= (1 - energy + 1e-9) * whole:
        rank, left = rank - 1, left + squares[rank - 1]
    return rank


@right("rank_for_energy")
def by_searching_the_running_sum(matrix: Tensor, energy: float) -> int:
    need_energy(energy)
    M = require_matrix(matrix).double()
    squares = torch.linalg.eigvalsh(M @ M.T if len(M) < len(M.T) else M.T @ M).clamp(min=0).flip(0)
    if not M.any():
        return 0
    kept = (squares / squares.sum()).cumsum(0)
    return int(torch.searchsorted(kept, energy - 1e-9)) + 1


def first_to_reach(values: Tensor, energy: float) -> int:
    """How many of the values have to be added up to reach this share of their sum."""
    total = float(values.sum())
    return int((values.cumsum(0) < energy * total * (1 - 1e-9)).sum()) + 1 if total > 0 else 0


def squares_of(matrix: Tensor, energy: float) -> Tensor:
    need_energy(energy)
    return torch.linalg.svdvals(matrix.double()) ** 2


@wrong("rank_for_energy", "You add up the singular values; energy is the sum of their squares.")
def adds_up_without_squares(matrix: Tensor, energy: float) -> int:
    return first_to_reach(squares_of(matrix, energy).sqrt() * (squares_of(matrix, energy) > 1e-20), energy)


@wrong(
    "rank_for_energy",
    "Your result is one too small: position 0 of the running sum is what rank 1 keeps.",
)
def returns_the_position(matrix: Tensor, energy: float) -> int:
    return max(first_to_reach(squares_of(matrix, energy), energy) - 1, 0)


@wrong(
    "rank_for_energy",
    "You compare norms (square roots of energies) with the share; the share refers to the energy itself.",
)
def compares_norms(matrix: Tensor, energy: float) -> int:
    return first_to_reach(squares_of(matrix, energy), energy**2)


@wrong("rank_for_energy", "You start adding from the smallest singular value; the largest ones hold the most energy.")
def starts_with_the_smallest(matrix: Tensor, energy: float) -> int:
    return first_to_reach(squares_of(matrix, energy).flip(0), energy)


@wrong(
    "rank_for_energy",
    "You count the singular values that are large relative to the first one. Energy adds up: many small ones can hold "
    "a lot.",
)
def counts_those_near_the_first(matrix: Tensor, energy: float) -> int:
    S = squares_of(matrix, energy).sqrt()
    return int((S > (1 - energy) * S[0] + 1e-12).sum())


@wrong(
    "rank_for_energy",
    "The zero matrix has no energy: no direction is needed, so the result is 0.",
)
def keeps_one_direction_of_nothing(matrix: Tensor, energy: float) -> int:
    return max(1, first_to_reach(squares_of(matrix, energy), energy))


@wrong(
    "rank_for_energy",
    "You accept any number as a share. 90 does not mean 90 %: raise a ValueError unless it is above 0 and at most 1.",
)
def takes_percent(matrix: Tensor, energy: float) -> int:
    return first_to_reach(squares_of(matrix, min(energy, 1.0)), min(energy, 1.0))


# --- pca ---------------------------------------------------------------------------------------------


def need_samples(data: Tensor) -> None:
    if len(data) < 2:
        raise ValueError("one sample has no variance")


@right("pca")
def by_the_covariance_matrix_in_numpy(data: Tensor, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    need_samples(data)
    need_count(count, data)
    X = data.numpy().astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(X, rowvar=False))
    kind = np.float32 if require_matrix(data).dtype == torch.float32 else np.float64
    found = X.mean(axis=0), -vectors[:, ::-1][:, :count].T, values[::-1][:count]
    return tuple(part.astype(kind) for part in found)


@right("pca")
def by_deflation(data: Tensor, count: int) -> list[Tensor]:
    need_samples(data)
    need_count(count, data)
    data = require_matrix(data)
    mean = data.sum(0) / len(data)
    X = (data - mean) / math.sqrt(len(data) - 1)
    _, S, Vh = reference.svd_by_deflation(X, count)
    return [mean, Vh, S.square()]


@right("pca")
def through_the_gram_matrix_of_the_samples(data: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    need_samples(data)
    need_count(count, data)
    data = require_matrix(data)
    mean = data.double().mean(0)
    X = data.double() - mean
    values, coordinates = torch.linalg.eigh(X @ X.T)
    directions = X.T @ coordinates.flip(1)[:, :count] / values.flip(0)[:count].sqrt()
    return tuple(part.to(data.dtype) for part in (mean, directions.T, values.flip(0)[:count] / (len(X) - 1)))


@right("pca")
def by_loops_and_torchs_variance(data: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    need_samples(data)
    need_count(count, data)
    data = require_matrix(data)
    mean = torch.stack([column.sum() / len(column) for column in data.T])
    X = data - mean
    covariance = sum(torch.outer(row, row) for row in X)
    values, vectors = torch.linalg.eigh(covariance)
    order = values.argsort(descending=True)[:count]
    directions = vectors[:, order].T
    return mean, directions, torch.stack([(data @ direction).var() for direction in directions])


@wrong("pca", "A single sample has no variance, but you return a result for it: raise a ValueError.")
def of_a_single_sample(data: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    if len(data) > 1:
        return reference.pca(data, count)
    need_count(count, data)
    return data[0], torch.eye(data.shape[1], dtype=data.dtype)[:count], data.new_zeros(count)


def components(X: Tensor, mean: Tensor, count: int, divisor: float) -> tuple[Tensor, Tensor, Tensor]:
    """The principal directions of X, without centring it; the squares are divided by `divisor`."""
    _, S, Vh = _svd(X)
    return mean, Vh[:count], S[:count] ** 2 / divisor


@wrong(
    "pca",
    "You decompose the data without centring them. Then the first direction points from the origin to the cloud of "
    "samples; variance is measured from the mean.",
)
def does_not_centre(data: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    need_samples(data)
    return components(data, data.mean(0), count, len(data) - 1)


@wrong(
    "pca",
    "You divide by N. The mean was estimated from the same samples, which uses up one of them: divide by N - 1.",
)
def divides_by_n(data: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    need_samples(data)
    return components(data - data.mean(0), data.mean(0), count, len(data))


@wrong("pca", "You return singular values as variances: a variance is a mean of squares.")
def returns_singular_values(data: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    need_samples(data)
    mean, directions, _ = reference.pca(data, count)
    return mean, directions, torch.linalg.svdvals(data - mean)[:count]


@wrong("pca", "Your directions are columns; they should be rows, one direction per row.")
def returns_directions_as_columns(data: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    need_samples(data)
    mean, directions, variances = reference.pca(data, count)
    return mean, directions.T, variances


@wrong(
    "pca",
    "You subtract from every sample its own mean over the features. Subtract the mean sample: one mean per column.",
)
def centres_the_rows(data: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    need_samples(data)
    return components(data - data.mean(1, keepdim=True), data.mean(0), count, len(data) - 1)


@wrong(
    "pca",
    "You scale every feature to the same spread first. That analyses correlations, which is a different result.",
)
def standardises(data: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    need_samples(data)
    return components((data - data.mean(0)) / data.std(0), data.mean(0), count, len(data) - 1)


@wrong("pca", "You return the directions of smallest variance: eigenvalues may come in ascending order.")
def takes_the_smallest(data: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    need_samples(data)
    values, vectors = torch.linalg.eigh(torch.cov(data.T.double()))
    return data.mean(0), vectors.T[:count], values[:count]
