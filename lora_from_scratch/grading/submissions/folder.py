"""The door for a learner's files: what lies in a folder that was handed in, and the part of it that is taken along.

Names, modes, sizes and numbers are the learner's. Everything here is bounded, no link is followed, and what cannot be
read is told and left out.
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

MOST_ENTRIES = 2_000  # files and folders that are looked at
DEEPEST = 8
ROOM = 128_000_000  # bytes of all files that are taken along
TIMESTAMP = "timestamp.txt"
LONGEST_TIMESTAMP = 200  # bytes
TIME = re.compile(r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?) ?([A-Za-z_/]{1,40}|[+-]\d\d:?\d\d|)")
NOT_DATA = (".ipynb_checkpoints", TIMESTAMP, "__pycache__")


@dataclass(frozen=True)
class Entry:
    """Something in the folder.

    Attributes:
        path: from the folder.
        kind: "file", "folder", "link", "other" (a pipe, a device), "unreadable", or "more" (that no more is looked at).
        size: bytes of a file.
        detail: of a link, where it leads; of what is unreadable, why.
    """

    path: Path
    kind: str
    size: int = 0
    detail: str = ""


def entries(folder: Path) -> Iterator[Entry]:
    """What lies in a folder and below it, in the order of the names; at most `MOST_ENTRIES`, then "more"."""
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
    """Copy what lies beside a notebook: plain files only, as many as fit.

    Returns:
        Was anything copied? And what was left out, for the learner.
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
        raise OSError(errno.EFBIG, "it grows while it is read")
    return content


def open_plain(path: Path) -> BufferedReader:
    """Open a regular file to be read. No link is followed, and nobody waits for a pipe.

    Raises:
        OSError: it cannot be opened, or is something else.
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
        message = f"These files of yours could not be read, and your notebook ran without them: {shown}."
        found.append(Finding("unreadable data", "human", "", message))
    if too_much:
        most = f"at most {MOST_ENTRIES:,} files, {ROOM // 1_000_000} MB together, are taken along"
        found.append(Finding("too many files", "note", "", f"You handed in more data than can be taken along: {most}."))
    return found


# --- When ------------------------------------------------------------------------------------------------


def handed_in_at(folder: Path) -> tuple[str | None, str]:
    """When, as nbgrader's timestamp.txt says, in UTC and in nbgrader's form; and what is wrong with that file."""
    path = folder / TIMESTAMP
    if not os.path.lexists(path):
        return None, ""
    try:
        with open_plain(path) as file:
            content = file.read(LONGEST_TIMESTAMP + 1)
    except OSError:
        content = None
    if content is None or len(content) > LONGEST_TIMESTAMP:
        return None, "timestamp.txt is no plain small file: when it was handed in is not known"
    text = content.decode(errors="replace").strip()
    try:
        return (_in_utc(text), "") if text else (None, "")
    except (ValueError, OverflowError, ZoneInfoNotFoundError):
        return None, f"timestamp.txt holds no time ({text[:40]!r}): when it was handed in is not known"


def _in_utc(text: str) -> str:
    """A time with the zone's name or offset behind it. A zone is never looked up as a file of any other name.

    Raises:
        ValueError, OverflowError, ZoneInfoNotFoundError: it is none.
    """
    found = TIME.fullmatch(text)
    if found is None:
        raise ValueError("no time")
    time = datetime.fromisoformat(found[1])
    zone = found[2]
    if zone[:1] in ("+", "-"):
        time = datetime.fromisoformat(f"{time.isoformat()}{zone[:3]}:{zone[-2:]}")
    elif zone not in ("", "Z", "UTC"):
        time = time.replace(tzinfo=ZoneInfo(zone))
    if time.tzinfo is not None:
        time = time.astimezone(UTC).replace(tzinfo=None)
    return f"{time.isoformat(' ', 'microseconds')} UTC"
