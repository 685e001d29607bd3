"""The roster of the course: learners from the gradebook and from tables exported by a platform, with all their keys.

A person in a download is matched by an identifier (a platform's number, an ID, an e-mail address), and by full name
only if no identifier is known. A name shared by two learners matches neither, because a wrong match would show one
learner's work to another.
"""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Key = tuple[str, str]  # the kind of identifier, and its value

# The columns that identify a learner in tables from nbgrader, Canvas (gradebook export), Moodle (grading worksheet,
# grade export) and Gradescope (roster). The first of them in a row determines the name of the learner's folder.
COLUMNS = {
    "student_id": "id",
    "sis login id": "id",
    "username": "id",
    "sid": "id",
    "student id": "id",
    "sis user id": "id",
    "id number": "id",
    "email": "email",
    "email address": "email",
    "lms_user_id": "number",
    "identifier": "participant",
}
TIME = "last modified (submission)"
BY_NAME = ("name", "slug")
ONE_EACH = ("number", "participant", "email")  # people with different values of one of these are different people


@dataclass
class Learner:
    """A learner of the course.

    Attributes:
        name: nbgrader's id of the learner, which is the name of the folder in submitted/.
        keys: all keys that identify the learner, normalized.
        time: the time of submission from Moodle's grading worksheet; "" if unknown.
    """

    name: str
    keys: set[Key] = field(default_factory=set)
    time: str = ""


class Roster:
    """The learners of a course."""

    def __init__(self) -> None:
        self.learners: list[Learner] = []

    def add(self, name: str, keys: Iterable[Key], time: str = "") -> Learner | None:
        """Add a learner, or add keys to a learner who is already known by an identifier; returns the learner, if any.

        Raises:
            ValueError: the keys belong to several learners.
        """
        new = {normal(*key) for key in keys if key[1].strip()}
        known = [one for one in self.learners if one.keys & {key for key in new if key[0] not in BY_NAME}]
        if len(known) > 1:
            who = " and ".join(sorted(one.name for one in known))
            raise ValueError(f"the roster says that {who} are the same person ({name or 'a row without a name'})")
        if not known and not name:  # the table has full names only
            known = [one for one in [self.find(new)[0]] if one]
        if known:
            known[0].keys |= new
            known[0].time = time or known[0].time
            return known[0]
        if not name:
            return None
        self.learners.append(Learner(name, new, time))
        return self.learners[-1]

    def find(self, keys: Iterable[Key]) -> tuple[Learner | None, str]:
        """The learner identified by the keys and "", or None and the reason."""
        wanted = {normal(*key) for key in keys if key[1].strip()}
        sure = {key for key in wanted if key[0] not in BY_NAME}
        others = {kind for kind, _ in sure if kind in ONE_EACH}
        found = [one for one in self.learners if one.keys & sure] or [
            one for one in self.learners if one.keys & wanted and not any(kind in others for kind, _ in one.keys)
        ]
        if len(found) == 1:
            return found[0], ""
        names = ", ".join(sorted(one.name for one in found))
        return None, f"matches several learners: {names}" if found else "matches nobody in the roster"


def normal(kind: str, value: str) -> Key:
    """Normalize a key: ignore case and, in names, accents, punctuation and the order of the parts."""
    value = unicodedata.normalize("NFKC", value).casefold().strip()
    if kind == "slug":
        return kind, "".join(letter for letter in value if letter.isalnum())
    if kind != "name":
        return kind, value
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", value) if not unicodedata.combining(letter))
    words = "".join(letter if letter.isalnum() else " " for letter in plain).split()
    return kind, " ".join(sorted(words))


def names_of(first: str, last: str) -> list[Key]:
    """The keys of a full name. In Canvas's file names, "Diallo, Amina" is "dialloamina"."""
    return [("name", f"{first} {last}"), ("slug", f"{last}{first}")]


def read_roster(students: Iterable[Any], tables: Iterable[Path]) -> Roster:
    """Read the learners in nbgrader's gradebook and in CSV tables.

    Raises:
        ValueError, OSError: a table cannot be read or contradicts another one.
    """
    roster = Roster()
    for student in students:
        keys = [("id", student.id), ("email", student.email or ""), ("number", student.lms_user_id or "")]
        known = roster.add(student.id, [*keys, *names_of(student.first_name or "", student.last_name or "")])
        if known and known.name != student.id:
            raise ValueError(
                f"the gradebook has the same e-mail address or lms_user_id for {known.name} and {student.id}"
            )
    for path in tables:
        rows: dict[str, str] = {}  # the learner's name -> the identifier in this table
        for row in _rows(path):
            known, name = _add_row(roster, row)
            if known and rows.setdefault(known.name, name) != name:
                raise ValueError(f"{path}: {rows[known.name]} and {name} have the same identifier or e-mail address")
    return roster


def _rows(path: Path) -> list[dict[str, str]]:
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    table = csv.DictReader(text.splitlines())
    columns = {name.strip().casefold() for name in table.fieldnames or () if name}
    if not columns & (COLUMNS.keys() | {"id"}):
        known = "id, SIS Login ID, Username, SID, ID number, Email address, Identifier"
        raise ValueError(f"{path} is no roster: its first line should have at least one of these columns: {known}")
    rows = [
        {name.strip().casefold(): value for name, value in row.items() if name and isinstance(value, str)}
        for row in table
    ]
    return [row for row in rows if row.get("student", "").strip() != "Points Possible"]  # Canvas's second line


def _add_row(roster: Roster, row: Mapping[str, str]) -> tuple[Learner | None, str]:
    """Add a row. The column "id" is Canvas's internal number in Canvas's tables, and the learner's id in nbgrader's.

    Returns:
        The learner, if there is one, and the identifier in this row.
    """
    canvas = "sis login id" in row or "sis user id" in row
    found = [(COLUMNS[column], row[column].strip()) for column in COLUMNS if row.get(column, "").strip()]
    if row.get("id", "").strip():
        found.insert(len(found) if canvas else 0, ("number" if canvas else "id", row["id"].strip()))
    name = next((value for kind, value in found if kind in ("id", "email")), "")
    last, _, first = row.get("student", "").partition(",")
    first = row.get("first_name") or row.get("first name") or first
    last = row.get("last_name") or row.get("last name") or last
    full = row.get("full name") or row.get("name") or ""
    keys = [*found, *names_of(first, last), ("name", full)]
    return roster.add(name, keys, row.get(TIME, "").strip(" -")), name
