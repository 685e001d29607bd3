"""The tasks of a grading's worker processes: everything that touches submitted files.

Each task concerns one learner, and its failure affects only that learner. `pool` bounds its time and memory.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_from_scratch.checks.units import Unit, units
from lora_from_scratch.grading import autograded
from lora_from_scratch.grading.course_folder import CourseFolder, open_course
from lora_from_scratch.grading.gradebook import with_timeout
from lora_from_scratch.grading.graded import Graded
from lora_from_scratch.grading.keys import key_of
from lora_from_scratch.grading.marking import Settings
from lora_from_scratch.grading.sandbox import Isolation, SandboxError
from lora_from_scratch.grading.submissions.folder import handed_in_at
from lora_from_scratch.grading.submissions.released import forget
from lora_from_scratch.support.files import write_atomically

LOOK_UP = f"{__name__}:look_up"
MARK = f"{__name__}:mark"
PUBLISH = f"{__name__}:publish"
MACHINES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)


@dataclass(frozen=True)
class MarkingJob:
    """A submission to be marked.

    Attributes:
        notebook: submitted/LEARNER/unit_NN/unit_NN.ipynb.
        released: the released notebook.
        record: the file to which the result is written.
        shown: the notebook in autograded/, which a person may have seen after the previous grading.
        course_key: the part of the key that all submissions share.
        key: the submission's key; "" before `look_up`.
        again: mark it even if the stored result is up to date.
        marker: the marking function as "module:function", with the arguments of `marking.mark_file`.
    """

    learner: str
    unit: str
    notebook: Path
    released: Path
    record: Path
    shown: Path
    course_key: str
    secret: str
    isolation: Isolation
    cache: Path
    marker: str
    key: str = ""
    again: bool = False


@dataclass(frozen=True)
class PreparedResult:
    """A graded submission, ready for the gradebook and for publishing.

    Attributes:
        graded: the result.
        text: the notebook as it will be shown; None to leave the published files unchanged.
        changed: the grade_ids of cells that differ from what a person saw after the previous grading.
        handed_in: the time of submission in nbgrader's format; None if unknown.
        unclear: what is wrong with the timestamp file; "" if nothing.
    """

    graded: Graded
    text: str | None
    changed: frozenset[str] = frozenset()
    handed_in: str | None = None
    unclear: str = ""


@dataclass(frozen=True)
class MarkingFailure:
    """Why a submission could not be marked, and whether that is the machine's fault and not the submission's."""

    why: str
    machine: bool


def look_up(job: MarkingJob) -> tuple[str, PreparedResult | None]:
    """The submission's key, and the stored result if it is up to date (else None)."""
    key = key_of(job.notebook.parent, job.course_key)
    stored = None if job.again else stored_result(job.record)
    return key, _prepared(job, stored) if stored is not None and stored.key == key else None


def mark(job: MarkingJob) -> PreparedResult | MarkingFailure:
    """Mark a submission and write the result atomically."""
    return accept(job, mark_to_text(job))


def mark_to_text(job: MarkingJob) -> str | MarkingFailure:
    """Mark a submission; the result as `Graded.to_json` writes it."""
    try:
        return _mark(job).to_json()
    except Exception as error:  # must not stop the grading of the others
        return _failure(error)


def accept(job: MarkingJob, text: str | MarkingFailure) -> PreparedResult | MarkingFailure:
    """Write the result of `mark_to_text` atomically, and prepare it for the gradebook."""
    if isinstance(text, MarkingFailure):
        return text
    try:
        prepared = _prepared(job, Graded.from_json(text))
        write_text(job.record, text)
        return prepared
    except Exception as error:  # as above
        return _failure(error)


def _failure(error: Exception) -> MarkingFailure:
    why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]
    return MarkingFailure(why, isinstance(error, SandboxError) or getattr(error, "errno", None) in MACHINES)


def stored_result(record: Path) -> Graded | None:
    try:
        return Graded.from_json(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _mark(job: MarkingJob) -> Graded:
    module, _, name = job.marker.partition(":")
    mark_file = getattr(importlib.import_module(module), name)
    settings = Settings(cache=job.cache, isolation=job.isolation)
    released, unit = _released(job.released), unit_of(job.unit)
    try:
        return mark_file(job.notebook, released, unit, job.learner, job.secret, settings, key=job.key)
    finally:
        forget()


def _prepared(job: MarkingJob, graded: Graded) -> PreparedResult:
    text = autograded.shown(graded, _released(job.released))
    changed = frozenset(autograded.changed_cells(job.shown, text))
    return PreparedResult(graded, text, changed, *handed_in_at(job.notebook.parent))


def publish(assignment: str, place: Path, db: str, learner: str, text: str, said: str, feedback: bool) -> None:
    """Write the autograded notebook of a submission, and its feedback page unless that is up to date.

    Args:
        said: the submission's entry in the gradebook, as JSON.

    Raises:
        ValueError, OSError: it could not be written.
    """
    from lora_from_scratch.grading.feedback import for_the_exchange

    course = _course(assignment, place, with_timeout(db))
    autograded.write(course, learner, text)
    shown = course.autograded(learner) / f"{assignment}.ipynb"
    beside = for_the_exchange(course.handed_in(learner), course.root, learner)
    made_of = hashlib.sha256(shown.read_bytes() + said.encode() + json.dumps(beside).encode()).hexdigest()
    if feedback and not _has_feedback(course, learner, made_of):
        make_feedback(course, learner, made_of, beside)


def _has_feedback(course: CourseFolder, learner: str, made_of: str) -> bool:
    page = course.feedback(learner) / f"{course.assignment}.html"
    try:
        return page.is_file() and course.feedback_mark(learner).read_text(encoding="utf-8") == made_of
    except OSError:
        return False


def make_feedback(course: CourseFolder, learner: str, made_of: str, beside: Mapping[str, str]) -> None:
    """Have nbgrader write the learner's feedback page with other files beside it, and store the hash of its inputs.

    Raises:
        ValueError: nbgrader failed.
    """
    from nbgrader.converters import GenerateFeedback
    from nbgrader.converters.base import NbGraderException

    folder, assignment = course.autograded(learner), course.assignment

    class OneLearner(GenerateFeedback):
        """Avoids nbgrader's search by glob pattern, since a learner's name such as "[x]" is a pattern too."""

        def init_notebooks(self) -> None:
            self.assignments = {str(folder): [str(folder / f"{assignment}.ipynb")]}

    log = _Kept("feedback")
    converter = OneLearner(coursedir=course.directory, config=course.config, log=log)
    converter.force = True
    try:
        converter.start()
    except NbGraderException as error:
        raise ValueError(log.last or str(error)) from None
    for name, text in beside.items():
        write_text(course.feedback(learner) / name, text)
    write_text(course.feedback_mark(learner), made_of)


def unit_of(number: str) -> Unit:
    """The unit with this number.

    Raises:
        ValueError: there is no such unit.
    """
    for unit in units():
        if unit.number == number:
            return unit
    raise ValueError(f"there is no unit {number}; the units are: {', '.join(unit.number for unit in units())}")


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@functools.lru_cache(maxsize=1)
def _released(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=4)


@functools.lru_cache(maxsize=1)
def _course(assignment: str, place: Path, db: str) -> CourseFolder:
    return open_course(assignment, place, db)


class _Kept(logging.Logger):
    """A silent logger that keeps the last error."""

    last = ""

    def __init__(self, name: str) -> None:
        super().__init__(name, logging.ERROR)
        self.addHandler(logging.NullHandler())

    def handle(self, record: logging.LogRecord) -> None:
        lines = record.getMessage().strip().splitlines()
        if "Traceback" in record.getMessage():
            self.last = lines[-1]
