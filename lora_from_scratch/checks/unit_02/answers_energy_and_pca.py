"""Unit 02, energy and principal components: common mistakes, and alternative right answers."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.checks.unit_02.answers_low_rank import need_count, reduced_svd
from lora_from_scratch.linear_algebra import svd as reference
from lora_from_scratch.linear_algebra.rank import require_matrix

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
    _, S, Vh = reduced_svd(X)
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
