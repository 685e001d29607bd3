"""No verdict depends on the seed: every answer of the bank gets the same one with five hundred seeds."""

from __future__ import annotations

import dataclasses

import pytest

from lora_from_scratch.checks.bank import right_answers, wrong_answers
from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.notebook import verdict_on
from lora_from_scratch.checks.units import find, units
from tests.bank_on_seeds import drawn_once, surprise, surprises

SEEDS = 500


@pytest.mark.slow
@pytest.mark.parametrize(
    "exercise",
    [
        pytest.param(
            exercise,
            id=exercise.name,
            marks=getattr(pytest.mark, f"unit_{unit.number}"),
        )
        for unit in units()
        for exercise in unit.exercises
    ],
)
def test_no_verdict_depends_on_the_seed(exercise: Exercise) -> None:
    assert surprises(exercise, range(SEEDS)) == {}


@pytest.mark.unit_14
def test_what_is_drawn_once_is_what_is_drawn_again() -> None:
    exercise = find("over_budget")[1]
    assert isinstance(exercise, Exercise)
    once = drawn_once(exercise)
    for seed in (3, 4, 3):
        assert once.inputs(seed) == exercise.inputs(seed)
    assert once.inputs(3) == once.inputs(3)
    assert once.inputs(3)[0] is once.inputs(3)[0]


@pytest.mark.unit_14
def test_it_is_noticed_when_a_verdict_is_not_what_the_bank_says() -> None:
    [right, *_] = right_answers("over_budget")
    [wrong, *_] = wrong_answers("over_budget")
    passed, failed = (verdict_on("over_budget", 0, {"over_budget": one.object}) for one in (right, wrong))
    assert surprise(right, passed) is None
    assert surprise(wrong, failed) is None
    assert surprise(wrong, passed) == "passes"
    assert "is told" in str(surprise(right, failed))
    assert "is told" in str(surprise(wrong, dataclasses.replace(failed, message="Something else.")))
    assert "is told" in str(surprise(wrong, dataclasses.replace(failed, misconception="another")))
