"""What the build refuses: each fault with one message that names the file and the cell."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from lora_from_scratch.checks import bank
from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.grading.building import build, refusals
from lora_from_scratch.grading.building.assemble import Cell
from lora_from_scratch.grading.building.execution import execute
from lora_from_scratch.grading.building.refused import Refused
from tests.tiny_course import SOURCE, Course, enter_course, make_course


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Course:
    return Course(make_course(tmp_path), enter_course(tmp_path, monkeypatch))


def shorter(course: Course, **changes: object) -> tuple[Exercise, ...]:
    first, second = course.unit.exercises
    broken = object.__new__(Exercise)  # past the checks of its own constructor
    vars(broken).update(vars(first) | changes)
    return broken, second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"difficulty": 0}, "difficulty must be from 1 to 5"),
        ({"minutes": 0}, "minutes and points must be at least 1"),
        ({"hints": ("One.", "Two.", " ")}, "there must be exactly three hints"),
        ({"cases": lambda draw: []}, "it has no check"),
    ],
)
def test_an_exercise_is_refused_without(course: Course, changes: dict, message: str) -> None:
    problems = course.refusal(exercises=shorter(course, **changes))
    assert any(
        problem.startswith("checks/unit_99/exercises.py, fourfold_root: ") and message in problem
        for problem in problems
    )


@pytest.mark.parametrize(("right", "message"), [(False, "4 wrong answers"), (True, "1 alternative right answers")])
def test_an_exercise_is_refused_without_a_bank(course: Course, right: bool, message: str) -> None:
    answers = bank._bank["fourfold_root"]
    answers.remove(next(answer for answer in answers if answer.right == right))
    assert [message in problem for problem in course.refusal()] == [True]


def without(start: str, end: str = "\n\n# %%") -> str:
    """The source without what begins with `start`."""
    first = SOURCE.index(start)
    last = SOURCE.find(end, first + 1)
    return SOURCE[:first] + (SOURCE[last + 2 :] if last >= 0 else "")


BROKEN = {
    "title": (
        SOURCE.replace("Unit 99: Tiny", "Unit 99: Huge"),
        "cell 1: the first cell must be Markdown, and its first line",
    ),
    "picture": (SOURCE.replace("(unit_99.png)", "(other.png)"), "the picture must come before the first code cell"),
    "no alternative": (SOURCE.replace("A line that rises from 0 to 9.](", "]("), "unit_99.png has no alternative text"),
    "html": (SOURCE.replace("# Nothing.", '# <img src="x.png">'), "(<img>) has no alternative text"),
    "figure": (SOURCE.replace('# %% figure="unit_99.png"', "# %%"), 'one cell must have figure="unit_99.png", got 0'),
    "imports": (SOURCE.replace("progress, working", "working"), "the first code cell must contain: from lora_from"),
    "level": (
        SOURCE.replace("## Roots", "### Roots"),
        "(line 15): the heading 'Roots' of level 3 follows one of level 1",
    ),
    "second title": (
        SOURCE.replace("## Roots", "# Roots"),
        "only one heading of level 1 is allowed; 'Roots' is another",
    ),
    "practice": (SOURCE.replace("goes wrong in practice", "is"), '"## What goes wrong in practice" is missing'),
    "summary": (SOURCE.replace("## Summary", "## End"), '"## Summary" is missing'),
    "further": (SOURCE.replace("## Go further", "## More"), '"## Go further" is missing'),
    "no exercise": (without('# %% exercise="Counter"'), 'there is no cell with exercise="Counter"'),
    "twice": (SOURCE + '\n# %% exercise="Counter"\n', 'an earlier cell already has exercise="Counter"'),
    "unknown exercise": (SOURCE + '\n# %% exercise="Count"\n', "exercise='Count' is not in the unit's list"),
    "unknown check": (SOURCE + '\n# %% check="Counter"\n', "check='Counter' is not in the unit's list"),
    "no prediction": (without('# %% prediction="guess_root"'), 'there is no cell with prediction="guess_root"'),
    "no check": (without('# %% check="guess_root"'), 'there is no cell with check="guess_root"'),
    "too early": (
        SOURCE.replace('# %% check="guess_number"\n', "").replace(
            '# %% exercise="Counter"', '# %% check="guess_number"\n\n# %% exercise="Counter"'
        ),
        'check="guess_number" must come after code that shows',
    ),
    "no question": (without("# %% [markdown] open_question"), "there is no open question"),
    "no points": (SOURCE.replace(" points=3", ""), "an open question needs points=..."),
    "no rubric": (SOURCE.replace("**Rubric.**", "Rubric:"), "needs a line **Rubric.** followed by a list"),
    "wrong sum": (SOURCE.replace("2 points:", "3 points:"), "total of 3; found 4"),
    "no points said": (SOURCE.replace("2 points:", "good:"), "every item of the rubric must state its points"),
    "name": (
        SOURCE.replace('open_question="why_count"', 'open_question="Counter"'),
        "the name 'Counter' is used twice",
    ),
    "directive": (SOURCE.replace("# %% volatile", "# %% volatil"), "unknown directive 'volatil'"),
    "wrong kind": (
        SOURCE.replace("# %% volatile", "# %% [markdown] volatile"),
        "volatile is only allowed on a code cell",
    ),
    "not empty": (
        SOURCE.replace('exercise="Counter"', 'exercise="Counter"\nx = 1'),
        "must be empty, because the build writes",
    ),
    "empty": (SOURCE + "\n# %%\n", "the cell is empty"),
    "syntax": (SOURCE + "\n# %%\nfor x in\n", "invalid syntax (line 1 of the cell)"),
    "numbers out of order": (
        SOURCE.replace("fourfold_root", "?")
        .replace('exercise="Counter"', 'exercise="fourfold_root"')
        .replace('exercise="?"', 'exercise="Counter"')
        .replace("?", "fourfold_root"),
        'exercise="fourfold_root" must come here',
    ),
    "leak in code": (
        SOURCE + "\n# %%\nx = torch.ones(1)\nprint(torch.sqrt(x.double())*scale/math.cos(0.0))\n"
        "def f(x):\n    return torch.sqrt( x.double() ) * scale / math.cos(0.0)\n",
        "learners would see a line of the solution of fourfold_root: torch.sqrt",
    ),
    "leak in prose": (
        SOURCE.replace("# Nothing.", "# Try `self.count = (self.count + 1) % (self.largest + 1)` once."),
        "learners would see a line of the solution of Counter",
    ),
    "leak of a guess": (
        SOURCE.replace("# Nothing.", '# `guess_root = "b"`'),
        "the answer to the prediction guess_root",
    ),
    "imported": (
        SOURCE.replace("import torch\n", "import torch\nfrom tiny_library import Counter\n"),
        'Counter is an exercise of this unit; use working("Counter")',
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_source_is_refused_with_file_and_cell(course: Course, fault: str) -> None:
    source, message = BROKEN[fault]
    assert source != SOURCE
    problems = course.refusal(source)
    assert any(message in problem for problem in problems), problems
    assert all(problem.startswith("course/units/unit_99.py") for problem in problems)
    assert len(problems) <= 3, problems


def test_a_unit_without_exercises_or_predictions_is_refused(course: Course) -> None:
    said = " ".join(course.refusal(exercises=(), predictions=()))
    assert "the unit has no exercise" in said
    assert "the unit has no prediction" in said


def test_outputs_are_refused_for() -> None:
    faults = {
        "1 / 0": "here: ZeroDivisionError: division by zero (line 2 of the cell)",
        "import warnings; warnings.warn('beware')": "here: the cell writes to stderr",
        "print(object())": "here: the output differs from machine to machine: at 0x",
        "print('/home/somebody/file')": "here: the output differs from machine to machine: /home/somebody",
        "import datetime; print(datetime.date.today())": "here: the output differs from day to day: ",
        "print('x\\n' * 80)": "here: the cell prints 81 lines",
        "from IPython.display import HTML, display; display(HTML('<img src=x>'))": "here: a picture (<img>) has no alt",
        "from IPython.display import display; display({'image/png': b'x'}, raw=True)": "here: a figure has no alt",
    }
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"# first\n{code}") for code in faults])
    execute(made, allow_errors=True)
    for cell, message in zip(made.cells, faults.values(), strict=True):
        problems = refusals.in_the_outputs(cell, Cell("code", cell.source, "here"))
        assert [problem[: len(message)] for problem in problems] == [message]
        volatile = refusals.in_the_outputs(cell, Cell("code", cell.source, "here", volatile=True))
        assert ("differs" in message) == (volatile == [])


def test_a_cell_that_ends_in_an_error_stops_the_build_and_nothing_is_written(course: Course) -> None:
    (course.root / "course/units/unit_99.py").write_text(SOURCE.replace("import torch\n", "import torch\n1 / 0\n"))
    with pytest.raises(Refused) as refused:
        build.build(course.unit, course.root)
    assert refused.value.problems == [
        "course/units/unit_99.py, cell 2 (line 8): ZeroDivisionError: division by zero (line 2 of the cell)"
    ]
    assert not (course.root / "solutions").exists()
    assert not (course.root / "notebooks").exists()


def test_a_kernel_that_dies_is_said() -> None:
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import os; os._exit(1)")])
    with pytest.raises(ValueError, match="kernel died"):
        execute(made)


def test_a_check_that_the_solution_does_not_pass_is_refused() -> None:
    cell = Cell("code", 'check("x")', "here", "check", "x", points=4)
    node = nbformat.v4.new_code_cell('check("x")')
    for points, refused in (("4.0", False), ("2.0", True), (None, True)):
        data = {"text/plain": points}
        node.outputs = [nbformat.v4.new_output("execute_result", data=data)] if points else []
        assert bool(refusals.not_full_points(node, cell)) == refused


def test_headings_in_blocks_of_code_are_none() -> None:
    assert refusals.headings("# One\n```\n# no\n```\n## Two ##\n#no") == [(1, "One"), (2, "Two")]
