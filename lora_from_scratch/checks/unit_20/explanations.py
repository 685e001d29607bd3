"""Unit 20, longer context: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, not_a_tensor, where_right
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.unit_20.implementations import SOUND


def explain_table(case: Case, seen: Seen, expected: Seen) -> Explanation:
    one: Any = seen.value
    other: Any = expected.value
    table, wanted = one["result"], other["result"]
    if found := _axes(table, wanted, ("rows of the new table", "columns")):
        return found
    for place, name in ((0, "first"), (-1, "last")):
        if not same(table[place], wanted[place]):
            return f"the {name} row", f"The {name} row of the new table should be the {name} row of the old one."
    if not same(table, wanted):
        return where_right(table, wanted, ("row",)) or (
            "other rows",
            "The ends are right, but no row between them. Where does row i of the new table fall in the old one, if "
            "the last row falls on the last?",
        )
    return "dtype", f"The values are right, but the dtype should be {other['dtype']}, and yours is {one['dtype']}."


def explain_groups(case: Case, seen: Seen, expected: Seen) -> Explanation:
    wanted: Any = expected.value
    if found := _axes(seen.value, wanted, ("B texts", "H heads", "n groups", "g tokens", "hd numbers of a token")):
        return found
    given: Any = seen.value
    return _heads(given, wanted) or where_right(given, wanted, ("text", "head", "group", "place")) or _none()


def explain_back(case: Case, seen: Seen, expected: Seen) -> Explanation:
    wanted: Any = expected.value
    if found := _axes(seen.value, wanted, ("B texts", "H heads", "T tokens", "hd numbers of a token")):
        return found
    given: Any = seen.value
    return _heads(given, wanted) or where_right(given, wanted, ("text", "head", "token")) or _none()


def explain_mask(case: Case, seen: Seen, expected: Seen) -> Explanation:
    wanted: Any = expected.value
    if found := _axes(seen.value, wanted, ("H heads", "n groups", "g queries", "g keys")):
        return found
    allowed: Any = seen.value
    if not bool(((allowed == 0) | (allowed == 1)).all()):
        return "no booleans", "Each entry should be True or False, but yours has other numbers."
    allowed = allowed.bool()
    for wrong, verb in ((allowed & ~wanted, "may"), (~allowed & wanted, "may not")):
        if wrong.any():
            head, group, query, key = wrong.nonzero()[0].tolist()
            heads, groups = wanted.shape[:2]
            return f"{verb} attend in the wrong place", (
                f"In head {head} of {heads} and group {group} of {groups}, counted from 0, query {query} {verb} attend "
                f"to key {key} in your mask. Write down which tokens of the text are in this group, in their order."
            )
    return None


def explain_test(case: Case, seen: Seen, expected: Seen) -> Explanation:
    name = case.inputs["implementation"]
    if name in SOUND:
        return "refuses a sound one", (
            f"Your test fails with a sound implementation: {name}. Test only that no output depends on a later token, "
            "and allow for rounding."
        )
    return "passes a faulty one", f"Your test passes a faulty implementation: {name}."


def _heads(seen: Tensor, wanted: Tensor) -> Explanation:
    half = wanted.shape[1] // 2
    first, second = same(seen[:, :half], wanted[:, :half]), same(seen[:, half:], wanted[:, half:])
    if half and first != second:
        good, bad = ("first", "second") if first else ("second", "first")
        return f"the {bad} half of the heads", f"The {good} half of the heads is right, the {bad} half is not."
    return None


def _none() -> Explanation:
    return "another order", "The shape is right, but the numbers are in other places. Take the first case by hand."


def _axes(seen: Any, wanted: Tensor, names: tuple[str, ...]) -> Explanation:
    """What is wrong with the axes of what should be a tensor of this shape."""
    if isinstance(seen, Tensor) and seen.ndim != wanted.ndim:
        axes = ", ".join(names)
        return "number of axes", f"The result should have {wanted.ndim} axes ({axes}), but yours has {seen.ndim}."
    if isinstance(seen, Tensor):
        for axis, name in enumerate(names):
            if seen.shape[axis] != wanted.shape[axis]:
                size = f"axis {axis} of the result should have the length {wanted.shape[axis]} ({name}), but yours has"
                return f"length of axis {axis}", f"Counted from 0, {size} {seen.shape[axis]}."
    return not_a_tensor(seen, wanted.shape, "the result")
