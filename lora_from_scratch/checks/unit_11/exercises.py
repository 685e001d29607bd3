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

    yield case("a fair coin against a 3:1 coin", torch.zeros(2), torch.tensor([math.log(3.0), 0.0]))
    yield case("one position, 6 tokens", 2 * draw.normal(6), draw.normal(6))
    yield case("2 texts with 3 positions, 5 tokens", 2 * draw.normal(2, 3, 5), draw.normal(2, 3, 5))
    base = draw.normal(3, 4)
    shifted = torch.cat([base[:1] + 7, draw.normal(2, 4)])
    yield case("the first of 3 positions differs only by a constant", base, shifted)
    far = "probabilities close to 0"
    yield case("q nearly excludes what p expects", torch.tensor([0.0, 300.0]), torch.tensor([0.0, -300.0]), far)
    yield case("p has a token of probability 0", torch.tensor([0.0, 1.0, -400.0]), draw.normal(3), far)


def effective_rank_cases(draw: Draw) -> Iterator[Case]:
    part = "the rank"
    yield Case("diag(2, 1, 1)", {"matrix": torch.diag(torch.tensor([2.0, 1.0, 1.0]))}, part)
    equal = draw.number(0.01, 50) * with_spectrum(draw, 5, 4, [1, 1, 1, 1])
    yield Case("four equal singular values", {"matrix": equal}, part)
    tall = with_spectrum(draw, 6, 4, sorted((draw.number(0.2, 4) for _ in range(4)), reverse=True))
    yield Case("a tall matrix", {"matrix": tall.float()}, part)
    yield Case("the same, multiplied by 1000", {"matrix": 1000 * tall.float()}, part)
    zeros = "zeros"
    flat = torch.diag(torch.tensor([draw.number(1, 3), 1.0, 0.0]))
    yield Case("a diagonal matrix with a 0 on the diagonal", {"matrix": flat}, zeros)
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
    yield case("a matrix and itself, i = 2 and j = 4", A, A, 2, 4)
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
    yield case("a matrix and itself, 3 by 3", A.float(), A.float(), 3, 3)
    yield case("8 and 7 columns", A, B[:, :7], 1, 1, "bad input")
    yield case("6 directions of a matrix of rank 5", A, B, 2, 6, "bad input")


def amplification_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, W: torch.Tensor, delta_W: torch.Tensor, rank: int, part: str = "the factor") -> Case:
        return Case(name, {"W": W, "delta_W": delta_W, "rank": rank}, part)

    W, change = torch.diag(torch.tensor([8.0, 4, 0.5])), torch.diag(torch.tensor([0.0, 0, 3]))
    yield case("W = diag(8, 4, 0.5), update diag(0, 0, 3)", W, change, 1)
    W = with_spectrum(draw, 6, 4, [6, 3, 2, 1])
    change = with_spectrum(draw, 6, 4, [3, 2])
    yield case("6 x 4, an update of rank 2", W, change, 2)
    yield case("the same, only the first direction of the update", W, change, 1)
    square = with_spectrum(draw, 5, 5, [9, 5, 3, 2, 1])
    yield case("5 x 5, an update of rank 3", square.float(), with_spectrum(draw, 5, 5, [2, 1, 0.5]).float(), 3)
    yield case("the update is -W / 2", square, -square / 2, 2)
    yield case("a weight of zeros", torch.zeros(3, 3), torch.eye(3), 2, "a weight of zeros")
    yield case("W and the update have different shapes", W, change.T, 1, "bad input")
    yield case("3 directions of an update of rank 2", W, change, 3, "bad input")


def exchange_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, alpha: float, new_alpha: float, A: torch.Tensor, B: torch.Tensor) -> Case:
        rate = draw.number(1e-3, 1e-2)
        return Case(name, {"A": A, "B": B, "alpha": alpha, "learning_rate": rate, "new_alpha": new_alpha})

    yield case("alpha 8 to 32, B still zero", 8.0, 32.0, torch.tensor([[2.0, -4.0]]), torch.zeros(3, 1))
    yield case("alpha 32 to 8, in the middle of training", 32.0, 8.0, draw.normal(2, 4), draw.normal(3, 2))
    yield case("the same alpha", 16.0, 16.0, draw.normal(2, 3), draw.normal(3, 2))
    yield case("alpha 16 to another value", 16.0, draw.number(17, 60), draw.normal(2, 5), draw.normal(4, 2))


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        kl_divergence,
        idea="what is forgotten",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "First turn both rows of logits into log-probabilities. Which of the two predictions weights the sum over "
            "the tokens?",
            "p is the weight: a token that the base model never expects does not count, whatever its probability under "
            "q.",
            "`F.log_softmax(x, dim=-1)` gives the log-probabilities without underflow; `.exp()` of them are the "
            "probabilities. Sum over the last axis only.",
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
            "Turn the singular values into shares that add up to 1. Their entropy is largest when they are all equal.",
            "There are three steps: `torch.linalg.svdvals`, the shares, and the exponential of their entropy. What do "
            "you divide by if all the singular values are 0?",
            "`torch.special.entr(p)` is -p ln p, and 0 at 0. For the zero matrix, return before the division.",
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
            "Each row of Vh is a direction of length 1. The dot product of two of them is the cosine of their angle.",
            "The products of i directions with j others are one matrix product, (i, n) by (n, j). Then apply the "
            "equation.",
            '`top_directions(A, i, "i", "A")` returns U, S, Vh and raises an error if i is too large; '
            "`require_same_columns(A, B)` checks the number of columns. |M|_F^2 is `M.square().sum()`.",
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
            "Write down the matrix of squared cosines for all the directions. Which of its entries does phi(i, j) add "
            "up?",
            "The upper left corner, i rows by j columns. The sums of all such corners are a cumulative sum along both "
            "axes.",
            "`cumsum(dim=0)` then `cumsum(dim=1)`; divide by `torch.minimum(i, j)` with i as a column and j as a row, "
            "both starting at 1.",
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
            "U^T delta_W V is a diagonal matrix; what is on its diagonal? U^T W V is (r, r), and is not diagonal.",
            '`U, S, Vh = top_directions(delta_W, rank, "rank", "delta_W")`; V is `Vh.T`. Dividing a float by 0.0 '
            "is an error in Python: the docstring says what to return instead.",
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
            "Substitute c A and c B into the product with the new s, and require the old product. That determines c.",
            "If A becomes c A, each of its steps has to become c times as long as well. With Adam, what determines the "
            "length of a step: the gradient or the learning rate?",
            "c occurs twice in the product, so it is a square root. Return new tensors: `c * A`, not `A *= c`.",
        ),
        cases=exchange_cases,
    ),
]

PREDICTIONS = [
    Prediction(
        "random_overlap",
        question=(
            "Two independent random matrices have 64 rows and 256 columns. How large is $\\phi$ of their "
            "64-dimensional subspaces, on the scale from 0 (orthogonal) to 1 (identical)?"
        ),
        choices={"a": "about 0", "b": "about 1/16", "c": "about 1/4", "d": "about 1/2"},
        answer="c",
        explanation=(
            "About 1/4: on average, a random direction has 64/256 of its squared length in a subspace of 64 of 256 "
            "dimensions. In general the value by chance is max(i, j) / n. In GPT-3, with n = 12,288, it is 0.005 and "
            "can be neglected. On a small model it cannot: here a similarity of 0.25 means nothing, and every "
            "similarity has to be compared with chance."
        ),
        replies={
            "a": (
                "Two random directions are nearly orthogonal. Subspaces with 64 of 256 dimensions are too large "
                "for that."
            ),
            "b": "1/16 is the square of 64/256. The squared length in a subspace is 64/256 already.",
            "d": "1/2 is the square root of 64/256: a length. The similarity adds up squared lengths.",
        },
        idea="comparing subspaces",
    ),
    Prediction(
        "larger_change",
        question=(
            "You train LoRA of rank 8 on q and v, and full fine-tuning, each at its tuned learning rate and for the "
            "same number of steps. Take the matrix that computes q in one block. Which of the two methods has changed "
            "it more, in the Frobenius norm $|\\Delta W|_F$?"
        ),
        choices={
            "a": "full fine-tuning, by far: all the entries of the matrix can change",
            "b": "full fine-tuning, by a little",
            "c": "LoRA, by far",
        },
        answer="c",
        explanation=(
            "LoRA, several times over. A low rank says how many directions of a matrix change, not by how much. Full "
            "fine-tuning spreads its change over every matrix of every block, and takes small steps. LoRA has only a "
            "few directions in a few matrices, a larger learning rate and a scaling of alpha / r = 8, so those few "
            "directions have to change a lot. Low rank does not mean small."
        ),
        replies={
            "a": "All entries can change, but each changes by little.",
            "b": "It is the other way round, and not by a little.",
        },
        measured="32 steps of 4 cards on the bundled GPT-2, three seeds",
        idea="what an update is made of",
    ),
]
