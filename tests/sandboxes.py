"""What the tests of the sandbox share: notebooks that hold answers of the bank, and scripts run in the walls."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from lora_from_scratch.checks.bank import Answer, changed
from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.judge import judge
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.units import Unit, find
from lora_from_scratch.checks.verdict import Verdict
from lora_from_scratch.grading.sandbox import (
    Job,
    Limits,
    Observations,
    Probe,
    Run,
    bubblewrap,
    forkserver,
    observe_notebook,
    supervisor,
    unavailable,
)
from lora_from_scratch.grading.sandbox.stripped import find_unit, stripped

needs_bubblewrap = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

BANK = Path(__file__).with_name("bank_in_notebook.py").read_text() + "\n\n" + inspect.getsource(changed)


def notebook_of(unit: Unit, answers: Sequence[Answer], seed: int) -> list[Run | Probe]:
    """The steps of a notebook in which each answer of the bank takes its exercise's name, and is tried."""
    steps: list[Run | Probe] = [Run("bank", BANK)]
    for exercise in unit.exercises:
        name = exercise.name
        mine = [answer for answer in answers if answer.exercise == name]
        modules = [used for answer in mine for used in bank_files(answer.object.__module__)]
        for module in dict.fromkeys(modules):
            source = inspect.getsource(sys.modules[module])
            steps.append(Run(f"{module}, {name}", f"run({source!r}, {module!r})"))
        for answer in mine:
            taken = f"{name} = ANSWERS[{name!r}, {answer.name!r}]"
            steps += [Run(f"take {cell_of(answer)}", taken), Probe(name, seed, cell_of(answer))]
    return steps


def bank_files(module: str) -> list[str]:
    """A file of the bank, after the files of the bank that it imports from."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    imported = [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    return [used for other in imported if ".answers" in other for used in bank_files(other)] + [module]


def cell_of(answer: Answer) -> str:
    return f"{answer.exercise}: {answer.name}"


def verdict_of(observed: Observations, cell: str, seed: int) -> Verdict:
    """The judge's verdict on what was seen; it must have been seen."""
    tried = observed.probes[cell]
    assert tried.status == "seen", f"{cell}: {tried.message} {observed.early_exits}"
    exercise = find(tried.name)[1]
    assert isinstance(exercise, Exercise)
    return judge(exercise, seed, list(tried.seen))


def script(
    text: str, folder: Path, limits: Limits | None = None, walls: bool = True
) -> tuple[supervisor.ProcessExit, list[Data]]:
    """Run a script in the walls as the runner is, locked down, but without PyTorch; how it ended, and what it sent.

    It has `send(data)`, and `frames`, the file descriptor; an error that it does not catch is sent.
    """
    limits = limits or Limits()
    listener = Collecting(limits)
    key = os.urandom(32)
    program = functools.partial(_program, text, limits=limits)
    if walls:
        library = stripped(find_unit("00"), (), folder / "cache")
        environment = {"HOME": bubblewrap.HOME, "PYTHONPATH": str(library.folder), "PWD": bubblewrap.WORK}
        bound = [(library.folder, str(library.folder))]
        command = functools.partial(bubblewrap.command, limits.folder, limits.shared, bound, environment)
        server = forkserver.server(environment, ["lora_from_scratch.grading.sandbox.lockdown"])
        started = supervisor.start_in_bubblewrap(command, program, key, server)
    else:
        started = supervisor.start(program, key)
    return supervisor.Supervisor(started, key, limits, listener).run(), listener.frames


def named(mark: str, text: str) -> str:
    """A script that first gives its process this name, of at most 15 characters."""
    return f"with open('/proc/self/comm', 'w') as name: name.write({mark!r})\n{textwrap.dedent(text)}"


def running(mark: str) -> list[str]:
    """The processes of this name."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "comm").read_text().strip() == mark:
                    found.append(entry.name)
            except OSError:
                pass
    return found


@dataclasses.dataclass
class Collecting:
    """Takes frames as they come; the first says that the process is ready, the text "done" that it has ended."""

    limits: Limits
    frames: list[Data] = dataclasses.field(default_factory=list)
    begun: float = 0.0

    def take(self, frame: Data) -> bool:
        import time

        self.begun = self.begun or time.monotonic()
        self.frames.append(frame)
        return False

    def ready(self) -> bool:
        return bool(self.frames)

    def done(self) -> bool:
        return self.frames[-1:] == ["done"]

    def until(self) -> float:
        return self.begun + self.limits.seconds


def _program(text: str, frames: int, limits: Limits) -> str:
    """`wire` needs PyTorch; a script sends plain JSON, sealed in the same way."""
    begin = f"""
        import hashlib, json, os, struct
        from lora_from_scratch.grading.sandbox import lockdown

        frames, key, sent = {frames}, os.read(0, 32), []

        def send(data):
            text = json.dumps(data).encode()
            body = struct.pack(">I", len(text)) + text
            mac = hashlib.blake2b(struct.pack(">I", len(sent)) + body, key=key, digest_size=16).digest()
            sent.append(1)
            content = struct.pack(">I", len(body)) + mac + body
            while content:
                content = content[os.write(frames, content):]

        lockdown.lock({limits.memory}, {limits.processor_seconds}, {limits.file})
        send("ready")
        try:
    """
    end = """
        except BaseException as error:
            send(f"{type(error).__name__}: {error}")
        send("done")
        os._exit(0)
    """
    inner = textwrap.indent(textwrap.dedent(text).strip("\n"), "    ")
    return "\n".join((textwrap.dedent(begin).strip("\n"), inner, textwrap.dedent(end).strip("\n")))


def observe(unit: str, steps: Iterable[Run | Probe], cache: Path, **more: object) -> Observations:
    return observe_notebook(Job(unit, tuple(steps), cache, **more))  # type: ignore[arg-type]
