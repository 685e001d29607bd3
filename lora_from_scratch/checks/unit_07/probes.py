"""Unit 07, adapters: what the checks observe of an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.adapters import insert_adapters

START, FORWARD = "the start", "what it computes"
DISTINCT = 0.98  # of many random numbers in float32, a few may be equal by chance
TINY = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=3, n_head=2)
DTYPES = {"float32": torch.float32, "float64": torch.float64}

# --- BottleneckAdapter, ParallelAdapter --------------------------------------------------------------


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
    own: bool = False,
    later: float | None = None,
    **options: float,
) -> Any:
    """A new adapter for a seed, or what one computes with given weights.

    Args:
        own: the seed is that of PyTorch's own generator.
        later: a scaling that is set when the adapter has been made.
    """
    if what == START:
        return seen_of_start(lambda g: answer(n_embd, width, **options, generator=g), n_embd, seed, own)
    adapter = answer(n_embd, width, **options)
    if later is not None:
        adapter.scaling = later
    parameters = dict(adapter.named_parameters())
    given = {"down.weight": down, "up.weight": up}
    if biases is not None:
        biases = torch.as_tensor(biases)
        given |= {"down.bias": biases[:width], "up.bias": biases[width:]}
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name in given:
                parameter.copy_(torch.as_tensor(given[name]).reshape(parameter.shape))
    x.requires_grad_()
    y = adapter(x)
    names = sorted(parameters)
    learned = [*(parameters[n] for n in names), x]
    gained: Sequence[Tensor | None] = [None for _ in learned]
    if isinstance(y, Tensor) and y.requires_grad:
        gained = torch.autograd.grad(y.square().sum() / 2, learned, allow_unused=True)
    added = y.detach() - x.detach() if isinstance(y, Tensor) and y.shape == x.shape else None
    gradients = dict(zip([*names, "x"], gained, strict=True))
    return {"parameters": names, "y": y, "y - x": added, "gradients": gradients}


def seen_of_start(make: Callable[[Any], Any], n_embd: int, seed: int, own: bool) -> Any:
    """The initial values for one seed, the same seed again, another, and the next of a generator; what learns."""

    def at(s: int) -> Any:
        if own:
            torch.manual_seed(s)
        return None if own else torch.Generator().manual_seed(s)

    first, again, other = make(at(seed)), make(at(seed)), make(at(seed + 1))
    generator = at(seed)
    make(generator)
    following = make(generator)
    values, repeated, others, next_ones = (
        [p.detach() for p in a.parameters()] for a in (first, again, other, following)
    )
    y = first(torch.randn(4, n_embd, generator=torch.Generator().manual_seed(seed)))
    y.sum().backward()
    random = [p for p in values if p.ndim == 2 and p.any()]
    return {
        "parameters": {name: p.requires_grad for name, p in first.named_parameters()},
        "gradients": {n: p.grad is not None and bool(p.grad.any()) for n, p in first.named_parameters()},
        "distinct": all(len(p.unique()) > DISTINCT * p.numel() for p in random),
        "repeated": all(map(torch.equal, values, repeated)),
        "other seed": not all(map(torch.equal, values, others)),
        "following": not all(map(torch.equal, values, next_ones)),
        "values": {name: p.detach() for name, p in first.named_parameters()},
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
        y = torch.sin(x @ self.weight)
        y = y if mask is None else y * mask
        return y if shift is None else y + shift


class Bend(nn.Module):
    """Called like an adapter: x and nothing else."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).clamp(min=0)


def run_beside(
    answer: Callable[..., Any], base: Tensor, adapter: Tensor, x: Tensor, others: list[Tensor | None]
) -> Any:
    """The result, the gradients of x and of both modules, and whether these are kept."""
    left, right = Masked(base), Bend(adapter)
    both = answer(left, right)
    x.requires_grad_()
    y = both(x, *others)
    gradients: Sequence[Tensor | None] = (None, None, None)
    if isinstance(y, Tensor) and y.requires_grad:
        gradients = torch.autograd.grad(y.square().sum(), [left.weight, right.weight, x], allow_unused=True)
    return {"y": y, "kept": both.base is left and both.adapter is right, "gradients": list(gradients)}


# --- insert_adapters, remove_adapters ----------------------------------------------------------------


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
    meta: bool = False,
) -> Any:
    """What the model computes with adapters that do something, where they are, and what is trained."""

    def model_before() -> GPT2:
        model = tiny_gpt2(seed, dtype)
        if frozen:
            model.transformer.h[0].requires_grad_(False)
        return model.to("meta") if meta else model

    def insert(model: GPT2) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return answer(model, width, variant, layers=tuple(layers), generator=generator, **options)

    model = model_before()
    modules, plain = dict(model.named_modules()), {name for name, _ in model.named_parameters()}
    try:
        adapters = insert(model)
    except ValueError:
        return {"refused": True, "unchanged": dict(model.named_modules()) == modules}
    found = adapters if isinstance(adapters, dict) else {}
    there = {id(module) for module in model.modules()}
    seen = {
        "refused": False,
        "returned": "dict" if isinstance(adapters, dict) else type(adapters).__name__,
        "found under": sorted(map(str, found)),
        "in the model": {str(name): id(adapter) in there for name, adapter in found.items()},
        "number of them": len({id(adapter) for adapter in found.values()}),
        "shapes": {str(n): {m: list(p.shape) for m, p in a.named_parameters()} for n, a in found.items()},
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
        "devices": sorted({str(p.device) for p in model.parameters()}),
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "bases": all(any(m is base for m in model.modules()) for base in modules.values()),
    }
    if meta:
        return seen
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    again = model_before()
    insert(again)
    seen["the same again"] = all(torch.equal(p, first[name]) for name, p in again.named_parameters())
    starts = [torch.cat([p.detach().flatten() for p in a.parameters()]) for a in found.values()]
    seen["different starts"] = not any(torch.equal(starts[0], other) for other in starts[1:])
    liven(model, plain)
    with torch.no_grad():
        return seen | {"y": model(ids)}


def run_remove(answer: Callable[..., Any], variants: list[str], layers: list[int], seed: int, ids: Tensor) -> Any:
    """Whether the model computes the same as before, and consists of the same objects under the same names."""
    model = tiny_gpt2(seed)
    before, plain = dict(model.named_modules()), {name for name, _ in model.named_parameters()}
    for variant in variants:
        insert_adapters(model, 3, variant, layers=tuple(layers))
    liven(model, plain)
    answer(model)
    after = dict(model.named_modules())
    with torch.no_grad():
        return {
            "names": sorted(after),
            "the same object": {name: after.get(name) is module for name, module in before.items()},
            "y": model(ids),
        }
