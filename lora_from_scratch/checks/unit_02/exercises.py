"""Unit 02, the singular value decomposition: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_02.explanations import (
    explain_eigenvector,
    explain_energy,
    explain_error,
    explain_pca,
    explain_svd,
    explain_triplet,
    explain_truncate,
)
from lora_from_scratch.checks.unit_02.laws import agree_on, eigenvector_laws, pca_laws, svd_laws, triplet_laws
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

NOT_A_NUMBER = torch.tensor([[1.0, float("nan")], [0, 1]])


def try_eigenvector(answer: Callable[..., Any], G: Tensor, generator: int | None = None, twice: bool = False) -> Any:
    """The vector; or those of two calls, on request with equal generators of this seed."""

    def once() -> Any:
        return answer(G) if generator is None else answer(G, generator=torch.Generator().manual_seed(generator))

    return {"first": once(), "second": once()} if twice else once()


def eigenvector_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, G: Tensor, *sentences: str, **more: Data) -> Case:
        return Case(name, {"G": G, **more}, part, sentences)

    part, hard, bad = "the iteration", "hard matrices", "invalid input"
    most, again, x = "The direction that a symmetric", "Multiply it by G", "x: (k,), of norm 1"
    random, close = "Start from a random x", "where two eigenvalues are nearly equal"
    yield case("the matrix [[2, -1], [-1, 2]]", part, torch.tensor([[2.0, -1], [-1, 2]]), random, x)
    yield case("the matrix [[1, 0], [0, 3]], of whole numbers", part, torch.tensor([[1, 0], [0, 3]]), random, x)
    five = symmetric(draw, 5, [5, 3, 1, 0.5, 0.1])
    yield case("a 5 x 5 matrix with the eigenvalues 5, 3, 1, 0.5, 0.1", part, five, most, again, "Either sign is right")
    large = symmetric(draw, 5, [5000, 3000, 1000, 500, 100]).float()
    yield case("the same in float32, 1,000 times as large", part, large, "divide it by its norm so that", again)
    yield case("two eigenvalues that differ by 5 %", part, symmetric(draw, 4, [1, 0.95, 0.5, 0.1]), close, most)
    yield case("two eigenvalues that differ by 0.2 %", part, symmetric(draw, 4, [1, 0.998, 0.5, 0.1]), close)
    for fixed in (1, 2):  # drawn once and for all: with luck few steps are enough
        yield case(
            f"the same eigenvalues, matrix {fixed}", part, symmetric(Draw(fixed), 4, [1, 0.998, 0.5, 0.1]), close
        )
    double = symmetric(draw, 3, [2, 2, 1])
    repeated = "If the largest eigenvalue is repeated"
    yield case("a repeated largest eigenvalue: 2, 2, 1", hard, double, repeated)
    yield case("zeros", hard, torch.zeros(3, 3), "for the zero matrix, any unit vector")
    none, equal = "None means a new", "generator: draws the random start"
    exact = torch.diag(torch.tensor([2.0, 1, 2]))  # in `double` rounding may make one eigenvalue the larger
    yield case("the same matrix twice: eigenvalues 2, 2, 1", hard, exact, none, twice=True)
    seed = draw.integer(1, 1000)
    yield case("twice with equal generators", hard, exact, equal, twice=True, generator=seed)
    refused = ("ValueError: see `require_matrix`", "or G is not square")
    yield case("a matrix that is not square", bad, torch.ones(2, 3), *refused[::-1])
    yield case("an entry that is not a number", bad, NOT_A_NUMBER, *refused[:1])


def triplet_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, matrix: Tensor, *sentences: str) -> Case:
        return Case(name, {"matrix": matrix}, part, sentences)

    part, hard, size = "the triplet", "hard matrices", "entries of any size"
    largest, signs = "The largest singular value", "is as right as"
    equations, dtype = ("u: (m,), of norm 1", "v: (n,), of norm 1", "sigma: a scalar"), "All are in the computing"
    yield case("the matrix [[0, -2], [1, 0]]", part, torch.tensor([[0.0, -2], [1, 0]]), *equations, largest)
    yield case("a tall 6 x 3 matrix", part, with_spectrum(draw, 6, 3, [4, 2.5, 1]), *equations, signs)
    wide = with_spectrum(draw, 3, 6, [40, 25, 10]).float()
    yield case("a wide 3 x 6 matrix in float32", part, wide, *equations, signs, dtype)
    whole = -(draw.integers(1, 9, 3, 2) + torch.tensor([[9, 0], [0, 5], [0, 0]]))
    yield case("negative whole numbers", part, whole, *equations, dtype, "divided by its largest absolute")
    close = with_spectrum(draw, 4, 5, [1, 0.999, 0.5, 0.1])
    yield case("two singular values that differ by 0.1 %", part, close, largest)
    yield case("a repeated largest singular value: 2, 2, 1", hard, with_spectrum(draw, 4, 3, [2, 2, 1]), *equations)
    yield case("zeros", hard, torch.zeros(3, 2), "For the zero matrix")
    three, any_size = with_spectrum(draw, 4, 3, [3, 2, 1]), ("Entries may have any size", "The square of 1e-30 is 0")
    yield case("entries of about 1e-30, in float32", size, (1e-30 * three).float(), *any_size)
    yield case("entries of about 1e30, in float32", size, (1e30 * three).float(), *any_size)
    yield case("a vector", "invalid input", torch.ones(3), "ValueError: see")


def deflation_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, matrix: Tensor, *sentences: str, **more: Data) -> Case:
        return Case(name, {"matrix": matrix, **more}, part, sentences)

    part, stop, hard, bad = "the decomposition", "when to stop", "hard matrices", "invalid input"
    steps, shapes, product = "R_0 = M", ("U: (m, k)", "S: (k,)", "Vh: (k, n)"), "Unless `rank` limits it"
    dtype, signs = "All are in the computing", "may have either"
    ends, most, k = "or when sigma is at most", "rank: the largest number", "k is the smaller"
    diagonal = torch.tensor([[3, 0, 0], [0, -2, 0]])
    yield case("the matrix [[3, 0, 0], [0, -2, 0]], of whole numbers", part, diagonal, steps, *shapes, product, dtype)
    one_by_one = ("is the dominant triplet", "R_(k+1) = R_k", "The singular value decomposition")
    yield case(
        "a tall 6 x 3 matrix", part, with_spectrum(draw, 6, 3, [4, 2, 1]), *one_by_one, product, signs, "None means all"
    )
    wide = with_spectrum(draw, 3, 6, [40, 20, 10]).float()
    yield case("a wide 3 x 6 matrix in float32", part, wide, *shapes, product, dtype)
    five = with_spectrum(draw, 5, 5, [5, 3, 1, 0.5, 0.2])
    yield case("two triplets of a 5 x 5 matrix", part, five, most, k, rank=2)
    yield case("no triplet of a 5 x 5 matrix: rank 0", part, five, most, k, rank=0)
    two = with_spectrum(draw, 5, 4, [3, 2])
    yield case("a 5 x 4 matrix of rank 2", stop, two, ends, k)
    yield case("a 5 x 4 matrix of rank 2, at most 3 triplets", stop, two, ends, k, rank=3)
    yield case("zeros", stop, torch.zeros(3, 2), "k is the smaller", ends)
    yield case("entries of about 1e-10", stop, 1e-10 * with_spectrum(draw, 4, 3, [3, 2, 1]), ends)
    yield case("entries of about 1e10, of rank 2", stop, 1e10 * with_spectrum(draw, 4, 3, [3, 2]), ends)
    second = "Second, where a singular value is repeated"
    yield case("a repeated singular value: 2, 2, 2", hard, with_spectrum(draw, 4, 3, [2, 2, 2]), second)
    first = ("First, the subtraction leaves", "Two things go wrong")
    spectrum = [1, 1e-5, 1e-10, 3e-14]
    yield case("the singular values 1, 1e-5, 1e-10, 3e-14", hard, with_spectrum(draw, 6, 5, spectrum), *first)
    for fixed in STEEP:  # drawn once and for all, so that the verdict does not depend on the seed
        steep = with_spectrum(Draw(fixed), 6, 5, spectrum)
        yield case(f"the same singular values, matrix {fixed}", hard, steep, *first)
    refused = ("or the rank is out of range", "ValueError: see")
    yield case("rank 6 of a 5 x 5 matrix", bad, five, *refused[:1], rank=6)
    yield case("rank 4 of a 6 x 3 matrix", bad, torch.ones(6, 3), *refused[:1], rank=4)
    yield case("rank -1", bad, five, *refused[:1], rank=-1)
    yield case("a vector", bad, torch.ones(3), *refused[1:])
    yield case("a single row", part, draw.normal(1, 4, dtype=torch.float64), *shapes, product)


STEEP = (1, 2)


def truncate_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, matrix: Tensor, rank: int, *sentences: str) -> Case:
        return Case(name, {"matrix": matrix, "rank": rank}, part, sentences or ("The nearest matrix of rank",))

    part, ends, bad = "the nearest matrix", "from rank 0 to full rank", "invalid input"
    yield case("diag(3, 2, 1) at rank 1", part, torch.diag(torch.tensor([3.0, 2, 1])), 1)
    whole = torch.tensor([[0, 3], [-2, 0], [0, 0]])
    yield case("[[0, 3], [-2, 0], [0, 0]], of whole numbers, at rank 1", part, whole, 1, "(m, n), the computing dtype")
    wide = with_spectrum(draw, 4, 6, [5, 3, 2, 0.5])
    yield case("a wide 4 x 6 matrix at rank 2", part, wide, 2)
    yield case("a tall 6 x 4 matrix at rank 3", part, wide.T.contiguous(), 3)
    square = with_spectrum(draw, 5, 5, [5, 4, 3, 2, 1]).float()
    yield case("a 5 x 5 matrix in float32 at rank 3", part, square, 3, "The nearest", "(m, n), the computing dtype")
    half = torch.diag(torch.tensor([4, 2, 1], dtype=torch.bfloat16))
    yield case("diag(4, 2, 1) in bfloat16 at rank 2", part, half, 2, "(m, n), the computing dtype")
    yield case("rank 0", ends, wide, 0, "rank: r, between 0")
    yield case("full rank", ends, wide, 4, "rank: r, between 0")
    refused = "or the rank is out of range"
    yield case("rank 5 of a 4 x 6 matrix", bad, wide, 5, refused, "rank: r, between 0")
    yield case("rank -1", bad, wide, -1, refused)
    yield case("a vector", bad, torch.ones(3), 1, "ValueError: see")


def error_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, matrix: Tensor, rank: int, *sentences: str, **norm: Data) -> Case:
        return Case(name, {"matrix": matrix, "rank": rank, **norm}, part, sentences)

    one, other, bad = "Frobenius norm", "spectral norm", "invalid input"
    distance, formula = "Distance of M from the nearest", "In the Frobenius norm"
    which, rank = 'norm: "frobenius" or', "rank: r, between 0"
    diagonal = torch.diag(torch.tensor([12, 4, 3]))
    spectral: dict[str, Data] = {"norm": "spectral"}
    yield case("diag(12, 4, 3), of whole numbers, at rank 1", one, diagonal, 1, distance, formula)
    tall = with_spectrum(draw, 6, 4, sorted((draw.number(0.2, 4) for _ in range(4)), reverse=True))
    yield case("a tall 6 x 4 matrix at rank 2", one, tall, 2, distance, formula)
    yield case("the same at rank 0", one, tall.float(), 0, rank, distance)
    yield case("at full rank", one, tall, 4, "0 if r = min(m, n)")
    wide = tall.T.contiguous()
    yield case("a wide 4 x 6 matrix at rank 1", one, wide, 1, distance, formula)
    yield case("diag(12, 4, 3) at rank 1, spectral norm", other, diagonal, 1, which, formula, **spectral)
    yield case("the tall matrix at rank 2, spectral norm", other, tall, 2, which, formula, **spectral)
    yield case("at rank 0, spectral norm", other, tall, 0, rank, which, **spectral)
    yield case("at full rank, spectral norm", other, tall, 4, "0 if r = min(m, n)", **spectral)
    refused = ("the rank is out of range;", "or the norm is unknown")
    yield case("an unknown norm", bad, tall, 1, *refused[1:], norm="nuclear")
    for rank_asked, norm in ((5, "frobenius"), (-1, "frobenius"), (5, "spectral"), (-1, "spectral")):
        yield case(f"rank {rank_asked} of a 6 x 4 matrix, {norm} norm", bad, tall, rank_asked, *refused[:1], norm=norm)
    yield case("a vector", bad, torch.ones(3), 1, "ValueError: see")


def energy_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, matrix: Tensor, energy: float, *sentences: str) -> Case:
        return Case(name, {"matrix": matrix, "energy": energy}, part, sentences or ("The smallest rank that keeps",))

    part, ends, bad = "the rank", "the ends", "invalid input"
    diagonal = torch.diag(torch.tensor([3, 2, 1, 1]))  # energies 9, 4, 1, 1 of 15
    yield case("diag(3, 2, 1, 1), of whole numbers, 80 %", part, diagonal, 0.8)
    tall = with_spectrum(draw, 6, 4, [3, 2, 1, 1])
    yield case("a tall matrix with these singular values, 90 %", part, tall, 0.9)
    wide = draw.number(0.5, 20) * with_spectrum(draw, 4, 7, [3, 2, 1, 1])
    yield case("a wide one, 50 %", part, wide.float(), 0.5)
    yield case("a single column", part, torch.tensor([[3.0], [4], [0]]), 0.9)
    eight = torch.diag(torch.tensor([2, 1, 1, 1, 1], dtype=torch.float64))  # energies 4, 1, 1, 1, 1 of 8
    yield case("diag(2, 1, 1, 1, 1), exactly what rank 1 keeps", part, eight, 0.5)
    yield case("diag(2, 1, 1, 1, 1), exactly what rank 3 keeps", part, eight, 0.75)
    eps = torch.finfo(torch.float64).eps
    rounding, one = "A sum that falls short", "So `energy` = 1 does not"
    yield case("diag(1, 1), and 4 eps more than rank 1 keeps", part, torch.eye(2).double(), 0.5 + 4 * eps, rounding)
    yield case("diag(1, 1), and 8 eps more than rank 1 keeps", part, torch.eye(2).double(), 0.5 + 8 * eps, rounding)
    two = torch.diag(torch.tensor([2.0, 2, 0]))
    yield case("diag(2, 2, 0), 90 %", part, two, 0.9)
    yield case("diag(1, 1e-4), all of it", ends, torch.diag(torch.tensor([1, 1e-4]).double()), 1.0, rounding)
    yield case("the tall one, all of it", ends, tall, 1.0, "energy: the share")
    three = with_spectrum(draw, 8, 6, [3, 2, 1])
    yield case("an 8 x 6 matrix of rank 3, all of its energy", ends, three, 1.0, one, rounding)
    small = torch.diag(torch.tensor([1, 1, 5e-7]))
    yield case("diag(1, 1, 5e-7) in float32, all of its energy", ends, small, 1.0, one, rounding)
    yield case("zeros", ends, torch.zeros(2, 3), 0.9, "0 for the zero matrix")
    yield case("diag(3, 0, 0)", ends, torch.diag(torch.tensor([3.0, 0, 0])), 0.9, "r, from 1 to min(m, n)")
    for energy in (90.0, 1.5, 0.0, -0.5):
        yield case(f"an energy of {energy:g}", bad, tall, energy, "or energy is out of range", "energy: the share")
    yield case("a vector", bad, torch.ones(3), 0.9, "ValueError: see")


def pca_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, data: Tensor, count: int, *sentences: str) -> Case:
        return Case(name, {"data": data, "count": count}, part, sentences)

    part, bad = "the components", "invalid input"
    most, second, divisor = "along which the samples vary most", "directions: (count, d)", "divided by N - 1"
    centred, result = "Principal component analysis", "mean: (d,)"
    line = torch.tensor([[1, 3], [2, 5], [3, 7]])
    yield case("three points on a line, whole numbers", part, line, 1, most, centred, result, "All are in the")
    place = 4 + draw.normal(4, dtype=torch.float64)
    tall = with_spectrum(draw, 20, 4, [9, 5, 2, 0.5]) + place
    yield case("20 samples with 4 features, 2 directions", part, tall, 2, most, second, divisor, "A direction is")
    yield case("all 4 directions, in float32", part, tall.float(), 4, second, "variances: (count,)", "All are in the")
    wide = with_spectrum(draw, 4, 6, [9, 5, 2, 0.5]) + 1
    yield case("4 samples with 6 features, 2 directions", part, wide, 2, most, centred, divisor)
    yield case("two samples", part, wide[:2].clone(), 1, "data: (N, d), one sample", divisor)
    yield case("a single sample", bad, tall[:1].clone(), 1, "there is only one sample", "data: (N, d)")
    refused = ("or count is out of range", "count: number of directions")
    for count in (0, -1, 5):
        yield case(f"{count} directions of 4 features", bad, tall, count, *refused)
    yield case("5 directions of 4 samples with 6 features", bad, wide, 5, *refused)
    yield case("an entry that is not a number", bad, NOT_A_NUMBER, 1, "ValueError: see")


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
        probe=try_eigenvector,
        dtypes=True,
        background=("G: (k, k), symmetric",),
        agree=agree_on(eigenvector_laws),
        explain=explain_eigenvector,
        seconds=15.0,  # without squaring it takes 14,000 steps a matrix, which is slow on a busy machine
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
        dtypes=True,
        background=("matrix: M, (m, n)", "generator: as in"),
        agree=agree_on(triplet_laws),
        explain=explain_triplet,
        seconds=15.0,  # as above
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
        dtypes=True,
        background=("matrix: M, (m, n)",),
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
        dtypes=True,
        explain=explain_truncate,
        background=("matrix: M, (m, n)", "It is nearest both"),
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
        explain=explain_error,
        background=("matrix: M, (m, n)",),
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
        explain=explain_energy,
        background=("matrix: M, (m, n)",),
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
        dtypes=True,
        explain=explain_pca,
        background=("A sample's",),
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
        measured="60 steps of 8 story cards each on the bundled GPT-2, seed 0",
        idea="low-rank approximation",
    ),
]
