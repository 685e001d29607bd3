"""Every check is tested by its bank: wrong answers that it has to refuse, right ones that it has to accept."""

from __future__ import annotations

import pytest

from lora_from_scratch.checks.bank import Answer, exercises, right_answers, wrong_answers
from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.notebook import verdict_on
from lora_from_scratch.checks.units import find, units

EXERCISES = [
    pytest.param(exercise, id=exercise.name, marks=getattr(pytest.mark, f"unit_{unit.number}"))
    for unit in units()
    for exercise in unit.exercises
]


def answers(right: bool) -> list:
    return [
        pytest.param(answer, id=f"{exercise.name}-{answer.name}", marks=getattr(pytest.mark, f"unit_{unit.number}"))
        for unit in units()
        for exercise in unit.exercises
        for answer in (right_answers if right else wrong_answers)(exercise.name)
    ]


@pytest.mark.parametrize("answer", answers(right=False))
def test_a_wrong_answer_fails_with_its_own_message_on_twenty_seeds(answer: Answer) -> None:
    for seed in range(3 if answer.hangs else 20):
        verdict = verdict_on(answer.exercise, seed, {answer.exercise: answer.object})
        assert not verdict.passed, f"seed {seed}"
        assert verdict.misconception == answer.misconception, f"seed {seed}: {verdict.message}"
        assert verdict.message
        if answer.message:
            assert verdict.message == answer.message
        assert verdict.points < verdict.max_points


@pytest.mark.parametrize("answer", answers(right=True))
def test_another_right_answer_passes_on_fifty_seeds(answer: Answer) -> None:
    for seed in range(50):
        verdict = verdict_on(answer.exercise, seed, {answer.exercise: answer.object})
        assert verdict.passed, f"seed {seed}: {verdict.failure} {verdict.message}"
        assert verdict.points == verdict.max_points


@pytest.mark.parametrize("exercise", EXERCISES)
def test_an_exercise_has_five_wrong_answers_and_two_right_ones(exercise: Exercise) -> None:
    assert len(wrong_answers(exercise.name)) >= 5
    assert len(right_answers(exercise.name)) >= 2


def test_every_answer_of_the_bank_is_to_an_exercise_that_exists() -> None:
    for name in exercises():
        assert isinstance(find(name)[1], Exercise)
