"""Mark the submissions of a unit: the code shared by grading a whole class and grading a shard."""

from __future__ import annotations

import contextlib
import dataclasses
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
from lora_from_scratch.grading.graded import Finding, Graded
from lora_from_scratch.grading.keys import course_key
from lora_from_scratch.grading.pool import Outcome, Pool, Task
from lora_from_scratch.grading.sandbox import Isolation
from lora_from_scratch.support.files import remove_leftovers

PATIENCE = 3.0  # seconds to wait for the lock of a grading that has just been killed
MARKER = "lora_from_scratch.grading.marking:mark_file"


@dataclass(frozen=True)
class Options:
    """How to grade.

    Attributes:
        place: the course's folder; None searches from the current folder.
        workers: number of worker processes; 0 means one per processor.
        again: grade all submissions, including those that are already graded.
        collect: mark nothing, and enter the results of the shards into the gradebook.
        cluster: the address of the scheduler of a Dask cluster for marking; None marks on this machine.
        db: the gradebook's URL; None means the configured one.
        cohort_seed: sets the cohort's secret.
        marker: the function that marks a submission, as "module:function"; tests replace it.
        start: how workers are started; see `Pool`.
    """

    place: Path | None = None
    workers: int = 0
    isolation: Isolation = "bubblewrap"
    again: bool = False
    collect: bool = False
    cluster: str | None = None
    db: str | None = None
    feedback: bool = True
    cohort_seed: str | None = None
    marker: str = MARKER
    start: str = "spawn"


@dataclass(frozen=True)
class Preparation:
    """A unit that is ready to be graded.

    Attributes:
        course_key: the key shared by all results of this version of the course; see `keys.course_key`.
        learners: the learners who handed in, in order.
        refused: a sentence for each folder in submitted/ that cannot be graded.
    """

    unit: Unit
    course: CourseFolder
    options: Options
    released: Any
    secret: str
    course_key: str
    learners: tuple[str, ...]
    refused: tuple[str, ...]


def prepare(number: str, options: Options) -> Preparation:
    """Load everything that grading needs.

    Raises:
        ValueError, OSError: grading cannot start; the message says why and what to do.
    """
    import nbformat

    unit = tasks.unit_of(number)
    course = open_course(f"unit_{number}", options.place, options.db)
    if not options.collect and not options.cluster:
        require_sandbox(options.isolation)
    if not course.released.is_file():
        create = f"nbgrader generate_assignment unit_{number}"
        raise FileNotFoundError(f"there is no {course.released}; create it with: {create}")
    learners, refused = course.learners()
    if not learners and not refused:
        raise FileNotFoundError(f"nothing was handed in: {course.handed_in('*')} matches no folder")
    secret = secret_of(course.root, options.cohort_seed)
    return Preparation(
        unit=unit,
        course=course,
        options=options,
        released=nbformat.read(course.released, as_version=4),
        secret=secret,
        course_key=course_key(course.released, unit, secret, options.isolation),
        learners=tuple(learners),
        refused=tuple(refused),
    )


def processors() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pool_of(options: Options) -> Pool:
    """The pool of worker processes: on this machine, or on a cluster as well."""
    workers = options.workers or processors()
    if options.cluster is None:
        return Pool(workers, start=options.start)
    from lora_from_scratch.grading.cluster.pool import ClusterPool

    return ClusterPool(workers, start=options.start, address=options.cluster)


def require_sandbox(isolation: Isolation) -> None:
    """Check that this isolation is available on this machine.

    Raises:
        ValueError: the isolation is unknown or not available.
    """
    if isolation not in get_args(Isolation):
        raise ValueError(f"isolation must be one of {', '.join(get_args(Isolation))}, got {isolation!r}")
    if isolation != "bubblewrap":
        return
    why = sandbox.unavailable()
    if why:
        raise ValueError(f"{why}. Nothing was graded. --isolation none grades without a sandbox: a submission could "
                         "then read and change whatever you can")  # fmt: skip


class Progress:
    """A progress bar with an accurate estimate of the remaining time.

    First, every submission is looked up, which shows how many must be marked. The others are finished immediately and
    would distort the estimate, as would the first submission of each worker, which includes the time for imports.
    Therefore the rate is the mean over the submissions after these.
    """

    def __init__(self, name: str, submissions: int, workers: int, **options: Any) -> None:
        self.waiting = submissions  # submissions that have not been looked up
        self.first = workers  # submissions to mark before the rate is measured
        settings = {"unit": "submission", "desc": name, "disable": None, "smoothing": 0} | options
        self.bar: Any = tqdm(total=submissions, **settings)

    def finished(self, count: int) -> None:
        self.bar.update(count)
        if count and self.waiting == 0 and self.first > 0:
            self.first -= 1
            self._measure()

    def looked_up(self, count: int) -> None:
        self.waiting -= count
        if count and self.waiting == 0:
            self._measure()

    def _measure(self) -> None:
        """Restart the measurement of the rate, as tqdm's `reset` does."""
        if not self.bar.disable:
            self.bar.initial, self.bar.start_t = self.bar.n, self.bar._time()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


@dataclass
class MarkingRun:
    """Marks submissions without a result and writes each result to its record. Subclasses process the results."""

    given: Preparation
    pool: Pool
    marked: int = 0
    failed: int = 0
    refused: list[str] = field(default_factory=list)

    def all(self, learners: tuple[str, ...]) -> None:
        """For each learner independently: look up the submission, mark it if necessary, and call `enter`."""
        with Progress(self.given.course.assignment, len(learners), self.pool.workers) as progress:
            for learner in learners:
                _tidy(self.given.course, learner)
                self.pool.submit(Task(learner, tasks.LOOK_UP, (self._job(learner),)))
            for outcome in self.pool.outcomes():
                progress.finished(self.go_on(outcome))
                progress.looked_up(outcome.task.function == tasks.LOOK_UP)

    def go_on(self, outcome: Outcome) -> int:
        """Perform the step after a task. Returns 1 if the submission is finished, else 0."""
        return self._looked(outcome) if outcome.task.function == tasks.LOOK_UP else self._marked(outcome)

    def enter(self, learner: str, made: tasks.PreparedResult, trouble: tuple[str, ...] = ()) -> int:
        """Process a result. Returns 1 if the submission is finished, else 0."""
        raise NotImplementedError

    def unmarked(self, job: tasks.MarkingJob) -> int:
        """Process a submission that has no up-to-date result. Returns 1 if the submission is finished, else 0."""
        self.pool.submit(Task(job.learner, tasks.MARK, (job,)))
        return 0

    def _job(self, learner: str) -> tasks.MarkingJob:
        given, course = self.given, self.given.course
        name = f"{course.assignment}.ipynb"
        return tasks.MarkingJob(
            learner=learner,
            unit=given.unit.number,
            notebook=course.handed_in(learner) / name,
            released=course.released,
            record=course.record(learner),
            shown=course.autograded(learner) / name,
            course_key=given.course_key,
            secret=given.secret,
            isolation=given.options.isolation,
            cache=course.cache,
            marker=given.options.marker,
            again=given.options.again,
        )

    def _looked(self, outcome: Outcome) -> int:
        job: tasks.MarkingJob = outcome.task.arguments[0]
        if outcome.error:
            return self._failed(job, tasks.MarkingFailure(outcome.error, machine=False))
        key, prepared = outcome.value
        if prepared is not None:
            return self.enter(job.learner, prepared)
        return self.unmarked(dataclasses.replace(job, key=key))

    def _marked(self, outcome: Outcome) -> int:
        job: tasks.MarkingJob = outcome.task.arguments[0]
        if outcome.error:
            return self._failed(job, tasks.MarkingFailure(outcome.error, machine=False))
        if isinstance(outcome.value, tasks.MarkingFailure):
            return self._failed(job, outcome.value)
        self.marked += 1
        self.given.course.failed(job.learner).unlink(missing_ok=True)
        return self.enter(job.learner, outcome.value)

    def _failed(self, job: tasks.MarkingJob, failed: tasks.MarkingFailure) -> int:
        """After the first failure, the next run tries again; after the second one, a person must decide."""
        note, stored = self.given.course.failed(job.learner), tasks.stored_result(job.record)
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
        text = None if stored else autograded.shown(graded, self.given.released)
        return self.enter(job.learner, tasks.PreparedResult(graded, text), trouble)

    def _nothing(self, learner: str, why: str) -> Graded:
        from lora_from_scratch.grading.marking import nothing

        return nothing(self.given.released, self.given.unit, learner, [_finding(why)], self.given.options.isolation)


def _finding(why: str) -> Finding:
    message = f"Grading this notebook failed, through no fault of yours; a person will look at it. ({why})"
    return Finding("grading failed", "human", "", message)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _tidy(course: CourseFolder, learner: str) -> None:
    """Remove the temporary files of a killed run."""
    remove_leftovers(course.record(learner).parent)
    remove_leftovers(course.autograded(learner))


@contextlib.contextmanager
def locked(path: Path, what: str, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock on a file, exclusively or `shared`.

    Raises:
        ValueError: another process holds a conflicting lock.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    patience = time.monotonic() + PATIENCE
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > patience:
                    raise ValueError(f"{what} is being graded by another process; wait for it") from None
                time.sleep(0.1)
        yield
