"""Grade a unit: from submitted/ to the gradebook, the feedback pages and the report.

Workers mark the submissions; only this process writes the gradebook. Every step is idempotent and stored as soon as it
is done, so a run that was killed resumes where it stopped and gives the same result as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field

from lora_from_scratch.grading import tasks
from lora_from_scratch.grading.course_folder import CourseFolder
from lora_from_scratch.grading.gradebook import GradebookEntry, GradebookError, UnitGradebook
from lora_from_scratch.grading.keys import why_changed
from lora_from_scratch.grading.marking_run import MARKER, MarkingRun, Options, locked, pool_of, prepare
from lora_from_scratch.grading.pool import Outcome, Task
from lora_from_scratch.grading.report import write_report
from lora_from_scratch.grading.shards import baseline
from lora_from_scratch.grading.summary import PreviousResult, Row, Summary

__all__ = ["MARKER", "Options", "grade"]

NO_ENTRY = GradebookEntry(0.0, {}, 0.0, 0.0, 0.0, (), (), ())


def grade(number: str, options: Options | None = None) -> Summary:
    """Grade every submission of a unit.

    Raises:
        ValueError, OSError: grading cannot start; the message says why and what to do.
    """
    options, started = options or Options(), time.monotonic()
    given = prepare(number, options)
    course, released = given.course, given.released
    with locked(course.lock, course.assignment), _open_book(course) as book:
        book.prepare(released)
        with pool_of(options) as pool:
            run = GradingRun(given, pool, book=book, baseline=baseline(course, given.learners))
            run.all(given.learners)
        absent = tuple(sorted(set(book.enrolled()) - set(given.learners)))
        summary = Summary(
            unit=given.unit,
            course=course,
            cells=tuple(cell.metadata.nbgrader["grade_id"] for cell in released.cells if "nbgrader" in cell.metadata),
            rows=tuple(run.rows[learner] for learner in given.learners if learner in run.rows),
            refused=(*given.refused, *run.refused, *pool.notes()),
            absent=absent,
            isolation=options.isolation,
            marked=run.marked,
            failed=run.failed,
            workers=pool.workers,
            peak_bytes=pool.peak_bytes,
            seconds=time.monotonic() - started,
        )
        write_report(summary)
        course.baseline.unlink(missing_ok=True)
        course.version.unlink(missing_ok=True)
    return summary


@dataclass
class GradingRun(MarkingRun):
    """A grading that writes the gradebook, and publishes each result."""

    book: UnitGradebook = field(kw_only=True)
    baseline: dict[str, PreviousResult] = field(kw_only=True)
    rows: dict[str, Row] = field(default_factory=dict)

    def go_on(self, outcome: Outcome) -> int:
        return self._published(outcome) if outcome.task.function == tasks.PUBLISH else super().go_on(outcome)

    def unmarked(self, job: tasks.MarkingJob) -> int:
        if not self.given.options.collect:
            return super().unmarked(job)
        stored = tasks.stored_result(job.record)
        why = f"its result is not of this version of the course: {why_changed(stored.key, job.key)}" if stored else ""
        self.refused.append(f"{job.learner}: {why or 'no shard has graded it'}; run its shard again")
        self.failed += 1
        return 1

    def enter(self, learner: str, made: tasks.PreparedResult, trouble: tuple[str, ...] = ()) -> int:
        """Write the gradebook, then autograded/, in this order: autograded/ still holds what a person last saw."""
        graded, before = made.graded, self.baseline.get(learner)
        trouble += (made.unclear,) if made.unclear else ()
        try:
            entry = self.book.enter(graded, made.handed_in, made.changed)
        except GradebookError:
            raise
        except Exception as error:  # something in this submission that the gradebook cannot hold
            self.failed += 1
            entry = NO_ENTRY
            trouble += (f"could not be entered into the gradebook: {type(error).__name__}: {error}"[:500],)
        why = why_changed(before.key, graded.key) if before else ""
        kept = dataclasses.replace(graded, notebook="")
        self.rows[learner] = Row(learner, kept, entry, before, why, trouble)
        if made.text is None or entry is NO_ENTRY:
            return 1
        course, said = self.given.course, json.dumps(dataclasses.asdict(entry), sort_keys=True)
        where = (course.assignment, course.place, course.db_url, learner, made.text, said, self.given.options.feedback)
        self.pool.submit(Task(learner, tasks.PUBLISH, where), first=True)
        return 0

    def _published(self, outcome: Outcome) -> int:
        if outcome.error:
            row = self.rows[outcome.task.name]
            trouble = (*row.trouble, f"its autograded notebook or feedback page could not be written: {outcome.error}")
            self.rows[outcome.task.name] = dataclasses.replace(row, trouble=trouble)
        return 1


def _open_book(course: CourseFolder) -> UnitGradebook:
    return UnitGradebook(course.db_url, course.assignment, course.directory.course_id, course.config)
