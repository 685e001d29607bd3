"""A finished grading, as the report and the terminal show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_from_scratch.checks.units import Unit
from lora_from_scratch.grading.course_folder import CourseFolder
from lora_from_scratch.grading.gradebook import Entered
from lora_from_scratch.grading.graded import Graded


@dataclass(frozen=True)
class Before:
    """What a learner had before this grading."""

    key: str
    points: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """What became of a learner's submission.

    Attributes:
        before: None where this is the first grading.
        why: in words, why it was graded again; "" if it was not.
        trouble: what went wrong beside the submission: it could not be marked, there is no page of feedback, ...
    """

    learner: str
    graded: Graded
    entered: Entered
    before: Before | None
    why: str
    trouble: tuple[str, ...] = ()

    @property
    def needs_a_human(self) -> bool:
        return bool(self.graded.needs_a_human or self.entered.waiting or self.trouble)


@dataclass(frozen=True)
class Summary:
    """A finished grading.

    Attributes:
        cells: the grade_ids of the release, in its order.
        refused: submissions that were not looked at, as sentences.
        absent: who is in the gradebook and has handed in nothing.
        marked: how many were marked now and not before.
        failed: how many could not be marked.
    """

    unit: Unit
    course: CourseFolder
    cells: tuple[str, ...]
    rows: tuple[Row, ...]
    refused: tuple[str, ...]
    absent: tuple[str, ...]
    isolation: str
    marked: int
    failed: int
    workers: int
    peak_bytes: int
    seconds: float

    @property
    def code(self) -> int:
        """The command's exit code."""
        if self.failed:
            return 2
        return 1 if self.refused or any(row.needs_a_human for row in self.rows) else 0
