"""The singular value decomposition: built from power iteration, then used to truncate a matrix to low rank.

M (m, n) = U diag(S) Vh: U (m, k) has orthonormal columns, Vh (k, n) has orthonormal rows, S (k,) is positive and
descending; these are torch.linalg.svd's names and layout. Inputs are not modified, and results do not carry gradients.
The first three functions build the decomposition; the others call torch.linalg.

Sign: (u, v) and (-u, -v) are the same triplet, and either is right. Here the entry of v with the largest absolute
value is positive (the first, if several are equal), and u has the matching sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_from_scratch.linear_algebra.rank import require_matrix, require_rank, rounding_tolerance

# --- Building the decomposition ----------------------------------------------------------------------


def dominant_eigenvector(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The direction that a symmetric matrix stretches most, found by power iteration.

    Start from a random x. Multiply it by G and divide it by its norm, again and again, until it has settled (Golub and
    Van Loan, section 8.2.1). It also settles where two eigenvalues are nearly equal: a difference of 0.2 % takes about
    14,000 steps. To save most of them, square G after every step, and divide it by its norm so that it does not
    overflow.

    Args:
        G: (k, k), symmetric, without negative eigenvalues, such as `M^T M`.
        generator: draws the random start (on the CPU), so that equal generators give equal answers; None means a new
            one with seed 0.

    Returns:
        x: (k,), of norm 1 with `G x = lambda_1 x`, in the computing dtype (`require_matrix`). Either sign is right. If
            the largest eigenvalue is repeated, any unit vector of its eigenspace is; for the zero matrix, any unit
            vector.

    Raises:
        ValueError: see `require_matrix`; or G is not square.
    """
    G = require_matrix(G, "G")
    if G.shape[0] != G.shape[1]:
        raise ValueError(f"G must be square, got shape {tuple(G.shape)}: for a matrix M take M.T @ M")
    x = _unit(torch.randn(len(G), generator=generator or torch.Generator().manual_seed(0)).to(G))
    for _ in range(64 if G.any() else 0):
        G = G / G.norm()
        previous, x = x, _unit(G @ x)
        if (x - previous).norm() <= 8 * torch.finfo(x.dtype).eps:
            break
        G = G.T @ G  # G^2, and symmetric whatever rounding did to G
    return x


def dominant_singular_triplet(
    matrix: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular value and its two singular vectors.

    Entries may have any size. The square of 1e-30 is 0 in float32, and that of 1e30 is infinite, so M is first divided
    by its largest absolute entry.

    Args:
        matrix: M, (m, n).
        generator: as in `dominant_eigenvector`.

    Returns:
        u: (m,), of norm 1 with `M v = sigma u`.
        sigma: a scalar of at least 0.
        v: (n,), of norm 1 with `M^T u = sigma v`. (-u, -v) is as right as (u, v). For the zero matrix sigma is 0 and
            any unit vectors are right. All are in the computing dtype (`require_matrix`).

    Raises:
        ValueError: see `require_matrix`.
    """
    matrix = require_matrix(matrix)
    m, n = matrix.shape
    largest = matrix.abs().max()
    if largest == 0:
        return _first(m, matrix), largest, _first(n, matrix)
    scaled = matrix / largest
    if m >= n:
        v = dominant_eigenvector(scaled.T @ scaled, generator)
    else:
        v = _unit(scaled.T @ dominant_eigenvector(scaled @ scaled.T, generator))
    v = v * _sign_of_largest(v)
    u = scaled @ v
    return _unit(u), u.norm() * largest, v


def svd_by_deflation(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition, one triplet at a time: find the largest, subtract it, repeat.

    `R_0 = M`; `(u, sigma, v)` is the dominant triplet of `R_k`; `R_(k+1) = R_k - sigma u v^T`. It ends when
    `rank` triplets are found or when sigma is at most `max(m, n) * eps * sigma_1`, which is rounding error and not
    part of M.

    Two things go wrong in practice. First, the subtraction leaves a rounding error of `eps sigma_1` along the old
    directions, which is large beside a sigma of 1e-12: so after each subtraction project the old directions out of R
    once more, `R <- (I - U U^T) R (I - V V^T)`. Second, where a singular value is repeated, the old random start
    reaches the missing directions only by its rounding error: so take a new random start each time (pass the same
    generator to every call).

    Args:
        matrix: M, (m, n).
        rank: the largest number of triplets to return, between 0 and min(m, n); None means all of them.

    Returns:
        U: (m, k), orthonormal columns. k is the smaller of `rank` and the number of singular values above the
            threshold, 0 for the zero matrix.
        S: (k,), largest first.
        Vh: (k, n), orthonormal rows. Unless `rank` limits it, `U * S @ Vh` is M. Each pair of vectors may have either
            sign. All are in the computing dtype.

    Raises:
        ValueError: see `require_matrix`; or the rank is out of range.
    """
    matrix = require_matrix(matrix)
    most = min(matrix.shape) if rank is None else require_rank(rank, min(matrix.shape))
    U, S, Vh = matrix[:, :0], matrix[0, :0], matrix[:0]  # no triplet yet: (m, 0), (0,), (0, n)
    generator = torch.Generator().manual_seed(0)
    residual = matrix
    while len(S) < most:
        u, sigma, v = dominant_singular_triplet(residual, generator=generator)
        if sigma <= rounding_tolerance(matrix, float(S[0] if len(S) else sigma)):
            break
        U, S, Vh = torch.column_stack([U, u]), torch.cat([S, sigma[None]]), torch.vstack([Vh, v])
        residual = residual - sigma * torch.outer(u, v)
        residual = residual - U @ (U.T @ residual)
        residual = residual - (residual @ Vh.T) @ Vh
    return U, S, Vh


def _unit(x: Tensor) -> Tensor:
    return x / x.norm()


def _first(size: int, like: Tensor) -> Tensor:
    """The first basis vector, (size,)."""
    return torch.eye(1, size, dtype=like.dtype, device=like.device)[0]


def _sign_of_largest(x: Tensor) -> Tensor:
    """+1 or -1 for every vector along the last axis: the sign of its entry of largest absolute value. (..., 1)"""
    return x.gather(-1, x.abs().argmax(dim=-1, keepdim=True)).sign()


# --- Using the decomposition -------------------------------------------------------------------------


def truncate(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of rank at most r: the first r terms of `sum_k S_k U[:, k] Vh[k]`.

    It is nearest both in the Frobenius and in the spectral norm (Eckart and Young 1936; Mirsky 1960).

    Args:
        matrix: M, (m, n).
        rank: r, between 0 (the zero matrix) and min(m, n) (M itself, up to rounding).

    Returns:
        (m, n), the computing dtype.

    Raises:
        ValueError: see `require_matrix`; or the rank is out of range.
    """
    matrix = require_matrix(matrix)
    require_rank(rank, min(matrix.shape))
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def approximation_error(matrix: Tensor, rank: int, norm: str = "frobenius") -> float:
    """Distance of M from the nearest matrix of rank r, computed from its singular values (Eckart and Young 1936).

    In the Frobenius norm `sqrt(S_(r+1)^2 + S_(r+2)^2 + ...)`, in the spectral norm `S_(r+1)`; 0 if r = min(m, n).

    Args:
        matrix: M, (m, n).
        rank: r, between 0 (the error is the norm of M) and min(m, n).
        norm: "frobenius" or "spectral".

    Raises:
        ValueError: see `require_matrix`; the rank is out of range; or the norm is unknown.
    """
    matrix = require_matrix(matrix)
    require_rank(rank, min(matrix.shape))
    if norm not in ("frobenius", "spectral"):
        raise ValueError(f"norm must be 'frobenius' or 'spectral', got {norm!r}")
    left_out = torch.linalg.svdvals(matrix)[rank:]
    if norm == "frobenius":
        return float(left_out.double().norm())
    return float(left_out[0]) if len(left_out) else 0.0


def rank_for_energy(matrix: Tensor, energy: float) -> int:
    """The smallest rank that keeps a share of the energy: `S_1^2 + ... + S_r^2 >= energy * |M|_F^2`.

    A sum that falls short by at most `8 eps |M|_F^2`, which may be rounding error, counts as reached (eps as in
    `rounding_tolerance`). So `energy` = 1 does not require directions that together hold less than that.

    Args:
        matrix: M, (m, n).
        energy: the share, above 0 and at most 1.

    Returns:
        r, from 1 to min(m, n); 0 for the zero matrix.

    Raises:
        ValueError: see `require_matrix`; or energy is out of range.
    """
    matrix = require_matrix(matrix)
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1 (0.9 keeps 90 %), got {energy}")
    S = torch.linalg.svdvals(matrix).double()
    if S[0] == 0:
        return 0
    kept = ((S / S[0]) ** 2).cumsum(0)  # kept[r - 1]: what rank r keeps, in units of S_1^2
    enough = (energy - 8 * torch.finfo(matrix.dtype).eps) * kept[-1]
    return int((kept < enough).sum()) + 1


def pca(data: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Principal component analysis: the SVD of the centred data.

    A direction is a unit vector in the space of the features. The first is that along which the samples vary most, the
    second varies most among those at right angles to the first, and so on. Variances are divided by N - 1. A sample's
    coordinates are `(data - mean) @ directions.T`.

    Args:
        data: (N, d), one sample per row, N >= 2.
        count: number of directions, between 1 and min(N, d).

    Returns:
        mean: (d,), of the samples.
        directions: (count, d), orthonormal rows, largest variance first, each with either sign.
        variances: (count,), along them. All are in the computing dtype.

    Raises:
        ValueError: see `require_matrix`; there is only one sample; or count is out of range.
    """
    data = require_matrix(data, "data")
    if len(data) < 2:
        raise ValueError("data must have at least 2 samples (rows): one sample has no variance")
    require_rank(count, min(data.shape), smallest=1, name="count")
    mean = data.mean(dim=0)
    _, S, Vh = torch.linalg.svd(data - mean, full_matrices=False)
    directions = Vh[:count] * _sign_of_largest(Vh[:count])
    return mean, directions, S[:count] ** 2 / (len(data) - 1)
