"""Unit 11, how LoRA works: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import as_tensor, is_number, same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, where_right
from lora_from_scratch.checks.observation import Data, Seen
from lora_from_scratch.linear_algebra.rank import require_matrix
from lora_from_scratch.linear_algebra.subspace import require_same_columns, top_directions


def explain_kl(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The axes, the sign, the positions at which it is right, or p and q at the first wrong one."""
    y, wanted = seen.value, expected.value
    if not isinstance(wanted, Tensor) or seen.value is None or not is_number(y):
        return None
    y, base, other = as_tensor(y).double(), *(_tensor(case, name).double() for name in ("base_logits", "logits"))
    if y.shape == base.shape:
        return "the vocabulary is left", "Your result still has the axis of the vocabulary. Add up along it."
    if y.shape != wanted.shape:
        return "other positions", (
            f"There should be one divergence for each position, {tuple(wanted.shape)}, but the shape of yours is "
            f"{tuple(y.shape)}. Only the last axis, that of the vocabulary, disappears."
        )
    p, q = base.softmax(-1), other.softmax(-1)
    if not bool(y.isfinite().all()):
        return "no finite divergence", (
            "Some of your divergences are NaN or infinite. Do you take the logarithm of a probability that is 0, or "
            "divide by one?"
        )
    equal = (p - q).abs().amax(-1) < 1e-6
    if bool((y[equal].abs() > 1e-4).any()):
        return "not 0 for equal predictions", (
            "Where both predictions are the same, the divergence is 0, but yours is not. Logits that differ by a "
            "constant are the same prediction."
        )
    if bool((y < -1e-4).any()):
        return "negative", f"A divergence is never negative, but your smallest is {float(y.min()):.4g}."
    if found := where_right(y.flatten(), wanted.flatten(), ("position",)):
        return found
    first_p, first_q = p.reshape(-1, p.shape[-1])[0], q.reshape(-1, q.shape[-1])[0]
    return "other terms", (
        f"At the first position p is {_numbers(first_p)} and q is {_numbers(first_q)}. Write down the terms "
        f"p_v ln(p_v / q_v) and add them up; your result there is {float(y.flatten()[0]):.4g}."
    )


def explain_effective_rank(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The range, or the shares from which it is computed."""
    y = _number(seen)
    if y is None or expected.raised:
        return None
    matrix = require_matrix(_tensor(case, "matrix")).double()
    S = torch.linalg.svdvals(matrix)
    if float(S.sum()) == 0:
        return "the zero matrix", f"The effective rank of the zero matrix is 0, but yours is {y:.4g}."
    shares = f"The shares of the singular values here are {_numbers(S / S.sum())}"
    if not math.isfinite(y):
        return "no finite rank", f"Your result is {y}. {shares}: 0 ln 0 has to count as 0."
    if not 1 - 1e-6 <= y <= min(matrix.shape) + 1e-6:
        return "outside its range", (
            f"An effective rank lies between 1 and min(m, n), here {min(matrix.shape)}, but yours is {y:.4g}. "
            f"{shares}; the result is the exponential of their entropy."
        )
    return "another entropy", (
        f"{shares}. Compute the exponential of their entropy by hand; your result, {y:.4g}, is that of an entropy of "
        f"{math.log(y):.4g}."
    )


def explain_similarity(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The range, or the sum of the squared cosines."""
    y = _number(seen)
    if y is None or expected.raised:
        return None
    i, j = case.inputs["i"], case.inputs["j"]
    total = float(_squares(case, "i", "j").sum())
    of_them = f"Here i = {i} and j = {j}, and the squared cosines of all pairs of directions add up to {total:.4g}"
    if not -1e-6 <= y <= 1 + 1e-6:
        return "outside its range", f"A similarity lies between 0 and 1, but yours is {y:.4g}. {of_them}."
    return "another similarity", f"{of_them}. Compare that with your sum, and then see what you divide by."


def explain_grid(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The shape, or the first entry that is wrong."""
    y, wanted = seen.value, expected.value
    if not isinstance(y, Tensor) or not isinstance(wanted, Tensor):
        return None
    rows, columns = wanted.shape
    if y.shape != wanted.shape:
        if y.ndim == 2 and y.shape == wanted.T.shape:
            return None  # transposed
        return "another grid", (
            f"The grid should have {rows} by {columns} entries, one for each i from 1 to {rows} and each j from 1 to "
            f"{columns}, but the shape of yours is {tuple(y.shape)}."
        )
    squares = _squares(case, "rows", "columns")
    for row in range(rows):
        for column in range(columns):
            if not same(y[row, column], wanted[row, column]):
                i, j = row + 1, column + 1
                total = float(squares[:i, :j].sum())
                return "another entry", (
                    f"Entry [{row}, {column}] is phi for i = {i} and j = {j}, and yours, {float(y[row, column]):.4g}, "
                    f"is wrong. The squared cosines of the first {i} directions of A with the first {j} of B add up to "
                    f"{total:.4g} here; what is that to be divided by?"
                )
    return None


def explain_amplification(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The two norms."""
    y, rank = _number(seen), case.inputs["rank"]
    if y is None or expected.raised:
        return None
    W, delta_W = (require_matrix(_tensor(case, name)).double() for name in ("W", "delta_W"))
    assert isinstance(rank, int)
    U, S, Vh = top_directions(delta_W, rank)
    update, before = float(S.norm()), float((U.T @ W @ Vh.T).norm())
    if before == 0:
        return "no weight there", (
            f"W is exactly zero in the directions of the update, so the factor is infinity, but yours is {y:.4g}."
        )
    return "another norm", (
        f"In the first {rank} of the update's directions the update has the norm {update:.4g}, and W has the norm "
        f"{before:.4g}. Compare both with yours; your factor is {y:.4g}."
    )


def explain_exchange(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """By what A, B and the learning rate were multiplied, and what follows from it."""
    if not isinstance(seen.value, list) or len(seen.value) != 3:
        return None
    names = ("A", "B", "learning_rate")
    for name, one in zip(names, seen.value, strict=True):
        shape = tuple(as_tensor(case.inputs[name]).shape)
        if not is_number(one) or tuple(as_tensor(one).shape) != shape:
            given = f"of shape {tuple(as_tensor(one).shape)}" if is_number(one) else "no tensor or number"
            return "another order", (
                f"The results are A, B and the learning rate. The {name} that you return is {given}, but should be of "
                f"shape {shape}."
            )
    a, b, rate = (_multiple(one, case.inputs[name]) for name, one in zip(names, seen.value, strict=True))
    alpha, new_alpha = case.inputs["alpha"], case.inputs["new_alpha"]
    assert isinstance(alpha, float)
    assert isinstance(new_alpha, float)
    if a is None or b is None:
        return "no multiple", f"Your {'A' if a is None else 'B'} is not a multiple of the given one."
    change = a * (a if math.isnan(b) else b) * new_alpha / alpha  # nan: any multiple of zero is zero
    if not (math.isnan(b) or abs(a - b) <= 1e-4 * abs(a)):
        return "two numbers", f"You multiply A by {a:.4g} and B by {b:.4g}. It should be the same number c for both."
    if abs(change - 1) > 1e-3:
        return "another change", (
            f"You multiply A by {a:.4g}. With the same number for B and the new alpha, dW = s B A becomes {change:.4g} "
            "times what it was."
        )
    if rate is not None and not same(rate, a):
        return "another rate", (
            f"A and B are right: both are multiplied by {a:.4g}. You multiply the learning rate by {rate:.4g}. By what "
            "do the steps of A and B have to be multiplied?"
        )
    return None


def _multiple(one: Data, given: Data) -> float | None:
    """By what the given values were multiplied; NaN if both are zero, None if it is not one number for all."""
    new, old = as_tensor(one).double(), as_tensor(given).double()
    if not old.any():
        return None if new.any() else math.nan
    ratio = float((new * old).sum() / old.square().sum())
    return ratio if math.isfinite(ratio) and same(new, ratio * old) else None


def _squares(case: Case, i: str, j: str) -> Tensor:
    """The squared cosines of the first directions of A with those of B, (i, j)."""
    A, B = require_same_columns(_tensor(case, "A"), _tensor(case, "B"))
    first, second = case.inputs[i], case.inputs[j]
    assert isinstance(first, int)
    assert isinstance(second, int)
    return (top_directions(A, first)[2].double() @ top_directions(B, second)[2].double().T).square()


def _tensor(case: Case, name: str) -> Tensor:
    value = case.inputs[name]
    assert isinstance(value, Tensor)
    return value


def _number(seen: Seen) -> float | None:
    """The result, if it is a number or a tensor with one."""
    if not is_number(seen.value) or as_tensor(seen.value).ndim or as_tensor(seen.value).is_complex():
        return None
    return float(as_tensor(seen.value))


def _numbers(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values.tolist()) + "]"
