"""Unit 21, editing representations: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_21.edits import FAULTY, SOUND
from lora_from_scratch.checks.unit_21.explanations import (
    explain_change,
    explain_positions,
    explain_rows,
    explain_search,
    explain_test,
)
from lora_from_scratch.checks.unit_21.probes import run_change, run_rows, run_search, run_test
from lora_from_scratch.methods.loreft import orthonormal_rows, prompt_positions, reft_change
from lora_from_scratch.methods.pez import hard_prompt_search
from lora_from_scratch.museum.dropped_stream import test_edit

TITLE = "Editing representations"


def orthonormal(draw: Draw, rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(draw.normal(columns, rows, dtype=torch.float64)).Q.T.float()


# --- orthonormal_rows --------------------------------------------------------------------------------


def rows_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, R: Tensor, *sentences: str) -> Case:
        return Case(name, {"R": R}, sentences=sentences)

    nearest, already, order = "nearest to R in the Frobenius norm", "orthonormal already", "The order of the rows"
    given, result = "R: (r, d)", "a new tensor with the dtype of R"
    Q = orthonormal(draw, 3, 8)
    two = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.75**0.5, 0.0]])
    yield case("the rows (3, 0, 0) and (0, -0.5, 0)", torch.tensor([[3.0, 0, 0], [0, -0.5, 0]]), nearest, given)
    yield case("rows that are orthonormal already", Q, already, nearest, result)
    yield case("rows of length 1, at 60 degrees", two, order, nearest)
    yield case("the same rows in the other order", two.flip(0), order)
    yield case("orthonormal rows after a small step", Q + 0.1 * draw.normal(3, 8), nearest, order)
    yield case("one row, with negative numbers", -draw.normal(1, 5).abs() - 0.1, nearest, given)
    strong = (orthonormal(draw, 3, 3) * torch.tensor([2.0, 1.0, 0.05])) @ orthonormal(draw, 3, 8)
    yield case("rows that are almost dependent", strong, nearest, order)
    square = orthonormal(draw, 4, 4) @ torch.diag(torch.tensor([2.0, 1.5, 1.0, 0.5])) @ orthonormal(draw, 4, 4)
    square[0] *= -torch.det(square).sign()
    yield case("a square R with a negative determinant", square, given, nearest)
    exact = torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, -4.0]])
    yield case("an R in bfloat16", exact.bfloat16(), result, "dtypes of 16 bits")
    yield case("an R in float64", Q.double() * 3, result)


# --- reft_change -------------------------------------------------------------------------------------


def change_cases(draw: Draw) -> Iterator[Case]:
    def case(
        name: str,
        *sentences: str,
        d: int = 6,
        r: int = 2,
        where: Sequence[Sequence[int]] = (),
        variant: str = "loreft",
        given: Mapping[str, Data] | None = None,
    ) -> Case:
        B, T = (len(where), len(where[0])) if where else (2, 3)
        marked = torch.tensor(where).bool()[..., None] if where else None
        R = orthonormal(draw, r, d)
        inputs: dict[str, Data] = {"h": draw.normal(B, T, d), "R": R, "W": draw.normal(r, d), "b": draw.normal(r)}
        return Case(name, inputs | {"where": marked, "variant": variant} | dict(given or {}), sentences=sentences)

    formula, zero, states, b = "LoReFT adds R^T", "that are not edited", "h: (B, T, d)", "b: (r,)."
    where, kind, alone, flow = "where: boolean", 'variant: "loreft"', "the change alone", "Gradients flow to R, W"
    matrices, everywhere, adds = "R, W: (r, d)", "None: at all positions", "What LoReFT or DiReFT adds"
    small: dict[str, Data] = {
        "h": torch.tensor([[[2.0, 5.0]]]),
        "R": torch.tensor([[1.0, 0.0]]),
        "W": torch.tensor([[0.0, 1.0]]),
        "b": torch.tensor([1.0]),
    }
    yield case("the example: r = 1, d = 2", formula, alone, adds, given=small)
    yield case("LoReFT at all positions", formula, matrices, states, b, everywhere, adds)
    yield case("DiReFT at all positions", formula, kind, everywhere, variant="direft")
    yield case("LoReFT at three of eight positions", zero, where, where=[[1, 0, 0, 1], [0, 0, 1, 0]])
    yield case(
        "DiReFT with any R, at some positions",
        kind,
        zero,
        where,
        where=[[0, 1, 1]],
        variant="direft",
        given={"R": draw.normal(2, 6)},
    )
    yield case("no position is edited", zero, where, where=[[0, 0, 0], [0, 0, 0]])
    yield case("r = d = 3", matrices, formula, flow, d=3, r=3)
    unit = torch.eye(6)[1:3]  # with which the change is zero however it is computed
    start: dict[str, Data] = {"R": unit, "W": unit.clone(), "b": torch.zeros(2)}
    yield case("W = R and b = 0: no change, and yet a gradient", flow, formula, alone, given=start)
    yield case("as many texts as tokens and entries", states, where, d=3, where=[[1, 0, 1], [0, 0, 0], [0, 1, 0]])


# --- prompt_positions --------------------------------------------------------------------------------

END = 9


def batch(texts: Sequence[Sequence[int]], length: int, left: bool, padding: int) -> dict[str, Data]:
    """Texts padded to a common length, and the place of each token in its text."""
    ids, place = [], []
    for text in texts:
        pad = [padding] * (length - len(text))
        ids.append([*pad, *text] if left else [*text, *pad])
        places, nowhere = list(range(len(text))), [-1] * len(pad)
        place.append([*nowhere, *places] if left else [*places, *nowhere])
    return {"input_ids": torch.tensor(ids), "place": torch.tensor(place)}


def positions_cases(draw: Draw) -> Iterator[Case]:
    def case(
        name: str,
        texts: Sequence[Sequence[int]],
        first: int,
        last: int,
        *sentences: str,
        length: int = 8,
        left: bool = False,
        padding: int = 0,
        begin: int = 0,
    ) -> Case:
        inputs = batch(texts, length, left, padding)
        place = inputs["place"]
        assert isinstance(place, Tensor)
        inputs["place"] = torch.where(place >= 0, place + begin, place)
        return Case(name, inputs | {"first": first, "last": last, "end_id": END}, sentences=sentences)

    def words(number: int) -> list[int]:
        return [token + 2 * (token >= END) for token in draw.integers(1, 16, number).tolist()]

    masks, ends, without, both = "of the last s tokens", "A prompt ends with", "A text without", "shorter than p + s"
    padded, place, counts, result = "Padding is in neither", "position of each token", "p and s, 0 or", "Two boolean"
    cached, end_id, negative = "the places do not begin", "the token that ends a prompt", "negative: padding"
    ids = "input_ids: (B, T)"
    full = [[*words(5), END, *words(2)], [*words(3), END, *words(4)]]
    yield case("the first 2, and the last 2", full, 2, 2, masks, ends, result, place, end_id, ids)
    yield case("the last 3, with two line breaks", [[1, 2, 3, END, 4, 5, END, 6]], 1, 3, ends, masks)
    yield case("texts of different lengths, padded on the right", [full[0], [*words(3), END, 5]], 2, 3, padded, masks)
    yield case("padded on the left", [full[1], [*words(3), END, 5]], 2, 3, padded, place, negative, masks, left=True)
    yield case("padded on the left with line breaks", [full[0], [2, 3, END]], 1, 2, padded, left=True, padding=END)
    yield case("padded on the right with line breaks", [full[0], [2, 3, 4]], 1, 2, padded, without, padding=END)
    yield case("a text without a line break", [full[0], words(8)], 2, 2, without, masks)
    yield case("a prompt of 2 tokens, p = 4 and s = 5", [[4, END, *words(6)], full[0]], 4, 5, both, masks)
    yield case("a prompt of 5 tokens, p = 3 and s = 3", [[*words(4), END, *words(3)]], 3, 3, both)
    yield case("a padded prompt of 2 tokens, s = 6", [[4, END, 3], full[0]], 1, 6, padded, left=True)
    yield case("a prompt that is a line break", [[END, *words(7)]], 1, 2, ends, both)
    yield case("no first ones", full, 0, 2, counts, masks)
    yield case("no last ones", full, 2, 0, counts, masks)
    yield case("more first ones than tokens", [words(3), full[0]], 9, 1, counts, padded)
    late = "three tokens of each text are in the cache"
    yield case(late, [[*words(2), END, 1, 2], words(5)], 4, 2, cached, place, length=5, begin=3)


# --- test_edit ---------------------------------------------------------------------------------------


def test_cases(draw: Draw) -> Iterator[Case]:
    formula, nothing, mean, zero, writes = (
        "does not compute h + R^T",
        "nothing is dropped in training mode",
        "its mean over many draws",
        "changes h in training mode although",
        "writes into the h",
    )
    sentences = {
        "dropout on h and the change together": zero,
        "dropout on h alone": zero,
        "W is applied to a dropped h, and R to the whole": zero,
        "nothing is ever dropped": nothing,
        "dropout in evaluation mode too": formula,
        "what is kept is not rescaled": mean,
        "what is kept is rescaled in evaluation mode, not in training": formula,
        "what is kept is rescaled twice": mean,
        "R h is not subtracted": formula,
        "b is left out": formula,
        "the change is written into the given h": writes,
    }
    for name in SOUND:
        yield Case(f"a sound edit: {name}", {"edit": name}, sentences=("A sound edit passes",))
    for name in FAULTY:
        yield Case(f"a faulty edit: {name}", {"edit": name}, sentences=(sentences[name], "A test of an"))


# --- hard_prompt_search ------------------------------------------------------------------------------


def circle(*degrees: float, lengths: Sequence[float] = ()) -> Tensor:
    """Vectors of the plane in these directions."""
    long = lengths or [1.0] * len(degrees)
    return torch.tensor(
        [[n * math.cos(math.radians(a)), n * math.sin(math.radians(a))] for a, n in zip(degrees, long, strict=True)]
    )


def search_cases(draw: Draw) -> Iterator[Case]:
    def case(
        name: str,
        prompt: Tensor,
        table: Tensor,
        target: Tensor,
        steps: int,
        rate: float,
        *sentences: str,
        optimizer: str = "SGD",
    ) -> Case:
        inputs: dict[str, Data] = {"prompt": prompt, "table": table, "target": target}
        inputs |= {"steps": steps, "learning_rate": rate, "optimizer": optimizer}
        return Case(name, inputs, sentences=sentences)

    each, best, equal = "Each step replaces", "The best prompt of", "of equally good ones"
    once, parameter, embeddings, steps = "A step calls it once", "P (p, d), the parameter", "(V, d)", "at least 1"
    changes, ids, goal, loss = "optimizer: changes P", "The ids (p,)", "look for a prompt", "the loss of a prompt"
    table = circle(0, 50, 100, 150)
    one = circle(5)
    yield case("one step", one, table, circle(100), 1, 0.1, each, ids, steps, once, loss)
    yield case("small steps, which add up", one, table, circle(100), 12, 0.1, each, goal, changes, parameter)
    yield case("the best prompt is not the last", one, table, circle(55), 9, 0.9, best, once)
    yield case("the last prompt is the best", one, table, circle(50), 5, 0.4, best, steps, ids)
    yield case("the first prompt is the best", circle(50), table, circle(75, lengths=[3.0]), 3, 3.0, best)
    long = circle(0, 50, 100, lengths=[1.0, 0.2, 6.0])
    yield case("embeddings of very different lengths", circle(40), long, circle(50), 4, 0.3, each, embeddings)
    mirror = circle(-40, 40)
    yield case("two prompts that are equally good", circle(-5), mirror, circle(0), 6, 0.5, equal)
    three = torch.cat([circle(10), circle(140), circle(60)])
    goals = torch.cat([circle(95), circle(20), circle(150)])
    yield case("a prompt of three tokens", three, table, goals, 8, 0.3, goal, ids, best, loss)
    words, begin = draw.normal(12, 5), draw.normal(2, 5)
    yield case("random embeddings", begin, words, draw.normal(2, 5), 6, 0.5, each, embeddings, changes)
    yield case("with AdamW", three, table, goals, 8, 0.2, changes, parameter, optimizer="AdamW")


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        orthonormal_rows,
        idea="edits of hidden states",
        difficulty=3,
        minutes=8,
        points=2,
        hints=(
            "Take a single row. Which vector of length 1 is nearest to it? What does that do to its singular value?",
            "Write R = U S V^T. Only S keeps the rows from being orthonormal. What should be in its place?",
            "`torch.linalg.svd(..., full_matrices=False)` gives U, S and V^T, but not in 16 bits: `.float()` before, "
            "`.to(R.dtype)` after.",
        ),
        cases=rows_cases,
        probe=run_rows,
        dtypes=True,
        explain=explain_rows,
    ),
    Exercise(
        reft_change,
        idea="edits of hidden states",
        difficulty=3,
        minutes=9,
        points=2,
        hints=(
            "Work from right to left: first the r numbers W h + b - R h of each token, then what R^T makes of them.",
            "The hidden states are rows here: W h of the formula is `h @ W.T` for all tokens at once. What is R^T z?",
            "Use the mask as a number, 0 or 1, which is multiplied with what each token gets: `where.to(h.dtype)`.",
        ),
        cases=change_cases,
        probe=run_change,
        explain=explain_change,
    ),
    Exercise(
        prompt_positions,
        idea="where to edit",
        difficulty=4,
        minutes=12,
        points=3,
        hints=(
            "For the first tokens the place says everything. For the last ones, find out at which place each text has "
            "its first `end_id`.",
            "Mark the tokens that are `end_id` and no padding. The smallest marked place of a row is where its prompt "
            "ends; how far before that is each token?",
            "`place.masked_fill(~marked, large).amin(dim=1, keepdim=True)` is that end, (B, 1). A token belongs to the "
            "last s if 0 <= end - place < s, and if there is an end, and if it is no padding.",
        ),
        cases=positions_cases,
        tolerance=0,
        dtypes=True,
        explain=explain_positions,
    ),
    Exercise(
        test_edit,
        idea="tests of one's own",
        difficulty=4,
        minutes=12,
        points=3,
        hints=(
            "Try the exhibit by hand in both modes. In which mode does it do what it should? Which W and b would show "
            "that h itself is touched?",
            "Three settings are enough: evaluation mode with any W and b; training mode with the same, for many "
            "identical rows; training mode with W = R and b = 0.",
            "`h.repeat(4000, 1)` gives 4,000 draws in one call; compare their mean with the result in evaluation mode, "
            "relative to the size of the change. Set b too (`normal_()` under `torch.no_grad()`): it starts at 0. Copy "
            "h before the call.",
        ),
        cases=test_cases,
        probe=run_test,
        explain=explain_test,
        background=("is made as `Edit(width", "It has R (r, d)", "It starts in training mode"),
    ),
    Exercise(
        hard_prompt_search,
        idea="prompts of real tokens",
        difficulty=4,
        minutes=12,
        points=3,
        hints=(
            "Two things exist beside each other: P, which the optimiser moves, and E, its nearest embeddings, at which "
            "the loss is computed. What connects them is that the gradient at E is used on P.",
            "In a step: tokens, E as a tensor of its own that requires a gradient, loss, compare with the best so far, "
            "gradient at E, hand it to the optimiser. `nearest_tokens` of unit 05 gives the tokens.",
            "`torch.autograd.grad(loss, E)` gives the gradient in a tuple; an optimiser reads `prompt.grad`. Remember "
            "the tokens at which the loss was computed, not those after the step.",
        ),
        cases=search_cases,
        probe=run_search,
        explain=explain_search,
    ),
]

PREDICTIONS = [
    Prediction(
        "edits_for_tales",
        question=(
            "Without training the loss of tales is about 4.3. The same methods, with the same numbers, now learn to "
            "write tales, each at its own tuned rate. What do you expect of the edits, compared with LoRA of rank 1?"
        ),
        choices={
            "a": "as for one word: f7+l7 and all positions are both at least as good as LoRA",
            "b": "f7+l7 gains far less than LoRA, and all positions come close to LoRA or are better",
            "c": "both gain far less than LoRA: eight directions are too few for writing",
        },
        answer="b",
        explanation=(
            "A tale has 20 tokens or more, and all but the first are predicted at positions that f7+l7 does not edit: "
            "what is edited reaches them by attention to the prompt only. At all positions, eight directions suffice "
            "to do what LoRA of rank 1 does."
        ),
        replies={
            "a": "The word was predicted at an edited position. Where are the tokens of a tale predicted?",
            "c": "Eight directions after every block are not few: LoRA of rank 1 adds one direction to each matrix.",
        },
        measured="30 steps on the bundled GPT-2, seed 0",
        idea="where to edit",
    ),
    Prediction(
        "readable_prompt",
        question=(
            "Each search has the same number of forward passes. Whose prompt of eight real tokens has the lowest loss, "
            "and how good is the rounded soft prompt?"
        ),
        choices={
            "a": "PEZ finds the best prompts, and the rounded ones are no better than random ones",
            "b": "PEZ finds the best prompts, and the rounded ones come next: both were found by gradients",
            "c": "mutation finds the best ones: a gradient at one token says little about the other 4,095",
            "d": "all four are about equal: eight real tokens cannot do much",
        },
        answer="a",
        explanation=(
            "The gradient at real tokens says in which direction better ones lie, and P sums it up over the steps. The "
            "soft prompt has a much lower loss than any of these, but its rows are far from all embeddings, and what "
            "they do is lost when they are rounded."
        ),
        replies={
            "b": "The gradients of the soft prompt were computed at rows that no token has.",
            "c": "It says little about each, but the steps add up. Mutation tries one of 32,000 changes at a time.",
            "d": "A prompt that mentions a dragon makes these sentences much more likely.",
        },
        measured="75 forward passes, eight tokens, seeds 0 and 1",
        idea="prompts of real tokens",
    ),
]
