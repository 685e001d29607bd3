"""Unit 00, start here: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
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
    yield Case("the 3 x 5 matrix of the example, in float32", {"shape": [3, 5]})
    yield Case("a matrix in float32", {"shape": [m, n]})
    yield Case("a matrix in bfloat16", {"shape": [m, n], "bytes_per_number": 2})
    yield Case("a tensor with three axes, in int8", {"shape": [n, m, p], "bytes_per_number": 1})
    yield Case("a vector", {"shape": [n]})
    yield Case("a single number, a tensor with no axes", {"shape": []})


# --- Parameters of a model ---------------------------------------------------------------------------


def small_model(
    rows: int, width: int, out: int, *, frozen: list[str], tied: bool, norm: bool, half: bool = False
) -> nn.Module:
    """An embedding and a linear layer; optionally a batch normalisation and an output layer tied to the embedding."""
    model = nn.Module()
    embedding = nn.Embedding(rows, width)
    model.add_module("embedding", embedding)
    model.add_module("middle", nn.Linear(width, out))
    if norm:
        model.add_module("norm", nn.BatchNorm1d(width))
    if tied:
        head = nn.Linear(width, rows)
        head.weight = embedding.weight
        model.add_module("head", head)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if half:
        embedding.weight.data = embedding.weight.data.to(torch.bfloat16)
    return model


def try_count(answer: Callable[..., Any], **spec: Any) -> Any:
    return answer(small_model(**spec))


def model_spec(draw: Draw, frozen: list[str], tied: bool = False, norm: bool = False, **more: bool) -> dict[str, Data]:
    """Sizes for which different ways of counting give different results."""
    width = draw.integer(3, 6)
    sizes = {"rows": width + draw.integer(5, 12), "width": width, "out": 2 * width + 1}
    return {**sizes, "frozen": list(frozen), "tied": tied, "norm": norm, **more}


def count_cases(draw: Draw) -> Iterator[Case]:
    embedding, weight = "embedding.weight", "middle.weight"
    yield Case("an embedding and a linear layer, all trained", model_spec(draw, []), "trained and total")
    yield Case("the embedding frozen", model_spec(draw, [embedding]), "trained and total")
    yield Case("everything frozen except a bias", model_spec(draw, [embedding, weight]), "trained and total")
    yield Case("an output layer tied to the embedding", model_spec(draw, [], tied=True), "shared tensors")
    yield Case("the same, the embedding frozen", model_spec(draw, [embedding], tied=True), "shared tensors")
    yield Case("a batch normalisation, which has buffers", model_spec(draw, [weight], norm=True), "buffers")


# --- Memory of training ------------------------------------------------------------------------------


def memory_cases(draw: Draw) -> Iterator[Case]:
    parameters = draw.integer(1_000, 9_000)
    trained = draw.integer(10, 90)
    activations = draw.integer(10_000, 20_000)
    full: dict[str, Data] = {"parameters": parameters, "trained": parameters}
    few: dict[str, Data] = {"parameters": parameters, "trained": trained}
    yield Case("everything trained in float32", full, "float32")
    yield Case("few parameters trained in float32, with activations", {**few, "activations": activations}, "float32")
    yield Case("few parameters trained in bfloat16", {**few, "precision": "bfloat16"}, "16 bits")
    yield Case("everything trained in mixed precision", {**full, "precision": "mixed"}, "16 bits")
    mixed = {**few, "precision": "mixed", "activations": activations}
    yield Case("few parameters trained in mixed precision, with activations", mixed, "16 bits")
    yield Case("more trained parameters than parameters", {"parameters": 10, "trained": 11}, "what is refused")
    yield Case("an unknown precision", {**few, "precision": "int3"}, "what is refused")


# --- Activations -------------------------------------------------------------------------------------


def activation_cases(draw: Draw) -> Iterator[Case]:
    one: dict[str, Data] = {"batch": 1, "tokens": 1, "width": 1, "heads": 1, "layers": 1}
    heads = draw.integer(2, 5)
    sizes: dict[str, Data] = {
        "batch": draw.integer(2, 5),
        "tokens": draw.integer(11, 30),
        "width": 8 * heads,
        "heads": heads,
        "layers": draw.integer(2, 6),
    }
    yield Case("one text of one token, one head of width 1, one block", one)
    yield Case("one text in a model of several blocks", {**sizes, "batch": 1})
    yield Case("several texts, one block", {**sizes, "layers": 1})
    yield Case("several texts, several blocks", sizes)


# --- Checkpoints -------------------------------------------------------------------------------------


def try_checkpoint(answer: Callable[..., Any], only_trained: bool, **spec: Any) -> Any:
    return answer(small_model(**spec), only_trained)


def checkpoint_cases(draw: Draw) -> Iterator[Case]:
    embedding, weight = "embedding.weight", "middle.weight"
    spec = model_spec(draw, [])
    yield Case("a model in float32", {**spec, "only_trained": False}, "the whole model")
    spec = model_spec(draw, [weight], half=True)
    yield Case("an embedding in bfloat16, the rest in float32", {**spec, "only_trained": False}, "the whole model")
    spec = model_spec(draw, [embedding], tied=True)
    yield Case("an output layer tied to the embedding", {**spec, "only_trained": False}, "the whole model")
    spec = model_spec(draw, [embedding], tied=True)
    yield Case("only what is trained, the embedding frozen", {**spec, "only_trained": True}, "what is trained")
    spec = model_spec(draw, [weight], tied=True, half=True)
    yield Case("only what is trained, two dtypes", {**spec, "only_trained": True}, "what is trained")


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
