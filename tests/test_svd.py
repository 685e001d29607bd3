"""The singular value decomposition and what is made of it, against numpy, laws and known spectra."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_from_scratch.linear_algebra.svd import (
    approximation_error,
    dominant_eigenvector,
    dominant_singular_triplet,
    pca,
    rank_for_energy,
    svd_by_deflation,
    truncate,
)

DTYPES = [torch.float32, torch.float64]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def randn(m: int, n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(S: list[float], m: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """An (m, n) matrix with these singular values (and zeros) and random singular vectors."""
    U, _ = torch.linalg.qr(randn(m, len(S), seed))
    V, _ = torch.linalg.qr(randn(n, len(S), seed + 1))
    return (U * torch.tensor(S, dtype=torch.float64) @ V.T).to(dtype)


def hilbert(dtype: torch.dtype) -> Tensor:
    i = torch.arange(12, dtype=torch.float64)
    return (1 / (i[:, None] + i + 1)).to(dtype)


def singular_values(M: Tensor) -> np.ndarray:
    return np.linalg.svd(M.numpy(), compute_uv=False)


def assert_is_the_svd(M: Tensor, rank: int) -> None:
    """Shapes, dtype, orthonormality, numpy's singular values, signs, and the product."""
    U, S, Vh = svd_by_deflation(M)
    eps = torch.finfo(M.dtype).eps
    assert (U.shape, S.shape, Vh.shape) == ((M.shape[0], rank), (rank,), (rank, M.shape[1]))
    assert U.dtype == S.dtype == Vh.dtype == M.dtype
    near = 100 * eps
    identity = torch.eye(rank, dtype=M.dtype)
    torch.testing.assert_close(U.T @ U, identity, rtol=0, atol=near)
    torch.testing.assert_close(Vh @ Vh.T, identity, rtol=0, atol=near)
    expected = singular_values(M)
    np.testing.assert_allclose(S.numpy(), expected[:rank], rtol=0, atol=near * float(expected[0]))
    torch.testing.assert_close(U * S @ Vh, M, rtol=0, atol=near * float(expected[0]))
    for v in Vh:
        assert v[v.abs().argmax()] > 0


# --- Power iteration ---------------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("eigenvalues", [[5.0, 3.0, 0.5], [1.0, 0.998, 0.3], [7.0], [2.0, 0.0, 0.0]])
def test_the_dominant_eigenvector_is_numpys(eigenvalues: list[float], dtype: torch.dtype) -> None:
    V, _ = torch.linalg.qr(randn(6, len(eigenvalues), 4))
    G = (V * torch.tensor(eigenvalues, dtype=torch.float64) @ V.T).to(dtype)
    x = dominant_eigenvector(G)
    expected = np.linalg.eigh(G.double().numpy())[1][:, -1]
    near = 10 * torch.finfo(dtype).eps / 0.002
    assert (x.shape, x.dtype) == ((6,), dtype)
    assert float(x.norm()) == pytest.approx(1, abs=10 * torch.finfo(dtype).eps)
    assert abs(float(x.double().numpy() @ expected)) == pytest.approx(1, abs=near)
    torch.testing.assert_close(G @ x, eigenvalues[0] * x, rtol=0, atol=100 * torch.finfo(dtype).eps)


def test_the_zero_matrix_has_some_unit_vector_as_its_dominant_one() -> None:
    assert float(dominant_eigenvector(torch.zeros(3, 3)).norm()) == pytest.approx(1)


def test_a_matrix_that_is_not_square_has_no_eigenvector() -> None:
    with pytest.raises(ValueError, match=r"G must be square, got shape \(3, 2\): for a matrix M take M.T @ M"):
        dominant_eigenvector(torch.ones(3, 2))


@both_dtypes
@pytest.mark.parametrize("shape", [(6, 6), (40, 5), (5, 40), (1, 9), (9, 1), (1, 1)])
def test_the_dominant_triplet_is_numpys(shape: tuple[int, int], dtype: torch.dtype) -> None:
    M = randn(*shape, seed=3, dtype=dtype)
    u, sigma, v = dominant_singular_triplet(M)
    expected_u, expected_S, expected_Vh = np.linalg.svd(M.numpy())
    near = 200 * torch.finfo(dtype).eps
    assert (u.shape, sigma.shape, v.shape) == ((shape[0],), (), (shape[1],))
    assert u.dtype == sigma.dtype == v.dtype == dtype
    np.testing.assert_allclose(sigma.numpy(), expected_S[0], rtol=near)
    expected_product = np.outer(expected_u[:, 0], expected_Vh[0])
    np.testing.assert_allclose(torch.outer(u, v).numpy(), expected_product, rtol=0, atol=near)
    assert v[v.abs().argmax()] > 0


@both_dtypes
def test_a_repeated_largest_singular_value_gives_some_triplet_of_its_subspace(dtype: torch.dtype) -> None:
    M = with_spectrum([3.0, 3.0, 3.0, 1.0], 7, 5, dtype)
    near = 100 * torch.finfo(dtype).eps
    for seed in range(5):
        u, sigma, v = dominant_singular_triplet(M, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(sigma, torch.tensor(3.0, dtype=dtype), rtol=near, atol=0)
        torch.testing.assert_close(M @ v, sigma * u, rtol=0, atol=near)
        torch.testing.assert_close(M.T @ u, sigma * v, rtol=0, atol=near)
        torch.testing.assert_close(v.norm(), torch.ones((), dtype=dtype), rtol=near, atol=0)


GAPS = [1e-2, 1e-3, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12, 1e-14]


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
def test_nearly_equal_singular_values_are_told_apart(shape: tuple[int, int], gap: float) -> None:
    M = with_spectrum([1.0, 1 - gap, 1 - 2 * gap, 0.3], *shape)
    u, sigma, v = dominant_singular_triplet(M)
    assert float(sigma) == pytest.approx(1, rel=1e-13)
    torch.testing.assert_close(M.T @ u, sigma * v, rtol=0, atol=1e-13)
    assert_is_the_svd(M, rank=4)


def test_the_same_matrix_always_gives_the_same_triplet() -> None:
    M = torch.eye(4)
    torch.manual_seed(0)
    first = dominant_singular_triplet(M)
    torch.manual_seed(1)
    assert all(torch.equal(x, y) for x, y in zip(first, dominant_singular_triplet(M), strict=True))


@both_dtypes
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_very_small_and_very_large_entries_neither_vanish_nor_overflow(size: float, dtype: torch.dtype) -> None:
    M = size * with_spectrum([2.0, 1.0], 5, 4, dtype)
    _, sigma, _ = dominant_singular_triplet(M)
    assert float(sigma) == pytest.approx(2 * size, rel=1e-5)
    U, S, Vh = svd_by_deflation(M)
    assert S.tolist() == pytest.approx([2 * size, size], rel=1e-5)
    assert float(((U * S @ Vh - M) / size).abs().max()) < 1e-5
    assert approximation_error(M, 0) == pytest.approx(math.sqrt(5) * size, rel=1e-5)
    assert rank_for_energy(M, 0.9) == 2


def test_the_zero_matrix_has_the_singular_value_zero_and_unit_vectors() -> None:
    u, sigma, v = dominant_singular_triplet(torch.zeros(3, 2))
    assert (u.tolist(), float(sigma), v.tolist()) == ([1, 0, 0], 0, [1, 0])


# --- Deflation ---------------------------------------------------------------------------------------


@both_dtypes
def test_deflation_is_the_svd_of_100_random_shapes_in_each_precision(dtype: torch.dtype) -> None:
    draw = np.random.default_rng(DTYPES.index(dtype))  # other shapes in each precision: 200 in all
    for seed in range(100):
        m, n = (int(side) for side in draw.integers(1, 13, size=2))
        r = int(draw.integers(1, min(m, n) + 1))
        M = (randn(m, r, seed) @ randn(r, n, seed + 1000)).to(dtype)
        assert_is_the_svd(M, rank=int(np.linalg.matrix_rank(M.numpy())))


@both_dtypes
@pytest.mark.parametrize(
    ("S", "shape"),
    [
        ([5.0], (6, 4)),
        ([2.0, 2.0, 2.0, 2.0], (4, 4)),
        ([2.0, 2.0, 1.0, 1.0, 1.0], (9, 6)),
        ([1.0, 1.0, 1.0], (3, 60)),
        ([4.0, 3.0, 1.0], (60, 3)),
    ],
)
def test_deflation_finds_rank_one_repeated_tall_and_wide(
    S: list[float], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    assert_is_the_svd(with_spectrum(S, *shape, dtype), rank=len(S))


@both_dtypes
def test_the_identity_has_as_many_ones_as_rows(dtype: torch.dtype) -> None:
    assert_is_the_svd(torch.eye(6, dtype=dtype), rank=6)


def test_tiny_singular_values_keep_their_vectors_orthonormal() -> None:
    S = [1.0, 1e-2, 1e-5, 1e-8, 1e-11, 1e-13]
    assert_is_the_svd(with_spectrum(S, 8, 7), rank=6)


@both_dtypes
def test_the_hilbert_matrix_is_decomposed_down_to_rounding(dtype: torch.dtype) -> None:
    assert_is_the_svd(hilbert(dtype), rank=int(np.linalg.matrix_rank(hilbert(dtype).numpy())))


def test_deflation_stops_at_the_rank_that_is_asked_for() -> None:
    M = with_spectrum([3.0, 2.0, 1.0], 5, 4)
    for r in range(5):
        U, S, Vh = svd_by_deflation(M, r)
        assert S.tolist() == pytest.approx([3.0, 2.0, 1.0][:r])
        torch.testing.assert_close(U * S @ Vh, truncate(M, r), rtol=0, atol=1e-13)


def test_the_zero_matrix_has_no_triplet() -> None:
    U, S, Vh = svd_by_deflation(torch.zeros(3, 2))
    assert (U.shape, S.shape, Vh.shape) == ((3, 0), (0,), (0, 2))
    assert torch.equal(U * S @ Vh, torch.zeros(3, 2))


# --- Truncation and its error ------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(0, 2**31), st.floats(0, 1))
def test_no_matrix_of_that_rank_is_nearer_than_the_truncation(
    m: int, n: int, r: int, seed: int, closeness: float
) -> None:
    r = min(r, m, n)
    M = randn(m, n, seed)
    best = truncate(M, r)
    assert np.linalg.matrix_rank(best.numpy(), tol=1e-10) <= r
    orders: list[tuple[str, Literal["fro"] | float]] = [("frobenius", "fro"), ("spectral", 2.0)]
    # A competitor: random factors, or factors of the best one that are moved a little.
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    B = U[:, :r] * S[:r] + closeness * randn(m, r, seed + 1)
    A = Vh[:r] + closeness * randn(r, n, seed + 2)
    for norm, order in orders:
        error = approximation_error(M, r, norm)
        assert error == pytest.approx(np.linalg.norm((M - best).numpy(), ord=order), abs=1e-12)
        assert error <= np.linalg.norm((M - B @ A).numpy(), ord=order) + 1e-12


def test_the_error_of_a_known_spectrum_is_the_tail() -> None:
    M = with_spectrum([12.0, 4.0, 3.0], 5, 6)
    assert [approximation_error(M, r) for r in range(6)] == pytest.approx([13, 5, 3, 0, 0, 0], abs=1e-13)
    assert [approximation_error(M, r, "spectral") for r in range(6)] == pytest.approx([12, 4, 3, 0, 0, 0], abs=1e-13)
    assert approximation_error(M, 5, "spectral") == 0.0


@both_dtypes
def test_truncation_at_full_rank_is_the_matrix_and_at_rank_zero_is_zero(dtype: torch.dtype) -> None:
    M = randn(4, 7, 0, dtype)
    torch.testing.assert_close(truncate(M, 4), M, rtol=0, atol=100 * torch.finfo(dtype).eps)
    assert torch.equal(truncate(M, 0), torch.zeros_like(M))


# --- Energy ------------------------------------------------------------------------------------------


@both_dtypes
def test_the_rank_for_an_energy_is_the_first_that_reaches_it(dtype: torch.dtype) -> None:
    M = with_spectrum([3.0, 2.0, 1.0, 1.0], 6, 5, dtype)  # squares 9, 4, 1, 1 of 15
    shares = [0.01, 9 / 15, 0.601, 13 / 15, 0.87, 14 / 15, 0.94, 1.0]
    assert [rank_for_energy(M, share) for share in shares] == [1, 1, 2, 2, 3, 3, 4, 4]


@both_dtypes
def test_equal_singular_values_share_the_energy_equally(dtype: torch.dtype) -> None:
    for size in (1, 4, 10, 64):
        M = with_spectrum([1.0] * size, size, size, dtype, seed=size)
        assert [rank_for_energy(M, k / size) for k in range(1, size + 1)] == list(range(1, size + 1))


def test_all_of_the_energy_is_asked_only_of_directions_that_have_some() -> None:
    assert rank_for_energy(randn(20, 3, 0) @ randn(3, 30, 1), 1.0) == 3
    assert rank_for_energy(torch.zeros(3, 4), 1.0) == 0


# --- Principal components ----------------------------------------------------------------------------


@both_dtypes
def test_pca_gives_the_eigenvectors_of_the_covariance_matrix(dtype: torch.dtype) -> None:
    data = (with_spectrum([5.0, 3.0, 1.0, 0.2], 50, 4) + torch.tensor([10.0, -3.0, 0.0, 1.0])).to(dtype)
    mean, directions, variances = pca(data, 3)
    values, vectors = np.linalg.eigh(np.cov(data.double().numpy(), rowvar=False))
    near = 1e-4 if dtype == torch.float32 else 1e-10
    np.testing.assert_allclose(mean.numpy(), data.double().numpy().mean(axis=0), atol=near)
    np.testing.assert_allclose(variances.numpy(), values[::-1][:3], atol=near)
    for direction, expected in zip(directions.numpy(), vectors.T[::-1][:3], strict=True):
        assert abs(direction @ expected) == pytest.approx(1, abs=near)
        assert direction[np.abs(direction).argmax()] > 0
    coordinates = (data - mean) @ directions.T
    np.testing.assert_allclose(coordinates.var(dim=0).numpy(), variances.numpy(), atol=near)


def test_pca_does_not_mind_where_the_data_lie() -> None:
    data = randn(9, 4, 0)
    for moved, still in zip(pca(data + 100, 2)[1:], pca(data, 2)[1:], strict=True):
        torch.testing.assert_close(moved, still, rtol=1e-9, atol=1e-9)


# --- Inputs ------------------------------------------------------------------------------------------


def test_the_input_is_not_modified() -> None:
    M = randn(5, 4, 0).requires_grad_()
    before = M.detach().clone()
    dominant_eigenvector(M[:4])
    dominant_singular_triplet(M)
    svd_by_deflation(M)
    truncate(M, 2)
    approximation_error(M, 2)
    rank_for_energy(M, 0.5)
    pca(M, 2)
    assert torch.equal(M, before)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.tensor([[1.0, 2.0], [float("nan"), 1.0]]), "must be finite, got nan at row 1, column 0"),
        (torch.tensor([[float("inf"), 2.0]]), "must be finite, got inf at row 0, column 0"),
        (torch.zeros(3), "must have two axes"),
        (torch.zeros(2, 2, 2), "must have two axes"),
    ],
)
def test_what_is_no_finite_matrix_is_refused(matrix: Tensor, message: str) -> None:
    for call in (
        lambda: dominant_eigenvector(matrix),
        lambda: dominant_singular_triplet(matrix),
        lambda: svd_by_deflation(matrix),
        lambda: truncate(matrix, 1),
        lambda: approximation_error(matrix, 1),
        lambda: rank_for_energy(matrix, 0.9),
        lambda: pca(matrix, 1),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_arguments_out_of_range_are_refused_with_what_is_allowed() -> None:
    M = torch.eye(3, 4)
    for rank in (-1, 4, 1.5, True):
        for function in (svd_by_deflation, truncate, approximation_error):
            with pytest.raises(ValueError, match="rank must be a whole number between 0 and 3, got"):
                function(M, rank)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm must be 'frobenius' or 'spectral', got 'nuclear'"):
        approximation_error(M, 1, "nuclear")
    for energy in (0.0, -0.1, 1.1, 90, float("nan")):
        with pytest.raises(ValueError, match="energy must be above 0 and at most 1"):
            rank_for_energy(M, energy)
    with pytest.raises(ValueError, match="count must be a whole number between 1 and 3, got 4"):
        pca(M, 4)
    with pytest.raises(ValueError, match="at least 2 samples"):
        pca(torch.ones(1, 4), 1)
