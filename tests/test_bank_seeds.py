"""No verdict depends on the seed: every answer of the bank gets the same one with every seed.

`benchmarks.bank_seeds` tries 500 seeds by default, which takes hours, and records for which code that has been done.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from benchmarks import bank_seeds
from lora_from_scratch.checks.bank import right_answers, wrong_answers
from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.notebook import verdict_on
from lora_from_scratch.checks.units import PACKAGE, find, units
from lora_from_scratch.grading.building.dependencies import closure
from tests import turns
from tests.bank_on_seeds import drawn_once, surprise, surprises

SEEDS = bank_seeds.FEWEST


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


@pytest.mark.unit_01
@pytest.mark.parametrize(
    ("name", "old", "new", "changes"),
    [
        ("answers.py", "\nfrom ", "\n# a comment\nfrom ", False),
        ("answers.py", "def ", "def another() -> None: ...\n\n\ndef ", True),
        ("exercises.py", "points=", "points=1 + ", True),
    ],
)
def test_a_unit_is_tried_again_when_the_code_of_its_bank_changes_but_not_its_comments(
    name: str, old: str, new: str, changes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [unit] = [unit for unit in units() if unit.number == "01"]
    copies = shutil.copytree(PACKAGE / "unit_01", tmp_path / "unit_01")
    monkeypatch.setattr(bank_seeds, "unit_files", lambda pattern, _: sorted(copies.glob(pattern)))
    before = bank_seeds.code(unit)
    (copies / name).write_text((PACKAGE / "unit_01" / name).read_text().replace(old, new, 1))
    assert (bank_seeds.code(unit) != before) == changes


def test_the_judge_belongs_to_the_code_of_every_unit() -> None:
    files = {file.name for file in closure([bank_seeds.JUDGED_BY])}
    assert {"judge.py", "comparing.py", "diagnosis.py", "observation.py", "notebook.py"} <= files


def test_only_units_that_exist_are_recorded() -> None:
    assert set(bank_seeds.recorded()) <= {f"unit_{unit.number}" for unit in units()}


def test_make_test_tries_a_unit_unless_its_present_code_was_tried_with_enough_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [unit] = [unit for unit in units() if unit.number == "01"]
    now, enough = bank_seeds.code(unit), bank_seeds.FEWEST
    monkeypatch.setattr(turns, "tried", bank_seeds.tried.__wrapped__)
    monkeypatch.setattr(turns, "TEN", set())
    for entry, slow in (
        ({}, False),
        ({"code": "another", "seeds": 500}, False),
        ({"code": now, "seeds": enough - 1}, False),
        ({"code": now, "seeds": enough}, True),
    ):
        monkeypatch.setattr(bank_seeds, "recorded", lambda entry=entry: {"unit_01": entry})
        assert (pytest.mark.slow in turns.bank_marks("01", "rank")) == slow, entry
