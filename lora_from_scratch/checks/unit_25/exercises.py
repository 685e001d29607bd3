"""Unit 25, not only language: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_25.explanations import (
    explain_forgotten,
    explain_noisy,
    explain_norms,
    explain_patches,
    explain_step,
)
from lora_from_scratch.pictures.diffusion import STEPS, add_noise, denoising_step, noise_levels
from lora_from_scratch.pictures.forgetting import forgotten
from lora_from_scratch.pictures.surgical import relative_norm_of_parts
from lora_from_scratch.pictures.vit import to_patches

TITLE = "Not only language"

# --- to_patches --------------------------------------------------------------------------------------


def patch_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, pictures: Tensor, size: int | None, *sentences: str, part: str = "the result") -> Case:
        given: dict[str, Data] = {"pictures": pictures}
        return Case(name, given if size is None else given | {"size": size}, part, sentences)

    square, order, inside, shape = (
        "into square patches",
        "in the order of reading",
        "The pixels of a patch",
        "(B, N, size",
    )
    given, side, refused = "pictures: (B, H, W)", "size: the side of a patch", "is not a multiple of"
    numbered = torch.arange(16.0).reshape(1, 4, 4)
    yield case("one picture of 4 x 4 numbered pixels, patches of 2 x 2", numbered, 2, square, order, inside, shape)
    yield case("three pictures of 8 x 8 pixels, the default size", draw.normal(3, 8, 8), None, square, given, shape)
    yield case("two pictures of 8 x 8 pixels, patches of 4 x 4", draw.normal(2, 8, 8), 4, side, inside, shape)
    yield case("4 pixels high and 6 wide, patches of 2 x 2", draw.normal(2, 4, 6), 2, given, order, shape)
    yield case("9 pixels high and 3 wide, patches of 3 x 3", draw.normal(2, 9, 3), 3, given, side, inside)
    yield case("patches of one pixel", draw.normal(2, 3, 4), 1, side, order)
    yield case("one patch that is the whole picture", draw.normal(2, 3, 3), 3, side, inside)
    for name, sides, size in (
        ("5 pixels high, patches of 2 x 2", (5, 4), 2),
        ("7 pixels wide, patches of 3 x 3", (6, 7), 3),
        ("2 pixels high and wide, patches of 4 x 4", (2, 2), 4),
    ):
        yield case(name, draw.normal(2, *sides), size, refused, part="invalid input")


# --- relative_norm_of_parts --------------------------------------------------------------------------


def norm_cases(draw: Draw) -> Iterator[Case]:
    def case(
        name: str,
        weights: dict[str, Tensor],
        gradients: dict[str, Tensor],
        parts: Mapping[str, Sequence[str]],
        *sentences: str,
        part: str = "the result",
    ) -> Case:
        given: dict[str, Data] = {
            "gradients": dict(gradients),
            "weights": dict(weights),
            "parts": {name: list(names) for name, names in parts.items()},
        }
        return Case(name, given, part, sentences)

    relative, together, zeros = (
        "The norm of each part's gradient",
        "together count as one",
        "A tensor without a gradient",
    )
    g, p, rest, named, every = (
        "gradients: name -> gradient",
        "weights: name -> tensor.",
        "that belong to no part",
        "parts: part -> the names",
        "part -> its relative gradient norm",
    )
    refused = "all weights of a part are zero"
    small = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 12.0])}
    of_small = {"a": torch.tensor([6.0, 0.0]), "b": torch.tensor([8.0, 0.0])}
    yield case("one tensor, p = (3, 4) and g = (6, 0)", small, of_small, {"head": ["a"]}, relative, g, p)
    yield case("two tensors in one part", small, of_small, {"head": ["a", "b"]}, together, relative)
    shapes = {"embedding.weight": (4, 3), "embedding.bias": (4,), "block.weight": (5, 4), "head.weight": (2, 5)}
    weights = {name: draw.normal(*shape) for name, shape in shapes.items()}
    weights["embedding.bias"] = 0.05 * weights["embedding.bias"]
    gradients = {name: draw.number(0.5, 2) * draw.normal(*shape) for name, shape in shapes.items()}
    parts = {
        "embedding": ["embedding.weight", "embedding.bias"],
        "block": ["block.weight"],
        "head": ["head.weight"],
    }
    yield case("three parts, one with a small bias", weights, gradients, parts, named, every, together)
    del gradients["embedding.weight"]
    yield case("the same, one weight without a gradient", weights, gradients, parts, zeros, together)
    yield case("a part without any gradient", weights, {"head.weight": gradients["head.weight"]}, parts, zeros, every)
    fewer = {"head": parts["head"], "all but the head": ["embedding.weight", "embedding.bias", "block.weight"]}
    yield case("two parts of several tensors", weights, gradients, fewer, named, together)
    yield case("tensors that belong to no part", weights, gradients, {"block": parts["block"]}, rest, every)
    one_zero = {"head.weight": weights["head.weight"], "head.bias": torch.zeros(2)}
    bias = {"head.weight": draw.normal(2, 5), "head.bias": draw.normal(2)}
    yield case("a bias of zeros beside a weight", one_zero, bias, {"head": ["head.weight", "head.bias"]}, together)
    yield case(
        "a part whose weights are all zero", one_zero, bias, {"bias": ["head.bias"]}, refused, part="zero weights"
    )
    both = {"head": ["head.weight"], "bias": ["head.bias"]}
    yield case("the same, beside another part", one_zero, bias, both, refused, part="zero weights")


# --- forgotten ---------------------------------------------------------------------------------------


def forgotten_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, before: Tensor, after: Tensor, labels: Tensor, classes: int, *sentences: str) -> Case:
        given: dict[str, Data] = {"before": before, "after": after, "labels": labels, "classes": classes}
        return Case(name, given, sentences=sentences)

    share, known, lost, ignored = (
        "The share of what a classifier knew",
        "A picture was known if",
        "It is forgotten if",
        "A picture that was not known",
    )
    old, new, right, count = "before: the predicted", "after: the predicted", "labels: the right class", "classes: C"
    result, undefined = "(C,): for each class", "NaN for a class"
    two = torch.tensor([0, 0, 0, 0, 1, 1])
    yield case(
        "two classes: 1 of 4 and 1 of 2 are forgotten",
        *(two, torch.tensor([0, 0, 1, 0, 1, 0]), two, 2),
        *(share, lost, result, new),
    )
    yield case(
        "one class, 2 of 4 known before, one of them forgotten, two learned",
        *(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 0]), torch.zeros(4, dtype=torch.long), 1),
        *(ignored, known, share, old),
    )
    yield case(
        "wrong before and after, with another class",
        *(torch.tensor([0, 1, 2, 1]), torch.tensor([0, 2, 2, 1]), torch.tensor([0, 0, 2, 1]), 3),
        *(ignored, lost),
    )
    yield case("nothing has changed", two, two, two, 2, share, lost)
    yield case(
        "a class of which nothing was known, though it is known now",
        *(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 1]), torch.tensor([0, 1, 1]), 2),
        *(undefined, ignored),
    )
    yield case("a class without a picture", two, two.flip(0), two, 3, count, undefined, result)
    n, classes = 120, 5
    labels = torch.cat([torch.arange(classes), draw.integers(0, classes - 1, n)])
    seldom = [torch.rand(len(labels), generator=draw.generator) < share for share in (0.3, 0.4)]
    others = [(labels + draw.integers(1, classes - 1, len(labels))) % classes for _ in range(2)]
    before, after = (torch.where(s, other, labels) for s, other in zip(seldom, others, strict=True))
    before[:classes] = labels[:classes]  # something is known of every class
    yield case("125 pictures of five classes", before, after, labels, classes, known, right, old, new, share)
    yield case("the same, all predicted as class 0 now", before, 0 * after, labels, classes, lost, right)


# --- add_noise, denoising_step -----------------------------------------------------------------------


def noisy_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, t: Sequence[int], *sentences: str, shape: tuple[int, int] = (8, 8)) -> Case:
        x, noise = draw.normal(len(t), *shape), draw.normal(len(t), *shape)
        return Case(name, {"x": x, "t": torch.tensor(t), "noise": noise}, sentences=sentences)

    adds, own, zero, levels = "Add the noise of step t", "Each picture has a step", "At step 0 it stays", "The a_t are"
    x, steps, noise, result = "x: the pictures x_0", "t: their steps", "noise: e (B", "x_t (B, H, W)."
    yield case("one picture at step 50", [50], adds, levels, x, noise)
    yield case("one picture at step 0", [0], zero, steps)
    yield case("three pictures at the steps 10, 50 and 90", [10, 50, 90], own, steps, adds, result)
    yield case("eight pictures of 8 x 8 pixels at different steps", [0, 5, 20, 40, 60, 80, 95, 100], own, zero, result)
    yield case("three pictures of 3 x 5 pixels", [30, 70, draw.integer(2, 99)], x, result, own, shape=(3, 5))
    yield case("the last step", [STEPS], steps, levels)


def step_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, t: int, *sentences: str, shape: Sequence[int] = (2, 8, 8), clear: bool = True) -> Case:
        """The x_t of a picture; if it is clear, its noise is predicted well, and nothing has to be clipped."""
        a, e = noise_levels()[t], draw.normal(*shape)
        x = a.sqrt() * (1.6 * torch.rand(*shape, generator=draw.generator) - 0.8) + (1 - a).sqrt() * e
        predicted = e if clear else 0.5 * e + draw.normal(*shape)
        if t == 1:  # there x_t is nearly x_0, so that only large pixels have to be clipped
            x = x if clear else 1.5 * x
        return Case(name, {"x": x, "predicted": predicted, "t": t, "noise": draw.normal(*shape)}, sentences=sentences)

    back, picture, clipped, drawn = (
        "One step back",
        "The predicted noise e gives",
        "Its pixels are clipped",
        "Then x_{t",
    )
    mean, variance, last = "mean = (sqrt", "variance = (1 - a", "At the last step"
    x, e, step, noise = "x: x_t, of any", "predicted: e, the noise", "t: the step, from", "noise: standard normal"
    shape, levels = "x_{t - 1}, of the same", "The a_t are"
    yield case("the last step, t = 1", 1, last, picture, step, e)
    yield case("the last step, with a prediction that has to be clipped", 1, last, clipped, clear=False)
    yield case("t = 50, nothing has to be clipped", 50, back, mean, variance, drawn, noise, levels, x)
    yield case("t = 10, nothing has to be clipped", 10, mean, picture, variance, e, step)
    yield case("t = 60, with a prediction that has to be clipped", 60, clipped, mean, x, clear=False)
    yield case("t = 100, the first step", STEPS, step, clipped, variance, clear=False)
    yield case("a single picture, t = 30", 30, x, shape, shape=(8, 8))
    yield case("four numbers, t = 80", draw.integer(75, 85), x, shape, drawn, shape=(4,), clear=False)


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        to_patches,
        idea="pictures as tokens",
        difficulty=3,
        minutes=9,
        points=2,
        hints=(
            "Number the pixels of a 4 x 4 picture from 0 to 15, and write down the four patches of 2 x 2 pixels.",
            "Give every pixel four coordinates: the row of its patch, its row in the patch, the column of its patch, "
            "and its column in the patch. Then put these axes into another order.",
            "`reshape(B, H // size, size, W // size, size)`, then `permute` or `transpose`, then `reshape` again. "
            "`torch.nn.functional.unfold` does the same in one call, with the axes in another order.",
        ),
        cases=patch_cases,
        explain=explain_patches,
    ),
    Exercise(
        relative_norm_of_parts,
        idea="surgical fine-tuning",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "What is the norm of the vector that you get when you put two vectors one after the other? It is not the "
            "sum of their norms.",
            "For each part: collect its weights in one long vector and its gradients in another, and divide the norms. "
            "What stands for a gradient that is missing?",
            "`torch.cat([tensor.flatten() for ...]).norm()`, or the root of a sum of squares; "
            "`gradients.get(name, ...)` for a gradient that may be missing.",
        ),
        cases=norm_cases,
        explain=explain_norms,
    ),
    Exercise(
        forgotten,
        idea="forgetting",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "Make two masks over the pictures: which were known, and which of these are lost.",
            "Work on one class after the other: among its pictures, count both masks, and divide. Do not count by the "
            "predicted class.",
            "`mask[labels == c].sum()` for each class, and `torch.stack`. A division of tensors, 0 / 0, gives NaN by "
            "itself.",
        ),
        cases=forgotten_cases,
        explain=explain_forgotten,
    ),
    Exercise(
        add_noise,
        idea="diffusion",
        difficulty=2,
        minutes=7,
        points=2,
        hints=(
            "`noise_levels()` has T + 1 entries, a_0 to a_T. Which of them belongs to each picture?",
            "The levels have the shape (B,), the pictures (B, H, W). PyTorch aligns shapes at the last axis. Which "
            "shape must the levels have, so that each picture meets its own?",
            "Index with `t`, then add two axes: `[:, None, None]`. Both factors are roots.",
        ),
        cases=noisy_cases,
        explain=explain_noisy,
    ),
    Exercise(
        denoising_step,
        idea="diffusion",
        difficulty=4,
        minutes=12,
        points=3,
        hints=(
            "Go through the worked example above with your own variables: first x_0, then the mean, then the noise.",
            "Equation 4 solved for x_0: (x_t - sqrt(1 - a_t) e) / sqrt(a_t). Clip it, and write the mean as it stands "
            "in the statement. With which power of the variance is `noise` multiplied?",
            "`levels = noise_levels()`, `a, before = levels[t], levels[t - 1]`, `.clamp(-1, 1)`, "
            "`mean + variance.sqrt() * noise`.",
        ),
        cases=step_cases,
        explain=explain_step,
    ),
]

PREDICTIONS = [
    Prediction(
        "which_is_best",
        question=(
            "The output-level shift: every class has the number of the next. There are 100 pictures and 60 steps, and "
            "each choice has its own tuned learning rate. Which gets the highest accuracy on new pictures?"
        ),
        choices={
            "a": "tuning the whole model, since it can do everything that a part can do",
            "b": "LoRA on every linear layer, the head among them",
            "c": "tuning the head, or the last block, alone",
        },
        answer="c",
        explanation=(
            "Everything that sees the picture is right already; only the last step, from what is seen to a number, has "
            "changed. The head, or the last block, can take the large learning rate that this takes. The rate that is "
            "best for the whole model is smaller, and 60 steps are too few for it. A plausible reason: at a larger one "
            "its other parts lose what they know."
        ),
        replies={
            "a": "It can, in principle. In 60 steps it does not get there: see which learning rate it needs.",
            "b": "LoRA changes all layers too, and its head only by a product of low rank.",
        },
        measured="60 steps of 10 pictures, three seeds",
        idea="surgical fine-tuning",
    ),
    Prediction(
        "norm_as_guide",
        question=(
            "The input-level shift, grey paper: Lee et al. find the first layers to be the best for such shifts. The "
            "norms above are largest for the head. Tuned alone, each at its own rate, which part is the best here?"
        ),
        choices={
            "a": "the embedding, since only the pixels have changed",
            "b": "the last block, since it has the richest features",
            "c": "the head",
        },
        answer="c",
        explanation=(
            "The head alone reaches 83 %, as much as LoRA on everything, and the embedding 41 % with a large spread. A "
            "plausible reason: grey paper moves the features of all pictures alike, which a linear head can undo at a "
            "large learning rate; a rate at which the embedding learns in 60 steps often ruins it. The norm was right "
            "here. It is no rule: for the feature-level shift it names the embedding, and there most parts are alike."
        ),
        replies={
            "a": "That is what Lee et al. find for larger models and other pictures. Here it is not so.",
            "b": "The last block is among the worst here.",
        },
        measured="60 steps of 10 pictures, three seeds",
        idea="surgical fine-tuning",
    ),
]
