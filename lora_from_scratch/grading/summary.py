"""A finished grading, as the report and the terminal show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_from_scratch.checks.units import Unit
from lora_from_scratch.grading.course_folder import CourseFolder
from lora_from_scratch.grading.gradebook import GradebookEntry
from lora_from_scratch.grading.graded import Graded


@dataclass(frozen=True)
class PreviousResult:
    """What a learner had before this grading."""

    key: str
    points: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """The result for one learner's submission.

    Attributes:
        previous: the previous result; None for a first grading.
        why: why it was graded again, in words; "" if it was not.
        trouble: failures outside the submission itself: it could not be marked, its feedback was not written, ...
    """

    learner: str
    graded: Graded
    entry: GradebookEntry
    previous: PreviousResult | None
    why: str
    trouble: tuple[str, ...] = ()

    @property
    def needs_a_human(self) -> bool:
        return bool(self.graded.needs_a_human or self.entry.waiting or self.trouble)


@dataclass(frozen=True)
class Summary:
    """A finished grading.

    Attributes:
        cells: the grade_ids of the release, in order.
        refused: submissions that were not graded, one sentence each.
        absent: learners in the gradebook who have handed in nothing.
        marked: how many submissions were marked by this run.
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
