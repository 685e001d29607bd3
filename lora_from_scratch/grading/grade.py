"""Grading a unit: everything from submitted/ to the gradebook, the feedback pages and the report.

Workers mark; this process alone writes the gradebook. Every step is stored as soon as it is done, and doing it again
changes nothing: so a run that was killed goes on where it stopped, and ends as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from lora_from_scratch.checks.units import Unit
from lora_from_scratch.grading import autograded, sandbox, tasks
from lora_from_scratch.grading.cohort import secret_of
from lora_from_scratch.grading.course_folder import CourseFolder, open_course
from lora_from_scratch.grading.gradebook import Book, Entered
from lora_from_scratch.grading.graded import Finding, Graded
from lora_from_scratch.grading.keys import course_key, key_of, why_changed
from lora_from_scratch.grading.pool import Outcome, Pool, Task
from lora_from_scratch.grading.report import write_report
from lora_from_scratch.grading.sandbox import Isolation
from lora_from_scratch.support.files import remove_leftovers, write_json

PATIENCE = 3.0  # seconds for a grading that was killed just now
MARKER = "lora_from_scratch.grading.marking:mark_file"


@dataclass(frozen=True)
class Options:
    """How to grade.

    Attributes:
        place: the course's folder; None: found from here.
        workers: processes; 0: one for each processor.
        again: grade also what is graded already.
        db: the gradebook's URL; None: the configured one.
        cohort_seed: the cohort's secret, to set it.
        marker: what marks a submission; another one for tests.
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


def grade(number: str, options: Options | None = None) -> Summary:
    """Grade everything that was handed in of a unit.

    Raises:
        ValueError, OSError: nothing can be graded; the message says why and what to do.
    """
    import nbformat

    options, started = options or Options(), time.monotonic()
    unit = tasks.unit_of(number)
    course = open_course(f"unit_{number}", options.place, options.db)
    require_sandbox(options.isolation)
    if not course.released.is_file():
        raise FileNotFoundError(f"there is no {course.released}; make it: nbgrader generate_assignment unit_{number}")
    learners, refused = course.learners()
    if not learners and not refused:
        raise FileNotFoundError(f"nothing was handed in: {course.handed_in('*')} matches no folder")
    released = nbformat.read(course.released, as_version=4)
    secret = secret_of(course.root, options.cohort_seed)
    with _alone(course), _open_book(course) as book:
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
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_sandbox(isolation: Isolation) -> None:
    """Can submissions be isolated like this here?

    Raises:
        ValueError: they cannot, or there is no such isolation.
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
    """One grading, while it goes on."""

    unit: Unit
    course: CourseFolder
    options: Options
    released: Any
    secret: str
    book: Book
    pool: Pool
    marked: int = 0
    failed: int = 0
    rows: dict[str, Row] = field(default_factory=dict)
    baseline: dict[str, Before] = field(default_factory=dict)

    def all(self, learners: list[str]) -> tuple[Row, ...]:
        self.baseline = _baseline(self.course, learners)
        shared = course_key(self.course.released, self.unit, self.secret, self.options.isolation)
        keys = {learner: key_of(self.course.handed_in(learner), shared) for learner in learners}
        ready = {} if self.options.again else self._stored(keys)
        with tqdm(total=len(learners), unit="submission", desc=self.course.assignment, disable=None) as bar:
            for learner in learners:
                _tidy(self.course, learner)
                if learner not in ready:
                    self.pool.submit(self._job(learner, keys[learner]))
            for learner, graded in ready.items():
                bar.update(self._enter(learner, graded))
            for outcome in self.pool.outcomes():
                if outcome.task.function == tasks.MARK:
                    bar.update(self._marked(outcome))
                else:
                    bar.update(self._told(outcome))
        return tuple(self.rows[learner] for learner in learners)

    def _stored(self, keys: Mapping[str, str]) -> dict[str, Graded]:
        """What is graded already, and would come out the same."""
        found = {learner: _read(self.course.record(learner)) for learner in keys}
        return {learner: graded for learner, graded in found.items() if graded and graded.key == keys[learner]}

    def _job(self, learner: str, key: str) -> Task:
        folder = self.course.handed_in(learner)
        job = tasks.Job(
            learner=learner,
            unit=self.unit.number,
            notebook=folder / f"{self.course.assignment}.ipynb",
            released=self.course.released,
            record=self.course.record(learner),
            key=key,
            secret=self.secret,
            isolation=self.options.isolation,
            cache=self.course.cache,
            marker=self.options.marker,
        )
        return Task(learner, tasks.MARK, (job,))

    def _marked(self, outcome: Outcome) -> int:
        learner = outcome.task.name
        stored = _read(self.course.record(learner))
        if not outcome.error and stored is not None:
            self.marked += 1
            return self._enter(learner, stored)
        self.failed += 1
        why = outcome.error or "the result that was written cannot be read"
        trouble = f"could not be graded: {why}; the next run tries again"
        return self._enter(learner, stored or self._nothing(learner, why), (trouble,))

    def _nothing(self, learner: str, why: str) -> Graded:
        from lora_from_scratch.grading.marking import nothing

        message = f"Grading this notebook failed, through no fault of yours; a person will look at it. ({why})"
        finding = Finding("grading failed", "human", "", message)
        return nothing(self.released, self.unit, learner, [finding], self.options.isolation)

    def _enter(self, learner: str, graded: Graded, trouble: tuple[str, ...] = ()) -> int:
        """Into the gradebook, then into autograded/: in this order, as what persons saw is read from autograded/."""
        shown = self.course.autograded(learner) / f"{self.course.assignment}.ipynb"
        text = autograded.shown(graded, self.released)
        handed_in, unclear = _handed_in(self.course, learner)
        entered = self.book.enter(graded, handed_in, autograded.changed_cells(shown, text))
        autograded.write(self.course, learner, text)
        before = self.baseline.get(learner)
        why = why_changed(before.key, graded.key) if before else ""
        self.rows[learner] = Row(learner, graded, entered, before, why, trouble + unclear)
        made_of = _made_of(shown, entered)
        if not self.options.feedback or self._has_feedback(learner, made_of):
            return 1
        where = (self.course.assignment, self.course.place, self.course.db_url, learner, made_of)
        self.pool.submit(Task(learner, tasks.FEEDBACK, where), first=True)
        return 0

    def _has_feedback(self, learner: str, made_of: str) -> bool:
        page = self.course.feedback(learner) / f"{self.course.assignment}.html"
        try:
            return page.is_file() and self.course.feedback_mark(learner).read_text(encoding="utf-8") == made_of
        except OSError:
            return False

    def _told(self, outcome: Outcome) -> int:
        if outcome.error:
            row = self.rows[outcome.task.name]
            trouble = (*row.trouble, f"there is no page of feedback: {outcome.error}")
            self.rows[outcome.task.name] = Row(row.learner, row.graded, row.entered, row.before, row.why, trouble)
        return 1


def _baseline(course: CourseFolder, learners: list[str]) -> dict[str, Before]:
    """What everybody had before this grading; a run that goes on compares with what the first one found."""
    try:
        found = json.loads(course.baseline.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        records = {learner: _read(course.record(learner)) for learner in learners}
        found = {
            learner: {"key": graded.key, "points": {name: v.points for name, v in graded.verdicts.items()}}
            for learner, graded in records.items()
            if graded
        }
        write_json(course.baseline, found)
    return {learner: Before(**one) for learner, one in found.items()}


def _read(record: Path) -> Graded | None:
    try:
        return Graded.from_json(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _handed_in(course: CourseFolder, learner: str) -> tuple[str | None, tuple[str, ...]]:
    """When, as nbgrader's timestamp.txt says; and what is wrong with that file."""
    from nbgrader.utils import parse_utc

    path = course.handed_in(learner) / autograded.TIMESTAMP
    content = autograded.read_small(path, autograded.LONGEST_TIMESTAMP)
    if content is None:
        strange = os.path.lexists(path)
        return None, ("timestamp.txt is no plain small file: when it was handed in is not known",) * strange
    text = content.decode(errors="replace").strip()
    try:
        return (text, ()) if text and parse_utc(text) else (None, ())
    except (ValueError, ArithmeticError, TypeError, AttributeError):
        return None, (f"timestamp.txt holds no time ({text[:40]!r}): when it was handed in is not known",)


def _made_of(shown: Path, entered: Entered) -> str:
    """What a page of feedback is made of, as a digest."""
    said = [sorted(entered.scores.items()), entered.penalty, sorted(entered.comments), entered.max_score]
    return hashlib.sha256(shown.read_bytes() + json.dumps(said).encode()).hexdigest()


def _tidy(course: CourseFolder, learner: str) -> None:
    """Take away what a killed run was writing."""
    remove_leftovers(course.record(learner).parent)
    remove_leftovers(course.autograded(learner))


def _open_book(course: CourseFolder) -> Book:
    return Book(course.db_url, course.assignment, course.directory.course_id, course.config)


@contextlib.contextmanager
def _alone(course: CourseFolder) -> Iterator[None]:
    """One grading of a unit at a time."""
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
