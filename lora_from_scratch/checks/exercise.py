"""Exercises and predictions.

An exercise consists of an object of the library, the inputs on which answers are tried, and its metadata. An answer is
compared with the library's own object on the same inputs through the same probe. Most checks therefore consist only of
cases; some also need their own comparison (signs of singular vectors, laws of a random initialisation).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_from_scratch.checks.observation import Data, Seen

T = TypeVar("T")
DIFFICULTIES = range(1, 6)
NUMBER_OF_HINTS = 3
LARGEST_GUESS = 1e300  # larger integers cannot be divided as floats


class Draw:
    """Random inputs from one seed: new for every check in a notebook, derived from the cohort's secret in grading."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, smallest: int, largest: int) -> int:
        """An integer between smallest and largest, both included."""
        return int(torch.randint(smallest, largest + 1, (), generator=self.generator))

    def number(self, smallest: float, largest: float) -> float:
        """A uniform random number between smallest and largest."""
        return smallest + (largest - smallest) * float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def choice(self, values: Sequence[T]) -> T:
        return values[self.integer(0, len(values) - 1)]

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers of the given shape."""
        return torch.randn(shape, generator=self.generator, dtype=dtype)

    def integers(self, smallest: int, largest: int, *shape: int) -> Tensor:
        """Integers (int64) of the given shape between smallest and largest, both included."""
        return torch.randint(smallest, largest + 1, shape, generator=self.generator)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)

    def low_rank(self, m: int, n: int, rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """An (m, n) matrix of exactly the given rank, up to rounding."""
        return self.normal(m, rank, dtype=dtype) @ self.normal(rank, n, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One set of inputs on which an answer is tried.

    Attributes:
        name: a description for the learner: "a wide matrix of rank 2".
        inputs: the probe's arguments by name; plain data only (`Data`).
        part: the part of the exercise that it tests. Points are divided equally among the parts, and a part counts
            if all of its cases are right. With only one part, it is all or nothing.
        sentences: the sentences of the docstring for which it stands, each by a few of its words, most important
            first: an answer that breaks one of them fails here. A failing learner is shown the first in full.
    """

    name: str
    inputs: Mapping[str, Data]
    part: str = "the result"
    sentences: tuple[str, ...] = ()


def call(answer: Callable[..., Any], **inputs: Data) -> Any:
    """The default probe: call the answer with the inputs."""
    return answer(**inputs)


@dataclass(frozen=True)
class Exercise:
    """An object of the library as an exercise.

    Attributes:
        object: the library's own function or class. Its docstring is the statement, its body the solution.
        idea: the idea of the course to which it belongs; progress is also shown by idea.
        difficulty: 1 to 5.
        minutes: how long it takes a learner.
        points: the maximum number of points.
        hints: three hints, each giving away more than the previous one; the last still leaves the code to be written.
        cases: yields the cases for a given `Draw`, simple ones first.
        probe: `probe(answer, **case.inputs)` runs in the learner's process and returns what is to be compared.
        tolerance: the largest allowed error, relative to the largest entry of a tensor.
        dtypes: whether a tensor must have the dtype of the library's; False: any dtype that can hold the values.
        background: the sentences of the docstring that promise nothing which could be tested, each by a few of its
            words. A case stands for every other sentence (see `checks.statement`).
        agree: `agree(case, seen, expected)` returns whether the answer is right; it must hold for `expected` itself.
            None means equal within the tolerance (`comparing.same`).
        explain: `explain(case, seen, expected)` returns what is wrong as `(name, message)`, or None. It is used if
            no answer of the bank explains the mistake, and neither it nor the library's raised an error.
        blank: for a class, the methods whose bodies the learner writes; empty means all of them.
        seconds: the time limit for all cases together.
    """

    object: Any
    idea: str
    difficulty: int
    minutes: int
    points: int
    hints: tuple[str, str, str]
    cases: Callable[[Draw], Iterable[Case]]
    probe: Callable[..., Any] = call
    tolerance: float = 1e-4
    dtypes: bool = False
    background: tuple[str, ...] = ()
    agree: Callable[[Case, Seen, Seen], bool] | None = None
    explain: Callable[[Case, Seen, Seen], tuple[str, str] | None] | None = None
    blank: tuple[str, ...] = ()
    seconds: float = 4.0

    def __post_init__(self) -> None:
        if self.difficulty not in DIFFICULTIES:
            raise ValueError(f"{self.name}: difficulty must be 1 to 5, got {self.difficulty}")
        if self.minutes < 1 or self.points < 1:
            raise ValueError(f"{self.name}: minutes and points must be at least 1, got {self.minutes}, {self.points}")
        if len(self.hints) != NUMBER_OF_HINTS or not all(self.hints):
            raise ValueError(f"{self.name}: there must be {NUMBER_OF_HINTS} hints, got {len(self.hints)}")
        if not self.idea:
            raise ValueError(f"{self.name}: the idea that it belongs to is missing")
        if not inspect.getdoc(self.object):
            raise ValueError(f"{self.name}: the library's object has no docstring, which would be the statement")

    @property
    def name(self) -> str:
        return self.object.__name__

    def inputs(self, seed: int) -> list[Case]:
        return list(self.cases(Draw(seed)))

    @property
    def lines(self) -> int:
        """Number of code lines in the library's own answer, without docstrings, comments and blank lines."""
        return solution_lines(self.object, self.blank)


@dataclass(frozen=True)
class Prediction:
    """A question to answer before an experiment shows the result: multiple choice, or a number.

    Attributes:
        name: the variable that holds the learner's prediction.
        question: Markdown; the build lists the choices below it.
        answer: a key of `choices`, or a number.
        explanation: why the answer is right; shown afterwards, whether the prediction was right or not.
        choices: key to text; empty when a number is asked for.
        within: for a number, the largest ratio between prediction and answer that counts as right.
        replies: what is wrong with each other choice, by key; for a number, with one "below" or "above" the answer.
        measured: the run in which the answer was measured ("60 steps, seed 0"), if the learner's own may differ.
    """

    name: str
    question: str
    answer: str | float
    explanation: str
    idea: str
    choices: Mapping[str, str] = field(default_factory=dict)
    within: float = 1.0
    points: int = 1
    replies: Mapping[str, str] = field(default_factory=dict)
    measured: str = ""

    def __post_init__(self) -> None:
        if self.choices and self.answer not in self.choices:
            raise ValueError(f"{self.name}: the answer {self.answer!r} is not one of {', '.join(self.choices)}")
        if not self.choices and (isinstance(self.answer, str) or self.within < 1):
            raise ValueError(f"{self.name}: without choices the answer is a number and `within` at least 1")
        if unknown := set(self.replies) - set(self.wrong_ways):
            raise ValueError(f"{self.name}: there is no other answer {', '.join(sorted(unknown))} to reply to")

    @property
    def wrong_ways(self) -> tuple[str, ...]:
        """The keys of `replies`: every choice but the right one, or the two sides of a number."""
        return tuple(key for key in self.choices if key != self.answer) or ("below", "above")

    def right(self, given: Data) -> bool:
        if self.choices:
            return isinstance(given, str) and given.strip().lower() == str(self.answer).lower()
        answer = float(self.answer)
        if isinstance(given, bool) or not isinstance(given, int | float) or abs(given) > LARGEST_GUESS:
            return False
        if answer == 0 or given * answer <= 0:
            return given == answer
        return max(given / answer, answer / given) <= self.within * (1 + 1e-9)


def solution_lines(target: Any, blank: tuple[str, ...] = ()) -> int:
    """Number of code lines in the bodies that a learner has to write."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(target)))
    source = textwrap.dedent(inspect.getsource(target)).splitlines()
    lines: set[int] = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or (blank and function.name not in blank):
            continue
        body = function.body[1:] if ast.get_docstring(function) is not None else function.body
        for statement in body:
            lines.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    return sum(1 for line in lines if source[line - 1].strip() and not source[line - 1].strip().startswith("#"))
