"""Unit 07, adapters: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data, Seen
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
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
    def case(name: str, n_embd: int, width: int, **more: Data) -> Case:
        return Case(name, {"n_embd": n_embd, "width": width} | more)

    yield case("1024 -> 24 -> 1024, only the two matrices", 1024, 24, bias=False)
    yield case("the same with its biases", 1024, 24)
    yield case("two in each of 24 blocks", 1024, draw.integer(8, 200), adapters=48)
    yield case("one in each of 24 blocks, each with a LayerNorm", 1024, draw.integer(3, 9), adapters=24, norms=24)
    d, width, adapters = draw.integer(10, 60), draw.integer(2, 9), draw.integer(2, 9)
    yield case("LayerNorms in half of the places, no biases", d, width, adapters=2 * adapters, bias=False, norms=5)


# --- BottleneckAdapter, ParallelAdapter --------------------------------------------------------------

START, FORWARD = "the start", "what it computes"


def bottleneck_cases(draw: Draw) -> Iterator[Case]:
    # At this x the two kinds of gelu differ most, and only a single number passes through one.
    one: dict[str, Data] = {"down": [1.0], "up": [1.0], "biases": [0.0, 0.0], "x": torch.tensor([-2.2])}
    yield Case("d = 1, width 1, both weights 1: x = -2.2", one | {"n_embd": 1, "width": 1, "what": FORWARD}, FORWARD)
    for n_embd, width, shape in ((4, 2, ()), (3, 5, (2, 3))):
        given: dict[str, Data] = {"n_embd": n_embd, "width": width, "what": FORWARD}
        given |= {"down": draw.normal(width, n_embd), "up": draw.normal(n_embd, width)}
        given |= {"biases": draw.normal(width + n_embd), "x": draw.normal(*shape, n_embd)}
        yield Case(f"d = {n_embd}, width {width}, x of shape {(*shape, n_embd)}", given, FORWARD)
    yield from start_cases(draw)


def start_cases(draw: Draw) -> Iterator[Case]:
    for n_embd, width in ((128, 24), (48, 60)):
        given: dict[str, Data] = {"n_embd": n_embd, "width": width, "what": START, "seed": draw.integer(0, 10**6)}
        yield Case(f"a new adapter, d = {n_embd}, width {width}", given, START)


def parallel_cases(draw: Draw) -> Iterator[Case]:
    for n_embd, width, scaling, shape in ((2, 2, 1.0, ()), (4, 3, 4.0, (3,)), (3, 5, 0.5, (2, 3))):
        given: dict[str, Data] = {"n_embd": n_embd, "width": width, "scaling": scaling, "what": FORWARD}
        given |= {"down": draw.normal(width, n_embd), "up": draw.normal(n_embd, width)}
        # Both signs before the relu, whatever was drawn.
        x = draw.normal(*shape, n_embd)
        yield Case(f"d = {n_embd}, width {width}, s = {scaling:g}", given | {"x": torch.stack([x, -x])}, FORWARD)
    for case in start_cases(draw):
        yield Case(case.name, {**case.inputs, "scaling": draw.choice((1.0, 4.0))}, START)


def run_adapter(
    answer: Callable[..., Any],
    n_embd: int,
    width: int,
    what: str,
    down: Any = None,
    up: Any = None,
    biases: Any = None,
    x: Any = None,
    seed: int = 0,
    **options: float,
) -> Any:
    """A new adapter for a seed, or what one computes with given weights."""
    if what == START:
        return seen_of_start(lambda g: answer(n_embd, width, **options, generator=g), n_embd, seed)
    adapter = answer(n_embd, width, **options)
    parameters = dict(adapter.named_parameters())
    given = {"down.weight": down, "up.weight": up}
    if biases is not None:
        biases = torch.as_tensor(biases)
        given |= {"down.bias": biases[:width], "up.bias": biases[width:]}
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name in given:
                parameter.copy_(torch.as_tensor(given[name]).reshape(parameter.shape))
    y = adapter(x)
    names = sorted(parameters)
    gradients = torch.autograd.grad(y.square().sum() / 2, [parameters[n] for n in names], allow_unused=True)
    gained = dict(zip(names, gradients, strict=True))
    return {"y": y, "y - x": y.detach() - x, "gradients": gained}


def seen_of_start(make: Callable[[torch.Generator | None], Any], n_embd: int, seed: int) -> Any:
    """The initial values for one seed, for the same seed again and for another one; which ones get a gradient."""
    first, again, other = (make(torch.Generator().manual_seed(s)) for s in (seed, seed, seed + 1))
    values, repeated, others = ([p.detach() for p in a.parameters()] for a in (first, again, other))
    y = first(torch.randn(4, n_embd, generator=torch.Generator().manual_seed(seed)))
    y.sum().backward()
    return {
        "values": {name: p.detach() for name, p in first.named_parameters()},
        "the same again": all(map(torch.equal, values, repeated)),
        "another seed differs": not all(map(torch.equal, values, others)),
        "gets a gradient": {n: p.grad is not None and bool(p.grad.any()) for n, p in first.named_parameters()},
    }


def same_adapter(case: Case, seen: Seen, expected: Seen) -> bool:
    """At initialisation the numbers may differ, but not their shapes or their distribution."""
    one, other = seen.value, expected.value
    if case.inputs["what"] == FORWARD:
        return same(one, other)
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    if any(one[key] != other[key] for key in other if key != "values"):
        return False
    values, wanted = one["values"], other["values"]
    assert isinstance(values, dict)
    assert isinstance(wanted, dict)
    return values.keys() == wanted.keys() and all(_same_spread(values[name], wanted[name]) for name in wanted)


def _same_spread(one: Any, other: Any) -> bool:
    if one.shape != other.shape or one.dtype not in (torch.float32, torch.float64):
        return False
    one, other = one.double(), other.double()
    largest, deviation = float(other.abs().max()), float(other.std())
    if largest == 0 or float(one.abs().max()) == 0:
        return largest == float(one.abs().max())
    return (
        abs(float(one.abs().max()) / largest - 1) < 0.04
        and abs(float(one.std()) / deviation - 1) < 0.09
        and abs(float(one.mean() - other.mean())) < 0.2 * deviation
    )


# --- AdapterBeside -----------------------------------------------------------------------------------


class Masked(nn.Module):
    """Called like an attention: x, and optionally a mask and a second argument, which change the result."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, mask: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        y = torch.tanh(x @ self.weight)
        y = y if mask is None else y * mask
        return y if shift is None else y + shift


class Bend(nn.Module):
    """Called like an adapter: x and nothing else."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).clamp(min=0)


def beside_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, *shape: int, others: Sequence[Tensor] = ()) -> Case:
        d = shape[-1]
        given: dict[str, Data] = {"base": draw.normal(d, d), "adapter": draw.normal(d, d), "x": draw.normal(*shape)}
        return Case(name, given | {"others": list(others)})

    yield case("one token, only x", 3)
    yield case("a batch", 2, 4, 3)
    yield case("with a mask", 2, 3, others=[torch.tensor([1.0, 0.0, 0.0])])
    yield case("with a mask and another argument", 2, 3, others=[torch.tensor([0.0, 1.0, 1.0]), draw.normal(3)])


def run_beside(answer: Callable[..., Any], base: Tensor, adapter: Tensor, x: Tensor, others: list[Tensor]) -> Any:
    """The result, and the gradients of both modules."""
    both = answer(Masked(base), Bend(adapter))
    y = both(x, *others)
    weights = [both.base.weight, both.adapter.weight]
    return {"y": y, "gradients": list(torch.autograd.grad(y.square().sum(), weights, allow_unused=True))}


# --- insert_adapters, remove_adapters ----------------------------------------------------------------

TINY = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def tiny_gpt2(seed: int, dtype: str = "float32") -> GPT2:
    """A model of a few hundred numbers, all of them random."""
    generator = torch.Generator().manual_seed(seed)  # does not touch PyTorch's global generator
    model = GPT2(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return model.to(DTYPES[dtype]).eval()


def liven(model: nn.Module, before: set[str]) -> None:
    """Give every adapter parameter a value large enough to matter, the same one for the same name."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.replace(".base.", ".") not in before:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))


def insert_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, variant: str, **more: Data) -> Case:
        given: dict[str, Data] = {"variant": variant, "width": draw.integer(3, 7), "seed": draw.integer(0, 10**6)}
        given |= {"ids": draw.integers(0, 10, 2, 4), "options": {}}
        return Case(name, given | more, part)

    yield case("pfeiffer, in all blocks", "the places", "pfeiffer")
    yield case("houlsby, in all blocks", "the places", "houlsby")
    yield case("parallel, s = 4", "the places", "parallel", options={"scaling": 4.0})
    yield case("houlsby in block 1 only, a model that is half frozen", "the layers", "houlsby", frozen=True, layers=[1])
    yield case("pfeiffer in a float64 model", "the layers", "pfeiffer", dtype="float64")
    yield case("a bottleneck wider than the model", "what is refused", "pfeiffer", width=9)
    yield case("a variant that does not exist", "what is refused", "serial")


def run_insert(
    answer: Callable[..., Any],
    variant: str,
    width: int,
    seed: int,
    ids: Tensor,
    options: dict[str, float],
    layers: Sequence[int] = (),
    dtype: str = "float32",
    frozen: bool = False,
) -> Any:
    """What the model computes with adapters that do something, where they are, and what is trained."""

    def inserted() -> tuple[GPT2, Any]:
        model = tiny_gpt2(seed, dtype)
        if frozen:
            model.transformer.h[0].requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        return model, answer(model, width, variant, layers=tuple(layers), generator=generator, **options)

    plain = tiny_gpt2(seed, dtype)
    model, adapters = inserted()
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    again = inserted()[0]
    liven(model, {name for name, _ in plain.named_parameters()})
    there = {id(module) for module in model.modules()}
    found = adapters if isinstance(adapters, dict) else {}
    with torch.no_grad():
        return {
            "y": model(ids),
            "found under": sorted(map(str, found)),
            "in the model": {str(name): id(adapter) in there for name, adapter in found.items()},
            "number of them": len({id(adapter) for adapter in found.values()}),
            "shapes": {str(n): {m: list(p.shape) for m, p in a.named_parameters()} for n, a in found.items()},
            "trained": {name: p.requires_grad for name, p in model.named_parameters()},
            "the same again": all(torch.equal(p, first[name]) for name, p in again.named_parameters()),
        }


def remove_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, *variants: str, layers: Sequence[int] = ()) -> Case:
        given: dict[str, Data] = {"variants": list(variants), "layers": list(layers), "seed": draw.integer(0, 10**6)}
        return Case(name, given | {"ids": draw.integers(0, 10, 2, 4)}, part)

    yield case("pfeiffer in block 1", "one kind", "pfeiffer", layers=[1])
    yield case("houlsby in all blocks", "one kind", "houlsby")
    yield case("parallel", "one kind", "parallel")
    yield case("no adapters at all", "one kind")
    yield case("two adapters in a row", "more than once", "pfeiffer", "pfeiffer")
    yield case("houlsby, and then one around each whole block", "more than once", "houlsby", "lin")


def run_remove(answer: Callable[..., Any], variants: list[str], layers: list[int], seed: int, ids: Tensor) -> Any:
    """Whether the model computes the same as before, and consists of the same objects under the same names."""
    model = tiny_gpt2(seed)
    before = dict(model.named_modules())
    for variant in variants:
        insert_adapters(model, 3, variant, layers=tuple(layers))
    liven(model, {name for name, _ in tiny_gpt2(seed).named_parameters()})
    answer(model)
    after = dict(model.named_modules())
    with torch.no_grad():
        return {
            "y": model(ids),
            "names": sorted(after),
            "the same object": {name: after.get(name) is module for name, module in before.items()},
        }


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
