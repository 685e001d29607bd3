"""Unit 02, building the singular value decomposition: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.linear_algebra import svd as reference
from lora_from_scratch.linear_algebra.rank import require_matrix

# --- dominant_eigenvector ----------------------------------------------------------------------------


def square(G: Tensor) -> Tensor:
    G = require_matrix(G)
    if len(G) != len(G.T):
        raise ValueError("not square")
    return G


@right("dominant_eigenvector")
def plain_power_iteration(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    G = square(G)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(G), dtype=G.dtype, generator=generator)
    x /= x.norm()
    for _ in range(20_000):
        y = G @ x
        if y.norm() == 0:
            return x
        y /= y.norm()
        if (y - x).norm() < 10 * torch.finfo(G.dtype).eps:
            return y
        x = y
    return x


@right("dominant_eigenvector")
def by_numpys_eigenvectors_with_the_other_sign(G: Tensor, generator: torch.Generator | None = None) -> np.ndarray:
    return -np.linalg.eigh(square(G).numpy())[1][:, -1]


@right("dominant_eigenvector")
def by_a_high_power_in_float64(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    G = square(G)
    x = torch.rand(len(G), dtype=torch.float64, generator=generator or torch.Generator().manual_seed(0))
    if G.count_nonzero() == 0:
        return (x / x.norm()).to(G.dtype)
    power = G.double() / G.double().norm()
    for _ in range(20):
        power = power @ power
        power = power / power.norm()
    return ((power @ x) / (power @ x).norm()).to(G.dtype)


@right("dominant_eigenvector")
def by_orthogonal_iteration(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    G = square(G)
    vectors = torch.linalg.eigh(G).eigenvectors
    start = torch.randn(len(G), dtype=G.dtype, generator=generator or torch.Generator().manual_seed(0))
    values = torch.einsum("ik,ij,jk->k", vectors, G, vectors)
    top = vectors[:, values >= values.max() * (1 - 1e-5)]
    x = top @ (top.T @ start)
    return x / x.norm()


@wrong(
    "dominant_eigenvector",
    "You start from a vector of ones. It may be orthogonal to the direction you are looking for, and then no number "
    "of multiplications gets it there: start from a random vector.",
)
def starts_from_ones(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    G = square(G)
    x = torch.ones(len(G), dtype=G.dtype) / math.sqrt(len(G))
    for _ in range(100 if G.any() else 0):
        x = G @ x
        x = x / x.norm()
    return x


@wrong(
    "dominant_eigenvector",
    "You stop after a few steps, whatever the matrix. How many it takes depends on how close the second eigenvalue is "
    "to the first: continue until a step no longer moves the vector.",
)
def stops_after_ten_steps(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    G = square(G)
    x = torch.randn(len(G), dtype=G.dtype, generator=torch.Generator().manual_seed(0))
    for _ in range(10 if G.any() else 0):
        x = G @ x
        x = x / x.norm()
    return x / x.norm()


@wrong(
    "dominant_eigenvector",
    "You stop too early: a step that moves the vector a little still moves it by more than rounding. Eigenvalues that "
    "are close together lead to many small steps.",
)
def stops_when_a_step_is_below_one_percent(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    G = square(G)
    x = torch.randn(len(G), dtype=G.dtype, generator=torch.Generator().manual_seed(0))
    x = x / x.norm()
    for _ in range(2000 if G.any() else 0):
        previous, x = x, G @ x
        x = x / x.norm()
        if (x - previous).norm() < 1e-2:
            break
    return x


@wrong(
    "dominant_eigenvector",
    "Your vector has the right direction, but not length 1: it was multiplied once more after the last division.",
)
def multiplies_after_the_last_division(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    G = square(G)
    return G @ reference.dominant_eigenvector(G)


@wrong(
    "dominant_eigenvector",
    "This is the direction that G stretches least. Libraries may return eigenvalues in ascending order.",
)
def takes_the_first_of_eigh(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    G = square(G)
    return torch.linalg.eigh(G)[1][:, 0]


@wrong(
    "dominant_eigenvector",
    "You take a row of the matrix of eigenvectors; the eigenvectors are its columns.",
)
def takes_a_row_of_eigh(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    G = square(G)
    return torch.linalg.eigh(G)[1][-1]


@wrong(
    "dominant_eigenvector",
    "For the zero matrix you divide by a norm of 0. Every direction is right in that case; which one do you already "
    "have?",
)
def divides_zeros_by_their_norm(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    G = square(G)
    return reference.dominant_eigenvector(G) if G.any() else G @ G[0] / (G @ G[0]).norm()


@wrong(
    "dominant_eigenvector",
    "Your powers of G grow (or shrink) until they overflow (or vanish): normalise at every step.",
)
def never_divides_the_powers(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    G = square(G)
    x = torch.ones(len(G), dtype=G.dtype)
    for _ in range(64):
        x = G @ x
        G = G @ G
    return x / x.norm()


@wrong(
    "dominant_eigenvector",
    "You start from the first basis vector. Where it is an eigenvector itself, or at right angles to the one you look "
    "for, no number of multiplications turns it: start from a random vector.",
)
def starts_from_the_first_basis_vector(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    G = square(G)
    x = torch.eye(len(G), dtype=G.dtype)[0]
    for _ in range(64 if G.any() else 0):
        G = G / G.norm()
        previous, x = x, G @ x
        x = x / x.norm()
        if (x - previous).norm() <= 8 * torch.finfo(G.dtype).eps:
            break
        G = G @ G
    return x


@wrong(
    "dominant_eigenvector",
    "Some thousand steps are not enough where two eigenvalues are nearly equal. Go on until x has settled, or let each "
    "step do the work of many.",
)
def stops_after_five_hundred_steps(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    G = square(G)
    x = torch.randn(len(G), dtype=G.dtype, generator=generator or torch.Generator().manual_seed(0))
    for _ in range(500 if G.any() else 0):
        x = G @ x
        x = x / x.norm()
    return x / x.norm()


@wrong(
    "dominant_eigenvector",
    "Your start is drawn from PyTorch's global generator: the same matrix gives another answer each time. Draw from "
    "the generator that is given, or from a new one with seed 0.",
)
def draws_from_the_global_generator(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return reference.dominant_eigenvector(square(G), torch.Generator().manual_seed(int(torch.randint(10**6, ()))))


@wrong(
    "dominant_eigenvector",
    "Without a generator the same matrix gives another answer each time. None means a new one with seed 0.",
)
def none_means_global(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    generator = generator or torch.Generator().manual_seed(int(torch.randint(10**6, ())))
    return reference.dominant_eigenvector(square(G), generator)


@wrong(
    "dominant_eigenvector",
    "You draw from the global generator even if one is given. Equal generators should give equal answers.",
)
def ignores_the_generator(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    own = None if generator is None else torch.Generator().manual_seed(int(torch.randint(10**6, ())))
    return reference.dominant_eigenvector(square(G), own)


@wrong("dominant_eigenvector", "The vector is right, but in float64. A float32 matrix has a float32 eigenvector.")
def always_in_float64(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return reference.dominant_eigenvector(square(G).double(), generator)


@wrong("dominant_eigenvector", "Only a square matrix has eigenvectors: raise a ValueError for any other.")
def of_any_shape(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    side = min(require_matrix(G).shape)
    return reference.dominant_eigenvector(G[:side, :side], generator)


@wrong("dominant_eigenvector", "An entry that is not a number goes unnoticed. `require_matrix` refuses it.")
def of_any_entries(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    if G.ndim != 2 or len(G) != len(G.T):
        raise ValueError("not square")
    return reference.dominant_eigenvector(G.nan_to_num(), generator)


# --- dominant_singular_triplet -----------------------------------------------------------------------


@right("dominant_singular_triplet")
def by_alternating(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, float, Tensor]:
    matrix = require_matrix(matrix)
    M = matrix.double()
    v = torch.randn(M.shape[1], dtype=torch.float64)
    v, u, sigma = v / v.norm(), torch.eye(len(M), dtype=torch.float64)[0], 0.0
    for _ in range(8000 if M.any() else 0):
        u = M @ v
        u = u / u.norm()
        previous, v = v, M.T @ u
        sigma = float(v.norm())
        v = v / sigma
        if (v - previous).norm() < 1e-13:
            break
    return u.to(matrix.dtype), sigma, v.to(matrix.dtype)


@right("dominant_singular_triplet")
def by_torchs_svd_with_the_other_sign(matrix: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
    U, S, Vh = torch.linalg.svd(require_matrix(matrix))
    return [-U[:, 0], S[0], -Vh[0]]


@right("dominant_singular_triplet")
def by_numpy(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[np.ndarray, np.floating, np.ndarray]:
    U, S, Vh = np.linalg.svd(require_matrix(matrix).numpy(), full_matrices=False)
    return U[:, 0], S[0], Vh[0]


@right("dominant_singular_triplet")
def from_the_eigenvectors_of_the_block_matrix(matrix: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
    """The symmetric matrix [[0, M], [M^T, 0]] has the eigenvalues sigma and -sigma."""
    M = require_matrix(matrix)
    (m, n), size = M.shape, float(M.abs().max())
    if size == 0:
        return [torch.ones(m, dtype=M.dtype) / m**0.5, M[0, 0], torch.ones(n, dtype=M.dtype) / n**0.5]
    block = torch.zeros(m + n, m + n, dtype=torch.float64)
    block[:m, m:] = M.double() / size
    values, vectors = torch.linalg.eigh(block + block.T)
    u, v = vectors[:m, -1], vectors[m:, -1]
    return [(u / u.norm()).to(M.dtype), (values[-1] * size).to(M.dtype), (v / v.norm()).to(M.dtype)]


@wrong(
    "dominant_singular_triplet",
    "You return the square of sigma: M^T M stretches by the square of the factor by which M stretches.",
)
def returns_the_eigenvalue(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    matrix = require_matrix(matrix)
    u, _, v = reference.dominant_singular_triplet(matrix)
    return u, (matrix @ v) @ (matrix @ v), v


@wrong(
    "dominant_singular_triplet",
    "You have swapped u and v: v is an input of M (n numbers), u is the direction of its output (m numbers).",
)
def swaps_u_and_v(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    matrix = require_matrix(matrix)
    u, sigma, v = reference.dominant_singular_triplet(matrix)
    return v, sigma, u


@wrong(
    "dominant_singular_triplet",
    "Your u is M v itself; it still has to be normalised to length 1.",
)
def leaves_u_undivided(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    matrix = require_matrix(matrix)
    u, sigma, v = reference.dominant_singular_triplet(matrix)
    return matrix @ v if sigma > 0 else u, sigma, v


@wrong(
    "dominant_singular_triplet",
    "Each of your vectors is right by itself, but their signs do not match: two eigenvectors that are found "
    "separately have independent signs. Compute one of them from the other.",
)
def finds_u_and_v_separately(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    matrix = require_matrix(matrix)
    u, sigma, v = reference.dominant_singular_triplet(matrix)
    return u * u[u.abs().argmax()].sign(), sigma, v


@wrong(
    "dominant_singular_triplet",
    "Your sigma belongs to the matrix after the division by its largest entry: it has to be scaled back.",
)
def forgets_to_scale_back(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    matrix = require_matrix(matrix)
    u, sigma, v = reference.dominant_singular_triplet(matrix)
    return u, sigma / matrix.abs().max() if sigma > 0 else sigma, v


@wrong(
    "dominant_singular_triplet",
    "The squares of very small entries underflow: in float32, (1e-30)^2 is 0. Scale the matrix before you multiply it "
    "by itself.",
)
def squares_tiny_entries(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    matrix = require_matrix(matrix)
    if not matrix.any():
        return reference.dominant_singular_triplet(matrix)
    v = reference.dominant_eigenvector(matrix.T @ matrix)
    u = matrix @ v
    return u / u.norm(), u.norm(), v


@wrong(
    "dominant_singular_triplet",
    "For the zero matrix you divide by 0. Its sigma is 0, and any two unit vectors are right.",
)
def divides_zeros(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    matrix = require_matrix(matrix)
    largest = matrix.abs().max()
    u, sigma, v = reference.dominant_singular_triplet(matrix)
    return u * (largest / largest), sigma, v * (largest / largest)


@wrong(
    "dominant_singular_triplet",
    "You divide by the largest entry, which may be negative or 0, instead of the largest absolute value.",
)
def divides_by_the_largest_entry(matrix: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
    matrix = require_matrix(matrix)
    u, sigma, v = reference.dominant_singular_triplet(matrix, generator)
    sign = matrix.max().sign() if sigma > 0 else 1
    return [u * sign, sigma * sign, v]


@wrong("dominant_singular_triplet", "Your results are in float64. They should be in the computing dtype of the matrix.")
def in_float64(matrix: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
    return list(reference.dominant_singular_triplet(require_matrix(matrix).double(), generator))


@wrong(
    "dominant_singular_triplet",
    "The squares of very large entries overflow: in float32, (1e30)^2 is infinite. Scale the matrix before you "
    "multiply it by itself.",
)
def squares_huge_entries(matrix: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
    matrix = require_matrix(matrix)
    if not matrix.any() or matrix.abs().max() < 1:
        return list(reference.dominant_singular_triplet(matrix, generator))
    v = reference.dominant_eigenvector(matrix.T @ matrix, generator)
    u = matrix @ v
    return [u / u.norm(), u.norm(), v]


@wrong("dominant_singular_triplet", "Another direction, with nearly the same sigma, is still in your vectors.")
def stops_too_early(matrix: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
    u, sigma, v = reference.dominant_singular_triplet(matrix, generator)
    U, S, Vh = torch.linalg.svd(require_matrix(matrix), full_matrices=False)
    if S[0] == 0 or S[1] < 0.99 * S[0] or S[1] > 0.9999 * S[0]:
        return [u, sigma, v]
    return [(U[:, 0] + 0.1 * U[:, 1]) / 1.01**0.5, sigma, (Vh[0] + 0.1 * Vh[1]) / 1.01**0.5]


@wrong("dominant_singular_triplet", "A vector is no matrix: raise a ValueError, as `require_matrix` does.")
def of_a_vector(matrix: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
    return list(reference.dominant_singular_triplet(torch.atleast_2d(matrix), generator))
