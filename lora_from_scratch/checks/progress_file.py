"""A learner's progress, kept in `~/.lora-from-scratch/progress.json`.

Nothing here ever raises an error for the learner. A damaged file is set aside; if the folder is not writable, progress
is kept until the notebook's kernel ends. `support/learner_folder.py` describes the environment variables.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from lora_from_scratch.checks.verdict import Verdict
from lora_from_scratch.support.files import write_json
from lora_from_scratch.support.learner_folder import folder, switched_off

VERSION = 2  # 1 had no guesses
PATIENCE = 2.0  # seconds to wait while another notebook is writing
LARGEST = 5_000_000  # bytes; a real progress file is never this large
COUNTS = ("passed", "failed", "stopped")  # the verdicts that count as attempts


@dataclass
class Entry:
    """A learner's progress on one exercise or prediction.

    Attributes:
        attempts: number of checks up to and including the first that passed; checks of an unwritten stub do not count.
        hints: number of hints opened.
        points: the best result so far, out of `max_points`.
        passed, last: when it first passed and was last tried (ISO 8601, local time), or None.
        library: whether the library's version was used.
        guess: for a prediction, the first that was made, or None.
    """

    attempts: int = 0
    hints: int = 0
    points: float = 0.0
    max_points: float = 0.0
    passed: str | None = None
    last: str | None = None
    library: bool = False
    guess: str | float | None = None


@dataclass
class Progress:
    """All entries by name, notes about the file for the learner, and whether progress is kept in the file."""

    entries: dict[str, Entry] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kept: bool = True


Change = tuple[str, Callable[[Entry], None]]  # the exercise, and a function that updates its entry

_pending: list[Change] = []  # changes not yet written to the file
_unsaved: list[Change] = []  # changes made while the file is switched off


def path() -> Path:
    return folder() / "progress.json"


def load() -> Progress:
    """The progress so far."""
    if switched_off():
        return _changed(Progress(kept=False), _unsaved)
    progress, damage = _read()
    if damage:
        try:
            with _locked():
                progress, damage = _read()  # read again under the lock
                if damage:
                    progress.notes.append(_set_aside(damage, progress))
        except OSError as error:
            progress.notes.append(f"{path()} {damage}, and could not be set aside ({error.strerror or error}).")
            progress.kept = False
    progress.kept = progress.kept and not _pending
    return _changed(progress, _pending)


def record(verdict: Verdict) -> list[str]:
    """Record a verdict; returns notes about the file for the learner, usually none."""
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
    """Open the next hint; returns how many are open now."""

    def enter(entry: Entry) -> None:
        entry.hints = min(of, entry.hints + 1)

    return _change(name, enter)[0].hints


def took_library(name: str) -> None:
    """Record that the library's version was used."""

    def enter(entry: Entry) -> None:
        entry.library = True

    _change(name, enter)


def keep_guess(name: str, guess: str | float) -> None:
    """Keep a prediction, unless there is an earlier one."""

    def enter(entry: Entry) -> None:
        entry.guess = guess if entry.guess is None else entry.guess

    _change(name, enter)


def _change(name: str, enter: Callable[[Entry], None]) -> tuple[Entry, list[str]]:
    """Apply pending changes and this one to the file; if it cannot be written, keep them for the next time."""
    notes = load().notes  # a damaged file is set aside here
    if switched_off():
        _unsaved.append((name, enter))
    else:
        _pending.append((name, enter))
        with contextlib.suppress(OSError), _locked():
            progress, _ = _read()  # another notebook may have written meanwhile
            if progress.kept:
                _write(_changed(progress, _pending))
                _pending.clear()
    return load().entries[name], notes


def _changed(progress: Progress, changes: list[Change]) -> Progress:
    for name, enter in changes:
        enter(progress.entries.setdefault(name, Entry()))
    return progress


def _read() -> tuple[Progress, str]:
    """The valid contents of the file, and what is wrong with it ("" if nothing)."""
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
        note = f"{file} was written by a newer version of lora-from-scratch, so it is left unchanged."
        return Progress(notes=[note], kept=False), ""
    entries = {str(name): _entry(values) for name, values in document["exercises"].items()}
    sound = {name: entry for name, entry in entries.items() if entry is not None}
    return Progress(sound), "" if version in range(1, VERSION + 1) and len(sound) == len(
        entries
    ) else "is damaged in places"


def _entry(values: Any) -> Entry | None:
    """The entry if it is valid, else None."""
    if not isinstance(values, dict) or set(values) - {item.name for item in fields(Entry)}:
        return None
    entry = Entry(**values)
    counts = all(type(count) is int and count >= 0 for count in (entry.attempts, entry.hints))
    points = all(
        type(value) in (int, float) and math.isfinite(value) and value >= 0
        for value in (entry.points, entry.max_points)
    )
    times = all(value is None or _is_time(value) for value in (entry.passed, entry.last))
    guess = entry.guess is None or type(entry.guess) in (str, int, float)
    return entry if counts and points and times and guess and isinstance(entry.library, bool) else None


def _is_time(value: Any) -> bool:
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


def _set_aside(damage: str, progress: Progress) -> str:
    """Move the damaged file aside, write its valid entries to a new one, and say so."""
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
    entries = "1 valid entry is" if len(progress.entries) == 1 else f"{len(progress.entries)} valid entries are"
    saved = f"the {entries} kept" if progress.entries else "a new one is started"
    return f"Your progress file {damage}. It was moved to {aside}, and {saved}."


def _write(progress: Progress) -> None:
    exercises = {name: asdict(entry) for name, entry in progress.entries.items()}
    write_json(path(), {"version": VERSION, "exercises": exercises})


def _locked() -> FileLock:
    """The lock on the file, to be held in a `with` statement.

    Raises:
        OSError: (on entry) the folder is not writable, or another process has held the lock for too long.
    """
    folder().mkdir(parents=True, exist_ok=True)
    return FileLock(folder() / "progress.lock", timeout=PATIENCE)
