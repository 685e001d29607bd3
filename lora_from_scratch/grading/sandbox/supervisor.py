"""Supervise one process in the sandbox: receive its frames, enforce its limits, and report what ended it.

Nothing here blocks on the process: pipes are read as they fill, up to a limit, and exceeding any limit kills the whole
sandbox. When `Supervisor.run` returns, none of its processes is running any more.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lora_from_scratch.checks.observation import Data
from lora_from_scratch.grading.sandbox import lockdown, seccomp, wire
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
    """A started process, with the reading ends of its pipes.

    Attributes:
        info: the pipe on which bubblewrap reports the first process inside; None without bubblewrap.
    """

    process: subprocess.Popen[bytes]
    frames: int
    info: int | None


def start(
    outer: Callable[[int, int], Sequence[str]] | None,
    inside: Callable[[int], Sequence[str]],
    key: bytes,
    folder: str = "/",
    environment: Mapping[str, str] | None = None,
    user: int | None = None,
) -> SandboxProcess:
    """Start a process that sends frames.

    Args:
        outer: returns bubblewrap's command, given the file descriptors of the filter and of the information; or None.
        inside: returns the command to run in it, given the file descriptor of the frames.
        key: the key of the MACs; the process reads it from standard input, and then one byte whenever it may continue.
        user: the id of the user and group that the process runs as, without bubblewrap; None means the caller's.
        folder, environment: those of the started process; with bubblewrap, the command inside gets them by its options.
    """
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:

        def pipe() -> tuple[int, int]:
            reader, writer = os.pipe()
            ours.callback(os.close, reader)
            theirs.callback(os.close, writer)
            return reader, writer

        frames, to_frames = pipe()
        info, passed, command = None, [to_frames], []
        if outer is not None:
            info, to_info = pipe()
            filtered = _readable(seccomp.program(starting=True))
            theirs.callback(os.close, filtered)
            passed += [to_info, filtered]
            command = [*outer(filtered, to_info), "--"]
        process = subprocess.Popen(
            [*command, *inside(to_frames)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=passed,
            cwd=folder,
            env=dict(environment or {}) | {"PATH": os.environ.get("PATH", os.defpath)},
            start_new_session=True,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write(key)
            process.stdin.flush()
        ours.pop_all()
        return SandboxProcess(process, frames, info)


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
        self.output, self.info = bytearray(), b""
        self.first: int | None = None  # the process inside
        self.handle: int | None = None  # its pidfd
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
        code = self.started.process.returncode
        if why == "ended":
            why, detail = self._why(code)
        if self.at_ready is None and why != "finished":
            why = "not started"
        output = " ".join(self.output.decode("utf-8", "replace").split())
        return ProcessExit(why, detail, time.monotonic() - (self.at_ready or time.monotonic()), output)

    def _watch(self) -> tuple[str, str]:
        process = self.started.process
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            for source, take in self._sources(process.stdout.fileno()):
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
                if process.poll() is not None and not (selector.get_map() and selector.select(0)):
                    return "ended", ""

    def _sources(self, output: int) -> list[tuple[int, Callable[[], bool]]]:
        sources = [(output, self._take_output(output)), (self.started.frames, self._take_frames)]
        if self.started.info is not None:
            sources.append((self.started.info, self._take_info))
        return sources

    def _take_output(self, output: int) -> Callable[[], bool]:
        def take() -> bool:
            content = os.read(output, CHUNK)
            self.output = (self.output + content)[-OUTPUT_KEPT:]
            return bool(content)

        return take

    def _take_frames(self) -> bool:
        assert self.started.process.stdin is not None
        content = os.read(self.started.frames, CHUNK)
        for frame in self.reader.feed(content):
            if self.listener.take(frame):
                with contextlib.suppress(OSError):
                    os.write(self.started.process.stdin.fileno(), b"!")
            if self.listener.ready() and self.at_ready is None:
                self.at_ready = time.monotonic()
        return bool(content)

    def _take_info(self) -> bool:
        assert self.started.info is not None
        content = os.read(self.started.info, CHUNK)
        self.info += content
        found = re.search(rb'"child-pid": (\d+)\D', self.info)  # JSON, which arrives in pieces
        if self.first is None and found is not None:
            self.first = int(found[1])
            with contextlib.suppress(OSError):
                self.handle = os.pidfd_open(self.first)
        return bool(content)

    def _until(self) -> float | None:
        return self.listener.until() if self.at_ready is not None else self.started_at + STARTING

    # --- Limits that the process cannot set for itself

    def _look(self) -> tuple[str, str] | None:
        if self.at_ready is None:
            return None
        runner = self.started.process.pid if self.started.info is None else self.first
        if runner is not None:
            sizes = lockdown.sizes(str(runner))
            self.data = sizes["data"] or self.data
            with contextlib.suppress(OSError):
                self.most = resource.prlimit(runner, resource.RLIMIT_DATA)[0]
            if sizes["threads"] > self.limits.threads:
                return "threads", f"{sizes['threads']:g} threads"
            if sizes["processor"] > self.limits.processor_seconds:
                return "processor time", f"{sizes['processor']:.0f} seconds"
        if self.first is not None:
            with contextlib.suppress(OSError):
                folder = os.statvfs(f"/proc/{self.first}/root/tmp")
                if folder.f_files and folder.f_files - folder.f_ffree > self.limits.files:
                    return "files", f"{folder.f_files - folder.f_ffree} files in /tmp"
        return None

    # --- The end

    def _kill(self) -> None:
        """Kill the process inside, with which everything inside ends, or bubblewrap, which ends it too; then wait."""
        process = self.started.process
        if self.handle is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
        if process.poll() is None and self.handle is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        if process.poll() is None:
            process.kill()
            process.wait()
        if self.handle is not None:
            with selectors.DefaultSelector() as selector:
                selector.register(self.handle, selectors.EVENT_READ)
                selector.select(10)
            os.close(self.handle)
            self.handle = None

    def _close(self) -> None:
        assert self.started.process.stdout is not None
        assert self.started.process.stdin is not None
        self.started.process.stdout.close()
        with contextlib.suppress(OSError):
            self.started.process.stdin.close()
        os.close(self.started.frames)
        if self.started.info is not None:
            os.close(self.started.info)

    def _why(self, code: int) -> tuple[str, str]:
        """What ended the process, from its exit status; bubblewrap returns 128 + the signal."""
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
