"""Compare observations with the expected ones."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Exercise
from lora_from_scratch.checks.observation import Data, Opaque, Seen


def agrees(exercise: Exercise, case: Case, seen: Seen, expected: Seen) -> bool:
    """Whether an observation matches the expected one: the same error if one is expected, else the same value."""
    if seen.stopped or set(seen.changed) - set(expected.changed):
        return False
    if expected.raised or seen.raised:
        return bool(expected.raised and seen.raised and expected.errors[0] in seen.errors)
    if exercise.agree is not None:
        if not comparable(seen.value, expected.value):
            return False
        try:
            return bool(exercise.agree(case, seen, expected))
        except Exception:  # `agree` expects the right shapes and types
            return False
    return same(seen.value, expected.value, exercise.tolerance) and not (
        exercise.dtypes and dtypes_differ(seen.value, expected.value)
    )


def comparable(seen: Data, expected: Data) -> bool:
    """Whether a value is of roughly the expected size; an exercise's own `agree` may take time quadratic in it."""
    longest, most = _extent(expected)
    found = _extent(seen, 16 * most + 4096)
    return found[0] <= 4 * longest + 64 and found[1] <= 16 * most + 4096


def numbers_in(value: Data) -> int:
    """How many numbers, texts and other items a value has."""
    return int(_extent(value)[1])


def _extent(value: Data, enough: float = math.inf) -> tuple[int, int]:
    """The longest axis, list or mapping, and the total number of items; counting stops beyond `enough`."""
    longest, count, waiting = 1, 0, [value]
    while waiting and count <= enough:
        item = waiting.pop()
        count += max(item.numel(), 1) if isinstance(item, Tensor) else 1
        if isinstance(item, Tensor):
            longest = max((longest, *item.shape))
        elif isinstance(item, list | dict):
            longest = max(longest, len(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return longest, count


def same(seen: Data, expected: Data, tolerance: float = 1e-4) -> bool:
    """Whether two values are equal up to rounding: no entry is off by more than `tolerance` times the largest.

    The dtype does not matter. A number equals a tensor without axes, and a list equals a tuple. Text, booleans and
    integers must be exactly equal. NaN equals NaN.
    """
    if isinstance(expected, Opaque) or isinstance(seen, Opaque):
        return isinstance(expected, Opaque) and isinstance(seen, Opaque) and seen == expected
    if isinstance(expected, int) and isinstance(seen, int):
        return seen == expected  # of any size
    if isinstance(expected, float) and isinstance(seen, float):  # the same as for tensors below, but much faster
        if seen == expected or (math.isnan(seen) and math.isnan(expected)):
            return True
        return math.isfinite(expected) and abs(seen - expected) <= tolerance * abs(expected) + 1e-12
    if is_number(expected) and is_number(seen):
        one, other = as_tensor(seen), as_tensor(expected)
        if one.shape != other.shape or one.is_complex() or other.is_complex():
            return False
        if one.dtype == other.dtype and torch.equal(one, other):
            return True
        if not other.is_floating_point():
            return bool(torch.equal(one.double(), other.double()))
        one, other = one.double(), other.double()
        scale = float(other.nan_to_num(0, 0, 0).abs().max()) if other.numel() else 0.0  # of the finite entries
        return bool(torch.allclose(one, other, rtol=0, atol=tolerance * scale + 1e-12, equal_nan=True))
    if isinstance(expected, list) and isinstance(seen, list):
        return len(seen) == len(expected) and all(same(s, e, tolerance) for s, e in zip(seen, expected, strict=True))
    if isinstance(expected, dict) and isinstance(seen, dict):
        return seen.keys() == expected.keys() and all(same(seen[k], expected[k], tolerance) for k in expected)
    return type(seen) is type(expected) and seen == expected


def dtypes_differ(seen: Data, expected: Data) -> tuple[torch.dtype, torch.dtype] | None:
    """The first two dtypes that differ between tensors at the same position, or None."""
    if isinstance(seen, Tensor) and isinstance(expected, Tensor):
        return None if seen.dtype == expected.dtype else (seen.dtype, expected.dtype)
    pairs: Iterable[tuple[Data, Data]] = ()
    if isinstance(seen, list) and isinstance(expected, list):
        pairs = zip(seen, expected, strict=False)
    elif isinstance(seen, dict) and isinstance(expected, dict):
        pairs = ((seen[key], expected[key]) for key in expected if key in seen)
    return next((found for pair in pairs if (found := dtypes_differ(*pair)) is not None), None)


def is_number(value: Data) -> bool:
    return isinstance(value, bool | int | float | Tensor)


def as_tensor(value: Data) -> Tensor:
    """A number as a tensor without axes. An integer beyond 64 bits becomes the nearest float, or infinity."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        value = float(value) if abs(value) < 2**1023 else math.inf if value > 0 else -math.inf
    return torch.tensor(value, dtype=_dtype_of(value))


def _dtype_of(value: Data) -> torch.dtype:
    return torch.float64 if isinstance(value, float) else torch.bool if isinstance(value, bool) else torch.int64
