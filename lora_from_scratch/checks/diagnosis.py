"""What is wrong with an answer: which misconception explains what was seen."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable

from torch import Tensor

from lora_from_scratch.checks.bank import Answer, wrong_answers
from lora_from_scratch.checks.comparing import agrees, as_tensor, comparable, is_number, same
from lora_from_scratch.checks.exercise import Case, Exercise
from lora_from_scratch.checks.observation import Data, Opaque, Seen, observe
from lora_from_scratch.checks.verdict import without_dtypes

Said = tuple[str, str]  # the misconception's name, and what is said of it


def diagnose(
    exercise: Exercise, seed: int, cases: list[Case], seen: list[Seen], expected: tuple[Seen, ...], first: int
) -> Said:
    """The name of the misconception and what is said of it.

    First the bank: a wrong answer that does the same as this one in every case is this one's mistake; or, if there is
    none, in every case but those that have to be refused, which people forget beside anything else. Then what the
    exercise itself can explain; then what can go wrong with any function.
    """
    if seen[first].stopped:
        return "too slow", (
            f"Your code was stopped after {exercise.seconds:g} seconds. Is there a loop that does not end, or one over "
            "every number where one operation on the whole tensor would do?"
        )
    usual = [place for place, one in enumerate(expected) if not one.raised]
    for places in (list(range(len(cases))), usual if first in usual else []):
        for answer in wrong_answers(exercise.name):
            if answer.message and not answer.hangs and places:
                other = seen_of(answer, exercise, seed)
                if all(_alike(exercise, cases[place], seen[place], other[place]) for place in places):
                    return answer.name, answer.message
    if (said := _signature(exercise, seen[first])) is not None:
        return said
    if exercise.explain is not None and comparable(seen[first].value, expected[first].value):
        try:
            said = exercise.explain(cases[first], seen[first], expected[first])
        except Exception:  # made for the shapes and types that are expected
            said = None
        if said is not None:
            return said
    return next(said for rule in RULES if (said := rule(seen[first], expected[first])) is not None)


def _alike(exercise: Exercise, case: Case, one: Seen, other: Seen) -> bool:
    if one.stopped or other.stopped or one.changed != other.changed:
        return False
    if one.raised or other.raised:
        return one.errors == other.errors and one.message == other.message
    return same(one.value, other.value, exercise.tolerance) or (
        exercise.agree is not None and agrees(exercise, case, one, other)
    )


def _signature(exercise: Exercise, seen: Seen) -> Said | None:
    """It cannot be called with these arguments: the error is raised before any line of the answer runs."""
    called = re.match(r"([\w.<>]+)\(\) ((?:missing|takes|got) .*)", seen.message)
    if seen.errors[:1] != ("TypeError",) or seen.where or called is None:
        return None
    method = called[1].split(".")[-1]
    target = getattr(exercise.object, method, None) if inspect.isclass(exercise.object) else exercise.object
    name = f"{exercise.name}.{method}" if inspect.isclass(exercise.object) else exercise.name
    if target is None:
        return None
    signature = inspect.signature(target)
    bare = [item.replace(annotation=item.empty) for item in signature.parameters.values()]
    wanted = signature.replace(parameters=bare, return_annotation=signature.empty)
    return "arguments", (
        f"Your {name} cannot be called as it has to be: it {called[2]}. "
        f"The first line of the exercise has the arguments that it takes: `{name}{wanted}`."
    )


def _raised(seen: Seen, expected: Seen) -> Said | None:
    if not seen.raised:
        return None
    place = f" (in {seen.where})" if seen.where else ""
    if expected.raised:
        return "another error", (
            f"This input has to be refused with a {expected.errors[0]}; your code raised {seen.errors[0]}{place}: "
            f"{seen.message}"
        )
    unknown = ". Run the cell that defines or imports it, then this one." if "NameError" in seen.errors else ""
    return "raises", f"Your code raised {seen.errors[0]}{place}: {seen.message}{unknown}"


def _no_error(seen: Seen, expected: Seen) -> Said | None:
    if not expected.raised:
        return None
    return "no error", (
        f"This input cannot be right and has to be refused with a {expected.errors[0]} that says why; "
        "your code returned a result."
    )


def _changed(seen: Seen, expected: Seen) -> Said | None:
    names = [name for name in seen.changed if name not in expected.changed]
    if not names:
        return None
    return "changes its input", (
        f"Your code changes {' and '.join(names)}, which belongs to whoever called it: work on a copy (`.clone()`)."
    )


def _nothing(seen: Seen, expected: Seen) -> Said | None:
    if seen.value is not None or expected.value is None:
        return None
    if seen.printed:
        return "prints", "Your code prints the result but returns nothing: it needs a `return`."
    return "returns nothing", "Your code returns None: is there a `return` on every way through it?"


def _kind(seen: Seen, expected: Seen) -> Said | None:
    s, e = seen.value, expected.value
    if isinstance(e, list) and isinstance(s, list) and len(e) != len(s):
        return "number of results", f"There should be {len(e)} results, your code returns {len(s)}."
    if (is_number(s) and is_number(e)) or type(s) is type(e):
        return None
    return "another type", f"The result should be {kind_of(e)}, your code returns {kind_of(s)}."


def _shape(seen: Seen, expected: Seen) -> Said | None:
    for place, (s, e) in enumerate(_pairs(seen.value, expected.value)):
        if s.shape != e.shape:
            whole = expected.value
            alone = len(without_dtypes(whole)) == 1 if isinstance(whole, list) else not isinstance(whole, dict)
            of = "" if alone else f" of result {place + 1}"
            back = s.ndim == e.ndim == 2 and s.shape == e.T.shape
            turned = " It looks transposed." if back else ""
            shapes = f"The shape{of} should be {tuple(e.shape)}, your code returns {tuple(s.shape)}."
            return ("transposed" if back else "shape"), shapes + turned
    return None


def _not_finite(seen: Seen, expected: Seen) -> Said | None:
    for s, e in _pairs(seen.value, expected.value):
        if not s.double().isfinite().all() and e.double().isfinite().all():
            return "not finite", (
                "The result has entries that are not finite numbers: is something divided by zero, "
                "or is the logarithm, root or exponential of an extreme number taken?"
            )
    return None


def _values(seen: Seen, expected: Seen) -> Said | None:
    wrong = [(s, e) for s, e in _pairs(seen.value, expected.value) if s.shape == e.shape and not same(s, e)]
    for s, e in wrong:
        if same(s, -e.double()):
            return "sign", "The result has the right size but the opposite sign."
        ratio = (s.double() / e.double()).flatten()
        ratio = ratio[ratio.isfinite()]
        if e.numel() > 1 and len(ratio) and float((ratio - ratio[0]).abs().max()) < 1e-4 * float(ratio[0].abs()):
            return (
                "factor",
                "The result is right up to a constant factor: what is multiplied or divided, and how often?",
            )
    return "values", "The type and the shape are right, the values are not. Try this input by hand, step by step."


RULES: tuple[Callable[[Seen, Seen], Said | None], ...] = (
    _raised,
    _no_error,
    _nothing,
    _kind,
    _shape,
    _not_finite,
    _changed,
    _values,
)


def _pairs(seen: Data, expected: Data) -> list[tuple[Tensor, Tensor]]:
    """The tensors and numbers that stand at the same place in both."""
    if is_number(seen) and is_number(expected):
        return [(as_tensor(seen), as_tensor(expected))]
    if isinstance(seen, list) and isinstance(expected, list):
        return [pair for s, e in zip(seen, expected, strict=False) for pair in _pairs(s, e)]
    if isinstance(seen, dict) and isinstance(expected, dict):
        return [pair for key in expected if key in seen for pair in _pairs(seen[key], expected[key])]
    return []


@functools.lru_cache(maxsize=2048)
def seen_of(answer: Answer, exercise: Exercise, seed: int) -> tuple[Seen, ...]:
    return tuple(observe(exercise.probe, answer.object, [c.inputs for c in exercise.inputs(seed)], 4, seed))


def kind_of(value: Data) -> str:
    """What kind of thing it is, with no value: what may be said of the right answer."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Opaque):
        return f"a {value!s}"
    if isinstance(value, list):
        results = without_dtypes(value)
        if len(results) == 1 < len(value):
            return kind_of(results[0])
        each = f": {' and '.join(map(kind_of, results))}" if 2 <= len(results) <= 3 else ""
        return f"{len(results)} {'result' if len(results) == 1 else 'results'}{each}"
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "text", dict: "a dictionary"}
    return "None" if value is None else names[type(value)]
