"""What the worker processes of a grading do: mark a submission, make a page of feedback."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_from_scratch.checks.units import Unit, units
from lora_from_scratch.grading.course_folder import CourseFolder, open_course
from lora_from_scratch.grading.gradebook import patient
from lora_from_scratch.support.files import write_atomically

if TYPE_CHECKING:
    from lora_from_scratch.grading.sandbox import Isolation

MARK = f"{__name__}:mark"
FEEDBACK = f"{__name__}:make_feedback"


@dataclass(frozen=True)
class Job:
    """A submission to be marked.

    Attributes:
        notebook: submitted/LEARNER/unit_NN/unit_NN.ipynb.
        released: the notebook that learners got.
        record: the file that the result is written to.
        marker: "module:function" that marks, with the arguments of `marking.mark_file`.
    """

    learner: str
    unit: str
    notebook: Path
    released: Path
    record: Path
    key: str
    secret: str
    isolation: Isolation
    cache: Path
    marker: str


def mark(job: Job) -> None:
    """Mark a submission and write the result, whole or not at all.

    Raises:
        ValueError, OSError: the machine or the course is at fault.
    """
    import importlib

    from lora_from_scratch.grading.marking import Settings

    module, _, name = job.marker.partition(":")
    mark_file = getattr(importlib.import_module(module), name)
    settings = Settings(cache=job.cache, isolation=job.isolation)
    graded = mark_file(
        job.notebook,
        _released(job.released),
        unit_of(job.unit),
        job.learner,
        job.secret,
        settings,
        key=job.key,
    )
    write_text(job.record, graded.to_json())


def make_feedback(assignment: str, place: Path, db: str, learner: str, made_of: str) -> None:
    """Have nbgrader write the learner's page of feedback, and note what it was made of.

    Raises:
        ValueError: nbgrader could not.
    """
    from nbgrader.converters import GenerateFeedback
    from nbgrader.converters.base import NbGraderException

    course = _course(assignment, place, patient(db))
    folder = course.autograded(learner)

    class OneLearner(GenerateFeedback):
        """nbgrader's own, which looks for folders by a pattern: "[x]" is a pattern too."""

        def init_notebooks(self) -> None:
            self.assignments = {str(folder): [str(folder / f"{assignment}.ipynb")]}

    log = _Kept("feedback")
    converter = OneLearner(coursedir=course.directory, config=course.config, log=log)
    converter.force = True
    try:
        converter.start()
    except NbGraderException as error:
        raise ValueError(log.last or str(error)) from None
    write_text(course.feedback_mark(learner), made_of)


def unit_of(number: str) -> Unit:
    """The unit of this number.

    Raises:
        ValueError: there is none.
    """
    for unit in units():
        if unit.number == number:
            return unit
    raise ValueError(f"there is no unit {number}; there are: {', '.join(unit.number for unit in units())}")


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
    """nbgrader says a lot; the last thing that went wrong is kept."""

    last = ""

    def __init__(self, name: str) -> None:
        super().__init__(name, logging.ERROR)
        self.addHandler(logging.NullHandler())

    def handle(self, record: logging.LogRecord) -> None:
        lines = record.getMessage().strip().splitlines()
        if "Traceback" in record.getMessage():
            self.last = lines[-1]
