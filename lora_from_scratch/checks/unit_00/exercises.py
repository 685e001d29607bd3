"""Unit 00, start here: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data, Seen
from lora_from_scratch.finetune.counting import (
    activation_bytes,
    checkpoint_bytes,
    count_parameters,
    tensor_bytes,
    training_memory,
)

TITLE = "Start here: what fine-tuning costs"


# --- Bytes of a tensor -------------------------------------------------------------------------------


def tensor_cases(draw: Draw) -> Iterator[Case]:
    m, n, p = draw.integer(3, 9), draw.integer(10, 20), draw.integer(2, 6)
    example = ("a matrix of 3 rows and 5 columns", "Number of bytes")
    yield Case("the 3 x 5 matrix of the example, in float32", {"shape": [3, 5]}, sentences=example)
    yield Case("a matrix in float32", {"shape": [m, n]}, sentences=("Number of bytes",))
    yield Case(
        "a matrix in bfloat16", {"shape": [m, n], "bytes_per_number": 2}, sentences=("bytes_per_number: 4 in float32",)
    )
    yield Case(
        "a tensor with three axes, in int8",
        {"shape": [n, m, p], "bytes_per_number": 1},
        sentences=("shape: the length",),
    )
    yield Case("a vector", {"shape": [n]}, sentences=("shape: the length",))
    yield Case("a single number, a tensor with no axes", {"shape": []}, sentences=("A tensor without axes",))
    yield Case("a matrix without rows", {"shape": [0, n]}, sentences=("it may be 0", "shape: the length"))


# --- Parameters of a model ---------------------------------------------------------------------------


def small_model(
    rows: int,
    width: int,
    out: int,
    *,
    frozen: list[str],
    tied: bool = False,
    norm: bool = False,
    half: bool = False,
    odd: bool = False,
    meta: bool = False,
) -> nn.Module:
    """An embedding and a linear layer; on request more.

    Args:
        tied: an output layer tied to the embedding.
        norm: a batch normalisation.
        half: the embedding is in bfloat16.
        odd: parameters with three axes, with none, and two that are slices of one tensor, one of them transposed.
        meta: on the device "meta".
    """
    model = nn.Module()
    embedding = nn.Embedding(rows, width)
    model.add_module("embedding", embedding)
    model.add_module("middle", nn.Sequential(nn.Linear(width, out)))
    if norm:
        model.add_module("norm", nn.BatchNorm1d(width))
    if tied:
        head = nn.Linear(width, rows)
        head.weight = embedding.weight
        model.add_module("head", head)
    if odd:
        model.register_parameter("kernel", nn.Parameter(torch.zeros(out, 2, 3)))
        model.register_parameter("gate", nn.Parameter(torch.zeros(())))
        whole = torch.zeros(rows, out)
        model.register_parameter("part", nn.Parameter(whole[2:4].T))
        model.register_parameter("another", nn.Parameter(whole[:2]))
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if half:
        embedding.weight.data = embedding.weight.data.to(torch.bfloat16)
    return model.to("meta") if meta else model


def try_count(answer: Callable[..., Any], **spec: Any) -> Any:
    return answer(small_model(**spec))


def model_spec(draw: Draw, frozen: list[str], **more: bool) -> dict[str, Data]:
    """Sizes for which different ways of counting give different results."""
    width = draw.integer(3, 6)
    rows = width + draw.integer(5, 9)  # with 11 more, there may be as many numbers in the embedding as elsewhere
    sizes = {"rows": rows, "width": width, "out": 2 * width + 1}
    return {**sizes, "frozen": list(frozen), **more}


EMBEDDING, WEIGHT = "embedding.weight", "middle.0.weight"


def count_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, frozen: list[str], *sentences: str, **more: bool) -> Case:
        return Case(name, model_spec(draw, frozen, **more), part, sentences)

    both, trained, total = "trained and total", "trained: how many numbers", "total: how many numbers"
    yield case("an embedding and a linear layer, all trained", both, [], "Number of trained", "counts as out * in")
    yield case("the embedding frozen", both, [EMBEDDING], trained, total)
    yield case("everything frozen except a bias", both, [EMBEDDING, WEIGHT], trained, total)
    yield case("parameters with three axes and with none", both, [], "counts as out * in", odd=True)
    yield case("an output layer tied to the embedding", "shared tensors", [], "several modules share", tied=True)
    yield case("the same, the embedding frozen", "shared tensors", [EMBEDDING], "several modules share", tied=True)
    yield case("a batch normalisation, which has buffers", "buffers", [WEIGHT], "Buffers, such as", norm=True)
    meta = {"tied": True, "odd": True, "meta": True}
    yield case("a model on the device meta", "device meta", [WEIGHT], 'device "meta"', **meta)


def explain_count(case: Case, seen: Seen, expected: Seen) -> tuple[str, str] | None:
    found, right = map(whole_numbers, (seen.value, expected.value))
    if found is None or right is None or len(found) != len(right) or found == right:
        return None
    said = [
        f"{name} is right"
        if one == other
        else f"{name} is too {'large' if one > other else 'small'} by {abs(one - other):,}"
        for name, one, other in zip(("trained", "total"), found, right, strict=True)
    ]
    return "miscounted", (
        f"For this model {' and '.join(said)}. Which of its tensors did you count wrongly? Write down their shapes, "
        "and which of them are trained."
    )


def whole_numbers(value: Data) -> list[int | float] | None:
    """The numbers of a list of finite ones, whole ones as `int`; None for anything else."""
    if not isinstance(value, list):
        return None
    numbers: list[Any] = [one.item() if isinstance(one, torch.Tensor) and one.numel() == 1 else one for one in value]
    if not all(isinstance(one, int | float) and math.isfinite(one) for one in numbers):
        return None
    return [int(one) if one == int(one) else one for one in numbers]


# --- Memory of training ------------------------------------------------------------------------------


def memory_cases(draw: Draw) -> Iterator[Case]:
    parameters, trained = draw.integer(1_000, 9_000), draw.integer(10, 90)
    full: dict[str, Data] = {"parameters": parameters, "trained": parameters}
    few: dict[str, Data] = {"parameters": parameters, "trained": trained}
    kept: dict[str, Data] = {"activations": draw.integer(10_000, 20_000)}
    one, half, bad = "float32", "16 bits", "invalid input"
    means, mixed = "Only a trained one also has", "weights and gradients are in 16 bits"
    yield Case("everything trained in float32", full, one, ("every number is in float32", "The bytes of"))
    frozen = (means, "Every parameter has a weight", "Memory that training with Adam takes")
    yield Case("few parameters trained in float32", few, one, (*frozen, "parameters: how many", "trained: how many"))
    yield Case("with activations", {**few, **kept}, one, ("activations: the bytes", "The bytes of"))
    yield Case("nothing trained", {**few, "trained": 0, **kept}, one, (means, "Every parameter has a weight"))
    yield Case(
        "few parameters trained in bfloat16",
        {**few, "precision": "bfloat16"},
        half,
        ("every number is in bfloat16", "depends on the precision"),
    )
    yield Case(
        "everything trained in mixed precision",
        {**full, "precision": "mixed"},
        half,
        ("the optimiser's m and v are in float32", mixed, "counts towards"),
    )
    yield Case(
        "few parameters trained in mixed precision, with activations",
        {**few, "precision": "mixed", **kept},
        half,
        ("the optimiser's m and v are in float32", "counts towards", "precision: one of"),
    )
    refused = ("ValueError: `trained` is larger",)
    yield Case("one more trained parameter than parameters", {"parameters": 10, "trained": 11}, bad, refused)
    yield Case("an unknown precision", {**few, "precision": "int3"}, bad, (*refused, "precision: one of"))
    yield Case("a precision that is only almost right", {**few, "precision": "float"}, bad, refused)


def explain_memory(case: Case, seen: Seen, expected: Seen) -> tuple[str, str] | None:
    found, right = seen.value, expected.value
    if not isinstance(found, dict) or not isinstance(right, dict):
        return None
    if found.keys() != right.keys():
        return "other names", f"The dictionary should have the names {', '.join(right)}; yours has {', '.join(found)}."
    off = [name for name in right if not same(found[name], right[name])]
    if not off:
        return None
    if "activations" in off:
        return (
            "activations wrong",
            "activations is wrong: these bytes are given, and they go into the result as they are.",
        )
    if "weights" in off:
        return "weights wrong", (
            "weights is wrong. How many parameters have a weight, trained or not, and how many bytes does one take in "
            "this precision?"
        )
    if "gradients" in off:
        return "gradients wrong", (
            "weights is right, gradients is not. How many parameters have a gradient, and how many bytes does one take "
            "in this precision?"
        )
    return "optimizer wrong", (
        "Only optimizer is wrong. How many numbers does Adam keep for each trained parameter in this precision, and "
        "how many bytes does each of them take?"
    )


# --- Activations -------------------------------------------------------------------------------------


def activation_cases(draw: Draw) -> Iterator[Case]:
    # heads of width 8 and 1,000 tokens: (B, H, T, T) has 125 times as many entries as (B, T, d), so that the bytes for
    # each can be read off a result
    heads = draw.choice((2, 4, 8))  # powers of two, so that divisions are exact
    one: dict[str, Data] = {"batch": 1, "tokens": 1000, "width": 8 * heads, "heads": heads, "layers": 1}
    block: tuple[str, ...] = (
        "B texts of T tokens",
        "two layer normalisations",
        "the input of each",
        "attention: the input from which",
    )
    block += ("q, k and v, (B, T, d) each", "the softmax, (B, H, T, T)", "the mask of its dropout, (B, H, T, T)")
    block += ("the softmax after dropout", "the input of the output projection", "the mask of the last dropout")
    block += ("the MLP: the input", "that of the activation function", "that of its second product")
    block += ("the mask of its dropout, (B, T, d)", "Embeddings and logits")
    several = {**one, "batch": draw.integer(2, 5)}
    sizes: dict[str, Data] = {
        "batch": draw.integer(2, 5),
        "tokens": draw.integer(11, 30),
        "width": 8 * heads,
        "heads": heads,
        "layers": draw.integer(2, 6),
    }
    yield Case("one text of 1,000 tokens, one block", one, sentences=block)
    yield Case("several texts, one block", several, sentences=("B texts of T tokens", "batch: B"))
    deep = ("Every block keeps", "layers: the number of blocks", "Bytes of the activations")
    yield Case("one text in a model of several blocks", {**sizes, "batch": 1}, sentences=deep)
    yield Case("short texts, several blocks", sizes, sentences=("tokens: T", "width: d", "heads: H"))


def explain_activations(case: Case, seen: Seen, expected: Seen) -> tuple[str, str] | None:
    batch, tokens, width, heads, layers = map(int, case.inputs.values())  # type: ignore[arg-type]
    found = whole_numbers([seen.value])
    if found is None:
        return None
    if layers > 1:
        return "blocks", "One block is right; several are not. How does the result depend on the number of blocks?"
    if batch > 1:
        return "texts", "One text is right; several at once are not. How does the result depend on the number of texts?"
    stream, scores = tokens * width, heads * tokens * tokens
    squares, left = divmod(found[0], scores)
    linear, rest = divmod(left, stream)
    if rest or not 0 <= squares < 50:
        return "not a sum of the two sizes", (
            f"Your result is not made of whole numbers of bytes for each of the {stream:,} entries of (B, T, d) and "
            f"each of the {scores:,} of (B, H, T, T). Compute these two sizes first."
        )
    right = [name for name, one, other in (("first", linear, 34), ("second", squares, 5)) if one == other]
    return "bytes per entry", (
        f"In one block you count {int(linear)} bytes for each entry of (B, T, d) and {int(squares)} for each of (B, H, "
        f"T, T). {f'The {right[0]} is right.' if right else 'Neither is right.'} Add up the docstring's list again."
    )


# --- Checkpoints -------------------------------------------------------------------------------------


def try_checkpoint(answer: Callable[..., Any], only_trained: bool | None, **spec: Any) -> Any:
    model = small_model(**spec)
    return answer(model) if only_trained is None else answer(model, only_trained=only_trained)


def checkpoint_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, only: bool | None, frozen: list[str], *sentences: str, **more: bool) -> Case:
        part = "what is trained" if only else "the whole model"
        return Case(name, {**model_spec(draw, frozen, **more), "only_trained": only}, part, sentences)

    dtypes, once, only = "its own dtype", "is stored once", "only_trained: store only"
    yield case("a model in float32", False, [], "Number of bytes", "a few kilobytes")
    yield case("an embedding in bfloat16, the rest in float32", False, [WEIGHT], dtypes, "Number of bytes", half=True)
    yield case("an output layer tied to the embedding", None, [EMBEDDING], once, only, tied=True)
    yield case(
        "two parameters that are slices of one tensor, and buffers",
        False,
        [],
        "a slice of a larger",
        odd=True,
        norm=True,
    )
    yield case("a model on the device meta", False, [WEIGHT], 'the device "meta"', tied=True, odd=True, meta=True)
    yield case("only what is trained, the embedding frozen", True, [EMBEDDING], only, tied=True)
    yield case("only what is trained, two dtypes", True, [WEIGHT], only, dtypes, once, tied=True, half=True)


def explain_checkpoint(case: Case, seen: Seen, expected: Seen) -> tuple[str, str] | None:
    found, right = whole_numbers([seen.value]), whole_numbers([expected.value])
    if found is None or right is None:
        return None
    size = "large" if found[0] > right[0] else "small"
    what = "the trained parameters" if case.inputs["only_trained"] else "all parameters"
    return "miscounted", (
        f"Your result is too {size} by {abs(found[0] - right[0]):,} bytes for {what} of this model. Which of its "
        "tensors did you leave out or count too often, or is the size of one number wrong?"
    )


EXERCISES = [
    Exercise(
        tensor_bytes,
        idea="cost",
        difficulty=1,
        minutes=3,
        points=1,
        hints=(
            "A 3 x 5 matrix has 3 rows of 5 numbers. How many numbers is that, and how many bytes does each one take?",
            "What works for two axes works for any number of axes: look at `math.prod`.",
            "The product of no numbers is 1, which is right for a tensor with no axes. What is left to multiply by?",
        ),
        cases=tensor_cases,
        tolerance=0,
    ),
    Exercise(
        count_parameters,
        idea="cost",
        difficulty=2,
        minutes=8,
        points=3,
        hints=(
            "`model.parameters()` iterates over every parameter; `p.numel()` is how many numbers one of them holds.",
            "The attribute `p.requires_grad` says whether a parameter is trained.",
            "You need two sums over the same parameters: one with a condition, one without. The trained ones come "
            "first.",
        ),
        cases=count_cases,
        explain=explain_count,
        probe=try_count,
        tolerance=0,
    ),
    Exercise(
        training_memory,
        idea="cost",
        difficulty=2,
        minutes=12,
        points=3,
        hints=(
            "Write a table first: for each precision, the bytes of one weight, of one gradient, and of Adam's states "
            "for one.",
            "Frozen parameters affect only one of the four results. Which one?",
            "In mixed precision Adam holds three numbers for each trained parameter, and they are not in 16 bits.",
        ),
        cases=memory_cases,
        explain=explain_memory,
        tolerance=0,
    ),
    Exercise(
        activation_bytes,
        idea="cost",
        difficulty=3,
        minutes=15,
        points=3,
        hints=(
            "Compute two sizes first: how many numbers there are in (B, T, d), and how many in (B, H, T, T).",
            "Go through the docstring line by line: which of the two sizes, how many times, and 2 bytes or 1 (a mask)?",
            "(B, T, d) occurs 2 times in the normalisations, 5 times plus a mask in attention; (B, T, 4 d) is four of "
            "them.",
        ),
        cases=activation_cases,
        explain=explain_activations,
        tolerance=0,
    ),
    Exercise(
        checkpoint_bytes,
        idea="cost",
        difficulty=2,
        minutes=6,
        points=2,
        hints=(
            "It is `count_parameters` again, with bytes instead of numbers, and with one option.",
            "`p.element_size()` is the size in bytes of one number of a tensor, whatever its dtype.",
            "A parameter counts if it is trained, or if `only_trained` is False.",
        ),
        cases=checkpoint_cases,
        explain=explain_checkpoint,
        background=("That is enough",),
        probe=try_checkpoint,
        tolerance=0,
    ),
]

PREDICTIONS = [
    Prediction(
        name="size_of_the_change",
        question=(
            "GPT-3's checkpoint is about 350 GB. Somebody fine-tunes it with LoRA: beside two of the matrices in each "
            "of its 96 layers they train a pair of thin ones, and save only those. How large is the file, in "
            "**megabytes**? (1 GB is 1,000 MB. Any guess within a factor of 3 counts.)"
        ),
        answer=37.7,
        within=3,
        explanation=(
            "18.9 million numbers in 16 bits are 38 MB, one part in 9,300 of the model. The paper says 35 MB, and "
            '"roughly 10,000x" (Hu et al. 2021, section 4.2). A hundred such changes fit beside one copy of the model '
            "in 354 GB; a hundred fine-tuned copies of the model would take 35 TB."
        ),
        replies={
            "below": (
                "Beside a matrix of 12,288 x 12,288 stand two of rank 4: 4 · (12,288 + 12,288) numbers, for two "
                "matrices in each of 96 layers."
            ),
            "above": (
                "No matrix of the model is saved, only the pairs. A pair has 4 · (12,288 + 12,288) numbers, one "
                "for every 1,536 of the matrix that it stands beside, and most matrices have no pair."
            ),
        },
        idea="cost",
    ),
    Prediction(
        name="what_stays",
        question=(
            "You train the bundled GPT-2 twice on the same batch: once every weight, once with LoRA, which freezes the "
            "model and trains a small number of new parameters beside it. The weights stay, and nearly all of the "
            "gradients and of the optimiser's states are gone. What about the activations?"
        ),
        choices={
            "gone": "nearly all of them are gone as well: a frozen model needs no backward pass",
            "half": "about half of them are gone: those of the frozen matrices",
            "most": "most of them stay",
        },
        answer="most",
        explanation=(
            "To reach a matrix in the first block, the gradient has to flow back through every block above it, frozen "
            "or not: through its attention, its softmax, its activation function. What is kept for those is still "
            "needed."
        ),
        replies={
            "gone": (
                "A frozen matrix gets no gradient of its own, but the gradient of everything below it passes through."
            ),
            "half": "Of a frozen matrix only its input can be freed, and only if nothing trained beside it needs it.",
        },
        measured="the bundled GPT-2, 4 texts of 64 tokens",
        idea="cost",
    ),
]
