"""Find what makes a unit unfit for release: in its exercises, its cells, the learner's notebook, and the outputs.

Every function returns messages; none of them raises or writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import date
from typing import Any

from lora_from_scratch.checks.bank import right_answers, wrong_answers
from lora_from_scratch.checks.exercise import Draw, Exercise
from lora_from_scratch.checks.units import Unit
from lora_from_scratch.grading.building.assemble import RUBRIC, Cell
from lora_from_scratch.grading.building.solution import bound_names, solution_lines
from lora_from_scratch.grading.building.source import SourceCell

WRONG, RIGHT = 5, 2  # minimum number of answers in the bank per exercise
FROM_CHECKS = ("check", "hint", "library", "progress", "working")  # what every unit's first code cell imports
SECTIONS = ("What goes wrong in practice", "Summary", "Go further")
TELLING = 24  # minimum length, without spaces, of a solution line that counts as giving something away
SCREENFUL = 45  # lines

IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]*)[^)]*\)")
HTML_IMAGE = re.compile(r"<img\b(?![^>]*\balt=[\"'][^\"'])", re.IGNORECASE)
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}", re.IGNORECASE)
ABSOLUTE = re.compile(r"(?<![\w.~:/])/(?:home|root|tmp|usr|var|work|opt|mnt|private|Users)/[\w.-]+")


# --- The unit's list ---------------------------------------------------------------------------------


def in_the_list(unit: Unit) -> list[str]:
    """Problems in the unit's list: exercises without difficulty, minutes, lines, hints, a check or enough answers."""
    problems = []
    for exercise in unit.exercises:
        problems += [f"checks/unit_{unit.number}/exercises.py, {exercise.name}: {what}" for what in _lacks(exercise)]
    return problems


def _lacks(exercise: Exercise) -> Iterable[str]:
    if exercise.difficulty not in range(1, 6):
        yield "difficulty must be from 1 to 5"
    if exercise.minutes < 1 or exercise.points < 1:
        yield "minutes and points must be at least 1"
    if len(exercise.hints) != 3 or not all(hint.strip() for hint in exercise.hints):
        yield "there must be exactly three hints"
    if exercise.lines < 1:
        yield "the library's object contains no code"
    if not list(exercise.cases(Draw(0))):
        yield "it has no check: `cases` yields no case"
    wrong, right = len(wrong_answers(exercise.name)), len(right_answers(exercise.name))
    if wrong < WRONG:
        yield f"its bank has {wrong} wrong answers; at least {WRONG} are needed"
    if right < RIGHT:
        yield f"its bank has {right} alternative right answers; at least {RIGHT} are needed"


# --- The source --------------------------------------------------------------------------------------


def in_the_source(unit: Unit, file: str, source: list[SourceCell]) -> list[str]:
    """Problems in the source: parts that are missing, duplicated, in the wrong order, or that give away an exercise."""
    return [
        *_first_screen(unit, file, source),
        *_cells_of(unit, file, source),
        *_order(unit, source),
        *_sections(file, source),
        *_open_questions(file, source),
        *_imports(unit, file, source),
    ]


def _first_screen(unit: Unit, file: str, source: list[SourceCell]) -> Iterable[str]:
    title = f"# Unit {unit.number}: {unit.title}"
    picture = f"unit_{unit.number}.png"
    if not source or source[0].kind != "markdown" or source[0].text.splitlines()[0].strip() != title:
        yield f"{file}, cell 1: the first cell must be Markdown, and its first line {title!r}"
        return
    before_code = "\n".join(
        cell.text for cell in source[: next((i for i, cell in enumerate(source) if cell.kind == "code"), len(source))]
    )
    if picture not in [target for _, target in IMAGE.findall(before_code)]:
        yield f"{source[0].place}: the picture must come before the first code cell: ![what it shows]({picture})"
    figures = [cell for cell in source if cell.get("figure") == picture]
    if len(figures) != 1:
        yield f'{file}: exactly one cell must have figure="{picture}", got {len(figures)}'


def _cells_of(unit: Unit, file: str, source: list[SourceCell]) -> Iterable[str]:
    """Every exercise and prediction must have exactly one cell."""
    wanted = [("exercise", item.name) for item in unit.exercises]
    wanted += [(directive, item.name) for item in unit.predictions for directive in ("prediction", "check")]
    for directive, name in wanted:
        places = [cell.place for cell in source if cell.get(directive) == name]
        if not places:
            yield f'{file}: there is no cell with {directive}="{name}", although it is in the unit\'s list'
        for place in places[1:]:
            yield f'{place}: an earlier cell already has {directive}="{name}"'
    if not unit.exercises:
        yield f"checks/unit_{unit.number}/exercises.py: the unit has no exercise"
    if not unit.predictions:
        yield f"checks/unit_{unit.number}/exercises.py: the unit has no prediction"


def _order(unit: Unit, source: list[SourceCell]) -> Iterable[str]:
    """Exercises must follow the unit's list. A prediction comes before, and its check after, the experiment."""
    listed = [item.name for item in unit.exercises]
    found = [cell for cell in source if cell.get("exercise") in listed]
    for cell, name in zip(found, listed, strict=False):
        if cell.get("exercise") != name:
            yield f'{cell.place}: exercise="{name}" must come here: the exercises follow the order of the unit\'s list'
            break
    for item in unit.predictions:
        asked = [index for index, cell in enumerate(source) if cell.get("prediction") == item.name]
        checked = [index for index, cell in enumerate(source) if cell.get("check") == item.name]
        if asked and checked:
            between = source[asked[0] + 1 : checked[0]]
            if not any(cell.kind == "code" and cell.text for cell in between):
                yield f'{source[checked[0]].place}: check="{item.name}" must come after code that shows the answer'


def _sections(file: str, source: list[SourceCell]) -> Iterable[str]:
    titles = [text for cell in source if cell.kind == "markdown" for level, text in headings(cell.text) if level == 2]
    for section in SECTIONS:
        if section not in titles:
            yield f'{file}: the section "## {section}" is missing'


def _open_questions(file: str, source: list[SourceCell]) -> Iterable[str]:
    questions = [cell for cell in source if cell.get("open_question")]
    if not questions:
        yield f"{file}: there is no open question (open_question=... points=...)"
    for cell in questions:
        points = cell.get("points")
        if not isinstance(points, int) or points < 1:
            yield f"{cell.place}: an open question needs points=..., an integer of at least 1"
            continue
        _, found, rubric = cell.text.partition(RUBRIC)
        items = re.findall(r"^\s*[-*] (.*)$", rubric, re.MULTILINE)
        if not found or not items:
            yield f"{cell.place}: an open question needs a line {RUBRIC} followed by a list of what earns points"
            continue
        said = [re.search(r"(\d+) points?\b", item) for item in items]
        total = sum(int(match[1]) for match in said if match)
        if not all(said) or total != points:
            yield (
                f"{cell.place}: every item of the rubric must state its points (`1 point`, `2 points`), with a "
                f"total of {points}; found {total}"
            )
    for cell in source:
        if "points" in cell.directives and not cell.get("open_question"):
            yield f"{cell.place}: points=... is only allowed on an open question"


def _imports(unit: Unit, file: str, source: list[SourceCell]) -> Iterable[str]:
    """The first code cell must import what the unit needs, and no cell may import an exercise of this unit."""
    code = [cell for cell in source if cell.kind == "code" and cell.text]
    exercises = {exercise.name for exercise in unit.exercises}
    for index, cell in enumerate(code):
        try:
            bound = bound_names(cell.text)
        except SyntaxError as error:
            yield f"{cell.place}: {error.msg} (line {error.lineno} of the cell)"
            continue
        missing = [name for name in FROM_CHECKS if name not in bound]
        if index == 0 and missing:
            line = f"from lora_from_scratch.checks import {', '.join(FROM_CHECKS)}"
            yield f"{cell.place}: the first code cell must contain: {line}"
        for name in sorted(exercises & bound):
            yield f'{cell.place}: {name} is an exercise of this unit; use working("{name}") instead of importing it'
    if not code:
        yield f"{file}: there is no code cell"


# --- What learners read ------------------------------------------------------------------------------


def in_the_cells(cells: list[Cell]) -> list[str]:
    """Headings that skip a level, pictures without alternative text, duplicate names of graded cells."""
    graded = [(cell.metadata["nbgrader"]["grade_id"], cell.place) for cell in cells if "nbgrader" in cell.metadata]
    names = [name for name, _ in graded]
    twice = [(name, place) for n, (name, place) in enumerate(graded) if name in names[:n]]
    problems = [f"{place}: the name {name!r} is used twice" for name, place in twice]
    before = 0
    for cell in cells:
        if cell.kind != "markdown":
            continue
        for level, text in headings(cell.text):
            if level > before + 1:
                problems.append(f"{cell.place}: the heading {text!r} of level {level} follows one of level {before}")
            if level == 1 and before:
                problems.append(f"{cell.place}: only one heading of level 1 is allowed; {text!r} is another")
            before = level
        for alternative, target in IMAGE.findall(cell.text):
            if not alternative.strip():
                problems.append(f"{cell.place}: the picture {target} has no alternative text")
        if HTML_IMAGE.search(cell.text):
            problems.append(f"{cell.place}: a picture (<img>) has no alternative text")
    return problems


def leaks(unit: Unit, learners: Any, cells: list[Cell]) -> list[str]:
    """Lines of solutions and answers to predictions that the learner's notebook would reveal."""
    lines = {line: exercise.name for exercise in unit.exercises for line in _telling_lines(exercise)}
    problems = []
    for node, cell in zip(learners.cells, cells, strict=True):
        shown = squeeze(node.source + "\n" + "\n".join(text_of(output) for output in node.get("outputs", [])))
        for line, name in lines.items():
            if squeeze(line) in shown:
                problems.append(f"{cell.place}: learners would see a line of the solution of {name}: {line}")
        for item in unit.predictions:
            if re.search(rf"\b{re.escape(item.name)}=[\"']?{re.escape(str(item.answer))}", shown):
                problems.append(f"{cell.place}: learners would see the answer to the prediction {item.name}")
        if cell.role == "exercise" and "raise NotImplementedError" not in node.source:
            problems.append(f"{cell.place}: the solution of {cell.name} has not been removed")
    return problems


def _telling_lines(exercise: Exercise) -> list[str]:
    """The lines of a solution that give something away; of `return x`, only `x`."""
    lines = [line.removeprefix("return ") for line in solution_lines(exercise.object, exercise.blank)]
    plain = ("raise ", "import ", "from ", "super().__init__(", '"""', "for ", "with ")
    return [line for line in lines if len(squeeze(line)) >= TELLING and not line.startswith(plain)]


# --- Outputs ------------------------------------------------------------------------------


def in_the_outputs(node: Any, cell: Cell, folders: Iterable[str] = ()) -> list[str]:
    """Errors, warnings, pictures without alternative text, too much text, and output that is not reproducible.

    Args:
        folders: paths that must not appear.
    """
    problems = []
    for output in node.get("outputs", []):
        text = text_of(output)
        if output.output_type == "error":
            problems.append(f"{cell.place}: {output.ename}: {output.evalue}{_line_of(output.traceback, cell.above)}")
            continue
        if output.output_type == "stream" and output.name == "stderr":
            first = next((line for line in text.splitlines() if line.strip()), "")
            problems.append(f"{cell.place}: the cell writes to stderr, perhaps a warning: {first.strip()}")
            continue
        found = ADDRESS.search(text) or ABSOLUTE.search(text)
        shown = found[0] if found else next((folder for folder in folders if folder in text), "")
        if shown and not cell.volatile:
            problems.append(f"{cell.place}: the output differs from machine to machine: {shown}")
        if not cell.volatile and (today := date.today().isoformat()) in text:
            problems.append(f"{cell.place}: the output differs from day to day: {today}; mark the cell volatile=true")
        if "data" in output:
            problems += [f"{cell.place}: {problem}" for problem in _pictures(output)]
            text = "" if len(output.data) > 1 else text
        if len(text.splitlines()) > SCREENFUL:
            problems.append(f"{cell.place}: the cell prints {len(text.splitlines())} lines, more than a screenful")
    return problems


def _pictures(output: Any) -> Iterable[str]:
    for kind in output.data:
        if kind.startswith("image/") and not output.metadata.get(kind, {}).get("alt", "").strip():
            yield "a figure has no alternative text; show it with lora_from_scratch.support.figures.show(figure, alt)"
    if HTML_IMAGE.search(output.data.get("text/html", "")):
        yield "a picture (<img>) has no alternative text"


def not_full_points(node: Any, cell: Cell) -> list[str]:
    """A check that does not give the solution all of its points."""
    results = [output for output in node.outputs if output.output_type == "execute_result"]
    points = results[0].data.get("text/plain", "") if results else ""
    if points and float(points) == cell.points:
        return []
    said = " ".join(" ".join(text_of(output) for output in node.outputs).split())
    return [f"{cell.place}: {cell.text} gives the solution {points or 'no'} of {cell.points:g} points: {said}"]


def in_an_unsolved_run(notebook: Any) -> list[str]:
    """Undesirable outputs of the released notebook when it is run before anything is written."""
    problems = []
    for node in notebook.cells:
        outputs = node.get("outputs", [])
        first = node.source.partition("\n")[0]
        problems += [f"unsolved notebook, {first}: {o.ename}: {o.evalue}" for o in outputs if o.output_type == "error"]
        problems += [f"unsolved notebook, {first}: on stderr: {o.text}" for o in outputs if o.get("name") == "stderr"]
        if node.id.startswith("check-") and not _not_started(outputs):
            problems.append(f'unsolved notebook, {first}: the verdict must be "not started", with no points')
    return problems


def _not_started(outputs: list[Any]) -> bool:
    points = [output.data["text/plain"] for output in outputs if output.output_type == "execute_result"]
    return "not started" in str(outputs).lower() and [float(number) for number in points] == [0]


# --- Reading -----------------------------------------------------------------------------------------


def headings(text: str) -> list[tuple[int, str]]:
    """Level and text of the Markdown headings, ignoring code blocks."""
    found = []
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        match = re.match(r"(#{1,6})\s+(.*?)\s*#*$", line)
        if match and not fenced:
            found.append((len(match[1]), match[2]))
    return found


def text_of(output: Any) -> str:
    """The text of an output."""
    if "text" in output:
        return str(output.text)
    data = output.get("data", {})
    return "\n".join(str(value) for kind, value in data.items() if kind.startswith("text/"))


def squeeze(text: str) -> str:
    """The text without spaces and with one kind of quotes, so that layout does not hide a line."""
    return re.sub(r"[ \t]+", "", text).replace("'", '"')


def _line_of(traceback: list[str], above: int) -> str:
    """Where in the cell an error happened."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(traceback))
    match = re.search(r"Cell In\[\d+\], line (\d+)", plain)
    return f" (line {int(match[1]) - above} of the cell)" if match else ""
