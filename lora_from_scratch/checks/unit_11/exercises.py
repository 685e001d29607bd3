"""Unit 11, how LoRA works: what is checked."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_02.exercises import with_spectrum
from lora_from_scratch.checks.unit_11.explanations import (
    explain_amplification,
    explain_effective_rank,
    explain_exchange,
    explain_grid,
    explain_kl,
    explain_similarity,
)
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
    def case(name: str, base: Tensor, other: Tensor, *sentences: str, part: str = "the divergence") -> Case:
        return Case(name, {"base_logits": base, "logits": other}, part, sentences)

    p, moved, nats = "p is the base model's", "How far the predictions moved", "(...), in nats"
    coins = torch.zeros(2), torch.tensor([math.log(3.0), 0.0])
    yield case("a fair coin against a 3:1 coin", *coins, moved, p, nats, "and q the other", "even none")
    yield case("a 3:1 coin against a fair coin", *coins[::-1], "not symmetric", "drawn from p", p)
    yield case("one position, 6 tokens", 2 * draw.normal(6), draw.normal(6), moved, nats)
    texts = 2 * draw.normal(2, 3, 5), draw.normal(2, 3, 5)
    yield case("2 texts with 3 positions, 5 tokens", *texts, "runs over the vocabulary", "the same shape", "even none")
    base = draw.normal(3, 4)
    shifted = torch.cat([base[:1] + 7, draw.normal(2, 4)])
    yield case("the first of 3 positions differs only by a constant", base, shifted, "It is 0 where p = q")
    half = (8 * draw.normal(12, 5)).bfloat16(), (8 * draw.normal(12, 5)).bfloat16()  # 3 may be exact by chance
    yield case("logits in bfloat16", *half, "converted to float32 first")
    far, finite = "probabilities close to 0", "The result is finite even"
    never = torch.tensor([0.0, 300.0]), torch.tensor([0.0, -300.0])
    yield case("q nearly excludes what p expects", *never, finite, part=far)
    small = torch.tensor([0.0, 1.0, -400.0]), draw.normal(3)
    yield case("p has a token of probability 0", *small, finite, part=far)


def effective_rank_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, matrix: Tensor, *sentences: str, part: str = "the rank") -> Case:
        return Case(name, {"matrix": matrix}, part, sentences)

    smooth, formula, least = "as a smooth number", "p_k = S_k", "A number from 1"
    yield case("diag(2, 1, 1)", torch.diag(torch.tensor([2.0, 1.0, 1.0])), smooth, formula)
    equal = draw.number(0.01, 50) * with_spectrum(draw, 5, 4, [1, 1, 1, 1])
    yield case("four equal singular values", equal, "r equal singular values", least)
    tall = with_spectrum(draw, 6, 4, sorted((draw.number(0.2, 4) for _ in range(4)), reverse=True)).float()
    yield case("a tall matrix", tall, smooth, formula)
    yield case("the same, multiplied by 1000", 1000 * tall, "when M is multiplied by a number")
    yield case("the same, divided by 10 billion", 1e-10 * tall, "when M is multiplied by a number")
    yield case("its transpose", tall.T, "matrix: M", formula)
    yield case("whole numbers", draw.integers(-9, 9, 3, 5) + 20 * torch.eye(3, 5, dtype=torch.int64), "matrix: M")
    yield case("diag(1, 0.01, 0.01)", torch.diag(torch.tensor([1.0, 0.01, 0.01])), "No tolerance is needed")
    zeros, none = "zeros", "`0 ln 0 = 0`"
    flat = torch.diag(torch.tensor([draw.number(1, 3), 1.0, 0.0]))
    yield case("a diagonal matrix with a 0 on the diagonal", flat, none, "never more than the rank", part=zeros)
    yield case("a single entry that is not 0", torch.tensor([[0.0, 0.0], [0.0, -3.0]]), least, none, part=zeros)
    yield case("the zero matrix", torch.zeros(3, 4), "0 for the zero matrix", part=zeros)
    yield case("a vector", torch.ones(3), "see `require_matrix`", part="bad input")


def similarity_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, A: Data, B: Data, i: int, j: int, *sentences: str, part: str = "the similarity") -> Case:
        return Case(name, {"A": A, "B": B, "i": i, "j": j}, part, sentences)

    phi, between, swapped = "`phi =", "How much of one subspace", "A number between 0 and 1"
    line, other = torch.tensor([[2.0, 0.0]]), 3 * torch.tensor([[0.5, math.sqrt(0.75)]])
    yield case("two lines at 60 degrees", line, other, 1, 1, between, phi)
    axes = torch.diag(torch.tensor([1.0, 2, 3, 4]))
    yield case(
        "diag(1, 2, 3, 4), and its last two rows: i = 3, j = 2", axes, axes[2:], 3, 2, "1 if the smaller", swapped
    )
    yield case("diag(1, 2, 3, 4), and its first two rows: i = j = 2", axes, axes[:2], 2, 2, "1 if the smaller")
    A, B = with_spectrum(draw, 4, 8, [4, 3, 2, 1]), with_spectrum(draw, 5, 8, [5, 4, 3, 2, 1])
    yield case("4 x 8 and 5 x 8, i = 2 and j = 3", A, B, 2, 3, phi, "i: number of", "j: number of", "A: (r_A, n)")
    yield case("the same, with A and B exchanged", B, A, 3, 2, swapped, "as `lora_A`, (r, in)")
    yield case("i = 4 and j = 2", A, B, 4, 2, phi, "i: number of")
    yield case("i = j = 3", A, B, 3, 3, "projection distance")
    yield case("a matrix and itself, i = 2 and j = 4", A, A, 2, 4, "1 if the smaller", "j: number of")
    flat = with_spectrum(draw, 6, 5, [3, 2, 1]).float()
    name = "a 6 x 5 update of rank 3 and a 3 x 5 matrix, i = j = 2"
    yield case(name, flat, draw.normal(3, 5), 2, 2, "or as a whole update", phi)
    whole = draw.integers(1, 9, 2, 5) + torch.tensor([[20, 0, 0, 0, 0], [0, 10, 0, 0, 0]])
    near = whole + draw.normal(2, 5)
    yield case("whole numbers and float32", whole, near, 2, 1, "A: (r_A, n), of any real", "its dtype may be another")
    bad, wide, columns = "bad input", "i or j is out of range", "same number of columns"
    yield case("8 and 7 columns", A, B[:, :7], 1, 1, columns, "B: (r_B, n), the same n", part=bad)
    yield case("A is a vector", A[0], B, 1, 1, "see `require_matrix`", part=bad)
    yield case("4 directions of A, which has rank 3", flat, flat, 4, 1, wide, "Beyond the rank", part=bad)
    yield case("4 directions of B, which has rank 3", flat, flat, 1, 4, wide, "Beyond the rank", part=bad)
    yield case("i = 0", A, B, 0, 1, wide, "i: number of", part=bad)
    yield case("j = -1", A, B, 1, -1, wide, "j: number of", part=bad)


def grid_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, A: Data, B: Data, rows: int, columns: int, *sentences: str, part: str = "the grid") -> Case:
        return Case(name, {"A": A, "B": B, "rows": rows, "columns": columns}, part, sentences)

    entries, size, row, column = "is phi(A, B, i, j)", "(rows, columns), float64", "rows: the largest", "columns: the"
    every = "for every pair of sizes"
    one = torch.tensor([[2.0, 0]]), torch.tensor([[0.5, math.sqrt(0.75)]])
    yield case("two lines at 60 degrees", *one, 1, 1, every, entries, size)
    A, B = with_spectrum(draw, 4, 8, [4, 3, 2, 1]), with_spectrum(draw, 5, 8, [5, 4, 3, 2, 1])
    yield case("4 x 8 and 5 x 8, 2 by 5", A, B, 2, 5, every, entries, size, column, "A: (r_A, n)")
    yield case("4 by 3", A, B, 4, 3, entries, row)
    yield case("a matrix and itself, 3 by 3, in float32", A.float(), A.float(), 3, 3, entries, size)
    whole = draw.integers(1, 9, 2, 8) + torch.tensor([[20, 0, 0, 0, 0, 0, 0, 0], [0, 10, 0, 0, 0, 0, 0, 0]])
    yield case("whole numbers and float32", whole, B.float(), 2, 2, "A: (r_A, n), of any", "its dtype may be another")
    bad, refused = "bad input", "as `subspace_similarity`"
    yield case("8 and 7 columns", A, B[:, :7], 1, 1, refused, "B: (r_B, n), the same n", part=bad)
    yield case("6 columns of the grid, and B of rank 5", A, B, 2, 6, refused, column, part=bad)
    yield case("5 rows of the grid, and A of rank 4", A, B, 5, 2, refused, row, part=bad)
    yield case("no rows", A, B, 0, 2, refused, row, part=bad)


def amplification_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, W: Tensor, delta_W: Tensor, rank: int, *sentences: str, part: str = "the factor") -> Case:
        return Case(name, {"W": W, "delta_W": delta_W, "rank": rank}, part, sentences)

    stronger, ratio, whole = "How much stronger", "`|U^T delta_W V|_F", "the numerator is"
    W, change = torch.diag(torch.tensor([8.0, 4, 0.5])), torch.diag(torch.tensor([0.0, 0, 3]))
    yield case("W = diag(8, 4, 0.5), update diag(0, 0, 3)", W, change, 1, stronger, ratio, whole)
    W, change = with_spectrum(draw, 6, 4, [6, 3, 2, 1]), with_spectrum(draw, 6, 4, [3, 2])
    yield case(
        "6 x 4, an update of rank 2",
        W,
        change,
        2,
        stronger,
        whole,
        ratio,
        "A positive number",
        "W: (m, n), the original",
    )
    yield case("the same, only the first direction of the update", W, change, 1, ratio, "rank: r, between 1")
    yield case("the transposes of both", W.T, change.T, 2, ratio, "delta_W: (m, n), the")
    square = with_spectrum(draw, 5, 5, [9, 5, 3, 2, 1])
    of_square = with_spectrum(draw, 5, 5, [2, 1, 0.5]).float()
    yield case("5 x 5 in float64, an update of rank 3 in float32", square, of_square, 3, "its dtype may differ", ratio)
    yield case("W in float32", square.float(), of_square.double(), 2, "its dtype may differ", "W: (m, n), the original")
    yield case("the update is -W / 2", square, -square / 2, 2, "A positive number", ratio)
    few = torch.diag(torch.tensor([0.16, 0.16, 0.16, 0.16, 5]))
    paper = torch.diag(torch.tensor([3.455, 3.455, 3.455, 3.455, 0]))
    yield case("norms of 6.91 and 0.32, as in the paper", few, paper, 4, "The paper's case", whole)
    nothing, infinite = "no weight in these directions", "infinity if W is exactly zero"
    yield case("a weight of zeros", torch.zeros(3, 3), torch.eye(3), 2, infinite, part=nothing)
    two = torch.diag(torch.tensor([1.0, 1.0, 0.0])), torch.diag(torch.tensor([0.0, 0.0, 2.0]))
    yield case("W = diag(1, 1, 0), update diag(0, 0, 2)", *two, 1, infinite, part=nothing)
    bad, shapes, refused, out = "bad input", "the shapes differ", "see `require_matrix`", "or the rank is out of range"
    yield case("W is 6 x 4, the update 4 x 6", W, change.T, 1, shapes, part=bad)
    yield case("W is 4 x 6, the update 6 x 4", W.T, change, 1, shapes, part=bad)
    yield case("3 directions of an update of rank 2", W, change, 3, out, "rank: r, between 1", part=bad)
    yield case("rank 0", W, change, 0, out, "rank: r, between 1", part=bad)
    yield case("an update of zeros", W, 0 * W, 1, out, part=bad)
    strange = torch.where(torch.eye(6, 4) > 0, math.nan, W)
    yield case("W has entries that are NaN", strange, change, 1, refused, part=bad)
    yield case("the update has entries that are NaN", W, strange, 1, refused, part=bad)
    yield case("W and the update are vectors", W[0], change[0], 1, refused, part=bad)


def exchange_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, alpha: float, new_alpha: float, A: Tensor, B: Tensor, *sentences: str) -> Case:
        inputs: dict[str, Data] = {"A": A, "B": B, "alpha": alpha, "new_alpha": new_alpha}
        inputs["learning_rate"] = draw.number(1e-3, 1e-2)
        return Case(name, inputs, sentences=sentences)

    exactly, c, product, steps = (
        "learns exactly the same",
        "by the same number c",
        "dW must be the same",
        "The steps of A",
    )
    same_dW, rate, returned = "There is one c", "learning_rate: of the first", "and the learning rate of the second"
    start = torch.tensor([[2.0, -4.0]]), torch.zeros(3, 1)
    yield case(
        "alpha 8 to 32, B still zero", 8.0, 32.0, *start, exactly, product, same_dW, steps, rate, "A: (r, in)", returned
    )
    name = "alpha 32 to 8, in the middle of training"
    middle = draw.normal(2, 4), draw.normal(3, 2)
    yield case(name, 32.0, 8.0, *middle, c, product, same_dW, steps, "B: (out, r)", "are not modified")
    same_alpha = draw.normal(2, 3), draw.normal(3, 2)
    yield case("the same alpha", 16.0, 16.0, *same_alpha, exactly, "are not modified")
    given = draw.normal(2, 5), draw.normal(4, 2)
    yield case(
        "alpha 16 to another value", 16.0, draw.number(17, 60), *given, "The second has", "of the second LoRA,", rate
    )
    yield case("alpha 0.5 to 2", 0.5, 2.0, *given, "alpha: of the first", "of the second LoRA,", product)


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
        explain=explain_kl,
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
        explain=explain_effective_rank,
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
        background=("For the subspace of the *outputs*",),
        explain=explain_similarity,
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
        dtypes=True,
        background=("are enough: going from i to i + 1",),
        explain=explain_grid,
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
        explain=explain_amplification,
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
        background=(
            "Two LoRAs of the same rank",
            "Adam divides each gradient",
            "This is the paper's remark",
            "Apart from Adam's eps",
            "its rank is the same",
        ),
        explain=explain_exchange,
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
