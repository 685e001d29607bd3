"""Exercises whose answer is a test: it is tried on sound implementations, which have to pass, and on faulty ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation
from lora_from_scratch.checks.observation import Seen


def trial(test: Callable[..., Any], implementation: Any) -> str:
    """What a probe observes: whether the test "passes" or "fails". An error other than an AssertionError is raised."""
    try:
        test(implementation)
    except AssertionError:
        return "fails"
    return "passes"


def explain_trial(kind: str, question: str) -> Callable[[Case, Seen, Seen], Explanation]:
    """Make the explanation that names the implementation that is judged wrongly.

    Args:
        kind: what is tried, such as "layer". The only input of each case is the implementation's name.
        question: asked about a faulty one that passes.
    """

    def explain(case: Case, seen: Seen, expected: Seen) -> Explanation:
        (name,) = case.inputs.values()
        if expected.value == "passes":
            return f"a sound {kind} fails", (
                f"Your test refuses a sound {kind}: {name}. Which of your assertions fails there, and does the "
                "statement demand it?"
            )
        return f"a faulty {kind} passes", f"Your test lets a faulty {kind} pass: {name}. {question}"

    return explain
