"""Gaussian elimination, rank and low-rank sums, against numpy, laws and hand-made matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_from_scratch.linear_algebra.rank import (
    low_rank_parameter_count,
    outer_product_sum,
    rank,
    rank_deficiency,
    require_matrix,
    rounding_tolerance,
    row_echelon,
)

DTYPES = [torch.float32, torch.float64]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)
COUNTING = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])


def hilbert(size: int, dtype: torch.dtype) -> Tensor:
    i = torch.arange(size, dtype=torch.float64)
    return (1 / (i[:, None] + i + 1)).to(dtype)


def low_rank(m: int, n: int, r: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(m, r, generator=generator, dtype=torch.float64)
    return (B @ torch.randn(r, n, generator=generator, dtype=torch.float64)).to(dtype)


def random_cases(count: int, side: int) -> list[tuple[int, int, int]]:
    """(m, n, r) with sides 1 to `side` and r from 0 to the smaller side, always the same ones."""
    draw = np.random.default_rng(7)
    sizes = [(int(draw.integers(1, side + 1)), int(draw.integers(1, side + 1))) for _ in range(count)]
    return [(m, n, int(draw.integers(0, min(m, n) + 1))) for m, n in sizes]


@both_dtypes
def test_rank_equals_numpys_on_200_random_shapes(dtype: torch.dtype) -> None:
    for seed, (m, n, r) in enumerate(random_cases(200, 24)):
        M = low_rank(m, n, r, dtype, seed)
        assert rank(M) == np.linalg.matrix_rank(M.numpy()) == r, (seed, m, n, r)


@both_dtypes
def test_counting_to_nine_has_rank_two(dtype: torch.dtype) -> None:
    assert rank(COUNTING.to(dtype)) == 2
    assert rank_deficiency(COUNTING.to(dtype)) == 1
    assert rank(COUNTING.long()) == 2


@both_dtypes
@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (torch.zeros(3, 5), 0),
        (torch.ones(1, 1), 1),
        (torch.zeros(1, 1), 0),
        (torch.outer(torch.arange(1.0, 8), torch.arange(-2.0, 3)), 1),
        (torch.eye(6), 6),
        (torch.eye(4)[[0, 0, 1, 1, 3]], 3),
        (torch.ones(400, 2), 1),
        (torch.ones(2, 400), 1),
        (torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 2),
        (torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 2.0]]), 1),
        (2.0**-100 * COUNTING, 2),
        (2.0**100 * COUNTING, 2),
    ],
)
def test_the_rank_of_easy_matrices_is_exact(matrix: Tensor, expected: int, dtype: torch.dtype) -> None:
    assert rank(matrix.to(dtype)) == expected
    assert rank(matrix.to(dtype).T) == expected
    assert rank_deficiency(matrix.to(dtype)) == min(matrix.shape) - expected


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float64, 11), (torch.float32, 6)])
def test_the_hilbert_matrix_shows_as_many_ranks_as_numpy_sees_at_the_same_kind_of_tolerance(
    dtype: torch.dtype, expected: int
) -> None:
    H = hilbert(12, dtype)
    largest = np.linalg.svd(H.numpy(), compute_uv=False)[0]
    same_kind = 12 * np.finfo(H.numpy().dtype).eps * largest  # numpy's default, spelled out
    assert np.linalg.matrix_rank(H.numpy(), tol=same_kind) == np.linalg.matrix_rank(H.numpy()) == expected
    assert rank(H) == expected


def test_the_hilbert_matrix_has_full_rank_when_nothing_counts_as_zero() -> None:
    assert rank(hilbert(12, torch.float64), tolerance=0) == 12


def test_a_larger_tolerance_never_gives_a_larger_rank() -> None:
    ranks = [rank(hilbert(12, torch.float64), tolerance=10.0**-k) for k in range(20)]
    assert ranks == sorted(ranks)
    assert ranks[0] == 0


def test_an_entry_equal_to_the_tolerance_counts_as_zero() -> None:
    M = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    assert [rank(M, tolerance) for tolerance in (0.5, 1.0, 2.0, 4.0)] == [3, 2, 1, 0]


def test_elimination_misses_the_tiny_singular_value_that_the_docstring_names() -> None:
    M = torch.eye(60, dtype=torch.float64) - torch.ones(60, 60, dtype=torch.float64).triu(1)
    assert np.linalg.matrix_rank(M.numpy()) == 59
    assert rank(M) == 60


@both_dtypes
def test_the_echelon_form_spans_the_rows_of_the_matrix_and_is_zero_below_its_diagonal(dtype: torch.dtype) -> None:
    for seed, (m, n, r) in enumerate(random_cases(60, 12)):
        M = low_rank(m, n, r, dtype, seed)
        echelon, columns = row_echelon(M)
        assert echelon.dtype == dtype
        assert echelon.shape == M.shape
        assert torch.equal(echelon, echelon.triu())
        assert (echelon.diagonal()[:r] != 0).all()
        assert not echelon[r:].any()
        assert sorted(columns.tolist()) == list(range(n))
        both = np.vstack([M[:, columns].double().numpy(), echelon.double().numpy()])
        loose = 1e3 * rounding_tolerance(M, float(M.abs().max()))
        assert np.linalg.matrix_rank(both, tol=loose) == np.linalg.matrix_rank(both[:m], tol=loose)
        # The pivot columns are independent columns of M.
        assert np.linalg.matrix_rank(M[:, columns[:r]].numpy()) == r


def test_every_pivot_is_the_largest_entry_that_is_left() -> None:
    M = torch.tensor([[1.0, 2.0], [3.0, -8.0], [5.0, 6.0]])
    echelon, columns = row_echelon(M)
    assert columns.tolist() == [1, 0]
    torch.testing.assert_close(echelon, torch.tensor([[-8.0, 3.0], [0.0, 7.25], [0.0, 0.0]]))


def test_no_pivot_is_much_larger_than_the_one_before() -> None:
    # With row swaps only, the pivots of this matrix end at 2^29: the classical worst case (Wilkinson 1961).
    M = torch.eye(30, dtype=torch.float64) - torch.ones(30, 30, dtype=torch.float64).tril(-1)
    M[:, -1] = 1
    assert row_echelon(M)[0].abs().max() <= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    echelon, _ = row_echelon(COUNTING.to(dtype))
    assert echelon.dtype == torch.float32
    assert rank(COUNTING.to(dtype)) == 2


def test_the_input_is_not_modified() -> None:
    M = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = M.detach().clone()
    row_echelon(M)
    rank(M)
    rank_deficiency(M)
    assert torch.equal(M, before)
    assert M.requires_grad


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 14), st.integers(0, 2**31), st.sampled_from(DTYPES))
def test_the_rank_of_a_product_is_at_most_its_inner_dimension(
    m: int, n: int, r: int, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(m, r, generator=generator, dtype=dtype)
    A = torch.randn(r, n, generator=generator, dtype=dtype)
    assert rank(outer_product_sum(B, A)) <= min(r, m, n)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=1, max_size=5)
    )
)
def test_small_whole_numbers_have_numpys_rank_and_that_of_the_transpose(rows: list[list[int]]) -> None:
    M = torch.tensor(rows)
    assert rank(M) == rank(M.T) == np.linalg.matrix_rank(M.double().numpy())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 2**31))
def test_the_sum_of_outer_products_is_the_matrix_product(m: int, n: int, r: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(m, r, generator=generator, dtype=torch.float64)
    A = torch.randn(r, n, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(outer_product_sum(B, A), B @ A, rtol=1e-12, atol=1e-12)


def test_gradients_flow_through_the_sum_of_outer_products() -> None:
    B, A = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (2, 4)))
    assert torch.autograd.gradcheck(outer_product_sum, (B, A))


@pytest.mark.parametrize(
    ("out_features", "in_features", "r", "expected"), [(768, 768, 4, 6144), (2304, 768, 8, 24576), (3, 5, 3, 24)]
)
def test_two_factors_have_rank_times_both_sides_parameters(
    out_features: int, in_features: int, r: int, expected: int
) -> None:
    assert low_rank_parameter_count(out_features, in_features, r) == expected


def test_lora_on_q_and_v_of_gpt2_has_the_papers_number_of_parameters() -> None:
    layers_and_widths = {"small": (12, 768), "medium": (24, 1024), "large": (36, 1280)}
    counts = {name: 2 * n * low_rank_parameter_count(d, d, 4) for name, (n, d) in layers_and_widths.items()}
    assert counts == {"small": 147_456, "medium": 393_216, "large": 737_280}
    assert 2 * 96 * low_rank_parameter_count(12288, 12288, 4) == 18_874_368  # GPT-3 175B: the paper's 18.9 M


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.tensor([[1.0, 2.0], [float("nan"), 1.0]]), "must be finite, got nan at row 1, column 0"),
        (torch.tensor([[1.0, float("-inf")]]), "must be finite, got -inf at row 0, column 1"),
        (torch.zeros(3), r"two axes .* got 1 in shape \(3,\)"),
        (torch.zeros(2, 3, 4), r"two axes .* got 3 in shape \(2, 3, 4\)"),
        (torch.zeros(0, 4), r"at least one row and one column, got shape \(0, 4\)"),
        (torch.zeros(2, 2, dtype=torch.complex64), "must be real, got torch.complex64"),
        ([[1.0, 2.0]], "must be a torch tensor, got list"),
    ],
)
def test_what_is_no_finite_matrix_is_refused_by_name(matrix: Tensor, message: str) -> None:
    for function in (row_echelon, rank, rank_deficiency):
        with pytest.raises(ValueError, match=f"^matrix .*{message}"):
            function(matrix)
    with pytest.raises(ValueError, match=r"^weight"):
        require_matrix(matrix, "weight")


@pytest.mark.parametrize("tolerance", [-1e-9, float("nan"), float("inf")])
def test_a_tolerance_that_is_no_size_is_refused(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance must be a finite number of at least 0, got"):
        rank(torch.eye(2), tolerance)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same r, got B \(3, 2\) and A \(3, 4\)"):
        outer_product_sum(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"got B \(3,\)"):
        outer_product_sum(torch.zeros(3), torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 6, 0), "rank must be a whole number between 1 and 4, got 0"),
        ((4, 6, 5), "rank must be a whole number between 1 and 4, got 5"),
        ((4, 6, True), "rank must be .* got True"),
    ],
)
def test_ranks_that_no_factors_have_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        low_rank_parameter_count(*arguments)
