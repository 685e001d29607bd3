"""Building a unit: what comes out, that it comes out the same, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from lora_from_scratch.cli import main
from lora_from_scratch.grading.building import build, execution, refusals
from lora_from_scratch.grading.building.assemble import Cell
from lora_from_scratch.grading.building.execution import execute
from lora_from_scratch.grading.building.solution import needed_imports, solved_source, write_imports
from tests.tiny_course import ROOT, SOURCE, Course, enter_course, make_course


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Course:
    return Course(make_course(tmp_path), enter_course(tmp_path, monkeypatch))


@pytest.fixture(scope="module")
def built(built_course: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny course, built."""
    return shutil.copytree(built_course, tmp_path_factory.mktemp("built") / "course")


def notebook(root: Path, kind: str) -> nbformat.NotebookNode:
    return nbformat.read(root / kind / "unit_99" / "unit_99.ipynb", as_version=4)


def source_of(cells: nbformat.NotebookNode, cell_id: str) -> str:
    return next(cell.source for cell in cells.cells if cell.id == cell_id)


# --- What comes out ----------------------------------------------------------------------------------


def test_a_learner_gets_signature_and_docstring_and_not_a_line_of_the_body(course: Course) -> None:
    learners = nbformat.reads(course.draft().learners, as_version=4)
    stub = source_of(learners, "exercise-fourfold_root")
    assert stub.startswith("def fourfold_root(x: Tensor, scale: float = 4.0) -> Tensor:\n")
    assert "ValueError: an entry is below zero." in stub
    assert stub.endswith('"""\n    # YOUR CODE HERE\n    raise NotImplementedError')
    assert "comment" not in stub


def test_of_a_class_only_the_methods_named_are_taken_out(course: Course) -> None:
    made = course.draft()
    solved = source_of(made.solved, "exercise-Counter")
    assert solved.count("### BEGIN SOLUTION") == solved.count("### END SOLUTION") == 1
    stub = source_of(nbformat.reads(made.learners, as_version=4), "exercise-Counter")
    assert "return self.count == other.count" in stub
    assert stub.endswith("def step(self) -> int:\n        # YOUR CODE HERE\n        raise NotImplementedError")


def test_of_a_class_all_methods_are_taken_out_when_none_is_named(course: Course) -> None:
    counter = dataclasses.replace(course.unit.exercises[1], blank=())
    assert solved_source(counter.object).count("### BEGIN SOLUTION") == 4
    stub = source_of(
        nbformat.reads(course.draft(exercises=(course.unit.exercises[0], counter)).learners, as_version=4),
        "exercise-Counter",
    )
    assert stub.count("raise NotImplementedError") == 4
    assert '"""As far as the other?"""' in stub


def test_a_prediction_is_none_in_the_learners_notebook_and_no_error(course: Course) -> None:
    made = course.draft()
    assert 'guess_root = "b"' in source_of(made.solved, "prediction-guess_root")
    learners = nbformat.reads(made.learners, as_version=4)
    assert source_of(learners, "prediction-guess_root") == 'guess_root = None  # "a" or "b"'
    assert source_of(learners, "prediction-guess_number") == "guess_number = None  # a number"


def test_a_rubric_stands_where_the_answer_will_be_and_not_in_the_learners_notebook(course: Course) -> None:
    draft = course.draft()
    assert source_of(draft.solved, "answer-why_count") == "**Rubric.**\n\n- 1 point: a reason.\n- 2 points: a good one."
    assert "a good one" not in draft.learners
    assert "3 points, graded by hand" in draft.learners
    assert "In two sentences." in draft.learners


def test_what_solutions_use_is_imported_and_no_exercise_of_the_unit_is(course: Course) -> None:
    cell = course.draft().solved.cells[2].source  # with the unit's own imports: one cell to run before all others
    assert cell.startswith("from __future__ import annotations\n\nimport torch\n")  # Counter names itself
    assert cell.partition("that your code can use.\n")[2].splitlines() == [
        "import math",
        "",
        "from tiny_library import LARGEST",
        "from torch import Tensor",
        "",
        "from lora_from_scratch.linear_algebra.rank import require_rank",
    ]
    names = {item.name for item in needed_imports([exercise.object for exercise in course.unit.exercises])}
    assert "torch" in names  # which the first cell of the source has


def test_long_imports_are_wrapped_and_run() -> None:
    from lora_from_scratch.methods.lora import LoRALinear

    text = write_imports(needed_imports([LoRALinear], defined={"LoRALinear"}))
    assert max(map(len, text.splitlines())) <= 100
    exec(text, {})


def test_an_exercise_says_what_it_asks_for(course: Course) -> None:
    heading = next(cell.source for cell in course.draft().solved.cells if "Exercise 99.1" in cell.source)
    assert "Difficulty 1 of 5 · about 5 minutes · 3 lines in the library · 4 points" in heading


def test_building_twice_changes_no_byte(built: Path) -> None:
    files = [path for kind in ("notebooks", "solutions") for path in sorted((built / kind).rglob("*.*"))]
    before = [path.read_bytes() for path in files]
    assert [path.name for path in files] == [
        "unit_99.ipynb",
        "unit_99.png",
        "executed.json",
        "unit_99.ipynb",
        "unit_99.png",
    ]
    with pytest.MonkeyPatch.context() as patch:
        again = build.build(enter_course(built, patch), built, again=True)
    assert (again.why, again.differences) == (["it was requested"], [])
    assert [path.read_bytes() for path in files] == before
    assert not list(built.rglob("*.part"))


def test_the_solved_notebook_is_executed_and_holds_nothing_of_the_machine(built: Path) -> None:
    solved = notebook(built, "solutions")
    code = [cell for cell in solved.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert solved.metadata == {"kernelspec": solved.metadata.kernelspec, "language_info": {"name": "python"}}
    assert not any(set(cell.metadata) - {"nbgrader", "jupyter"} for cell in solved.cells)
    results = {cell.id: cell.outputs[-1].data["text/plain"] for cell in code if cell.id.startswith("check-")}
    assert {name: float(points) for name, points in results.items()} == {
        "check-fourfold_root": 4,
        "check-guess_root": 1,
        "check-Counter": 2,
        "check-guess_number": 2,
    }


def test_the_picture_of_the_first_screen_is_the_figure(built: Path) -> None:
    picture = (built / "solutions/unit_99/unit_99.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert (built / "notebooks/unit_99/unit_99.png").read_bytes() == picture


def test_a_learners_notebook_has_no_outputs(built: Path) -> None:
    assert not any(cell.get("outputs") for cell in notebook(built, "notebooks").cells)


def test_the_unsolved_notebook_runs_to_its_end_and_says_not_started(built: Path) -> None:
    learners = notebook(built, "notebooks")
    with pytest.MonkeyPatch.context() as patch:
        enter_course(built, patch)
        execute(learners, building=False)
    outputs = [output for cell in learners.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    checks = [cell for cell in learners.cells if cell.id.startswith("check-")]
    assert [float(cell.outputs[-1].data["text/plain"]) for cell in checks] == [0, 0, 0, 0]
    assert all("not started" in str(cell.outputs).lower() for cell in checks)


@pytest.mark.parametrize(
    ("check", "other", "problem"),
    [
        (("Not started yet.", "0.0"), [], ""),
        (("Not started yet.", "1.0"), [], 'must be "not started", with no points'),
        (("Passed.", "0.0"), [], 'must be "not started", with no points'),
        (("Not started yet.", ""), [], 'must be "not started", with no points'),
        (("Not started yet.", "0.0"), [nbformat.v4.new_output("error", ename="E", evalue="e")], "E: e"),
        (("Not started yet.", "0.0"), [nbformat.v4.new_output("stream", name="stderr", text="hm")], "on stderr: hm"),
    ],
)
def test_an_unsolved_notebook_must_run_and_say_not_started(
    check: tuple[str, str], other: list[nbformat.NotebookNode], problem: str
) -> None:
    said, points = check
    outputs = [nbformat.v4.new_output("display_data", {"text/plain": said})]
    outputs += [nbformat.v4.new_output("execute_result", {"text/plain": points})] if points else []
    cells = [nbformat.v4.new_code_cell('check("rank")', id="check-rank", outputs=outputs)]
    cells.append(nbformat.v4.new_code_cell("x = 1", outputs=other))
    problems = refusals.in_an_unsolved_run(nbformat.v4.new_notebook(cells=cells))
    assert len(problems) == bool(problem)
    assert problem in "".join(problems)


def test_a_volatile_cell_keeps_its_output_until_its_source_changes() -> None:
    def with_output(source: str, text: str) -> nbformat.NotebookNode:
        cell = nbformat.v4.new_code_cell(source, outputs=[nbformat.v4.new_output("stream", text=text)])
        return nbformat.v4.new_notebook(cells=[cell])

    old = with_output("clock()", "before")
    for source, volatile, expected in (
        ("clock()", True, "before"),
        ("clock()", False, "now"),
        ("clock(2)", True, "now"),
    ):
        new = with_output(source, "now")
        build.keep_volatile(new, [Cell("code", source, "here", volatile=volatile)], old)
        assert new.cells[0].outputs[0].text == expected


def test_cells_have_ids_that_other_cells_do_not_change(course: Course) -> None:
    before = [cell.id for cell in course.draft().solved.cells]
    after = [cell.id for cell in course.draft(SOURCE.replace("# Nothing.", "# Something.")).solved.cells]
    assert len(set(before)) == len(before)
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1


def test_progress_bars_and_other_widgets_leave_no_trace() -> None:
    code = "from tqdm.auto import tqdm\nfrom tqdm import tqdm as plain\nprint([*tqdm(range(3)), *plain(range(2))])"
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    execute(made)
    assert [output.text for output in made.cells[0].outputs] == ["[0, 1, 2, 0, 1]\n"]
    assert "widgets" not in made.metadata


@pytest.mark.parametrize("cut", [True, False])
def test_a_kernel_has_no_network_and_nothing_of_the_persons_settings(
    monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    if cut and not execution.network_can_be_cut():
        pytest.skip("processes without a network cannot be made here")
    monkeypatch.setattr(execution, "network_can_be_cut", lambda: cut)
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    monkeypatch.setenv(execution.SETTINGS[0], "another model")
    code = (
        "import os, socket\n"
        "try:\n    socket.create_connection(('127.0.0.1', 9), 1)\n"
        "except OSError as error:\n    print(error, '|', [name for _, name in socket.if_nameindex()])\n"
        "print(os.listdir('.'), os.environ.get('PYTHONWARNINGS'), os.environ['OMP_NUM_THREADS'])\n"
        f"print([os.environ.get(name) for name in {execution.SETTINGS!r}])"
    )
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    execute(made, settings={execution.SETTINGS[1]: "3"})
    first, second, third = made.cells[0].outputs[0].text.splitlines()
    assert first.endswith("| ['lo']") if cut else first.startswith("there is no network")
    assert second == "[] None 1"
    assert third == "[None, '3']"


# --- Solutions ---------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """Make the last function or class of a piece of code an object that `inspect` can read."""
    import importlib

    def write(code: str) -> object:
        name = f"written_{abs(hash(code))}"
        (tmp_path / f"{name}.py").write_text(code)
        importlib.invalidate_caches()
        module = importlib.import_module(name)
        return getattr(module, "f", None) or module.C

    monkeypatch.syspath_prepend(str(tmp_path))
    return write


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('def f():\n    """Only this."""\n', "has only a docstring"),
        ("def f(): return 1\n", "is on the same line as its signature"),
        ("class C:\n    x = 1\n", "has no methods"),
    ],
)
def test_what_has_no_solution_is_refused(written: Callable[[str], object], code: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solved_source(written(code))


def test_a_method_that_is_not_there_cannot_be_taken_out(written: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match="names run, which is not one of its methods"):
        solved_source(written("class C:\n    def step(self):\n        return 1\n"), ("run",))


def test_decorators_and_inner_functions_are_kept_whole(written: Callable[[str], object]) -> None:
    code = (
        "import functools\n\n\n@functools.cache\ndef f(\n    x,\n):\n    # why\n    @functools.cache\n"
        "    def g():\n        return x\n\n    return g()\n"
    )
    marked = solved_source(written(code)).splitlines()
    assert marked[:5] == ["@functools.cache", "def f(", "    x,", "):", "    ### BEGIN SOLUTION"]
    assert marked[5:8] == ["    # why", "    @functools.cache", "    def g():"]
    assert marked[-1] == "    ### END SOLUTION"


# --- The command -------------------------------------------------------------------------------------


def test_the_command_lists_everything_that_is_wrong(
    course: Course, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "units", lambda: (course.unit,))
    (course.root / "course/units/unit_99.py").write_text(SOURCE.replace("## Summary", "## S").replace("## Go", "## G"))
    assert main(["build", "99", "--check", "--root", str(course.root)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
    (course.root / "course/units/unit_99.py").write_text(SOURCE)
    assert main(["build", "--check", "--root", str(course.root)]) == 0
    assert "unit 99: no problems in the source" in capsys.readouterr().out
    assert main(["build", "98", "--root", str(course.root)]) == 2
    assert "there is no unit 98" in capsys.readouterr().err


def test_the_projects_folder_is_found_from_inside_it_and_from_outside(tmp_path: Path) -> None:
    assert build.course_root(ROOT / "tests") == ROOT
    assert build.course_root(tmp_path) == ROOT


def test_the_tiny_course_is_json_that_other_tools_read(built: Path) -> None:
    for path in built.rglob("*.ipynb"):
        assert json.loads(path.read_text())["nbformat_minor"] == 5
        nbformat.validate(nbformat.read(path, as_version=4))
