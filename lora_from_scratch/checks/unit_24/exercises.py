"""Unit 24, when adapters meet: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_24.explanations import (
    explain_agreeing,
    explain_dropped,
    explain_intruders,
    explain_sum,
    explain_test,
    explain_trimmed,
)
from lora_from_scratch.checks.unit_24.lora_sums import FAULTY, SOUND
from lora_from_scratch.checks.unit_24.probes import run_drop, run_sum, run_test, run_trim
from lora_from_scratch.methods.merging import (
    drop_and_rescale,
    intruder_dimensions,
    merge_agreeing,
    sum_of_loras,
    trim,
)
from lora_from_scratch.museum.averaged_factors import test_sum_of_loras

TITLE = "When adapters meet"

# --- sum_of_loras, test_sum_of_loras -----------------------------------------------------------------


def sum_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, ranks: Sequence[int], weights: Sequence[float], *sentences: str, inputs: int = 5) -> Case:
        As: list[Data] = [draw.normal(rank, inputs) for rank in ranks]
        Bs: list[Data] = [draw.normal(4, rank) for rank in ranks]
        return Case(name, {"As": As, "Bs": Bs, "weights": list(weights)}, sentences=sentences)

    sum_, cross, ranks = (
        "One LoRA whose update is the weighted sum",
        "Terms such as B_1 A_2",
        "Their ranks r_i may differ",
    )
    pairs, weights, free = "pairs: (A_i, B_i)", "weights: w_i", "They need not add up to 1"
    shapes = "A (r_1 + r_2 + ..., in)"
    yield case("two LoRAs of rank 1, both with the weight 1", (1, 1), (1.0, 1.0), sum_, cross, pairs)
    yield case("two LoRAs of rank 2, weights 0.5 and 0.5", (2, 2), (0.5, 0.5), cross, weights, sum_, shapes)
    yield case("three LoRAs of rank 2, weights 2, 0.25 and 1", (2, 2, 2), (2.0, 0.25, 1.0), free, weights, shapes)
    yield case("one LoRA subtracted from another", (2, 2), (1.0, -1.0), free, cross)
    yield case("LoRAs of the ranks 1, 3 and 2", (1, 3, 2), (0.5, 3.0, -2.0), ranks, shapes, pairs)
    yield case("one LoRA, weight 0.3", (3,), (0.3,), weights, shapes, inputs=3)


def test_cases(draw: Draw) -> Iterator[Case]:
    sentences = {
        "all A are added up, and all B": "terms that mix two LoRAs",
        "the A are in another order than the B": "terms that mix two LoRAs",
        "the weights are not used": "does not use the weights",
        "the weights are on A and on B": "does not use the weights",
        "the weights are divided by their sum": "makes the weights add up to 1",
        "the weights lose their signs": "takes a negative weight",
        "the weights are multiplied into the given B": "changes an A or a B",
        "the given A are doubled and the given B halved": "changes an A or a B",
    }
    for name in SOUND:
        yield Case(f"a sound function: {name}", {"function": name}, sentences=("A sound function passes",))
    for name in FAULTY:
        yield Case(f"a faulty function: {name}", {"function": name}, sentences=(sentences[name], "A test of a"))


# --- trim, merge_agreeing ----------------------------------------------------------------------------


def trim_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, update: Tensor, density: float, *sentences: str) -> Case:
        return Case(name, {"update": update, "density": density}, sentences=sentences)

    keeps, values, ties = "keep the entries with the largest", "The kept entries keep", "the first ones are kept"
    shape, share, rounds, new = "of any shape", "the share of all entries", "rounded to the nearest", "A new tensor of"
    five = torch.tensor([3.0, -5.0, 1.0, -2.0, 4.0])
    yield case("(3, -5, 1, -2, 4), density 0.4", five, 0.4, keeps, values)
    yield case("a 4 x 5 matrix, density 0.25", draw.normal(4, 5), 0.25, shape, keeps, share, new)
    yield case("a 4 x 5 matrix of negative numbers, density 0.5", -draw.normal(4, 5).abs(), 0.5, values, keeps)
    yield case("10 entries, density 0.26: 2.6 entries", draw.normal(10), 0.26, rounds, share)
    yield case("10 entries, density 0.33: 3.3 entries", draw.normal(2, 5), 0.33, rounds)
    yield case("(2, -2, 2, 1, -2), density 0.4", torch.tensor([2.0, -2.0, 2.0, 1.0, -2.0]), 0.4, ties)
    yield case("(1, 1, 1, 1), density 0.5", torch.ones(4), 0.5, ties, keeps)
    yield case("a transposed 4 x 5 matrix, density 0.5", draw.normal(5, 4).T, 0.5, shape, keeps)
    yield case("density 1", draw.normal(3, 2), 1.0, share, values, new)
    yield case("density 0", draw.normal(3, 2), 0.0, share)
    yield case("a tensor with three axes, density 0.5", draw.normal(2, 3, 2), 0.5, shape)


def agreeing_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, updates: Tensor, *sentences: str) -> Case:
        return Case(name, {"updates": updates}, sentences=sentences)

    elect, large, mean = "elect a sign for each entry", "elected by the sum", "The mean is over"
    zeros, none, axes, merged = "The mean is over", "Where no sign is elected", "updates: (n, ...)", "The merged update"
    yield case("three updates of two entries", torch.tensor([[1.0, 2.0], [3.0, -1.0], [-1.0, 4.0]]), elect, mean)
    yield case("one large value against two small", torch.tensor([[5.0], [-1.0], [-2.0]]), large, elect)
    yield case("with zeros", torch.tensor([[0.0, 4.0], [2.0, 0.0], [6.0, 0.0]]), zeros, elect)
    yield case("values that cancel, and nothing but zeros", torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), none)
    values = draw.normal(4, 3, 5)
    yield case("four random 3 x 5 updates", values, axes, elect, large, merged)
    yield case("the same, trimmed", torch.where(values.abs() > 0.7, values, 0.0), zeros, mean, merged)
    yield case("a single update", draw.normal(1, 4), axes, mean)
    yield case("two updates with two axes and equal sizes", draw.normal(2, 2, 2), axes, merged)


# --- drop_and_rescale, intruder_dimensions -----------------------------------------------------------


def drop_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, shape: tuple[int, ...], drop_rate: float, *sentences: str) -> Case:
        update = draw.normal(*shape)
        update = torch.where(update.abs() < 0.1, 1.0, update)  # without zeros
        return Case(
            name, {"update": update, "drop_rate": drop_rate, "seed": draw.integer(0, 10**6)}, sentences=sentences
        )

    drop, each, rescale, rate = (
        "drop entries of an update",
        "Each entry by itself",
        "The others are divided",
        "at least 0",
    )
    generator, own, shape, new = "generator: where the random", "None: PyTorch's own", "of any shape", "A new tensor of"
    yield case("60 x 50 entries, drop rate 0.5", (60, 50), 0.5, drop, each, rescale, generator, own)
    yield case("60 x 50 entries, drop rate 0.9", (60, 50), 0.9, each, rescale, drop, shape)
    yield case("4,000 entries, drop rate 0.2", (4000,), 0.2, shape, each, rescale, generator, new)
    yield case("nothing is dropped", (5, 4), 0.0, rate, rescale, new)


def directions(draw: Draw, out: int, inputs: int, *new: float) -> tuple[Tensor, Tensor, Tensor]:
    """W, a change along directions that W does not have, with these strengths, and those directions."""
    Q, _ = torch.linalg.qr(draw.normal(out, out, dtype=torch.float64))
    R, _ = torch.linalg.qr(draw.normal(inputs, inputs, dtype=torch.float64))
    strengths = torch.linspace(5, 4, inputs, dtype=torch.float64)
    W = (Q[:, :inputs] * strengths) @ R.T
    U = Q[:, inputs : inputs + len(new)]
    change = (U * torch.tensor(new, dtype=torch.float64)) @ R[:, : len(new)].T
    return W.float(), change.float(), U.float()


def intruder_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, W: Tensor, tuned: Tensor, leading: int, *sentences: str, threshold: float = 0.6) -> Case:
        given: dict[str, Data] = {"W": W, "tuned": tuned, "leading": leading, "threshold": threshold}
        return Case(name, given, sentences=sentences)

    many, like, opposite = "How many leading directions", "is an intruder dimension if", "A vector and its opposite"
    looks, limit, before, after = "leading: so many", "threshold: a cosine", "W: (out, in)", "tuned: (out, in)"
    number = "The number of intruders"
    W, change, _ = directions(draw, 12, 4, 60.0)
    yield case("one strong new direction", W, W + change, 3, many, like, number, after)
    yield case("nothing has changed", W, W, 4, like, number, before)
    yield case("the opposite of W", W, -W, 4, opposite)
    yield case("twice W", W, 2 * W, 3, like)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    yield case("the same directions in reverse order", W, (U * S.flip(0)) @ V, 4, like)
    yield case("the same, of which two are looked at", W, (U * S.flip(0)) @ V, 2, like, looks)
    W, change, _ = directions(draw, 14, 5, 90.0, 70.0)
    yield case("two strong new directions, the first is looked at", W, W + change, 1, looks, many)
    yield case("two strong new directions", W, W + change, 5, many, after, number)
    W, weak, _ = directions(draw, 12, 4, 0.1)
    yield case("a weak new direction, which changes the vectors a little", W, W + weak, 4, like, before)
    W, middle, _ = directions(draw, 12, 4, 4.0)
    yield case("a direction half new, threshold 0.95", W, W + middle, 4, limit, threshold=0.95)
    yield case("a direction half new, threshold 0.3", W, W + middle, 4, limit, threshold=0.3)
    first, second = torch.eye(3)[:, :1], torch.eye(3)[:, 1:2]
    yield case("a direction at right angles to W, threshold 0", first, second, 1, limit, like, threshold=0.0)


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        sum_of_loras,
        idea="sums of adapters",
        difficulty=3,
        minutes=9,
        points=2,
        hints=(
            "Multiply (B_1 + B_2)(A_1 + A_2) out. Two of the four terms are wanted. How can two products be added up "
            "by a single product of larger matrices?",
            "A product of matrices sums over its inner axis. Give every LoRA its own places on that axis: the A one "
            "below the other, the B side by side.",
            "`torch.cat` with `dim=0` and with `dim=1`. The weight goes on one of the two, once.",
        ),
        cases=sum_cases,
        probe=run_sum,
        explain=explain_sum,
        background=("How the weights are divided",),
    ),
    Exercise(
        test_sum_of_loras,
        idea="tests of one's own",
        difficulty=3,
        minutes=10,
        points=3,
        hints=(
            "Make some random LoRAs, and call the function. What do you know about the product of the two matrices "
            "that it returns?",
            "Choose weights with which each fault shows: none of them 0 or 1, one negative, and a sum that is not 1. "
            "Compare products, since A and B alone may be anything.",
            "Work the expected update out from copies (`.clone()`) that you made before the call; compare with "
            "`torch.allclose(..., atol=1e-4)`, and the copies with the originals by `torch.equal`.",
        ),
        cases=test_cases,
        probe=run_test,
        explain=explain_test,
        background=("sum_of_loras: is called as", "Give it LoRAs of one rank"),
    ),
    Exercise(
        trim,
        idea="interference",
        difficulty=3,
        minutes=9,
        points=2,
        hints=(
            "How many entries are kept? Then, which ones: sort the magnitudes, not the values.",
            "Flatten the update, find the places of the largest magnitudes, and copy the values at these places into a "
            "tensor of zeros.",
            "`argsort(descending=True, stable=True)` leaves equal entries in their order; `round(...)` gives the "
            "number; `.view_as(update)` gives the shape back.",
        ),
        cases=trim_cases,
        probe=run_trim,
        explain=explain_trimmed,
    ),
    Exercise(
        merge_agreeing,
        idea="interference",
        difficulty=3,
        minutes=10,
        points=2,
        hints=(
            "Work on one entry at a time, on paper: the values 5, -1, -2 and 0. Which sign is elected, and what is the "
            "mean of those that have it?",
            "Make a mask of the same shape as `updates`: True where an update has the elected sign and is not zero. "
            "Then divide a sum by a count.",
            "`.sign()` gives -1, 0 or 1; `mask.sum(dim=0)` counts; `clamp(min=1)` avoids a division by zero.",
        ),
        cases=agreeing_cases,
        explain=explain_agreeing,
    ),
    Exercise(
        drop_and_rescale,
        idea="interference",
        difficulty=2,
        minutes=7,
        points=2,
        hints=(
            "This is what dropout does in training, on an update instead of activations.",
            "Draw a uniform number for each entry, and compare it with the rate. By which factor do the others have to "
            "grow, so that the mean stays?",
            "`torch.rand(update.shape, generator=generator)` draws; a comparison gives a mask to multiply with.",
        ),
        cases=drop_cases,
        probe=run_drop,
        explain=explain_dropped,
    ),
    Exercise(
        intruder_dimensions,
        idea="intruders",
        difficulty=3,
        minutes=9,
        points=2,
        hints=(
            "`torch.linalg.svd` gives the left singular vectors as the columns of U, with the largest singular value "
            "first. The cosine of two vectors of length 1 is their product.",
            "One product of matrices gives all cosines: of each old vector (rows) with each new one (columns). For "
            "each new one, look at the old one that is most like it.",
            "`U_before.T @ U_after[:, :leading]`, without its signs; `amax(dim=0)` over the old ones; then count.",
        ),
        cases=intruder_cases,
        explain=explain_intruders,
    ),
]

PREDICTIONS = [
    Prediction(
        "sum_of_two",
        question=(
            "You add the writer's update and the reader's, both with the weight 1, to the base. What are the held-out "
            "losses of the two tasks, compared with those of the base and of the adapter alone?"
        ),
        choices={
            "a": "both are nearly those of the adapter alone, since orthogonal updates do not meet",
            "b": "one is nearly that of its adapter alone, the other is worse than that of the base",
            "c": "both lie about halfway between the base and the adapter alone",
        },
        answer="b",
        explanation=(
            "The reader's update is the larger one, and it wins: reading is nearly as good as alone, and writing worse "
            "than without any adapter. That two updates are orthogonal as vectors only means that no weight moves "
            "in two directions at once. What a layer computes, and passes on to the next, is changed by both."
        ),
        replies={
            "a": "Orthogonal weights are not separate functions: both change what every later layer sees.",
            "c": "That would need both to disturb each other equally, but one update is larger than the other.",
        },
        measured="32 steps for each adapter, rank 8",
        idea="interference",
    ),
    Prediction(
        "new_directions",
        question=(
            "LoRA of rank 8 and full fine-tuning learn the same task in 32 steps, each with the learning rate that was "
            "tuned with 500. How many of the 240 leading singular vectors are intruder dimensions?"
        ),
        choices={
            "a": "LoRA has many, full fine-tuning none or nearly none",
            "b": "full fine-tuning has more, since it changes every direction",
            "c": "both have about as many, since they have learned the same task",
        },
        answer="a",
        explanation=(
            "Full fine-tuning changes every direction a little, and no leading singular vector has to give way. A "
            "LoRA has eight directions to make the same difference to the output, so its changes are strong in these "
            "eight, stronger than some of the leading singular values of the weight."
        ),
        replies={
            "b": "It does change every direction, but each by little: the leading ones stay what they were.",
            "c": "The same loss can be reached by different weights.",
        },
        measured="32 steps on the bundled GPT-2, rank 8, seed 0",
        idea="intruders",
    ),
]
