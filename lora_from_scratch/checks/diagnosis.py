"""Find out what is wrong with an answer: the misconception that explains the observations."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable

from torch import Tensor

from lora_from_scratch.checks.bank import Answer, wrong_answers
from lora_from_scratch.checks.comparing import agrees, as_tensor, comparable, dtypes_differ, is_number, same
from lora_from_scratch.checks.exercise import Case, Exercise
from lora_from_scratch.checks.observation import Data, Opaque, Seen, observe
from lora_from_scratch.checks.relation import is_flat, parts, relation
from lora_from_scratch.checks.verdict import is_dtype, without_dtypes

Diagnosis = tuple[str, str]  # the misconception's name, and the message to the learner


def diagnose(
    exercise: Exercise, seed: int, cases: list[Case], seen: list[Seen], expected: tuple[Seen, ...], first: int
) -> Diagnosis:
    """The misconception behind a failed answer, and the message to the learner.

    The bank comes first: the mistake is that of the wrong answer that behaves like this one in every case or, if there
    is none, in every case with valid input (learners often forget to reject invalid input on top of another mistake).
    Then the exercise's own `explain`, then the general rules.

    Args:
        seen: what was observed in each case.
        expected: what the library's own answer does in each case.
        first: the index of the first case that failed.
    """
    if seen[first].stopped:
        return "too slow", (
            f"Your code was stopped after {exercise.seconds:g} seconds. Is there a loop that does not end, or a loop "
            "over single numbers where one operation on the whole tensor would do?"
        )
    valid = [index for index, one in enumerate(expected) if not one.raised]
    for indices in (list(range(len(cases))), valid if first in valid else []):
        for answer in wrong_answers(exercise.name):
            if answer.message and not answer.hangs and indices:
                other = observations_of(answer, exercise, seed)
                if all(_alike(exercise, cases[index], seen[index], other[index]) for index in indices):
                    return answer.name, answer.message
    if (diagnosis := _signature(exercise, seen[first])) is not None:
        return diagnosis
    values = not (seen[first].raised or expected[first].raised)  # both are there
    if exercise.explain is not None and values and comparable(seen[first].value, expected[first].value):
        try:
            diagnosis = exercise.explain(cases[first], seen[first], expected[first])
        except Exception:  # `explain` expects the right shapes and types
            diagnosis = None
        if diagnosis is not None:
            return diagnosis
    rules = RULES if exercise.agree is None else (*RULES[:-1], _unknown)  # what is right may differ from `expected`
    return next(found for rule in rules if (found := rule(seen[first], expected[first])) is not None)


def _alike(exercise: Exercise, case: Case, one: Seen, other: Seen) -> bool:
    if one.stopped or other.stopped or one.changed != other.changed:
        return False
    if one.raised or other.raised:
        return one.errors == other.errors and one.message == other.message
    if exercise.dtypes and dtypes_differ(one.value, other.value):
        return False
    return same(one.value, other.value, exercise.tolerance) or (
        exercise.agree is not None and agrees(exercise, case, one, other)
    )


def _signature(exercise: Exercise, seen: Seen) -> Diagnosis | None:
    """The answer cannot be called with these arguments: the error is raised before any of its lines run."""
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
        f"Your {name} cannot be called with the exercise's arguments: it {called[2]}. "
        f"Use the signature that the exercise gives: `{name}{wanted}`."
    )


def _raised(seen: Seen, expected: Seen) -> Diagnosis | None:
    if not seen.raised:
        return None
    place = f" (in {seen.where})" if seen.where else ""
    if expected.raised:
        return "another error", (
            f"Your code should raise a {expected.errors[0]} for this input, but it raised {seen.errors[0]}{place}: "
            f"{seen.message}"
        )
    if not place:  # in what the check did with the result, or before the first line
        return "raises", (
            f"Outside your own lines, when the check worked with what your code gives, there was {_a(seen.errors[0])}: "
            f"{seen.message}"
        )
    unknown = ". Run the cell that defines or imports it, then this one." if "NameError" in seen.errors else ""
    return "raises", f"Your code raised {seen.errors[0]}{place}: {seen.message}{unknown}"


def _a(name: str) -> str:
    return f"an {name}" if name[:1] in "AEIOU" else f"a {name}"


def _no_error(seen: Seen, expected: Seen) -> Diagnosis | None:
    if not expected.raised:
        return None
    return "no error", (
        f"This input is invalid. Your code should raise a {expected.errors[0]} that says why, but it returned a result."
    )


def _changed(seen: Seen, expected: Seen) -> Diagnosis | None:
    names = [name for name in seen.changed if name not in expected.changed]
    if not names:
        return None
    return "changes its input", (
        f"Your code modifies {' and '.join(names)} in place. The caller may still need the original, so work on a copy "
        "(`.clone()`)."
    )


def _nothing(seen: Seen, expected: Seen) -> Diagnosis | None:
    if seen.value is not None or expected.value is None:
        return None
    if seen.printed:
        return "prints", "Your code prints the result but returns nothing: it needs a `return`."
    return "returns nothing", "Your code returns None. Does every path through it end in a `return`?"


def _kind(seen: Seen, expected: Seen) -> Diagnosis | None:
    for name, s, e in parts(seen.value, expected.value):
        if isinstance(s, dict) and isinstance(e, dict):
            return "keys", f"{_start(name)} {_keys(s, e)}."
        if isinstance(s, list) and isinstance(e, list) and not (is_flat(s) and is_flat(e)):
            wanted, given = len(without_dtypes(e)), len(without_dtypes(s))
            where = f" in {name}" if name else ""
            return "number of results", f"There should be {wanted} results{where}, but your code returns {given}."
        if not ((is_number(s) and is_number(e)) or type(s) is type(e)):
            returned = f"but is {kind_of(s)}" if name else f"but your code returns {kind_of(s)}"
            return "another type", f"{_start(name)} should be {kind_of(e)}, {returned}."
    return None


def _start(name: str) -> str:
    """The beginning of a sentence about the part of that name."""
    return name[:1].upper() + name[1:] if name else "The result"


def _keys(seen: dict[str, Data], expected: dict[str, Data]) -> str:
    """What is wrong with the keys of a dictionary."""
    lacking = [key for key in expected if key not in seen]
    extra = [key for key in seen if key not in expected]
    lists = [", ".join(map(repr, keys[:3])) + (", ..." if len(keys) > 3 else "") for keys in (lacking, extra)]
    lacks = f"lacks the key{'s' * (len(lacking) > 1)} {lists[0]}" if lacking else ""
    has = f"has the key{'s' * (len(extra) > 1)} {lists[1]}, which should not be there" if extra else ""
    return " and ".join(text for text in (lacks, has) if text)


def _shape(seen: Seen, expected: Seen) -> Diagnosis | None:
    for name, s, e in _tensors(seen, expected):
        if s.shape != e.shape:
            back = s.ndim == e.ndim == 2 and s.shape == e.T.shape
            turned = " It looks transposed." if back else ""
            of = f" of {name}" if name else ""
            given = f"is {tuple(s.shape)}" if name else f"your code returns {tuple(s.shape)}"
            return (
                "transposed" if back else "shape"
            ), f"The shape{of} should be {tuple(e.shape)}, but {given}.{turned}"
    return None


def _not_finite(seen: Seen, expected: Seen) -> Diagnosis | None:
    for name, s, e in _tensors(seen, expected):
        strange = ~s.double().isfinite() & e.double().isfinite()
        if strange.any():
            entries = "is NaN or infinite" if s.ndim == 0 else "has entries that are NaN or infinite and should not be"
            return "not finite", (
                f"{_start(name)} {entries}. Is something divided by zero, "
                "or do you take the logarithm, root or exponential of an extreme number?"
            )
    return None


def _dtype(seen: Seen, expected: Seen) -> Diagnosis | None:
    found = dtypes_differ(seen.value, expected.value) or _named_dtypes(seen.value, expected.value)
    if found is None or not all(same(s, e) for _, s, e in parts(seen.value, expected.value)):
        return None
    given, wanted = (str(dtype).removeprefix("torch.") for dtype in found)
    return "dtype", f"The values are right, but the dtype should be {wanted}, and your code returns {given}."


def _named_dtypes(seen: Data, expected: Data) -> tuple[str, str] | None:
    """The first two names of dtypes that differ, where a probe adds them to its list."""
    if isinstance(seen, list) and isinstance(expected, list):
        for s, e in zip(seen, expected, strict=False):
            if isinstance(s, str) and isinstance(e, str) and is_dtype(e) and s != e:
                return s, e
    return None


def _values(seen: Seen, expected: Seen) -> Diagnosis | None:
    for tolerance in (1e-4, 1e-9):  # some exercises want more than others
        for name, s, e in parts(seen.value, expected.value):
            if not same(s, e, tolerance) and (found := relation(s, e)) is not None:
                return found[0], f"{_start(name)} {found[1]}"
    return _unknown(seen, expected)


def _unknown(seen: Seen, expected: Seen) -> Diagnosis:
    return "values", (
        "The type and the shape are right, but the values are not. Work through this input by hand, step by step."
    )


RULES: tuple[Callable[[Seen, Seen], Diagnosis | None], ...] = (
    _raised,
    _no_error,
    _nothing,
    _kind,
    _shape,
    _not_finite,
    _changed,
    _dtype,
    _values,
)


def _tensors(seen: Seen, expected: Seen) -> list[tuple[str, Tensor, Tensor]]:
    """Pairs of the tensors and numbers at the same place in both, with its name."""
    numbers = [(name, s, e) for name, s, e in parts(seen.value, expected.value) if is_number(s) and is_number(e)]
    return [(name, as_tensor(s), as_tensor(e)) for name, s, e in numbers]


@functools.lru_cache(maxsize=2048)
def observations_of(answer: Answer, exercise: Exercise, seed: int) -> tuple[Seen, ...]:
    """What is observed when an answer of the bank is tried on the exercise's cases."""
    return tuple(
        observe(exercise.probe, answer.object, [c.inputs for c in exercise.inputs(seed)], exercise.seconds, seed)
    )


def kind_of(value: Data) -> str:
    """The type and shape of a value without the value itself: what a verdict may reveal of the right answer."""
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
