"""Supervise one process in the sandbox: receive its frames, enforce its limits, and report what ended it.

Nothing here blocks on the process: pipes are read as they fill, up to a limit, and exceeding any limit kills the whole
sandbox. When `Supervisor.run` returns, none of its processes is running any more.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from lora_from_scratch.checks.observation import Data
from lora_from_scratch.grading.sandbox import forkserver, lockdown, seccomp, wire
from lora_from_scratch.grading.sandbox.forking import FRAMES
from lora_from_scratch.grading.sandbox.forkserver import ForkServer
from lora_from_scratch.grading.sandbox.job import Limits

POLL = 0.1  # seconds between two checks of threads and files
OUTPUT_KEPT = 4_000  # bytes kept from the end of the process's own stdout and stderr
STARTING = 180.0  # seconds allowed for the start
CHUNK = 1 << 16


class Listener(Protocol):
    """The receiver of the frames."""

    def take(self, frame: Data) -> bool:
        """Receive a frame; return whether the process may continue. Raises ValueError if it is not valid here."""

    def until(self) -> float | None:
        """When to end the process if no frame arrives before then, on the clock `time.monotonic`."""

    def ready(self) -> bool:
        """Whether the process has started up."""

    def done(self) -> bool:
        """Whether all frames have arrived."""


@dataclass(frozen=True)
class ProcessExit:
    """How a process ended.

    Attributes:
        why: "finished", one of `job.ExitReason`, or "not started" if it ended before it was ready.
        detail: the limit that was exceeded, or the exit status.
        seconds: time from ready to the end.
        output: the end of what the process wrote to its own stdout and stderr.
    """

    why: str
    detail: str
    seconds: float
    output: str


@dataclass(frozen=True)
class SandboxProcess:
    """A started process, with our ends of its pipes.

    Attributes:
        process: the process itself, or the bubblewrap around it.
        given: its standard input.
        output: what it writes to its own stdout and stderr.
        frames: the frames that it sends.
        sandbox: with bubblewrap, a pidfd of the first process in the sandbox, with which everything in it ends.
        reports: with bubblewrap, the fork server's reports on the process (see `forking.serve`).
    """

    process: subprocess.Popen[bytes]
    given: int
    output: int
    frames: int
    sandbox: int | None = None
    reports: int | None = None


def start(
    program: Callable[[int], str],
    key: bytes,
    folder: str = "/",
    environment: Mapping[str, str] | None = None,
    user: int | None = None,
) -> SandboxProcess:
    """Start a process that sends frames, without bubblewrap.

    Args:
        program: returns the Python program, given the file descriptor of the frames.
        key: the key of the MACs; the process reads it from standard input, and then one byte whenever it may continue.
        user: the id of the user and group that the process runs as; None means the caller's.
    """
    with ExitStack() as ours, ExitStack() as theirs:
        (frames, to_frames), (output, to_output) = _pipe(ours, theirs), _pipe(ours, theirs)
        stdin, given = _pipe(theirs, ours)
        os.write(given, key)
        process = subprocess.Popen(
            forkserver.python(program(to_frames)),
            stdin=stdin,
            stdout=to_output,
            stderr=to_output,
            pass_fds=[to_frames],
            cwd=folder,
            env=dict(environment or {}) | {"PATH": os.environ.get("PATH", os.defpath)},
            start_new_session=True,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
        ours.pop_all()
        return SandboxProcess(process, given, output, frames)


def start_in_bubblewrap(
    command: Callable[[int, int], Sequence[str]], program: Callable[[int], str], key: bytes, server: ForkServer
) -> SandboxProcess:
    """Fork a process that sends frames from a fork server, into a new sandbox.

    Args:
        command: returns bubblewrap's command, given the file descriptors of the filter and of the information.
        program, key: as in `start`.

    Raises:
        OSError: bubblewrap cannot be started, or the server has ended.
    """
    with ExitStack() as ours, ExitStack() as theirs:
        (frames, to_frames), (output, to_output) = _pipe(ours, theirs), _pipe(ours, theirs)
        reports, to_reports = _pipe(ours, theirs)
        stdin, given = _pipe(theirs, ours)
        os.write(given, key)
        process, sandbox = _sandbox(command, to_output)
        ours.callback(process.kill)
        if sandbox is not None:
            ours.callback(os.close, sandbox)
            server.fork(program(FRAMES), sandbox, stdin, to_output, to_frames, to_reports)
        ours.pop_all()
        return SandboxProcess(process, given, output, frames, sandbox, reports)


def _sandbox(command: Callable[[int, int], Sequence[str]], output: int) -> tuple[subprocess.Popen[bytes], int | None]:
    """bubblewrap with a process that waits in it, and a pidfd of that process; None if it did not start."""
    with ExitStack() as ours, ExitStack() as theirs:
        (info, to_info), (waits, to_waits) = _pipe(ours, theirs), _pipe(ours, theirs)
        filtered = _readable(seccomp.program(starting=True))
        theirs.callback(os.close, filtered)
        process = subprocess.Popen(
            [*command(filtered, to_info), "--", *forkserver.holder(to_waits)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[filtered, to_info, to_waits],
            cwd="/",
            env={"PATH": os.environ.get("PATH", os.defpath)},
            start_new_session=True,
        )
        theirs.close()
        ready, _, _ = select.select([waits], [], [], STARTING)
        if not ready or not os.read(waits, 1):
            return process, None
        found = re.search(rb'"child-pid": (\d+)\D', os.read(info, CHUNK))
        with contextlib.suppress(OSError):  # it has ended already
            return process, os.pidfd_open(int(found[1])) if found else None
        return process, None


def _pipe(readers: ExitStack, writers: ExitStack) -> tuple[int, int]:
    """A pipe, each end of which is closed with the others of its stack."""
    reader, writer = os.pipe()
    readers.callback(os.close, reader)
    writers.callback(os.close, writer)
    return reader, writer


def _readable(content: bytes) -> int:
    """A file descriptor from which this data can be read."""
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    return reader


class Supervisor:
    """Watches one process."""

    def __init__(self, started: SandboxProcess, key: bytes, limits: Limits, listener: Listener) -> None:
        self.started, self.limits, self.listener = started, limits, listener
        largest = limits.observation + wire.MAX_JSON + 1024
        self.reader = wire.Reader(key, largest, limits.sent)
        self.output, self.reports = bytearray(), b""
        self.code: int | None = None  # the exit status that the fork server reports
        self.runner = started.process.pid if started.reports is None else 0  # the sender of the frames, once known
        self.data = 0.0  # its private memory at the last measurement
        self.most = 0  # its limit
        self.started_at = time.monotonic()
        self.at_ready: float | None = None

    def run(self) -> ProcessExit:
        """Watch the process until it ends, for whatever reason."""
        try:
            why, detail = self._watch()
        finally:
            self._kill()
            self._close()
        code = self.started.process.returncode if self.code is None else self.code
        if why == "ended":
            why, detail = self._why(code)
        if self.at_ready is None and why != "finished":
            why = "not started"
        output = " ".join(self.output.decode("utf-8", "replace").split())
        return ProcessExit(why, detail, time.monotonic() - (self.at_ready or time.monotonic()), output)

    def _watch(self) -> tuple[str, str]:
        with selectors.DefaultSelector() as selector:
            for source, take in self._sources():
                os.set_blocking(source, False)
                selector.register(source, selectors.EVENT_READ, take)
            looked = 0.0
            while True:
                if not selector.get_map():
                    time.sleep(POLL)
                for ready, _ in selector.select(POLL):
                    try:
                        if not ready.data():
                            selector.unregister(ready.fileobj)
                    except Exception as error:  # the frame is malformed, in whatever way
                        return "frames", " ".join(str(error).split())[:300]
                now = time.monotonic()
                if self.listener.ready() and self.at_ready is None:
                    self.at_ready = now
                if self.listener.done():
                    return "finished", ""
                if (until := self._until()) is not None and now > until:
                    return "wall time", "the time limit was reached"
                if now - looked >= POLL:
                    looked = now
                    if (found := self._look()) is not None:
                        return found
                if self._ended() and not (selector.get_map() and selector.select(0)):
                    return "ended", ""

    def _ended(self) -> bool:
        return self.code is not None or self.started.process.poll() is not None

    def _sources(self) -> list[tuple[int, Callable[[], bool]]]:
        sources = [(self.started.output, self._take_output), (self.started.frames, self._take_frames)]
        if self.started.reports is not None:
            sources.append((self.started.reports, self._take_reports))
        return sources

    def _take_output(self) -> bool:
        content = os.read(self.started.output, CHUNK)
        self.output = (self.output + content)[-OUTPUT_KEPT:]
        return bool(content)

    def _take_frames(self) -> bool:
        content = os.read(self.started.frames, CHUNK)
        for frame in self.reader.feed(content):
            if self.listener.take(frame):
                with contextlib.suppress(OSError):
                    os.write(self.started.given, b"!")
            if self.listener.ready() and self.at_ready is None:
                self.at_ready = time.monotonic()
        return bool(content)

    def _take_reports(self) -> bool:
        """Reports come in whole lines; the end without one is the end of the process that writes them."""
        assert self.started.reports is not None
        content = os.read(self.started.reports, CHUNK)
        for what, number in (line.split() for line in content.decode().splitlines()):
            if what == "pid":
                self.runner = int(number)
            else:
                self.code = int(number)
        if not content and self.code is None:
            self.code = -signal.SIGKILL
        return bool(content)

    def _until(self) -> float | None:
        return self.listener.until() if self.at_ready is not None else self.started_at + STARTING

    # --- Limits that the process cannot set for itself

    def _look(self) -> tuple[str, str] | None:
        if self.at_ready is None:
            return None
        if self.runner:
            sizes = lockdown.sizes(str(self.runner))
            self.data = sizes["data"] or self.data
            with contextlib.suppress(OSError):
                self.most = resource.prlimit(self.runner, resource.RLIMIT_DATA)[0]
            if sizes["threads"] > self.limits.threads:
                return "threads", f"{sizes['threads']:g} threads"
            if sizes["processor"] > self.limits.processor_seconds:
                return "processor time", f"{sizes['processor']:.0f} seconds"
        if self.started.sandbox is not None and self.runner:
            with contextlib.suppress(OSError):
                folder = os.statvfs(f"/proc/{self.runner}/root/tmp")
                if folder.f_files and folder.f_files - folder.f_ffree > self.limits.files:
                    return "files", f"{folder.f_files - folder.f_ffree} files in /tmp"
        return None

    # --- The end

    def _kill(self) -> None:
        """Kill the first process of the sandbox, with which everything inside ends, or else the process; then wait."""
        process, sandbox = self.started.process, self.started.sandbox
        with contextlib.suppress(ProcessLookupError):
            if sandbox is not None:
                signal.pidfd_send_signal(sandbox, signal.SIGKILL)
            elif process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        if process.poll() is None:
            process.kill()
            process.wait()
        if sandbox is not None:
            select.select([sandbox], [], [], 10)  # readable when the process has ended

    def _close(self) -> None:
        started = self.started
        for file in (started.given, started.output, started.frames, started.reports, started.sandbox):
            if file is not None:
                os.close(file)

    def _why(self, code: int) -> tuple[str, str]:
        """What ended the process, from its exit status; bubblewrap's own is 128 + the signal."""
        number = -code if code < 0 else code - 128 if code > 128 else 0
        try:
            name = signal.Signals(number).name if number else ""
        except ValueError:
            name = ""
        if name == "SIGXCPU":
            return "processor time", "SIGXCPU"
        if name == "SIGXFSZ":
            return "exited", "SIGXFSZ"
        if name and self.data > self.most - 0.2 * self.limits.memory > 0:
            return "memory", f"{name} with {self.data:,.0f} bytes in use"
        if name:
            return "crashed", name
        return "exited", f"exit status {code}"
