"""Unit 02, the singular value decomposition: what is compared where several answers are right.

Singular vectors are right with either sign, and for a repeated singular value any orthonormal basis is right. So
answers to the first exercises are compared by what does not depend on these choices: lengths, angles, products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import as_tensor, dtypes_differ, same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.observation import Data, Seen

TOLERANCE = 1e-4

Laws = Callable[[Case, Data], Data]


def agree_on(laws: Laws) -> Callable[[Case, Seen, Seen], bool]:
    """Two answers agree if they have the same properties, apart from signs and the choice of a basis."""

    def agree(case: Case, seen: Seen, expected: Seen) -> bool:
        if dtypes_differ(seen.value, expected.value):
            return False
        return same(laws(case, seen.value), laws(case, expected.value), TOLERANCE)

    return agree


def several(value: Data) -> list[Tensor]:
    """The results as float64 tensors."""
    results = value if isinstance(value, list) else [value]
    return [as_tensor(result).double() for result in results]


def matrix_of(case: Case) -> tuple[Tensor, Tensor]:
    """The case's matrix, divided by its largest entry, and that entry; float64."""
    matrix = next(iter(case.inputs.values()))
    assert isinstance(matrix, Tensor)
    largest = matrix.double().abs().max()
    return matrix.double() / (largest if largest > 0 else 1), largest if largest > 0 else torch.ones(())


def inside(vector: Tensor, vectors: Tensor, values: Tensor) -> Tensor:
    """The length of the part of a vector in the span of those columns whose value is (nearly) the largest."""
    return (vectors[:, values >= (1 - 1e-6) * values.max()].T @ vector).norm()


def eigenvector_laws(case: Case, value: Data) -> Data:
    """The shape; the length, all of it in the eigenspace of the largest eigenvalue; two calls agree."""
    if isinstance(value, dict):
        return [eigenvector_laws(case, value["first"]), same(value["first"], value["second"])]
    (x,) = several(value)
    values, vectors = torch.linalg.eigh(matrix_of(case)[0])
    return [*map(float, x.shape), torch.stack([x.norm(), inside(x, vectors, values)])]


def triplet_laws(case: Case, value: Data) -> Data:
    """The shapes; sigma; the lengths; whether M v = sigma u and M^T u = sigma v, for the largest sigma."""
    u, sigma, v = several(value)
    M, largest = matrix_of(case)
    sigma = sigma / largest
    off = torch.stack([(M @ v - sigma * u).norm(), (M.T @ u - sigma * v).norm()])
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    own = torch.stack([inside(u, U, S), inside(v, Vh.T, S)]) if S[0] > 0 else torch.ones(2)
    return [
        *map(float, (*u.shape, *v.shape)),
        torch.cat([torch.stack([torch.ones(()), sigma, u.norm(), v.norm()]), off]),
        own,
    ]


def svd_laws(case: Case, value: Data) -> Data:
    """The singular values; the angles between the vectors; the product; whether M V = U S."""
    U, S, Vh = several(value)
    M, largest = matrix_of(case)
    S = S / largest
    off = torch.cat([torch.ones(1), (M @ Vh.T - U * S).flatten()])
    return [S, U.T @ U, Vh @ Vh.T, U * S @ Vh, off]


def pca_laws(case: Case, value: Data) -> Data:
    """The mean; the variances; the angles between the directions; the part of the covariance that they account for."""
    mean, directions, variances = several(value)
    return [mean, variances, directions @ directions.T, directions.T * variances @ directions]
