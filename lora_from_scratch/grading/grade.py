"""Grade a unit: from submitted/ to the gradebook, the feedback pages and the report.

Workers mark the submissions; only this process writes the gradebook. Every step is idempotent and stored as soon as it
is done, so a run that was killed resumes where it stopped and gives the same result as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from lora_from_scratch.checks.units import Unit
from lora_from_scratch.grading import autograded, sandbox, tasks
from lora_from_scratch.grading.cohort import secret_of
from lora_from_scratch.grading.course_folder import CourseFolder, open_course
from lora_from_scratch.grading.gradebook import GradebookEntry, GradebookError, UnitGradebook
from lora_from_scratch.grading.graded import Finding, Graded
from lora_from_scratch.grading.keys import course_key, why_changed
from lora_from_scratch.grading.pool import Outcome, Pool, Task
from lora_from_scratch.grading.report import write_report
from lora_from_scratch.grading.sandbox import Isolation
from lora_from_scratch.grading.summary import PreviousResult, Row, Summary
from lora_from_scratch.support.files import remove_leftovers, write_json

PATIENCE = 3.0  # seconds to wait for the lock of a grading that has just been killed
NO_ENTRY = GradebookEntry(0.0, {}, 0.0, 0.0, 0.0, (), (), ())
MARKER = "lora_from_scratch.grading.marking:mark_file"


@dataclass(frozen=True)
class Options:
    """How to grade.

    Attributes:
        place: the course's folder; None searches from the current folder.
        workers: number of worker processes; 0 means one per processor.
        again: grade everything, including what is already graded.
        db: the gradebook's URL; None means the configured one.
        cohort_seed: sets the cohort's secret.
        marker: the function that marks a submission, as "module:function"; tests replace it.
        start: how workers are started; see `Pool`.
    """

    place: Path | None = None
    workers: int = 0
    isolation: Isolation = "bubblewrap"
    again: bool = False
    db: str | None = None
    feedback: bool = True
    cohort_seed: str | None = None
    marker: str = MARKER
    start: str = "spawn"


def grade(number: str, options: Options | None = None) -> Summary:
    """Grade every submission of a unit.

    Raises:
        ValueError, OSError: grading cannot start; the message says why and what to do.
    """
    import nbformat

    options, started = options or Options(), time.monotonic()
    unit = tasks.unit_of(number)
    course = open_course(f"unit_{number}", options.place, options.db)
    require_sandbox(options.isolation)
    if not course.released.is_file():
        create = f"nbgrader generate_assignment unit_{number}"
        raise FileNotFoundError(f"there is no {course.released}; create it with: {create}")
    learners, refused = course.learners()
    if not learners and not refused:
        raise FileNotFoundError(f"nothing was handed in: {course.handed_in('*')} matches no folder")
    released = nbformat.read(course.released, as_version=4)
    secret = secret_of(course.root, options.cohort_seed)
    with _locked(course), _open_book(course) as book:
        book.prepare(released)
        with Pool(options.workers or processors(), start=options.start) as pool:
            run = _Run(unit, course, options, released, secret, book, pool)
            rows = run.all(learners)
        absent = tuple(sorted(set(book.enrolled()) - set(learners)))
        summary = Summary(
            unit=unit,
            course=course,
            cells=tuple(cell.metadata.nbgrader["grade_id"] for cell in released.cells if "nbgrader" in cell.metadata),
            rows=rows,
            refused=tuple(refused),
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
    return summary


def processors() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_sandbox(isolation: Isolation) -> None:
    """Check that submissions can be isolated in this way on this machine.

    Raises:
        ValueError: they cannot, or the isolation is unknown.
    """
    if isolation not in get_args(Isolation):
        raise ValueError(f"isolation must be one of {', '.join(get_args(Isolation))}, got {isolation!r}")
    if isolation == "none":
        return
    why = sandbox.unavailable()
    if why:
        raise ValueError(f"{why}. Nothing was graded. --isolation none grades without a sandbox: a submission could "
                         "then read and change whatever you can")  # fmt: skip


@dataclass
class _Run:
    """A grading in progress."""

    unit: Unit
    course: CourseFolder
    options: Options
    released: Any
    secret: str
    book: UnitGradebook
    pool: Pool
    marked: int = 0
    failed: int = 0
    rows: dict[str, Row] = field(default_factory=dict)
    baseline: dict[str, PreviousResult] = field(default_factory=dict)

    def all(self, learners: list[str]) -> tuple[Row, ...]:
        """For each learner independently: look at the submission, mark it if needed, enter the points, publish."""
        self.baseline = _baseline(self.course, learners)
        shared = course_key(self.course.released, self.unit, self.secret, self.options.isolation)
        with tqdm(total=len(learners), unit="submission", desc=self.course.assignment, disable=None) as bar:
            for learner in learners:
                _tidy(self.course, learner)
                self.pool.submit(Task(learner, tasks.LOOK_UP, (self._job(learner, shared),)))
            for outcome in self.pool.outcomes():
                bar.update(STEPS[outcome.task.function](self, outcome))
        return tuple(self.rows[learner] for learner in learners)

    def _job(self, learner: str, shared: str) -> tasks.MarkingJob:
        name = f"{self.course.assignment}.ipynb"
        return tasks.MarkingJob(
            learner=learner,
            unit=self.unit.number,
            notebook=self.course.handed_in(learner) / name,
            released=self.course.released,
            record=self.course.record(learner),
            shown=self.course.autograded(learner) / name,
            course_key=shared,
            secret=self.secret,
            isolation=self.options.isolation,
            cache=self.course.cache,
            marker=self.options.marker,
            again=self.options.again,
        )

    def _looked(self, outcome: Outcome) -> int:
        job: tasks.MarkingJob = outcome.task.arguments[0]
        if outcome.error:
            return self._failed(job, tasks.MarkingFailure(outcome.error, machine=False))
        key, prepared = outcome.value
        if prepared is not None:
            return self._enter(job.learner, prepared)
        self.pool.submit(Task(job.learner, tasks.MARK, (dataclasses.replace(job, key=key),)))
        return 0

    def _marked(self, outcome: Outcome) -> int:
        job: tasks.MarkingJob = outcome.task.arguments[0]
        if outcome.error:
            return self._failed(job, tasks.MarkingFailure(outcome.error, machine=False))
        if isinstance(outcome.value, tasks.MarkingFailure):
            return self._failed(job, outcome.value)
        self.marked += 1
        self.course.failed(job.learner).unlink(missing_ok=True)
        return self._enter(job.learner, outcome.value)

    def _failed(self, job: tasks.MarkingJob, failed: tasks.MarkingFailure) -> int:
        """After a first failure the next run tries again; after a second one, a person decides."""
        note, stored = self.course.failed(job.learner), tasks.stored_result(job.record)
        graded = stored or self._nothing(job.learner, failed.why)
        if not failed.machine and job.key and _text_of(note) == job.key:
            graded = dataclasses.replace(graded, key=job.key, findings=(*graded.findings, _finding(failed.why)))
            tasks.write_text(job.record, graded.to_json())
            note.unlink()
            trouble: tuple[str, ...] = ()
        else:
            if not failed.machine:
                tasks.write_text(note, job.key)
            self.failed += 1
            trouble = (f"could not be graded: {failed.why}; the next run tries again",)
        text = None if stored else autograded.shown(graded, self.released)
        return self._enter(job.learner, tasks.PreparedResult(graded, text), trouble)

    def _nothing(self, learner: str, why: str) -> Graded:
        from lora_from_scratch.grading.marking import nothing

        return nothing(self.released, self.unit, learner, [_finding(why)], self.options.isolation)

    def _enter(self, learner: str, made: tasks.PreparedResult, trouble: tuple[str, ...] = ()) -> int:
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
        course, said = self.course, json.dumps(dataclasses.asdict(entry), sort_keys=True)
        where = (course.assignment, course.place, course.db_url, learner, made.text, said, self.options.feedback)
        self.pool.submit(Task(learner, tasks.PUBLISH, where), first=True)
        return 0

    def _published(self, outcome: Outcome) -> int:
        if outcome.error:
            row = self.rows[outcome.task.name]
            trouble = (*row.trouble, f"its autograded notebook or feedback page could not be written: {outcome.error}")
            self.rows[outcome.task.name] = dataclasses.replace(row, trouble=trouble)
        return 1


STEPS = {tasks.LOOK_UP: _Run._looked, tasks.MARK: _Run._marked, tasks.PUBLISH: _Run._published}


def _finding(why: str) -> Finding:
    message = f"Grading this notebook failed, through no fault of yours; a person will look at it. ({why})"
    return Finding("grading failed", "human", "", message)


def _baseline(course: CourseFolder, learners: list[str]) -> dict[str, PreviousResult]:
    """Everybody's points before this grading; a resumed run compares with what the interrupted one found."""
    try:
        found = json.loads(course.baseline.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        records = {learner: tasks.stored_result(course.record(learner)) for learner in learners}
        found = {
            learner: {"key": graded.key, "points": {name: v.points for name, v in graded.verdicts.items()}}
            for learner, graded in records.items()
            if graded
        }
        write_json(course.baseline, found)
    return {learner: PreviousResult(**one) for learner, one in found.items()}


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _tidy(course: CourseFolder, learner: str) -> None:
    """Remove the temporary files of a killed run."""
    remove_leftovers(course.record(learner).parent)
    remove_leftovers(course.autograded(learner))


def _open_book(course: CourseFolder) -> UnitGradebook:
    return UnitGradebook(course.db_url, course.assignment, course.directory.course_id, course.config)


@contextlib.contextmanager
def _locked(course: CourseFolder) -> Iterator[None]:
    """Hold the lock that allows one grading of a unit at a time."""
    import fcntl

    course.lock.parent.mkdir(parents=True, exist_ok=True)
    patience = time.monotonic() + PATIENCE
    with course.lock.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > patience:
                    raise ValueError(f"{course.assignment} is being graded by another process; wait for it") from None
                time.sleep(0.1)
        yield
