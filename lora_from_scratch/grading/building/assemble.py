"""Turn the source's cells into the cells of the solved notebook, with nbgrader's metadata."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lora_from_scratch import __version__
from lora_from_scratch.checks.exercise import Exercise, Prediction
from lora_from_scratch.checks.units import Unit
from lora_from_scratch.grading.building.refused import Refused
from lora_from_scratch.grading.building.solution import (
    BEGIN,
    END,
    bound_names,
    needed_imports,
    refers_to_itself,
    solved_source,
    write_imports,
)
from lora_from_scratch.grading.building.source import SourceCell

SCHEMA = 3  # of nbgrader's metadata
RUBRIC = "**Rubric.**"  # in an open question's cell, it separates the question from the rubric
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}

INSTALLER = """\
# On Google Colab this installs the course; anywhere else it does nothing.
import importlib.util
import subprocess
import sys

if "google.colab" in sys.modules and importlib.util.find_spec("lora_from_scratch") is None:
    package = "lora-from-scratch[course]=={version}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)"""


@dataclass
class Cell:
    """A cell of a notebook, and its origin.

    Attributes:
        place: the source's file and cell, for messages.
        role: "exercise", "prediction", "check", "answer" (to an open question); "" for the others.
        figure: the file to which its picture is written.
        volatile: whether its output differs from run to run.
        above: the number of lines that the build puts above the source's.
    """

    kind: str
    text: str
    place: str
    role: str = ""
    name: str = ""
    points: float = 0
    figure: str = ""
    volatile: bool = False
    above: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    def as_node(self, cell_id: str) -> Any:
        import nbformat

        make = nbformat.v4.new_code_cell if self.kind == "code" else nbformat.v4.new_markdown_cell
        return make(self.text, id=cell_id, metadata=self.metadata)


def assemble(unit: Unit, source: Iterable[SourceCell]) -> list[Cell]:
    """The cells of the solved notebook.

    Raises:
        Refused: a directive names an exercise or prediction that the unit does not have, or an exercise's object
            has nothing to implement.
    """
    cells: list[Cell] = []
    problems: list[str] = []
    for cell in source:
        try:
            cells.extend(_written(unit, cell))
        except ValueError as error:
            problems.append(f"{cell.place}: {error}")
    try:
        _add_imports(unit, cells)
    except ValueError as error:
        problems.append(f"checks/unit_{unit.number}/exercises.py: {error}")
    if problems:
        raise Refused(problems)
    if cells and cells[0].kind == "markdown":
        cells.insert(1, _installer())
    return cells


def is_installer(source: str) -> bool:
    """Whether it is the code of the cell that installs the course on Google Colab."""
    return source.startswith(INSTALLER.partition("\n")[0])


def _installer() -> Cell:
    """The cell that installs the course on Google Colab. Its code is folded in JupyterLab."""
    text = INSTALLER.format(version=__version__)
    return Cell("code", text, "the cell for Google Colab", metadata={"jupyter": {"source_hidden": True}})


def as_notebook(cells: Iterable[Cell]) -> Any:
    """The notebook, not executed. Cells have ids that change only when the cell does."""
    import nbformat

    used: dict[str, int] = {}
    nodes = []
    for cell in cells:
        cell_id = f"{cell.role}-{cell.name}"[:50] if cell.role else hashlib.sha256(cell.text.encode()).hexdigest()[:12]
        used[cell_id] = used.get(cell_id, 0) + 1
        nodes.append(cell.as_node(cell_id if used[cell_id] == 1 else f"{cell_id}-{used[cell_id]}"))
    metadata = {"kernelspec": dict(KERNEL), "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=nodes, metadata=metadata)


def _written(unit: Unit, cell: SourceCell) -> list[Cell]:
    """The notebook cells for a cell of the source."""
    if cell.get("exercise"):
        return _exercise(unit, cell)
    if cell.get("prediction"):
        return _prediction(_named(unit.predictions, cell, "prediction"), cell)
    if cell.get("check"):
        return [_check(_named(unit.predictions, cell, "check"), cell)]
    if cell.get("open_question"):
        return _open_question(cell)
    return [
        Cell(cell.kind, cell.text, cell.place, figure=cell.get("figure") or "", volatile=bool(cell.get("volatile")))
    ]


def _named(items: Iterable[Any], cell: SourceCell, directive: str) -> Any:
    items = list(items)
    for item in items:
        if item.name == cell.get(directive):
            return item
    there = ", ".join(item.name for item in items) or "none"
    raise ValueError(f"{directive}={cell.get(directive)!r} is not in the unit's list, which has: {there}")


def _exercise(unit: Unit, cell: SourceCell) -> list[Cell]:
    exercise: Exercise = _named(unit.exercises, cell, "exercise")
    name = exercise.name
    number = [item.name for item in unit.exercises].index(name) + 1
    lines = exercise.lines
    heading = (
        f"### Exercise {int(unit.number)}.{number}: `{name}`\n\n"
        f"Difficulty {exercise.difficulty} of 5 · about {exercise.minutes} minutes · "
        f"{lines} {'line' if lines == 1 else 'lines'} in the library · "
        f"{exercise.points} {'point' if exercise.points == 1 else 'points'}"
    )
    solution = Cell("code", solved_source(exercise.object, exercise.blank), cell.place, "exercise", name)
    solution.metadata = _nbgrader(name, solution=True)
    advice = {
        f'# hint("{name}")': "# shows the next hint",
        f'# {name} = library("{name}")': "# uses the library's version, which earns no points",
    }
    width = max(map(len, advice))
    stuck = "# Stuck? Uncomment one of these lines and run the cell.\n"
    stuck += "\n".join(f"{line:{width}}  {what}" for line, what in advice.items())
    return [
        Cell("markdown", heading, cell.place),
        solution,
        _check(exercise, cell),
        Cell("code", stuck, cell.place),
    ]


def _prediction(prediction: Prediction, cell: SourceCell) -> list[Cell]:
    choices = "".join(f'\n- `"{key}"`: {text}' for key, text in prediction.choices.items())
    allowed = " or ".join(f'"{key}"' for key in prediction.choices) or "a number"
    question = f"**Predict first.** {prediction.question}"
    if choices:
        question += f"\n{choices}"
    question += (
        f"\n\nEnter {'your choice' if choices else 'a number'} in the cell below and run it before you continue. The "
        "first prediction that you run counts; the experiment will give the answer."
    )
    text = f"{prediction.name} = None  # {allowed}\n{BEGIN}\n{prediction.name} = {_literal(prediction.answer)}\n{END}"
    answer = Cell("code", text, cell.place, "prediction", prediction.name)
    answer.metadata = _nbgrader(prediction.name, solution=True)
    return [Cell("markdown", question, cell.place), answer]


def _literal(answer: str | float) -> str:
    return f'"{answer}"' if isinstance(answer, str) else repr(answer)


def _check(item: Exercise | Prediction, cell: SourceCell) -> Cell:
    check = Cell("code", f'check("{item.name}")', cell.place, "check", item.name, points=item.points)
    check.metadata = _nbgrader(f"check-{item.name}", grade=True, locked=True, points=item.points)
    return check


def _open_question(cell: SourceCell) -> list[Cell]:
    """The question, and the cell for the answer. The rubric gives the answer away; in the solved notebook it takes
    the place of the answer, so the learner's notebook does not contain it."""
    name, points = cell.get("open_question"), cell.get("points") or 0
    text, _, rubric = cell.text.partition(RUBRIC)
    worth = f"*{points} {'point' if points == 1 else 'points'}, graded by hand.*"
    question = Cell("markdown", f"{text.rstrip()}\n\n{worth}", cell.place)
    answer = Cell("markdown", f"{RUBRIC}\n\n{rubric.strip()}", cell.place, "answer", name, points=points)
    answer.metadata = _nbgrader(name, grade=True, solution=True, points=points)
    return [question, answer]


def _nbgrader(
    grade_id: str, *, grade: bool = False, solution: bool = False, locked: bool = False, points: float | None = None
) -> dict[str, Any]:
    said: dict[str, Any] = {"grade": grade, "grade_id": grade_id, "locked": locked}
    if points is not None:
        said["points"] = points
    return {"nbgrader": said | {"schema_version": SCHEMA, "solution": solution, "task": False}}


def _add_imports(unit: Unit, cells: list[Cell]) -> None:
    """Append to the first code cell the imports that the solutions need, except this unit's exercises."""
    first = next((index for index, cell in enumerate(cells) if cell.kind == "code"), None)
    if first is None:
        return
    try:
        own = bound_names(cells[first].text)
    except SyntaxError as error:
        raise ValueError(f"{cells[first].place}: {error}") from None
    objects = [exercise.object for exercise in unit.exercises]
    exercises = {exercise.name for exercise in unit.exercises}
    needed = needed_imports(objects, own | exercises)
    for item in needed:
        if item.attribute in exercises:
            raise ValueError(
                f"{item.attribute} is imported as {item.name}; use the exercises of this unit under their own names"
            )
    imports = write_imports(needed)
    future = any(refers_to_itself(target) for target in objects)
    ready_made = f"# Library functions and classes that your code can use.\n{imports}"
    parts = ["from __future__ import annotations"] * future + [cells[first].text] + [ready_made] * bool(imports)
    cells[first].text = "\n\n".join(parts)
    cells[first].above = 2 * future
