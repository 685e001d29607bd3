"""The bank of answers: for each exercise the mistakes that people make, and other right ways to do it.

A wrong answer is code with what is said to whoever wrote it. It tests the check (which has to refuse it, with these
words), and it is the check's diagnosis: an answer that does the same as it in every case has made this mistake.

Most answers are written out. A wrong one that differs from the reference by a token or two says only that (`changed`).

The answers to a unit's exercises are in the files `answers*.py` of its folder; a check loads those of its own unit.
An instructor adds answers in a folder of the same layout (see `units`).
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
        name: what it is called: the function's own name.
        right: whether it is right.
        message: of a wrong one, what is said to the learner: the idea that is missing, never the answer.
        caught_by: of a wrong one, the name of the general rule that finds it, where it is not found by itself.
        hangs: it does not end; so it is not tried when others are compared with the bank.
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
        """The name that the verdict gives it."""
        return self.caught_by or self.name


_bank: dict[str, list[Answer]] = {}


def wrong(exercise: str, message: str = "", *, caught_by: str = "", hangs: bool = False) -> Callable[[T], T]:
    """Enter the function or class below as a wrong answer to the exercise.

    Args:
        exercise: its name.
        message: what is said to whoever has made this mistake.
        caught_by: instead of a message, the general rule that has one ("changes its input", "returns nothing", ...).
        hangs: it does not end.

    Raises:
        ValueError: neither or both of message and caught_by are given.
    """
    if bool(message) == bool(caught_by):
        raise ValueError(
            f"a wrong answer to {exercise} needs a message, or the rule that it is caught by; one of the two"
        )

    def enter(target: T) -> T:
        name = getattr(target, "__name__", "").replace("_", " ").strip()
        _enter(Answer(exercise, target, name, False, message, caught_by, hangs))
        return target

    return enter


def right(exercise: str) -> Callable[[T], T]:
    """Enter the function or class below as another right answer to the exercise."""

    def enter(target: T) -> T:
        name = getattr(target, "__name__", "").replace("_", " ").strip()
        _enter(Answer(exercise, target, name, True))
        return target

    return enter


def changed(reference: Any, *pieces: tuple[str, str]) -> Callable[[Any], Any]:
    """Replace the empty function or class below by the reference with a few pieces of its source changed.

        @wrong("over_budget", "You count what costs exactly the limit as too expensive. A limit may be used up.")
        @changed(over_budget, ("cost[name] > limit", "cost[name] >= limit"))
        def limit_is_too_much(): ...

    For a mistake of a token or two, which would be hard to see in a copy of the whole function.

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
