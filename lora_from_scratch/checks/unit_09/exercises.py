"""Unit 09, LoRA: what is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data, Seen
from lora_from_scratch.gpt2.model import Conv1D
from lora_from_scratch.methods.lora import (
    FusedLoRALinear,
    LoRALinear,
    delta_weight,
    initial_factors,
    inject_lora,
    lora_state_dict,
    mark_only_lora_as_trainable,
)
from lora_from_scratch.methods.placement import block_diagonal_B

TITLE = "LoRA"

# --- delta_weight ------------------------------------------------------------------------------------


def delta_cases(draw: Draw) -> Iterator[Case]:
    A, B = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0], [100.0]])
    yield Case("r = 1: 3 columns, 2 rows, s = 0.5", {"A": A, "B": B, "scaling": 0.5})
    for out, inputs, rank, scaling in ((4, 6, 2, 2.0), (3, 3, 3, 0.25), (7, 4, 3, 8.0)):
        factors: dict[str, Data] = {"A": draw.normal(rank, inputs), "B": draw.normal(out, rank), "scaling": scaling}
        yield Case(f"W is {out} x {inputs}, r = {rank}, s = {scaling:g}", factors)
    yield Case("s = 0", factors | {"scaling": 0.0})


def run_delta(answer: Callable[..., Any], A: Tensor, B: Tensor, scaling: float) -> Any:
    """The change, and the gradients that A and B would get (None: no gradient can flow)."""
    A.requires_grad_(True)
    B.requires_grad_(True)
    change = answer(A, B, scaling)
    return {"change": change, "gradients": gradients(change, [A, B])}


def gradients(y: Any, of: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of sum(y^2) / 2 + sum(y), a number that depends on every entry."""
    if not isinstance(y, Tensor) or not y.requires_grad:
        return [None for _ in of]
    return list(torch.autograd.grad(y.square().sum() / 2 + y.sum(), list(of), allow_unused=True))


# --- initial_factors ---------------------------------------------------------------------------------


def start_cases(draw: Draw) -> Iterator[Case]:
    def case(inputs: int, outputs: int, rank: int, part: str) -> Case:
        sizes = {"in_features": inputs, "out_features": outputs, "rank": rank, "seed": draw.integer(0, 10**6)}
        return Case(f"{inputs} to {outputs} features, r = {rank}", sizes, part)

    yield case(128, 96, 16, "the start")
    yield case(100, 300, 50, "the start")
    yield case(400, 60, 8, "the start")
    yield case(8, 5, 0, "what is refused")
    yield case(8, 5, 6, "what is refused")


def run_start(answer: Callable[..., Any], in_features: int, out_features: int, rank: int, seed: int) -> Any:
    """The factors of one seed, of the same seed again, of another seed and of PyTorch's global generator."""

    def start(seed: int | None) -> list[Tensor]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return list(answer(in_features, out_features, rank, generator))

    first, again, other, own = start(seed), start(seed), start(seed + 1), start(None)
    return {
        "A": first[0],
        "B": first[1],
        "the same again": all(map(torch.equal, first, again)),
        "another seed differs": not all(map(torch.equal, first, other)),
        "differs without a generator": not all(map(torch.equal, first, own)),
    }


def same_start(case: Case, seen: Seen, expected: Seen) -> bool:
    """The values may differ, but not their shapes and their distribution. A has at least 2,000 values."""
    one, other = seen.value, expected.value
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    if any(one[key] != other[key] for key in other if key not in ("A", "B")):
        return False
    return all(_same_spread(one[key], other[key]) for key in ("A", "B"))


def explain_start(case: Case, seen: Seen, expected: Seen) -> tuple[str, str] | None:
    """A message about random values, which cannot be checked by hand."""
    assert isinstance(seen.value, dict)
    A, inputs = seen.value["A"], case.inputs["in_features"]
    assert isinstance(A, Tensor)
    assert isinstance(inputs, int)
    bound = inputs**-0.5
    if A.isfinite().all() and float(A.abs().max()) > 1.02 * bound:
        return "beyond the bound", (
            f"A has entries beyond 1/sqrt(in) = {bound:.3g}. It should contain uniform random numbers between "
            "-1/sqrt(in) and 1/sqrt(in), not Gaussian ones."
        )
    return None


def _same_spread(one: Any, other: Any) -> bool:
    if one.shape != other.shape or one.dtype not in (torch.float32, torch.float64):
        return False
    one, other = one.double(), other.double()
    largest, deviation = float(other.abs().max()), float(other.std())
    if largest == 0 or float(one.abs().max()) == 0:
        return largest == float(one.abs().max())
    return (
        abs(float(one.abs().max()) / largest - 1) < 0.02
        and abs(float(one.std()) / deviation - 1) < 0.08
        and abs(float(one.mean() - other.mean())) < 0.2 * deviation
    )


# --- LoRALinear --------------------------------------------------------------------------------------

LINEAR, CONV1D = "Linear", "Conv1D"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def layer_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, kind: str, inputs: int, outputs: int, rank: int, what: str, **more: Any) -> Case:
        alpha = draw.choice((6.0, 10.0))
        given: dict[str, Data] = {"kind": kind, "weight": draw.normal(outputs, inputs), "bias": draw.normal(outputs)}
        given |= {"A": draw.normal(rank, inputs), "B": draw.normal(outputs, rank), "alpha": alpha}
        return Case(name, given | {"x": draw.normal(*more.pop("batch", (2, 3)), inputs), "what": what} | more, part)

    yield case("a Linear at initialisation, B = 0", "forward", LINEAR, 4, 3, 2, "start")
    yield case("a Linear with trained A and B", "forward", LINEAR, 4, 3, 2, "forward")
    yield case("a Conv1D, one token", "forward", CONV1D, 3, 6, 3, "forward", batch=())
    yield case("dropout on the input of A", "forward", LINEAR, 15, 2, 1, "dropout")
    yield case("merging a square Conv1D", "merge", CONV1D, 4, 4, 2, "merge")
    yield case("merging a Linear with 5 inputs and 3 outputs", "merge", LINEAR, 5, 3, 2, "merge")
    yield case("merging a Linear twice", "merge", LINEAR, 3, 5, 3, "merge", times=2)
    # Sums and products of these numbers are exact in float32, so the only rounding is the one to bfloat16.
    exact: dict[str, Any] = {"weight": draw.integers(-200, 200, 16, 16) / 64, "dtype": "bfloat16"}
    exact |= {"A": draw.integers(1, 63, 2, 16) / 32, "B": draw.integers(1, 63, 16, 2) / 32}
    yield case("merging a bfloat16 Linear", "merge", LINEAR, 16, 16, 2, "merge", **exact)
    yield case("a bfloat16 Linear, merged and unmerged", "unmerge", LINEAR, 16, 16, 2, "back", dtype="bfloat16")
    yield case("a Conv1D, merged and unmerged five times", "unmerge", CONV1D, 8, 12, 2, "back", times=5)
    yield case("unmerge without merge", "unmerge", LINEAR, 4, 3, 2, "back", times=0)


def run_layer(
    answer: Callable[..., Any],
    kind: str,
    weight: Tensor,
    bias: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float,
    x: Tensor,
    what: str,
    times: int = 1,
    dtype: str = "float32",
) -> Any:
    """Make a layer from plain data, and observe one of the things that it has to do."""
    base = plain_layer(kind, weight, bias).to(dtype=DTYPES[dtype])
    layer = answer(base, len(A), alpha, dropout=0.5 if what == "dropout" else 0.0)
    if what == "start":
        y = layer(x)
        return {"y": y, "gradients": gradients(y, [layer.lora_A, layer.lora_B])}
    with torch.no_grad():
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    if what == "forward":
        y = layer(x)
        return {"y": y, "gradients": gradients(y, [layer.lora_A, layer.lora_B]), "W": base.weight}
    if what == "dropout":
        return seen_of_dropout(layer)
    return seen_of_merging(layer, x.to(DTYPES[dtype]), times) if what == "merge" else seen_of_return(layer, times)


def plain_layer(kind: str, weight: Tensor, bias: Tensor) -> nn.Module:
    """A Linear or a Conv1D with that weight (out, in) and that bias."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs) if kind == LINEAR else Conv1D(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(weight if kind == LINEAR else weight.T)
        layer.bias.copy_(bias)
    return layer


@torch.no_grad()
def seen_of_dropout(layer: Any) -> Any:
    """With A = B = x = 1 each row's change is s times how many of its 15 inputs are kept, doubled."""
    layer.lora_A.fill_(1)
    layer.lora_B.fill_(1)
    x = torch.ones(64, 15)
    layer.train()
    halved = (layer(x) - layer.base(x)) / layer.scaling / 2
    counts = halved.round().clamp(0, 15)
    layer.eval()
    return {
        "in training": {
            "each counts twice or not at all": bool((halved - counts).abs().max() < 1e-2),
            "nothing is dropped": bool((halved - 7.5).abs().max() < 1e-2),
            "rows that differ": min(3, len(counts[:, 0].unique())),
        },
        "in evaluation": layer(x),
    }


def seen_of_merging(layer: Any, x: Tensor, times: int) -> Any:
    parameter = layer.base.weight
    for _ in range(times):
        layer.merge()
    return {
        "y": layer(x),
        "W": layer.base.weight.clone(),
        "bias": layer.base.bias,
        "merged": bool(layer.merged),
        "the same parameter": layer.base.weight is parameter,
    }


def seen_of_return(layer: Any, times: int) -> Any:
    parameter = layer.base.weight
    before = parameter.detach().clone()
    moved = []
    for _ in range(times):
        layer.merge()
        moved.append(not torch.equal(layer.base.weight, before))
        layer.unmerge()
    layer.unmerge()
    with torch.no_grad():
        return {
            "merging changes W": all(moved),
            "every bit of W is back": torch.equal(layer.base.weight, before),
            "W is back but for rounding": bool((layer.base.weight - before).abs().max() < 0.3),
            "the same parameter": layer.base.weight is parameter,
            "merged": bool(layer.merged),
        }


# --- block_diagonal_B --------------------------------------------------------------------------------

QKV = ("q", "k", "v")


def block_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, parts: Sequence[str], all_parts: Sequence[str], width: int, rank: int) -> Case:
        B = draw.normal(len(parts) * width, rank)
        return Case(name, {"B": B, "parts": list(parts), "all_parts": list(all_parts)})

    counting = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    given: dict[str, Data] = {"B": counting, "parts": ["q", "v"], "all_parts": list(QKV)}
    yield Case("r = 1 on q and v, each 2 wide: 1, 2 for q and 3, 4 for v", given)
    yield case("r = 2 on q and v, each 3 wide", ("q", "v"), QKV, 3, 2)
    yield case("r = 2 on k alone", ("k",), QKV, 4, 2)
    yield case("r = 3 on k and v", ("k", "v"), QKV, 4, 3)
    yield case("r = 2 on all three", QKV, QKV, 3, 2)
    yield case("another fused layer: gate and up, r = 2 on up", ("up",), ("gate", "up"), 5, 2)


def run_blocks(answer: Callable[..., Any], B: Tensor, parts: list[str], all_parts: list[str]) -> Any:
    """The whole B, and the gradient that each part's B would get (None: no gradient can flow)."""
    B.requires_grad_(True)
    whole = answer(B, tuple(parts), tuple(all_parts))
    return {"whole": whole, "gradient": gradients(whole, [B])[0]}


# --- inject_lora -------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Small(nn.Module):
    """Two blocks and a head: names with dots, numbers in names, and a name without a dot."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x)
        return self.head(x)


def small_model(seed: int) -> Small:
    torch.manual_seed(seed)
    return Small()


def inject_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, names: Sequence[str], wrapped: bool = False) -> Case:
        given: dict[str, Data] = {
            "names": list(names),
            "wrapped": wrapped,
            "seed": draw.integer(0, 10**6),
            "x": draw.normal(2, 3),
        }
        return Case(name, given)

    yield case("h.1.attn", ["h.1.attn"])
    yield case("head, an attribute of the model itself", ["head"])
    yield case("h.0.mlp.2, in a Sequential", ["h.0.mlp.2"])
    yield case("three at once", ["h.0.attn", "h.1.mlp.0", "head"])
    yield case("LoRA layers that wrap the existing ones", ["h.0.mlp.0", "h.1.attn"], wrapped=True)
    yield case("none", [])


def run_inject(answer: Callable[..., Any], names: list[str], wrapped: bool, seed: int, x: Tensor) -> Any:
    """What the model computes afterwards, and which of its modules are new and which are old."""
    model = small_model(seed)
    before = dict(model.named_modules())
    layers: dict[str, nn.Module] = {}
    for name in names:
        old = before[name]
        assert isinstance(old, nn.Linear)
        layers[name] = lively_lora(old) if wrapped else nn.Linear(old.in_features, old.out_features)
    answer(model, dict(layers))
    there = dict(model.named_modules())
    return {
        "y": model(x),
        "names": sorted(there),
        "in its place": {name: there.get(name) is layer for name, layer in layers.items()},
        "as before": {name: there.get(name) is module for name, module in before.items() if name not in layers},
    }


def lively_lora(base: nn.Linear) -> LoRALinear:
    """A LoRA layer whose B is not zero."""
    layer = LoRALinear(base, 1)
    nn.init.normal_(layer.lora_B)
    return layer


# --- mark_only_lora_as_trainable, lora_state_dict ----------------------------------------------------


class Adapted(nn.Module):
    """LoRA layers among other layers, some of which only have similar names."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.h = nn.ModuleList([LoRALinear(nn.Linear(4, 4), 2), nn.Linear(4, 4)])
        self.exploration = nn.Linear(4, 3)
        self.lora_notes = nn.Linear(4, 2, bias=False)
        self.lora_A_scale = nn.Parameter(torch.ones(2))
        if fused:
            self.c_attn = FusedLoRALinear(Conv1D(4, 12), ("q", "v"), QKV, rank=1)
        self.out = LoRALinear(Conv1D(4, 6), 1)


MAKES: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: LoRALinear(nn.Linear(3, 4), 2),
    "a list": lambda: nn.ModuleList([LoRALinear(nn.Linear(3, 3), 1), nn.LayerNorm(3), LoRALinear(Conv1D(3, 2), 1)]),
    "a model": lambda: Adapted(),
    "a model with a fused layer": lambda: Adapted(fused=True),
    "no LoRA": lambda: nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)),
}


def model_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, made: str, trained: str) -> Case:
        return Case(name, {"made": made, "trained": trained, "seed": draw.integer(0, 10**6)})

    yield case("two LoRA layers and a LayerNorm, everything trained before", "a list", "all")
    yield case("a LoRA layer by itself", "one layer", "all")
    yield case("a model with other layers, everything trained before", "a model", "all")
    yield case("the same model, everything frozen before", "a model", "none")
    yield case("a model with a fused layer, some of it frozen before", "a model with a fused layer", "some")
    yield case("a model without LoRA", "no LoRA", "all")


def made_model(made: str, trained: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = MAKES[made]()
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.normal_()
            parameter.requires_grad_(trained == "all" or (trained == "some" and place % 3 == 0))
    return model


def run_mark(answer: Callable[..., Any], made: str, trained: str, seed: int) -> Any:
    """Which parameters are trained afterwards, and whether their values are unchanged."""
    model = made_model(made, trained, seed)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    answer(model)
    return {
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "values as before": {name: torch.equal(p, before[name]) for name, p in model.named_parameters()},
    }


def run_state(answer: Callable[..., Any], made: str, trained: str, seed: int) -> Any:
    """The tensors by name, which of them are attached to the graph, and whether the model is unchanged."""
    model = made_model(made, trained, seed)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    tensors = answer(model)
    if not isinstance(tensors, dict):
        return tensors
    return {
        "state": tensors,
        "in the graph": sorted(str(name) for name, t in tensors.items() if getattr(t, "requires_grad", False)),
        "the model as before": flags == {name: p.requires_grad for name, p in model.named_parameters()},
    }


def explain_state(case: Case, seen: Seen, expected: Seen) -> tuple[str, str] | None:
    """Which names are superfluous and which are missing: more helpful than "another dictionary"."""
    assert isinstance(seen.value, dict)
    assert isinstance(expected.value, dict)
    one, other = seen.value["state"], expected.value["state"]
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    extra, missing = [n for n in one if n not in other], [n for n in other if n not in one]
    if extra:
        return "too much", f"Your result contains {extra[0]!r}, which is neither an A nor a B of a LoRA layer."
    if missing:
        return "too little", f"{missing[0]!r} is missing: every A and every B has to be saved under its full name."
    different = [name for name in other if not same(one[name], other[name])]
    return (
        ("other values", f"{different[0]!r} is not the tensor that the model has under this name.")
        if different
        else None
    )


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
        explain=explain_start,
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
        cases=model_cases,
        probe=run_mark,
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
        cases=model_cases,
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
