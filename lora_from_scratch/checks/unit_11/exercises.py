"""Unit 11, how LoRA works: what is checked."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_02.exercises import with_spectrum
from lora_from_scratch.finetune.alpha_and_learning_rate import exchange_alpha
from lora_from_scratch.finetune.metrics import kl_divergence
from lora_from_scratch.linear_algebra.subspace import (
    amplification_factor,
    effective_rank,
    similarity_grid,
    subspace_similarity,
)

TITLE = "How LoRA works"

# --- The cases ---------------------------------------------------------------------------------------


def kl_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, base: torch.Tensor, other: torch.Tensor, part: str = "the divergence") -> Case:
        return Case(name, {"base_logits": base, "logits": other}, part)

    yield case("a fair coin against one of 3 to 1", torch.zeros(2), torch.tensor([math.log(3.0), 0.0]))
    yield case("one position, 6 tokens", 2 * draw.normal(6), draw.normal(6))
    yield case("2 texts of 3 positions, 5 tokens", 2 * draw.normal(2, 3, 5), draw.normal(2, 3, 5))
    base = draw.normal(3, 4)
    shifted = torch.cat([base[:1] + 7, draw.normal(2, 4)])
    yield case("the first of 3 positions is the same but for a constant", base, shifted)
    far = "probabilities that are almost 0"
    yield case("q almost rules out what p expects", torch.tensor([0.0, 300.0]), torch.tensor([0.0, -300.0]), far)
    yield case("p has a token that never comes", torch.tensor([0.0, 1.0, -400.0]), draw.normal(3), far)


def effective_rank_cases(draw: Draw) -> Iterator[Case]:
    part = "the rank"
    yield Case("diag(2, 1, 1)", {"matrix": torch.diag(torch.tensor([2.0, 1.0, 1.0]))}, part)
    equal = draw.number(0.01, 50) * with_spectrum(draw, 5, 4, [1, 1, 1, 1])
    yield Case("four equal singular values", {"matrix": equal}, part)
    tall = with_spectrum(draw, 6, 4, sorted((draw.number(0.2, 4) for _ in range(4)), reverse=True))
    yield Case("a tall matrix", {"matrix": tall.float()}, part)
    yield Case("the same, 1000 times as large", {"matrix": 1000 * tall.float()}, part)
    zeros = "zeros"
    flat = torch.diag(torch.tensor([draw.number(1, 3), 1.0, 0.0]))
    yield Case("a diagonal matrix with a 0 on it", {"matrix": flat}, zeros)
    yield Case("the zero matrix", {"matrix": torch.zeros(3, 4)}, zeros)
    yield Case("a vector", {"matrix": torch.ones(3)}, "bad input")


def similarity_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, A: Data, B: Data, i: int, j: int, part: str = "the similarity") -> Case:
        return Case(name, {"A": A, "B": B, "i": i, "j": j}, part)

    line, other = torch.tensor([[2.0, 0.0]]), 3 * torch.tensor([[0.5, math.sqrt(0.75)]])
    yield case("two lines at 60 degrees", line, other, 1, 1)
    A = with_spectrum(draw, 4, 8, [4, 3, 2, 1])
    B = with_spectrum(draw, 5, 8, [5, 4, 3, 2, 1])
    yield case("4 x 8 and 5 x 8, i = 2 and j = 3", A, B, 2, 3)
    yield case("i = 4 and j = 2", A, B, 4, 2)
    yield case("a matrix and the same one, i = 2 and j = 4", A, A, 2, 4)
    flat = with_spectrum(draw, 6, 5, [3, 2, 1]).float()
    yield case("a 6 x 5 update of rank 3 and a 3 x 5 matrix, i = j = 2", flat, draw.normal(3, 5), 2, 2)
    yield case("8 and 7 columns", A, B[:, :7], 1, 1, "bad input")
    yield case("4 directions of a matrix of rank 3", flat, flat, 4, 1, "bad input")


def grid_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, A: Data, B: Data, rows: int, columns: int, part: str = "the grid") -> Case:
        return Case(name, {"A": A, "B": B, "rows": rows, "columns": columns}, part)

    yield case("two lines at 60 degrees", torch.tensor([[2.0, 0]]), torch.tensor([[0.5, math.sqrt(0.75)]]), 1, 1)
    A = with_spectrum(draw, 4, 8, [4, 3, 2, 1])
    B = with_spectrum(draw, 5, 8, [5, 4, 3, 2, 1])
    yield case("4 x 8 and 5 x 8, 2 by 5", A, B, 2, 5)
    yield case("4 by 3", A, B, 4, 3)
    yield case("a matrix and the same one, 3 by 3", A.float(), A.float(), 3, 3)
    yield case("8 and 7 columns", A, B[:, :7], 1, 1, "bad input")
    yield case("6 directions of a matrix of rank 5", A, B, 2, 6, "bad input")


def amplification_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, W: torch.Tensor, delta_W: torch.Tensor, rank: int, part: str = "the factor") -> Case:
        return Case(name, {"W": W, "delta_W": delta_W, "rank": rank}, part)

    W, change = torch.diag(torch.tensor([8.0, 4, 0.5])), torch.diag(torch.tensor([0.0, 0, 3]))
    yield case("W = diag(8, 4, 0.5), the update diag(0, 0, 3)", W, change, 1)
    W = with_spectrum(draw, 6, 4, [6, 3, 2, 1])
    change = with_spectrum(draw, 6, 4, [3, 2])
    yield case("6 x 4, an update of rank 2", W, change, 2)
    yield case("the same, only its first direction", W, change, 1)
    square = with_spectrum(draw, 5, 5, [9, 5, 3, 2, 1])
    yield case("5 x 5, an update of rank 3", square.float(), with_spectrum(draw, 5, 5, [2, 1, 0.5]).float(), 3)
    yield case("the update is -W / 2", square, -square / 2, 2)
    yield case("a weight of zeros", torch.zeros(3, 3), torch.eye(3), 2, "a weight of zeros")
    yield case("W and the update have other shapes", W, change.T, 1, "bad input")
    yield case("3 directions of an update of rank 2", W, change, 3, "bad input")


def exchange_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, alpha: float, new_alpha: float, A: torch.Tensor, B: torch.Tensor) -> Case:
        rate = draw.number(1e-3, 1e-2)
        return Case(name, {"A": A, "B": B, "alpha": alpha, "learning_rate": rate, "new_alpha": new_alpha})

    yield case("alpha 8 to 32, B still zero", 8.0, 32.0, torch.tensor([[2.0, -4.0]]), torch.zeros(3, 1))
    yield case("alpha 32 to 8, in the middle of a training", 32.0, 8.0, draw.normal(2, 4), draw.normal(3, 2))
    yield case("the same alpha", 16.0, 16.0, draw.normal(2, 3), draw.normal(3, 2))
    yield case("alpha 16 to another", 16.0, draw.number(17, 60), draw.normal(2, 5), draw.normal(4, 2))


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        kl_divergence,
        idea="what is forgotten",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "Turn both rows of logits into logarithms of probabilities first. Which of the two predictions weighs the "
            "sum over the tokens?",
            "p weighs: a token that the base model never expects does not count, whatever q says of it.",
            "`F.log_softmax(x, dim=-1)` gives the logarithms, safe from numbers that are too small; `.exp()` of them "
            "are the probabilities. Sum over the last axis only.",
        ),
        cases=kl_cases,
    ),
    Exercise(
        effective_rank,
        idea="what an update is made of",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "Make shares of the singular values, which add up to 1. Their entropy is large when they are equal.",
            "Three steps: `torch.linalg.svdvals`, the shares, the exponential of their entropy. What is there to "
            "divide by if all are 0?",
            "`torch.special.entr(p)` is -p ln p, and 0 at 0. The zero matrix returns before the division.",
        ),
        cases=effective_rank_cases,
    ),
    Exercise(
        subspace_similarity,
        idea="comparing subspaces",
        difficulty=3,
        minutes=12,
        points=3,
        hints=(
            "Each row of Vh is a direction of length 1. The product of one with another is the cosine of their angle.",
            "All products of i directions with j others are one matrix product, (i, n) by (n, j). Then the equation.",
            '`top_directions(A, i, "i", "A")` gives U, S, Vh and refuses what has to be refused; '
            "`require_same_columns(A, B)` the rest. |M|_F^2 is `M.square().sum()`.",
        ),
        cases=similarity_cases,
    ),
    Exercise(
        similarity_grid,
        idea="comparing subspaces",
        difficulty=3,
        minutes=12,
        points=3,
        hints=(
            "Write the matrix of squared cosines for all the directions. Which of its entries does phi(i, j) add up?",
            "The upper left corner, i rows by j columns. A sum over every corner at once is a cumulative sum, twice.",
            "`cumsum(dim=0)` then `cumsum(dim=1)`; divide by `torch.minimum(i, j)` with i as a column and j as a row, "
            "both from 1.",
        ),
        cases=grid_cases,
    ),
    Exercise(
        amplification_factor,
        idea="what an update does to the weight",
        difficulty=3,
        minutes=12,
        points=3,
        hints=(
            "Whose singular vectors are U and V? Both norms are taken in the same directions.",
            "U^T delta_W V is a diagonal matrix; what stands on it? U^T W V is (r, r), and is not diagonal.",
            '`U, S, Vh = top_directions(delta_W, rank, "rank", "delta_W")`; V is `Vh.T`. A float divided by 0.0 is an '
            "error in Python: the docstring says what comes instead.",
        ),
        cases=amplification_cases,
    ),
    Exercise(
        exchange_alpha,
        idea="alpha, rank and learning rate",
        difficulty=4,
        minutes=15,
        points=3,
        hints=(
            "Put c A and c B into the product with the new s, and ask for the old one. That gives c.",
            "If A has become c A, each of its steps has to become c times as long as well. Under Adam, what sets the "
            "length of a step: the gradient or the learning rate?",
            "c occurs twice in the product, so it is a root. Return new tensors: `c * A`, not `A *= c`.",
        ),
        cases=exchange_cases,
    ),
]

PREDICTIONS = [
    Prediction(
        "random_overlap",
        question=(
            "Two random matrices of 64 rows and 256 columns have nothing to do with each other. How large is "
            "$\\phi$ of their 64-dimensional subspaces, on the scale from 0 (orthogonal) to 1 (the same)?"
        ),
        choices={"a": "about 0", "b": "about 1/16", "c": "about 1/4", "d": "about 1/2"},
        answer="c",
        explanation=(
            "About 1/4: a random direction has, on average, 64/256 of its squared length in a subspace of 64 of 256 "
            "dimensions. In general chance gives max(i, j) / n. In GPT-3, with n = 12,288, it is 0.005 and can be "
            "forgotten. On a small model it cannot: a similarity of 0.25 means nothing there, and has to be compared "
            "with chance each time."
        ),
        idea="comparing subspaces",
    ),
    Prediction(
        "larger_change",
        question=(
            "LoRA of rank 8 on q and v, and full fine-tuning, each at its tuned learning rate, the same number of "
            "steps. Take the matrix that makes q in one block. Which of the two has changed it more, in the "
            "Frobenius norm $|\\Delta W|_F$?"
        ),
        choices={
            "a": "full fine-tuning, by far: all the entries of the matrix are free",
            "b": "full fine-tuning, a little",
            "c": "LoRA, by far",
        },
        answer="c",
        explanation=(
            "LoRA, several times over. A low rank says in how many directions a matrix changes, not by how much. Full "
            "fine-tuning has every matrix of every block to spread its work over, and takes small steps. LoRA has a "
            "few directions of a few matrices, a larger learning rate and a scaling of alpha / r = 8; what has to "
            "happen, happens there. Low-rank is not small."
        ),
        idea="what an update is made of",
    ),
]
