"""Unit 02, the singular value decomposition: its exercises, their cases and hints, and its predictions.

Singular vectors are right with either sign, and for a repeated singular value any orthonormal basis is right. So
answers to the first exercises are compared by what does not depend on these choices: lengths, angles, products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import as_tensor, same
from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data, Seen
from lora_from_scratch.linear_algebra.svd import (
    approximation_error,
    dominant_eigenvector,
    dominant_singular_triplet,
    pca,
    rank_for_energy,
    svd_by_deflation,
    truncate,
)

TITLE = "The singular value decomposition"
TOLERANCE = 1e-4


# --- Matrices whose singular values are known --------------------------------------------------------


def orthonormal(draw: Draw, size: int, count: int) -> Tensor:
    """(size, count) with orthonormal columns in random directions, float64."""
    return torch.linalg.qr(draw.normal(size, count, dtype=torch.float64)).Q


def with_spectrum(draw: Draw, m: int, n: int, S: Sequence[float]) -> Tensor:
    """An (m, n) matrix with these singular values and random singular vectors, float64."""
    values = torch.tensor(S, dtype=torch.float64)
    return orthonormal(draw, m, len(S)) * values @ orthonormal(draw, n, len(S)).T


def symmetric(draw: Draw, size: int, eigenvalues: Sequence[float]) -> Tensor:
    """A (size, size) symmetric matrix with these eigenvalues, and zeros, float64."""
    V = orthonormal(draw, size, len(eigenvalues))
    return V * torch.tensor(eigenvalues, dtype=torch.float64) @ V.T


# --- The cases ---------------------------------------------------------------------------------------


def eigenvector_cases(draw: Draw) -> Iterator[Case]:
    part = "the iteration"
    yield Case("the matrix [[2, -1], [-1, 2]]", {"G": torch.tensor([[2.0, -1], [-1, 2]])}, part)
    yield Case(
        "a 5 x 5 matrix with the eigenvalues 5, 3, 1, 0.5, 0.1", {"G": symmetric(draw, 5, [5, 3, 1, 0.5, 0.1])}, part
    )
    yield Case(
        "the same in float32, 100 times as large", {"G": symmetric(draw, 5, [500, 300, 100, 50, 10]).float()}, part
    )
    yield Case("two eigenvalues that differ by 5 %", {"G": symmetric(draw, 4, [1, 0.95, 0.5, 0.1])}, part)
    yield Case("a repeated largest eigenvalue: 2, 2, 1", {"G": symmetric(draw, 3, [2, 2, 1])}, "hard matrices")
    yield Case("zeros", {"G": torch.zeros(3, 3)}, "hard matrices")


def triplet_cases(draw: Draw) -> Iterator[Case]:
    part = "the triplet"
    yield Case("the matrix [[0, -2], [1, 0]]", {"matrix": torch.tensor([[0.0, -2], [1, 0]])}, part)
    yield Case("a tall 6 x 3 matrix", {"matrix": with_spectrum(draw, 6, 3, [4, 2.5, 1])}, part)
    yield Case("a wide 3 x 6 matrix in float32", {"matrix": with_spectrum(draw, 3, 6, [40, 25, 10]).float()}, part)
    yield Case(
        "a repeated largest singular value: 2, 2, 1", {"matrix": with_spectrum(draw, 4, 3, [2, 2, 1])}, "hard matrices"
    )
    yield Case("zeros", {"matrix": torch.zeros(3, 2)}, "hard matrices")
    tiny = (1e-30 * with_spectrum(draw, 4, 3, [3, 2, 1])).float()
    yield Case("entries of about 1e-30, in float32", {"matrix": tiny}, "entries of any size")


def deflation_cases(draw: Draw) -> Iterator[Case]:
    part = "the decomposition"
    diagonal = torch.tensor([[3.0, 0, 0], [0, -2, 0]], dtype=torch.float64)
    yield Case("the matrix [[3, 0, 0], [0, -2, 0]]", {"matrix": diagonal}, part)
    yield Case("a tall 6 x 3 matrix", {"matrix": with_spectrum(draw, 6, 3, [4, 2, 1])}, part)
    yield Case("a wide 3 x 6 matrix in float32", {"matrix": with_spectrum(draw, 3, 6, [40, 20, 10]).float()}, part)
    five = with_spectrum(draw, 5, 5, [5, 3, 1, 0.5, 0.2])
    yield Case("two triplets of a 5 x 5 matrix", {"matrix": five, "rank": 2}, part)
    yield Case("a 5 x 4 matrix of rank 2", {"matrix": with_spectrum(draw, 5, 4, [3, 2])}, "when to stop")
    yield Case("zeros", {"matrix": torch.zeros(3, 2)}, "when to stop")
    yield Case("a repeated singular value: 2, 2, 2", {"matrix": with_spectrum(draw, 4, 3, [2, 2, 2])}, "hard matrices")
    small = with_spectrum(draw, 6, 5, [1, 1e-5, 1e-10, 3e-14])
    yield Case("the singular values 1, 1e-5, 1e-10, 3e-14", {"matrix": small}, "hard matrices")


def truncate_cases(draw: Draw) -> Iterator[Case]:
    part = "the nearest matrix"
    yield Case("diag(3, 2, 1) at rank 1", {"matrix": torch.diag(torch.tensor([3.0, 2, 1])), "rank": 1}, part)
    wide = with_spectrum(draw, 4, 6, [5, 3, 2, 0.5])
    yield Case("a wide 4 x 6 matrix at rank 2", {"matrix": wide, "rank": 2}, part)
    square = with_spectrum(draw, 5, 5, [5, 4, 3, 2, 1]).float()
    yield Case("a 5 x 5 matrix in float32 at rank 3", {"matrix": square, "rank": 3}, part)
    yield Case("rank 0", {"matrix": wide, "rank": 0}, "from rank 0 to full rank")
    yield Case("full rank", {"matrix": wide, "rank": 4}, "from rank 0 to full rank")
    yield Case("rank 5 of a 4 x 6 matrix, which is impossible", {"matrix": wide, "rank": 5}, "bad input")


def error_cases(draw: Draw) -> Iterator[Case]:
    diagonal = torch.diag(torch.tensor([12.0, 4, 3], dtype=torch.float64))
    yield Case("diag(12, 4, 3) at rank 1", {"matrix": diagonal, "rank": 1}, "Frobenius norm")
    tall = with_spectrum(draw, 6, 4, sorted((draw.number(0.2, 4) for _ in range(4)), reverse=True))
    yield Case("a tall 6 x 4 matrix at rank 2", {"matrix": tall, "rank": 2}, "Frobenius norm")
    yield Case("the same at rank 0", {"matrix": tall.float(), "rank": 0}, "Frobenius norm")
    yield Case(
        "diag(12, 4, 3) at rank 1, spectral norm", {"matrix": diagonal, "rank": 1, "norm": "spectral"}, "spectral norm"
    )
    yield Case(
        "the tall matrix at rank 2, spectral norm", {"matrix": tall, "rank": 2, "norm": "spectral"}, "spectral norm"
    )
    yield Case("at full rank, spectral norm", {"matrix": tall, "rank": 4, "norm": "spectral"}, "spectral norm")
    yield Case("an unknown norm", {"matrix": tall, "rank": 1, "norm": "nuclear"}, "bad input")


def energy_cases(draw: Draw) -> Iterator[Case]:
    diagonal = torch.diag(torch.tensor([3.0, 2, 1, 1]))  # energies 9, 4, 1, 1 of 15
    yield Case("diag(3, 2, 1, 1), 80 %", {"matrix": diagonal, "energy": 0.8}, "the rank")
    tall = with_spectrum(draw, 6, 4, [3, 2, 1, 1])
    yield Case("a tall matrix with these singular values, 90 %", {"matrix": tall, "energy": 0.9}, "the rank")
    wide = draw.number(0.5, 20) * with_spectrum(draw, 4, 7, [3, 2, 1, 1])
    yield Case("a wide one, 50 %", {"matrix": wide.float(), "energy": 0.5}, "the rank")
    yield Case("the tall one, all of it", {"matrix": tall, "energy": 1.0}, "the ends")
    three = with_spectrum(draw, 8, 6, [3, 2, 1])
    yield Case("an 8 x 6 matrix of rank 3, all of its energy", {"matrix": three, "energy": 1.0}, "the ends")
    yield Case("zeros", {"matrix": torch.zeros(2, 3), "energy": 0.9}, "the ends")
    yield Case("an energy of 90 instead of 0.9", {"matrix": tall, "energy": 90.0}, "bad input")


def pca_cases(draw: Draw) -> Iterator[Case]:
    part = "the components"
    line = torch.tensor([[1.0, 3], [2, 5], [3, 7]], dtype=torch.float64)
    yield Case("three points on a line", {"data": line, "count": 1}, part)
    place = 4 + draw.normal(4, dtype=torch.float64)
    tall = with_spectrum(draw, 20, 4, [9, 5, 2, 0.5]) + place
    yield Case("20 samples with 4 features, 2 directions", {"data": tall, "count": 2}, part)
    yield Case("all 4 directions, in float32", {"data": tall.float(), "count": 4}, part)
    wide = with_spectrum(draw, 4, 6, [9, 5, 2, 0.5]) + 1
    yield Case("4 samples with 6 features, 2 directions", {"data": wide, "count": 2}, part)
    yield Case("a single sample", {"data": tall[:1], "count": 1}, "bad input")


# --- What is compared where several answers are right ------------------------------------------------

Laws = Callable[[Case, Data], Data]


def agree_on(laws: Laws) -> Callable[[Case, Seen, Seen], bool]:
    """Two answers agree if they have the same properties, apart from signs and the choice of a basis."""

    def agree(case: Case, seen: Seen, expected: Seen) -> bool:
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


def eigenvector_laws(case: Case, value: Data) -> Data:
    """The shape; the length; how much G stretches the vector; how far G turns it."""
    (x,) = several(value)
    G, _ = matrix_of(case)
    stretched = x @ G @ x / (x @ x)
    return [*map(float, x.shape), torch.stack([torch.ones(()), x.norm(), stretched, (G @ x - stretched * x).norm()])]


def triplet_laws(case: Case, value: Data) -> Data:
    """The shapes; sigma; the lengths; whether M v = sigma u and M^T u = sigma v."""
    u, sigma, v = several(value)
    M, largest = matrix_of(case)
    sigma = sigma / largest
    off = torch.stack([(M @ v - sigma * u).norm(), (M.T @ u - sigma * v).norm()])
    return [
        *map(float, (*u.shape, *v.shape)),
        torch.cat([torch.stack([torch.ones(()), sigma, u.norm(), v.norm()]), off]),
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


# --- Messages for wrong answers that are not in the bank ---------------------------------------------

Said = tuple[str, str]


def explain_eigenvector(case: Case, seen: Seen, expected: Seen) -> Said | None:
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
    if same(float(stretched), float(right @ G @ right), TOLERANCE):
        return None
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


# --- The exercises -----------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        dominant_eigenvector,
        idea="singular values",
        difficulty=3,
        minutes=15,
        points=3,
        hints=(
            "What does one multiplication by G do to the part of x along each eigenvector? And a hundred of them?",
            "In a loop, compute the new x from the old one, then test whether it still moves. Keep the old one for "
            "that.",
            "A zero matrix cannot be divided by its norm: test `G.any()` first. With squaring, 60 steps are more than "
            "enough.",
        ),
        cases=eigenvector_cases,
        agree=agree_on(eigenvector_laws),
        explain=explain_eigenvector,
    ),
    Exercise(
        dominant_singular_triplet,
        idea="singular values",
        difficulty=2,
        minutes=10,
        points=3,
        hints=(
            "`dominant_eigenvector` gives v; sigma and u follow from it by the two equations of the docstring.",
            "Handle the zero matrix first, then divide by the largest entry; only sigma has to be scaled back.",
            "For a wide matrix you find u first. `M.T @ u` points along v; normalise it to length 1.",
        ),
        cases=triplet_cases,
        agree=agree_on(triplet_laws),
        explain=explain_triplet,
    ),
    Exercise(
        svd_by_deflation,
        idea="singular values",
        difficulty=4,
        minutes=20,
        points=5,
        hints=(
            "One triplet per iteration: take the dominant one of what is left, keep it, subtract it. Two conditions "
            "end the loop.",
            "Whatever is small beside the *first* sigma counts as zero; `rounding_tolerance(matrix, scale)` says how "
            "small.",
            "`torch.column_stack` adds a column to U; `R - U @ (U.T @ R)` is the part of R outside the span of U's "
            "columns.",
        ),
        cases=deflation_cases,
        agree=agree_on(svd_laws),
        explain=explain_svd,
    ),
    Exercise(
        truncate,
        idea="low-rank approximation",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "`torch.linalg.svd(matrix, full_matrices=False)` gives U, S, Vh. Which parts are the first r terms?",
            "The first r columns of U, the first r entries of S, the first r rows of Vh.",
            "`U * S` multiplies every column by its singular value, without a diagonal matrix. `require_rank` checks "
            "the rank.",
        ),
        cases=truncate_cases,
    ),
    Exercise(
        approximation_error,
        idea="low-rank approximation",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "The singular values of M minus its truncation are those that were left out.",
            "`torch.linalg.svdvals(matrix)` is sorted, the largest first. Which of them are left out at rank r?",
            "Spectral: the largest of those left out, if there is one. Frobenius: the length of the vector of all of "
            "them.",
        ),
        cases=error_cases,
    ),
    Exercise(
        rank_for_energy,
        idea="low-rank approximation",
        difficulty=2,
        minutes=10,
        points=2,
        hints=(
            "Energy is the sum of the squared singular values. `cumsum` gives what ranks 1, 2, 3, ... keep.",
            "How many of these sums are too small? The rank is one more.",
            "Handle the zero matrix first: its total is 0. A sum that falls short only by rounding counts as enough.",
        ),
        cases=energy_cases,
    ),
    Exercise(
        pca,
        idea="low-rank approximation",
        difficulty=2,
        minutes=10,
        points=2,
        hints=(
            "Subtract the mean sample first: every column of the data then has the mean 0.",
            "Each row is a sample: which of U and Vh has vectors in the space of the features?",
            "The variance along a direction is the sum of squares divided by N - 1.",
        ),
        cases=pca_cases,
        agree=agree_on(pca_laws),
    ),
]

PREDICTIONS = [
    Prediction(
        "noise_energy",
        question=(
            "Take a 256 x 256 matrix of independent standard normal numbers: noise, with nothing in it to compress. "
            "You keep half of its 256 directions, namely those with the largest singular values. What share of the "
            "energy $S_1^2 + \\dots + S_{256}^2$ do you keep?"
        ),
        answer="c",
        choices={"a": "about half", "b": "about two thirds", "c": "about nine tenths", "d": "more than 99 %"},
        explanation=(
            "About 90 %. The singular values of noise are far from equal: they fall from about 2 * sqrt(256) = 32 "
            'nearly to 0 (Marchenko and Pastur 1967), and squaring makes the difference larger. So "half of the '
            'directions hold 90 %" is not a sign of structure. Whatever you measure on a weight, measure it on noise '
            "of the same shape as well."
        ),
        replies={
            "a": "Half of the directions would hold half of the energy if all singular values were equal.",
            "b": (
                "The singular values differ more than that: the middle one is less than half of the largest, and "
                "its square less than a fifth."
            ),
            "d": "The smaller half is small, but not that small: together it still holds about a tenth.",
        },
        idea="low-rank approximation",
    ),
    Prediction(
        "lowest_rank",
        question=(
            "Take three matrices of the same shape: a weight of the pretrained model, noise, and the *update* that a "
            "short full fine-tuning adds to that weight, in which every parameter is trained and nothing asks for a "
            "low rank. Which of them needs the fewest directions for 90 % of its energy?"
        ),
        answer="update",
        choices={"weight": "the weight", "noise": "the noise", "update": "the update"},
        explanation=(
            "The update. Noise needs the most, the weight fewer, the update far fewer. Aghajanyan et al. 2020 found "
            "that fine-tuning has a low *intrinsic dimension*, and LoRA is built on that (Hu et al. 2021, section "
            "4.1). The rank of the update in the strict sense of unit 01 is nearly full all the same; it is its energy "
            "that lies in few directions."
        ),
        replies={
            "weight": "The weight holds everything that the model knows; the update holds one small task.",
            "noise": "Noise prefers no direction, so it needs the most of all three.",
        },
        measured="60 steps of 8 cards on the bundled GPT-2, seed 0",
        idea="low-rank approximation",
    ),
]
