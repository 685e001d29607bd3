"""Unit 18, rank where it matters: what is observed of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.trial import trial
from lora_from_scratch.checks.unit_09.probes import gradients
from lora_from_scratch.checks.unit_18.loops import LOOPS


def run_layer(
    answer: Callable[..., Any],
    what: str,
    W: Tensor,
    b: Tensor,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    alpha: float,
    x: Tensor,
) -> Any:
    """Make a layer from plain data, and observe its factors and its output, or its distances."""
    base = nn.Linear(W.shape[1], W.shape[0]).requires_grad_(False)
    layer = answer(base, len(A), alpha, 0.0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter, value in ((base.weight, W), (base.bias, b), (layer.lora_A, A), (layer.lora_B, B)):
            parameter.copy_(value)
        layer.lora_E.copy_(E)
    if what == "distances":
        distances = layer.distances_from_orthonormal()
        flow = gradients(distances, [layer.lora_A, layer.lora_B])
        return {"distances": distances, "gradients": dict(zip("AB", flow, strict=True))}
    factors = layer.factors()
    if not isinstance(factors, tuple | list) or [isinstance(one, Tensor) for one in factors] != [True, True]:
        return {"result": factors}
    y = layer(x)
    flow = gradients(y, [layer.lora_A, layer.lora_E, layer.lora_B])
    return {"diag(E) A": factors[0], "B": factors[1], "y": y, "gradients": dict(zip("AEB", flow, strict=True))}


def run_test(answer: Callable[..., Any], loop: str) -> str:
    """Whether the learner's test lets this loop pass; other errors than an AssertionError are its own."""
    return trial(answer, LOOPS[loop])
