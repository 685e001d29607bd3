"""Unit 20, longer context: what is observed of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lora_from_scratch.checks.observation import dtype_of
from lora_from_scratch.checks.trial import trial
from lora_from_scratch.checks.unit_20.implementations import IMPLEMENTATIONS


def run_table(answer: Callable[..., Any], table: Tensor, factor: int) -> dict[str, Any]:
    result = answer(table, factor)
    return {"result": result, "dtype": dtype_of(result)}


def run_test(answer: Callable[..., Any], implementation: str) -> str:
    """How the test ends with this implementation."""
    return trial(answer, IMPLEMENTATIONS[implementation])
