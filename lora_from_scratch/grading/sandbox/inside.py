"""The runner inside the sandbox: runs a notebook's cells, tries its answers, and sends its observations step by step.

The entry point is `main(folder, frames)`. The folder contains `job` (the steps, packed by `wire`) and `files` (the
learner's own); `frames` is the file descriptor of the pipe for the frames. The key of their MACs comes through
standard input. This module is copied into the sandbox's library, where `checks.notebook` is a stand-in.
"""

from __future__ import annotations

import builtins
import gc
import importlib
import io
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.text import LSString, SList
from traitlets.config import Config

from lora_from_scratch.checks.notebook import unusable
from lora_from_scratch.checks.observation import (
    Opaque,
    OutOfTime,
    Seen,
    plain,
    seed_everything,
    time_limit,
    try_on,
)
from lora_from_scratch.grading.sandbox import lockdown, wire
from lora_from_scratch.grading.sandbox.pristine import Pristine, without_modes

PACKAGE = __name__.partition(".")[0]
RUNS_CODE = frozenset({"capture", "prun", "run", "time", "timeit"})  # magics in which an error is the learner's own
GUESS_SECONDS = 2.0
TRACEBACK = 4_000  # characters of a traceback that are kept: its end


class TruncatedOutput(io.TextIOBase):
    """A text stream that keeps only the beginning of its input."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.parts: list[str] = []
        self.dropped = 0

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        kept = text[: self.room]
        self.room -= len(kept)
        self.dropped += len(text) - len(kept)
        if kept:
            self.parts.append(kept)
        return len(text)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def writable(self) -> bool:
        return True

    def text(self) -> str:
        more = f"\n... ({self.dropped:,} more characters)" if self.dropped else ""
        return "".join(self.parts).encode("utf-8", "replace").decode() + more


class Shell(InteractiveShell):
    """IPython without a kernel, terminal or history. The error that ends a cell is kept, not printed.

    A notebook's kernel continues after `%matplotlib inline`, `!pip install` and the like, and so does this shell:
    whatever needs a screen, another program or the network does nothing and says so.
    """

    error: BaseException | None = None

    def showtraceback(self, *arguments: Any, **options: Any) -> None:
        self.error = self.error or sys.exc_info()[1]

    def showsyntaxerror(self, *arguments: Any, **options: Any) -> None:
        self.error = self.error or sys.exc_info()[1]

    def enable_gui(self, gui: str | None = None) -> None:
        """Does nothing: there is no screen."""

    def enable_matplotlib(self, gui: str | None = None) -> tuple[str | None, str]:
        return None, "agg"

    def enable_pylab(self, gui: str | None = None, import_all: bool = True) -> tuple[str | None, str, list[str]]:
        """Keep Python's builtins: NumPy's `max` and `sum` take different arguments."""
        kept = {name: self.user_ns[name] for name in vars(builtins) if name in self.user_ns}
        super().enable_pylab(gui, import_all)
        for name in vars(builtins).keys() & self.user_ns.keys():
            del self.user_ns[name]
        self.user_ns.update(kept)
        return None, "agg", []

    def ask_exit(self) -> None:
        """Does nothing: `exit` ends a notebook's kernel, but here the remaining cells must still run."""

    def system(self, cmd: str) -> None:
        self.user_ns["_exit_code"] = 0
        self._did_nothing(f"!{cmd}")

    system_piped = system_raw = system

    def getoutput(self, cmd: str, split: bool = True, depth: int = 0) -> Any:
        self._did_nothing(f"!{cmd}")
        return SList([]) if split else LSString("")

    def run_line_magic(self, magic_name: str, line: str, _stack_depth: int = 1) -> Any:
        try:
            return super().run_line_magic(magic_name, line, _stack_depth + 1)
        except Exception as error:
            return self._survived(f"%{magic_name} {line}", magic_name, error)

    def run_cell_magic(self, magic_name: str, line: str, cell: str) -> Any:
        try:
            return super().run_cell_magic(magic_name, line, cell)
        except Exception as error:
            return self._survived(f"%%{magic_name} {line}", magic_name, error)

    def _survived(self, what: str, name: str, error: Exception) -> None:
        if name in RUNS_CODE:
            raise error
        self._did_nothing(what)

    def _did_nothing(self, what: str) -> None:
        print(f"{what.strip()[:200]}: this does nothing while a notebook is being graded.")


class Runner:
    """Runs the steps of a job.

    Args:
        job: see `observing._NotebookObserver._describe`.
        send: sends a frame.
        inputs: waits for the inputs of the exercise that is being tried.
    """

    def __init__(
        self, job: dict[str, Any], send: Callable[[dict[str, Any]], None], inputs: Callable[[], dict[str, Any]]
    ) -> None:
        self.job, self.send, self.inputs = job, send, inputs
        checks = importlib.import_module(f"{PACKAGE}.checks.unit_{job['unit']}.exercises")
        self.exercises = {exercise.name: exercise for exercise in checks.EXERCISES}
        self.called: set[str] = importlib.import_module(f"{PACKAGE}.taken_out").called
        settings = Config()
        settings.HistoryManager.enabled = False
        settings.InteractiveShell.colors = "nocolor"
        self.shell: Shell = Shell.instance(config=settings)
        self.names = self.shell.user_ns
        self.pristine = Pristine(PACKAGE)

    def run(self) -> None:
        for number, step in enumerate(self.job["steps"]):
            self.send({"kind": "started", "step": number})
            do = {"run": self.run_cell, "probe": self.try_answer, "guess": self.read_guess}[step["kind"]]
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            try:
                frame = do(step)
            except BaseException as error:  # a learner's thread can raise anything here
                signal.setitimer(signal.ITIMER_REAL, 0)
                frame = {"kind": "broken", "message": f"{type(error).__name__}: {str(error)[:300]}"}
            self.send(frame | {"step": number})
        self.send({"kind": "done"})

    def run_cell(self, step: dict[str, Any]) -> dict[str, Any]:
        out, err = TruncatedOutput(self.job["printed"]), TruncatedOutput(self.job["printed"])
        before = sys.stdout, sys.stderr
        self.shell.error = None
        self.called.clear()
        stopped = False
        sys.stdout, sys.stderr = out, err
        try:
            with time_limit(step["seconds"], patience=1):
                self.shell.run_cell(step["source"], store_history=True)
        except OutOfTime:
            stopped = True
        except BaseException as raised:
            self.shell.error = self.shell.error or raised
        finally:
            sys.stdout, sys.stderr = before
        error = self.shell.error
        stopped = stopped or isinstance(error, OutOfTime)
        return {
            "kind": "output",
            "status": "stopped" if stopped else "error" if error is not None else "ran",
            "stdout": out.text(),
            "stderr": err.text(),
            "error": "" if error is None or stopped else _in_a_line(error),
            "traceback": "" if error is None or stopped else _traceback(error),
            "called": sorted(self.called),
        }

    def try_answer(self, step: dict[str, Any]) -> dict[str, Any]:
        exercise, given = (
            self.exercises[step["name"]],
            self.inputs(),
        )  # read them even if they turn out not to be needed
        changed = self.pristine.restore()
        frame: dict[str, Any] = {"kind": "tried", "changed": changed, "called": [], "seen": [], "message": ""}
        gc.enable()
        if (why := unusable(exercise, self.names)) is not None:
            return frame | {"status": why.status, "message": why.message[:1000]}
        self.called.clear()
        cases, answer = given["cases"], self.names[exercise.name]
        tried: list[tuple[Seen, dict[str, Any]]]
        try:
            with without_modes():
                tried = try_on(exercise.probe, answer, cases, step["seconds"], given["seed"])
        except KeyboardInterrupt:  # `try_on` leaves it to the learner at the keyboard
            tried = [(Seen(errors=("KeyboardInterrupt",)), case) for case in cases]
        budget = wire.FrameBudget(bytes=self.job["observation"])
        with without_modes():
            seen = [wire.observation_to_data(one, after, budget) for one, after in tried]
        return frame | {"status": "seen", "seen": seen, "called": sorted(self.called)}

    def read_guess(self, step: dict[str, Any]) -> dict[str, Any]:
        try:
            with time_limit(GUESS_SECONDS, patience=1):
                value = wire.FrameBudget(bytes=self.job["observation"]).fit(plain(self.names.get(step["name"])))
        except BaseException as error:  # infinitely nested lists, for example
            value = Opaque(f"value that could not be read ({type(error).__name__})")
        return {"kind": "guess", "value": value}


def _in_a_line(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}"[:500].encode("utf-8", "replace").decode()


def _traceback(error: BaseException) -> str:
    """The traceback of the notebook's own code, without the frames of IPython and the runner."""
    try:
        parts = traceback.TracebackException.from_exception(error, limit=-12, compact=True)
        parts.stack = traceback.StackSummary.from_list(
            [frame for frame in parts.stack if "IPython" not in frame.filename and __file__ != frame.filename]
        )
        return "".join(parts.format())[-TRACEBACK:].encode("utf-8", "replace").decode()
    except BaseException:
        return ""


def copy_files(source: Path, target: Path, room: int) -> None:
    """Copy the learner's own regular files, as many as fit."""
    for folder, _, names in os.walk(source):
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_symlink() or not path.is_file() or path.stat().st_size > room:
                continue
            room -= path.stat().st_size
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def main(folder: str, frames: int) -> None:
    key, told = os.read(0, wire.KEY_SIZE), os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    writer = wire.Writer(key)
    os.set_inheritable(frames, False)
    read, write = os.read, os.write

    def send(frame: dict[str, Any]) -> None:
        content = memoryview(writer.frame(frame))
        while content:
            content = content[write(frames, content) :]

    def inputs() -> Any:
        read(told, 1)  # the grader has written them now, and not before
        return wire.unpack(Path(folder, "inputs").read_bytes())

    job: Any = wire.unpack(Path(folder, "job").read_bytes())
    torch.set_num_threads(1)
    seed_everything(0)
    runner = Runner(job, send, inputs)
    copy_files(Path(folder, "files"), Path.cwd(), job["folder"] // 2)
    sys.path.insert(0, "")
    lockdown.lock(job["memory"], job["processor_seconds"], job["file"])
    send({"kind": "ready"})
    runner.run()
    os._exit(0)  # no exit handlers
