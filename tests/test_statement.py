"""Every sentence of every statement has a case that fails when the sentence is broken."""

from __future__ import annotations

import dataclasses

import pytest

from lora_from_scratch.checks.bank import wrong_answers
from lora_from_scratch.checks.comparing import agrees
from lora_from_scratch.checks.diagnosis import observations_of
from lora_from_scratch.checks.exercise import Case, Exercise
from lora_from_scratch.checks.judge import expected_of
from lora_from_scratch.checks.notebook import verdict_on
from lora_from_scratch.checks.statement import quoted, sentences, without_a_case
from lora_from_scratch.checks.units import find, units

EXERCISES = [
    pytest.param(exercise, id=exercise.name, marks=getattr(pytest.mark, f"unit_{unit.number}"))
    for unit in units()
    for exercise in unit.exercises
]


@pytest.mark.parametrize("exercise", EXERCISES)
def test_every_sentence_has_a_case_or_is_listed_as_background(exercise: Exercise) -> None:
    assert without_a_case(exercise) == []


@pytest.mark.parametrize("exercise", EXERCISES)
def test_every_case_stands_for_a_sentence(exercise: Exercise) -> None:
    assert [case.name for case in exercise.inputs(0) if not case.sentences] == []


@pytest.mark.parametrize("exercise", EXERCISES)
def test_background_and_cases_do_not_quote_the_same_sentence(exercise: Exercise) -> None:
    of_cases = {quoted(exercise, quote) for case in exercise.inputs(0) for quote in case.sentences}
    assert of_cases & {quoted(exercise, quote) for quote in exercise.background} == set()


@pytest.mark.parametrize("exercise", EXERCISES)
def test_for_every_sentence_a_wrong_answer_of_the_bank_fails_in_one_of_its_cases(exercise: Exercise) -> None:
    cases, expected = exercise.inputs(0), expected_of(exercise, 0)
    broken: set[str] = set()
    for answer in wrong_answers(exercise.name):
        if answer.hangs:
            continue
        seen = observations_of(answer, exercise, 0)
        for case, one, other in zip(cases, seen, expected, strict=True):
            if not agrees(exercise, case, one, other):
                broken |= {quoted(exercise, quote) for quote in case.sentences}
    promised = {quoted(exercise, quote) for case in cases for quote in case.sentences}
    assert promised - broken == set()


def rank() -> Exercise:
    exercise = find("rank")[1]
    assert isinstance(exercise, Exercise)
    return exercise


def double(x: float) -> float:
    """Twice the number (Euclid, vol. 7). It is exact; see e.g. `x + x; x`.

    - Zero stays zero.
    - A negative number
      stays negative.

    Args:
        x: a number, which may be
            infinite.
        y: unused.

    Returns:
        A number of the same sign, which may
        be infinite. Never None.

    Raises:
        ValueError: never.
    """
    return 2 * x


DOUBLE = dataclasses.replace(rank(), object=double, cases=lambda draw: [Case("one", {"x": 1.0}, sentences=("Twice",))])


def test_a_statement_is_split_into_its_sentences_items_and_arguments() -> None:
    assert sentences(DOUBLE) == [
        "Twice the number (Euclid, vol. 7).",
        "It is exact;",
        "see e.g. `x + x; x`.",
        "Zero stays zero.",
        "A negative number stays negative.",
        "x: a number, which may be infinite.",
        "y: unused.",
        "A number of the same sign, which may be infinite.",
        "Never None.",
        "ValueError: never.",
    ]


def test_a_quote_that_fits_no_sentence_or_two_is_refused() -> None:
    assert quoted(DOUBLE, "negative\n   number") == "A negative number stays negative."
    with pytest.raises(ValueError, match="no sentence"):
        quoted(DOUBLE, "thrice")
    with pytest.raises(ValueError, match="2 sentences"):
        quoted(DOUBLE, "stays")


def test_a_failing_learner_is_shown_the_sentence_of_the_case() -> None:
    verdict = verdict_on("rank", 0, {"rank": lambda *arguments, **options: -1})
    assert verdict.failure is not None
    assert verdict.failure.sentence == quoted(rank(), rank().inputs(0)[0].sentences[0])
