"""The tiny course as an instructor has it: released, with what learners hand in, graded with a stand-in for marking."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from sqlalchemy import create_engine, inspect, text

from lora_from_scratch.checks import units
from lora_from_scratch.grading import keys
from lora_from_scratch.grading.building import build
from lora_from_scratch.grading.grade import Options, grade
from lora_from_scratch.grading.summary import Summary
from tests.tiny_course import enter_course, make_course

NAME = "unit_99"
MARKER = "tests.stand_in_marker:mark_file"
RIGHT = {
    "fourfold_root": "def fourfold_root(x): ...",
    "Counter": "class Counter: ...",
    "guess_root": 'guess_root = "b"',
}
ROWS = {  # what there is in the gradebook, with names in the place of ids that are random
    "student": "SELECT id, first_name, last_name FROM student",
    "submitted_assignment": "SELECT a.name, s.student_id, s.timestamp, s.extension "
    "FROM submitted_assignment s JOIN assignment a ON a.id = s.assignment_id",
    "submitted_notebook": "SELECT n.name, s.student_id, b.flagged, b.late_submission_penalty FROM submitted_notebook b "
    "JOIN notebook n ON n.id = b.notebook_id JOIN submitted_assignment s ON s.id = b.assignment_id",
    "grade": "SELECT s.student_id, c.name, g.auto_score, g.manual_score, g.extra_credit, g.needs_manual_grade "
    "FROM grade g JOIN base_cell c ON c.id = g.cell_id JOIN submitted_notebook b ON b.id = g.notebook_id "
    "JOIN submitted_assignment s ON s.id = b.assignment_id",
    "comment": "SELECT s.student_id, c.name, m.auto_comment, m.manual_comment FROM comment m "
    "JOIN base_cell c ON c.id = m.cell_id JOIN submitted_notebook b ON b.id = m.notebook_id "
    "JOIN submitted_assignment s ON s.id = b.assignment_id",
    "source_cell": "SELECT name, cell_type, locked, source, checksum FROM source_cell",
    "grade_cells": "SELECT c.name, g.max_score, g.cell_type FROM grade_cells g JOIN base_cell c ON c.id = g.id",
    "solution_cells": "SELECT c.name, c.type FROM solution_cells g JOIN base_cell c ON c.id = g.id",
    "course": "SELECT id FROM course",
    "assignment": "SELECT name, duedate, course_id FROM assignment",
}


@dataclasses.dataclass
class GradingCourse:
    root: Path
    db: str | None = None

    def notebook(self, answers: dict[str, str]) -> nbformat.NotebookNode:
        """The released notebook with these sources, by grade_id."""
        notebook = nbformat.read(self.released, as_version=4)
        for cell in notebook.cells:
            name = cell.metadata.get("nbgrader", {}).get("grade_id")
            cell.source = answers.get(name, cell.source)
        return notebook

    def hand_in(self, learner: str, when: str = "", /, **answers: str) -> Path:
        folder = self.root / "submitted" / learner / NAME
        folder.mkdir(parents=True, exist_ok=True)
        nbformat.write(self.notebook(answers), folder / f"{NAME}.ipynb")
        if when:
            (folder / "timestamp.txt").write_text(when)
        return folder

    def grade(self, **options: Any) -> Summary:
        settings: dict[str, Any] = {"place": self.root, "workers": 1, "isolation": "none", "feedback": False}
        settings |= {"marker": MARKER, "start": "fork", "db": self.db, "cohort_seed": "a secret of tests"}
        return grade("99", Options(**(settings | options)))

    @property
    def released(self) -> Path:
        return self.root / "notebooks" / NAME / f"{NAME}.ipynb"

    @property
    def url(self) -> str:
        return self.db or f"sqlite:///{self.root / 'gradebook.db'}"

    def rows(self) -> dict[str, list[tuple[Any, ...]]]:
        """Everything in the gradebook, table by table; that nothing stands there beside it is checked."""
        engine = create_engine(self.url)
        try:
            with engine.connect() as connection:
                found = {name: [tuple(row) for row in connection.execute(text(query))] for name, query in ROWS.items()}
                for name in inspect(engine).get_table_names():
                    count = connection.execute(text(f"SELECT count(*) FROM {name}")).scalar()
                    assert count == len(found.get(name, range(count or 0))), f"{name} has rows that belong to nothing"
        finally:
            engine.dispose()
        return {name: sorted(rows, key=repr) for name, rows in found.items()}

    def scores(self, learner: str) -> dict[str, tuple[Any, ...]]:
        """By cell: auto, manual, extra, does it need a person."""
        return {row[1]: (*row[2:5], bool(row[5])) for row in self.rows()["grade"] if row[0] == learner}

    def comments(self, learner: str) -> dict[str, tuple[Any, ...]]:
        return {row[1]: row[2:] for row in self.rows()["comment"] if row[0] == learner}

    def as_a_person(self, act: Callable[[Any], None]) -> None:
        """Change the gradebook as the formgrader does."""
        from nbgrader.api import Gradebook

        with Gradebook(self.url) as gradebook:
            act(gradebook)
            gradebook.db.commit()

    def give(self, learner: str, cell: str, points: float, comment: str = "") -> None:
        def act(gradebook: Any) -> None:
            grade = gradebook.find_grade(cell, NAME, NAME, learner)
            grade.manual_score, grade.needs_manual_grade = points, False
            if comment:
                gradebook.find_comment(cell, NAME, NAME, learner).manual_comment = comment

        self.as_a_person(act)

    def record(self, learner: str) -> dict[str, Any]:
        return json.loads((self.root / "graded" / learner / f"{NAME}.json").read_text())

    def copy(self, to: Path) -> GradingCourse:
        """Another course that is the same (on SQLite)."""
        shutil.copytree(self.root, to)
        return GradingCourse(to)


@contextlib.contextmanager
def template(root: Path) -> Iterator[GradingCourse]:
    """A released course with an empty gradebook, for `copy`: starting alembic for each would take seconds."""
    from nbgrader import api

    try:
        with pytest.MonkeyPatch.context() as patch:
            made = release_course(root, patch)
            patch.setattr(keys, "_files", functools.partial(as_at_first, keys._files, {}))
            forget_units()
            with pytest.MonkeyPatch.context() as quick:
                quick.setattr(api, "get_alembic_version", lambda: "not asked")
                api.Gradebook(made.url).close()
            yield made
    finally:
        forget_units()


def as_at_first(
    files: Callable[[list[Path]], Iterator[bytes]], known: dict[Path, list[bytes]], paths: list[Path]
) -> Iterator[bytes]:
    """The library's files as they were when this was first asked: somebody may be editing it while tests run."""
    for path in paths:
        content = known.get(path) or list(files([path]))
        if path.is_relative_to(keys.PACKAGE):
            known[path] = content
        yield from content


def forget_units() -> None:
    """Which units there are is found out once in a process; this course has one more."""
    units.units.cache_clear()
    units.names.cache_clear()


def release_course(root: Path, patch: pytest.MonkeyPatch) -> GradingCourse:
    """A new course with unit 99 released. It is not run, so it is quick."""
    unit = enter_course(make_course(root), patch)
    patch.setenv("PATH", "/usr/bin:/bin")  # no alembic: the environment is not activated
    made = build.draft(unit, root)
    for folder in ("solutions", "notebooks"):
        path = root / folder / NAME / f"{NAME}.ipynb"
        path.parent.mkdir(parents=True)
        path.write_text(made.learners if folder == "notebooks" else nbformat.writes(made.solved))
        path.with_suffix(".png").write_bytes(b"a picture")
    return GradingCourse(root)
