"""Effective rank, subspace similarity and amplification, against known answers, laws and the paper's formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_from_scratch.linear_algebra.subspace import (
    amplification_factor,
    effective_rank,
    similarity_grid,
    subspace_similarity,
)


def randn(m: int, n: int, seed: int) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(m: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(m, k, seed))[0]  # (m, k)


# --- Effective rank ----------------------------------------------------------------------------------


def test_equal_singular_values_have_their_number_as_effective_rank() -> None:
    for r in (1, 2, 5):
        M = 0.01 * orthonormal(9, r, 0) @ orthonormal(7, r, 1).T
        assert effective_rank(M) == pytest.approx(r, rel=1e-9)
        assert effective_rank(M.float()) == pytest.approx(r, rel=1e-4)


def test_the_effective_rank_of_one_half_one_quarter_one_quarter_is_two_to_the_one_and_a_half() -> None:
    assert effective_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(2**1.5)


def test_the_zero_matrix_has_effective_rank_zero() -> None:
    assert effective_rank(torch.zeros(3, 4)) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_the_effective_rank_is_between_one_and_the_rank_and_does_not_depend_on_scale(
    m: int, n: int, r: int, seed: int, scale: float
) -> None:
    M = randn(m, r, seed) @ randn(r, n, seed + 1)
    value = effective_rank(M)
    assert 1 - 1e-9 <= value <= min(m, n, r) + 1e-9
    assert effective_rank(scale * M) == pytest.approx(value, rel=1e-9)
    assert effective_rank(orthonormal(m, m, seed) @ M) == pytest.approx(value, rel=1e-9)
    assert effective_rank(M.T) == pytest.approx(value, rel=1e-9)


# --- Subspace similarity -----------------------------------------------------------------------------


def test_a_matrix_is_wholly_similar_to_itself_and_to_a_mix_of_its_rows() -> None:
    A = randn(4, 10, 0)
    assert subspace_similarity(A, A, 3, 3) == pytest.approx(1)
    assert subspace_similarity(A, randn(6, 4, 1) @ A, 4, 4) == pytest.approx(1)
    assert subspace_similarity(A, A, 2, 4) == pytest.approx(1)  # the smaller one lies in the larger one


def test_subspaces_at_right_angles_are_not_similar_at_all() -> None:
    both = orthonormal(10, 6, 0).T
    assert subspace_similarity(both[:3], both[3:], 3, 2) == pytest.approx(0, abs=1e-12)


def test_the_similarity_of_two_lines_is_the_squared_cosine_of_their_angle() -> None:
    for angle in (0.0, 0.3, math.pi / 4, 1.5):
        A, B = torch.tensor([[2.0, 0.0]]), torch.tensor([[math.cos(angle), math.sin(angle)]])
        assert subspace_similarity(A, B, 1, 1) == pytest.approx(math.cos(angle) ** 2, abs=1e-6)


def test_one_shared_direction_of_two_is_a_half() -> None:
    rows = torch.eye(5)
    assert subspace_similarity(rows[[0, 1]], rows[[1, 2]], 2, 2) == pytest.approx(0.5)


def test_the_directions_are_those_of_the_largest_singular_values() -> None:
    rows = torch.eye(4)
    A, B = torch.diag(torch.tensor([1.0, 5.0, 3.0])) @ rows[:3], 7 * rows[[1]]
    assert subspace_similarity(A, B, 1, 1) == pytest.approx(1)
    assert subspace_similarity(A, 7 * rows[[2]], 1, 1) == pytest.approx(0, abs=1e-6)
    assert subspace_similarity(A, 7 * rows[[2]], 2, 1) == pytest.approx(1)


def test_random_subspaces_are_similar_by_the_larger_dimension_over_the_width() -> None:
    values = [subspace_similarity(randn(8, 100, s), randn(64, 100, s + 500), 4, 32) for s in range(40)]
    assert np.mean(values) == pytest.approx(32 / 100, abs=0.03)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(6, 12), st.integers(0, 2**31))
def test_the_similarity_is_the_papers_formula_with_numpys_singular_vectors(i: int, j: int, n: int, seed: int) -> None:
    A, B = randn(5, n, seed), randn(6, n, seed + 1)
    V_A = np.linalg.svd(A.numpy())[2][:i].T
    V_B = np.linalg.svd(B.numpy())[2][:j].T
    expected = np.linalg.norm(V_A.T @ V_B, "fro") ** 2 / min(i, j)
    value = subspace_similarity(A, B, i, j)
    assert value == pytest.approx(expected, abs=1e-9)
    assert 0 <= value <= 1
    assert subspace_similarity(B, A, j, i) == pytest.approx(value, abs=1e-9)
    if i == j:  # appendix G: 1 - d^2 / p, with the projection metric d
        distance = np.linalg.norm(V_A @ V_A.T - V_B @ V_B.T, "fro") / math.sqrt(2)
        assert value == pytest.approx(1 - distance**2 / i, abs=1e-9)


def test_rounding_never_makes_a_similarity_larger_than_one() -> None:
    values = [subspace_similarity(A, A, 4, 4) for A in (randn(5, 12, seed) for seed in range(20))]
    assert 1 - 1e-12 < min(values) <= max(values) <= 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(6, 12), st.integers(0, 2**31))
def test_every_entry_of_the_grid_is_the_similarity_of_its_sizes(rows: int, columns: int, n: int, seed: int) -> None:
    A, B = randn(5, n, seed), randn(6, n, seed + 1)
    grid = similarity_grid(A, B, rows, columns)
    assert grid.shape == (rows, columns)
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            assert float(grid[i - 1, j - 1]) == pytest.approx(subspace_similarity(A, B, i, j), abs=1e-9)


# --- Amplification -----------------------------------------------------------------------------------


def test_the_amplification_is_the_papers_ratio_where_the_paper_gives_its_norms() -> None:
    # Table 7, r = 4: |U^T W V| = 0.32 and |delta_W| = 6.91; the rest of W (norm 61.95) must not count.
    U, V = orthonormal(20, 8, 0), orthonormal(16, 8, 1)
    delta_W = (6.91 / 2) * U[:, :4] @ V[:, :4].T
    W = (0.32 / 2) * U[:, :4] @ V[:, :4].T + 30 * U[:, 4:] @ V[:, 4:].T
    assert amplification_factor(W, delta_W, 4) == pytest.approx(6.91 / 0.32)


def test_a_scaled_copy_amplifies_by_its_scale_whatever_the_rank() -> None:
    W = randn(6, 5, 0)
    for r in range(1, 6):
        assert amplification_factor(W, 3 * W, r) == pytest.approx(3)
        assert amplification_factor(W, -0.5 * W, r) == pytest.approx(0.5)


def test_a_weight_with_nothing_in_the_updates_directions_is_amplified_without_end() -> None:
    assert amplification_factor(torch.zeros(3, 3), torch.eye(3), 2) == math.inf
    W = torch.diag(torch.tensor([0.0, 1.0, 1.0]))
    assert amplification_factor(W, torch.diag(torch.tensor([2.0, 0.0, 0.0])), 1) == math.inf


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_the_amplification_is_the_formula_with_numpys_singular_vectors(r: int, seed: int, scale: float) -> None:
    W, delta_W = randn(8, 6, seed), scale * randn(8, 4, seed + 1) @ randn(4, 6, seed + 2)
    U, _, Vh = np.linalg.svd(delta_W.numpy())
    project = [np.linalg.norm(U[:, :r].T @ M.numpy() @ Vh[:r].T) for M in (delta_W, W)]
    assert amplification_factor(W, delta_W, r) == pytest.approx(project[0] / project[1], rel=1e-7)
    assert amplification_factor(W, delta_W, 4) == pytest.approx(
        float(delta_W.norm()) / np.linalg.norm(U[:, :4].T @ W.numpy() @ Vh[:4].T), rel=1e-7
    )


# --- Inputs ------------------------------------------------------------------------------------------


def test_directions_beyond_the_rank_are_refused() -> None:
    A = randn(4, 2, 0) @ randn(2, 9, 1)
    with pytest.raises(ValueError, match=r"i \(at most the numerical rank of A\) must be .* between 1 and 2, got 3"):
        subspace_similarity(A, A, 3, 1)
    with pytest.raises(ValueError, match=r"j \(at most the numerical rank of B\) must be .* between 1 and 2, got 0"):
        subspace_similarity(A, A, 1, 0)
    with pytest.raises(ValueError, match=r"rows \(at most the numerical rank of A\) must be .* between 1 and 2, got 3"):
        similarity_grid(A, A, 3, 1)
    with pytest.raises(ValueError, match="A must not be zero"):
        subspace_similarity(torch.zeros(2, 3), torch.ones(2, 3), 1, 1)
    with pytest.raises(ValueError, match=r"rank \(at most the numerical rank of delta_W\) must be .* 1 and 2, got 3"):
        amplification_factor(A, A, 3)
    with pytest.raises(ValueError, match="delta_W must not be zero"):
        amplification_factor(A, torch.zeros_like(A), 1)


def test_matrices_that_do_not_fit_or_are_not_finite_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"same number of columns, got \(2, 3\) and \(2, 4\)"):
        subspace_similarity(torch.ones(2, 3), torch.ones(2, 4), 1, 1)
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(3, 2\)"):
        amplification_factor(torch.ones(2, 3), torch.ones(3, 2), 1)
    bad = torch.full((2, 2), math.nan)
    with pytest.raises(ValueError, match=r"^B must be finite, got nan"):
        subspace_similarity(torch.eye(2), bad, 1, 1)
    with pytest.raises(ValueError, match=r"^W must be finite, got nan"):
        amplification_factor(bad, torch.eye(2), 1)
    with pytest.raises(ValueError, match=r"^delta_W must be finite, got nan"):
        amplification_factor(torch.eye(2), bad, 1)
    with pytest.raises(ValueError, match=r"^matrix must have two axes"):
        effective_rank(torch.ones(3))


def test_the_inputs_are_not_modified() -> None:
    M, N = randn(4, 6, 0).requires_grad_(), randn(4, 6, 1).requires_grad_()
    before = M.detach().clone(), N.detach().clone()
    effective_rank(M)
    subspace_similarity(M, N, 2, 3)
    similarity_grid(M, N, 2, 3)
    amplification_factor(M, N, 2)
    assert torch.equal(M, before[0])
    assert torch.equal(N, before[1])
