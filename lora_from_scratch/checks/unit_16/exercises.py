"""Unit 16, fewer numbers than rank one: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_16.explanations import (
    explain_change,
    explain_combination,
    explain_gradient,
    explain_projections,
    explain_test,
    explain_tied,
)
from lora_from_scratch.checks.unit_16.implementations import FAULTY, SOUND
from lora_from_scratch.checks.unit_16.probes import (
    run_change,
    run_combination,
    run_count,
    run_gradient,
    run_projections,
    run_test,
)
from lora_from_scratch.methods.nola import coefficient_gradient, random_combination
from lora_from_scratch.methods.tied_lora import tied_lora_parameter_count
from lora_from_scratch.methods.vera import draw_projections, vera_delta_weight
from lora_from_scratch.museum.reseeded_generator import test_random_combination

TITLE = "Fewer numbers than rank one"
GLOBAL = "global generator is neither read nor changed"

# --- VeRA: draw_projections, vera_delta_weight -------------------------------------------------------


def projection_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, rank: int, inputs: int, outputs: int, *sentences: str) -> Case:
        given = {"rank": rank, "in_features": inputs, "out_features": outputs, "seed": draw.integer(0, 10**6)}
        return Case(name, given, sentences=sentences)

    bounds, order, shapes = "Each entry is uniform", "first all of A and then all of B", "A (r, in) and B (out, r)"
    most, again, shared = "in_features, out_features", "seed: the same seed", "that all layers share"
    yield case("r = 2, 3 inputs, 5 outputs", 2, 3, 5, bounds, shapes, "rank: r.", most)
    yield case("r = 4, 4 inputs, 4 outputs", 4, 4, 4, order, shared, bounds)
    yield case("r = 7, 2 inputs, 3 outputs", 7, 2, 3, again, GLOBAL, bounds, most)
    yield case("r = 1, 6 inputs, 1 output", 1, 6, 1, bounds, shapes)


def change_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, rank: int, of: tuple[int, int], most: tuple[int, int], *sentences: str) -> Case:
        given = {"A": draw.normal(rank, most[0]), "B": draw.normal(most[1], rank)}
        given |= {"lambda_d": draw.normal(rank), "lambda_b": draw.normal(of[1])}
        return Case(name, {**given, "in_features": of[0]}, sentences=sentences)

    product, columns = "diag(lambda_b) B diag(lambda_d) A", "uses the first columns of A"
    d, b, flow = "lambda_d: (r,)", "lambda_b: (out,)", "Gradients flow"
    small = {"A": torch.tensor([[1.0, 2.0], [3.0, -1.0]]), "B": torch.tensor([[1.0, 0.0], [2.0, 1.0]])}
    small |= {"lambda_d": torch.tensor([2.0, -1.0]), "lambda_b": torch.tensor([1.0, 3.0])}
    yield Case("r = in = out = 2", {**small, "in_features": 2}, sentences=(product, d, b, "(out, in)."))
    yield case("r = 2, the layer is as large as A and B", 2, (3, 5), (3, 5), product, "(out, in).", flow)
    yield case("r = in = out = 3", 3, (3, 3), (3, 3), d, b, product)
    yield case("the layer has fewer inputs", 2, (3, 4), (6, 4), columns, "in_features: in", "A: (r, most inputs)")
    yield case("the layer has fewer outputs", 2, (4, 3), (4, 7), columns, "B: (most outputs, r)", b)
    yield case("fewer of both, r = 6", 6, (2, 3), (5, 8), columns, flow, d)
    start = case("lambda_b = 0, as at the start", 3, (4, 2), (4, 2), flow, b)
    yield Case(start.name, {**start.inputs, "lambda_b": torch.zeros(2)}, sentences=start.sentences)


# --- Tied-LoRA: tied_lora_parameter_count --------------------------------------------------------------


def tied_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, sizes: Mapping[str, tuple[int, int]], rank: int, *sentences: str) -> Case:
        return Case(
            name, {"sizes": {key: list(size) for key, size in sizes.items()}, "rank": rank}, sentences=sentences
        )

    def blocks(number: int, kinds: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        return {f"transformer.h.{block}.{kind}": size for block in range(number) for kind, size in kinds.items()}

    count, kind, size, r = (
        "How many numbers Tied-LoRA trains",
        "Two matrices are of one kind",
        "sizes: (in, out)",
        "rank:",
    )
    n, d = draw.integer(3, 5), draw.integer(4, 9)
    yield case("one matrix, 3 inputs, 5 outputs, r = 2", {"transformer.h.0.mlp.c_fc": (3, 5)}, 2, count, size, r)
    yield case("the same matrix in 3 blocks, r = 2", blocks(3, {"mlp.c_fc": (3, 5)}), 2, count, kind, r)
    yield case(
        "two kinds in several blocks, r = 1", blocks(n, {"attn.c_attn": (d, 3 * d), "mlp.c_fc": (d, 4 * d)}), 1, kind
    )
    alike = blocks(n, {"attn.c_proj": (d, d), "mlp.c_proj": (d, d)})
    yield case("attn.c_proj and mlp.c_proj of the same size, r = 3", alike, 3, kind, count)
    square = blocks(2, {"attn.q": (d, d), "attn.k": (d, d)})
    yield case("attn.q and attn.k, both square, r = 2", square, 2, kind)
    other = {"encoder.0.attn.k": (d, d), "encoder.1.attn.k": (d, d), "decoder.0.attn.k": (d + 1, d)}
    yield case("attn.k of two sizes, r = 2", other, 2, kind, size)
    turned = blocks(2, {"mlp.c_fc": (d, d + 2)}) | {"head.mlp.c_fc": (d + 2, d)}
    yield case("mlp.c_fc with its sides exchanged in one place, r = 1", turned, 1, kind, size)
    twelve = blocks(12, {"attn.c_proj": (d, d), "mlp.c_proj": (4 * d, d)}) | {"head": (d, 50)}
    yield case("12 blocks with two matrices each, and a head, r = 4", twelve, 4, kind, count, r)


# --- NOLA: random_combination, coefficient_gradient ----------------------------------------------------

DRAWN = "U_i = (2 R_i - 1) / sqrt(k)"


def combination_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, c: Tensor, shape: Sequence[int], *sentences: str) -> Case:
        return Case(
            name, {"coefficients": c, "shape": list(shape), "seed": draw.integer(0, 10**6)}, sentences=sentences
        )

    total, seed, dtype = "The sum of k random matrices", "So the seed stands", "A tensor of this shape"
    yield case("k = 1, the coefficient is 1", torch.ones(1), (2, 3), DRAWN, dtype, "shape: of the result")
    yield case("k = 2, only the second coefficient is not 0", torch.tensor([0.0, 2.0]), (3, 2), DRAWN, total, seed)
    yield case("k = 4", draw.normal(4), (2, 5), total, "coefficients: c, (k,)", GLOBAL, "seed: of the random matrices")
    yield case("k = 9 in float64", draw.normal(9, dtype=torch.float64), (4, 1), dtype, total, GLOBAL)
    yield case("k = 5, all coefficients are 0", torch.zeros(5), (3, 3), total, GLOBAL)


def gradient_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, G: Tensor, k: int, *sentences: str, transposed: bool = False) -> Case:
        given: dict[str, Data] = {"gradient": G, "k": k, "seed": draw.integer(0, 10**6), "transposed": transposed}
        return Case(name, given, sentences=sentences)

    gradient = "The gradient by the coefficients"
    loss, entry, again, axes = "Entry i says how", "The result changes by U_i", "No U_i was kept", "(k,), in the dtype"
    one = torch.zeros(2, 3)
    one[1, 0] = 1.0
    yield case("k = 1, one entry of G is 1", one, 1, entry, loss, axes, gradient)
    yield case("k = 3, G is 2 x 4", draw.normal(2, 4), 3, entry, again, "k: the number", "seed: of the random matrices")
    yield case("k = 8, G is 5 x 2", draw.normal(5, 2), 8, again, entry, GLOBAL)
    G = "gradient: G, a matrix"
    yield case("G is not contiguous", draw.normal(4, 3), 2, G, loss, transposed=True)
    yield case("G is in float64", draw.normal(3, 3, dtype=torch.float64), 4, axes, G)


# --- The museum: test_random_combination ----------------------------------------------------------------

SAME, OTHER, STATE = "The same arguments give the same result", "Another seed gives", "After every call the state"


def museum_cases(draw: Draw) -> Iterator[Case]:
    sound = "The test ends without an error", "is up to the implementation", "random_combination: what is tested"
    broken = dict.fromkeys(FAULTY, STATE)
    broken |= {name: SAME for name in FAULTY if name.startswith(("a copy", "a generator", "the seed is added"))}
    broken |= {name: OTHER for name in FAULTY if name == "the seed is not used"}
    for name in SOUND:
        yield Case(name, {"implementation": name}, sentences=sound)
    for name, sentence in broken.items():
        fault = "AssertionError: the implementation has a fault"
        yield Case(name, {"implementation": name}, sentences=(sentence, fault))


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        draw_projections,
        idea="numbers from a seed",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "Everything random in this function comes from one `torch.Generator` that you make and seed yourself. "
            "Which two tensors do you draw with it, in which order?",
            "`torch.empty(shape).uniform_(low, high, generator=...)` draws a tensor. The bound of A depends on its "
            "number of columns, and so does that of B.",
            "The bound of A is `math.sqrt(6 / in_features)` and that of B `math.sqrt(6 / rank)`. The generator goes on "
            "where it stopped: use the same one for B, and do not seed it again.",
        ),
        cases=projection_cases,
        probe=run_projections,
        explain=explain_projections,
    ),
    Exercise(
        vera_delta_weight,
        idea="vectors in place of matrices",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "First take this layer's part of A and of B. Then no diagonal matrix is needed: multiplying by one from "
            "the left scales rows, from the right columns.",
            "lambda_d scales the rows of A (or the columns of B), lambda_b the rows of the product. `in_features` "
            "tells how many columns of A are used; what tells how many rows of B are?",
            "`A[:, :in_features]` and `B[: len(lambda_b)]` are the parts. `vector[:, None] * matrix` scales the rows "
            "of a matrix, and `matrix * vector` its columns.",
        ),
        cases=change_cases,
        probe=run_change,
        explain=explain_change,
        background=("A and B are shared by all layers",),
    ),
    Exercise(
        tied_lora_parameter_count,
        idea="counting what is trained",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "There are two sums: one over the kinds, for A and B, and one over all matrices, for u and v.",
            "Collect the kinds in a set. What of a name and a size has to be in its items, so that two matrices of one "
            "kind give the same item?",
            '`name.split(".")[-2:]` are the last two parts of a name; a list cannot be in a set, but text and tuples '
            "can. Each kind adds r (in + out), and each matrix r + out.",
        ),
        cases=tied_cases,
        probe=run_count,
        explain=explain_tied,
    ),
    Exercise(
        random_combination,
        idea="numbers from a seed",
        difficulty=2,
        minutes=9,
        points=2,
        hints=(
            "What is wrong in the code above is where its random numbers come from. The arithmetic can stay.",
            "Make a `torch.Generator`, give it the seed, and pass it to `torch.rand`. Nothing else has to be seeded, "
            "saved or restored.",
            "`torch.rand(k, *shape, generator=generator)` gives R. Convert the matrices to the dtype of the "
            "coefficients before you sum over the first axis.",
        ),
        cases=combination_cases,
        probe=run_combination,
        explain=explain_combination,
    ),
    Exercise(
        test_random_combination,
        idea="finding faults",
        difficulty=3,
        minutes=12,
        points=3,
        hints=(
            "Each promise needs an `assert`. `torch.get_rng_state()` gives the state of the global generator, a "
            "tensor; `torch.equal` compares two tensors.",
            "Something random may happen between two calls of a real run, so let it happen in the test: seed the "
            "global generator with another number before the second call. And in a real run numbers have been drawn "
            "since the generator was seeded.",
            "Before each call: `torch.manual_seed(...)` with a number of its own, then `torch.rand(1)`, then keep the "
            "state. After each call: compare the state. At the end: compare the results of seeds 5, 5 and 6.",
        ),
        cases=museum_cases,
        probe=run_test,
        explain=explain_test,
        background=("Test an implementation",),
    ),
    Exercise(
        coefficient_gradient,
        idea="numbers from a seed",
        difficulty=3,
        minutes=10,
        points=3,
        hints=(
            "Draw the same matrices as in `random_combination`: the same generator, seed, order and range. Their shape "
            "is that of G.",
            "Then compute one number for each matrix: multiply it by G, entry by entry, and add up all entries of the "
            "product.",
            "`(U * G).sum(dim=(1, 2))` does that for U of shape (k, rows, columns). Mind the dtype: `torch.rand` gives "
            "float32.",
        ),
        cases=gradient_cases,
        probe=run_gradient,
        explain=explain_gradient,
    ),
]

PREDICTIONS = [
    Prediction(
        "a_look_in_between",
        question=(
            "You train NOLA with dropout for eight steps from one seed, with random matrices from the function above. "
            "Then you repeat the run and also compute the validation loss once, after step 4: in evaluation mode, so "
            "without dropout, and without gradients. How do the training losses of steps 5 to 8 differ between the "
            "two runs?"
        ),
        choices={
            "a": "not at all: evaluation changes no parameter and draws no dropout mask",
            "b": "they are others: the dropout masks from step 5 on are others",
            "c": "they are others: from step 5 on the matrices U are others",
        },
        answer="b",
        explanation=(
            "Each call draws a number from the global generator and makes it the generator's new seed. So every call "
            "sends the generator to another place of its sequence, in evaluation too, and the next dropout masks are "
            "others. With random matrices from a generator of their own, both runs are equal to the last digit."
        ),
        replies={
            "a": (
                "That is how it should be. But the function is called in evaluation too, and look at what it leaves "
                "behind."
            ),
            "c": "The U come from `seed` alone: right after `manual_seed(seed)` the same numbers are drawn every time.",
        },
        measured="eight steps of batch 4 on the bundled GPT-2",
        idea="numbers from a seed",
    ),
    Prediction(
        "two_hundred",
        question=(
            "LoRA of rank 1 on all 24 matrices of the bundled model trains 24,576 numbers. NOLA with k = 4 on the same "
            "matrices trains 192, less than a hundredth. Each gets its own best learning rate and the same few steps. "
            "What share of LoRA's reduction of the held-out loss does NOLA reach with them?"
        ),
        choices={
            "a": "about a hundredth, as many as it has of LoRA's numbers",
            "b": "about a quarter",
            "c": "nearly all of it",
        },
        answer="b",
        explanation=(
            "Not all numbers are worth the same. The first few find what lowers the loss most in the directions that "
            "they can reach, and every further step down costs several times as many numbers. Seen on a logarithmic "
            "axis, the loss falls almost along a straight line."
        ),
        replies={
            "a": "That would be so if every number were worth the same. The first ones are worth the most.",
            "c": "The model has never seen a card: what it has to learn does not fit into so few random directions.",
        },
        measured="32 steps of batch 4 on the bundled GPT-2, two seeds for LoRA and for NOLA with k = 4",
        idea="how few numbers",
    ),
]
