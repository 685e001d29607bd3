"""Unit 18, rank where it matters: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_18.explanations import (
    explain_allocation,
    explain_budget,
    explain_layer,
    explain_scores,
    explain_sensitivity,
    explain_test,
)
from lora_from_scratch.checks.unit_18.loops import FAULTY, SOUND
from lora_from_scratch.checks.unit_18.probes import run_layer, run_test
from lora_from_scratch.methods.adalora import AdaLoRALinear
from lora_from_scratch.methods.rank_allocation import allocate, cubic_budget, smoothed_sensitivity, triplet_scores
from lora_from_scratch.museum.never_allocated import test_train

TITLE = "Rank where it matters"

# --- AdaLoRALinear -----------------------------------------------------------------------------------


def layer_cases(draw: Draw) -> Iterator[Case]:
    def case(
        name: str, what: str, sizes: tuple[int, int, int], *sentences: str, zeros: Sequence[int] = (), **more: Data
    ) -> Case:
        inputs, out, rank = sizes
        E = 1 + draw.normal(rank, 1).abs()
        E[list(zeros)] = 0
        given: dict[str, Data] = {"what": what, "W": draw.normal(out, inputs), "b": draw.normal(out), "E": E}
        given |= {"A": draw.normal(rank, inputs), "B": draw.normal(out, rank), "alpha": 6.0}
        return Case(name, given | {"x": draw.normal(3, inputs)} | more, what, sentences)

    factors, distances = "factors", "distances"
    form, parameters, first = "A LoRA layer with a diagonal E", "The parameters are", "keeps the first rank"
    two, flows = "diag(E) A (r, in) and B (out, r)", "Gradients flow to A, E and B"
    yield case("5 inputs, 4 outputs, r = 2", factors, (5, 4, 2), two, form, parameters)
    yield case("4 inputs, 6 outputs, r = 3", factors, (4, 6, 3), two, flows, form)
    yield case("as many inputs and outputs as triplets: 3", factors, (3, 3, 3), two, form, parameters)
    yield case("r = 4, of which two are cut", factors, (5, 4, 4), first, two, zeros=(1, 3))
    yield case("E = 0: the start", factors, (5, 4, 2), flows, first, form, zeros=(0, 1))
    far, norms, square, both = (
        "How far the rows of A",
        "These are Frobenius norms",
        "they are not squared",
        "(2,), first",
    )
    learned = "Gradients flow to A and B"
    A, B = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0], [0.0], [0.0]])
    yield case("A = (1, 1) and B = (2, 0, 0), r = 1", distances, (2, 3, 1), far, both, A=A, B=B)
    yield case("5 inputs, 4 outputs, r = 3", distances, (5, 4, 3), norms, square, far, learned)
    yield case("as many inputs and outputs as triplets: 3, with distances", distances, (3, 3, 3), far, norms, learned)
    yield case("r = 2, of which one is cut", distances, (4, 5, 2), far, both, zeros=(0,))


# --- smoothed_sensitivity, triplet_scores ------------------------------------------------------------


def sensitivity_cases(draw: Draw) -> Iterator[Case]:
    def case(
        name: str, shape: tuple[int, ...], betas: tuple[float, float], *sentences: str, first: bool = False
    ) -> Case:
        given: dict[str, Data] = {"parameter": draw.normal(*shape), "gradient": draw.normal(*shape)}
        before = torch.zeros(shape) if first else 1 + draw.normal(*shape).abs()
        given |= {"sensitivity": before, "uncertainty": before.clone() / 2, "beta1": betas[0], "beta2": betas[1]}
        return Case(name, given, sentences=sentences)

    new, single = "of each number of a parameter after", "The sensitivity of a single batch"
    smooth, distance, kept = "The new sensitivity is beta1", "The new uncertainty is beta2", "The given tensors keep"
    shape, same, zeros = "of any shape", "of the same shape, from the step before", "zeros before the first step"
    betas, pair = "beta1, beta2: at least 0", "The new sensitivity and the new uncertainty"
    numbers: dict[str, Data] = {"parameter": torch.tensor([2.0, -3.0]), "gradient": torch.tensor([0.5, 1.0])}
    numbers |= {"sensitivity": torch.tensor([2.0, 1.0]), "uncertainty": torch.tensor([0.0, 4.0])}
    yield Case("w = 2, -3 and g = 0.5, 1", numbers | {"beta1": 0.5, "beta2": 0.5}, sentences=(single, new, smooth))
    yield case("the first step, 4 numbers", (4,), (0.85, 0.85), zeros, pair, first=True)
    yield case("a 3 x 4 matrix, beta1 = 0.9, beta2 = 0.6", (3, 4), (0.9, 0.6), shape, smooth, distance, kept, same)
    yield case("a 5 x 1 matrix, beta1 = 0.4, beta2 = 0.8", (5, 1), (0.4, 0.8), distance, smooth, pair)
    yield case("beta1 = 0 and beta2 = 0.5", (2, 3), (0.0, 0.5), betas, distance)
    yield case("beta1 = 0.5 and beta2 = 0", (3, 2), (0.5, 0.0), betas, smooth)


def score_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, sizes: tuple[int, int, int], *sentences: str) -> Case:
        inputs, out, rank = sizes
        shapes = {"lora_A": (rank, inputs), "lora_E": (rank, 1), "lora_B": (out, rank)}
        tables: list[dict[str, Data]] = [{part: draw.normal(*s).abs() for part, s in shapes.items()} for _ in range(2)]
        return Case(name, {"sensitivity": tables[0], "uncertainty": tables[1]}, sentences=sentences)

    each, product, total = "The score of each triplet", "The importance of a number is", "The score of triplet i is"
    names, shape = "sensitivity, uncertainty: of the numbers", "(r,)."
    one: dict[str, Data] = {
        "lora_A": torch.tensor([[1.0, 3.0]]),
        "lora_E": torch.tensor([[5.0]]),
        "lora_B": torch.tensor([[2.0], [4.0]]),
    }
    other: dict[str, Data] = {
        "lora_A": torch.tensor([[2.0, 0.0]]),
        "lora_E": torch.tensor([[1.0]]),
        "lora_B": torch.tensor([[1.0], [1.0]]),
    }
    yield Case(
        "r = 1, with whole numbers", {"sensitivity": one, "uncertainty": other}, sentences=(total, product, each)
    )
    yield case("4 inputs, 5 outputs, r = 3", (4, 5, 3), names, total, product, shape)
    yield case("as many inputs and outputs as triplets: 3", (3, 3, 3), total, names, shape)
    yield case("6 inputs, 2 outputs, r = 2", (6, 2, 2), product, each)


# --- cubic_budget, allocate --------------------------------------------------------------------------


def budget_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, step: int, phases: tuple[int, int], numbers: tuple[int, int], *sentences: str) -> Case:
        given: dict[str, Data] = {"step": step, "first": phases[0], "last": phases[1]}
        return Case(name, given | {"whole": numbers[0], "target": numbers[1]}, sentences=sentences)

    kept, up_to, from_on = "How many triplets of all matrices", "Up to the step `first`", "From the step `last` on"
    between, counted, order, sizes = (
        "In between it is",
        "step: counted from 1",
        "first, last: the steps",
        "whole, target",
    )
    yield case("halfway from 80 to 16", 15, (5, 25), (80, 16), between, kept, sizes)
    yield case("a quarter of the way from 192 to 48", 10, (4, 28), (192, 48), between, order)
    yield case("the step `first`", 4, (4, 28), (192, 48), up_to, counted)
    yield case("step 1, long before", 1, (40, 280), (100, 30), up_to, counted)
    yield case("the step `last`", 28, (4, 28), (192, 48), from_on, order)
    yield case("long after", 600, (40, 280), (700, 30), from_on, kept)
    yield case("one step after `first`", 8, (7, 17), (90, 40), between, order)
    yield case("one step before `last`", 16, (7, 17), (2000, 40), between)
    yield case("from 7 to 0, halfway: 0.875", 6, (2, 10), (7, 0), between, sizes)
    yield case("nothing to cut", 6, (2, 10), (24, 24), sizes, kept)
    yield case("the fall begins at once", 3, (0, 8), (64, 8), order, between)
    first, length = draw.integer(3, 30), 2 * draw.integer(10, 40)
    whole = 8 * draw.integer(20, 40)
    yield case("halfway between random steps", first + length // 2, (first, first + length), (whole, 8), between, sizes)


def allocation_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, scores: Sequence[Tensor], budget: int, *sentences: str) -> Case:
        return Case(name, {"scores": list(scores), "budget": budget}, sentences=sentences)

    def distinct(*sizes: int) -> list[Tensor]:
        numbers = (draw.permutation(sum(sizes)) + 1.0) / 4
        return list(numbers.split(list(sizes)))

    best, all_or_none, exactly = "Which triplets are kept", "So a matrix may keep", "Exactly `budget` are kept"
    ties, sizes, limits, masks = (
        "Among triplets with the same score",
        "The r_i may differ",
        "budget: from 0",
        "A mask for",
    )
    scores = "scores: of each matrix"
    one = [torch.tensor([0.5, 4.0, 3.0]), torch.tensor([2.0, 0.1, 5.0])]
    yield case("two matrices with three triplets, budget 3", one, 3, best, masks, scores)
    yield case("three matrices with four triplets, budget 5", distinct(4, 4, 4), 5, best, exactly, scores)
    far = [torch.tensor([9.0, 8.0, 7.0]), torch.tensor([1.0, 2.0, 3.0])]
    yield case("one matrix is far more important, budget 3", far, 3, all_or_none, best)
    yield case("matrices with 2, 5 and 1 triplets, budget 4", distinct(2, 5, 1), 4, sizes, masks)
    yield case("all scores are zero, budget 2", [torch.zeros(2), torch.zeros(3)], 2, ties, exactly)
    equal = [torch.tensor([1.0, 3.0, 1.0]), torch.tensor([3.0, 1.0, 3.0])]
    yield case("many equal scores, budget 2", equal, 2, ties, exactly)
    yield case("many equal scores, budget 5", equal, 5, ties, exactly)
    yield case("budget 0", distinct(2, 2), 0, limits, masks, all_or_none)
    yield case("the budget is everything", distinct(3, 2), 5, limits, exactly)
    yield case("one matrix, budget 2", distinct(4), 2, best, masks)


# --- test_train --------------------------------------------------------------------------------------


def test_cases(draw: Draw) -> Iterator[Case]:
    once, number = "does not call `model.update_and_allocate` exactly once", "anything but the number of the step"
    there, before = "the gradients of the step are not there", "the optimiser takes its step after"
    sentences = {
        "the steps are counted from 0": number,
        "every call gets the number of all steps": number,
        "every call gets the number 1": number,
        "the gradients are set to None before the call": there,
        "the gradients are set to zero before the call": there,
        "the gradients are set to None before the call, except in the first step": there,
        "the optimiser takes its step after the call": before,
    }
    for name in SOUND:
        yield Case(f"a sound loop: {name}", {"loop": name}, sentences=("A sound loop passes",))
    for name in FAULTY:
        yield Case(
            f"a faulty loop: {name}", {"loop": name}, sentences=(sentences.get(name, once), "A test of a `train`")
        )


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        AdaLoRALinear,
        idea="triplets",
        difficulty=2,
        minutes=9,
        points=2,
        blank=("factors", "distances_from_orthonormal"),
        hints=(
            "diag(E) A is A with row i multiplied by E_i. Which axis of A has as many entries as E?",
            "`lora_E` is (r, 1), and `lora_A` is (r, in): broadcasting multiplies each row. For the distances form "
            "A A^T and B^T B, both (r, r), and subtract the identity.",
            "`torch.eye(r)` is the identity; `torch.linalg.matrix_norm` is the Frobenius norm; `torch.stack` puts two "
            "numbers into one tensor without cutting off their gradients.",
        ),
        cases=layer_cases,
        probe=run_layer,
        explain=explain_layer,
    ),
    Exercise(
        smoothed_sensitivity,
        idea="importance",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "There are three numbers for each entry: the sensitivity of this batch, its running mean, and the running "
            "mean of the distance between the two. Work out one entry on paper, in this order.",
            "A running mean is beta * old + (1 - beta) * new. For the uncertainty, *new* is the absolute difference "
            "between |w g| and the sensitivity that you have just worked out.",
            "`(parameter * gradient).abs()`. Write `a + b`, not `a += b`, which changes the tensor that was given.",
        ),
        cases=sensitivity_cases,
        explain=explain_sensitivity,
        background=("It differs from batch to batch",),
    ),
    Exercise(
        triplet_scores,
        idea="importance",
        difficulty=2,
        minutes=7,
        points=2,
        hints=(
            "First the importance of every single number, then the scores. How many scores are there?",
            "A row of A has in numbers, a column of B has out numbers. Take the mean over the axis that is not r.",
            "`.mean(dim=1)` is the mean of each row; `lora_E` is (r, 1), and `.flatten()` makes it (r,).",
        ),
        cases=score_cases,
        explain=explain_scores,
    ),
    Exercise(
        cubic_budget,
        idea="the budget",
        difficulty=2,
        minutes=6,
        points=1,
        hints=(
            "There are three phases. Which steps belong to the first, and which to the last?",
            "In between, work out which share of the way is left, from 1 down to 0, and take its cube.",
            "`int(...)` rounds a positive number down; `round` does not.",
        ),
        cases=budget_cases,
        explain=explain_budget,
    ),
    Exercise(
        allocate,
        idea="the budget",
        difficulty=3,
        minutes=9,
        points=2,
        hints=(
            "The matrices compete with each other, so put all scores into one tensor first.",
            "Sort all scores, mark the places of the first `budget` ones in a tensor of zeros, and cut that tensor "
            "into pieces of the right sizes.",
            "`torch.cat`; `.argsort(descending=True, stable=True)` leaves equal scores in their order; "
            "`tensor.split([3, 2, 4])` cuts.",
        ),
        cases=allocation_cases,
        explain=explain_allocation,
    ),
    Exercise(
        test_train,
        idea="tests of one's own",
        difficulty=4,
        minutes=14,
        points=3,
        hints=(
            "You cannot look into the loop, but it calls your model and your `update_and_allocate`. What can a "
            "function of yours see at that moment?",
            "Give a small `nn.Linear` an `update_and_allocate` that keeps a record: the step, whether there is a "
            "gradient other than zero, and a copy of the weight. Compare the record with what it should be after "
            "`train` has returned. When is the weight at the first call still the one of the beginning?",
            "`model.update_and_allocate = record` gives a module a method. `model.weight.grad` may be None; "
            "`.detach().clone()` copies the weight. Use at least three batches.",
        ),
        cases=test_cases,
        probe=run_test,
        explain=explain_test,
        background=(
            "train: is called as",
            "The model is any module",
            "It returns nothing",
            "the batches are a list",
            "the loss is",
        ),
    ),
]

PREDICTIONS = [
    Prediction(
        "two_seeds",
        question=(
            "Two runs with different seeds have each distributed 48 triplets over the 24 matrices. How similar are the "
            "two tables of ranks?"
        ),
        choices={
            "a": "as different as two random distributions: most matrices would do",
            "b": "much the same, matrix by matrix: the same ones keep a lot, and many keep one or none",
            "c": "the same kinds of matrices, in other blocks",
            "d": "both are nearly flat, with two triplets in almost every matrix",
        },
        answer="b",
        explanation=(
            "The tables have a correlation of about 0.9, and two random ones of about 0. With both seeds the MLPs and "
            "the last two blocks keep most of the rank, and more than half of the matrices keep one or none."
        ),
        replies={
            "a": "Then the correlation of the two tables would be close to zero.",
            "c": "The blocks agree as well as the kinds of matrices do.",
            "d": "Nothing holds a matrix at the average: its triplets compete with those of all the others.",
        },
        measured="32 steps on the bundled GPT-2, seeds 0 and 1",
        idea="where the rank goes",
    ),
    Prediction(
        "is_it_worth_it",
        question=(
            "AdaLoRA, flat ranks and random ranks keep the same number of triplets. Each has its own tuned learning "
            "rate, and 32 steps. How do their held-out losses compare, with both seeds?"
        ),
        choices={
            "a": "AdaLoRA has the lowest, and flat and random ranks are close to each other",
            "b": "AdaLoRA and random ranks are close to each other, and better than flat ranks: matrices differ",
            "c": "flat ranks have the lowest: AdaLoRA spends most of its training on triplets that are cut",
            "d": "there is no difference that is larger than the one between the seeds",
        },
        answer="a",
        explanation=(
            "AdaLoRA is ahead by 0.1 or more. Random ranks are no better than flat ones: it does not help by itself "
            "that the ranks of the matrices differ."
        ),
        replies={
            "b": "Matrices do differ, but a random distribution does not know how.",
            "c": "Those triplets are not trained in vain: that is how it finds out where the rank is needed.",
            "d": "The two seeds of one method differ by less than 0.1 here, which is less than AdaLoRA is ahead.",
        },
        measured="32 steps on the bundled GPT-2, seeds 0 and 1",
        idea="where the rank goes",
    ),
]
