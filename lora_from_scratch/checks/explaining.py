"""Helpers for an exercise's `explain` whose probe returns a record (a dictionary), not the answer's own result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.observation import Data, Seen
from lora_from_scratch.checks.verdict import describe

Explanation = tuple[str, str] | None


def not_a_tensor(seen: Data, shape: Sequence[int], of: str) -> Explanation:
    """What is wrong with a value that should be a tensor of this shape, before its numbers are looked at.

    Args:
        of: what it is: "the result".
    """
    if seen is None:
        return "returns nothing", "Your code returns None. Does every path through it end in a `return`?"
    if not isinstance(seen, Tensor):
        return "another type", f"{of.capitalize()} should be a tensor, but yours is {describe(seen)}."
    if tuple(seen.shape) != tuple(shape):
        return "shape", f"The shape of {of} should be {tuple(shape)}, but yours is {tuple(seen.shape)}."
    return None


def where_right(seen: Tensor, expected: Tensor, axes: Sequence[str], tolerance: float = 1e-4) -> Explanation:
    """For which texts, heads or tokens a result is right, if it is right for some of them and not for others.

    Args:
        axes: what the leading axes count: ("text", "head", "token").
    """
    for axis, name in enumerate(axes):
        pairs = zip(seen.unbind(axis), expected.unbind(axis), strict=True)
        right = [same(one, other, tolerance) for one, other in pairs]
        if any(right) and not all(right):
            good, bad = ([str(place) for place, ok in enumerate(right) if ok == kind] for kind in (True, False))
            message = f"Counted from 0, the result is right for {name} {', '.join(good)}, but not for {', '.join(bad)}."
            return f"right for some {name}s", f"{message} What is different there?"
    return None


def off_by(seen: int, expected: int, parts: Mapping[str, int], of: str) -> Explanation:
    """By how much a count is too large or too small, and which part of it has just that size.

    Args:
        parts: the sizes of parts, by name.
        of: what is off: "Your count".
    """
    error = seen - expected
    if error == 0:
        return None
    kind = "too large" if error > 0 else "too small"
    named = next((f", which is {name}" for name, size in parts.items() if size == abs(error)), "")
    message = f"{of} is {kind} by {abs(error):,} here{named}. List the tensors that are trained, with their shapes."
    return kind, message


def first_difference(messages: Mapping[str, str]) -> Callable[[Case, Seen, Seen], Explanation]:
    """An `explain` that gives the message of the first entry of the record that differs, in the mapping's order."""

    def explain(case: Case, seen: Seen, expected: Seen) -> Explanation:
        one, other = seen.value, expected.value
        if isinstance(one, dict) and isinstance(other, dict):
            for key, message in messages.items():
                if key in other and not same(one.get(key), other[key]):
                    return f"another {key}", message
        return None

    return explain
