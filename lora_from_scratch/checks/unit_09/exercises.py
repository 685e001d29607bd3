"""Unit 09, LoRA: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_09.explanations import (
    explain_blocks,
    explain_delta,
    explain_injected,
    explain_layer,
    explain_marked,
    explain_start,
    explain_start_test,
    explain_state,
)
from lora_from_scratch.checks.unit_09.probes import (
    CONV1D,
    LINEAR,
    run_blocks,
    run_delta,
    run_layer,
    run_start,
    run_start_test,
    same_start,
)
from lora_from_scratch.checks.unit_09.probes_model import QKV, run_inject, run_mark, run_state
from lora_from_scratch.checks.unit_09.start_layers import FAULTY, SOUND
from lora_from_scratch.methods.lora import (
    LoRALinear,
    delta_weight,
    initial_factors,
    inject_lora,
    lora_state_dict,
    mark_only_lora_as_trainable,
)
from lora_from_scratch.methods.placement import block_diagonal_B
from lora_from_scratch.museum.wide_start import test_lora_start

TITLE = "LoRA"

# --- delta_weight ------------------------------------------------------------------------------------


def delta_cases(draw: Draw) -> Iterator[Case]:
    product, s, shape = "The learned change of the weight", "scaling: s, which is alpha / r", "(out, in), the shape"
    A, B = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0], [100.0]])
    small: dict[str, Data] = {"A": A, "B": B, "scaling": 0.5}
    yield Case("r = 1: 3 columns, 2 rows, s = 0.5", small, sentences=(product, "A: (r, in)", "B: (out, r)"))
    for out, inputs, rank, scaling, *sentences in (
        (4, 6, 2, 2.0, shape, product, "A: (r, in)", "B: (out, r)"),
        (3, 3, 3, 0.25, s, product),
        (7, 4, 3, 8.0, "Gradients flow", s, shape),
        (5, 2, 2, 0.0, s, product),
    ):
        factors: dict[str, Data] = {"A": draw.normal(rank, inputs), "B": draw.normal(out, rank), "scaling": scaling}
        yield Case(f"W is {out} x {inputs}, r = {rank}, s = {scaling:g}", factors, sentences=tuple(map(str, sentences)))


# --- initial_factors ---------------------------------------------------------------------------------


def start_cases(draw: Draw) -> Iterator[Case]:
    def case(inputs: int, outputs: int, rank: int, part: str, *sentences: str) -> Case:
        sizes = {"in_features": inputs, "out_features": outputs, "rank": rank, "seed": draw.integer(0, 10**6)}
        return Case(f"{inputs} to {outputs} features, r = {rank}", sizes, part, sentences)

    start, refused, fits = "the start", "what is refused", "rank: r, from 1 to the smaller side"
    zero, bound, shapes = "A random, B zero", "Each entry of A is uniform", "A (r, in) and B (out, r), in float32"
    generator, own = "generator: where the random numbers come from", "None: PyTorch's own"
    yield case(128, 96, 16, start, zero, bound, shapes, generator, own)
    yield case(100, 300, 50, start, shapes, bound, "So B A is zero", generator, own)
    yield case(400, 60, 8, start, bound, "So B A is zero", zero, generator, own)
    yield case(60, 200, 60, start, fits, shapes, zero)
    yield case(200, 50, 50, start, fits, shapes, zero)
    yield case(2500, 20, 1, start, fits, shapes, zero)
    error = "the rank does not fit the layer"
    for inputs, outputs, rank in ((8, 5, 0), (8, 5, 6), (5, 8, 6), (8, 5, -1)):
        yield case(inputs, outputs, rank, refused, error, fits)


# --- LoRALinear --------------------------------------------------------------------------------------


def layer_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, sizes: tuple[int, int, int], what: str, *sentences: str, **more: Any) -> Case:
        inputs, outputs, rank = sizes
        given: dict[str, Data] = {"kind": LINEAR, "weight": draw.normal(outputs, inputs), "bias": draw.normal(outputs)}
        given |= {"A": draw.normal(rank, inputs), "B": draw.normal(outputs, rank), "alpha": draw.choice((6.0, 10.0))}
        given |= {"x": draw.normal(*more.pop("batch", (2, 3)), inputs), "what": what}
        given |= more
        return Case(name, given, part, sentences)

    forward, merge, unmerge = "forward", "merge", "unmerge"
    conv: dict[str, Any] = {"kind": CONV1D}
    sum_, beside, scaling = (
        "`forward(x)`, (..., in) to (..., out)",
        "A linear layer with a LoRA",
        "the scaling is alpha / r",
    )
    kept, dropped, alone = (
        "The layer itself is kept",
        "x' is x after `dropout`",
        "While merged, the weight has the change",
    )
    yield case("a Linear at initialisation, B = 0", forward, (4, 3, 2), "start", sum_, beside)
    yield case("a Linear with trained A and B", forward, (4, 3, 2), "forward", sum_, beside, scaling, kept)
    yield case("a Conv1D, one token", forward, (3, 6, 3), "forward", sum_, scaling, kept, batch=(), **conv)
    rslora = "rslora: scale by alpha / sqrt(r)"
    yield case("rslora: a Linear with r = 3", forward, (4, 5, 3), "forward", rslora, rslora=True)
    dropout = "dropout: the probability that an element of A's input is zeroed"
    yield case("dropout on the input of A", forward, (15, 2, 1), "dropout", dropped, dropout)
    puts, w, stored = "`merge()` puts W0 + s B A", "W = W0 + s B A", "The weight of a `Conv1D` is (in, out)"
    rounded, once, same = (
        "The sum is formed in at least float32",
        "What is merged is not merged",
        "Both leave `base.weight`",
    )
    yield case("merging a square Conv1D", merge, (4, 4, 2), "merge", stored, puts, alone, **conv)
    yield case("merging a Linear with 5 inputs and 3 outputs", merge, (5, 3, 2), "merge", puts, w, alone, same)
    yield case("merging a Linear twice", merge, (3, 5, 3), "merge", once, times=2)
    yield case("merging a Linear three times", merge, (3, 5, 3), "merge", once, times=3)
    yield case("rslora: merging a Conv1D with r = 3", merge, (6, 4, 3), "merge", rslora, rslora=True, **conv)
    # Sums and products of these numbers are exact in float32, so the only rounding is the one to bfloat16.
    exact: dict[str, Any] = {"weight": draw.integers(-200, 200, 16, 16) / 64, "dtype": "bfloat16"}
    exact |= {"A": draw.integers(1, 63, 2, 16) / 32, "B": draw.integers(1, 63, 16, 2) / 32}
    yield case("merging a bfloat16 Linear", merge, (16, 16, 2), "merge", rounded, **exact)
    back, bits, nothing = (
        "`unmerge()` puts W0 back, bit for bit",
        "W0 again, bit for bit",
        "If nothing is merged it does",
    )
    yield case(
        "a bfloat16 Linear, merged and unmerged", unmerge, (16, 16, 2), "back", back, bits, same, dtype="bfloat16"
    )
    yield case(
        "a Conv1D, merged and unmerged five times", unmerge, (8, 12, 2), "back", back, bits, same, times=5, **conv
    )
    yield case("unmerge without merge", unmerge, (4, 3, 2), "back", nothing, times=0)
    moved = "W0 is kept in `_unmerged`, which follows"
    yield case("merged, moved to float64, and unmerged", unmerge, (5, 4, 2), "move", moved)
    yield case("merged and unmerged, trained on, and again", unmerge, (5, 4, 2), "twice", bits, back, w)


# --- block_diagonal_B --------------------------------------------------------------------------------


def block_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, parts: Sequence[str], all_parts: Sequence[str], width: int, rank: int, *sentences: str) -> Case:
        B = draw.normal(len(parts) * width, rank)
        return Case(name, {"B": B, "parts": list(parts), "all_parts": list(all_parts)}, sentences=sentences)

    own, drawn, whole = (
        "part i may read its own r of them only",
        "for q and v of q, k, v",
        "(len(all_parts) * width, n * r)",
    )
    below, order, all_ = (
        "B: (n * width, r)",
        "parts: the names of those n parts",
        "all_parts: the names of all the parts",
    )
    counting = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    given: dict[str, Data] = {"B": counting, "parts": ["q", "v"], "all_parts": list(QKV)}
    yield Case(
        "r = 1 on q and v, each 2 wide: 1, 2 for q and 3, 4 for v", given, sentences=(drawn, own, "The B of one LoRA")
    )
    yield case("r = 2 on q and v, each 3 wide", ("q", "v"), QKV, 3, 2, own, drawn, below)
    yield case("r = 2 on k alone", ("k",), QKV, 4, 2, all_, order, whole)
    yield case("r = 3 on k and v", ("k", "v"), QKV, 4, 3, order, below, "Gradients flow to B", whole)
    yield case("r = 2 on all three", QKV, QKV, 3, 2, own, below)
    yield case("another fused layer: gate and up, r = 2 on up", ("up",), ("gate", "up"), 5, 2, all_, order)
    double = case("float64: r = 1 on q and k", ("q", "k"), QKV, 2, 1, whole)
    yield Case(double.name, {**double.inputs, "B": draw.normal(4, 1, dtype=torch.float64)}, sentences=double.sentences)
    meta = case("a B on the device meta: r = 1 on q and v", ("q", "v"), QKV, 2, 1, whole)
    yield Case(meta.name, {**meta.inputs, "meta": True}, sentences=meta.sentences)


# --- inject_lora -------------------------------------------------------------------------------------


def inject_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, names: Sequence[str], *sentences: str, wrapped: bool = False) -> Case:
        given: dict[str, Data] = {"names": list(names), "wrapped": wrapped, "seed": draw.integer(0, 10**6)}
        return Case(name, given | {"x": draw.normal(2, 3)}, sentences=sentences)

    put, in_place, holder = (
        "Put these layers into the model",
        "The model is changed in place",
        "Whatever held the old layer",
    )
    others, full = "All other modules stay", "layers: by the full name of the place"
    yield case("h.1.attn", ["h.1.attn"], put, in_place, holder, others)
    yield case("head, an attribute of the model itself", ["head"], full, put)
    yield case("attn, whose name also ends other names", ["attn"], full, others)
    yield case("h.0.mlp.2, in a Sequential", ["h.0.mlp.2"], holder, full)
    yield case("three at once", ["h.0.attn", "h.1.mlp.0", "head"], put, full, others)
    wraps = "A layer may hold the one"
    yield case("LoRA layers that wrap the existing ones", ["h.0.mlp.0", "h.1.attn"], wraps, others, wrapped=True)
    yield case("none", [], others)


# --- mark_only_lora_as_trainable, lora_state_dict ----------------------------------------------------


def mark_cases(draw: Draw) -> Iterator[Case]:
    only, before, names = "Train every A and B, and nothing else", "whatever `requires_grad`", "whose last part is"
    yield from model_cases(draw, only, before, names)


def state_cases(draw: Draw) -> Iterator[Case]:
    only, graph = "What has to be saved: every A and B", "Each is outside the graph of gradients"
    names = "The tensors by their full names"
    yield from model_cases(draw, only, only, names, graph)
    given: dict[str, Data] = {"made": "a model", "trained": "some", "seed": draw.integer(0, 10**6), "dtype": "bfloat16"}
    yield Case("a model in bfloat16", given, sentences=(graph,))


def model_cases(draw: Draw, only: str, before: str, names: str, *more: str) -> Iterator[Case]:
    def case(name: str, made: str, trained: str, *sentences: str) -> Case:
        given: dict[str, Data] = {"made": made, "trained": trained, "seed": draw.integer(0, 10**6)}
        return Case(name, given, sentences=tuple(dict.fromkeys(sentences)))

    yield case("two LoRA layers and a LayerNorm, everything trained before", "a list", "all", only, names, *more)
    yield case("a LoRA layer by itself", "one layer", "all", only, names)
    yield case("a model with other layers, everything trained before", "a model", "all", names, only)
    yield case("the same model, everything frozen before", "a model", "none", before, only)
    fused = "a model with a fused layer"
    yield case(f"{fused}, some of it frozen before", fused, "some", before, names)
    yield case("a model without LoRA", "no LoRA", "all", only)


# --- test_lora_start ---------------------------------------------------------------------------------


def start_test_cases(draw: Draw) -> Iterator[Case]:
    passes, either, uses = "A sound layer passes", "It passes whichever way round", "may use nothing else of it"
    manner, draws = "A test of how a `LoRALayer` starts", "Its random numbers come from PyTorch's own generator"
    made = "a class that is made as"
    width, some, b = "wider or narrower", "right for some layers only", "if its B is not zero"
    stand_for = {name: b for name in FAULTY if "B is" in name or "both random" in name}
    stand_for |= {name: some for name in FAULTY if name.endswith(("(r)", "(out)", "and out", "0.02", "alpha"))}
    for name in SOUND:
        yield Case(f"a sound layer: {name}", {"layer": name}, sentences=(passes, either, made, uses, draws))
    for name in FAULTY:
        yield Case(f"a faulty layer: {name}", {"layer": name}, sentences=(stand_for.get(name, width), manner))


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        delta_weight,
        idea="LoRA's arithmetic",
        difficulty=1,
        minutes=4,
        points=1,
        hints=(
            "The product of two thin matrices is a large one. Write the three shapes below each other: which side do "
            "the two factors share?",
            "The shared side is r, and it has to be in the middle of the product.",
            "`@` multiplies matrices. Multiply the product by the scaling, once.",
        ),
        cases=delta_cases,
        probe=run_delta,
        explain=explain_delta,
    ),
    Exercise(
        initial_factors,
        idea="how LoRA starts",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "First reject a rank that does not fit: use `check_rank`. Then create one matrix of random numbers and one "
            "of zeros.",
            "The bound on the random numbers depends on how many of them are multiplied with one x: the number of "
            "columns of A.",
            "Use `.uniform_(low, high, generator=generator)` on `torch.empty(rank, in_features)`; the other matrix is "
            "`torch.zeros`.",
        ),
        cases=start_cases,
        probe=run_start,
        agree=same_start,
        dtypes=True,
        explain=explain_start,
        background=('(Hu et al., section 4.1, say "a random Gaussian"', "in_features, out_features: of the layer"),
    ),
    Exercise(
        LoRALinear,
        idea="the LoRA layer",
        difficulty=4,
        minutes=20,
        points=6,
        blank=("forward", "merge", "unmerge"),
        hints=(
            "`forward`: if the layer is merged, the base's output is all there is. Otherwise, add the low-rank path to "
            "the base's output. `merge`: save W0 first, then set the new weight. `unmerge`: restore W0 and mark the "
            "layer as unmerged.",
            "The low-rank path goes from `in` features to r and from r to `out`: `F.linear` with A, then with B. Only "
            "its input goes through `dropout(x, self.dropout_p, self.training)`.",
            "`delta_weight(A.float(), B.float(), self.scaling)` is (out, in), so a `Conv1D` needs its transpose. "
            "`self._unmerged` is None while nothing is merged; `weight.data = ...` replaces the values of a parameter "
            "and keeps the parameter object.",
        ),
        cases=layer_cases,
        probe=run_layer,
        explain=explain_layer,
        background=(
            "A variant of LoRA overrides one of four methods",
            "base: `nn.Linear`, or the `Conv1D` of a GPT-2",
            "rank: r, from 1 to the smaller side of the weight",
            "alpha: the strength",
            "generator: where A's random numbers come from",
            "None: PyTorch's own",
            "ValueError: the rank does not fit the layer",
        ),
    ),
    Exercise(
        inject_lora,
        idea="LoRA in a model",
        difficulty=3,
        minutes=10,
        points=2,
        hints=(
            "Which module calls the old layer? The one that holds it as an attribute. That attribute has to change.",
            "Split the name at its last dot: the module that holds the layer comes before it, the attribute's name "
            "after it.",
            "`name.rpartition('.')` does this and gives an empty first part if there is no dot; "
            "`model.get_submodule('')` is the model itself; `setattr(module, attribute, layer)` replaces the layer.",
        ),
        cases=inject_cases,
        probe=run_inject,
        explain=explain_injected,
        background=("model: any module",),
    ),
    Exercise(
        mark_only_lora_as_trainable,
        idea="LoRA in a model",
        difficulty=2,
        minutes=5,
        points=2,
        hints=(
            "Go through all the parameters by name. Set `requires_grad` of every one of them to True or False.",
            "`model.named_parameters()` gives full names such as `h.0.lora_A`. Only the part after the last dot "
            "counts.",
            "`parameter.requires_grad_(...)` takes a bool; `name.rpartition('.')[2]` is the last part.",
        ),
        cases=mark_cases,
        probe=run_mark,
        explain=explain_marked,
    ),
    Exercise(
        lora_state_dict,
        idea="LoRA in a model",
        difficulty=2,
        minutes=5,
        points=2,
        hints=(
            "Ask the same question about every parameter's name as in the previous exercise; the answer decides what "
            "is kept.",
            "Use full names, because every layer has an A. Include parameters that are frozen at the moment.",
            "Use a dictionary comprehension over `model.named_parameters()` with an `if`; `.detach()` detaches a "
            "tensor from the graph.",
        ),
        cases=state_cases,
        probe=run_state,
        explain=explain_state,
    ),
    Exercise(
        block_diagonal_B,
        idea="fused matrices",
        difficulty=4,
        minutes=15,
        points=3,
        hints=(
            "Draw the matrix of the docstring for r = 1 and a width of 2, and write the numbers 1 to 4 into it.",
            "`B.chunk(n)` gives the B of each adapted part. It goes into its part's rows and into r columns of its "
            "own.",
            "One way: create the whole matrix with `torch.zeros`, then assign a slice of rows and columns for each "
            "part. Another way: `torch.block_diag`, where a part that is not adapted contributes rows but no columns, "
            "a (width, 0) matrix.",
        ),
        cases=block_cases,
        probe=run_blocks,
        explain=explain_blocks,
        background=(
            "A fused matrix makes several outputs",
            "n of them are adapted, each by an A",
            "This is what loralib's `MergedLinear` computes",
        ),
    ),
    Exercise(
        test_lora_start,
        idea="how LoRA starts",
        difficulty=3,
        minutes=10,
        points=3,
        hints=(
            "Make a layer, measure the standard deviation of its A, and compare it with the number that it should be. "
            "Then look at B.",
            "A width that depends on the wrong number can be right by chance. Try at least two layers: one with more "
            "inputs than outputs and one with more outputs than inputs, a rank that is much smaller than both, and an "
            "alpha other than 1.",
            "`layer.A.std() * math.sqrt(3 * in_features)` should be about 1: assert that it is between 0.8 and 1.25. "
            "Use layers with some thousand entries in A, so that the random deviation stays small.",
        ),
        cases=start_test_cases,
        probe=run_start_test,
        explain=explain_start_test,
    ),
]

PREDICTIONS = [
    Prediction(
        "both_at_zero",
        question=(
            "LoRA has to start as the model that it adapts, so s B A must be zero at the start. The simplest way is A "
            "= 0 and B = 0. You train such a LoRA for 300 steps. What does the loss do?"
        ),
        choices={
            "a": "it falls as fast as with a random A: Adam takes steps of the same size whatever the gradient",
            "b": "it falls more slowly at first, and catches up as soon as A and B have left zero",
            "c": "it does not move at all",
        },
        answer="c",
        explanation=(
            "The gradient of A is s B^T G and that of B is s G A^T, where G is the gradient of the whole weight. If A "
            "and B are both zero, both gradients are zero and remain zero: zero is a saddle point that no gradient "
            "leads away from. One zero factor is enough to change nothing at the start, and the random one gives the "
            "other its first gradient."
        ),
        replies={
            "a": (
                "Adam makes small gradients count as much as large ones, but a gradient of exactly zero gives a "
                "step of zero."
            ),
            "b": "They never leave zero: the gradient of each contains the other as a factor.",
        },
        idea="how LoRA starts",
    ),
    Prediction(
        "rank_four_twice",
        question=(
            "There are two ways to adapt GPT-2's `c_attn`, which computes q, k and v in one product: one LoRA of rank "
            "4 on the whole matrix, or one of rank 4 on q and another of rank 4 on v. Which of the two trains more "
            "parameters?"
        ),
        choices={
            "a": "the LoRA on the whole matrix, because it covers k as well",
            "b": "the two LoRAs on q and on v, because there are two A",
            "c": "neither: both train the same number",
        },
        answer="c",
        explanation=(
            "With width d, the whole matrix maps d to 3d: 4 (d + 3d) = 16 d. On q and on v it is 4 (d + d) each: 16 d. "
            "The numbers are equal but the models are different: one change has rank 4 and affects k, the other has "
            "rank 8 and does not. 'r = 4 on attention, 147,456 parameters' of GPT-2 small does not tell you which it "
            "is."
        ),
        replies={
            "a": (
                "Its B is larger for covering k, 12 d numbers instead of 8 d, but it has one A of 4 d numbers "
                "instead of two."
            ),
            "b": (
                "There are two A with 8 d numbers instead of one with 4 d, but the two B have only 8 d together, "
                "not 12 d."
            ),
        },
        idea="fused matrices",
    ),
]
