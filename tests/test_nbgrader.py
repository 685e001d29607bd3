"""nbgrader itself on the course: release, validate, autograde, feedback, export, and the formgrader."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from nbgrader.api import Gradebook
from nbgrader.validator import Validator
from traitlets.config import Config

from lora_from_scratch.checks import units
from lora_from_scratch.grading.cohort import secret_of
from lora_from_scratch.grading.marking import Settings, mark_file
from lora_from_scratch.grading.sandbox.stripped import find_unit
from tests.damages import after, by_id, copied, metadata_stripped
from tests.sandboxes import needs_bubblewrap
from tests.tiny_course import enter_course

NOTEBOOK = "unit_99/unit_99.ipynb"

# Right but for what is below zero, and talkative: it warns and writes to stderr.
PARTLY = """\
def fourfold_root(x, scale=4.0):
    import sys
    import warnings

    warnings.warn("this root is slow")
    print("this root is slow", file=sys.stderr)
    return x.double() ** 0.5 * scale
"""


@dataclasses.dataclass
class Course:
    """A course folder: solutions/ as built, notebooks/ as nbgrader makes it, and the build's own to compare."""

    root: Path
    built: Path
    patch: pytest.MonkeyPatch

    def nbgrader(self, *arguments: str) -> None:
        """Run nbgrader as an instructor does: in the folder of its configuration."""
        done = subprocess.run(
            [sys.executable, "-m", "nbgrader", *arguments], cwd=self.root / "course", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def submission(self, change: Callable[[nbformat.NotebookNode], None]) -> nbformat.NotebookNode:
        """The solved notebook as a learner would hand it in: the released one with the solution cells filled in."""
        released = nbformat.read(self.root / "notebooks" / NOTEBOOK, as_version=4)
        solved = nbformat.read(self.built / "solutions" / NOTEBOOK, as_version=4)
        for cell, answer in zip(released.cells, solved.cells, strict=True):
            if cell.metadata.get("nbgrader", {}).get("solution") and cell.cell_type == "code":
                cell.source = answer.source
        change(released)
        return released

    def hand_in(self, learner: str, notebook: nbformat.NotebookNode) -> None:
        path = self.root / "submitted" / learner / NOTEBOOK
        path.parent.mkdir(parents=True)
        nbformat.write(notebook, path)


def answer(cell_id: str, text: str) -> Callable[[nbformat.NotebookNode], None]:
    def change(notebook: nbformat.NotebookNode) -> None:
        next(cell for cell in notebook.cells if cell.id == cell_id).source = text

    return change


@pytest.fixture(scope="module")
def course(built_course: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    """The tiny course, released by nbgrader; its folder is where nbgrader writes."""
    built, root = (tmp_path_factory.mktemp(name) for name in ("built", "course"))
    shutil.copytree(built_course, built, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        enter_course(built, patch)
        # nbgrader starts alembic by its name; a kernel must not read or write what is the person's own.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("IPYTHONDIR", str(root / "ipython"))
        patch.setenv("JUPYTER_CONFIG_DIR", str(root / "jupyter"))
        patch.setenv("LORA_FROM_SCRATCH_HOME", str(root / "home"))
        patch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
        (root / "course").mkdir()
        shutil.copy(built / "course" / "nbgrader_config.py", root / "course")
        shutil.copytree(built / "solutions", root / "solutions")
        made = Course(root, built, patch)
        made.nbgrader("generate_assignment", "unit_99")
        units.units.cache_clear()
        units.names.cache_clear()
        yield made
    units.units.cache_clear()
    units.names.cache_clear()


def crash(notebook: nbformat.NotebookNode) -> None:
    answer("exercise-fourfold_root", PARTLY)(notebook)
    after(notebook, by_id(notebook, "check-fourfold_root"), nbformat.v4.new_code_cell("import os\nos._exit(0)"))


def copy_the_solution(notebook: nbformat.NotebookNode) -> None:
    cell = by_id(notebook, "Counter")
    after(notebook, cell, copied(cell))


def cheat(notebook: nbformat.NotebookNode) -> None:
    """Wrong everywhere, but for a test that says otherwise."""
    for name in ("fourfold_root", "Counter"):
        by_id(notebook, name).source = f"def {name}(*arguments):\n    return 1"
        by_id(notebook, f"check-{name}").source = "100.0"
        by_id(notebook, f"check-{name}").metadata.nbgrader.points = 100


SUBMISSIONS: dict[str, Callable[[nbformat.NotebookNode], None]] = {
    "all": answer("answer-why_count", "To know how many there are."),
    "cheat": cheat,
    "copied": copy_the_solution,
    "crash": crash,
    "part": answer("exercise-fourfold_root", PARTLY),
    "stripped": metadata_stripped,
}


@pytest.fixture(scope="module")
def graded(course: Course) -> Course:
    """Seven learners: solved, damaged, partly right, wrong, and nothing done."""
    for learner, change in SUBMISSIONS.items():
        course.hand_in(learner, course.submission(change))
    course.hand_in("none", nbformat.read(course.root / "notebooks" / NOTEBOOK, as_version=4))
    course.nbgrader("autograde", "unit_99", "--create")
    return course


def grades(course: Course, learner: str) -> dict[str, float | None]:
    with Gradebook(f"sqlite:///{course.root}/gradebook.db") as gradebook:
        notebook = gradebook.find_submission_notebook("unit_99", "unit_99", learner)
        return {grade.name: grade.auto_score for grade in notebook.grades}


def test_generate_assignment_writes_the_learners_notebook_byte_for_byte(course: Course) -> None:
    for name in ("unit_99.ipynb", "unit_99.png"):
        released = course.root / "notebooks" / "unit_99" / name
        assert released.read_bytes() == (course.built / "notebooks" / "unit_99" / name).read_bytes()


@pytest.mark.parametrize("solved", [True, False])
def test_validate_fails_for_the_unsolved_notebook_and_passes_for_the_solved_one(course: Course, solved: bool) -> None:
    path = course.root / "validated" / "unit_99.ipynb"
    path.parent.mkdir(exist_ok=True)
    released = nbformat.read(course.root / "notebooks" / NOTEBOOK, as_version=4)
    answered = course.submission(answer("answer-why_count", "To know how many there are."))
    nbformat.write(answered if solved else released, path)
    results = Validator(config=Config(Execute={"timeout": 600})).validate(str(path))
    assert sorted(results) == ([] if solved else ["failed"])
    assert len(results.get("failed", [])) == (0 if solved else 5)  # four checks and the open question


@needs_bubblewrap
def test_a_solution_gets_full_points_and_a_person_is_asked_for_the_open_question(graded: Course) -> None:
    assert grades(graded, "all") == {
        "check-fourfold_root": 4,
        "check-guess_root": 1,
        "check-Counter": 2,
        "check-guess_number": 2,
        "why_count": None,
    }
    with Gradebook(f"sqlite:///{graded.root}/gradebook.db") as gradebook:
        assert gradebook.find_submission("unit_99", "all").needs_manual_grade
        assert gradebook.find_assignment("unit_99").max_score == 12


@needs_bubblewrap
def test_part_of_the_points_for_part_of_the_answer_and_none_lost_to_warnings(graded: Course) -> None:
    assert grades(graded, "part") == grades(graded, "all") | {"check-fourfold_root": 2, "why_count": 0}


@needs_bubblewrap
def test_nothing_done_is_nothing_earned(graded: Course) -> None:
    assert set(grades(graded, "none").values()) == {0}


@needs_bubblewrap
def test_a_damaged_notebook_keeps_its_points_and_stops_nobodys_grading(graded: Course) -> None:
    full = grades(graded, "all") | {"why_count": 0}
    assert grades(graded, "copied") == grades(graded, "stripped") == full
    assert grades(graded, "crash") == grades(graded, "part")
    assert grades(graded, "cheat") == full | {"check-fourfold_root": 0, "check-Counter": 0}


@needs_bubblewrap
def test_the_courses_own_marking_gives_the_same_points(graded: Course) -> None:
    release = nbformat.read(graded.root / "notebooks" / NOTEBOOK, as_version=4)
    unit, settings = find_unit("99"), Settings(graded.root / "graded" / ".cache")
    for learner in ("part", "cheat"):
        path = graded.root / "submitted" / learner / NOTEBOOK
        marked = mark_file(path, release, unit, learner, secret_of(graded.root), settings)
        points = {name: verdict.points for name, verdict in marked.verdicts.items()}
        assert points == {name: score for name, score in grades(graded, learner).items() if name != "why_count"}


@needs_bubblewrap
def test_feedback_shows_the_verdict_and_no_solution(graded: Course) -> None:
    graded.nbgrader("generate_feedback", "unit_99")
    page = (graded.root / "feedback" / "part" / "unit_99" / "unit_99.html").read_text()
    assert "below zero" in page  # the case that failed
    empty = (graded.root / "feedback" / "none" / "unit_99" / "unit_99.html").read_text()
    assert "not started" in empty.lower()
    assert "math.cos" not in empty + page
    assert "appears 2 times" in (graded.root / "feedback" / "copied" / "unit_99" / "unit_99.html").read_text()


@needs_bubblewrap
def test_export_writes_the_points_of_everybody_once_they_are_decided(graded: Course) -> None:
    graded.nbgrader("export", f"--to={graded.root / 'grades.csv'}")
    with (graded.root / "grades.csv").open() as file:
        scores = {row["student_id"]: (row["score"], row["max_score"]) for row in csv.DictReader(file)}
    decided = {"cheat": "3.0", "copied": "9.0", "crash": "7.0", "none": "0.0", "part": "7.0", "stripped": "9.0"}
    expected = decided | {"all": ""}  # a person still has to read this learner's open answer
    assert scores == {learner: (score, "12.0") for learner, score in expected.items()}


@needs_bubblewrap
def test_the_formgrader_shows_the_unit(graded: Course) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "server", "--no-browser", f"--port={port}", "--allow-root"]
    command += [
        "--IdentityProvider.token=",
        "--ServerApp.jpserver_extensions={'nbgrader.server_extensions.formgrader': True}",
    ]
    log = (graded.root / "server.log").open("w")
    server = subprocess.Popen(command, cwd=graded.root / "course", stdout=log, stderr=log)
    try:
        assert "formgrader" in fetch(f"http://127.0.0.1:{port}/formgrader", server).lower()
        units = json.loads(fetch(f"http://127.0.0.1:{port}/formgrader/api/assignments", server))
        assert [(unit["name"], unit["num_submissions"], unit["max_score"]) for unit in units] == [("unit_99", 7, 12)]
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def fetch(address: str, server: subprocess.Popen) -> str:
    """What a server answers; it may still be starting."""
    patience = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(address, timeout=60) as answered:
                return answered.read().decode()
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert server.poll() is None, "the server has ended"
            assert time.monotonic() < patience, "the server does not answer"
            time.sleep(0.3)
