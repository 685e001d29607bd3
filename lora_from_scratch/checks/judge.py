"""The judge's half of a check: compare the observations with the library's own answer and name the misconception.

No learner's code runs here. The judge compares plain data, and runs only the library and the bank.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable

from torch import Tensor

from lora_from_scratch.checks.comparing import agrees, dtypes_differ, numbers_in, same
from lora_from_scratch.checks.diagnosis import diagnose, kind_of
from lora_from_scratch.checks.exercise import Case, Exercise, Prediction, call
from lora_from_scratch.checks.observation import Data, Seen, observe
from lora_from_scratch.checks.statement import quoted
from lora_from_scratch.checks.units import names
from lora_from_scratch.checks.verdict import CaseResult, Failure, Verdict, describe, without_dtypes

NOT_STARTED = "NotImplementedError"
MOST_NUMBERS_BY_HAND = 40  # in inputs and result together
REFUSALS = "Rejecting invalid input earns points only if some valid input gives the right result."
PYTORCH_ERRORS = ("aten::", "not implemented for", "meta tensor")  # in PyTorch's own NotImplementedErrors


def judge(exercise: Exercise, seed: int, seen: list[Seen]) -> Verdict:
    """The verdict on an answer, from what was observed on the exercise's cases for this seed.

    Args:
        seen: one observation per case.

    Raises:
        ValueError: the number of observations differs from the number of cases.
    """
    cases = exercise.inputs(seed)
    if len(seen) != len(cases):
        raise ValueError(f"{exercise.name} has {len(cases)} cases of seed {seed}, got {len(seen)} observations")
    expected = expected_of(exercise, seed)
    right = [agrees(exercise, *triple) for triple in zip(cases, seen, expected, strict=True)]
    stopped = next((place for place, one in enumerate(seen) if one.stopped), len(cases))
    results = tuple(
        CaseResult(case.name, case.part, ok, place <= stopped)
        for place, (case, ok) in enumerate(zip(cases, right, strict=True))
    )
    parts = list(dict.fromkeys(case.part for case in cases))
    passed = [part for part in parts if all(result.right for result in results if result.part == part)]
    earned = passed if all(right) or not passed or _does_more_than_refuse(exercise, seed, right) else []
    verdict = functools.partial(
        Verdict,
        exercise=exercise.name,
        points=exercise.points * len(earned) / len(parts),
        max_points=exercise.points,
        cases=results,
        seed=seed,
        notes=() if earned == passed else (REFUSALS,),
    )
    if all(right):
        return verdict(status="passed")
    first = right.index(False)
    if seen[first].errors[:1] == (NOT_STARTED,) and not any(text in seen[first].message for text in PYTORCH_ERRORS):
        return _not_started(verdict, exercise, seen[first], any(right))
    failure = Failure(
        case=cases[first].name,
        inputs={name: describe(value) for name, value in cases[first].inputs.items()},
        got=_got(seen[first]),
        expected=_expected(exercise, cases[first], expected[first], seen[first]),
        printed=seen[first].printed,
        sentence=quoted(exercise, cases[first].sentences[0]) if cases[first].sentences else "",
    )
    name, message = diagnose(exercise, seed, cases, seen, expected, first)
    status = "stopped" if seen[first].stopped else "failed"
    return verdict(status=status, failure=failure, misconception=name, message=message)


def refuse(*arguments: object, **named: object) -> None:
    """An answer that rejects every input."""
    raise ValueError("refused")


class Refuse:
    """`refuse` as a class."""

    def __init__(self, *arguments: object, **named: object) -> None:
        refuse()


def _does_more_than_refuse(exercise: Exercise, seed: int, right: list[bool]) -> bool:
    """Whether some case is right that an answer rejecting every input gets wrong."""
    return any(ok and not free for ok, free in zip(right, _right_by_refusing(exercise, seed), strict=True))


@functools.lru_cache(maxsize=512)
def _right_by_refusing(exercise: Exercise, seed: int) -> tuple[bool, ...]:
    """Which cases an answer gets right that rejects every input."""
    cases = exercise.inputs(seed)
    answer = Refuse if inspect.isclass(exercise.object) else refuse
    seen = observe(exercise.probe, answer, [case.inputs for case in cases], exercise.seconds, seed)
    return tuple(agrees(exercise, *triple) for triple in zip(cases, seen, expected_of(exercise, seed), strict=True))


def judge_prediction(prediction: Prediction, given: Data, first: str | float | None = None) -> Verdict:
    """The verdict on a prediction: whether it is right, and in both cases why.

    Args:
        first: the prediction that was made first, which counts if the notebook now has another; None if not known.
    """
    verdict = functools.partial(Verdict, exercise=prediction.name, max_points=prediction.points, seed=0, cases=())
    given, problem = read_guess(prediction, given)
    before = "" if first is None else f"You first said {as_written(first)}"
    if problem:
        return verdict(status="not started", points=0, message=problem, notes=(f"{before}.",) if before else ())
    counts = given if first is None else first
    message = " ".join([*_reply(prediction, counts), prediction.explanation, *_measured(prediction)])
    verdict = functools.partial(
        verdict, message=message, notes=() if counts == given else (f"{before}; the first prediction counts.",)
    )
    if prediction.right(counts):
        return verdict(status="passed", points=prediction.points)
    return verdict(status="failed", points=0, misconception="another prediction")


def read_guess(prediction: Prediction, given: Data) -> tuple[Data, str]:
    """The prediction as intended, and what is wrong with it ("" if it can be judged).

    " B" counts as choice "b", and a tensor with one number as that number.
    """
    given = _guess(prediction, given)
    keys = [f'"{key}"' for key in prediction.choices]
    if given is None:
        return None, f"First set {prediction.name} to {' or '.join(keys) or 'a number'}."
    if prediction.choices and (not isinstance(given, str) or given not in prediction.choices):
        return given, f"{prediction.name} is {describe(given)}; it must be one of {', '.join(keys)}."
    if not prediction.choices and (isinstance(given, bool) or not isinstance(given, int | float)):
        return given, f"{prediction.name} is {describe(given)}; it must be a number."
    return given, ""


def as_written(guess: Data) -> str:
    """A prediction as it is written in the notebook."""
    return f'"{guess}"' if isinstance(guess, str) else describe(guess)


def _reply(prediction: Prediction, counts: Data) -> list[str]:
    """What to say about this choice or number, before the explanation."""
    if prediction.choices:
        other = prediction.replies.get(str(counts))
        return [f'You took "{counts}": {other}'] if other else [f'You took "{counts}".']
    answer = float(prediction.answer)
    said = f"You said {describe(counts)}; the answer is {answer:.3g}."
    if prediction.right(counts) or not isinstance(counts, int | float):
        return [said]
    return [said, prediction.replies.get("above" if counts > answer else "below", "")]


def _measured(prediction: Prediction) -> list[str]:
    """Whose run the answer is from."""
    run = prediction.measured
    return [f"Measured at the committed settings: {run}. Your own run may differ."] if run else []


def _guess(prediction: Prediction, given: Data) -> Data:
    """The prediction as intended: " B" counts as choice "b", and a tensor with one number as that number."""
    if isinstance(given, str):
        named = {key.lower(): key for key in prediction.choices}
        return named.get(given.strip().lower(), given)
    if isinstance(given, Tensor) and given.ndim == 0 and not given.is_complex():
        return given.item()
    return given


@functools.lru_cache(maxsize=512)
def expected_of(exercise: Exercise, seed: int) -> tuple[Seen, ...]:
    """The observations of the library's own answer, with which a learner's are compared.

    Raises:
        RuntimeError: the library's answer did not end, or raised something other than a `ValueError`. A learner's
            answer that fails in the same way would otherwise count as right.
    """
    expected = tuple(observe(exercise.probe, exercise.object, [c.inputs for c in exercise.inputs(seed)], 60, seed))
    for one in expected:
        if one.stopped or (one.raised and "ValueError" not in one.errors):
            raise RuntimeError(f"the library's own {exercise.name} failed: {one.errors[:1]} {one.message}")
    return expected


def _expected(exercise: Exercise, case: Case, expected: Seen, seen: Seen) -> str:
    """The value expected where inputs and value are small enough to work it out by hand, otherwise only its kind.

    Empty if it is a record made by the probe rather than the learner's return value.
    """
    if expected.raised:
        return f"a {expected.errors[0]}"
    record = exercise.probe is not call and isinstance(expected.value, dict)
    small = exercise.probe is call and numbers_in([*case.inputs.values(), expected.value]) <= MOST_NUMBERS_BY_HAND
    alike = not (seen.raised or seen.stopped) and kind_of(seen.value) == kind_of(expected.value)
    if record:
        return ""
    text = describe(expected.value) if small else kind_of(expected.value)
    if alike and set(seen.changed) - set(expected.changed):
        return f"{text}, and unchanged inputs"
    if not alike or text != (describe if small else kind_of)(seen.value):
        return text
    return f"{text}, in more digits" if small else _another(exercise, seen.value, expected.value)


def _another(exercise: Exercise, seen: Data, expected: Data) -> str:
    """What is expected where the answer gives a wrong value of the right kind."""
    kind = kind_of(expected)
    if exercise.dtypes and dtypes_differ(seen, expected):
        return f"{kind} of another dtype"
    if isinstance(expected, Tensor):
        return f"{kind} with other values"
    if isinstance(expected, list) and isinstance(seen, list):
        results = list(zip(without_dtypes(seen), without_dtypes(expected), strict=False))
        wrong = [place for place, (s, e) in enumerate(results, 1) if not same(s, e, exercise.tolerance)]
        if exercise.agree is None and 0 < len(wrong) < len(results):
            return f"{kind}; not right: {', '.join(f'number {place}' for place in wrong[:6])}"
        return f"{kind} with other values"
    return "the opposite" if isinstance(expected, bool) else re.sub("^a ", "another ", kind)


def _got(seen: Seen) -> str:
    if seen.stopped:
        return "no result in time"
    return f"{seen.errors[0]}: {seen.message}" if seen.raised else describe(seen.value)


def _not_started(verdict: Callable[..., Verdict], exercise: Exercise, seen: Seen, something: bool) -> Verdict:
    inside = seen.where.split(",")[0]
    if inside != exercise.name and inside in names():
        message = f"{inside}, which your code calls, is not written yet. Write it first, or use the library's version."
        return verdict(status="not started", misconception="needs another exercise", message=message)
    message = "One part is not written yet." if something else "Write the code in the cell above, then run both cells."
    return verdict(status="not started", message=message)
