"""What a learner has done, kept in a file of their own: `~/.lora-from-scratch/progress.json`.

Nothing here is ever an error for the learner. A damaged file is set aside, a folder that cannot be written means that
progress is kept until the notebook's kernel ends. Two environment variables: LORA_FROM_SCRATCH_HOME names another
folder, LORA_FROM_SCRATCH_PROGRESS=off keeps nothing on the disk.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from lora_from_scratch.checks.verdict import Verdict
from lora_from_scratch.support.figures import BUILDING
from lora_from_scratch.support.files import write_json

HOME = "LORA_FROM_SCRATCH_HOME"
SWITCH = "LORA_FROM_SCRATCH_PROGRESS"
VERSION = 1
PATIENCE = 2.0  # seconds to wait for another notebook that is writing
LARGEST = 5_000_000  # bytes: no course is so long
COUNTS = ("passed", "failed", "stopped")  # the verdicts that count as attempts


@dataclass
class Entry:
    """What was done of one exercise or prediction.

    Attributes:
        attempts: checks until it passed, the passing one included; checks of what was not begun do not count.
        hints: how many hints are open.
        points: the most that a check has given, out of `max_points`.
        passed, last: when it first passed and was last tried (ISO 8601, local time), or None.
        library: whether the library's version was taken.
    """

    attempts: int = 0
    hints: int = 0
    points: float = 0.0
    max_points: float = 0.0
    passed: str | None = None
    last: str | None = None
    library: bool = False


@dataclass
class Progress:
    """All entries by name; `notes`: what has to be said of the file; `kept`: whether it can be written."""

    entries: dict[str, Entry] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kept: bool = True


Change = tuple[str, Callable[[Entry], None]]  # the exercise, and what is done to its entry

_waiting: list[Change] = []  # what could not be written yet
_never: list[Change] = []  # what was done while switched off


def folder() -> Path:
    """Where what belongs to the learner is kept."""
    named = os.environ.get(HOME)
    return Path(named).expanduser() if named else Path(os.path.expanduser("~")) / ".lora-from-scratch"


def path() -> Path:
    return folder() / "progress.json"


def switched_off() -> bool:
    """By the environment variable, or because the notebooks are being built: nobody is there."""
    off = os.environ.get(SWITCH, "").strip().lower() in ("off", "0", "no", "false")
    return off or bool(os.environ.get(BUILDING))


def load() -> Progress:
    """What was done so far."""
    if switched_off():
        return _changed(Progress(kept=False), _never)
    progress, damage = _read()
    if damage:
        try:
            with _locked():
                progress, damage = _read()  # as it is now that nobody else writes
                if damage:
                    progress.notes.append(_set_aside(damage, progress))
        except OSError as error:
            progress.notes.append(f"{path()} {damage}, and could not be set aside ({error.strerror or error}).")
            progress.kept = False
    progress.kept = progress.kept and not _waiting
    return _changed(progress, _waiting)


def record(verdict: Verdict) -> list[str]:
    """Enter a verdict; the result is what has to be said of the file, usually nothing."""
    if verdict.status not in COUNTS:
        return []

    now = datetime.now().astimezone().isoformat(timespec="seconds")

    def enter(entry: Entry) -> None:
        entry.last = now
        entry.attempts += entry.passed is None
        entry.points = max(entry.points, float(verdict.points))
        entry.max_points = float(verdict.max_points)
        if verdict.passed and entry.passed is None:
            entry.passed = now

    return _change(verdict.exercise, enter)[1]


def open_hint(name: str, of: int) -> int:
    """Open one hint more; the result is how many are open now."""

    def enter(entry: Entry) -> None:
        entry.hints = min(of, entry.hints + 1)

    return _change(name, enter)[0].hints


def took_library(name: str) -> None:
    """Enter that the library's version was taken."""

    def enter(entry: Entry) -> None:
        entry.library = True

    _change(name, enter)


def _change(name: str, enter: Callable[[Entry], None]) -> tuple[Entry, list[str]]:
    """Make a change in the file, after those that could not be written before; where it cannot be, keep it."""
    notes = load().notes  # a damaged file is set aside here
    if switched_off():
        _never.append((name, enter))
    else:
        _waiting.append((name, enter))
        with contextlib.suppress(OSError), _locked():
            progress, _ = _read()  # another notebook may have written meanwhile
            if progress.kept:
                _write(_changed(progress, _waiting))
                _waiting.clear()
    return load().entries[name], notes


def _changed(progress: Progress, changes: list[Change]) -> Progress:
    for name, enter in changes:
        enter(progress.entries.setdefault(name, Entry()))
    return progress


def _read() -> tuple[Progress, str]:
    """The file's contents, as far as they are sound; and what is wrong with it, or ""."""
    file = path()
    try:
        if not os.path.lexists(file):
            return Progress(), ""
        if not file.is_file() or file.stat().st_size > LARGEST:
            return Progress(), "is not a progress file"
        document = json.loads(file.read_bytes())
    except OSError as error:
        return Progress(notes=[f"{file} cannot be read ({error.strerror or error})."], kept=False), ""
    except (ValueError, RecursionError):
        return Progress(), "is damaged"
    if not isinstance(document, dict) or not isinstance(document.get("exercises"), dict):
        return Progress(), "is damaged"
    version = document.get("version")
    if isinstance(version, int) and version > VERSION:
        note = f"{file} was written by a newer lora-from-scratch: it is left as it is, and nothing is added to it."
        return Progress(notes=[note], kept=False), ""
    entries = {str(name): _entry(values) for name, values in document["exercises"].items()}
    sound = {name: entry for name, entry in entries.items() if entry is not None}
    return Progress(sound), "" if version == VERSION and len(sound) == len(entries) else "is damaged in places"


def _entry(values: Any) -> Entry | None:
    """An entry that makes sense, or None."""
    if not isinstance(values, dict) or set(values) - {item.name for item in fields(Entry)}:
        return None
    entry = Entry(**values)
    counts = all(type(count) is int and count >= 0 for count in (entry.attempts, entry.hints))
    points = all(
        type(value) in (int, float) and math.isfinite(value) and value >= 0
        for value in (entry.points, entry.max_points)
    )
    times = all(value is None or _is_time(value) for value in (entry.passed, entry.last))
    return entry if counts and points and times and isinstance(entry.library, bool) else None


def _is_time(value: Any) -> bool:
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


def _set_aside(damage: str, progress: Progress) -> str:
    """Move the file away, write what was sound in it, and say so."""
    file = path()
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    aside = file.with_name(f"progress.damaged-{stamp}.json")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = file.with_name(f"progress.damaged-{stamp}-{number}.json")
    if progress.entries:
        shutil.copyfile(file, aside)
        _write(progress)
    else:
        os.replace(file, aside)
    entries = "1 entry is" if len(progress.entries) == 1 else f"{len(progress.entries)} entries are"
    saved = f"the {entries} kept" if progress.entries else "a new one is begun"
    return f"Your progress file {damage}: it was set aside as {aside}, and {saved}."


def _write(progress: Progress) -> None:
    exercises = {name: asdict(entry) for name, entry in progress.entries.items()}
    write_json(path(), {"version": VERSION, "exercises": exercises})


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Nobody else changes the file meanwhile (on Windows there is no such lock).

    Raises:
        OSError: the folder cannot be written, or somebody else has held the lock for too long.
    """
    folder().mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder() / "progress.lock").open("a") as lock:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
        yield  # closing the file gives the lock back
