"""The bank of answers: for each exercise, common mistakes and alternative right solutions.

A wrong answer is code with a message to the learner. It has two uses: it tests the check, which has to reject it with
this message; and it is the check's diagnosis, because an answer that behaves like it in every case makes the same
mistake.

Most answers are written out in full. A wrong answer that differs from the reference by only a token or two is given as
that difference (`changed`).

The answers to a unit's exercises are in the files `answers*.py` of its folder; a check loads only those of its own
unit. Instructors can add answers in a folder with the same layout (see `units`).
"""

from __future__ import annotations

import functools
import inspect
import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from lora_from_scratch.checks.units import find, load, names, unit_files, units

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """One answer of the bank.

    Attributes:
        exercise: the exercise's name.
        object: the function or class.
        name: the name of the function or class, with spaces for underscores.
        right: whether it is right.
        message: for a wrong answer, the message to the learner: the idea that is missing, never the answer.
        caught_by: for a wrong answer without a message, the name of the general rule that catches it.
        hangs: whether it never ends; such answers are not run when an answer is compared with the bank.
    """

    exercise: str
    object: Any
    name: str
    right: bool
    message: str = ""
    caught_by: str = ""
    hangs: bool = False

    @property
    def misconception(self) -> str:
        """The name that the verdict gives to this mistake."""
        return self.caught_by or self.name


_bank: dict[str, list[Answer]] = {}


def wrong(exercise: str, message: str = "", *, caught_by: str = "", hangs: bool = False) -> Callable[[T], T]:
    """Decorator: register a function or class as a wrong answer to an exercise.

    Args:
        exercise: the name of the exercise.
        message: the message to learners who make this mistake.
        caught_by: instead of a message, the general rule that catches it ("changes its input", "returns nothing", ...).
        hangs: whether the answer never ends.

    Raises:
        ValueError: neither or both of `message` and `caught_by` are given.
    """
    if bool(message) == bool(caught_by):
        raise ValueError(f"a wrong answer to {exercise} needs either a message or the name of the rule that catches it")

    def enter(target: T) -> T:
        name = getattr(target, "__name__", "").replace("_", " ").strip()
        _enter(Answer(exercise, target, name, False, message, caught_by, hangs))
        return target

    return enter


def right(exercise: str) -> Callable[[T], T]:
    """Decorator: register a function or class as an alternative right answer to an exercise."""

    def enter(target: T) -> T:
        name = getattr(target, "__name__", "").replace("_", " ").strip()
        _enter(Answer(exercise, target, name, True))
        return target

    return enter


def changed(reference: Any, *pieces: tuple[str, str]) -> Callable[[Any], Any]:
    """Decorator: replace an empty function or class by the reference with a few pieces of its source changed.

        @wrong("over_budget", "You count what costs exactly the limit as too expensive. A limit may be used up.")
        @changed(over_budget, ("cost[name] > limit", "cost[name] >= limit"))
        def limit_is_too_much(): ...

    Use it for a mistake of a token or two, which would be hard to see in a copy of the whole function.

    Args:
        reference: the library's function or class, which solves the exercise.
        pieces: pairs (old, new). The old text must occur exactly once in the reference's source.

    Raises:
        ValueError: an old text does not occur exactly once.
    """

    def make(empty: Any) -> Any:
        name, source = empty.__name__, inspect.getsource(inspect.unwrap(reference))
        for old, new in pieces:
            if source.count(old) != 1:
                raise ValueError(
                    f"{name} changes {old!r}, which must occur exactly once in the source of {reference.__name__}; "
                    f"it occurs {source.count(old)} times"
                )
            source = source.replace(old, new)
        file = f"<{reference.__name__}, changed: {name}>"
        lines = source.splitlines(keepends=True)
        linecache.cache[file] = (len(source), None, lines, file)  # where inspect and tracebacks look
        namespace = dict(vars(sys.modules[reference.__module__]))
        exec(compile(source, file, "exec", annotations.compiler_flag, dont_inherit=True), namespace)
        made = namespace[reference.__name__]
        made.__name__ = made.__qualname__ = name
        made.__module__ = empty.__module__
        return made

    return make


def wrong_answers(exercise: str) -> list[Answer]:
    return [answer for answer in _answers(exercise) if not answer.right]


def right_answers(exercise: str) -> list[Answer]:
    return [answer for answer in _answers(exercise) if answer.right]


def exercises() -> list[str]:
    """The names of the exercises that have answers in the bank."""
    for unit in units():
        _load(unit.number)
    return list(_bank)


def _answers(exercise: str) -> list[Answer]:
    if exercise in names():
        _load(find(exercise)[0].number)
    return _bank.get(exercise, [])


def _enter(answer: Answer) -> None:
    if answer.name in [other.name for other in _bank.setdefault(answer.exercise, [])]:
        raise ValueError(f"the bank has two answers to {answer.exercise} with the name {answer.name!r}; rename one")
    _bank[answer.exercise].append(answer)


@functools.cache
def _load(unit: str) -> None:
    for file in unit_files("answers*.py", f"unit_{unit}"):
        load(file)
