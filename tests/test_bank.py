"""Every check is tested by its bank: wrong answers that it has to refuse, right ones that it has to accept."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from benchmarks.bank_seeds import FEWEST
from lora_from_scratch.checks import bank, judge
from lora_from_scratch.checks.bank import Answer, exercises, right_answers, wrong_answers
from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.notebook import verdict_on
from lora_from_scratch.checks.units import PACKAGE, find, units
from tests.bank_on_seeds import surprises
from tests.turns import bank_marks

IN_TURN = [
    pytest.param(exercise, id=exercise.name, marks=bank_marks(unit.number, exercise.name))
    for unit in units()
    for exercise in unit.exercises
]
EXERCISES = [
    pytest.param(exercise, id=exercise.name, marks=getattr(pytest.mark, f"unit_{unit.number}"))
    for unit in units()
    for exercise in unit.exercises
]


def answers(right: bool) -> list:
    return [
        pytest.param(answer, id=f"{exercise.name}-{answer.name}", marks=bank_marks(unit.number, exercise.name))
        for unit in units()
        for exercise in unit.exercises
        for answer in (right_answers if right else wrong_answers)(exercise.name)
    ]


@pytest.mark.parametrize("exercise", IN_TURN)
def test_every_answer_gets_the_verdict_that_the_bank_says_with_every_seed(exercise: Exercise) -> None:
    assert surprises(exercise, range(FEWEST)) == {}


@pytest.mark.parametrize("answer", answers(right=False))
def test_a_learner_with_a_wrong_answer_is_told_its_own_message(answer: Answer) -> None:
    verdict = verdict_on(answer.exercise, 0, {answer.exercise: answer.object})
    assert not verdict.passed
    assert verdict.misconception == answer.misconception, verdict.message
    assert verdict.message
    if answer.message:
        assert verdict.message == answer.message
    assert verdict.points < verdict.max_points


@pytest.mark.parametrize("answer", answers(right=True))
def test_a_learner_with_another_right_answer_gets_all_points(answer: Answer) -> None:
    verdict = verdict_on(answer.exercise, 0, {answer.exercise: answer.object})
    assert verdict.passed, f"{verdict.failure} {verdict.message}"
    assert verdict.points == verdict.max_points


@pytest.mark.parametrize("exercise", EXERCISES)
def test_an_exercise_has_five_wrong_answers_and_four_right_ones(exercise: Exercise) -> None:
    assert len(wrong_answers(exercise.name)) >= 5
    assert len(right_answers(exercise.name)) >= 4


def test_every_answer_of_the_bank_is_to_an_exercise_that_exists() -> None:
    for name in exercises():
        assert isinstance(find(name)[1], Exercise)


@pytest.mark.unit_01
def test_the_reference_is_run_once_for_all_answers() -> None:
    judge.expected_of.cache_clear()
    for answer in right_answers("rank") + wrong_answers("rank"):
        if not answer.hangs:
            verdict_on("rank", 0, {"rank": answer.object})
    assert judge.expected_of.cache_info().misses == 1


@pytest.mark.unit_01
def test_a_check_that_fails_loads_the_bank_of_its_own_unit_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr(bank, "load", loaded.append)
    monkeypatch.setattr(bank, "_load", functools.cache(bank._load.__wrapped__))
    verdict = verdict_on("rank", 0, {"rank": lambda *arguments, **options: -1})
    assert verdict.status == "failed"
    assert loaded == sorted((PACKAGE / "unit_01").glob("answers*.py")) != []
