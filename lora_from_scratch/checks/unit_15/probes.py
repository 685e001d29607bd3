"""Unit 15, magnitude and direction: what is observed of an answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_from_scratch.checks.observation import dtype_of
from lora_from_scratch.checks.unit_09.probes import gradients, plain_layer
from lora_from_scratch.checks.unit_15.versions import VERSIONS

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

# --- row_norms ---------------------------------------------------------------------------------------


class LargestNewTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is created and is no view of the given ones."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.elements = max(self.elements, tensor.numel())
        return result


def run_norms(answer: Callable[..., Any], W: Tensor, A: Tensor, B: Tensor, scaling: float, size: bool = False) -> Any:
    """The norms, their dtype, whether they have a graph; and whether a tensor of the size of W was created."""
    for tensor in (W, A, B):
        tensor.requires_grad_(True)
    largest = LargestNewTensor(W, A, B)
    with largest if size else nullcontext():
        norms = answer(W, A, B, scaling)
    if not isinstance(norms, Tensor):
        return {"norms": norms}
    seen = {"norms": norms, "dtype": dtype_of(norms), "gradient": norms.requires_grad}
    return seen | {"as large as W": largest.elements >= W.numel()} if size else seen


# --- DoRALinear --------------------------------------------------------------------------------------


def run_dora(
    answer: Callable[..., Any],
    kind: str,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    alpha: float,
    x: Tensor,
    what: str,
    dtype: str = "float32",
    rslora: bool = False,
) -> Any:
    """Make a layer from plain data, and observe its output or its merging."""
    base = plain_layer(kind, weight, torch.zeros(len(weight)) if bias is None else bias)
    if bias is None:
        base.register_parameter("bias", None)
    base = base.to(dtype=DTYPES[dtype])
    layer = answer(base, len(A), alpha, rslora=rslora)
    with torch.no_grad():
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
        if magnitude is not None:
            layer.lora_magnitude.copy_(magnitude)
    return OBSERVE[what](layer, x.to(DTYPES[dtype]))


def seen_of_forward(layer: Any, x: Tensor) -> dict[str, Any]:
    """The output, and the gradients of A, B, m and x."""
    x.requires_grad_(True)
    before = layer.base.weight.detach().clone()
    y = layer(x)
    trained = {"A": layer.lora_A, "B": layer.lora_B, "m": layer.lora_magnitude, "x": x}
    return {
        "y": y,
        "gradients": dict(zip(trained, gradients(y, list(trained.values())), strict=True)),
        "the base as before": torch.equal(layer.base.weight, before),
    }


def seen_of_zeros(layer: Any, x: Tensor) -> dict[str, Any]:
    """The output, and whether all gradients are finite; those of a row without a direction may have any values."""
    seen = seen_of_forward(layer, x)
    finite = [bool(gradient is None or gradient.isfinite().all()) for gradient in seen["gradients"].values()]
    return {"y": seen["y"], "finite gradients": all(finite)}


@torch.no_grad()
def seen_of_merging(layer: Any, x: Tensor) -> dict[str, Any]:
    """The weight that `merge` makes, the output with it, and the weight before plus what `change` gives for it."""
    W = layer.base.weight.detach()
    W = (W.T if type(layer.base).__name__ == "Conv1D" else W).float()
    change = layer.change(W.clone())
    layer.merge()
    total = W + change.float() if isinstance(change, Tensor) and change.shape == W.shape else change
    return {"W + change": total, "dtype": dtype_of(change), "W": layer.base.weight.detach().clone(), "y": layer(x)}


OBSERVE = {"forward": seen_of_forward, "zeros": seen_of_zeros, "merge": seen_of_merging}

# --- lora_plus_groups, initial_svd -------------------------------------------------------------------


def run_groups(answer: Callable[..., Any], shapes: dict[str, list[int]], ratio: float) -> Any:
    """Of each group the names of its parameters, in order, and its other entries."""
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = answer(parameters, ratio)
    if not isinstance(groups, list | tuple) or not all(isinstance(group, dict) for group in groups):
        return {"groups": groups}
    return {
        "groups": [
            {
                "names": [names.get(id(p), "none of them") for p in group.get("params", [])],
                "more": {key: value for key, value in group.items() if key != "params"},
                "params": "params" in group,
            }
            for group in groups
        ]
    }


def run_svd(answer: Callable[..., Any], W: Tensor, rank: int, scaling: float) -> Any:
    """What does not depend on the signs of the singular vectors: s B A, A A^T and B^T B; shapes and dtypes."""
    factors = answer(W, rank, scaling)
    if not isinstance(factors, tuple | list) or [isinstance(one, Tensor) for one in factors] != [True, True]:
        return {"factors": factors}
    A, B = (one.detach() for one in factors)
    kinds = {"shapes": [list(A.shape), list(B.shape)], "dtypes": [dtype_of(A), dtype_of(B)]}
    if A.ndim != 2 or B.ndim != 2 or B.shape[1] != A.shape[0]:
        return kinds
    A, B = A.float(), B.float()
    return kinds | {"product": scaling * B @ A, "A A^T": A @ A.T, "B^T B": B.T @ B}


# --- MergingLinear, test_merging_linear --------------------------------------------------------------


def run_merging(
    answer: Callable[..., Any],
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    x: Tensor,
    calls: list[str],
    dtype: str = "float32",
) -> dict[str, Any]:
    """What the layer returns, and its weight and output, after each of these calls.

    A call is "eval", "train", "train(True)" or "train(False)"; "A" changes A and B, and "double" the layer's dtype.
    """
    (outputs, inputs), rank = weight.shape, len(A)
    layer = answer(inputs, outputs, rank, scaling)
    with torch.no_grad():
        for parameter, values in ((layer.weight, weight), (layer.lora_A, A), (layer.lora_B, B)):
            parameter.copy_(values)
        layer.bias.zero_()
    layer.to(DTYPES[dtype])
    W, parameter = layer.weight.detach().clone(), layer.weight
    steps = [_after(layer, call, W, x) for call in calls]
    return {"steps": steps, "the same parameter": layer.weight is parameter}


def _after(layer: Any, call: str, W: Tensor, x: Tensor) -> dict[str, Any]:
    returned = layer
    if call == "A":
        with torch.no_grad():
            layer.lora_A.add_(1)
            layer.lora_B.mul_(2)
    elif call == "double":
        layer.to(torch.float64)
    else:
        name, _, mode = call.partition("(")
        returned = getattr(layer, name)(*([mode == "True)"] if mode else []))
    with torch.no_grad():
        return {
            "returns": "the layer itself" if returned is layer else type(returned).__name__,
            "training": bool(layer.training),
            "weight": layer.weight.detach().clone(),
            "dtype": dtype_of(layer.weight),
            "every bit of W": torch.equal(layer.weight.to(torch.float64), W.to(torch.float64)),
            "keeps W": isinstance(layer.W, Tensor),
            "y": layer(x.to(layer.weight.dtype)),
        }


def run_test(answer: Callable[..., Any], version: str) -> str:
    """Whether the test passes for this version of the layer, fails with an AssertionError, or breaks."""
    try:
        answer(VERSIONS[version])
    except AssertionError:
        return "fails"
    except NotImplementedError:  # not written yet
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "passes"
