"""Unit 02, building the singular value decomposition: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.linear_algebra import svd as reference
from lora_from_scratch.linear_algebra.rank import rounding_tolerance

# --- dominant_eigenvector ----------------------------------------------------------------------------


@right("dominant_eigenvector")
def plain_power_iteration(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
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
    return -np.linalg.eigh(G.numpy())[1][:, -1]


@right("dominant_eigenvector")
def by_a_high_power_in_float64(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    x = torch.randn(len(G), dtype=torch.float64)
    if G.count_nonzero() == 0:
        return x / x.norm()
    power = G.double() / G.double().norm()
    for _ in range(20):
        power = power @ power
        power = power / power.norm()
    return (power @ x) / (power @ x).norm()


@wrong(
    "dominant_eigenvector",
    "You start from a vector of ones. It may be orthogonal to the direction you are looking for, and then no number "
    "of multiplications gets it there: start from a random vector.",
)
def starts_from_ones(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
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
    return G @ reference.dominant_eigenvector(G)


@wrong(
    "dominant_eigenvector",
    "This is the direction that G stretches least. Libraries may return eigenvalues in ascending order.",
)
def takes_the_first_of_eigh(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return torch.linalg.eigh(G)[1][:, 0]


@wrong(
    "dominant_eigenvector",
    "You take a row of the matrix of eigenvectors; the eigenvectors are its columns.",
)
def takes_a_row_of_eigh(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return torch.linalg.eigh(G)[1][-1]


@wrong(
    "dominant_eigenvector",
    "For the zero matrix you divide by a norm of 0. Every direction is right in that case; which one do you already "
    "have?",
)
def divides_zeros_by_their_norm(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return reference.dominant_eigenvector(G) if G.any() else G @ G[0] / (G @ G[0]).norm()


@wrong(
    "dominant_eigenvector",
    "Your powers of G grow (or shrink) until they overflow (or vanish): normalise at every step.",
)
def never_divides_the_powers(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    x = torch.ones(len(G), dtype=G.dtype)
    for _ in range(64):
        x = G @ x
        G = G @ G
    return x / x.norm()


# --- dominant_singular_triplet -----------------------------------------------------------------------


@right("dominant_singular_triplet")
def by_alternating(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, float, Tensor]:
    M = matrix.double()
    v = torch.randn(M.shape[1], dtype=torch.float64)
    v, u, sigma = v / v.norm(), torch.eye(len(M), dtype=torch.float64)[0], 0.0
    for _ in range(60 if M.any() else 0):
        u = M @ v
        u = u / u.norm()
        v = M.T @ u
        sigma = float(v.norm())
        v = v / sigma
    return u, sigma, v


@right("dominant_singular_triplet")
def by_torchs_svd_with_the_other_sign(matrix: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
    U, S, Vh = torch.linalg.svd(matrix)
    return [-U[:, 0], S[0], -Vh[0]]


@right("dominant_singular_triplet")
def by_numpy(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[np.ndarray, np.floating, np.ndarray]:
    U, S, Vh = np.linalg.svd(matrix.numpy().astype(np.float64), full_matrices=False)
    return U[:, 0], S[0], Vh[0]


@wrong(
    "dominant_singular_triplet",
    "You return the square of sigma: M^T M stretches by the square of the factor by which M stretches.",
)
def returns_the_eigenvalue(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    u, _, v = reference.dominant_singular_triplet(matrix)
    return u, (matrix @ v) @ (matrix @ v), v


@wrong(
    "dominant_singular_triplet",
    "You have swapped u and v: v is an input of M (n numbers), u is the direction of its output (m numbers).",
)
def swaps_u_and_v(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    u, sigma, v = reference.dominant_singular_triplet(matrix)
    return v, sigma, u


@wrong(
    "dominant_singular_triplet",
    "Your u is M v itself; it still has to be normalised to length 1.",
)
def leaves_u_undivided(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    u, sigma, v = reference.dominant_singular_triplet(matrix)
    return matrix @ v if sigma > 0 else u, sigma, v


@wrong(
    "dominant_singular_triplet",
    "Each of your vectors is right by itself, but their signs do not match: two eigenvectors that are found "
    "separately have independent signs. Compute one of them from the other.",
)
def finds_u_and_v_separately(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    u, sigma, v = reference.dominant_singular_triplet(matrix)
    return u * u[u.abs().argmax()].sign(), sigma, v


@wrong(
    "dominant_singular_triplet",
    "Your sigma belongs to the matrix after the division by its largest entry: it has to be scaled back.",
)
def forgets_to_scale_back(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    u, sigma, v = reference.dominant_singular_triplet(matrix)
    return u, sigma / matrix.abs().max() if sigma > 0 else sigma, v


@wrong(
    "dominant_singular_triplet",
    "The squares of very small entries underflow: in float32, (1e-30)^2 is 0. Scale the matrix before you multiply it "
    "by itself.",
)
def squares_tiny_entries(matrix: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
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
    largest = matrix.abs().max()
    u, sigma, v = reference.dominant_singular_triplet(matrix)
    return u * (largest / largest), sigma, v * (largest / largest)


# --- svd_by_deflation --------------------------------------------------------------------------------


@right("svd_by_deflation")
def torchs_svd_cut_at_the_tolerance(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    k = int((S > rounding_tolerance(matrix, float(S[0]))).sum())
    k = k if rank is None else min(k, rank)
    return U[:, :k], S[:k], Vh[:k]


@right("svd_by_deflation")
def projecting_the_matrix_itself_twice(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    m, n = matrix.shape
    us, sigmas, vs, left = [], [], [], matrix.clone()
    generator = torch.Generator().manual_seed(5)
    for _ in range(min(m, n) if rank is None else rank):
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
        return torch.zeros(m, 0), torch.zeros(0), torch.zeros(0, n)
    return torch.stack(us, 1), torch.stack(sigmas), torch.stack(vs)


@right("svd_by_deflation")
def in_numpy(matrix: Tensor, rank: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    U, S, Vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    k = int((S[0] * max(matrix.shape) * np.finfo(S.dtype).eps < S).sum())
    k = min(k, len(S) if rank is None else rank)
    return U[:, :k], S[:k], Vh[:k]


def deflate(matrix: Tensor, rank: int | None, subtract=None, threshold=None) -> tuple[Tensor, Tensor, Tensor]:
    """Deflation with one step changed."""
    most = min(matrix.shape) if rank is None else rank
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
    k = min(matrix.shape) if rank is None else rank
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
    return reference.svd_by_deflation(matrix)


@wrong("svd_by_deflation", caught_by="changes its input")
def deflates_the_callers_matrix(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = reference.svd_by_deflation(matrix, rank)
    matrix -= (U * S @ Vh).to(matrix.dtype)
    return U, S, Vh
