"""A pool that marks submissions on a Dask cluster. All other tasks run in processes on this machine.

A submission is processed in four steps: it is packed here, marked on a worker of the cluster, its result is written
here, and the result is entered and published as when grading on one machine. If a worker dies, Dask runs its tasks
again. The key of a task is derived from the key of the submission's result, so a scheduler never has the same
submission twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lora_from_scratch.grading import tasks
from lora_from_scratch.grading.cluster.worker import OtherVersion, mark_remotely
from lora_from_scratch.grading.pool import Outcome, Pool, Task

PACK = "lora_from_scratch.grading.cluster.packing:pack"
ACCEPT = f"{tasks.__name__}:accept"
AHEAD = 2  # submissions sent to the scheduler for each thread of the cluster
CONNECTING = 30.0  # timeout for connecting, in seconds
EVERY = 1.0  # seconds between updates of the list of workers
ALONE = 300.0  # seconds without a worker after which grading stops


class ClusterError(OSError):
    """The cluster can no longer be used. Finished results are kept."""


@dataclass(frozen=True)
class _Sent:
    """A submission sent to the scheduler, for one of `workers`, or for any worker if `workers` is empty."""

    task: Task
    content: bytes
    workers: frozenset[str]


@dataclass
class ClusterPool(Pool):
    """A pool that marks submissions on a Dask cluster.

    Attributes:
        address: the scheduler's address, such as "tcp://10.0.0.1:8786".
        other_versions: the address of each worker that is not used -> how its version of the course differs.
    """

    address: str = ""
    other_versions: dict[str, str] = field(default_factory=dict)
    _client: Any = None
    _later: deque[Task] = field(default_factory=deque)
    _packing: int = 0
    _packed: deque[tuple[Task, bytes]] = field(default_factory=deque)
    _sent: dict[Any, _Sent] = field(default_factory=dict)
    _done: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    _underway: dict[str, Task] = field(default_factory=dict)  # learner -> the submitted task
    _workers: dict[str, int] = field(default_factory=dict)
    _looked: float = 0.0  # when `_workers` was last updated
    _seen: float = 0.0  # when there was last a usable worker

    def __enter__(self) -> ClusterPool:
        self._client = connect(self.address)
        self._seen = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with contextlib.suppress(Exception):  # the scheduler may have gone
            self._client.cancel(list(self._sent), force=True)
        with contextlib.suppress(Exception):
            self._client.close(timeout=5)

    def submit(self, task: Task, *, first: bool = False) -> None:
        if task.function != tasks.MARK:
            return super().submit(task, first=first)
        self._later.append(task)

    def outcomes(self) -> Iterator[Outcome]:
        """See `Pool.outcomes`.

        Raises:
            ClusterError: the connection to the scheduler is lost, or there is no usable worker.
        """
        while self.busy() or self._later or self._packed or self._sent:
            self._pack()
            self._send()
            for outcome in self.step(0.05 if self._sent else 1.0):
                yield from self._local(outcome)
            self._arrived(0.05 if self.busy() else 1.0)

    def notes(self) -> list[str]:
        return [f"worker {name} was not used: {why}" for name, why in sorted(self.other_versions.items())]

    def _local(self, outcome: Outcome) -> Iterator[Outcome]:
        """Continue with a submission after a step on this machine."""
        task = self._underway.get(outcome.task.name)
        if outcome.task.function == PACK and task is not None:
            self._packing -= 1
            if outcome.value is None:  # it cannot be marked elsewhere
                super().submit(task)
            else:
                self._packed.append((task, outcome.value))
        elif outcome.task.function == ACCEPT and task is not None:
            yield Outcome(task, outcome.value, outcome.error)
        else:
            yield outcome

    def _pack(self) -> None:
        """Pack only as many submissions as the cluster's threads will need soon, to limit memory."""
        most = AHEAD * sum(self._threads().values()) if self._later else 0
        while self._later and self._packing + len(self._packed) + len(self._sent) < most:
            task = self._later.popleft()
            job: tasks.MarkingJob = task.arguments[0]
            self._underway[task.name] = task
            self._packing += 1
            super().submit(Task(task.name, PACK, (job.notebook.parent, job.notebook.parents[2])))

    def _send(self) -> None:
        threads = self._threads() if self._packed else {}
        while self._packed and threads:
            task, content = self._packed.popleft()
            job: tasks.MarkingJob = task.arguments[0]
            released = job.released.read_bytes()
            digest = hashlib.sha256(f"{job.learner} {job.key}".encode()).hexdigest()[:32]
            chosen = frozenset(threads if self.other_versions else ())
            key = f"lora-from-scratch-{job.unit}-{digest}-{len(self.other_versions)}"
            future = self._client.submit(mark_remotely, job, content, released, key=key, workers=list(chosen) or None)
            self._sent[future] = _Sent(task, content, chosen)
            future.add_done_callback(self._done.put)

    def _threads(self) -> dict[str, int]:
        """The usable workers: address -> number of threads.

        Raises:
            ClusterError: the connection to the scheduler is lost, or there was no usable worker for `ALONE` seconds.
        """
        now = time.monotonic()
        if now - self._looked > EVERY:
            self._looked, self._workers = now, self._known_workers()
        workers = self._workers
        found = {name: threads for name, threads in workers.items() if name not in self.other_versions}
        self._seen = now if found else self._seen
        if not found and workers and not self._sent:
            why = "; ".join(sorted(set(self.other_versions.values())))
            raise ClusterError(f"every worker of {self.address} has another version of the course: {why}")
        if now - self._seen > ALONE:
            raise ClusterError(f"{self.address} has had no worker for {ALONE:g} seconds; start some and run this again")
        return found

    def _known_workers(self) -> dict[str, int]:
        try:
            if self._client.status != "closed":
                info = self._client.scheduler_info(n_workers=-1)
                return {name: one["nthreads"] for name, one in info["workers"].items()}
        except (OSError, TimeoutError, KeyError):  # without a connection, there is no information
            pass
        again = "start it and run the command again: what is finished is kept"
        raise ClusterError(f"the scheduler at {self.address} has gone; {again}")

    def _arrived(self, timeout: float) -> None:
        """Process the results that have arrived from the cluster."""
        if not self._sent:
            return
        with contextlib.suppress(queue.Empty):
            future = self._done.get(timeout=timeout)
            if future in self._sent:
                self._take(future, self._sent.pop(future))
        there = self._threads().keys()
        for future in [future for future, one in self._sent.items() if one.workers and not one.workers & there]:
            sent = self._sent.pop(future)  # none of its possible workers is left
            self._client.cancel([future], force=True)
            self._packed.append((sent.task, sent.content))

    def _take(self, future: Any, sent: _Sent) -> None:
        status, task = future.status, sent.task
        if status in ("cancelled", "lost"):
            self._packed.append((task, sent.content))  # sent again, unless `_threads` reports a lost scheduler
            return
        error = future.exception() if status == "error" else None
        value = tasks.MarkingFailure(_words(error), machine=True) if error else future.result()
        future.release()
        if isinstance(value, OtherVersion):
            self.other_versions[value.worker] = value.why
            self._packed.append((task, sent.content))
        else:
            super().submit(Task(task.name, ACCEPT, (task.arguments[0], value)), first=True)


def connect(address: str) -> Any:
    """Connect to a scheduler.

    Raises:
        ValueError: dask.distributed is not installed, or the address is invalid.
        ClusterError: there is no scheduler at the address.
    """
    try:
        from distributed import Client
    except ImportError:
        install = "pip install -e '.[course,cluster]' -c constraints.txt"
        raise ValueError(f"--cluster needs dask.distributed, here and on the workers: {install}") from None
    try:
        return Client(address, timeout=CONNECTING, set_as_default=False)
    except ValueError as error:
        example = "tcp://10.0.0.1:8786"
        raise ValueError(
            f"--cluster should be a scheduler's address such as {example}, got {address!r}: {error}"
        ) from None
    except (OSError, TimeoutError) as error:
        raise ClusterError(f"there is no scheduler at {address}: {' '.join(str(error).split())[:200]}") from None


def _words(error: BaseException) -> str:
    """The reason why Dask gave up: several workers died, or a worker cannot import the library."""
    return f"the cluster could not mark it: {type(error).__name__}: {' '.join(str(error).split())}"[:500]
