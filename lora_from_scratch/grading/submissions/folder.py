"""Read the files in a submitted folder, and copy those that the notebook may use as data.

The learner controls the names, modes, sizes and number of the files. Everything here is therefore bounded, no link is
followed, and what cannot be read is left out and reported.
"""

from __future__ import annotations

import errno
import heapq
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from lora_from_scratch.grading.graded import Finding

MOST_ENTRIES = 2_000  # files and folders that are listed
DEEPEST = 8
ROOM = 128_000_000  # total bytes of the files that are copied
TIMESTAMP = "timestamp.txt"
LONGEST_TIMESTAMP = 200  # bytes
TIME = re.compile(r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?) ?([A-Za-z_/]{1,40}|[+-]\d\d:?\d\d|)")
NOT_DATA = (".ipynb_checkpoints", TIMESTAMP, "submission_secret.txt", "__pycache__")


@dataclass(frozen=True)
class Entry:
    """An entry of the folder.

    Attributes:
        path: relative to the folder.
        kind: "file", "folder", "link", "other" (a pipe, a device), "unreadable", or "more" (the limit was reached).
        size: the size of a file in bytes.
        detail: the target of a link, or why the entry is unreadable.
    """

    path: Path
    kind: str
    size: int = 0
    detail: str = ""


def entries(folder: Path) -> Iterator[Entry]:
    """The entries of a folder and its subfolders, sorted by name; after `MOST_ENTRIES`, one entry "more"."""
    left = MOST_ENTRIES
    waiting = [Path()]
    while waiting:
        at = waiting.pop()
        try:
            with os.scandir(folder / at) as found:
                there = heapq.nsmallest(left + 1, found, key=lambda entry: entry.name)
        except OSError as error:
            yield Entry(at, "unreadable", detail=error.strerror or type(error).__name__)
            continue
        for entry in there:
            if left == 0:
                yield Entry(at, "more")
                return
            left -= 1
            made = _entry(entry, at / entry.name)
            yield made
            if made.kind == "folder" and len(made.path.parts) < DEEPEST:
                waiting.append(made.path)


def _entry(entry: os.DirEntry[str], path: Path) -> Entry:
    try:
        found = entry.stat(follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):
            return Entry(path, "link", detail=os.readlink(entry.path))
    except OSError as error:
        return Entry(path, "unreadable", detail=error.strerror or type(error).__name__)
    kind = "folder" if stat.S_ISDIR(found.st_mode) else "file" if stat.S_ISREG(found.st_mode) else "other"
    return Entry(path, kind, found.st_size if kind == "file" else 0)


def take_data(source: Path, target: Path) -> tuple[bool, list[Finding]]:
    """Copy the files beside a notebook: plain files only, as many as fit.

    Returns:
        Whether anything was copied, and findings for the learner about what was left out.
    """
    room, taken = ROOM, False
    unread: list[str] = []
    too_much = False
    for entry in entries(source):
        if entry.kind == "more":
            too_much = True
        elif entry.kind == "unreadable":
            unread.append(f"{entry.path} ({entry.detail})")
        elif entry.kind == "file" and not _is_no_data(entry.path):
            if entry.size > room:
                too_much = True
                continue
            try:
                content = _content(source / entry.path, room)
            except OSError as error:
                unread.append(f"{entry.path} ({error.strerror})")
                continue
            (target / entry.path).parent.mkdir(parents=True, exist_ok=True)
            (target / entry.path).write_bytes(content)
            room, taken = room - len(content), True
    return taken, _left_out(unread, too_much)


def _is_no_data(path: Path) -> bool:
    return path.suffix == ".ipynb" or any(part in NOT_DATA for part in path.parts)


def _content(path: Path, room: int) -> bytes:
    with open_plain(path) as file:
        content = file.read(room + 1)
    if len(content) > room:
        raise OSError(errno.EFBIG, "it grew while it was read")
    return content


def open_plain(path: Path) -> BufferedReader:
    """Open a regular file for reading, without following links or blocking on a pipe.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file")
    return os.fdopen(descriptor, "rb")


def _left_out(unread: list[str], too_much: bool) -> list[Finding]:
    found = []
    if unread:
        shown = ", ".join(f"`{name[:80]}`" for name in unread[:3]) + (", ..." if len(unread) > 3 else "")
        message = f"These files could not be read, and your notebook ran without them: {shown}."
        found.append(Finding("unreadable data", "human", "", message))
    if too_much:
        most = f"at most {MOST_ENTRIES:,} files with {ROOM // 1_000_000} MB in total"
        found.append(Finding("too many files", "note", "", f"You handed in more data than grading accepts: {most}."))
    return found


# --- When ------------------------------------------------------------------------------------------------


def handed_in_at(folder: Path) -> tuple[str | None, str]:
    """The time of submission from timestamp.txt, in UTC and nbgrader's format, and what is wrong with that file."""
    path = folder / TIMESTAMP
    if not os.path.lexists(path):
        return None, ""
    try:
        with open_plain(path) as file:
            content = file.read(LONGEST_TIMESTAMP + 1)
    except OSError:
        content = None
    if content is None or len(content) > LONGEST_TIMESTAMP:
        return None, "timestamp.txt is not a small regular file, so the time of submission is unknown"
    text = content.decode(errors="replace").strip()
    try:
        return (_in_utc(text), "") if text else (None, "")
    except (ValueError, OverflowError, ZoneInfoNotFoundError):
        return None, f"timestamp.txt contains no valid time ({text[:40]!r}), so the time of submission is unknown"


def _in_utc(text: str) -> str:
    """Convert a time followed by a zone name or offset. Only names that match `TIME` are looked up as zones.

    Raises:
        ValueError, OverflowError, ZoneInfoNotFoundError: the text is not a time.
    """
    found = TIME.fullmatch(text)
    if found is None:
        raise ValueError("not a time")
    time = datetime.fromisoformat(found[1])
    zone = found[2]
    if zone[:1] in ("+", "-"):
        time = datetime.fromisoformat(f"{time.isoformat()}{zone[:3]}:{zone[-2:]}")
    elif zone not in ("", "Z", "UTC"):
        time = time.replace(tzinfo=ZoneInfo(zone))
    if time.tzinfo is not None:
        time = time.astimezone(UTC).replace(tzinfo=None)
    return f"{time.isoformat(' ', 'microseconds')} UTC"
