"""What an exercise is: an object of the library, inputs to try an answer on, and what is said about it.

An answer is compared with the library's own object on the same inputs, through the same probe. So a check is
nothing but its cases, unless the comparison needs to know more (signs of singular vectors, laws of a random start).
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
LARGEST_GUESS = 1e300  # a whole number can be too large to be compared with any other


class Draw:
    """Random inputs, all of one seed: fresh for a learner every time, the cohort's secret when grading."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, smallest: int, largest: int) -> int:
        """A whole number from smallest to largest, both included."""
        return int(torch.randint(smallest, largest + 1, (), generator=self.generator))

    def number(self, smallest: float, largest: float) -> float:
        """A number, uniform between the two."""
        return smallest + (largest - smallest) * float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def choice(self, values: Sequence[T]) -> T:
        return values[self.integer(0, len(values) - 1)]

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers in that shape."""
        return torch.randn(shape, generator=self.generator, dtype=dtype)

    def integers(self, smallest: int, largest: int, *shape: int) -> Tensor:
        """Whole numbers from smallest to largest, both included, in that shape (int64)."""
        return torch.randint(smallest, largest + 1, shape, generator=self.generator)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)

    def low_rank(self, m: int, n: int, rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """An (m, n) matrix of exactly that rank, up to rounding."""
        return self.normal(m, rank, dtype=dtype) @ self.normal(rank, n, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One thing that an answer is tried on.

    Attributes:
        name: what it is, in words for the learner: "a wide matrix of rank 2".
        inputs: the probe's arguments by name; plain data only (`Data`).
        part: which part of the exercise it tries. Points are shared out over the parts, and a part counts
            when all of its cases are right. One part, whatever its name: all or nothing.
    """

    name: str
    inputs: Mapping[str, Data]
    part: str = "the result"


def call(answer: Callable[..., Any], **inputs: Data) -> Any:
    """The probe that most exercises need: call the answer with the inputs."""
    return answer(**inputs)


@dataclass(frozen=True)
class Exercise:
    """An object of the library as an exercise.

    Attributes:
        object: the library's own function or class. Its docstring is the statement, its body the solution.
        idea: the idea of the course that it belongs to; progress is shown by idea.
        difficulty: 1 to 5.
        minutes: how long it takes a learner.
        points: what it is worth.
        hints: three, each giving away more than the one before; the last still leaves the writing to do.
        cases: the inputs to try, drawn afresh from a seed; simple ones first.
        probe: `probe(answer, **case.inputs)` runs beside the learner's code and returns what there is to see.
        tolerance: how far numbers may be off, relative to the largest of a tensor.
        agree: `agree(case, seen, expected)`: is it as good as right? None: the same within the tolerance
            (`judge.same`). It must hold for `expected` itself.
        explain: `explain(case, seen, expected)`: what is wrong, as `(name, message)`, where the bank and the general
            rules do not know; or None.
        blank: of a class, the methods whose bodies are the exercise; empty: all of them.
        seconds: how long all cases together may take.
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
        """How many lines of code the library's own answer has: no docstring, comment or blank line counted."""
        return solution_lines(self.object, self.blank)


@dataclass(frozen=True)
class Prediction:
    """A question to answer before an experiment shows it: several choices, or a number.

    Attributes:
        name: the variable that holds the learner's prediction.
        question: Markdown; choices are listed below it by the build.
        answer: a key of `choices`, or a number.
        explanation: what is said afterwards, whether the prediction was right or not.
        choices: key to text; empty when a number is asked for.
        within: for a number, the largest ratio between prediction and answer that still counts as right.
    """

    name: str
    question: str
    answer: str | float
    explanation: str
    idea: str
    choices: Mapping[str, str] = field(default_factory=dict)
    within: float = 1.0
    points: int = 1

    def __post_init__(self) -> None:
        if self.choices and self.answer not in self.choices:
            raise ValueError(f"{self.name}: the answer {self.answer!r} is not one of {', '.join(self.choices)}")
        if not self.choices and (isinstance(self.answer, str) or self.within < 1):
            raise ValueError(f"{self.name}: without choices the answer is a number and `within` at least 1")

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
    """Lines of code in the bodies that a learner has to write."""
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
