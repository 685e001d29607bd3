"""Unit 11, comparing subspaces: mistakes that people make, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.linear_algebra.rank import require_matrix
from lora_from_scratch.linear_algebra.subspace import require_same_columns, subspace_similarity, top_directions


def directions(A: Tensor, B: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
    """The rows of both Vh, in float64, after raising for invalid input."""
    A, B = require_same_columns(A, B)
    return top_directions(A, i)[2].double(), top_directions(B, j)[2].double()


def cosines(A: Tensor, B: Tensor, i: int, j: int) -> Tensor:
    V_A, V_B = directions(A, B, i, j)
    return V_A @ V_B.T


# --- subspace_similarity -----------------------------------------------------------------------------


@right("subspace_similarity")
def trace_of_two_projections(A: Tensor, B: Tensor, i: int, j: int) -> float:
    V_A, V_B = directions(A, B, i, j)
    return float(torch.trace((V_A.T @ V_A) @ (V_B.T @ V_B))) / min(i, j)


@right("subspace_similarity")
def mean_of_squared_cosines_of_principal_angles(A: Tensor, B: Tensor, i: int, j: int) -> Tensor:
    return torch.linalg.svdvals(cosines(A, B, i, j)).square().mean()  # min(i, j) of them


@right("subspace_similarity")
def by_eigenvectors_in_numpy(A: Tensor, B: Tensor, i: int, j: int) -> float:
    directions(A, B, i, j)

    def top(M: Tensor, count: int) -> np.ndarray:
        return np.linalg.eigh(M.double().numpy().T @ M.double().numpy())[1][:, ::-1][:, :count]

    return np.linalg.norm(top(A, i).T @ top(B, j)) ** 2 / min(i, j)


@right("subspace_similarity")
def by_the_distance_of_the_projections(A: Tensor, B: Tensor, i: int, j: int) -> float:
    P_A, P_B = (V.T @ V for V in directions(A, B, i, j))
    return (i + j - float((P_A - P_B).square().sum())) / (2 * min(i, j))


@right("subspace_similarity")
def pair_by_pair_of_directions(A: Tensor, B: Tensor, i: int, j: int) -> float:
    V_A, V_B = directions(A, B, i, j)
    total = 0.0
    for a in V_A:
        for b in V_B:
            total += float(torch.dot(a, b)) ** 2
    return total / min(i, j)


@wrong(
    "subspace_similarity",
    "You cut both matrices to the same number of columns. With different numbers of columns they cannot be compared: "
    "raise a ValueError.",
)
def common_columns_only(A: Tensor, B: Tensor, i: int, j: int) -> float:
    n = min(A.shape[-1], B.shape[-1])
    return float(cosines(A[..., :n], B[..., :n], i, j).square().sum()) / min(i, j)


@wrong("subspace_similarity", "You take a vector for a matrix with one row. `require_matrix` refuses it.")
def vectors_as_matrices(A: Tensor, B: Tensor, i: int, j: int) -> float:
    return float(cosines(torch.atleast_2d(A), torch.atleast_2d(B), i, j).square().sum()) / min(i, j)


@wrong(
    "subspace_similarity",
    "You use the *left* singular vectors. The directions that are compared have n entries, one for each column: "
    "they are the right ones.",
)
def left_singular_vectors(A: Tensor, B: Tensor, i: int, j: int) -> float:
    directions(A, B, i, j)
    U_A, U_B = (torch.linalg.svd(require_matrix(M).double())[0] for M in (A, B))
    rows = min(len(U_A), len(U_B))
    return float((U_A[:rows, :i].T @ U_B[:rows, :j]).square().sum()) / min(i, j)


@wrong("subspace_similarity", "You add up the cosines, which have signs and cancel. Square each of them first.")
def cosines_not_squared(A: Tensor, B: Tensor, i: int, j: int) -> float:
    return float(cosines(A, B, i, j).sum()) / min(i, j)


@wrong("subspace_similarity", "You do not divide: the result grows with the number of directions. Divide by min(i, j).")
def without_a_division(A: Tensor, B: Tensor, i: int, j: int) -> float:
    return float(cosines(A, B, i, j).square().sum())


@wrong("subspace_similarity", "You take as many directions of B as of A. There are i of A, but j of B.")
def i_of_both(A: Tensor, B: Tensor, i: int, j: int) -> float:
    directions(A, B, i, j)
    V_A, V_B = (torch.linalg.svd(require_matrix(M).double(), full_matrices=False)[2][:i] for M in (A, B))
    return float((V_A @ V_B.T).square().sum()) / min(i, j)


@wrong(
    "subspace_similarity",
    "You divide by the larger of i and j. A small subspace that is contained in a large one would then not have "
    "similarity 1.",
)
def by_the_larger(A: Tensor, B: Tensor, i: int, j: int) -> float:
    return float(cosines(A, B, i, j).square().sum()) / max(i, j)


@wrong("subspace_similarity", "You do not square the norm. The sum is over squared cosines.")
def the_norm_not_squared(A: Tensor, B: Tensor, i: int, j: int) -> float:
    return float(cosines(A, B, i, j).norm()) / min(i, j)


@wrong("subspace_similarity", "You take the square root at the end: your result is the root of the similarity.")
def the_root_of_it(A: Tensor, B: Tensor, i: int, j: int) -> float:
    return math.sqrt(float(cosines(A, B, i, j).square().sum()) / min(i, j))


@wrong("subspace_similarity", "You always divide by i. Divide by the smaller of i and j.")
def always_by_i(A: Tensor, B: Tensor, i: int, j: int) -> float:
    return float(cosines(A, B, i, j).square().sum()) / i


@wrong(
    "subspace_similarity",
    "You take the mean over all i times j pairs. Even for a subspace and itself, only i of the i times i pairs have "
    "cosine 1.",
)
def mean_over_all_pairs(A: Tensor, B: Tensor, i: int, j: int) -> float:
    return float(cosines(A, B, i, j).square().mean())


@wrong(
    "subspace_similarity",
    "You compare the first direction with the first, the second with the second, and so on. A subspace has no order: "
    "compare every direction of one with every direction of the other.",
)
def pair_by_pair(A: Tensor, B: Tensor, i: int, j: int) -> float:
    return float(cosines(A, B, i, j).diagonal().square().sum()) / min(i, j)


@wrong("subspace_similarity", "You keep only the smallest angle between the two subspaces. All of the angles count.")
def the_smallest_angle(A: Tensor, B: Tensor, i: int, j: int) -> float:
    return float(torch.linalg.matrix_norm(cosines(A, B, i, j), 2)) ** 2


@wrong(
    "subspace_similarity",
    "You take the first i rows of A. They are not singular vectors: they are not orthogonal, and they do not belong to "
    "the largest singular values.",
)
def the_rows_themselves(A: Tensor, B: Tensor, i: int, j: int) -> float:
    directions(A, B, i, j)
    one, other = (M / M.norm(dim=1, keepdim=True) for M in (A[:i].double(), B[:j].double()))
    return float((one @ other.T).square().sum()) / min(i, j)


@wrong("subspace_similarity", "You take the directions with the smallest singular values, which come last.")
def the_last_directions(A: Tensor, B: Tensor, i: int, j: int) -> float:
    directions(A, B, i, j)

    def last(M: Tensor, count: int) -> Tensor:
        return torch.linalg.svd(M.double(), full_matrices=False)[2][-count:]

    return float((last(A, i) @ last(B, j).T).square().sum()) / min(i, j)


@wrong("subspace_similarity", "i and j have no effect: you compare all directions of A with all directions of B.")
def all_directions(A: Tensor, B: Tensor, i: int, j: int) -> float:
    directions(A, B, i, j)
    V_A, V_B = (torch.linalg.svd(M.double(), full_matrices=False)[2] for M in (A, B))
    return float((V_A @ V_B.T).square().sum()) / min(len(V_A), len(V_B))


@wrong(
    "subspace_similarity",
    "You accept more directions than the matrix has. Beyond its rank, singular vectors are determined by rounding "
    "errors: raise a ValueError.",
)
def any_number_of_directions(A: Tensor, B: Tensor, i: int, j: int) -> float:
    require_same_columns(A, B)
    V_A, V_B = (torch.linalg.svd(M.double(), full_matrices=False)[2] for M in (A, B))
    return float((V_A[:i] @ V_B[:j].T).square().sum()) / min(i, j)


# --- similarity_grid ---------------------------------------------------------------------------------


def sizes(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.arange(1, rows + 1)[:, None], torch.arange(1, columns + 1)[None]


@right("similarity_grid")
def one_similarity_at_a_time(A: Tensor, B: Tensor, rows: int, columns: int) -> list:
    cosines(A, B, rows, columns)
    grid = [[subspace_similarity(A, B, i, j) for j in range(1, columns + 1)] for i in range(1, rows + 1)]
    return torch.tensor(grid, dtype=torch.float64)


@right("similarity_grid")
def corners_in_numpy(A: Tensor, B: Tensor, rows: int, columns: int) -> np.ndarray:
    squares = cosines(A, B, rows, columns).square().numpy()
    grid = np.empty((rows, columns))
    for i in range(rows):
        for j in range(columns):
            grid[i, j] = squares[: i + 1, : j + 1].sum() / (min(i, j) + 1)
    return grid


@right("similarity_grid")
def with_triangles_of_ones(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    squares = cosines(A, B, rows, columns).square()
    left, right = torch.ones(rows, rows).tril().double(), torch.ones(columns, columns).triu().double()
    smaller = torch.tensor([[min(i, j) for j in range(columns)] for i in range(rows)]) + 1
    return left @ squares @ right / smaller


@right("similarity_grid")
def from_the_neighbours(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    squares = cosines(A, B, rows, columns).square()
    sums = squares.new_zeros(rows + 1, columns + 1)
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            sums[i, j] = sums[i - 1, j] + sums[i, j - 1] - sums[i - 1, j - 1] + squares[i - 1, j - 1]
    return sums[1:, 1:] / torch.minimum(*sizes(rows, columns))


@wrong("similarity_grid", caught_by="dtype")
def in_float32(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    squares = cosines(A, B, rows, columns).square().float()
    return squares.cumsum(0).cumsum(1) / torch.minimum(*sizes(rows, columns))


@wrong(
    "similarity_grid",
    "You cut both matrices to the same number of columns. With different numbers of columns they cannot be compared: "
    "raise a ValueError.",
)
def grid_of_common_columns(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    n = min(A.shape[-1], B.shape[-1])
    squares = cosines(A[..., :n], B[..., :n], rows, columns).square()
    return squares.cumsum(0).cumsum(1) / torch.minimum(*sizes(rows, columns))


@wrong("similarity_grid", "You do not divide the sums. Divide each by the smaller of its i and j.")
def grid_of_sums(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    return cosines(A, B, rows, columns).square().cumsum(0).cumsum(1)


@wrong(
    "similarity_grid",
    "You accept more rows or columns than the matrix has directions. Beyond its rank, singular vectors are determined "
    "by rounding errors: raise a ValueError.",
)
def grid_without_limits(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    A, B = require_same_columns(A, B)
    V_A, V_B = (torch.linalg.svd(M.double())[2] for M in (A, B))
    squares = (V_A[:rows] @ V_B[:columns].T).square()
    return squares.cumsum(0).cumsum(1) / torch.minimum(*sizes(rows, columns))


@wrong(
    "similarity_grid",
    "Your entries are single squared cosines. The similarity of i directions with j adds up all of their pairs.",
)
def single_cosines(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    return cosines(A, B, rows, columns).square()


@wrong("similarity_grid", "You add up along one axis only: each entry uses one direction of B and not the first j.")
def summed_over_rows_only(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    return cosines(A, B, rows, columns).square().cumsum(0) / torch.minimum(*sizes(rows, columns))


@wrong("similarity_grid", "You add up along one axis only: each entry uses one direction of A and not the first i.")
def summed_over_columns_only(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    return cosines(A, B, rows, columns).square().cumsum(1) / torch.minimum(*sizes(rows, columns))


@wrong(
    "similarity_grid",
    "You divide by the larger of i and j. A small subspace that is contained in a large one would then not have "
    "similarity 1.",
)
def grid_by_the_larger(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    return cosines(A, B, rows, columns).square().cumsum(0).cumsum(1) / torch.maximum(*sizes(rows, columns))


@wrong("similarity_grid", "You always divide by i. Divide by the smaller of i and j.")
def grid_always_by_i(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    return cosines(A, B, rows, columns).square().cumsum(0).cumsum(1) / sizes(rows, columns)[0]


@wrong("similarity_grid", "You divide by i times j: that is a mean over pairs. Divide by the smaller of i and j.")
def grid_over_all_pairs(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    i, j = sizes(rows, columns)
    return cosines(A, B, rows, columns).square().cumsum(0).cumsum(1) / (i * j)


@wrong("similarity_grid", "You add up the cosines and square afterwards. Cosines have signs and cancel: square first.")
def squared_too_late(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    return cosines(A, B, rows, columns).cumsum(0).cumsum(1).square() / torch.minimum(*sizes(rows, columns))


@wrong("similarity_grid", "Your i and j start at 0. The first entry is for one direction each: both start at 1.")
def from_zero(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    smaller = torch.minimum(*sizes(rows, columns)) - 1
    return cosines(A, B, rows, columns).square().cumsum(0).cumsum(1) / smaller


@wrong("similarity_grid", "You divide before you add up. Divide the sum by the smaller of i and j.")
def divided_too_early(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    return (cosines(A, B, rows, columns).square() / torch.minimum(*sizes(rows, columns))).cumsum(0).cumsum(1)


@wrong("similarity_grid", caught_by="transposed")
def columns_by_rows(A: Tensor, B: Tensor, rows: int, columns: int) -> Tensor:
    grid = cosines(A, B, rows, columns).square().cumsum(0).cumsum(1) / torch.minimum(*sizes(rows, columns))
    return grid.T
