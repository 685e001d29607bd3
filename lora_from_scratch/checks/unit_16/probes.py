"""Unit 16, fewer numbers than rank one: what is observed of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.observation import dtype_of
from lora_from_scratch.checks.trial import trial
from lora_from_scratch.checks.unit_16.implementations import IMPLEMENTATIONS

GLOBAL_SEEDS = 11, 12
UNLIKELY = 1_618_033_989


def around(call: Callable[[], Any]) -> dict[str, Any]:
    """The results of two calls, and what they do to PyTorch's global generator."""
    results, states = [], []
    for global_seed in GLOBAL_SEEDS:
        torch.default_generator.manual_seed(global_seed)  # `torch.manual_seed` takes much longer
        seeded = torch.get_rng_state()
        torch.rand(1)
        before = torch.get_rng_state()
        results.append(call())
        states.append(torch.get_rng_state())
    if torch.equal(states[1], before):
        afterwards = "as before"
    elif torch.equal(states[1], seeded):
        afterwards = "as when it was seeded"
    else:
        afterwards = "the same after every call" if torch.equal(*states) else "another one"
    return {"result": results[0], "another call": results[1], "the state of the global generator": afterwards}


def run_projections(
    answer: Callable[..., Any], rank: int, in_features: int, out_features: int, seed: int
) -> dict[str, Any]:
    seen = around(lambda: answer(rank, in_features, out_features, seed))
    result = seen["result"]
    return seen | {"dtypes": [dtype_of(part) for part in result] if isinstance(result, tuple | list) else []}


def run_change(
    answer: Callable[..., Any], A: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor, in_features: int
) -> dict[str, Any]:
    """The change, and the gradients of a number that depends on each of its entries."""
    vectors = lambda_d.requires_grad_(True), lambda_b.requires_grad_(True)
    change = answer(A, B, *vectors, in_features)
    if not isinstance(change, Tensor) or not change.requires_grad:
        return {"change": change, "gradients": None}
    number = change.square().sum() / 2 + change.sum()
    return {"change": change, "gradients": list(torch.autograd.grad(number, vectors, allow_unused=True))}


def run_count(answer: Callable[..., Any], sizes: dict[str, list[int]], rank: int) -> Any:
    return answer({name: tuple(size) for name, size in sizes.items()}, rank)


def run_combination(answer: Callable[..., Any], coefficients: Tensor, shape: list[int], seed: int) -> dict[str, Any]:
    seen = around(lambda: answer(coefficients, tuple(shape), seed))
    return seen | {"dtype": dtype_of(seen["result"])}


def run_gradient(
    answer: Callable[..., Any], gradient: Tensor, k: int, seed: int, transposed: bool = False
) -> dict[str, Any]:
    G = gradient.T.contiguous().T if transposed else gradient
    seen = around(lambda: answer(G, k, seed))
    return seen | {"dtype": dtype_of(seen["result"])}


def run_test(answer: Callable[..., Any], implementation: str) -> str:
    """How the test ends with this implementation.

    The global generator has got a seed that no test chooses: one that happened to choose it would see nothing change.
    """
    torch.default_generator.manual_seed((torch.initial_seed() + UNLIKELY) % 2**32)  # it uses 32 bits only
    return trial(answer, IMPLEMENTATIONS[implementation]())
