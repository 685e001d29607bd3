"""Unit 11, what an update does to the weight, and alpha: mistakes that people make, and other right ways."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.linear_algebra.rank import require_matrix
from lora_from_scratch.linear_algebra.subspace import top_directions

# --- amplification_factor ----------------------------------------------------------------------------


def same_shapes(W: Tensor, delta_W: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, after raising for what is no matrix and for different shapes."""
    W, delta_W = require_matrix(W), require_matrix(delta_W)
    if W.shape != delta_W.shape:
        raise ValueError("the weight and its update have to have one shape")
    return W.double(), delta_W.double()


def ratio(update: Tensor, before: Tensor) -> float:
    return float(update) / float(before) if float(before) > 0 else math.inf


@right("amplification_factor")
def both_projected(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = same_shapes(W, delta_W)
    U, _, Vh = top_directions(delta_W, rank)
    return ratio((U.T @ delta_W @ Vh.T).norm(), (U.T @ W @ Vh.T).norm())


@right("amplification_factor")
def direction_by_direction(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = same_shapes(W, delta_W)
    U, S, Vh = top_directions(delta_W, rank)
    before = sum(float(u @ W @ v) ** 2 for u in U.T for v in Vh)
    return math.sqrt(sum(s**2 for s in S.tolist()) / before) if before else math.inf


@right("amplification_factor")
def with_projections_onto_the_subspaces(W: Tensor, delta_W: Tensor, rank: int) -> Tensor:
    W, delta_W = same_shapes(W, delta_W)
    U, _, Vh = top_directions(delta_W, rank)
    return (U @ U.T @ delta_W).norm() / (U @ U.T @ W @ Vh.T @ Vh).norm()  # for tensors x / 0 is infinity


@right("amplification_factor")
def in_numpy_with_errors_off(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = same_shapes(W, delta_W)
    top_directions(delta_W, rank)
    U, S, Vh = np.linalg.svd(delta_W.double().numpy())
    before = np.linalg.norm(U[:, :rank].T @ W.double().numpy() @ Vh[:rank].T)
    with np.errstate(divide="ignore"):
        return np.sqrt((S[:rank] ** 2).sum()) / np.float64(before)


@wrong("amplification_factor", "Your ratio is inverted: return the update divided by the weight.")
def upside_down(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = same_shapes(W, delta_W)
    U, S, Vh = top_directions(delta_W, rank)
    return float((U.T @ W @ Vh.T).norm()) / float(S.norm())


@wrong(
    "amplification_factor",
    "You compare the norms of the whole matrices. Most of W lies in directions that the update does not touch, and "
    "must not be counted.",
)
def of_the_whole_matrices(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = same_shapes(W, delta_W)
    top_directions(delta_W, rank)
    return ratio(delta_W.norm(), W.norm())


@wrong(
    "amplification_factor",
    "You use the strongest directions of W. The question is about those of the update.",
)
def in_the_directions_of_W(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = same_shapes(W, delta_W)
    top_directions(delta_W, rank)
    U, S, Vh = torch.linalg.svd(W)
    return ratio((U[:, :rank].T @ delta_W @ Vh[:rank].T).norm(), S[:rank].norm())


@wrong(
    "amplification_factor",
    "Your denominator uses the largest directions of W. It has to be W in the update's own directions.",
)
def over_the_largest_of_W(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = same_shapes(W, delta_W)
    _, S, _ = top_directions(delta_W, rank)
    return ratio(S.norm(), torch.linalg.svdvals(W)[:rank].norm())


@wrong(
    "amplification_factor",
    "Your numerator uses the whole update, your denominator only the first r directions: both have to use the same "
    "ones.",
)
def the_whole_update_above(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = same_shapes(W, delta_W)
    U, _, Vh = top_directions(delta_W, rank)
    return ratio(delta_W.norm(), (U.T @ W @ Vh.T).norm())


@wrong("amplification_factor", "You project W from the left only. W has an input side too: use V.")
def from_the_left_only(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = same_shapes(W, delta_W)
    U, S, _ = top_directions(delta_W, rank)
    return ratio(S.norm(), (U.T @ W).norm())


@wrong("amplification_factor", "You project W from the right only. W has an output side too: use U.")
def from_the_right_only(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = same_shapes(W, delta_W)
    _, S, Vh = top_directions(delta_W, rank)
    return ratio(S.norm(), (W @ Vh.T).norm())


@wrong(
    "amplification_factor",
    "You keep only the diagonal of U^T W V. That is enough for the update, but W is not diagonal in these directions.",
)
def the_diagonal_only(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = same_shapes(W, delta_W)
    U, S, Vh = top_directions(delta_W, rank)
    return ratio(S.norm(), (U.T @ W @ Vh.T).diagonal().norm())


@wrong("amplification_factor", "Your result is the square of the factor: the norms lack their square roots.")
def without_the_roots(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = same_shapes(W, delta_W)
    U, S, Vh = top_directions(delta_W, rank)
    return ratio(S.square().sum(), (U.T @ W @ Vh.T).square().sum())


@wrong(
    "amplification_factor",
    "If the weight has no component in these directions, your code divides by zero. The docstring says what to return.",
)
def divides_by_zero(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = same_shapes(W, delta_W)
    U, S, Vh = top_directions(delta_W, rank)
    return float(S.norm()) / float((U.T @ W @ Vh.T).norm())


@wrong(
    "amplification_factor",
    "Your numerator uses the weight after the update. The factor is about the update alone.",
)
def the_weight_after(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = same_shapes(W, delta_W)
    U, _, Vh = top_directions(delta_W, rank)
    return ratio((U.T @ (W + delta_W) @ Vh.T).norm(), (U.T @ W @ Vh.T).norm())


@wrong(
    "amplification_factor",
    "You raise no error if W and the update have different shapes. They cannot be a weight and its update then.",
)
def of_any_shapes(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = require_matrix(W).double(), require_matrix(delta_W).double()
    U, S, Vh = top_directions(delta_W, rank)
    W = W if W.shape == delta_W.shape else torch.nn.functional.pad(W, (0, 9, 0, 9))[: len(U), : Vh.shape[1]]
    return ratio(S.norm(), (U.T @ W @ Vh.T).norm())


@wrong(
    "amplification_factor",
    "You do not check W: a W with NaN gives no sensible factor. Apply `require_matrix` to it too.",
)
def W_unchecked(W: Tensor, delta_W: Tensor, rank: int) -> float:
    delta_W = require_matrix(delta_W).double()
    if W.shape != delta_W.shape:
        raise ValueError("the weight and its update have to have one shape")
    U, S, Vh = top_directions(delta_W, rank)
    return ratio(S.norm(), (U.T @ W.double() @ Vh.T).norm())


@wrong(
    "amplification_factor",
    "You accept more directions than the update has, or fewer than 1. `top_directions` raises the error for you.",
)
def any_rank(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = same_shapes(W, delta_W)
    U, S, Vh = torch.linalg.svd(delta_W, full_matrices=False)
    return ratio(S[:rank].norm(), (U[:, :rank].T @ W @ Vh[:rank].T).norm())


@wrong(
    "amplification_factor",
    "You take the columns of Vh for the right singular vectors: `torch.linalg.svd` returns them as *rows*.",
)
def Vh_for_V(W: Tensor, delta_W: Tensor, rank: int) -> float:
    W, delta_W = same_shapes(W, delta_W)
    top_directions(delta_W, rank)
    U, S, Vh = torch.linalg.svd(delta_W)
    return ratio(S[:rank].norm(), (U[:, :rank].T @ W @ Vh[:, :rank]).norm())


# --- exchange_alpha ----------------------------------------------------------------------------------

Lora = tuple[Tensor, Tensor, float]


@right("exchange_alpha")
def by_a_power(A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float) -> Lora:
    c = (new_alpha / alpha) ** -0.5
    return A.double() * c, B.double() * c, learning_rate * c


@right("exchange_alpha")
def in_numpy_by_division(A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float) -> list:
    d = np.sqrt(new_alpha / alpha)
    return [A.numpy() / d, B.numpy() / d, np.float64(learning_rate / d)]


@right("exchange_alpha")
def through_the_two_scalings(A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float) -> Lora:
    s, new_s = alpha / len(A), new_alpha / len(A)
    c = math.exp((math.log(s) - math.log(new_s)) / 2)
    return torch.mul(A, c), torch.mul(B, c), math.prod([learning_rate, c])


@right("exchange_alpha")
def entry_by_entry(A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float) -> Lora:
    c = (alpha**0.5) / (new_alpha**0.5)
    new_A, new_B = A.clone(), B.clone()
    for new in (new_A, new_B):
        for row in new:
            row *= c
    return new_A, new_B, learning_rate * c


@wrong("exchange_alpha", "You return B first and then A. The order is A, B, learning rate.")
def B_before_A(A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float) -> Lora:
    c = math.sqrt(alpha / new_alpha)
    return c * B, c * A, c * learning_rate


@wrong(
    "exchange_alpha",
    "You return the factor c instead of the second LoRA's learning rate. Multiply the first one's by it.",
)
def the_factor_as_learning_rate(A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float) -> Lora:
    c = math.sqrt(alpha / new_alpha)
    return c * A, c * B, c


@wrong(
    "exchange_alpha",
    "A and B are right, but your learning rate changes in the wrong direction: where A and B are smaller, their steps "
    "have to be smaller too.",
)
def the_learning_rate_the_wrong_way(A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float) -> Lora:
    c = math.sqrt(alpha / new_alpha)
    return c * A, c * B, learning_rate / c


@wrong(
    "exchange_alpha",
    "Your c is the whole ratio of the alphas. c occurs twice in the product, once in A and once in B.",
)
def the_whole_ratio(A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float) -> Lora:
    c = alpha / new_alpha
    return c * A, c * B, c * learning_rate


@wrong(
    "exchange_alpha",
    "Your factor is inverted: with a larger alpha, A and B have to become smaller to keep the product.",
)
def the_wrong_way_round(A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float) -> Lora:
    c = math.sqrt(new_alpha / alpha)
    return c * A, c * B, c * learning_rate


@wrong(
    "exchange_alpha",
    "A and B are right, but the learning rate is the old one. Adam would move the smaller A by as much as the larger "
    "one: after the first step the two runs differ.",
)
def the_same_learning_rate(A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float) -> Lora:
    c = math.sqrt(alpha / new_alpha)
    return c * A, c * B, learning_rate


@wrong(
    "exchange_alpha",
    "A and B are right, but your learning rate would only be right for plain gradient descent, where the size of the "
    "gradient matters. Adam normalises it away.",
)
def for_gradient_descent(A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float) -> Lora:
    c = math.sqrt(alpha / new_alpha)
    return c * A, c * B, c * c * learning_rate


@wrong(
    "exchange_alpha",
    "You change only the learning rate. With another s, the same A and B give another change at once: they have to be "
    "scaled too.",
)
def the_learning_rate_alone(A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float) -> Lora:
    return A.clone(), B.clone(), alpha / new_alpha * learning_rate


@wrong(
    "exchange_alpha",
    "You scale A and not B. At the start that gives the same change, since B is zero; in the middle of training it "
    "does not. Multiply both by c.",
)
def only_A(A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float) -> Lora:
    c = math.sqrt(alpha / new_alpha)
    return c * A, B.clone(), c * learning_rate


@wrong(
    "exchange_alpha",
    "You put the whole ratio into A and none of it into B. The product stays the same, but A and B would then need "
    "different learning rates: return one that is right for both.",
)
def everything_into_A(A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float) -> Lora:
    return alpha / new_alpha * A, B.clone(), alpha / new_alpha * learning_rate


@wrong("exchange_alpha", caught_by="changes its input")
def in_place(A: Tensor, B: Tensor, alpha: float, learning_rate: float, new_alpha: float) -> Lora:
    c = math.sqrt(alpha / new_alpha)
    return A.mul_(c), B.mul_(c), c * learning_rate
