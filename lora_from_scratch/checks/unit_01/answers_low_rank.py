"""Unit 01, sums of outer products: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong

# --- outer_product_sum -------------------------------------------------------------------------------


def same_r(B: Tensor, A: Tensor) -> None:
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise ValueError("the factors do not fit")


@right("outer_product_sum")
def the_matrix_product(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    dtype = torch.promote_types(B.dtype, A.dtype)
    return B.to(dtype) @ A.to(dtype)


@right("outer_product_sum")
def all_terms_at_once(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return (B[:, :, None] * A[None]).sum(dim=1)


@right("outer_product_sum")
def by_einstein(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    dtype = torch.result_type(B, A)
    return torch.einsum("ik,kj->ij", B.to(dtype), A.to(dtype))


@right("outer_product_sum")
def term_by_term_from_zeros(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    total = torch.zeros(len(B), A.size(1), dtype=torch.promote_types(A.dtype, B.dtype))
    for k in range(B.size(1)):
        total += B[:, k].reshape(-1, 1) * A[k]
    return total


@right("outer_product_sum")
def row_by_row(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return torch.stack([(weights[:, None] * A).sum(0) for weights in B]).to(torch.result_type(B, A))


@wrong(
    "outer_product_sum",
    "You sum the columns of B and the rows of A first, and multiply once. That pairs column k with rows other than "
    "row k.",
)
def sums_first(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return torch.outer(B.sum(dim=1), A.sum(dim=0))


@wrong("outer_product_sum", "You return only the first term; the others have to be added.")
def first_term_only(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return torch.outer(B[:, 0], A[0]) if B.shape[1] else torch.zeros(B.shape[0], A.shape[1])


@wrong("outer_product_sum", "You keep only the last term: the loop overwrites the sum instead of adding to it.")
def last_term_only(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    total = torch.zeros(B.shape[0], A.shape[1])
    for k in range(B.shape[1]):
        total = torch.outer(B[:, k], A[k])
    return total


@wrong("outer_product_sum", "You take the mean of the terms. They have to be added up.")
def mean_of_the_terms(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return B @ A / max(B.shape[1], 1)


@wrong("outer_product_sum", "The result is transposed: entry (i, j) belongs to row i of B and column j of A.")
def turned_round(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return A.T @ B.T


@wrong(
    "outer_product_sum",
    "The values are right, but no gradient flows back to B and A: somewhere they are detached from the graph. LoRA "
    "trains exactly these two.",
)
def without_gradients(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    total = torch.zeros(B.shape[0], A.shape[1], dtype=B.dtype, requires_grad=True)
    for k in range(B.shape[1]):
        total = (total + torch.outer(B[:, k].detach(), A[k].detach())).detach()
    return total


@wrong(
    "outer_product_sum",
    "Gradients flow back to A, but not to B. Both factors are trained.",
)
def gradient_of_one_factor(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return B.detach() @ A


@wrong(
    "outer_product_sum",
    "Two columns and three rows: `zip` silently stops at the shorter of the two. Raise a ValueError instead.",
)
def stops_at_the_shorter(B: Tensor, A: Tensor) -> Tensor:
    total = torch.zeros(B.shape[0], A.shape[1], dtype=B.dtype)
    for column, row in zip(B.T, A):
        total = total + torch.outer(column, row)
    return total


@wrong(
    "outer_product_sum", "With r = 0 there are no terms, and the sum of no terms is a matrix of zeros, not an error."
)
def needs_a_term(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    total = torch.outer(B[:, 0], A[0])
    for k in range(1, B.shape[1]):
        total = total + torch.outer(B[:, k], A[k])
    return total


@wrong(
    "outer_product_sum",
    "You start from zeros in float32 whatever the factors are in: the result should be in the dtype that they promote "
    "to, for whole numbers too, and with no term at all.",
)
def zeros_of_the_default_dtype(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    total = torch.zeros(B.shape[0], A.shape[1])
    for column, row in zip(B.T, A, strict=True):
        total = total + torch.outer(column, row)
    return total


@wrong("outer_product_sum", "Your result has the dtype of B, even where A is more precise.")
def dtype_of_b(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return (B.double() @ A.double()).to(B.dtype)


@wrong("outer_product_sum", "Your result has the dtype of A, even where B is more precise.")
def dtype_of_a(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return (B.double() @ A.double()).to(A.dtype)


@wrong("outer_product_sum", "Your result is always in float64. It should be in the dtype that B and A promote to.")
def always_double(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return torch.einsum("ik,kj->ij", B.double(), A.double())


@wrong(
    "outer_product_sum",
    "`@` refuses factors of different dtypes; an outer product promotes them. What is the dtype of the sum?",
)
def product_of_one_dtype(B: Tensor, A: Tensor) -> Tensor:
    same_r(B, A)
    return B @ A


@wrong(
    "outer_product_sum",
    "You compare the sizes, but not the number of axes: a vector or a tensor with three axes has to raise a ValueError "
    "too.",
)
def compares_sizes_only(B: Tensor, A: Tensor) -> Tensor:
    if B.shape[-1] != A.shape[0]:
        raise ValueError("sizes")
    return (B.to(torch.result_type(B, A)).unsqueeze(-1) * A).sum(dim=-2)


@wrong("outer_product_sum", caught_by="another type")
def a_list_of_terms(B: Tensor, A: Tensor) -> list[Tensor]:
    return [torch.outer(B[:, k], A[k]) for k in range(B.shape[1])]


# --- low_rank_parameter_count ------------------------------------------------------------------------


def possible(out_features: int, in_features: int, rank: int) -> None:
    if rank < 1 or rank > min(out_features, in_features):
        raise ValueError("no such rank")


@right("low_rank_parameter_count")
def counts_two_tensors(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, rank)
    with torch.device("meta"):
        return torch.empty(out_features, rank).numel() + torch.empty(rank, in_features).numel()


@right("low_rank_parameter_count")
def one_term_at_a_time(out_features: int, in_features: int, rank: int) -> int:
    if rank not in range(1, min(out_features, in_features) + 1):
        raise ValueError(f"rank {rank}")
    return sum(out_features + in_features for _ in range(rank))


@right("low_rank_parameter_count")
def as_the_size_of_a_block_matrix(out_features: int, in_features: int, rank: int) -> int:
    if not 0 < rank <= out_features or rank > in_features:
        raise ValueError(rank)
    return (out_features + in_features) ** 2 // (out_features + in_features) * rank


@right("low_rank_parameter_count")
def in_numpy(out_features: int, in_features: int, rank: int) -> np.integer:
    if rank < 1:
        raise ValueError("the rank is at least 1")
    if rank > out_features or rank > in_features:
        raise ValueError("the rank is at most the smaller side")
    return np.array([[out_features, rank], [rank, in_features]]).prod(axis=1).sum()


@wrong("low_rank_parameter_count", "These are the numbers of the full matrix. How many are in its two factors?")
def the_full_matrix(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, rank)
    return out_features * in_features


@wrong(
    "low_rank_parameter_count", "You count only one factor. There are two: B has as many rows as W, A as many columns."
)
def only_a(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, rank)
    return rank * in_features


@wrong(
    "low_rank_parameter_count",
    "You count only one factor. There are two: the one you leave out has as many columns as W.",
)
def only_b(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, rank)
    return rank * out_features


@wrong("low_rank_parameter_count", "The rank belongs to both factors: without parentheses it multiplies one of them.")
def without_parentheses(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, rank)
    return rank * out_features + in_features


@wrong(
    "low_rank_parameter_count", "You count each of the r terms multiplied out. Each is stored as a column and a row."
)
def terms_multiplied_out(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, rank)
    return rank * out_features * in_features


@wrong("low_rank_parameter_count", "You treat the matrix as square: B has as many rows as W, A has as many columns.")
def as_if_square(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, rank)
    return 2 * rank * out_features


@wrong(
    "low_rank_parameter_count",
    "You also count a scale for each term. It is already contained in B and A: nothing stands between the two factors.",
)
def with_singular_values(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, rank)
    return rank * (out_features + in_features + 1)


@wrong(
    "low_rank_parameter_count",
    "A rank above the smaller side cannot raise the rank of the product: raise a ValueError.",
)
def any_rank_will_do(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, min(rank, out_features, in_features))
    return rank * (out_features + in_features)


@wrong(
    "low_rank_parameter_count",
    "With rank 0 there is nothing to store and nothing to train: that has to raise a ValueError too.",
)
def rank_zero_is_free(out_features: int, in_features: int, rank: int) -> int:
    possible(out_features, in_features, max(rank, 1))
    return rank * (out_features + in_features)


@wrong("low_rank_parameter_count", "You refuse the largest possible rank. The smaller side itself is allowed.")
def refuses_the_largest_rank(out_features: int, in_features: int, rank: int) -> int:
    if not 1 <= rank < min(out_features, in_features):
        raise ValueError("rank")
    return rank * (out_features + in_features)


@wrong("low_rank_parameter_count", "You compare the rank with the larger side. The smaller one is the limit.")
def up_to_the_larger_side(out_features: int, in_features: int, rank: int) -> int:
    if not 1 <= rank <= max(out_features, in_features):
        raise ValueError("rank")
    return rank * (out_features + in_features)


@wrong("low_rank_parameter_count", "You compare the rank with one side only. It must not exceed either of them.")
def up_to_the_rows(out_features: int, in_features: int, rank: int) -> int:
    if not 1 <= rank <= out_features:
        raise ValueError("rank")
    return rank * (out_features + in_features)


@wrong("low_rank_parameter_count", "You compare the rank with the columns only. It must not exceed the rows either.")
def up_to_the_columns(out_features: int, in_features: int, rank: int) -> int:
    if not 1 <= rank <= in_features:
        raise ValueError("rank")
    return rank * (out_features + in_features)


@wrong("low_rank_parameter_count", "You refuse rank 0, but a negative rank gets through.")
def negative_ranks(out_features: int, in_features: int, rank: int) -> int:
    if rank == 0 or rank > min(out_features, in_features):
        raise ValueError("rank")
    return rank * (out_features + in_features)


@wrong(
    "low_rank_parameter_count", "Some ranks are impossible, too small or too large: those have to raise a ValueError."
)
def refuses_nothing(out_features: int, in_features: int, rank: int) -> int:
    return rank * (out_features + in_features)
