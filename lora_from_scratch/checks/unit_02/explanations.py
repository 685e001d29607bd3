"""Unit 02, the singular value decomposition: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

import torch

from lora_from_scratch.checks.comparing import dtypes_differ, same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.unit_02.laws import (
    TOLERANCE,
    agree_on,
    inside,
    matrix_of,
    several,
    svd_laws,
    triplet_laws,
)

Said = tuple[str, str]


def explain_eigenvector(case: Case, seen: Seen, expected: Seen) -> Said | None:
    if isinstance(seen.value, dict) and isinstance(expected.value, dict):
        if dtypes_differ(seen.value, expected.value) or same(seen.value["first"], seen.value["second"]):
            return None
        return "another answer each time", (
            "Two calls with the same matrix gave different vectors: draw the random start from the given generator, or "
            "from a new one with seed 0 if there is none."
        )
    (x,), (right,) = several(seen.value), several(expected.value)
    if x.shape != right.shape or not x.isfinite().all():
        return None
    if abs(float(x.norm()) - 1) > TOLERANCE:
        return "not of length 1", f"The vector should have length 1; yours has {float(x.norm()):.4g}."
    G, _ = matrix_of(case)
    stretched = x @ G @ x
    turned = float((G @ x - stretched * x).norm())
    if turned > TOLERANCE:
        return "not an eigenvector", (
            f"G still turns your vector: G x is not a multiple of x (off by {turned:.2g} of the largest entry of G). "
            "Has the iteration converged when it stops?"
        )
    values, vectors = torch.linalg.eigh(G)
    if float(inside(x, vectors, values)) > 1 - TOLERANCE:
        return None
    if same(float(stretched), float(right @ G @ right), 1e-2):
        return "not settled", (
            "Another direction, which G stretches nearly as much, is still in your vector. It needs many more steps, "
            "or steps that each do the work of many."
        )
    return "another eigenvector", "G only stretches your vector, but there is one that it stretches more."


def explain_triplet(case: Case, seen: Seen, expected: Seen) -> Said | None:
    (u, sigma, v), (right_u, right, right_v) = several(seen.value), several(expected.value)
    usable = (u.shape, v.shape) == (right_u.shape, right_v.shape) and all(x.isfinite().all() for x in (u, sigma, v))
    if not usable or agree_on(triplet_laws)(case, seen, expected):
        return None
    for name, vector in (("u", u), ("v", v)):
        if abs(float(vector.norm()) - 1) > TOLERANCE:
            return "not of length 1", f"{name} should have length 1; yours has {float(vector.norm()):.4g}."
    if not same(float(sigma), float(right), TOLERANCE):
        return "another sigma", "u and v have length 1, but sigma is not the largest singular value."
    if same(triplet_laws(case, seen.value)[:-1], triplet_laws(case, expected.value)[:-1], TOLERANCE):  # type: ignore
        return "not settled", "A second singular vector, with nearly the same sigma, is still in your u and v."
    return "not a triplet", "sigma is right, but u and v do not belong to it: M v = sigma u or M^T u = sigma v fails."


def explain_svd(case: Case, seen: Seen, expected: Seen) -> Said | None:
    (U, S, Vh), (right_U, right_S, right_Vh) = several(seen.value), several(expected.value)
    shapes_right = (U.shape, S.shape, Vh.shape) == (right_U.shape, right_S.shape, right_Vh.shape)
    if not shapes_right or agree_on(svd_laws)(case, seen, expected):
        return None
    if not same(S, right_S, TOLERANCE):
        return "other singular values", "The shapes are right; the singular values in S are not."
    for name, product in (("columns of U", U.T @ U), ("rows of Vh", Vh @ Vh.T)):
        off = float((product - torch.eye(len(S), dtype=product.dtype)).abs().max())
        if off > TOLERANCE:
            return "not orthonormal", f"S is right, but the {name} are not orthonormal: a product is off by {off:.2g}."
    return (
        "not the matrix",
        "S is right and the vectors are orthonormal, but they are not the singular vectors of this matrix.",
    )


def explain_truncate(case: Case, seen: Seen, expected: Seen) -> Said | None:
    (found,), (right,) = several(seen.value), several(expected.value)
    if found.shape != right.shape or not found.isfinite().all() or same(found, right):
        return None
    M, largest = matrix_of(case)
    U, S, Vh = torch.linalg.svd(M * largest, full_matrices=False)
    strengths = (U.T @ found @ Vh.T).diagonal()
    listed = ", ".join(f"{float(one):.3g}" for one in strengths)
    if not same(U * strengths @ Vh, found):
        return "other directions", (
            "Your matrix is not made of singular directions of M. Column k of U goes with row k of Vh and no other."
        )
    return "other strengths", (
        f"Along the singular directions of M your matrix has the strengths {listed}. M has "
        f"{', '.join(f'{float(one):.3g}' for one in S)}: which of them does the nearest matrix of rank "
        f"{case.inputs['rank']} keep?"
    )


def explain_error(case: Case, seen: Seen, expected: Seen) -> Said | None:
    (found,), (right,) = several(seen.value), several(expected.value)
    if found.ndim or same(float(found), float(right)):
        return None
    S = torch.linalg.svdvals(matrix_of(case)[0] * matrix_of(case)[1])
    listed = ", ".join(f"{float(one):.3g}" for one in S)
    norm, size = case.inputs.get("norm", "frobenius"), "too large" if found > right else "too small"
    return size, (
        f"Your {norm} error is {size}. The singular values of this matrix are {listed}: which of them does rank "
        f"{case.inputs['rank']} leave out, and how do they combine in this norm?"
    )


def explain_energy(case: Case, seen: Seen, expected: Seen) -> Said | None:
    (found,), (right,) = several(seen.value), several(expected.value)
    if found.ndim or found == right or found != found.round():
        return None
    energy = torch.linalg.svdvals(matrix_of(case)[0]) ** 2
    kept = float(energy[: int(found)].sum() / energy.sum()) if energy.sum() > 0 and found >= 0 else 0.0
    if found < right:
        return (
            "too few",
            f"Your rank of {int(found)} keeps {kept:.4%} of the energy; {case.inputs['energy']:.4%} is asked.",
        )
    return "too many", (
        f"Your rank of {int(found)} is enough, but not the smallest that is: how much do {int(found) - 1} directions "
        "keep, and does it fall short by more than rounding?"
    )


def explain_pca(case: Case, seen: Seen, expected: Seen) -> Said | None:
    assert isinstance(seen.value, list)
    found, right = several(seen.value), several(expected.value)
    if [one.shape for one in found] != [one.shape for one in right] or not all(one.isfinite().all() for one in found):
        return None
    if not same(found[0], right[0], TOLERANCE):
        return "another mean", "The mean is wrong: it has one entry for each feature, the mean over all samples."
    gram = found[1] @ found[1].T
    if not same(gram, torch.eye(len(gram), dtype=gram.dtype), TOLERANCE):
        return (
            "not orthonormal",
            ("The rows of your directions are not orthonormal: they should be unit vectors at right angles."),
        )
    if not same(found[1].T @ found[1], right[1].T @ right[1], TOLERANCE):
        return (
            "other directions",
            ("The mean is right, but your directions are not those along which the samples vary most."),
        )
    if not same(found[2], right[2], TOLERANCE):
        return (
            "other variances",
            ("Mean and directions are right, the variances along them are not: squares, divided by what?"),
        )
    return None
