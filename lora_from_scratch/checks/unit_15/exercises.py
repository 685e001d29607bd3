"""Unit 15, magnitude and direction: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_09.probes import CONV1D, LINEAR
from lora_from_scratch.checks.unit_15.explanations import (
    explain_dora,
    explain_groups,
    explain_merging,
    explain_norms,
    explain_svd,
    explain_test,
)
from lora_from_scratch.checks.unit_15.probes import (
    run_dora,
    run_groups,
    run_merging,
    run_norms,
    run_svd,
    run_test,
)
from lora_from_scratch.checks.unit_15.versions import FAULTY, SOUND
from lora_from_scratch.methods.dora import DoRALinear, row_norms
from lora_from_scratch.methods.lora_plus import lora_plus_groups
from lora_from_scratch.methods.pissa import initial_svd
from lora_from_scratch.museum.unmerge_by_subtraction import MergingLinear, test_merging_linear

TITLE = "Magnitude and direction"

# --- row_norms ---------------------------------------------------------------------------------------


def norm_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, sizes: tuple[int, int, int], scaling: float, *sentences: str, **more: Any) -> Case:
        out, inputs, rank = sizes
        given: dict[str, Data] = {"W": draw.normal(out, inputs), "A": draw.normal(rank, inputs)}
        given |= {"B": draw.normal(out, rank), "scaling": scaling, **more}
        return Case(name, given, sentences=sentences)

    norm, memory, no_gradient = "The norm of each row of V", "V itself is not formed", "No gradient flows"
    negative, kind, s = "If rounding makes a square negative", "(out,), computed and returned in float32", "scaling: s."
    W, A, B = "W: (out, in)", "A: (r, in)", "B: (out, r)"
    start = case("the start, B = 0: W has the rows (3, 4) and (6, 8)", (2, 2, 1), 2.0, norm, W)
    zero: dict[str, Data] = {"W": torch.tensor([[3.0, 4.0], [6.0, 8.0]]), "B": torch.zeros(2, 1)}
    yield Case(start.name, {**start.inputs, **zero}, sentences=start.sentences)
    yield case("4 outputs, 6 inputs, r = 2, s = 1", (4, 6, 2), 1.0, norm, no_gradient, A, B)
    yield case("5 outputs, 3 inputs, r = 1, s = 0.5", (5, 3, 1), 0.5, s, norm, W, A, B)
    yield case("3 outputs, 7 inputs, r = 3, s = 4", (3, 7, 3), 4.0, s, norm, no_gradient)
    small = case("weights of about 0.001", (4, 5, 2), 2.0, norm)
    tiny: dict[str, Data] = {"W": draw.normal(4, 5) / 1000, "B": draw.normal(4, 2) / 1000}
    yield Case(small.name, {**small.inputs, **tiny}, sentences=small.sentences)
    yield case("12 outputs, 30 inputs, r = 2: which tensors are created?", (12, 30, 2), 2.0, memory, norm, size=True)
    A_, B_ = draw.normal(2, 8), draw.normal(200, 2)
    W_ = -2.0 * (B_ @ A_)  # V is zero but for rounding
    W_[0] = 100.0
    gone: dict[str, Data] = {"W": W_, "A": A_, "B": B_, "scaling": 2.0}
    yield Case("200 rows; in all but the first s B A takes W away", gone, sentences=(negative,))
    half = case("everything in bfloat16", (6, 9, 2), 2.0, kind)
    names = ("W", "A", "B")
    yield Case(half.name, _to(half.inputs, torch.bfloat16, *names), sentences=half.sentences)
    mixed = case("W in bfloat16, A and B in float32", (6, 9, 2), 2.0, kind)
    yield Case(mixed.name, _to(mixed.inputs, torch.bfloat16, "W"), sentences=mixed.sentences)
    double = case("everything in float64", (4, 5, 2), 2.0, kind)
    yield Case(double.name, _to(double.inputs, torch.float64, *names), sentences=double.sentences)


def _to(inputs: Any, dtype: torch.dtype, *names: str) -> dict[str, Data]:
    return {name: value.to(dtype) if name in names else value for name, value in inputs.items()}


# --- DoRALinear --------------------------------------------------------------------------------------


def dora_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, sizes: tuple[int, int, int], *sentences: str, **more: Any) -> Case:
        inputs, outputs, rank = sizes
        weight = draw.normal(outputs, inputs)
        given: dict[str, Data] = {"kind": LINEAR, "weight": weight, "bias": draw.normal(outputs), "what": part}
        given |= {"A": draw.normal(rank, inputs), "B": draw.normal(outputs, rank), "alpha": draw.choice((6.0, 10.0))}
        given |= {"magnitude": 0.5 + draw.normal(outputs).abs(), "x": draw.normal(2, 3, inputs)}
        return Case(name, given | more, part, sentences)

    forward, merge = "forward", "merge"
    conv: dict[str, Any] = {"kind": CONV1D}
    learns, combine, bias = "A LoRA layer that learns", "`combine(y, h, B)` is what", "The bias is not rescaled"
    constant, change, zero = "||V|| is a constant", "`change(W)` is what", "A row of zeros has no direction"
    start: dict[str, Any] = {"B": torch.zeros(4, 2), "magnitude": None}
    yield case("the start: B = 0, and m as it is made", forward, (5, 4, 2), learns, combine, **start)
    yield case("with rslora, r = 3", forward, (5, 4, 3), combine, learns, rslora=True)
    yield case("a Linear without a bias", forward, (5, 4, 2), combine, learns, bias, bias=None)
    yield case("a Linear with a bias", forward, (4, 3, 2), bias, combine, constant)
    yield case("a Conv1D, one token", forward, (3, 6, 3), combine, constant, bias, x=draw.normal(3), **conv)
    row = {"weight": draw.normal(4, 5), "B": draw.normal(4, 2), "magnitude": 0.5 + draw.normal(4).abs()}
    for values in row.values():
        values[1] = 0
    yield case("W and B with a row of zeros", forward, (5, 4, 2), zero, combine, what="zeros", **row)
    yield case("a Linear with a bias, merged", merge, (4, 3, 2), change, learns)
    yield case("a square Conv1D, merged", merge, (4, 4, 2), change, learns, **conv)
    yield case("a row of zeros, merged", merge, (5, 4, 2), zero, change, **row)
    yield case("a Linear in bfloat16, merged", merge, (8, 6, 2), change, dtype="bfloat16")


# --- lora_plus_groups, initial_svd -------------------------------------------------------------------


def group_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, shapes: dict[str, list[int]], ratio: float, *sentences: str) -> Case:
        return Case(
            name, {"shapes": {key: list(shape) for key, shape in shapes.items()}, "ratio": ratio}, sentences=sentences
        )

    two, last, one_group = "The optimiser's two groups", "A parameter is a B if", "Every parameter is in exactly one"
    others, given, times = "a magnitude or a bias", "parameters: what is trained", "ratio: the learning rate of B"
    first, second = "Two dictionaries: for A and the others", "for the B {"
    layer = {"h.0.fc.lora_A": [2, 5], "h.0.fc.lora_B": [3, 2]}
    more = {"h.1.fc.lora_A": [2, 5], "h.1.fc.lora_B": [3, 2]}
    yield case("one layer, ratio 16", layer, 16.0, two, first, second, given)
    yield case("two layers, ratio 4", layer | more, 4.0, times, second, one_group, two)
    yield case("a layer by itself", {"lora_B": [3, 2], "lora_A": [2, 3]}, 16.0, last, given)
    fields = {"h.0.fc.lora_A": [2, 5], "h.0.fc.lora_magnitude": [3], "h.0.fc.lora_B": [3, 2], "h.0.fc.bias": [3]}
    yield case("with DoRA's magnitude, and a bias that is trained", fields, 16.0, others, first, one_group)
    square = {"h.0.fc.lora_A": [4, 4], "h.0.fc.lora_B": [4, 4], "head.weight": [9, 2]}
    yield case("a square A and B, and a matrix that is trained whole", square, 8.0, last, others)
    names = {"lora_B_net.fc.lora_A": [2, 5], "lora_B_net.fc.lora_B": [3, 2], "h.no_lora_B": [3, 2], "h.lora_Bias": [3]}
    yield case("other names that contain lora_B", names, 16.0, last, one_group)
    yield case("a B that is a vector, and an A that is a number", {"a.lora_B": [7], "a.lora_A": []}, 2.0, last)
    ratio = draw.integer(3, 30) / 2
    yield case("nothing but A", {"a.lora_A": [2, 5], "b.lora_A": [2, 5]}, ratio, first, second, times)
    order = {"z.lora_B": [3, 2], "z.lora_A": [2, 5], "c.bias": [1], "a.lora_B": [3, 2], "a.lora_A": [2, 5]}
    yield case("five parameters whose names are not in the alphabet's order", order, ratio, one_group)


def svd_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, sizes: tuple[int, int, int], scaling: float, *sentences: str) -> Case:
        out, inputs, rank = sizes
        given: dict[str, Data] = {"W": draw.normal(out, inputs), "rank": rank, "scaling": scaling}
        return Case(name, given, sentences=sentences)

    best, shared, shapes = "A and B before the first step", "the r largest singular values", "A (r, in) and B (out, r)"
    svd, computed, order = "With the singular value decomposition", "It is computed in float32", "Row k of A"
    W, rank, s = "W: (out, in)", "rank: r, from 1", "scaling: s, by which"
    diagonal = torch.diag(torch.tensor([4.0, 1.0, 9.0]))
    given: dict[str, Data] = {"W": diagonal, "rank": 2, "scaling": 1.0}
    yield Case("a diagonal matrix with 4, 1 and 9, r = 2, s = 1", given, sentences=(best, svd, shared, order))
    yield case("W is 6 x 4, r = 2, s = 1", (6, 4, 2), 1.0, best, shapes, shared, W)
    yield case("W is 4 x 7, r = 3, s = 4", (4, 7, 3), 4.0, s, shared, svd, shapes)
    yield case("W is 5 x 5, r = 1, s = 0.25", (5, 5, 1), 0.25, s, rank, order)
    yield case("W is 3 x 8, r = 3, the smaller side", (3, 8, 3), 2.0, rank, best)
    for kind in (torch.bfloat16, torch.float64):
        one = case(f"W is 6 x 5 in {str(kind).removeprefix('torch.')}, r = 2, s = 2", (6, 5, 2), 2.0, computed, shapes)
        yield Case(one.name, _to(one.inputs, kind, "W"), sentences=one.sentences)


# --- MergingLinear, test_merging_linear --------------------------------------------------------------


def merging_cases(draw: Draw) -> Iterator[Case]:
    def case(calls: Sequence[str], *sentences: str, name: str = "", **more: Any) -> Case:
        given: dict[str, Data] = {"weight": draw.normal(6, 9), "A": draw.normal(2, 9), "B": draw.normal(6, 2)}
        given |= {"scaling": 1.5, "x": draw.normal(3, 9), "calls": list(calls)}
        changed = [{"A": "A and B change", "double": "to float64"}.get(call, call) for call in calls]
        return Case(name or ", ".join(changed), given | more, sentences=sentences)

    merged, back = "`train(False)`, and so `eval()`", "`train()`: the weight is W again"
    again, itself, same = "A call that does not change the mode", "`train` returns the layer itself", "`weight` stays"
    data, keeps, forward = "only its `.data` changes", "`W` is the frozen weight while", "`forward(x)` is W x + b"
    product, layer = "in evaluation mode that is one product", "A frozen linear layer with a LoRA"
    yield case(["eval"], merged, layer, product, itself, forward)
    yield case(["train"], again, itself, forward, keeps)
    yield case(["eval", "train"], back, itself, keeps, forward, same, data)
    yield case(["train(False)", "train(True)"], merged, back, itself)
    yield case(["eval", "eval", "train"], again, merged, back)
    yield case(["eval", "train", "train"], again, back)
    yield case(["eval", "A", "train", "eval", "train"], back, merged, layer)
    yield case(["eval", "train"] * 5, back, same)
    exact: dict[str, Any] = {"weight": draw.integers(-40, 40, 6, 9) / 8, "A": draw.integers(1, 3, 2, 9).float()}
    exact |= {"B": draw.integers(1, 3, 6, 2).float() / 2, "scaling": 1.0}
    yield case(["eval", "train"], merged, back, name="in bfloat16: eval, train", dtype="bfloat16", **exact)
    yield case(["eval", "double", "train"], keeps, back)


def test_cases(draw: Draw) -> Iterator[Case]:
    sound, merged, back = "A sound layer passes", "its weight is not W + s B A in", "its weight is not W, bit for bit"
    twice, itself, made = "if a second `eval()`", "if `eval()` or `train()` does not", "MergingLinear: a class with"
    attributes, start, test = "Its layers have `weight`", "They start in training mode", "A test of a `MergingLinear`"
    of: dict[str, tuple[str, ...]] = dict.fromkeys(SOUND, (sound, attributes, made, start, test))
    of |= dict.fromkeys(FAULTY, (back, test))
    for name in FAULTY:
        if "returns" in name or "return None" in name:
            of[name] = (itself,)
        elif "second" in name or "every call" in name:
            of[name] = (twice,)
        elif "of that moment" in name:
            of[name] = ("also if A and B have changed", back)
        elif "without s" in name or "changes nothing" in name:
            of[name] = (merged,)
    for name, sentences in of.items():
        yield Case(name, {"version": name}, sentences=sentences)


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        row_norms,
        idea="magnitude and direction",
        difficulty=3,
        minutes=10,
        points=3,
        hints=(
            "Write one row of V as w + s b A, where w is a row of W and b one of B. What is the square of its length, "
            "multiplied out?",
            "There are three terms: w w^T; twice s times w A^T b^T; and s^2 times b A A^T b^T. In the second and the "
            "third the first product has only r columns: choose the order in which you multiply.",
            "`(W @ A.T) * B` has the products of the second term for all rows at once, and `.sum(dim=1)` adds them. "
            "`torch.linalg.vector_norm(W, dim=1)` has the norms of W's rows without a copy of W. `.detach()`, "
            "`.float()` and `.clamp_min(0)` do the rest.",
        ),
        cases=norm_cases,
        probe=run_norms,
        explain=explain_norms,
    ),
    Exercise(
        DoRALinear,
        idea="magnitude and direction",
        difficulty=4,
        minutes=12,
        points=4,
        blank=("combine", "change"),
        hints=(
            "Begin with LoRA: what is y + s h B^T? Then find what the factor m / ||V|| has to multiply, and what not.",
            "y + s h B^T is V x + b. Take b off, multiply by m / ||V||, and add b again. For `change`, bring V to the "
            "lengths m, and say what has to be added to W to get there.",
            "`self.norms()` is ||V|| without a gradient; `.clamp_min(...)` with a tiny positive number prevents 0 / 0. "
            "`getattr(self.base, 'bias', None)` is b, if there is one. `super().change(W)` is s B A in float32, and "
            "`[:, None]` multiplies the rows of a matrix.",
        ),
        cases=dora_cases,
        probe=run_dora,
        explain=explain_dora,
        background=("m is `lora_magnitude`", "it starts as the norms", "`norms()` is ||V||"),
    ),
    Exercise(
        MergingLinear,
        idea="merging without a loss",
        difficulty=2,
        minutes=7,
        points=2,
        blank=("train",),
        hints=(
            "What has every bit of W? And what does `nn.Module.train` return?",
            "Keep W before you change the weight, and put that back. There are two cases in which something has to be "
            "done; in the other two the layer is in that mode already.",
            "`super().train(mode)` sets the mode. `self.W` is None unless the layer is merged, so it tells you which "
            "case it is; `self.weight.data = ...` replaces the values of the parameter.",
        ),
        cases=merging_cases,
        probe=run_merging,
        explain=explain_merging,
        background=("in_features, out_features: the sizes", "rank: r, of A", "scaling: s."),
    ),
    Exercise(
        test_merging_linear,
        idea="merging without a loss",
        difficulty=3,
        minutes=10,
        points=3,
        hints=(
            "Make a layer, and give it an A and a B with which merging changes something. Keep a copy of W. Then go "
            "through the list: which call, and what must hold after it?",
            "W has to be equal in every bit; W + s B A only up to rounding, since a sound layer may add in another "
            "order. Change A or B between `eval()` and `train()`.",
            "`layer.weight.detach().clone()` is a copy; `torch.equal` compares every bit and `torch.allclose` up to "
            "rounding; `assert condition, message` raises the error. Do each of `eval()` and `train()` twice.",
        ),
        cases=test_cases,
        probe=run_test,
        explain=explain_test,
    ),
    Exercise(
        lora_plus_groups,
        idea="learning rates within LoRA",
        difficulty=1,
        minutes=5,
        points=1,
        hints=(
            "Go through the parameters by name, and decide for each in which of two lists it goes.",
            "A full name ends in the parameter's own name, after the last dot. Shapes say nothing here.",
            "`name.rpartition('.')[2]` is the last part of a name. Build two lists with comprehensions, and put each "
            "into a dictionary.",
        ),
        cases=group_cases,
        probe=run_groups,
        explain=explain_groups,
        background=("The training loop",),
    ),
    Exercise(
        initial_svd,
        idea="where training starts",
        difficulty=2,
        minutes=7,
        points=2,
        hints=(
            "`torch.linalg.svd(W, full_matrices=False)` gives U, S and the transpose of V. What is kept of each?",
            "Half of each singular value goes to A and half to B: half of a factor is its square root. Divide by s "
            "first.",
            "`(S[:rank] / scaling).sqrt()` has r numbers: they multiply the rows of `Vh[:rank]` (`[:, None]`) and the "
            "columns of `U[:, :rank]`.",
        ),
        cases=svd_cases,
        probe=run_svd,
        explain=explain_svd,
    ),
]

PREDICTIONS = [
    Prediction(
        "turning_and_stretching",
        question=(
            "For each method you compute the correlation between turning and stretching, once over the query matrices "
            "and once over the MLP's `c_fc` (all blocks, four moments each). What do you expect?"
        ),
        choices={
            "a": "as in the paper in both: DoRA negative, LoRA strongly positive",
            "b": "on the queries DoRA is clearly negative and LoRA near zero; on `c_fc` all methods are positive",
            "c": "on the queries all methods are positive; on `c_fc` DoRA is negative",
            "d": "all methods are alike: positive on both",
        },
        answer="b",
        explanation=(
            "On the queries, which Liu et al. measured as well, DoRA's runs have the negative correlation "
            "of the paper; LoRA's is weaker than theirs. On `c_fc` every method has a strongly positive one: all rows "
            "move little in some blocks and much in others, and those that turn more also stretch more. Which "
            "sign one sees depends on the kind of matrix as much as on the method, and on something that the next "
            "figure shows."
        ),
        replies={
            "a": "The paper's plot is of q and v. The MLP's matrices behave in another way.",
            "c": "It is the other way round: the paper's sign for DoRA appears on the queries.",
            "d": "On `c_fc` they are alike. On the queries DoRA differs from LoRA with both seeds.",
        },
        measured="24 steps on the bundled GPT-2, each method at its tuned rate, seeds 0 and 1",
        idea="magnitude and direction",
    ),
    Prediction(
        "merged_and_unmerged",
        question=(
            "The model is in bfloat16 and is evaluated many times while B grows to what was learned. Each evaluation "
            "adds s B A to W and then subtracts it. After 50 evaluations, how many entries of the frozen weights "
            "differ from those that were loaded?"
        ),
        choices={
            "a": "none: the same numbers are added and subtracted",
            "b": "about half; a single evaluation with the final B changes a fifth already, ten more than a third",
            "c": "nearly all; a single evaluation changes very few, but the errors add up",
        },
        answer="b",
        explanation=(
            "The sum is rounded to the precision of the larger number: where W is small beside W + s B A, its last "
            "bits are lost at once. With the same B A a second evaluation would change almost nothing, because what "
            "is left of W fits into the sum. With another B A, other entries lose theirs. So the share grows with the "
            "number of evaluations, but more and more slowly."
        ),
        replies={
            "a": "The difference would be exact if the sum were. It is rounded to 8 significant bits first.",
            "c": (
                "The errors do not add up: bits that the sum cannot hold are gone after one evaluation, and the next "
                "can only take bits that are still there."
            ),
        },
        measured="the LoRA of 24 steps on the bundled GPT-2, seed 0, its B scaled up in equal steps",
        idea="merging without a loss",
    ),
]
