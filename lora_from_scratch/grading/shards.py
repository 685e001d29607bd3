"""Grade a unit on several machines that share the course's folder: each marks one shard, and one collects the results.

    lora-from-scratch grade 09 --shard 3/16     # on each machine, with its own number
    lora-from-scratch grade 09 --collect        # afterwards, on one

A shard only marks its learners and writes their records; `--collect` does everything else. The shard of a learner
depends only on the learner's name, so every learner is in exactly one shard, regardless of when they hand in. The first
shard records its version of the course, and machines with another version are refused.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lora_from_scratch.grading import tasks
from lora_from_scratch.grading.course_folder import CourseFolder
from lora_from_scratch.grading.keys import why_changed
from lora_from_scratch.grading.marking_run import MarkingRun, Options, Preparation, locked, pool_of, prepare
from lora_from_scratch.grading.summary import PreviousResult
from lora_from_scratch.support.shard import Shard


@dataclass(frozen=True)
class ShardSummary:
    """The result of grading a shard.

    Attributes:
        unit: the number of the unit.
        shard: the shard.
        learners: the number of learners in the shard.
        marked: the number of submissions that were marked.
        trouble: a sentence for each learner who could not be graded.
        seconds: the elapsed time.
    """

    unit: str
    shard: Shard
    learners: int
    marked: int
    trouble: tuple[str, ...]
    seconds: float


def grade_shard(number: str, shard: Shard, options: Options) -> ShardSummary:
    """Mark the submissions of a shard and write their records.

    Raises:
        ValueError, OSError: grading cannot start; the message says why and what to do.
    """
    started = time.monotonic()
    given = prepare(number, options)
    course, learners = given.course, tuple(filter(shard.holds, given.learners))
    lock = course.lock.with_name(f"{course.lock.name}.{shard.number}-of-{shard.count}")
    with locked(course.lock, course.assignment, shared=True), locked(lock, f"shard {shard} of {course.assignment}"):
        _require_same_version(given)
        baseline(course, given.learners)
        with pool_of(options) as pool:
            run = ShardRun(given, pool)
            run.all(learners)
    return ShardSummary(
        given.unit.number, shard, len(learners), run.marked, tuple(run.refused), time.monotonic() - started
    )


class ShardRun(MarkingRun):
    """Marks a shard. It writes only the records."""

    def enter(self, learner: str, made: tasks.PreparedResult, trouble: tuple[str, ...] = ()) -> int:
        self.refused += [f"{learner}: {sentence}" for sentence in trouble]
        return 1


def baseline(course: CourseFolder, learners: tuple[str, ...]) -> dict[str, PreviousResult]:
    """The points of all learners before this grading. The first run stores them; resumed runs and other shards read
    the stored points."""
    found = _stored(course.baseline)
    if not isinstance(found, dict):
        course.baseline.unlink(missing_ok=True)
        records = {learner: tasks.stored_result(course.record(learner)) for learner in learners}
        before = {
            learner: {"key": graded.key, "points": {name: v.points for name, v in graded.verdicts.items()}}
            for learner, graded in records.items()
            if graded
        }
        found = _first(course.baseline, before)
    assert isinstance(found, dict)  # it has just been written
    return {learner: PreviousResult(**one) for learner, one in found.items()}


def _require_same_version(given: Preparation) -> None:
    """Check that the shards before this one used the same version of the course.

    Raises:
        ValueError: they used another version.
    """
    version = given.course.version
    found = _first(version, given.course_key)
    if found != given.course_key:
        why = why_changed(found, given.course_key) if isinstance(found, str) else f"{version.name} is damaged"
        raise ValueError(
            f"the shards of {given.course.assignment} that ran before had another version of the course than this "
            f"machine: {why}. Install the same version here; or, to begin again with this one, delete {version}"
        )


def _stored(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _first(path: Path, document: object) -> object:
    """Write a JSON file unless another process has already written it, and return its content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(document, file)
    try:
        os.link(name, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(name)
    return _stored(path)
