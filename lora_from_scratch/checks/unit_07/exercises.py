"""Unit 07, adapters: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_07.explanations import (
    explain_adapter,
    explain_beside,
    explain_count,
    explain_inserted,
    explain_removed,
)
from lora_from_scratch.checks.unit_07.probes import (
    FORWARD,
    START,
    TINY,
    run_adapter,
    run_beside,
    run_insert,
    run_remove,
    same_adapter,
)
from lora_from_scratch.methods.adapters import (
    AdapterBeside,
    BottleneckAdapter,
    ParallelAdapter,
    adapter_parameter_count,
    insert_adapters,
    remove_adapters,
)

TITLE = "Adapters"

# --- adapter_parameter_count -------------------------------------------------------------------------


def count_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, n_embd: int, width: int, *sentences: str, **more: Data) -> Case:
        return Case(name, {"n_embd": n_embd, "width": width} | more, sentences=sentences)

    matrices, bias = "An adapter has a down projection", "whether both projections have a bias"
    number = "the number of adapters"
    yield case("5 -> 2 -> 5, only the two matrices", 5, 2, matrices, bias=False)
    yield case("5 -> 2 -> 5 with biases", 5, 2, bias, matrices)
    yield case("1024 -> 24 -> 1024, only the two matrices", 1024, 24, matrices, bias=False)
    yield case("two in each of 24 blocks", 1024, draw.integer(8, 200), number, "The number of trained", adapters=48)
    norms = "each with a gain and a shift"
    yield case("one in each of 24 blocks, with a LayerNorm", 1024, draw.integer(3, 9), norms, adapters=24, norms=24)
    d, width, adapters = draw.integer(10, 60), draw.integer(2, 9), draw.integer(3, 9)
    options: dict[str, Data] = {"adapters": 2 * adapters, "bias": False, "norms": 5}
    yield case("LayerNorms in half of the places, no biases", d, width, norms, number, **options)
    yield case("no LayerNorms", d, width, "may be 0", adapters=adapters, norms=0)


# --- BottleneckAdapter, ParallelAdapter --------------------------------------------------------------

DRAWN = "all random numbers are drawn from it"
OWN = "None: PyTorch's own generator"
LAYERS = "It has two `nn.Linear`"


def bottleneck_cases(draw: Draw) -> Iterator[Case]:
    # At this x the two kinds of gelu differ most, and only a single number passes through one.
    one: dict[str, Data] = {"down": [1.0], "up": [1.0], "biases": [0.0, 0.0], "x": torch.tensor([-2.2])}
    first, gelu = "x + W_up gelu(W_down x + b) + b'", "The gelu is GPT-2's"
    one |= {"n_embd": 1, "width": 1, "what": FORWARD}
    yield Case("d = 1, width 1, both weights 1: x = -2.2", one, FORWARD, (gelu, first))
    for n_embd, width, shape, *sentences in (
        (4, 2, (), first, LAYERS),
        (3, 5, (2, 3), first, "(..., d) to (..., d)", LAYERS),
    ):
        given: dict[str, Data] = {"n_embd": n_embd, "width": width, "what": FORWARD}
        given |= {"down": draw.normal(width, n_embd), "up": draw.normal(n_embd, width)}
        given |= {"biases": draw.normal(width + n_embd), "x": draw.normal(*shape, n_embd)}
        name = f"d = {n_embd}, width {width}, x of shape {(*shape, n_embd)}"
        yield Case(name, given, FORWARD, tuple(sentences))
    sentences = ["Both weights are initialised from a normal", "Both biases start at 0"]
    yield from start_cases(draw, *sentences)


def start_cases(draw: Draw, *sentences: str) -> Iterator[Case]:
    for n_embd, width, own in ((128, 24, False), (48, 60, False), (128, 24, True)):
        given: dict[str, Data] = {"n_embd": n_embd, "width": width, "what": START, "seed": draw.integer(0, 10**6)}
        name = "generator=None" if own else f"a new adapter, d = {n_embd}, width {width}"
        yield Case(name, given | {"own": own}, START, (OWN,) if own else (*sentences, DRAWN))


def parallel_cases(draw: Draw) -> Iterator[Case]:
    first, reads = "`s W_up relu(W_down x)`", "`forward` reads it from the attribute"
    number = "a positive number that is not trained"
    for n_embd, width, scaling, shape, later, *sentences in (
        (2, 2, 1.0, (), None, first, LAYERS, "without adding x"),
        (4, 3, 4.0, (3,), None, first, reads, number),
        (3, 5, 0.5, (2, 3), None, "without adding x", first, LAYERS),
        (3, 4, 1.0, (2,), 0.25, reads),
    ):
        given: dict[str, Data] = {"n_embd": n_embd, "width": width, "scaling": scaling, "what": FORWARD}
        given |= {"down": draw.normal(width, n_embd), "up": draw.normal(n_embd, width), "later": later}
        # Both signs before the relu, whatever was drawn.
        x = draw.normal(*shape, n_embd)
        name = f"d = {n_embd}, width {width}, s = {scaling:g}" + (f", then set to {later:g}" if later else "")
        yield Case(name, given | {"x": torch.stack([x, -x])}, FORWARD, tuple(map(str, sentences)))
    for case in start_cases(draw, "`up` starts at zero", "initialised uniformly"):
        yield Case(case.name, {**case.inputs, "scaling": draw.choice((1.0, 4.0))}, START, case.sentences)


# --- AdapterBeside -----------------------------------------------------------------------------------


def beside_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, *shape: int, sentences: tuple[str, ...], others: Sequence[Tensor | None] = ()) -> Case:
        d = shape[-1]
        given: dict[str, Data] = {"base": draw.normal(d, d), "adapter": draw.normal(d, d), "x": draw.normal(*shape)}
        return Case(name, given | {"others": list(others)}, sentences=sentences)

    total, others = "returns the sum of their outputs", "are passed on to the base as they are"
    alone = "the adapter gets only x"
    yield case("one token, only x", 3, sentences=(total, "with the same input"))
    yield case("a batch", 2, 4, 3, sentences=(total, "Gradients flow through both"))
    mask, other = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 1.0])
    yield case("with a mask", 2, 3, others=[mask], sentences=(others, alone))
    yield case("with a mask and another argument", 2, 3, others=[other, draw.normal(3)], sentences=(others, alone))
    yield case("with None for the mask, and another argument", 2, 3, others=[None, draw.normal(3)], sentences=(others,))


# --- insert_adapters, remove_adapters ----------------------------------------------------------------


def insert_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, variant: str, *sentences: str, **more: Data) -> Case:
        given: dict[str, Data] = {"variant": variant, "width": draw.integer(3, 7), "seed": draw.integer(0, 10**6)}
        given |= {"ids": draw.integers(0, 10, 2, 4), "options": {}}
        return Case(name, given | more, part, sentences)

    places, layers, refused = "the places", "the layers", "invalid input"
    wrappers, own = 'an `AdapterBeside` for the variant "parallel"', "an adapter of its own"
    returned, draws = "The adapters, by the names", "draw from it one after the other"
    yield case(
        "pfeiffer, in all blocks",
        places,
        "pfeiffer",
        "Insert adapters into a GPT-2",
        wrappers,
        returned,
        "if empty, all of them",
    )
    yield case("houlsby, in all blocks", places, "houlsby", own, "the same object", draws, "for the initial values")
    yield case("parallel, s = 4", places, "parallel", wrappers, 's of the variant "parallel"', options={"scaling": 4.0})
    yield case("lin, around each block", places, "lin", "one of `PLACES`", wrappers)
    given: dict[str, Data] = {"frozen": True, "layers": [1]}
    half = "houlsby in block 1 only, a model that is half frozen"
    yield case(half, layers, "houlsby", "What was frozen stays frozen", "the blocks that get adapters", **given)
    yield case("parallel in blocks 0 and 2", layers, "parallel", "the blocks that get adapters", layers=[0, 2])
    kind = "have the dtype of the model and are on its device"
    yield case("pfeiffer in a float64 model", layers, "pfeiffer", kind, dtype="float64")
    yield case("pfeiffer in a model on the device meta", layers, "pfeiffer", kind, meta=True)
    limit = "both included"
    yield case("a bottleneck as wide as the model", layers, "pfeiffer", limit, width=TINY.n_embd)
    yield case("a bottleneck of width 1", layers, "pfeiffer", limit, width=1)
    error, unchanged = "the width is out of range", "The model is then unchanged"
    wide = case("a bottleneck wider than the model", refused, "pfeiffer", error, unchanged, width=TINY.n_embd + 1)
    yield wide
    yield case("a width of 0", refused, "pfeiffer", error, unchanged, width=0)
    yield case("a variant that does not exist", refused, "serial", error, unchanged)
    yield case("a layer that does not exist", refused, "houlsby", error, unchanged, layers=[0, TINY.n_layer])


def remove_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, *variants: str, sentences: tuple[str, ...], layers: Sequence[int] = ()) -> Case:
        given: dict[str, Data] = {"variants": list(variants), "layers": list(layers), "seed": draw.integer(0, 10**6)}
        return Case(name, given | {"ids": draw.integers(0, 10, 2, 4)}, part, sentences)

    one, more = "one kind", "more than once"
    replaced, several = "is replaced by its `base`", "may have been inserted several times"
    yield case("pfeiffer in block 1", one, "pfeiffer", layers=[1], sentences=("Remove, in place", replaced))
    yield case("houlsby in all blocks", one, "houlsby", sentences=(replaced,))
    yield case("parallel", one, "parallel", sentences=(replaced,))
    yield case("one around each whole block", one, "lin", sentences=(replaced,))
    yield case("no adapters at all", one, sentences=("A model without adapters",))
    both = (several, "all are removed")
    yield case("two adapters in a row", more, "pfeiffer", "pfeiffer", sentences=both)
    yield case("houlsby, and then one around each whole block", more, "houlsby", "lin", sentences=both)
    yield case("pfeiffer, parallel, two around each block", more, "pfeiffer", "parallel", "lin", "lin", sentences=both)


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        adapter_parameter_count,
        idea="what adapters cost",
        difficulty=2,
        minutes=6,
        points=2,
        hints=(
            "Count one adapter first. How many matrices does it have, of what shapes, and how long are its two biases?",
            "The bias of the down projection is as long as its output; the same is true of the up projection.",
            "Multiply the parameters of one adapter by the number of adapters. Add the LayerNorms, which have their "
            "own count: each has a gain and a shift for each of the d numbers.",
        ),
        cases=count_cases,
        tolerance=0,
        explain=explain_count,
        background=("n_embd: d", "width: w", "have a formula"),
    ),
    Exercise(
        BottleneckAdapter,
        idea="the bottleneck",
        difficulty=3,
        minutes=12,
        points=4,
        hints=(
            "Two `nn.Linear`, named as in the docstring. `forward`: down, nonlinearity, up, and then do not lose the "
            "input.",
            "Initialisation: PyTorch has already drawn numbers for the layers, which are far too large. Overwrite the "
            "weights and the biases.",
            "`nn.init.trunc_normal_(weight, std=..., a=..., b=..., generator=generator)`: a and b are the absolute "
            "bounds. Use `nn.init.zeros_` for the biases; `F.gelu` has an argument `approximate`.",
        ),
        cases=bottleneck_cases,
        probe=run_adapter,
        agree=same_adapter,
        explain=explain_adapter,
        background=("n_embd: d, the width of input", "width: the width of the bottleneck"),
    ),
    Exercise(
        ParallelAdapter,
        idea="the bottleneck",
        difficulty=2,
        minutes=8,
        points=3,
        blank=("__init__", "forward"),
        hints=(
            "It is the bottleneck again, with three things missing and one added. Which ones?",
            "No biases: `nn.Linear` has an argument for that. One of the two weights starts at zero; which one does "
            "the docstring name?",
            "`nn.init.kaiming_uniform_(weight, a=..., generator=generator)`. In `forward`, the relu is between the "
            "two layers, and the scaling multiplies the whole result once.",
        ),
        cases=parallel_cases,
        probe=run_adapter,
        agree=same_adapter,
        explain=explain_adapter,
        background=("n_embd: d, the width of input", "width: the width of the bottleneck"),
    ),
    Exercise(
        AdapterBeside,
        idea="adapters in a model",
        difficulty=1,
        minutes=4,
        points=1,
        hints=(
            "Draw both: x goes into the base, and x goes into the adapter. Where do the two paths meet?",
            "The adapter must not see the base's output. The base must get everything that the wrapper was called "
            "with.",
            "`*others` in a call passes on whatever came in as `*others`. `AdapterAfter`, from which the class "
            "inherits, sets `self.base` and `self.adapter`.",
        ),
        cases=beside_cases,
        probe=run_beside,
        explain=explain_beside,
    ),
    Exercise(
        insert_adapters,
        idea="adapters in a model",
        difficulty=4,
        minutes=15,
        points=4,
        hints=(
            "First check the arguments, then loop over the places. In the loop: get the module, create an adapter, "
            "wrap the two, and put the wrapper in the module's place.",
            "`adapter_places` rejects a wrong variant and a wrong layer; you check the width. "
            "`model.get_submodule(name)` returns a module.",
            "Create the adapter inside the loop: `new_adapter(variant, d, width, scaling, generator)`, then "
            "`.to(device, dtype)` of any parameter of the model. Return adapters, not wrappers.",
        ),
        cases=insert_cases,
        probe=run_insert,
        explain=explain_inserted,
        background=("`adapter_places(n_layer, variant, layers)` lists",),
    ),
    Exercise(
        remove_adapters,
        idea="adapters in a model",
        difficulty=3,
        minutes=10,
        points=3,
        hints=(
            "Iterate over `model.named_modules()`, look for the wrappers, and replace each of them by its `base`.",
            "`isinstance` finds both kinds of wrapper. Make a list of what you found before you change anything: do "
            "not modify the tree while you iterate over it.",
            "If a wrapper is inside another one, its name begins with the name of the outer one, and is valid only as "
            "long as that one is there. `named_modules` gives the outer ones first. In which order do you have to "
            "remove them?",
        ),
        cases=remove_cases,
        probe=run_remove,
        explain=explain_removed,
        background=("`replace_module(model, name, module)` puts",),
    ),
]

PREDICTIONS = [
    Prediction(
        "both_weights_zero",
        question=(
            "The safest initialisation seems to be a bottleneck in which *everything* is zero, both weights and both "
            "biases: then the adapted model is exactly the pretrained one. You train such adapters for some steps. "
            "What happens to the loss on the task?"
        ),
        choices={
            "a": "it does not change: at zero every gradient is zero",
            "b": "it falls, but the adapters learn nothing that depends on their input",
            "c": "it falls as with small random weights: Adam makes up for small gradients",
        },
        answer="b",
        explanation=(
            "The gradient of W_up contains the factor h = gelu(W_down x + b), which is zero, and the gradients of "
            "W_down and b contain the factor W_up, which is zero too. So these three stay at zero for ever. But the "
            "last bias, b', is added to the output whatever h is, so it does get a gradient. All that is left of the "
            "adapter is one constant vector per place. The loss falls all the same, which is a warning: a falling loss "
            "does not show that your code works."
        ),
        replies={
            "a": "All gradients but one are zero.",
            "c": "Adam makes up for gradients that are small, not for gradients that are exactly zero.",
        },
        measured="32 steps of 8 cards on the bundled GPT-2, seed 0",
        idea="the bottleneck",
    ),
    Prediction(
        "time_of_adapters",
        question=(
            "Hu et al. put adapters after the attention and after the MLP of every block of GPT-2 medium (Adapter-H): "
            "11 M weights in addition to 355 M, so about 3 % more operations per token. How much longer does a forward "
            "pass take with them, on their GPU, for one text of 128 tokens?"
        ),
        choices={
            "a": "about 3 %: the time follows the operations",
            "b": "about 30 %",
            "c": "no longer: adapters are so small that they run in otherwise idle time",
        },
        answer="b",
        explanation=(
            "30.3 % (Hu et al. 2021, table 1). With one short text the GPU is not busy: the time is spent starting one "
            "operation after another, and each of an adapter's four has to wait for the previous one. A tiny operation "
            "takes as long to start as a large one. For 32 texts of 512 tokens the same table has 3.0 %: there the "
            "operations themselves take the time."
        ),
        replies={
            "a": "The time follows the operations only when the GPU is kept busy, as by a large batch.",
            "c": (
                "They find no idle time: an adapter waits for the part before it, and the part after it waits "
                "for the adapter."
            ),
        },
        idea="what adapters cost",
    ),
]
