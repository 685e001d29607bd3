"""Unit 17, higher rank at the same price: what is observed of an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.trial import trial
from lora_from_scratch.checks.unit_17.relora_layers import LAYERS


def gradients(y: Any, of: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of sum(y^2) / 2 + sum(y), a number that depends on every entry; None: none can flow."""
    if not isinstance(y, Tensor) or not y.requires_grad:
        return [None for _ in of]
    return list(torch.autograd.grad(y.square().sum() / 2 + y.sum(), list(of), allow_unused=True))


def run_with_gradients(answer: Callable[..., Any], **inputs: Any) -> Any:
    """The result, and the gradients of the tensors that were given."""
    tensors = {name: value.requires_grad_() for name, value in inputs.items() if isinstance(value, Tensor)}
    y = answer(**inputs)
    return {"result": y, "gradients": dict(zip(tensors, gradients(y, list(tensors.values())), strict=True))}


def run_terms(answer: Callable[..., Any], W: Tensor, b: Tensor | None, **terms: Tensor | None) -> Any:
    """The new weight and bias, and the gradients of the terms."""
    learned = {name: tensor.requires_grad_() for name, tensor in terms.items() if tensor is not None}
    result = answer(W, b, **terms)
    if not isinstance(result, tuple | list) or len(result) != 2:
        return {"result": result}
    weight, bias = result
    whole = [one.flatten() for one in result if isinstance(one, Tensor)]
    flows = gradients(torch.cat(whole), list(learned.values())) if whole and learned else []
    return {"weight": weight, "bias": bias, "gradients": dict(zip(learned, flows, strict=False))}


# --- ReLoRALayer -------------------------------------------------------------------------------------


def run_relora_layer(
    answer: Callable[..., Any], what: str, W: Tensor, rank: int, scaling: float, x: Tensor, **given: Tensor
) -> Any:
    """Make a layer, and observe its start or a restart."""
    torch.manual_seed(0)
    layer = answer(W, rank, scaling)
    return seen_of_start(answer, layer, W, rank, x) if what == "start" else seen_of_restart(layer, x, **given)


def seen_of_start(answer: Callable[..., Any], layer: Any, W: Tensor, rank: int, x: Tensor) -> Any:
    """What a new layer computes and learns, what it consists of, and whether another one is like it."""
    torch.manual_seed(0)
    again = answer(W, rank)
    following = answer(W, rank)
    y = layer(x)
    flow = gradients(y, [layer.A, layer.B]) if layer.A.requires_grad and layer.B.requires_grad else []
    parameters = dict(layer.named_parameters())
    seen = {
        "shapes": {"W": list(layer.W.shape), "A": list(layer.A.shape), "B": list(layer.B.shape)},
        "y": y,
        "a gradient": any(one is not None and bool(one.any()) for one in flow),
        "trained": sorted(name for name, parameter in parameters.items() if parameter.requires_grad),
        "saved": sorted(layer.state_dict()),
        "the same seed": torch.equal(layer.A, again.A) and torch.equal(layer.B, again.B),
        "another layer": torch.equal(again.A, following.A) and torch.equal(again.B, following.B),
        "scaling": float(layer.scaling),
    }
    with torch.no_grad():
        layer.W.add_(1)  # a copy of its own: the W that was given stays what it is
    return seen


def seen_of_restart(layer: Any, x: Tensor, A: Tensor, B: Tensor) -> Any:
    """What two restarts do, each after some training."""
    first, numbers = one_restart(layer, x, A, B)
    second, others = one_restart(layer, x, -A, B)
    return {"first": first, "second": second, "the same numbers": torch.equal(numbers, others)}


def one_restart(layer: Any, x: Tensor, A: Tensor, B: Tensor) -> tuple[Any, Tensor]:
    """What a restart does after a training that ended with these A and B, and all numbers of the new start."""
    held = {"W": layer.W, "A": layer.A, "B": layer.B}
    with torch.no_grad():
        layer.A.copy_(A)
        layer.B.copy_(B)
        before = layer(x)
    layer.restart()
    y, recorded = layer(x), layer.W.requires_grad
    flow = [] if recorded else gradients(y, [layer.A, layer.B])
    seen = {
        "W": layer.W,
        "a graph": recorded,
        "as before": torch.allclose(y, before, atol=1e-3),
        "a gradient": any(one is not None and bool(one.any()) for one in flow),
        "old numbers": [name for name, old in (("A", A), ("B", B)) if torch.equal(getattr(layer, name), old)],
        "in place": all(getattr(layer, name) is tensor for name, tensor in held.items()),
    }
    return seen, torch.cat([layer.A.detach().flatten(), layer.B.detach().flatten()])


def run_test(answer: Callable[..., Any], layer: str) -> str:
    """Whether the learner's test lets this layer pass; other errors than an AssertionError are its own."""
    return trial(answer, LAYERS[layer])
