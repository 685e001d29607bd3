"""nbgrader's gradebook: written by one process, one transaction for each learner.

What is written is what nbgrader's own `autograde` writes (SaveAutoGrades and AssignLatePenalties of nbgrader 0.9.6),
with two differences. A score that a person gave is put before the person again only when what it was given for has
changed; and a cell that grading could not decide asks for a person. Scores and comments of a person are never touched.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_from_scratch.grading.course_folder import CourseFolder
from lora_from_scratch.grading.graded import Graded
from lora_from_scratch.support.plain_text import in_markdown

PATIENCE = 60  # seconds for another program that is writing to the same SQLite file
HINT = "finished results are kept; run the command again"
HINTS = {
    "readonly": "give yourself write access to it and its folder (chmod u+w), then run the command again",
    "locked": "another program is writing to it; close it and run the command again: finished results are kept",
    "not a database": "restore it from a copy, or choose another one with --db",
    "unable to open": "is there such a folder, and may you write there?",
}
NO_RESPONSE = "No response."  # nbgrader's own words


@dataclass(frozen=True)
class GradebookEntry:
    """The gradebook's entry for a submission.

    Attributes:
        score: the total, including manual scores, before the penalty.
        scores: the score of each cell, by grade_id.
        penalty: the penalty for late submission.
        by_hand: the grade_ids of cells with a manual score.
        waiting: the grade_ids of cells that need a person.
    """

    score: float
    scores: Mapping[str, float]
    max_score: float
    penalty: float
    late_seconds: float
    by_hand: tuple[str, ...]
    waiting: tuple[str, ...]
    comments: tuple[str, ...]


class GradebookError(ValueError):
    """The gradebook itself cannot be used, whatever is entered."""


class UnitGradebook:
    """The gradebook of a course, for one unit."""

    def __init__(self, url: str, assignment: str, course_id: str, config: Any) -> None:
        """Open the gradebook, or create it.

        Args:
            url: an SQLAlchemy URL: "sqlite:////folder/gradebook.db", "postgresql://user:password@host/name".

        Raises:
            ValueError: it cannot be opened.
        """
        from nbgrader.api import Gradebook

        _let_alembic_be_found()
        self.url, self.assignment, self.config = url, assignment, config
        with _errors(url):
            # nbgrader's own steps open it without naming a course, which creates the default course; do it here, once.
            Gradebook(with_timeout(url)).close()
            self.gradebook = Gradebook(with_timeout(url), course_id)
        self.session = self.gradebook.db

    def close(self) -> None:
        self.gradebook.close()

    def __enter__(self) -> UnitGradebook:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self, released: Any) -> None:
        """Make sure that the gradebook contains the unit as released.

        Raises:
            ValueError: graded cells were added or removed since work was handed in, which nbgrader does not support.
        """
        from nbgrader.api import MissingEntry
        from nbgrader.preprocessors import SaveCells

        with _errors(self.url):
            try:
                known = _cells_of(self.gradebook.find_notebook(self.assignment, self.assignment))
            except MissingEntry:
                known = {}
            wanted = _cells_in(released)
            if known == wanted:
                return
            self.gradebook.update_or_create_assignment(self.assignment)
            self.session.remove()  # release locks while nbgrader writes
            where = {"notebook": self.assignment, "assignment": self.assignment, "db_url": with_timeout(self.url)}
            try:
                SaveCells(config=self.config).preprocess(released, {"nbgrader": where})
            except RuntimeError:
                changed = ", ".join(sorted(set(known) ^ set(wanted)))
                raise ValueError(
                    f"the graded cells of {self.assignment} have changed since work was graded ({changed}), and "
                    f"nbgrader cannot add or remove any. Export the manual grades (nbgrader export), then: "
                    f"nbgrader db assignment remove {self.assignment} --force"
                ) from None
            self.session.remove()

    def enter(self, graded: Graded, handed_in: str | None, changed: Collection[str]) -> GradebookEntry:
        """Enter a graded submission in one transaction.

        Args:
            handed_in: the time of submission in nbgrader's format; None if unknown.
            changed: the grade_ids of cells that differ from what a person saw after the previous grading.
        """
        import nbformat

        notebook = nbformat.reads(graded.notebook, as_version=4)
        with self._transaction():
            submitted = self._submission(graded.learner, handed_in)
            self._enter_grades(submitted, graded, changed)
            self._enter_comments(submitted, graded, notebook)
            self.session.flush()
            self.session.expire_all()  # the database computes the sums
            late = submitted.assignment.total_seconds_late
            submitted.late_submission_penalty = self._penalty(submitted, late)
            self.session.flush()
            return _entry_of(submitted, late)

    def enrolled(self) -> list[str]:
        """The ids of all learners in the gradebook."""
        with _errors(self.url):
            return sorted(student.id for student in self.gradebook.students)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        from sqlalchemy import text

        with _errors(self.url):
            try:
                self.session.rollback()
                if self.session.get_bind().dialect.name == "sqlite":
                    self.session.execute(text("BEGIN IMMEDIATE"))  # nothing read below can change before the commit
                yield
                self.session.commit()
            except BaseException:
                self.session.rollback()
                raise

    def _submission(self, learner: str, handed_in: str | None) -> Any:
        """The row of the learner's notebook, with a grade or comment row for each cell that needs one."""
        from nbgrader.api import Comment, Grade, Student, SubmittedAssignment, SubmittedNotebook
        from nbgrader.utils import parse_utc

        unit = self.gradebook.find_assignment(self.assignment)
        notebook = self.gradebook.find_notebook(self.assignment, self.assignment)
        student = self.session.get(Student, learner) or _added(self.session, Student(id=learner))
        query = self.session.query(SubmittedAssignment).filter_by(assignment_id=unit.id, student_id=student.id)
        whole = query.one_or_none() or _added(
            self.session, SubmittedAssignment(assignment_id=unit.id, student_id=student.id)
        )
        if handed_in:
            whole.timestamp = parse_utc(handed_in)
        self.session.flush()
        rows = self.session.query(SubmittedNotebook).filter_by(assignment_id=whole.id, notebook_id=notebook.id)
        mine = rows.one_or_none() or _added(
            self.session, SubmittedNotebook(assignment_id=whole.id, notebook_id=notebook.id)
        )
        self.session.flush()
        graded = {grade.cell_id for grade in mine.grades}
        commented = {comment.cell_id for comment in mine.comments}
        for cell in notebook.grade_cells:
            if cell.id not in graded:
                self.session.add(Grade(cell_id=cell.id, notebook_id=mine.id))
        for cell in notebook.solution_cells:
            if cell.id not in commented:
                self.session.add(Comment(cell_id=cell.id, notebook_id=mine.id))
        self.session.flush()
        self.session.expire(mine)
        return mine

    def _enter_grades(self, submitted: Any, graded: Graded, changed: Collection[str]) -> None:
        doubtful = {finding.cell for finding in graded.findings if finding.severity == "human"}
        for grade in submitted.grades:
            name = grade.cell.name
            solution = name.removeprefix("check-")
            if name in graded.verdicts:
                score: float | None = round(graded.verdicts[name].points, 2)  # as `check` returns it in a notebook
            else:
                score = None if graded.open_questions.get(name, True) else 0.0
            if grade.manual_score is None:
                asks = score is None or bool(doubtful & {"", name, solution})
            else:
                asks = grade.needs_manual_grade or solution in changed or score != grade.auto_score
            grade.auto_score, grade.needs_manual_grade = score, asks

    def _enter_comments(self, submitted: Any, graded: Graded, notebook: Any) -> None:
        """As in nbgrader, "No response." for unanswered cells; then the findings about the cell."""
        from nbgrader.utils import compute_checksum

        cells = {cell.metadata.nbgrader["grade_id"]: cell for cell in notebook.cells if _grade_id(cell)}
        for comment in submitted.comments:
            name = comment.cell.name
            cell = cells.get(name)
            empty = cell is None or cell.metadata.nbgrader.get("checksum") == compute_checksum(cell)
            found = [in_markdown(f.message) for f in graded.findings if f.cell in (name, f"check-{name}")]
            comment.auto_comment = "\n\n".join([NO_RESPONSE] * empty + found) or None

    def _penalty(self, submitted: Any, late: float) -> float | None:
        """The penalty for late submission, computed by nbgrader's plugin."""
        from nbgrader.preprocessors import AssignLatePenalties

        if late <= 0:
            return None
        step = AssignLatePenalties(config=self.config)
        step.gradebook, step.assignment_id = self.gradebook, self.assignment  # for plugins that look at other units
        step.init_plugin()
        penalty = step.plugin_inst.late_submission_penalty(submitted.assignment.student_id, submitted.score, late)
        return None if penalty is None else step._check_late_penalty(submitted, penalty)


def students_of(course: CourseFolder) -> list[Any]:
    """The learners in the course's gradebook, with all that nbgrader knows about them.

    Raises:
        ValueError: the gradebook cannot be opened.
    """
    with UnitGradebook(course.db_url, course.assignment, course.directory.course_id, course.config) as book:
        students = book.gradebook.students
        book.session.expunge_all()
        return list(students)


def _entry_of(submitted: Any, late: float) -> GradebookEntry:
    grades = sorted(submitted.grades, key=lambda grade: grade.cell.name)
    return GradebookEntry(
        score=submitted.score,
        scores={grade.cell.name: grade.score for grade in grades},
        max_score=submitted.notebook.max_score,
        penalty=submitted.late_submission_penalty or 0.0,
        late_seconds=late,
        by_hand=tuple(grade.cell.name for grade in grades if grade.manual_score is not None),
        waiting=tuple(grade.cell.name for grade in grades if grade.needs_manual_grade),
        comments=tuple(f"{row.cell.name}: {row.comment}" for row in submitted.comments if row.comment),
    )


def _cells_of(notebook: Any) -> dict[str, tuple[Any, ...]]:
    """By grade_id, the gradebook's record of a notebook's cells, to be compared with `_cells_in`."""
    graded = {cell.name: cell.max_score for cell in notebook.grade_cells}
    solutions = {cell.name for cell in notebook.solution_cells}
    return {
        cell.name: (
            cell.cell_type,
            cell.locked,
            cell.source,
            cell.checksum,
            graded.get(cell.name),
            cell.name in solutions,
        )
        for cell in notebook.source_cells
    }


def _cells_in(released: Any) -> dict[str, tuple[Any, ...]]:
    """The same for the released notebook, as nbgrader's SaveCells would write it."""
    from nbgrader import utils

    cells = [
        cell for cell in released.cells if utils.is_grade(cell) or utils.is_solution(cell) or utils.is_locked(cell)
    ]
    return {
        _grade_id(cell): (
            cell.cell_type,
            utils.is_locked(cell),
            cell.source,
            cell.metadata.nbgrader.get("checksum"),
            float(cell.metadata.nbgrader["points"]) if utils.is_grade(cell) else None,
            utils.is_solution(cell),
        )
        for cell in cells
    }


def _grade_id(cell: Any) -> str:
    return cell.metadata.get("nbgrader", {}).get("grade_id", "")


def _added(session: Any, row: Any) -> Any:
    session.add(row)
    return row


def with_timeout(url: str) -> str:
    """The URL with a timeout, so that SQLite waits while another program is writing."""
    from sqlalchemy.engine import make_url

    made = make_url(url)
    if made.get_backend_name() == "sqlite" and "timeout" not in made.query:
        made = made.update_query_dict({"timeout": str(PATIENCE)})
    return made.render_as_string(hide_password=False)


def _let_alembic_be_found() -> None:
    """Put this Python's folder on PATH: nbgrader runs alembic by name, and the environment may not be activated."""
    here = str(Path(sys.executable).parent)
    if here not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = f"{here}{os.pathsep}{os.environ.get('PATH', '')}"


@contextlib.contextmanager
def _errors(url: str) -> Iterator[None]:
    """Turn database errors into one sentence, and silence nbgrader's own log of them."""
    from nbgrader.api import InvalidEntry, app_log
    from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError, StatementError

    from lora_from_scratch.grading.course_folder import without_password

    said, app_log.disabled = app_log.disabled, True
    try:
        yield
    except (SQLAlchemyError, InvalidEntry) as error:
        lines = str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__]
        hint = next((hint for words, hint in HINTS.items() if words in lines[0]), HINT)
        if "no such column" in lines[0] or "UndefinedColumn" in type(getattr(error, "orig", None)).__name__:
            hint = "it was made by an older nbgrader: copy it, then run `nbgrader db upgrade`"
        bad_value = isinstance(error, DataError | IntegrityError) or type(error) is StatementError
        kind = ValueError if bad_value else GradebookError
        raise kind(f"the gradebook {without_password(url)} cannot be used: {lines[0]}; {hint}") from error
    finally:
        app_log.disabled = said
