"""Unit 23, the folklore, tested: what is observed of an answer. Keys of plain data are strings: dictionaries with other
keys are built here, and taken apart here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def run_matched(answer: Callable[..., Any], rank: int, layers: Any, other_layers: Any) -> Any:
    """Shapes are tuples."""
    return answer(rank, [tuple(shape) for shape in layers], [tuple(shape) for shape in other_layers])


def run_ratio(
    answer: Callable[..., Any], rates: list[float], losses: list[float], other_rates: list[float], other_losses: Any
) -> Any:
    tried, other = dict(zip(rates, losses, strict=True)), dict(zip(other_rates, other_losses, strict=True))
    return answer(tried, other)


def run_change(answer: Callable[..., Any], weights: dict[str, Tensor], changes: dict[str, Tensor]) -> Any:
    """The blocks in the order in which they are given, and the numbers."""
    result = answer(weights, changes)
    if not isinstance(result, Mapping):
        return {"result": result}
    return {"blocks": list(result), "changes": [_number(value) for value in result.values()]}


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
