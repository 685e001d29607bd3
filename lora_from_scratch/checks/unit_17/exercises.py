"""Unit 17, higher rank at the same price: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_17.explanations import (
    explain_compressed,
    explain_decompressed,
    explain_layer,
    explain_scaled,
    explain_terms,
    explain_test,
)
from lora_from_scratch.checks.unit_17.probes import run_relora_layer, run_terms, run_test, run_with_gradients
from lora_from_scratch.checks.unit_17.relora_layers import FAULTY, SOUND
from lora_from_scratch.methods.glora import scale_and_shift
from lora_from_scratch.methods.mora import compress, decompress
from lora_from_scratch.methods.multilora import scaled_B
from lora_from_scratch.museum.zero_start import ReLoRALayer, test_relora_layer

TITLE = "Higher rank at the same price"

# --- ReLoRALayer, test_relora_layer ------------------------------------------------------------------


def layer_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, what: str, out: int, inputs: int, rank: int, scaling: float, *sentences: str) -> Case:
        given: dict[str, Data] = {"what": what, "W": draw.normal(out, inputs), "rank": rank, "scaling": scaling}
        given |= {"x": draw.normal(3, inputs)}
        if what == "restart":
            given |= {"A": draw.normal(rank, inputs), "B": draw.normal(out, rank)}
        return Case(name, given, sentences=sentences)

    start, moves, anew = "A new layer computes W x", "Its first gradient is not zero", "The random numbers of the start"
    given, copy, r, s = "the pretrained weight", "a copy of its own", "rank: r", "scaling: s"
    parts = "W: a buffer", "A: a parameter", "B: a parameter"
    yield case("a new layer, 5 inputs, 4 outputs, r = 2", "start", 4, 5, 2, 0.5, start, moves, anew, given, *parts)
    yield case("a new layer, 3 inputs, 6 outputs, r = 1", "start", 6, 3, 1, 2.0, moves, copy, start, r, anew, *parts)
    merged, same, others = "End a cycle (algorithm 1)", "So what the layer computes", "The random numbers of the new"
    kept, graph = "are changed in place", "No gradient is recorded"
    yield case("two restarts with s = 1", "restart", 4, 5, 2, 1.0, merged, same, others, kept, graph)
    yield case("two restarts with s = 0.5", "restart", 3, 4, 3, 0.5, s, merged, same, others)
    yield case("two restarts with s = 4, r = 1", "restart", 5, 3, 1, 4.0, s, merged, same, r, kept)


def test_cases(draw: Draw) -> Iterator[Case]:
    passes, one = "A sound layer passes", "It also passes if only one of the two is trained"
    uses = "you may use nothing else of it"
    sentences = {
        "A and B are both zero at the start": "no gradient reaches A or B at the start",
        "A and B are both random at the start": "if it does not compute W x at the start",
        "at the start the gradient goes to W, and none to A and B": "no gradient reaches A or B at the start",
        "A and B are both zero after a restart": "no gradient reaches A or B after a restart",
        "a restart begins anew without merging": "if a restart changes what it computes",
        "a restart merges B A without the scaling": "if a restart changes what it computes",
        "a restart merges and keeps B": "if a restart changes what it computes",
        "a restart keeps A, and only B is new": "if A or B is the same after a restart as before",
        "a restart keeps B, and only A is new": "if A or B is the same after a restart as before",
    }
    manner = "A test of a `ReLoRALayer`"
    for name in SOUND:
        yield Case(f"a sound layer: {name}", {"layer": name}, sentences=(one if "only" in name else passes, uses))
    for name in FAULTY:
        yield Case(f"a faulty layer: {name}", {"layer": name}, sentences=(sentences[name], manner))


# --- compress, decompress ----------------------------------------------------------------------------


def compress_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, shape: tuple[int, ...], q: int, *sentences: str) -> Case:
        return Case(name, {"x": draw.normal(*shape), "q": q}, sentences=sentences)

    places, fill, axes = "Entry i of the result", "x is first filled up", "x: (..., in)"
    larger, flows, shape, side = "It may be larger than in", "Gradients flow to x", "(..., q).", "q: the side of M"
    numbers: dict[str, Data] = {"x": torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0]), "q": 3}
    yield Case("x = 1, 2, 3, 10, 20, 30 and q = 3", numbers, sentences=(places, side))
    yield case("8 inputs, q = 4, a batch of 2 x 3", (2, 3, 8), 4, axes, places, shape, flows)
    yield case("9 inputs, q = 3, three rows", (3, 9), 3, axes, places, flows)
    yield case("7 inputs, q = 3", (2, 7), 3, fill, places)
    yield case("11 inputs, q = 4, without a batch", (11,), 4, fill, axes, flows)
    yield case("5 inputs, q = 5", (2, 5), 5, places, shape)
    yield case("6 inputs, q = 1", (2, 6), 1, places, side)
    yield case("5 inputs, q = 8", (2, 5), 8, larger, fill)
    yield case("3 inputs, q = 8", (2, 3), 8, larger, fill)


def decompress_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, shape: tuple[int, ...], outputs: int, *sentences: str) -> Case:
        return Case(name, {"z": draw.normal(*shape), "outputs": outputs}, sentences=sentences)

    repeated, cut, axes = "The q numbers are repeated", "What is too much", "z: (..., q)"
    smaller, flows, shape, out = "It may be smaller than q", "Gradients flow to z", "(..., out).", "outputs: out"
    numbers: dict[str, Data] = {"z": torch.tensor([1.0, 2.0, 3.0]), "outputs": 6}
    yield Case("z = 1, 2, 3 and 6 outputs", numbers, sentences=(repeated, out))
    yield case("q = 4, 8 outputs, a batch of 2 x 3", (2, 3, 4), 8, axes, repeated, shape, flows)
    yield case("q = 3, 9 outputs, three rows", (3, 3), 9, axes, repeated, out)
    yield case("q = 3, 7 outputs", (2, 3), 7, cut, repeated)
    yield case("q = 4, 11 outputs, without a batch", (4,), 11, cut, axes, flows)
    yield case("q = 2, 7 outputs, nine rows", (9, 2), 7, repeated, cut)
    yield case("q = 5, 5 outputs", (2, 5), 5, repeated, shape)
    yield case("q = 8, 5 outputs", (2, 8), 5, smaller, cut)


# --- scaled_B ----------------------------------------------------------------------------------------


def scaled_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, out: int, n: int, rank: int, *sentences: str) -> Case:
        return Case(name, {"B": draw.normal(out, n * rank), "scales": draw.normal(n, out)}, sentences=sentences)

    one, sum_, flows = "The B of the one LoRA", "B' A' is the sum", "Gradients flow to B"
    side, rows, row, shape = "B: (out, n r)", "scales: (n, out)", "Row i is c_i", "(out, n r)."
    numbers: dict[str, Data] = {"B": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "scales": torch.tensor([[10.0], [100.0]])}
    yield Case("two LoRAs of rank 2, one output", numbers, sentences=(one, side, row))
    yield case("three LoRAs of rank 1, 2 outputs", 2, 3, 1, sum_, rows)
    yield case("two LoRAs of rank 3, 5 outputs", 5, 2, 3, side, one, flows, shape)
    yield case("one LoRA of rank 4, 3 outputs", 3, 1, 4, row, one)
    yield case("as many LoRAs of rank 2 as outputs: 3", 3, 3, 2, rows, sum_, row)
    yield case("as many LoRAs as their rank: 2, with 6 outputs", 6, 2, 2, side, sum_, flows)


# --- scale_and_shift ---------------------------------------------------------------------------------


def terms_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, out: int, inputs: int, terms: str, *sentences: str, **more: Any) -> Case:
        shapes = {"A": (out, inputs), "B": (out, inputs), "C": (inputs, 1), "D": (out,), "E": (out,)} | more
        given: dict[str, Data] = {"W": draw.normal(out, inputs), "b": draw.normal(out)}
        if "no bias" in name:
            given["b"] = None
        return Case(name, given | {t: draw.normal(*shapes[t]) for t in terms}, sentences=sentences)

    all_, star, none = "The weight W + W * A + B", "The star is a product entry", "A term whose tensor is None"
    kept, flows, forms = "W and b keep their values", "gradients flow to the other", "or a column (out, 1)"
    no_bias, returns, number = "the layer has no bias", "The new weight (out, in)", "D, E: (out,)"
    of_W, of_b, of_C = "W: (out, in)", "b: (out,)", "C: (in, 1)"
    yield case("only A", 3, 4, "A", star, none, of_W, kept)
    yield case("only B: a LoRA", 3, 4, "B", none, all_)
    yield case("only C", 3, 4, "C", of_C, none, of_b)
    yield case("only D", 3, 4, "D", none, number, kept)
    yield case("only E: BitFit", 3, 4, "E", none, number)
    yield case("no term at all", 2, 3, "", none, returns)
    yield case("all five", 3, 4, "ABCDE", all_, star, returns, flows, of_W)
    yield case("all five, as many inputs as outputs", 3, 3, "ABCDE", star, all_, of_C, of_b)
    yield case("columns for A and B", 3, 3, "AB", forms, star, A=(3, 1), B=(3, 1))
    numbers = case("a number for each of A, B, D and E", 4, 3, "ABDE", forms, number, A=(), B=(), D=(), E=())
    # Positive: the gradient of a number is a sum, which could otherwise cancel to nothing but rounding error.
    positive = {
        name: value.abs() if isinstance(value, torch.Tensor) else value for name, value in numbers.inputs.items()
    }
    yield Case(numbers.name, positive, sentences=numbers.sentences)
    yield case("no bias, and all five", 3, 4, "ABCDE", no_bias, returns)


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        ReLoRALayer,
        idea="restarts",
        difficulty=3,
        minutes=12,
        points=3,
        blank=("__init__", "restart"),
        hints=(
            "Begin with the faulty constructor. Work out the gradients of A and B for one output: each is a product "
            "that contains the other factor. `restart` needs the same start, after something else.",
            "One factor has to be zero, so that nothing changes at the start. The other one must not be. In `restart` "
            "the order matters: what is merged has to be there still.",
            "`self.W += ...` changes a buffer in place. `nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))` and "
            "`nn.init.zeros_(tensor)` draw and clear a parameter in place.",
        ),
        cases=layer_cases,
        probe=run_relora_layer,
        explain=explain_layer,
        background=("A frozen linear layer", "how they are distributed"),
    ),
    Exercise(
        test_relora_layer,
        idea="tests of one's own",
        difficulty=4,
        minutes=14,
        points=3,
        hints=(
            "Write one check for each line of the statement, and try them on `FaultyReLoRALayer` and on your own "
            "layer. Make a layer of a random W; compare what it computes, not what its factors are.",
            "A new layer has B A = 0, so restarting it says nothing about merging: fill A and B with random numbers "
            "first, as after some training. Copy what you compare with. A layer learns if A *or* B has a gradient.",
            "`loss.backward()` fills `.grad`, which stays None where no gradient flows. `torch.allclose(..., "
            "atol=1e-4)` allows for rounding; `.clone()` copies; `with torch.no_grad(): layer.A.normal_()` fills.",
        ),
        cases=test_cases,
        probe=run_test,
        explain=explain_test,
        background=("ReLoRALayer: a class that is made",),
    ),
    Exercise(
        compress,
        idea="one square matrix",
        difficulty=2,
        minutes=7,
        points=2,
        hints=(
            "Write x in lines of q numbers, one below the other. Which numbers are in one column?",
            "Cut the last axis into pieces of q numbers each and add the pieces up. `fill_up(x, q)` makes the last "
            "piece whole.",
            "`tensor.unflatten(-1, (-1, q))` cuts the last axis in two: (..., pieces, q). Sum over the right one.",
        ),
        cases=compress_cases,
        probe=run_with_gradients,
        explain=explain_compressed,
        background=("MoRA's way from in to q",),
    ),
    Exercise(
        decompress,
        idea="one square matrix",
        difficulty=2,
        minutes=5,
        points=1,
        hints=(
            "For q = 3 and 7 outputs the places of z are 0, 1, 2, 0, 1, 2, 0.",
            "Either repeat the last axis often enough and cut off the rest, or index it with the places.",
            "`torch.arange(outputs)` counts the outputs, and `%` gives remainders; a tensor of places can be an index: "
            "`z[..., places]`.",
        ),
        cases=decompress_cases,
        probe=run_with_gradients,
        explain=explain_decompressed,
        background=("MoRA's way from q numbers",),
    ),
    Exercise(
        scaled_B,
        idea="several LoRAs as one",
        difficulty=2,
        minutes=7,
        points=2,
        hints=(
            "Which number multiplies the entry of B in row o and column j? It depends on o and on the LoRA to which "
            "column j belongs.",
            "Columns 0 to r - 1 belong to LoRA 0, the next r to LoRA 1. Make a tensor of the shape of B that has the "
            "right scale at every place.",
            "`scales.T` is (out, n): its column i has to become r equal columns, side by side. `repeat` and "
            "`repeat_interleave` order them differently.",
        ),
        cases=scaled_cases,
        probe=run_with_gradients,
        explain=explain_scaled,
    ),
    Exercise(
        scale_and_shift,
        idea="scale and shift",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "Start from W and b, and add one term at a time, each only if its tensor is there.",
            "W * A multiplies entry by entry, and broadcasting takes care of columns and numbers. Every product is "
            "with the W or b that was given, so give the sums names of their own.",
            "`W @ C` is (out, 1), but the bias is (out,): `.squeeze(-1)`. Test for `is not None`; do not use `+=`, "
            "which would change the tensor that was given.",
        ),
        cases=terms_cases,
        probe=run_terms,
        explain=explain_terms,
    ),
]

PREDICTIONS = [
    Prediction(
        "first_cycle",
        question=(
            "A run has four cycles. It uses the constructor above in every layer, and it also trains the embeddings "
            "and the normalisation layers in full. How does its training loss look in the first cycle, compared with "
            "the loss of the model that it started from?"
        ),
        choices={
            "a": "flat: it begins to fall after the first restart",
            "b": "it falls, so that nothing looks wrong",
            "c": "it rises, and the first restart repairs it",
        },
        answer="b",
        explanation=(
            "In the first cycle no matrix of the model learns: the gradient of A contains B as a factor and that of B "
            "contains A, and both are zero. But the embeddings and the normalisation learn, and they lower the loss. "
            "The first restart draws A anew, and from then on the matrices learn too."
        ),
        replies={
            "a": "That is the curve of A and B alone. Something else is trained beside them.",
            "c": "Nothing disturbs the model: B A is zero, so the layers compute what they computed before.",
        },
        measured="32 steps on the bundled GPT-2, in four cycles",
        idea="restarts",
    ),
    Prediction(
        "who_remembers",
        question=(
            "Four methods train about 2,050 numbers at a time: LoRA with r = 1, ReLoRA with r = 1 in four cycles, MoRA "
            "by sharing and MoRA by rotation. Each gets the same steps, and its own tuned learning rate. Whose model "
            "remembers the most tokens of the 64 values?"
        ),
        choices={
            "a": "LoRA's: it can choose its directions freely, and never starts again",
            "b": "ReLoRA's: over the whole run it trains four times as many numbers",
            "c": "MoRA's, by sharing: M sees a sum of all inputs",
            "d": "MoRA's, by rotation: its update has full rank",
            "e": "nobody's: the same number of parameters stores the same amount",
        },
        answer="d",
        explanation=(
            "What LoRA of rank 1 adds to a layer depends on a single number, the product of x with its one row: 64 "
            "keys that differ in many directions all have to be told apart by it. An update of full rank passes on "
            "differences in every direction. ReLoRA comes in between: it ends with rank 4."
        ),
        replies={
            "a": "Free, but only one direction for each layer, and 64 keys have to be told apart along it.",
            "b": "It does, and that helps, but the rank is still no more than four.",
            "c": "Adding inputs up loses what tells them apart.",
            "e": "The number of parameters is a limit for all of them, but not the only one.",
        },
        measured="100 steps on two sets of 64 pairs, with the rates of the notebook",
        idea="who can memorise",
    ),
]
