"""Unit 23, the folklore, tested: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_23.explanations import (
    explain_change,
    explain_matched,
    explain_ratio,
    explain_steps,
    explain_verdict,
)
from lora_from_scratch.checks.unit_23.probes import run_change, run_matched, run_ratio
from lora_from_scratch.compare.folklore import (
    best_rate_ratio,
    matched_rank,
    relative_change_by_block,
    steps_per_epoch,
    verdict,
)

TITLE = "The folklore, tested"

# --- steps_per_epoch, matched_rank -------------------------------------------------------------------


def steps_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, examples: int, micro_batch: int, *sentences: str, **others: Data) -> Case:
        return Case(name, {"examples": examples, "micro_batch": micro_batch, **others}, sentences=sentences)

    every, effective, last = "The number of optimiser steps", "One step uses an effective", "The last batch of an epoch"
    yield case("320 examples in batches of 8", 320, 8, every)
    yield case("100 examples in batches of 8", 100, 8, last, every)
    yield case("320 examples, micro-batches of 4, accumulation 4", 320, 4, effective, accumulation=4)
    yield case("96 examples, micro-batches of 2, 3 processes", 96, 2, effective, processes=3)
    yield case("1,000 examples, micro-batches of 4, 2 processes, accumulation 8", 1000, 4, effective, last, every,
               accumulation=8, processes=2)  # fmt: skip
    yield case("fewer examples than one batch", 5, 4, last, accumulation=2)
    batch = draw.integer(2, 9)
    yield case("one example more than whole batches", batch * draw.integer(3, 20) + 1, batch, last)
    yield case("an effective batch of all examples", 24, 4, effective, every, accumulation=3, processes=2)


def matched_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, rank: int, layers: list[Data], other_layers: list[Data], *sentences: str) -> Case:
        return Case(name, {"rank": rank, "layers": layers, "other_layers": other_layers}, sentences=sentences)

    nearly, count, given = "The rank at which LoRA on other", "Beside a layer with a weight", "rank: of the LoRA"
    first, second, near, least = (
        "layers: the shapes (out",
        "other_layers: the shapes",
        "The rank whose number",
        "It is at",
    )
    tie = "of two that are equally near"
    attention: list[Data] = [[768, 256], [256, 256]]
    mlp: list[Data] = [[1024, 256], [256, 1024]]
    yield case("all matrices of a block with rank 8, and its attention", 8, attention + mlp, attention, nearly, count)
    yield case("all matrices of a block with rank 8, and its MLP", 8, attention + mlp, mlp, nearly, second, near)
    yield case("the attention with rank 4, and all matrices", 4, attention, attention + mlp, nearly, first, near)
    rank = draw.integer(2, 12)
    yield case("the same layers", rank, mlp, mlp, given, nearly)
    yield case("layers of half the size", rank, [[40, 24]], [[20, 12]], count, given)
    yield case("rounded up: 11 parameters, 4 for each rank", 1, [[6, 5]], [[1, 3]], near, count)
    yield case("as near to 2 as to 3: 5 parameters, 2 for each rank", 1, [[3, 2]], [[1, 1]], tie, near)
    yield case("as near to 3 as to 4: 7 parameters, 2 for each rank", 1, [[3, 4]], [[1, 1]], tie, near)
    yield case("layers so large that rank 1 is too much", 1, [[8, 4]], [[100, 50], [50, 100]], least)
    yield case("as near to 0 as to 1", 1, [[2, 2]], [[4, 4]], least)


# --- best_rate_ratio ---------------------------------------------------------------------------------


def ratio_cases(draw: Draw) -> Iterator[Case]:
    start = draw.choice([1e-4, 2e-4, 5e-4])

    def case(name: str, losses: Sequence[float], other: Sequence[float], *sentences: str, order: int = 1) -> Case:
        """The rates of the first are 8 times those of the second, and neighbours differ by a factor of 2."""
        sweeps = []
        for factor, values in ((8, losses), (1, other)):
            sweep = [(factor * start * 2**place, loss) for place, loss in enumerate(values)][::order]
            sweeps.append(sweep[1:] + sweep[:1] if order == -1 else sweep)
        names = (("rates", "losses"), ("other_rates", "other_losses"))
        inputs: dict[str, Data] = {}
        for (rates, values_), sweep in zip(names, sweeps, strict=True):
            inputs[rates] = [rate for rate, _ in sweep]
            inputs[values_] = [loss for _, loss in sweep]
        return Case(name, inputs, sentences=sentences)

    ratio, edge, order, own = (
        "The best learning rate of a",
        "If the best rate of one",
        "losses, other_losses",
        "They may",
    )
    error, diverged, nan = "ValueError: the best rate of one", "NaN if the run diverged", math.nan
    yield case("the best in the middle of three", (1.4, 1.1, 1.3), (1.5, 1.2, 1.6), ratio)
    yield case("the second of four, and the third of five", (1.4, 1.1, 1.3, 1.9), (2.0, 1.6, 1.2, 1.4, 5.0), ratio, own)
    yield case(
        "from the largest rate to the smallest", (1.4, 1.3, 1.1, 1.9), (2.0, 1.2, 1.4, 1.6), order, ratio, order=-1
    )
    yield case("the largest rates diverged", (1.4, 1.1, nan, nan), (1.6, 1.2, nan), diverged, ratio)
    yield case("the smallest rate diverged", (nan, 1.1, 1.3), (1.5, 1.2, 1.6), diverged)
    late = (2.0, 1.9, 1.8, 1.6, 1.5, 1.2, 1.4)
    yield case("the other has the higher rate", (1.4, 1.1, 1.3), late, ratio, own)
    yield case("a loss of 0", (0.5, 0.0, 0.3), (1.5, 1.2, 1.6), ratio)
    yield case("the first is best at its largest rate", (1.4, 1.3, 1.1), (1.5, 1.2, 1.6), error, edge)
    yield case("the first is best at its smallest rate", (1.1, 1.3, 1.4), (1.5, 1.2, 1.6), edge, error)
    yield case("the other is best at its largest rate", (1.4, 1.1, 1.3), (1.6, 1.5, 1.2), error, edge)
    yield case("the other is best at its smallest rate", (1.4, 1.1, 1.3), (1.2, 1.5, 1.6), edge, error)
    yield case("only one rate", (1.4,), (1.5, 1.2, 1.6), error)
    yield case("all runs of the other diverged", (1.4, 1.1, 1.3), (nan, nan, nan), error)


# --- verdict -----------------------------------------------------------------------------------------


def verdict_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, differences: Sequence[float], margin: float | None, *sentences: str) -> Case:
        scale = 1.0 if margin is None else 0.0
        factor = 2.0 ** (scale * draw.integer(-1, 2))  # exact, and without a margin it changes no verdict
        return Case(name, {"differences": [factor * d for d in differences], "margin": margin}, sentences=sentences)

    def invalid(name: str, differences: Sequence[float], margin: float | None, *sentences: str) -> Case:
        return Case(name, {"differences": list(differences), "margin": margin}, sentences=sentences)

    compared, better, equal = "The mean of the differences", "Without a margin, the claim", "With a margin, the claim"
    above, below, within = (
        "it holds if the mean is",
        "it does not hold if the mean is below",
        "it holds if no difference",
    )
    beyond, rest, seeds = "it does not hold if the mean, whatever", "In all other cases", "differences: one per seed"
    texts, error, limit = '"holds here", "does', "ValueError: there are", "margin: the largest"
    yield case("three that agree in favour", (0.30, 0.35, 0.32), None, above, better, texts)
    yield case("three that agree against", (-0.30, -0.35, -0.32), None, below, better, texts)
    yield case("both signs", (0.1, -0.2, 0.05), None, rest, texts)
    yield case("both signs, of nearly the same size", (-0.6, 0.8, 0.8), None, rest, compared)
    yield case("all in favour, but far apart", (0.1, 0.3, 0.15), None, rest, compared, above)
    yield case("all against, but far apart", (-0.1, -0.3, -0.15), None, rest, below)
    yield case("five seeds, one of them far off", (0.1, 0.12, 0.5, 0.11, 0.13), None, compared, rest)
    yield case("the middle one below the spread, the mean above", (1.0, 1.0, 2.25), None, compared, above)
    yield case("the mean is as large as the spread", (1.0, 2.0, 3.0), None, above, rest)
    yield case("the mean is minus the spread", (-1.0, -2.0, -3.0), None, below, rest)
    yield case("no difference at all", (0.0, 0.0, 0.0), None, above, rest)
    yield case("two seeds", (0.25, 0.375), None, seeds, above)
    yield case("within the margin, both signs", (0.01, -0.02, 0.03), 0.05, within, equal)
    yield case("within the margin, and always the same", (0.03, 0.031, 0.029), 0.05, within, equal)
    yield case("within the margin, all negative", (-0.02, -0.04, -0.01), 0.05, within)
    yield case("one beyond the margin", (0.01, -0.02, 0.06), 0.05, within, rest)
    yield case("one beyond the margin, negative", (0.01, 0.02, -0.06), 0.05, within, rest)
    yield case("far beyond the margin", (0.20, 0.25, 0.22), 0.05, beyond, limit)
    yield case("far beyond the margin, negative", (-0.20, -0.25, -0.22), 0.05, beyond)
    yield case("beyond the margin, but far apart", (0.1, 0.5, 0.3), 0.05, beyond, rest)
    yield case("close together, with a mean within the margin", (0.04, 0.055, 0.04), 0.05, beyond, rest)
    yield case("the largest is as large as the margin", (0.5, 0.25, -0.5), 0.5, within)
    yield case("the mean is as large as the margin", (0.25, 0.5), 0.375, beyond, rest)
    yield case("the mean is as large as the spread, with a margin", (1.0, 2.0, 3.0), 0.5, beyond, rest)
    yield case("the margin is 0, and there is a difference", (0.10, 0.11, 0.10), 0.0, limit, beyond)
    yield case("the margin is 0, and there is none", (0.0, 0.0), 0.0, limit, within)
    yield invalid("one seed", (0.3,), None, error, seeds)
    yield invalid("no seed", (), None, error)
    yield invalid("a run diverged: NaN", (0.3, math.nan, 0.2), None, error)
    yield invalid("a run diverged: infinity", (0.3, 0.2, -math.inf), 0.05, error)
    yield invalid("a negative margin", (0.1, 0.2, 0.1), -0.05, error, limit)


# --- relative_change_by_block ------------------------------------------------------------------------


def change_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, shapes: Mapping[str, tuple[int, ...]], *sentences: str, only: Sequence[str] = ()) -> Case:
        weights: dict[str, Data] = {n: draw.number(0.5, 3) * draw.normal(*shape) for n, shape in shapes.items()}
        changes: dict[str, Data] = {}
        for n, shape in shapes.items():
            if not only or n in only:
                changes[n] = draw.number(0.1, 0.6) * draw.normal(*shape)
        return Case(name, {"weights": weights, "changes": changes}, sentences=sentences)

    of, norm, absent = "How much fine-tuning changed", "For a block it is the", "A weight of the block that has no"
    names, some, order = "weights: by name", "changes: some or all", "By the number of the block"
    number = 'The number of the block is the component after "h"'
    at = "transformer.h.{}.{}".format
    yield case("one matrix in one block", {at(0, "mlp.c_fc"): (6, 4)}, of, norm)
    two = {at(0, "attn.c_attn"): (9, 3), at(0, "mlp.c_proj"): (3, 12)}
    yield case("two matrices in one block", two, norm, of)
    large = dict(two)
    large[at(1, "attn.c_attn")] = (9, 3)
    large[at(1, "mlp.c_proj")] = (3, 12)
    yield case("two matrices in each of two blocks", large, of, norm, names)
    yield case("one of two matrices is changed", two, absent, some, only=[at(0, "mlp.c_proj")])
    one = [at(1, "attn.c_attn")]
    yield case("a block without a change", large, absent, some, order, only=one)
    mixed = {at(block, "attn.c_proj"): (4, 4) for block in (10, 2, 9, 0)}
    yield case("the blocks 10, 2, 9 and 0", mixed, order, number)
    deep = {f"model.5.branch.6.h.{block}.mlp.7.c_fc": (4, 2) for block in (3, 12)}
    yield case("names with more numbers in them", deep, number, names)
    nothing = Case(
        "a change of zero",
        {"weights": {at(2, "ln"): draw.normal(5)}, "changes": {at(2, "ln"): 0 * draw.normal(5)}},
        sentences=(of, norm),
    )
    yield nothing
    twice: Tensor = draw.normal(3, 4)
    yield Case(
        "the change is minus twice the weight",
        {"weights": {at(1, "c"): twice}, "changes": {at(1, "c"): -2 * twice}},
        sentences=(of, norm),
    )


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        steps_per_epoch,
        idea="fair comparisons",
        difficulty=1,
        minutes=4,
        points=1,
        hints=(
            "How many examples does one step use, over all processes and micro-batches? That is the effective batch.",
            "Divide the examples by the effective batch. What happens to the rest?",
            "`math.ceil(a / b)`, or with whole numbers only: `-(-a // b)`.",
        ),
        cases=steps_cases,
        explain=explain_steps,
    ),
    Exercise(
        matched_rank,
        idea="fair comparisons",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "How many parameters does the given LoRA train in all? And how many does a LoRA of rank 1 train on the "
            "other layers?",
            "The quotient of the two is rarely a whole number. Two ranks are candidates: one below and one above.",
            "`divmod(budget, per_rank)` gives the rank below and what is left over. Go up if what is left over is more "
            "than half of `per_rank`. Python's `round` takes halves to the even number, which is not what is wanted.",
        ),
        cases=matched_cases,
        probe=run_matched,
        explain=explain_matched,
    ),
    Exercise(
        best_rate_ratio,
        idea="fair comparisons",
        difficulty=2,
        minutes=7,
        points=2,
        hints=(
            "For each of the two: which rate has the lowest loss, and was a smaller and a larger rate tried as well?",
            "`best_learning_rate(losses)` of unit 14, which is imported above, answers both questions.",
            "Call it for each of the two in a loop, raise a ValueError if the second value is False, keep the rate.",
        ),
        cases=ratio_cases,
        probe=run_ratio,
        explain=explain_ratio,
        background=("For LoRA and full fine-tuning it is said",),
    ),
    Exercise(
        verdict,
        idea="verdicts",
        difficulty=3,
        minutes=12,
        points=3,
        hints=(
            "Compute the mean and the spread first. They decide the claims without a margin; draw the differences as "
            "points on a line, with 0 marked.",
            "With a margin two quantities count: the largest difference in size, for *holds*, and the size of the "
            "mean, for *does not hold*.",
            "Check the input first (`math.isfinite`). Use `margin is None`, since a margin of 0 is a margin. "
            "`abs(mean) > max(margin, spread)` combines two conditions.",
        ),
        cases=verdict_cases,
        explain=explain_verdict,
        background=("Judge a claim by", "There are two kinds of claims"),
    ),
    Exercise(
        relative_change_by_block,
        idea="verdicts",
        difficulty=3,
        minutes=10,
        points=2,
        hints=(
            "The square of the norm of one long vector is the sum of the squares of all its entries. Sums can be "
            "collected from matrix to matrix; norms cannot.",
            "Keep two sums per block, one for the changes and one for the weights; take the root of their quotient at "
            "the end.",
            '`parts = name.split(".")` and `parts.index("h")` lead to the number; make it an `int` before you sort.',
        ),
        cases=change_cases,
        probe=run_change,
        explain=explain_change,
    ),
]

PREDICTIONS = [
    Prediction(
        "by_chance",
        question=(
            "Two settings are equally good, and the differences of three seeds are random. How often does your verdict "
            "say that one of them is better, whichever it is?"
        ),
        choices={
            "a": "about once in 100 times",
            "b": "about once in 12 times",
            "c": "about once in 4 times",
        },
        answer="b",
        explanation=(
            "All three differences have the same sign once in four times. In a third of these cases their mean is also "
            "larger than their spread: 8 %, half of it for *holds* and half for *does not hold*."
        ),
        replies={
            "a": "Three numbers are few: it is not rare that they lie close together by chance.",
            "c": "That is how often all three agree in sign. The rule asks for more.",
        },
        measured="4,000 times three normal numbers",
        idea="verdicts",
    ),
    Prediction(
        "which_blocks",
        question=(
            "LoRA of rank 8 on all matrices, three seeds. How does the relative change go from block 0, the lowest, to "
            "block 5?"
        ),
        choices={
            "a": "it rises from each block to the next",
            "b": "it rises, except that block 0 changes more than block 1",
            "c": "the upper half changes less than the lower half",
        },
        answer="b",
        explanation=(
            "From block 1 on, each block changes about as much as the one below it or more, and the upper half changes "
            "more than the lower half with every seed. So the claim gets its verdict. But block 0 does not follow the "
            "rule: a verdict on two means says nothing about every block."
        ),
        replies={
            "a": "That is what one expects from the claim. Look at block 0 and block 1.",
            "c": "The upper half changes more, with each of the three seeds.",
        },
        measured="20 steps on the bundled GPT-2, rank 8, seeds 0 to 2",
        idea="verdicts",
    ),
]
