"""The copy of the library in the sandbox: it holds no solution, and no answer to a prediction."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from lora_from_scratch import checks
from lora_from_scratch.checks.units import Unit, units
from lora_from_scratch.grading.building.solution import BEGIN, END, solved_source
from lora_from_scratch.grading.sandbox import standin
from lora_from_scratch.grading.sandbox.stripped import TAKEN_OUT, find_unit, stripped

UNITS = [pytest.param(unit, id=unit.number, marks=getattr(pytest.mark, f"unit_{unit.number}")) for unit in units()]


@pytest.mark.parametrize("unit", UNITS)
def test_the_stripped_library_holds_no_solution_and_no_answer_to_a_prediction(unit: Unit, library_cache: Path) -> None:
    names = [exercise.name for exercise in unit.exercises]
    package = stripped(unit, names, library_cache).package
    texts = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*") if path.is_file()}
    everything = "\n".join(texts.values())
    for exercise in unit.exercises:
        text = "\n".join(line.strip().split("  # ")[0] for line in everything.splitlines())
        for body in bodies(exercise.object, exercise.blank):
            assert len(body) < 2 or "\n".join(body) not in text, f"{exercise.name} is still there"
    checks = texts[f"checks/unit_{unit.number}/exercises.py"]
    for prediction in unit.predictions:
        assert prediction.explanation[:30] not in everything
        assert prediction.name not in checks
    assert not [name for name in texts if re.search(r"answers|judge|bank|diagnosis|cli/|pycache|solution", name)]
    for name, source in texts.items():
        if name.endswith(".py"):
            ast.parse(source)


def test_in_the_sandbox_there_is_every_function_that_learners_call() -> None:
    for name in checks.__all__:
        assert (
            inspect.signature(getattr(standin, name)).parameters == inspect.signature(getattr(checks, name)).parameters
        )


def bodies(target: object, blank: tuple[str, ...]) -> list[list[str]]:
    """The lines between each pair of marks, stripped and without comments."""
    found: list[list[str]] = []
    inside = False
    for line in solved_source(target, blank).splitlines():
        text = line.strip()
        if text in (BEGIN, END):
            inside = text == BEGIN
            found += [[]] if inside else []
        elif inside:
            found[-1].append(text.split("  # ")[0])
    return found


def test_the_library_is_copied_once_for_each_state(tmp_path: Path) -> None:
    unit = find_unit("01")
    one = stripped(unit, ["rank"], tmp_path)
    made = one.package.stat().st_mtime_ns
    assert stripped(unit, ["rank"], tmp_path).folder == one.folder
    assert one.package.stat().st_mtime_ns == made
    other = stripped(unit, ["rank", "row_echelon"], tmp_path)
    assert other.folder != one.folder
    assert len(list(tmp_path.iterdir())) == 2
    assert TAKEN_OUT in (one.package / "taken_out.py").read_text()
    with pytest.raises(ValueError, match="no exercise"):
        stripped(unit, ["delta_weight"], tmp_path)
