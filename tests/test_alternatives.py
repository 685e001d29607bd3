"""Every right answer of the bank, handed in with warnings, prints and plots, has its full points in the gradebook.

A learner answers each exercise of a unit by one of the bank's right answers, and as many learners hand in as it takes
for every answer to be there. Two units in turn (see `turns`): that an answer is right is what `test_bank` says, and
that the sandbox sees what a notebook sees, `test_sandbox`.
"""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")

from nbgrader.api import Gradebook

from lora_from_scratch.checks.bank import Answer, right_answers
from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.units import Unit, units
from lora_from_scratch.grading.building.solution import source_of
from tests.damages import ROOT, Notebook, by_id, code, submission
from tests.sandboxes import BANK, bank_files, needs_bubblewrap
from tests.turns import in_turn

UNITS = [in_turn(unit) for unit in units()]

NOISE = """
warnings.warn("careful")
print("printed")
print("printed", file=sys.stderr)
figure, (axes,) = plotting.panels(1)
axes.plot([1, 2])
show(figure, "a line")
"""
LOUD = """
import functools, sys, warnings
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show

def loud(answer):
    @functools.wraps(answer)
    def louder(*arguments, **options):
        warnings.warn("careful")
        print("called")
        return answer(*arguments, **options)
    return louder
"""


def turns(unit: Unit) -> list[list[Answer]]:
    """Whole submissions: one answer to each exercise, until every right one has had its turn."""
    right = [right_answers(exercise.name) for exercise in unit.exercises]
    return [[answers[turn % len(answers)] for answers in right] for turn in range(max(map(len, right)))]


def notebook_with(unit: Unit, answers: list[Answer]) -> Notebook:
    """The unit's solved notebook with these answers in the place of the library's."""
    notebook = submission(unit.number)
    solved = [f"solve({e.object.__module__!r}, {e.name!r}, {source_of(e.object)!r})" for e in unit.exercises]
    notebook.cells.insert(0, code("\n".join((BANK, LOUD, *solved))))
    for answer in answers:
        taken = f"{answer.exercise} = ANSWERS[{answer.exercise!r}, {answer.name!r}]"
        loud = f"{answer.exercise} = loud({answer.exercise})" if inspect.isfunction(answer.object) else ""
        cell = by_id(notebook, answer.exercise)
        files = [f"run({source(module)!r}, {module!r})" for module in bank_files(answer.object.__module__)]
        cell.source = "\n".join((*files, taken, loud, NOISE))
    return notebook


def source(module: str) -> str:
    return inspect.getsource(sys.modules[module])


@needs_bubblewrap
@pytest.mark.parametrize("unit", UNITS)
def test_every_right_answer_of_the_bank_gets_full_points_however_loud_it_is(unit: Unit, tmp_path: Path) -> None:
    name = f"unit_{unit.number}"
    shutil.copytree(ROOT / "notebooks" / name, tmp_path / "notebooks" / name)
    shutil.copy(ROOT / "course" / "nbgrader_config.py", tmp_path)
    classroom = {f"learner{turn}": answers for turn, answers in enumerate(turns(unit))}
    for learner, answers in classroom.items():
        folder = tmp_path / "submitted" / learner / name
        folder.mkdir(parents=True)
        nbformat.write(notebook_with(unit, answers), folder / f"{name}.ipynb")
    command = [sys.executable, "-m", "lora_from_scratch", "grade", unit.number, "--workers=1", "--no-feedback"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 1, done.stdout + done.stderr  # the open questions need a person
    full = {f"check-{item.name}": item.points for item in unit.checked if isinstance(item, Exercise)}
    with Gradebook(f"sqlite:///{tmp_path / 'gradebook.db'}") as gradebook:
        for learner, answers in classroom.items():
            grades = gradebook.find_submission_notebook(name, name, learner).grades
            points = {grade.name: grade.auto_score for grade in grades if grade.name in full}
            assert points == full, f"{learner}: {[answer.name for answer in answers]}"
