"""Unit 09, LoRA: what is observed of an answer's factors and of its layer, and when two starts are alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.trial import trial
from lora_from_scratch.checks.unit_09.start_layers import LAYERS
from lora_from_scratch.gpt2.model import Conv1D

LINEAR, CONV1D = "Linear", "Conv1D"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
DISTINCT = 0.9  # the least share of random numbers that differ from all others


def gradients(y: Any, of: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of sum(y^2) / 2 + sum(y), a number that depends on every entry; None: none can flow."""
    if not isinstance(y, Tensor) or not y.requires_grad:
        return [None for _ in of]
    return list(torch.autograd.grad(y.square().sum() / 2 + y.sum(), list(of), allow_unused=True))


# --- delta_weight, block_diagonal_B ------------------------------------------------------------------


def run_delta(answer: Callable[..., Any], A: Tensor, B: Tensor, scaling: float) -> Any:
    """The change, and the gradients that A and B would get."""
    A.requires_grad_(True)
    B.requires_grad_(True)
    change = answer(A, B, scaling)
    return {"change": change, "gradients": dict(zip("AB", gradients(change, [A, B]), strict=True))}


def run_blocks(
    answer: Callable[..., Any], B: Tensor, parts: list[str], all_parts: list[str], meta: bool = False
) -> Any:
    """The whole B, its dtype, and the gradient that the parts' B would get."""
    B = (B.to("meta") if meta else B).requires_grad_(True)
    whole = answer(B, tuple(parts), tuple(all_parts))
    if not isinstance(whole, Tensor):
        return {"whole": whole}
    kind = {"dtype": str(whole.dtype).removeprefix("torch."), "device": str(whole.device)}
    if meta or whole.is_meta:
        return kind | {"shape": list(whole.shape)}
    return kind | {"whole": whole, "gradient": gradients(whole, [B])[0]}


# --- initial_factors ---------------------------------------------------------------------------------


def run_start(answer: Callable[..., Any], in_features: int, out_features: int, rank: int, seed: int) -> Any:
    """The factors of one seed; of the same seed again, of another seed, and of PyTorch's own generator."""

    def start(generator: torch.Generator | None) -> Any:
        return answer(in_features, out_features, rank, generator)

    def seeded(s: int) -> torch.Generator:
        return torch.Generator().manual_seed(s)

    def own(s: int) -> Any:
        torch.manual_seed(s)
        return start(None)

    one = seeded(seed)
    first, following = start(one), start(one)
    if not isinstance(first, tuple | list) or [isinstance(part, Tensor) for part in first] != [True, True]:
        return {"result": first}
    again, other = start(seeded(seed)), start(seeded(seed + 1))
    return {
        "A": first[0],
        "B": first[1],
        "the same seed": all(map(torch.equal, first, again)),
        "another seed": not all(map(torch.equal, first, other)),
        "the next draw": not all(map(torch.equal, first, following)),
        "PyTorch's generator, the same seed": all(map(torch.equal, own(seed), own(seed))),
        "PyTorch's generator, another seed": not all(map(torch.equal, own(seed), own(seed + 1))),
    }


def same_start(case: Case, seen: Seen, expected: Seen) -> bool:
    """The values may differ, but not their shapes, their dtype and their distribution. A has at least 2,000 values."""
    one, other = seen.value, expected.value
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    if one.keys() != other.keys() or any(one[key] != other[key] for key in other if key not in ("A", "B")):
        return False
    return all(same_spread(one[key], other[key]) for key in ("A", "B"))


def same_spread(one: Any, other: Any) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = one.double(), other.double()
    largest, deviation = float(other.abs().max()), float(other.std())
    if largest == 0 or float(one.abs().max()) == 0:
        return largest == float(one.abs().max())
    return (
        abs(float(one.abs().max()) / largest - 1) < 0.02
        and abs(float(one.std()) / deviation - 1) < 0.08
        and abs(float(one.mean() - other.mean())) < 0.2 * deviation
        and len(one.unique()) > DISTINCT * one.numel()
    )


# --- LoRALinear --------------------------------------------------------------------------------------


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
    rslora: bool = False,
) -> Any:
    """Make a layer from plain data, and observe one of the things that it has to do."""
    base = plain_layer(kind, weight, bias).to(dtype=DTYPES[dtype])
    layer = answer(base, len(A), alpha, dropout=0.5 if what == "dropout" else 0.0, rslora=rslora)
    x = x.to(DTYPES[dtype]).requires_grad_(what != "dropout")
    if what != "start":
        with torch.no_grad():
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
    return OBSERVE[what](layer, x, times)


def plain_layer(kind: str, weight: Tensor, bias: Tensor) -> nn.Module:
    """A Linear or a Conv1D with that weight (out, in) and that bias."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs) if kind == LINEAR else Conv1D(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(weight if kind == LINEAR else weight.T)
        layer.bias.copy_(bias)
    return layer


def seen_of_forward(layer: Any, x: Tensor, times: int) -> Any:
    """The output, the gradients of A, B and x, and whether the base is as it was."""
    before, base = layer.base.weight.detach().clone(), layer.base
    y = layer(x)
    return {
        "y": y,
        "gradients": dict(zip(("A", "B", "x"), gradients(y, [layer.lora_A, layer.lora_B, x]), strict=True)),
        "the base as before": layer.base is base and torch.equal(layer.base.weight, before),
    }


@torch.no_grad()
def seen_of_dropout(layer: Any, x: Tensor, times: int) -> Any:
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
    """The output and the gradient of x while merged, and the base's weight."""
    parameter, bias = layer.base.weight, layer.base.bias.detach().clone()
    for _ in range(times):
        layer.merge()
    y = layer(x)
    return {
        "W": layer.base.weight.detach().clone(),
        "dtype": str(layer.base.weight.dtype).removeprefix("torch."),
        "y": y,
        "gradient of x": gradients(y, [x])[0],
        "bias as before": torch.equal(layer.base.bias, bias),
        "merged": bool(layer.merged),
        "the same parameter": layer.base.weight is parameter,
    }


def seen_of_return(layer: Any, x: Tensor, times: int) -> Any:
    """Whether the base's weight is what it was after this many rounds of `merge` and `unmerge`."""
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
            "every bit of W is back": torch.equal(layer.base.weight.to(before.dtype), before),
            "W is back but for rounding": bool((layer.base.weight - before).abs().max() < 0.3),
            "the same parameter": layer.base.weight is parameter,
            "dtype": str(layer.base.weight.dtype).removeprefix("torch."),
            "merged": bool(layer.merged),
        }


def seen_of_move(layer: Any, x: Tensor, times: int) -> Any:
    """W0 after `merge`, a move of the module to float64, and `unmerge`."""
    before = layer.base.weight.detach().clone()
    layer.merge()
    layer.to(torch.float64)
    layer.unmerge()
    W = layer.base.weight.detach()
    return {"dtype": str(W.dtype).removeprefix("torch."), "W is back": torch.equal(W.double(), before.double())}


def seen_of_two_rounds(layer: Any, x: Tensor, times: int) -> Any:
    """The base's weight when the layer is merged a second time, after W0, A and B have changed; and W0 again."""
    layer.merge()
    layer.unmerge()
    with torch.no_grad():
        layer.base.weight.mul_(2)
        layer.lora_A.add_(1)
        layer.lora_B.sub_(1)
        second = layer.base.weight.detach().clone()
    layer.merge()
    W = layer.base.weight.detach().clone()
    layer.unmerge()
    return {"W when merged again": W, "the second W0 is back": torch.equal(layer.base.weight, second)}


OBSERVE: dict[str, Callable[[Any, Tensor, int], Any]] = {
    "start": seen_of_forward,
    "forward": seen_of_forward,
    "dropout": seen_of_dropout,
    "merge": seen_of_merging,
    "back": seen_of_return,
    "move": seen_of_move,
    "twice": seen_of_two_rounds,
}


# --- test_lora_start ---------------------------------------------------------------------------------


def run_start_test(answer: Callable[..., Any], layer: str) -> str:
    """Whether the learner's test lets this layer pass; other errors than an AssertionError are its own."""
    return trial(answer, LAYERS[layer])
