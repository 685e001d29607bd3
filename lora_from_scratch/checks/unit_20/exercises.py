"""Unit 20, longer context: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_20.explanations import (
    explain_back,
    explain_groups,
    explain_mask,
    explain_table,
    explain_test,
)
from lora_from_scratch.checks.unit_20.implementations import IMPLEMENTATIONS, SOUND
from lora_from_scratch.checks.unit_20.probes import run_table, run_test
from lora_from_scratch.methods.long_lora import allowed_in_groups, from_groups, stretch_positions, to_groups
from lora_from_scratch.museum.rolled_without_mask import test_shifted_sparse_attention

TITLE = "Longer context"

# --- stretch_positions ---------------------------------------------------------------------------------


def table_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, table: torch.Tensor, factor: int, *sentences: str) -> Case:
        return Case(name, {"table": table, "factor": factor}, sentences=sentences)

    longer, ends, between = "A table of position embeddings", "The new table has the first", "a row that falls between"
    rows, times, dtype = "table: (n, d)", "factor: a whole number", "(factor n, d), in the dtype"
    yield case("two rows of one number, 0 and 3, to 4 rows", torch.tensor([[0.0], [3.0]]), 2, ends, between, longer)
    yield case("3 rows to 6", draw.normal(3, 2), 2, between, rows, dtype)
    yield case("4 rows to 12", draw.normal(4, 5), 3, times, ends, longer)
    yield case("factor 1", draw.normal(5, 3), 1, times, longer)
    yield case("in float64", draw.normal(2, 3, dtype=torch.float64), 4, dtype, rows)


# --- to_groups, from_groups ------------------------------------------------------------------------------


def group_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, shape: tuple[int, ...], group_size: int, *sentences: str) -> Case:
        return Case(name, {"x": draw.normal(*shape), "group_size": group_size}, sentences=sentences)

    cut, order, moved = (
        "Cut the tokens of each head",
        "The first H // 2 heads have",
        "In the other heads they are rolled",
    )
    zeros, like, result = "Zeros are appended first", "They are rolled like tokens", "(B, H, n, g, hd), n groups"
    counted = torch.arange(8.0).repeat(2, 1).view(1, 2, 8, 1)
    example: dict[str, Data] = {"x": counted, "group_size": 4}
    yield Case("2 heads with the tokens 0 to 7, g = 4", example, sentences=(cut, order, moved))
    yield case("2 texts, 4 heads, 6 tokens, g = 2", (2, 4, 6, 3), 2, order, moved, result, "x: (B, H, T, hd)")
    yield case("9 tokens, g = 3", (1, 2, 9, 2), 3, moved, "group_size: g", cut)
    yield case("7 tokens, g = 4", (1, 2, 7, 2), 4, zeros, like, result)
    yield case("5 tokens, g = 4", (2, 2, 5, 1), 4, zeros, like)
    yield case("3 heads, 4 tokens, g = 2", (1, 3, 4, 2), 2, order, "x: (B, H, T, hd)")
    yield case("g = 1", (1, 2, 3, 2), 1, "group_size: g", moved)
    yield case("3 tokens, g = 4", (1, 2, 3, 2), 4, zeros, result)


def back_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, shape: tuple[int, ...], tokens: int, *sentences: str) -> Case:
        return Case(name, {"x": draw.normal(*shape), "tokens": tokens}, sentences=sentences)

    inverse, cut, tokens = "The inverse of `to_groups`", "x: (B, H, n, g, hd), cut", "tokens: T"
    shape = "(B, H, T, hd)."
    grouped = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7, 0, 1]]).view(1, 2, 2, 4, 1)
    example: dict[str, Data] = {"x": grouped, "tokens": 8}
    yield Case("2 heads with the tokens 0 to 7, g = 4", example, sentences=(inverse, cut))
    yield case("2 texts, 4 heads, g = 2", (2, 4, 3, 2, 3), 6, cut, shape, inverse)
    yield case("g = 3", (1, 2, 3, 3, 2), 9, inverse, cut)
    yield case("7 tokens, g = 4", (1, 2, 2, 4, 2), 7, tokens, shape)
    yield case("5 tokens, g = 4, 3 heads", (1, 3, 2, 4, 1), 5, tokens, inverse)


# --- allowed_in_groups -----------------------------------------------------------------------------------


def mask_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, heads: int, groups: int, group_size: int, *sentences: str) -> Case:
        given = {"heads": heads, "groups": groups, "group_size": group_size}
        return Case(name, given, sentences=sentences)

    whether, later, piece = "Whether a query may attend", "A query may attend to the keys", "In the first heads // 2"
    last, two, entry = "it has the end of the text", "Those two pieces do not attend", "(H, n, g, g), boolean"
    yield case("2 heads, 2 groups of 4", 2, 2, 4, two, last, later, piece)
    yield case("2 heads, 3 groups of 2", 2, 3, 2, entry, whether, "groups: n.", "group_size: g.")
    yield case("4 heads, 2 groups of 5", 4, 2, 5, two, piece, "heads: H.")
    yield case("3 heads, 2 groups of 3", 3, 2, 3, piece, last, "heads: H.")
    yield case("2 heads, one group of 6", 2, 1, 6, last, later, "groups: n.")
    yield case("groups of one token", 2, 3, 1, later, "group_size: g.")


# --- The museum: test_shifted_sparse_attention -------------------------------------------------------------


def museum_cases(draw: Draw) -> Iterator[Case]:
    for name in IMPLEMENTATIONS:
        sound = (
            "Which earlier tokens a token attends to",
            "The output of a token may depend",
            "attention: what is tested",
        )
        faulty = "The test ends without an error", "AssertionError: an output", "H is an even number"
        yield Case(name, {"implementation": name}, sentences=sound if name in SOUND else faulty)


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        stretch_positions,
        idea="positions",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "Draw n old rows on a line, at 0, 1, ..., n - 1, and factor n new ones at equal distances from 0 to n - 1. "
            "What is the distance?",
            "New row i falls on i (n - 1) / (factor n - 1). Its whole part is the old row before it, and the rest says "
            "how much of the next one it has.",
            "`torch.lerp(left, right, weight)` mixes two tensors. Or use `F.interpolate` with mode linear: it wants "
            "(batch, d, n), and `align_corners=True` puts the ends on the ends.",
        ),
        cases=table_cases,
        probe=run_table,
        explain=explain_table,
    ),
    Exercise(
        to_groups,
        idea="attention in groups",
        difficulty=3,
        minutes=10,
        points=2,
        hints=(
            "There are three steps: append zeros, roll half of the heads, cut the axis of the tokens in two.",
            "How many zeros are missing to the next multiple of g? `torch.roll` with a negative shift moves towards "
            "the front. Mind which axis has the heads and which the tokens.",
            "`F.pad(x, (0, 0, 0, zeros))` appends to the last axis but one, and `-T % g` is the number. "
            "`x[:, half:].roll(-(g // 2), dims=2)` rolls; `torch.cat` with dim=1 puts the halves together; "
            "`unflatten(2, (-1, g))` cuts.",
        ),
        cases=group_cases,
        explain=explain_groups,
    ),
    Exercise(
        from_groups,
        idea="attention in groups",
        difficulty=2,
        minutes=7,
        points=2,
        hints=(
            "Undo the steps of `to_groups`, the last one first.",
            "First one axis of tokens again; then roll the same heads back by as much; only then leave out what was "
            "appended. Why not earlier?",
            "`x.flatten(2, 3)` makes one axis of n and g, `.roll(g // 2, dims=2)` rolls back, and `[:, :, :tokens]` "
            "leaves out the rest. g is `x.shape[3]`.",
        ),
        cases=back_cases,
        explain=explain_back,
    ),
    Exercise(
        allowed_in_groups,
        idea="attention in groups",
        difficulty=3,
        minutes=10,
        points=3,
        hints=(
            "Write down the last group of a rolled head for 8 tokens and g = 4: four tokens in their order. Which of "
            "them come later in the text than the one that looks?",
            "Begin with the same triangle for all heads and groups. Only the last group of the heads from heads // 2 "
            "on differs: it has g - g // 2 tokens of the end, and then g // 2 of the beginning.",
            "`torch.ones(g, g, dtype=torch.bool).tril().repeat(heads, groups, 1, 1)` is the start. In a block of the "
            "last group the queries of the beginning meet the keys of the end: set that block to False.",
        ),
        cases=mask_cases,
        explain=explain_mask,
        dtypes=True,
    ),
    Exercise(
        test_shifted_sparse_attention,
        idea="finding faults",
        difficulty=3,
        minutes=12,
        points=3,
        hints=(
            "What does it mean that an output does not depend on a token? Change the token, compute again, and "
            "compare the outputs of all tokens before it.",
            "Change q, k and v of the token. Do it for every token, compare every head, and try texts whose length is "
            "a multiple of the group size and others. Rounding may change the last digits.",
            "For each token t: copies of q, k and v with new numbers in `[:, :, t]`; then `torch.allclose` of "
            "`[:, :, :t]` of both results, with a small `atol`, in an `assert`.",
        ),
        cases=museum_cases,
        probe=run_test,
        explain=explain_test,
        background=("Test an implementation",),
    ),
]

PREDICTIONS = [
    Prediction(
        "stretched_untrained",
        question=(
            "The bundled model reads texts of 256 tokens, but token i gets row i of a table that was stretched by 2. "
            "All positions are other ones than in its training, and nothing is trained. How does its held-out loss on "
            "these texts change? (It is 3.7; with all tokens equally likely it would be 8.3.)"
        ),
        choices={
            "a": "it hardly rises, by less than 0.2",
            "b": "it rises by about 1",
            "c": "it rises to about 8: the positions make no sense to the model",
        },
        answer="a",
        explanation=(
            "Neighbouring rows of the table are alike, because neighbouring positions play the same part in a text. A "
            "row between two of them is alike too, so the model finds its way. What changes is only how far apart two "
            "tokens seem to be, half as far."
        ),
        replies={
            "b": "That would be a model for which each row is something of its own.",
            "c": "That is what rows of random numbers would do. These lie between rows that the model knows.",
        },
        measured="8 texts of 256 tokens, bundled GPT-2",
        idea="positions",
    ),
    Prediction(
        "does_it_show",
        question=(
            "You train the bundled model for 30 steps with the function above, and once more with the fault mended. "
            "All else is the same. What do the two training losses say?"
        ),
        choices={
            "a": "that of the faulty one is clearly lower: it sees the future",
            "b": "nothing that would make you suspicious: that of the faulty one is as high or higher",
            "c": "that of the faulty one does not fall at all",
        },
        answer="b",
        explanation=(
            "What the first tokens see is the end of the text, far away, and not the next token. It would help a model "
            "that had learned to use it. In so few steps it disturbs more than it helps: keys from the end appear "
            "where the model expects nothing. So no loss gives the fault away, and the model is spoiled all the same."
        ),
        replies={
            "a": (
                "A leak of the next token would do that. This one shows the end of the text to its beginning, and what "
                "stands there has to be of use first."
            ),
            "c": "Most tokens and half of the heads do not notice anything.",
        },
        measured="30 steps with 2 texts of 512 tokens on the bundled GPT-2, seeds 0 and 1",
        idea="attention in groups",
    ),
]
