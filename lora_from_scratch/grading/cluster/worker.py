"""Marking submissions on a worker of the cluster.

Dask's worker process only forwards tasks: each of its threads has its own long-lived process, which marks with the same
limits and the same sandbox as on one machine. If a submission kills or hangs this process, the worker keeps running.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lora_from_scratch.grading import tasks
from lora_from_scratch.grading.cluster.packing import unpack
from lora_from_scratch.grading.keys import course_key, why_changed
from lora_from_scratch.grading.pool import Outcome, Pool, PoolWorker, Task
from lora_from_scratch.grading.sandbox import Isolation
from lora_from_scratch.grading.tasks import MarkingFailure, MarkingJob

MARK_PACKED = f"{__name__}:mark_packed"
SERVE = "from lora_from_scratch.grading.cluster.worker import serve; serve({})"
_own = threading.local()


@dataclass(frozen=True)
class OtherVersion:
    """The response of a worker that has another version of the course and therefore did not mark the submission.

    Attributes:
        worker: the address of the worker.
        why: a description of the difference.
    """

    worker: str
    why: str


def mark_remotely(job: MarkingJob, submission: bytes, released: bytes) -> str | MarkingFailure | OtherVersion:
    """Mark a packed submission in this thread's own process. Called by Dask.

    Returns:
        The `Graded` as JSON, or the reason why there is none.
    """
    from distributed import get_worker

    worker = get_worker()
    cache = Path(worker.local_directory) / "lora-from-scratch"
    pool: Pool = getattr(_own, "pool", None) or ProcessPool(1)
    _own.pool = pool
    pool.submit(Task(job.learner, MARK_PACKED, (dataclasses.replace(job, cache=cache), submission, released)))
    outcome: Outcome = next(iter(pool.outcomes()))
    if outcome.error:
        return MarkingFailure(outcome.error, machine=False)
    return OtherVersion(worker.address, outcome.value.why) if isinstance(outcome.value, OtherVersion) else outcome.value


def mark_packed(job: MarkingJob, submission: bytes, released: bytes) -> str | MarkingFailure | OtherVersion:
    """Unpack a submission into a temporary folder and mark it there."""
    name = job.notebook.name
    with tempfile.TemporaryDirectory(prefix="marking-", ignore_cleanup_errors=True) as made:
        folder, there = Path(made) / "submitted" / "learner" / job.notebook.stem, Path(made) / "released" / name
        unpack(submission, folder)
        there.parent.mkdir()
        there.write_bytes(released)
        here = _course_key(there, job.unit, job.secret, job.isolation, released)
        if here != job.course_key:
            return OtherVersion("", why_changed(job.course_key, here))
        return tasks.mark_to_text(dataclasses.replace(job, notebook=folder / name, released=there))


_keys: dict[tuple[Any, ...], str] = {}


def _course_key(released: Path, unit: str, secret: str, isolation: Isolation, content: bytes) -> str:
    """`course_key`, cached, since the imported library does not change during the process."""
    said = (unit, secret, isolation, content)
    if said not in _keys:
        _keys.clear()
        _keys[said] = course_key(released, tasks.unit_of(unit), secret, isolation)
    return _keys[said]


class ProcessPool(Pool):
    """A `Pool` that also works in Dask's workers, in which multiprocessing cannot start processes."""

    def _start(self) -> PoolWorker:
        here, there = multiprocessing.Pipe()
        command = [sys.executable, "-c", SERVE.format(there.fileno())]
        process = subprocess.Popen(command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL)
        there.close()
        self._running.append(PoolWorker(_Process(process), here))
        return self._running[-1]


class _Process:
    """Gives a subprocess the part of multiprocessing's interface that `Pool` uses."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.sentinel = os.pidfd_open(process.pid)

    @property
    def exitcode(self) -> int | None:
        return self.process.poll()

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()

    def join(self, timeout: float) -> None:
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return
        if self.sentinel >= 0:
            os.close(self.sentinel)
            self.sentinel = -1


def serve(descriptor: int) -> None:
    """The main program of a `ProcessPool`'s process."""
    from lora_from_scratch.grading import pool

    pipe: Connection[Any, Any] = Connection(descriptor)
    pool.work(pipe, pool.Bounds())
