"""What is said of the course as a whole is what its units say."""

from __future__ import annotations

import re

import pytest

from lora_from_scratch.checks.units import names, units
from lora_from_scratch.grading.building import syllabus
from tests.tiny_course import ROOT

LAST_OF_THE_CORE = 14


def test_the_table_of_the_syllabus_is_what_the_units_give() -> None:
    text = (ROOT / "course" / "syllabus.md").read_text(encoding="utf-8")
    assert syllabus.renewed(text, ROOT) == text, "python -m lora_from_scratch.grading.building.syllabus writes it"


def test_a_syllabus_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no markers for the table"):
        syllabus.renewed("# Syllabus\n", ROOT)


def test_the_hours_that_pages_name_are_those_of_the_core_units() -> None:
    minutes = 0
    for unit in units():
        text = (ROOT / "course" / "units" / f"unit_{unit.number}.py").read_text(encoding="utf-8")
        said = re.search(r"\*\*Time\*\*: about (\d+) minutes|\*\*Time\*\*: about (two) hours", text)
        assert said is not None, unit.number
        if int(unit.number) <= LAST_OF_THE_CORE:
            minutes += 120 if said[2] else int(said[1])
    for page in ("README.md", "course/syllabus.md"):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert f"about {round(minutes / 60)} hours" in text, page


def test_the_points_that_progress_counts_are_the_exercises_and_predictions_of_the_table() -> None:
    text = (ROOT / "course" / "syllabus.md").read_text(encoding="utf-8")
    [total] = [line.split("|")[2:-1] for line in text.splitlines() if line.startswith("| **Total** |")]
    counted = sum(item.points for unit in units() for item in unit.checked)
    assert int(total[2]) + int(total[3]) == counted


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
