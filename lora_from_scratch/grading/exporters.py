"""Grades as tables, as plugins of `nbgrader export`: nbgrader's own, Canvas's and Moodle's.

    nbgrader export --to grades.csv
    nbgrader export --exporter=lora_from_scratch.grading.exporters.CanvasExport --to canvas.csv
    nbgrader export --exporter=lora_from_scratch.grading.exporters.MoodleExport --to moodle.csv

The first is the default (nbgrader_config.py). Scores are the same in all: they include manual scores, minus the penalty
for late submission. A cell is empty, which no system reads as a grade, if nothing was handed in, or if the submission
still needs a person: it could not be read or graded, or an open question is waiting. The column names of the other two
are set in nbgrader_config.py:

    c.GradeExport.columns = {"unit_09": "Unit 09: LoRA (48213)"}
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from typing import Any

from nbgrader.api import MissingEntry
from nbgrader.plugins import CsvExportPlugin, ExportPlugin
from traitlets import Dict, Unicode

from lora_from_scratch.support.plain_text import table_cell


class GradeExport(ExportPlugin):
    """A table with one row per learner and one column per unit."""

    columns = Dict(help="by nbgrader's name of a unit, the name of its column").tag(config=True)
    file_name = "grades.csv"
    encoding = "utf-8"

    def export(self, gradebook: Any) -> None:
        """Write the table to the file given by --to."""
        units = [unit for unit in gradebook.assignments if _wanted(unit.name, self.assignment)]
        students = [one for one in gradebook.students if _wanted(one.id, self.student)]
        if not units:
            self.log.warning("the gradebook has no unit to export")
        scores = {unit.name: self._scores(gradebook, unit.name) for unit in units}
        target = self.to or self.file_name
        with open(target, "w", newline="", encoding=self.encoding) as file:
            writer = csv.writer(file)
            writer.writerows(self.head(units))
            for student in sorted(students, key=lambda one: one.id):
                points = [scores[unit.name].get(student.id, "") for unit in units]
                writer.writerow([*map(table_cell, self.learner(student)), *points])
        self.log.info("Exported %d learners and %d units to %s", len(students), len(units), target)

    def head(self, units: list[Any]) -> Iterator[list[str]]:
        """The header rows."""
        raise NotImplementedError

    def learner(self, student: Any) -> list[str]:
        """The columns that identify the learner."""
        raise NotImplementedError

    def column(self, unit: Any) -> str:
        return self.columns.get(unit.name, unit.name)

    def _scores(self, gradebook: Any, unit: str) -> dict[str, str]:
        found = {}
        for submission in gradebook.assignment_submissions(unit):
            score = final_score(submission)
            found[submission.student.id] = "" if score is None else _number(score)
        warn_of_waiting(self.log, unit, sum(not score for score in found.values()))
        return found


class CanvasExport(GradeExport):
    """A table for Canvas's gradebook import.

    Its format (Canvas guides, "How do I import grades in the Gradebook?"): the learner in the first five columns, then
    one column per unit. A name with Canvas's number in brackets refers to that assignment; any other name creates one.
    The row of possible points comes first. Canvas finds learners by ID (nbgrader's lms_user_id) or SIS Login ID.
    """

    section = Unicode("", help="the section of every learner; empty: Canvas leaves it as it is").tag(config=True)
    file_name = "canvas.csv"

    def head(self, units: list[Any]) -> Iterator[list[str]]:
        yield ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", *(self.column(unit) for unit in units)]
        yield ["    Points Possible", "", "", "", "", *(_number(unit.max_score) for unit in units)]

    def learner(self, student: Any) -> list[str]:
        names = [name for name in (student.last_name, student.first_name) if name]
        return [", ".join(names) or student.id, student.lms_user_id or "", "", student.id, self.section]


class MoodleExport(GradeExport):
    """A table for Moodle's gradebook import (Grades > Import > CSV file).

    The columns have the names of Moodle's own export (MoodleDocs, "Grade import"). On the import page, map "Username",
    "ID number" or "Email address" to the user, and each unit to a grade item.
    """

    file_name = "moodle.csv"

    def head(self, units: list[Any]) -> Iterator[list[str]]:
        who = ["First name", "Last name", "ID number", "Username", "Email address"]
        yield [*who, *(f"{self.column(unit)} (Real)" for unit in units)]

    def learner(self, student: Any) -> list[str]:
        names = [student.first_name or "", student.last_name or ""]
        return [*names, student.lms_user_id or student.id, student.id, student.email or ""]


class CsvExport(CsvExportPlugin):
    """The table of nbgrader's CsvExportPlugin as valid CSV; the plugin does not escape commas or formulas in names."""

    COLUMNS = ("assignment", "duedate", "timestamp", "student_id", "last_name", "first_name", "email")
    POINTS = ("raw_score", "late_submission_penalty", "score", "max_score")

    def export(self, gradebook: Any) -> None:
        """Write the table to the file that --to names."""
        units = [unit for unit in gradebook.assignments if _wanted(unit.name, self.assignment)]
        students = [one for one in gradebook.students if _wanted(one.id, self.student)]
        with open(self.to or "grades.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*self.COLUMNS, *self.POINTS])
            writer.writerows(self._row(gradebook, unit, student) for unit in units for student in students)
        for unit in units:
            found = [one for one in gradebook.assignment_submissions(unit.name) if one.student in students]
            warn_of_waiting(self.log, unit.name, sum(final_score(one) is None for one in found))

    def _row(self, gradebook: Any, unit: Any, student: Any) -> list[Any]:
        when: Any = None
        points: list[Any] = ["", "", ""]
        with contextlib.suppress(MissingEntry):
            submission = gradebook.find_submission(unit.name, student.id)
            when, score = submission.timestamp, final_score(submission)
            if score is not None:
                points = [submission.score, submission.late_submission_penalty, score]
        said = (unit.name, unit.duedate, when, student.id, student.last_name, student.first_name, student.email)
        texts = ["" if value is None else table_cell(str(value)) for value in said]
        return [*texts, *points, unit.max_score]


def final_score(submission: Any) -> float | None:
    """The points of a submission in the gradebook, less the penalty; None while a person still has to decide some."""
    if submission.needs_manual_grade:
        return None
    return max(0.0, submission.score - submission.late_submission_penalty)


def warn_of_waiting(log: Any, unit: str, waiting: int) -> None:
    """Say how many submissions to a unit are exported without points."""
    if waiting:
        log.warning("%s: %d submissions still need a person and are exported without points", unit, waiting)


def _wanted(name: str, chosen: list[Any]) -> bool:
    return not chosen or name in [str(one) for one in chosen]


def _number(points: float) -> str:
    """Two digits at most, with a point, as both systems read them."""
    return f"{points:.2f}".rstrip("0").rstrip(".")
