"""Long-lived worker processes: each imports PyTorch once and then runs one task after the other.

If a worker dies, only its current task is affected, and is tried once more in a new worker. Workers end when the
process that started them ends, for whatever reason. Each task has its own limits on memory and processor time.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

MIB = 2**20
ATTEMPTS = 2
GROWN = 512 * MIB  # a worker that has grown by more than this is replaced
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Task:
    """A function call to run in a worker.

    Attributes:
        name: identifies the task to the receiver of its outcome.
        function: "module:function", which the worker imports.
        arguments: anything that can be pickled.
    """

    name: str
    function: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The outcome of a task: the function's return value, or an error message."""

    task: Task
    value: Any = None
    error: str = ""


@dataclass(frozen=True)
class Bounds:
    """Resource limits for one task in a worker; what a learner's code uses in the sandbox is not counted.

    Attributes:
        seconds: wall time. A sandbox may take several minutes.
        processor_seconds: processor time of the worker itself, which matches, compares and writes pages.
        memory: bytes beyond what the worker uses before its first task.
    """

    seconds: float = 1800.0
    processor_seconds: int = 300
    memory: int = 3072 * MIB


class OutOfBoundsError(BaseException):
    """Not an `Exception`, so that no `except Exception` on the way catches it."""


@dataclass
class PoolWorker:
    """A process of the pool, and the task that it has."""

    process: Any
    pipe: Connection
    task: Task | None = None
    since: float = 0.0
    ready: bool = False


@dataclass
class Pool:
    """A pool of at most `workers` processes, started on demand.

    Attributes:
        start: the start method: "spawn" starts a new Python for each; "fork" is for tests.
        peak_bytes: the peak memory of any worker.
    """

    workers: int
    bounds: Bounds = field(default_factory=Bounds)
    start: str = "spawn"
    peak_bytes: int = 0
    _waiting: deque[Task] = field(default_factory=deque)
    _running: list[PoolWorker] = field(default_factory=list)
    _attempts: dict[tuple[str, str], int] = field(default_factory=dict)

    def submit(self, task: Task, *, first: bool = False) -> None:
        """Queue a task behind the waiting ones, or in front of them if `first`."""
        if first:
            self._waiting.appendleft(task)
        else:
            self._waiting.append(task)

    def outcomes(self) -> Iterator[Outcome]:
        """Run all tasks, including those submitted meanwhile, and yield each outcome as its task ends.

        Raises:
            OSError: no worker can be started.
        """
        while self.busy():
            yield from self.step()

    def busy(self) -> bool:
        """Whether a task is waiting or running."""
        return bool(self._waiting) or any(worker.task for worker in self._running)

    def step(self, timeout: float = 1.0) -> Iterator[Outcome]:
        """Hand out tasks, wait for at most this many seconds, and yield the outcomes that have arrived."""
        self._hand_out()
        heard: dict[Any, PoolWorker] = {worker.pipe: worker for worker in self._running}
        heard |= {worker.process.sentinel: worker for worker in self._running}
        for worker in {id(heard[end]): heard[end] for end in wait(list(heard), timeout=timeout)}.values():
            yield from self._hear(worker)
        for worker in [w for w in self._running if w.task and time.monotonic() - w.since > self.bounds.seconds]:
            yield from self._lost(worker, f"it took longer than {self.bounds.seconds:g} seconds")

    def notes(self) -> list[str]:
        """What a person should know about the workers, one sentence each."""
        return []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self._running:
            if kind is None:
                with contextlib.suppress(OSError):
                    worker.pipe.send(None)  # asks it to end
                worker.process.join(10)
            _end(worker)
        self._running.clear()

    def _hand_out(self) -> None:
        idle = [worker for worker in self._running if worker.task is None]
        while self._waiting and (idle or len(self._running) < self.workers):
            worker = idle.pop() if idle else self._start()
            worker.task, worker.since = self._waiting.popleft(), time.monotonic()
            self._attempts[_name(worker.task)] = self._attempts.get(_name(worker.task), 0) + 1
            with contextlib.suppress(OSError):  # it has died; `_hear` will notice
                worker.pipe.send(worker.task)

    def _start(self) -> PoolWorker:
        context: Any = multiprocessing.get_context(self.start)
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, self.bounds), daemon=True)
        process.start()
        there.close()
        self._running.append(PoolWorker(process, here))
        return self._running[-1]

    def _hear(self, worker: PoolWorker) -> Iterator[Outcome]:
        try:
            while worker.pipe.poll():
                kind, value, peak, leaves = worker.pipe.recv()
                self.peak_bytes = max(self.peak_bytes, peak)
                worker.ready = True
                if kind == "ready":
                    continue
                task, worker.task = worker.task, None
                assert task is not None
                if leaves:
                    _end(worker)
                    self._running.remove(worker)
                yield Outcome(task, value if kind == "done" else None, value if kind == "failed" else "")
                if leaves:
                    return
        except (EOFError, OSError):
            worker.process.join(10)
            if not worker.ready:
                _end(worker)
                self._running.remove(worker)
                raise OSError(f"a grading process ended before it could start work ({_how(worker)})") from None
            yield from self._lost(worker, f"the process that graded it ended ({_how(worker)})")

    def _lost(self, worker: PoolWorker, why: str) -> Iterator[Outcome]:
        _end(worker)
        self._running.remove(worker)
        task = worker.task
        if task is None:
            return
        if self._attempts[_name(task)] < ATTEMPTS:
            self._waiting.append(task)
        else:
            yield Outcome(task, error=why)


def work(pipe: Connection, bounds: Bounds) -> None:
    """The worker's loop: run tasks until it receives None or the other end of the pipe is closed."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; one of them decides
    import torch

    from lora_from_scratch.finetune.peak_memory import peak_resident_bytes, resident_bytes

    torch.set_num_threads(1)
    begun = resident_bytes()
    _limit_memory(bounds.memory)
    try:
        pipe.send(("ready", None, peak_resident_bytes(), False))
        while task := pipe.recv():
            answer = _do(task, bounds)
            leaves = resident_bytes() > begun + GROWN
            pipe.send((*answer, peak_resident_bytes(), leaves))
            if leaves:
                return
    except (EOFError, OSError):
        return


def _do(task: Task, bounds: Bounds) -> tuple[str, Any]:
    """Run a task; returns "done" and its return value, or "failed" and the reason."""
    try:
        with _processor_time(bounds.processor_seconds):
            module, _, name = task.function.partition(":")
            return "done", getattr(importlib.import_module(module), name)(*task.arguments)
    except OutOfBoundsError as error:
        return "failed", str(error)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]


@contextlib.contextmanager
def _processor_time(seconds: int) -> Iterator[None]:
    """Raise `OutOfBoundsError` in the block once it has used this much processor time."""
    if sys.platform == "win32":
        yield
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CPU)

    def used() -> int:
        return int(time.process_time()) + 1

    def up(number: int, frame: object) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (used() + 10, hard))  # if it is swallowed, raise it again later
        raise OutOfBoundsError(f"it took more than {seconds} seconds of processor time")

    before = signal.signal(signal.SIGXCPU, up)
    resource.setrlimit(resource.RLIMIT_CPU, (used() + seconds, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
        signal.signal(signal.SIGXCPU, before)


def _limit_memory(more: int) -> None:
    """Limit private writable memory to its current size plus `more` bytes (Linux). The sandbox has its own limits."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    from lora_from_scratch.grading.sandbox.lockdown import sizes

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(sizes()["data"]) + more
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(worker: PoolWorker) -> None:
    worker.pipe.close()
    if worker.process.is_alive():
        worker.process.kill()
    worker.process.join(10)


def _name(task: Task) -> tuple[str, str]:
    return task.name, task.function


def _how(worker: PoolWorker) -> str:
    code = worker.process.exitcode
    if code is not None and -code in {int(number) for number in signal.Signals}:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
