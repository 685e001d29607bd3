"""What a learner's values may cost the judge, and what an answer that does nothing may earn."""

from __future__ import annotations

import contextlib
import inspect
import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lora_from_scratch.checks.comparing import comparable
from lora_from_scratch.checks.exercise import Exercise, Prediction
from lora_from_scratch.checks.judge import expected_of, judge, judge_prediction
from lora_from_scratch.checks.observation import Data, Seen, observe
from lora_from_scratch.checks.units import find, units
from lora_from_scratch.checks.verdict import LONGEST, describe
from lora_from_scratch.grading.sandbox import lockdown

EXERCISES = [pytest.param(e, id=e.name) for unit in units() for e in unit.exercises]
SEED = 5


def nested(leaf: Data, width: int, depth: int) -> Data:
    """One value, named in width ** depth places, which costs no memory."""
    value = leaf
    for _ in range(depth):
        value = [value] * width
    return value


# By name: a value that is cheap to send and dear to look at without care.
DEAR: dict[str, Callable[[], Data]] = {
    "two million rows of nothing": lambda: torch.zeros(2_000_000, 0),
    "nothing in two million places of a list": lambda: [torch.zeros(2_000_000, 0)] * 3,
    "rows of nothing behind an axis of nothing": lambda: torch.zeros(0, 2_000_000),
    "sixty thousand rows": lambda: torch.zeros(60_000, 2),
    "sixty thousand rows in each of three results": lambda: [torch.zeros(60_000, 2)] * 3,
    "sixty thousand columns": lambda: torch.zeros(2, 60_000),
    "one tensor named six times six times over": lambda: nested(torch.zeros(100_000), 6, 6),
    "one text named six times eight times over": lambda: nested("x" * 500, 6, 8),
    "a mapping of mappings": lambda: {"a" * 300: {str(n): nested(1, 6, 6) for n in range(6)}},
    "a whole number of ten thousand digits": lambda: 10**10_000,
    "a list of such numbers": lambda: [10**10_000] * 5,
    "a text of half a million characters": lambda: "x" * 500_000,
    "sixty lists in one another": lambda: nested(1, 1, 60),
    "200,000 numbers in a list": lambda: [1.5] * 200_000,
    "not a number anywhere": lambda: torch.full((1000, 100), float("nan")),
    "complex numbers": lambda: torch.ones(50_000, dtype=torch.complex128),
}


@pytest.mark.parametrize("what", DEAR)
def test_a_value_is_described_in_a_few_lines_at_little_cost(what: str) -> None:
    value = DEAR[what]()
    with memory_for(100):
        assert len(describe(value)) <= LONGEST + 10


@pytest.mark.unit_02
@pytest.mark.parametrize("what", DEAR)
@pytest.mark.parametrize("name", ["rank", "svd_by_deflation", "dominant_singular_triplet", "pca"])
def test_an_answer_that_is_dear_to_compare_is_wrong_and_costs_little(name: str, what: str) -> None:
    exercise = find(name)[1]
    assert isinstance(exercise, Exercise)
    expected_of(exercise, SEED)
    seen = [Seen(DEAR[what]()) for _ in exercise.inputs(SEED)]
    judge(exercise, SEED, [Seen(0) for _ in seen])  # the bank's answers are looked at once
    with memory_for(300):
        verdict = judge(exercise, SEED, seen)
    assert (verdict.status, verdict.points) == ("failed", 0)


GUESSES: list[Data] = [10**400, -(10**400), 10**10_000, float("inf"), float("nan"), 1e308, -1e308, [[[]]], {}]


@pytest.mark.parametrize("place", range(len(GUESSES)))
def test_a_prediction_of_any_value_is_read_and_wrong(place: int) -> None:
    for answer in (17.5, 0, -3):
        prediction = Prediction("guess", "How many?", answer, "It is so.", "counting", within=1.5)
        assert judge_prediction(prediction, GUESSES[place]).points == 0


def test_a_value_of_another_size_is_not_compared_by_an_exercises_own_law() -> None:
    assert comparable(torch.zeros(5, 3), torch.zeros(3, 3))
    assert not comparable(torch.zeros(60_000, 1), torch.zeros(3, 3))
    assert not comparable([torch.zeros(100, 100)] * 3, torch.zeros(3, 3))
    assert not comparable({"a": [1.0] * 100_000}, {"a": [1.0]})


@pytest.mark.parametrize("exercise", EXERCISES)
def test_an_answer_that_does_nothing_earns_nothing(exercise: Exercise) -> None:
    cases = exercise.inputs(SEED)
    for answer in DO_NOTHING["class" if inspect.isclass(exercise.object) else "function"]:
        seen = observe(exercise.probe, answer, [case.inputs for case in cases], exercise.seconds, SEED)
        assert judge(exercise, SEED, seen).points == 0, answer


def test_refusals_count_beside_a_value_that_is_right_and_it_is_said_where_they_do_not() -> None:
    exercise = find("stratify")[1]
    assert isinstance(exercise, Exercise)
    seen = list(expected_of(exercise, SEED))
    values = [place for place, one in enumerate(seen) if not one.raised]
    partly = [Seen(None) if place in values[1:] else one for place, one in enumerate(seen)]
    assert judge(exercise, SEED, partly).points > 0
    nothing = judge(exercise, SEED, [Seen(None) if place in values else one for place, one in enumerate(seen)])
    assert nothing.points == 0
    assert "only if some valid input gives the right result" in nothing.notes[0]


def _raising(kind: type[Exception]) -> Any:
    def answer(*_: Any, **__: Any) -> None:
        raise kind("no")

    return answer


class _Refuses:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise ValueError("no")


class _Empty:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


DO_NOTHING: dict[str, list[Any]] = {
    "function": [
        *map(_raising, (ValueError, TypeError, KeyError, NotImplementedError)),
        lambda *given, **named: None,
        lambda *given, **named: next(iter((*given, *named.values())), None),
        lambda *given, **named: 0,
        lambda *given, **named: [],
        lambda *given, **named: {},
        lambda *given, **named: "",
        lambda *given, **named: True,
        lambda *given, **named: (),
    ],
    "class": [_Refuses, _Empty],
}


@contextlib.contextmanager
def memory_for(mebibytes: int) -> Iterator[None]:
    """In the block no more than so much new memory is given."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    now = int(lockdown.sizes()["data"])
    resource.setrlimit(resource.RLIMIT_DATA, (now + (mebibytes << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
