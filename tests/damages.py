"""What happens to notebooks before they are handed in: each function damages one, and the learner's text stays."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[1]
Notebook = Any
Damage = Callable[[Notebook], None]

DAMAGES: dict[str, tuple[Damage, set[str]]] = {}
WRITTEN = "Because W0 + B A has full rank, and only B A has not."


def damage(*kinds: str) -> Callable[[Damage], Damage]:
    """Enter a damage, with the kinds of findings that it leads to."""

    def enter(function: Damage) -> Damage:
        DAMAGES[function.__name__.replace("_", " ")] = (function, set(kinds))
        return function

    return enter


def released(unit: str) -> Notebook:
    return nbformat.read(ROOT / "notebooks" / f"unit_{unit}" / f"unit_{unit}.ipynb", as_version=4)


def solved(unit: str) -> Notebook:
    return nbformat.read(ROOT / "solutions" / f"unit_{unit}" / f"unit_{unit}.ipynb", as_version=4)


def submission(unit: str) -> Notebook:
    """The released notebook with every answer in it."""
    return fill(released(unit), solved(unit))


def imports(notebook: Notebook) -> Any:
    """The cell of imports."""
    return next(cell for cell in notebook.cells if cell.cell_type == "code" and "import check" in cell.source)


def fill(notebook: Notebook, solution: Notebook) -> Notebook:
    for cell, answer in zip(notebook.cells, solution.cells, strict=True):
        said = cell.metadata.get("nbgrader", {})
        if said.get("solution"):
            cell.source = answer.source if cell.cell_type == "code" else WRITTEN
    return notebook


def code(source: str) -> Any:
    return nbformat.v4.new_code_cell(source)


def text(source: str) -> Any:
    return nbformat.v4.new_markdown_cell(source)


def solutions(notebook: Notebook) -> list[Any]:
    """The solution cells of the exercises, in order: not those of predictions."""
    cells = [c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("solution") and c.cell_type == "code"]
    return [cell for cell in cells if "def " in cell.source]


def by_id(notebook: Notebook, grade_id: str) -> Any:
    return next(cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade_id") == grade_id)


def check_of(notebook: Notebook, solution: Any) -> Any:
    return by_id(notebook, f"check-{solution.metadata.nbgrader.grade_id}")


def tests(notebook: Notebook) -> list[Any]:
    return [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("locked")]


def answer(notebook: Notebook) -> Any:
    return next(c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade") and c.cell_type == "markdown")


def stub_of(notebook: Notebook, cell: Any) -> Any:
    """A cell as it was released, found by what it says of itself in the notebook's first stub."""
    unit = notebook.cells[0].source.split("Unit ")[1][:2]
    return copy.deepcopy(by_id(released(unit), cell.metadata.nbgrader.grade_id))


def copied(cell: Any, source: str | None = None) -> Any:
    """As JupyterLab copies a cell: with its metadata, under a new id."""
    made = copy.deepcopy(cell)
    made.id = nbformat.v4.new_code_cell().id
    made.source = cell.source if source is None else source
    return made


def plain_copy(cell: Any) -> Any:
    made = copied(cell)
    made.metadata = nbformat.from_dict({})
    return made


def after(notebook: Notebook, cell: Any, *others: Any) -> None:
    place = notebook.cells.index(cell) + 1
    notebook.cells[place:place] = others


def before(notebook: Notebook, cell: Any, *others: Any) -> None:
    place = notebook.cells.index(cell)
    notebook.cells[place:place] = others


# --- Several times ----------------------------------------------------------------------------------------


@damage("duplicated cell")
def solution_copied(notebook: Notebook) -> None:
    cell = solutions(notebook)[1]
    after(notebook, cell, copied(cell))


@damage("duplicated cell")
def solution_copied_before_it_was_right(notebook: Notebook) -> None:
    cell = solutions(notebook)[1]
    name = cell.metadata.nbgrader.grade_id
    before(notebook, cell, copied(cell, f"def {name}(*arguments):\n    return 1"))


@damage("duplicated cell")
def solution_copied_at_the_end_of_the_notebook(notebook: Notebook) -> None:
    notebook.cells.append(copied(solutions(notebook)[0]))


@damage("duplicated cell")
def stub_copied_below_the_solution(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    after(notebook, cell, copied(cell, stub_of(notebook, cell).source))


@damage("duplicated cell")
def stub_without_metadata_below_the_solution(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    after(notebook, cell, plain_copy(stub_of(notebook, cell)))


@damage("duplicated cell")
def test_copied(notebook: Notebook) -> None:
    cell = tests(notebook)[2]
    after(notebook, cell, copied(cell))


@damage("duplicated cell")
def answer_copied_and_the_copy_left_empty(notebook: Notebook) -> None:
    cell = answer(notebook)
    after(notebook, cell, copied(cell, "*Your answer here.*"))


@damage("duplicated cell")
def answer_split_in_two(notebook: Notebook) -> None:
    cell = answer(notebook)
    first, second = WRITTEN.split(", ")
    cell.source = f"{first},"
    after(notebook, cell, copied(cell, second))


# --- In another order -------------------------------------------------------------------------------------


@damage("moved cell")
def solution_moved_to_the_end(notebook: Notebook) -> None:
    cell = solutions(notebook)[1]
    notebook.cells.remove(cell)
    notebook.cells.append(cell)


@damage("moved cell")
def solution_moved_to_the_top(notebook: Notebook) -> None:
    cell = solutions(notebook)[-1]
    notebook.cells.remove(cell)
    notebook.cells.insert(0, cell)


@damage("moved cell")
def test_moved_above_its_solution(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    check = check_of(notebook, cell)
    notebook.cells.remove(check)
    before(notebook, cell, check)


@damage("moved cell")
def all_upside_down(notebook: Notebook) -> None:
    notebook.cells.reverse()


@damage("moved cell")
def all_shuffled(notebook: Notebook) -> None:
    random.Random(0).shuffle(notebook.cells)


@damage("moved cell", "late helper")
def moved_with_the_helper_above_it(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    check = check_of(notebook, cell)
    cell.source = cell.source.replace('"""\n    ', '"""\n    my_helper\n    ', 1)
    for one in (cell, check):
        notebook.cells.remove(one)
    notebook.cells += [code("def my_helper():\n    return 1"), cell, check]


@damage("late helper")
def helper_below_the_test(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    cell.source += "\n\n\nassert my_number"
    after(notebook, check_of(notebook, cell), code("my_number = 1 + other_number"), code("other_number = 2"))


@damage()
def imports_moved_to_the_end(notebook: Notebook) -> None:
    cell = imports(notebook)
    notebook.cells.remove(cell)
    notebook.cells.append(cell)


# --- Merged and split -------------------------------------------------------------------------------------


@damage("merged cell")
def two_solutions_in_the_first_ones_cell(notebook: Notebook) -> None:
    first, second = solutions(notebook)[:2]
    first.source += f"\n\n\n{second.source}"
    notebook.cells.remove(second)


@damage("merged cell")
def two_solutions_in_the_second_ones_cell(notebook: Notebook) -> None:
    first, second = solutions(notebook)[:2]
    second.source = f"import math\n\n\ndef my_helper():\n    return math.pi\n\n\n{first.source}\n\n\n{second.source}"
    notebook.cells.remove(first)


@damage("merged cell")
def two_solutions_in_one_cell_and_the_other_a_stub(notebook: Notebook) -> None:
    first, second = solutions(notebook)[:2]
    first.source += f"\n\n\n{second.source}"
    second.source = stub_of(notebook, second).source


@damage("merged cell", "deleted test")
def an_exercise_and_its_test_merged_with_the_next(notebook: Notebook) -> None:
    first, second = solutions(notebook)[:2]
    checks = [check_of(notebook, cell) for cell in (first, second)]
    first.source = "\n\n".join([first.source, checks[0].source, second.source, checks[1].source])
    for cell in (second, *checks):
        notebook.cells.remove(cell)


@damage("deleted test")
def solution_and_test_in_one_cell(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    check = check_of(notebook, cell)
    cell.source += f"\n\n{check.source}"
    notebook.cells.remove(check)


@damage("edited test", "moved code")
def solution_and_test_in_the_tests_cell(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    check = check_of(notebook, cell)
    check.source = f"{cell.source}\n\n{check.source}"
    notebook.cells.remove(cell)


@damage("merged cell")
def heading_and_solution_in_one_cell_of_code(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    heading = notebook.cells[notebook.cells.index(cell) - 1]
    cell.source = f"{heading.source}\n\n{cell.source}"
    notebook.cells.remove(heading)


@damage("merged cell", "metadata lost")
def heading_and_solution_in_one_cell_of_text(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    heading = notebook.cells[notebook.cells.index(cell) - 1]
    heading.source = f"{heading.source}\n\n{cell.source}"
    notebook.cells.remove(cell)


@damage("merged cell", "deleted test", "moved answer", "metadata lost", "moved cell")
def all_code_in_one_cell(notebook: Notebook) -> None:
    joined = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    texts = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    question = texts[-2]
    question.source += f"\n\n{texts.pop().source}"
    notebook.cells = [code(joined), *texts]


def _halves(source: str) -> tuple[str, str]:
    lines = source.split("\n")
    middle = len(lines) - 2
    return "\n".join(lines[:middle]), "\n".join(lines[middle:])


@damage("split cell")
def solution_split(notebook: Notebook) -> None:
    cell = max(solutions(notebook), key=lambda cell: len(cell.source))
    cell.source, second = _halves(cell.source)
    after(notebook, cell, copied(cell, second))


@damage("split cell")
def solution_split_and_the_second_half_without_metadata(notebook: Notebook) -> None:
    cell = max(solutions(notebook), key=lambda cell: len(cell.source))
    cell.source, second = _halves(cell.source)
    after(notebook, cell, code(second))


@damage("duplicated cell")
def solution_split_after_a_helper(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    before(notebook, cell, copied(cell, "def my_helper():\n    return 1"))
    cell.source = cell.source.replace('"""\n    ', '"""\n    my_helper\n    ', 1)


# --- Gone ---------------------------------------------------------------------------------------------------


@damage("deleted test")
def one_test_deleted(notebook: Notebook) -> None:
    notebook.cells.remove(tests(notebook)[1])


@damage("deleted test")
def all_tests_deleted(notebook: Notebook) -> None:
    for cell in tests(notebook):
        notebook.cells.remove(cell)


@damage("deleted imports")
def imports_deleted(notebook: Notebook) -> None:
    notebook.cells.remove(imports(notebook))


@damage()
def everything_deleted_that_is_not_graded(notebook: Notebook) -> None:
    first = imports(notebook)
    notebook.cells = [cell for cell in notebook.cells if "nbgrader" in cell.metadata or cell is first]


@damage("metadata lost", "moved cell")
def solution_deleted_and_written_elsewhere(notebook: Notebook) -> None:
    cell = solutions(notebook)[1]
    notebook.cells.remove(cell)
    notebook.cells.append(code(cell.source))


# --- Metadata -----------------------------------------------------------------------------------------------


@damage("metadata lost")
def metadata_stripped(notebook: Notebook) -> None:
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})


@damage("metadata lost")
def metadata_and_ids_stripped(notebook: Notebook) -> None:
    for number, cell in enumerate(notebook.cells):
        cell.metadata = nbformat.from_dict({"id": f"aB3{number}", "colab": {"base_uri": "https://localhost:8080/"}})
        cell.id = f"new-{number}"


@damage("metadata lost", "deleted test", "moved answer")
def metadata_ids_and_tests_stripped_and_all_prose(notebook: Notebook) -> None:
    question = notebook.cells[notebook.cells.index(answer(notebook)) - 1]
    question.source += f"\n\n{answer(notebook).source}"
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code" or cell is question]
    for cell in tests(notebook):
        notebook.cells.remove(cell)
    metadata_and_ids_stripped(notebook)


@damage("metadata lost")
def metadata_of_one_cell_stripped(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    cell.metadata, cell.id = nbformat.from_dict({}), "new"


@damage("renamed cell")
def grade_ids_renamed(notebook: Notebook) -> None:
    for number, cell in enumerate([*solutions(notebook), *tests(notebook)]):
        cell.metadata.nbgrader.grade_id = f"cell-{number}"


@damage("renamed cell", "moved cell")
def two_solutions_in_each_others_cells(notebook: Notebook) -> None:
    first, second = solutions(notebook)[:2]
    first.source, second.source = second.source, first.source


@damage("changed metadata")
def points_raised(notebook: Notebook) -> None:
    for cell in tests(notebook):
        cell.metadata.nbgrader.points = 100


@damage("changed metadata")
def tests_declared_to_be_solutions(notebook: Notebook) -> None:
    for cell in tests(notebook):
        cell.metadata.nbgrader.solution = True


@damage("changed type")
def solution_changed_to_text(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    notebook.cells[notebook.cells.index(cell)] = nbformat.from_dict(text(cell.source) | {"metadata": cell.metadata})


@damage("changed type")
def solution_changed_to_raw(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    raw = nbformat.v4.new_raw_cell(cell.source, id=cell.id, metadata=cell.metadata)
    notebook.cells[notebook.cells.index(cell)] = raw


@damage("metadata lost", "changed type")
def solution_changed_to_text_without_metadata(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    notebook.cells[notebook.cells.index(cell)] = text(cell.source)


@damage("changed type")
def answer_changed_to_code(notebook: Notebook) -> None:
    cell = answer(notebook)
    made = nbformat.v4.new_code_cell(cell.source, id=cell.id, metadata=cell.metadata)
    notebook.cells[notebook.cells.index(cell)] = made


@damage("changed kernel")
def kernel_changed(notebook: Notebook) -> None:
    notebook.metadata.kernelspec = {"display_name": "R", "language": "R", "name": "ir"}
    notebook.metadata.language_info = {"name": "R"}


# --- Edited -------------------------------------------------------------------------------------------------


@damage("edited test")
def tests_edited(notebook: Notebook) -> None:
    for number, cell in enumerate(tests(notebook)):
        cell.source = [f"{cell.source[:-1]}, seed=3)", "100.0", "assert True", "", "# nothing"][number % 5]


@damage("edited test")
def a_helper_in_a_test(notebook: Notebook) -> None:
    cell = tests(notebook)[0]
    cell.source = f"my_helper = 3\n{cell.source}"
    solutions(notebook)[-1].source += "\n\n\nassert my_helper"


@damage()
def white_space_around_the_tests(notebook: Notebook) -> None:
    for cell in tests(notebook):
        cell.source = f"\n{cell.source}  # checked\n"


# --- Written elsewhere ----------------------------------------------------------------------------------------


@damage()
def solution_in_a_new_cell_below_the_stub(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    after(notebook, cell, code(cell.source))
    cell.source = stub_of(notebook, cell).source


@damage("moved code")
def solution_in_a_new_cell_above_the_stub(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    before(notebook, cell, code(cell.source))
    cell.source = stub_of(notebook, cell).source


@damage("moved code")
def solution_in_a_new_cell_below_the_test(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    after(notebook, check_of(notebook, cell), code(cell.source))
    cell.source = stub_of(notebook, cell).source


@damage("edited test")
def solution_in_the_tests_cell_below_the_stub(notebook: Notebook) -> None:
    cell = solutions(notebook)[0]
    check = check_of(notebook, cell)
    check.source = f"{cell.source}\n\n{check.source}"
    cell.source = stub_of(notebook, cell).source


@damage("moved answer")
def answer_in_a_new_cell_below(notebook: Notebook) -> None:
    cell = answer(notebook)
    after(notebook, cell, text(cell.source))
    cell.source = "*Your answer here.*"


@damage("moved answer")
def answer_in_a_new_cell_above_and_its_own_deleted(notebook: Notebook) -> None:
    cell = answer(notebook)
    notebook.cells[notebook.cells.index(cell)] = text(cell.source)
    cell.source = "*Your answer here.*"
    notebook.cells.append(cell)


@damage("moved answer")
def answer_in_the_questions_cell(notebook: Notebook) -> None:
    cell = answer(notebook)
    notebook.cells[notebook.cells.index(cell) - 1].source += f"\n\n{cell.source}"
    cell.source = "*Your answer here.*"


# --- Nothing wrong --------------------------------------------------------------------------------------------


@damage()
def cells_of_the_learners_own(notebook: Notebook) -> None:
    notebook.cells.insert(0, text("My notes"))
    after(notebook, solutions(notebook)[0], code("%matplotlib inline\nimport os, sys"), code("!pip list\nx = 1"))
    after(notebook, tests(notebook)[1], text("Done!"), code("print(undefined_name)"), code("def ="))
    name = solutions(notebook)[0].metadata.nbgrader.grade_id
    after(notebook, check_of(notebook, solutions(notebook)[0]), code(f"def {name}(x):\n    return 'an experiment'"))


@damage()
def a_cell_that_gives_itself_points(notebook: Notebook) -> None:
    own = {"grade": True, "grade_id": "mine", "locked": False, "points": 50, "solution": False, "schema_version": 3}
    notebook.cells.append(nbformat.v4.new_code_cell("50", metadata={"nbgrader": own}))


@damage()
def all_ids_the_same(notebook: Notebook) -> None:
    for cell in notebook.cells:
        cell.id = "same"


@damage()
def experiments_changed(notebook: Notebook) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "code" and "nbgrader" not in cell.metadata:
            cell.source += "\nprint('once more')"
