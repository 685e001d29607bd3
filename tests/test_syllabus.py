"""What is said of the course as a whole is what its units say."""

from __future__ import annotations

import re

import pytest

from lora_from_scratch.checks.units import names, units
from lora_from_scratch.grading.building import syllabus
from tests.tiny_course import ROOT


def test_the_table_of_the_syllabus_is_what_the_units_give() -> None:
    text = (ROOT / "course" / "syllabus.md").read_text(encoding="utf-8")
    assert syllabus.renewed(text, ROOT) == text, "python -m lora_from_scratch.grading.building.syllabus writes it"


def test_a_syllabus_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no markers for the table"):
        syllabus.renewed("# Syllabus\n", ROOT)


def test_the_hours_and_points_that_pages_name_are_the_units() -> None:
    core, counted = 0, sum(item.points for unit in units() for item in unit.checked)
    for unit in units():
        text = (ROOT / "course" / "units" / f"unit_{unit.number}.py").read_text(encoding="utf-8")
        said = re.search(r"\*\*Time\*\*: about (\d+ minutes|one hour|two hours)", text)
        assert said is not None, unit.number
        minutes = {"one hour": 60, "two hours": 120}.get(said[1]) or int(said[1].split()[0])
        if int(unit.number) <= 14:
            core += minutes
        else:
            assert 40 <= minutes <= 80, unit.number  # "a little over an hour each"
    for page in ("README.md", "course/syllabus.md"):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert f"about {round(core / 60)} hours" in text, page
    assert f"exercises and predictions, {counted} of these points" in text


@pytest.mark.parametrize("page", ["workshops.md", "teaching_notes.md", "syllabus.md"])
def test_every_exercise_that_a_page_for_teachers_names_exists(page: str) -> None:
    text = (ROOT / "course" / page).read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| \d\d \|", line)]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named <= names()


def test_no_unit_of_the_core_has_more_than_two_exercises_of_difficulty_one() -> None:
    for unit in units():
        if int(unit.number) >= 5:
            assert sum(exercise.difficulty == 1 for exercise in unit.exercises) <= 2, unit.number


def test_the_units_05_to_14_have_at_least_45_exercises() -> None:
    assert sum(len(unit.exercises) for unit in units() if int(unit.number) >= 5) >= 45
