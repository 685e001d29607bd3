"""What learners call to join and leave a workshop's room, and what their checks report to it: never any code."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime

from lora_from_scratch.checks import display, progress_file
from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.progress_file import Entry
from lora_from_scratch.checks.units import units
from lora_from_scratch.checks.verdict import Verdict
from lora_from_scratch.room import member
from lora_from_scratch.room.member import Membership, RefusedError
from lora_from_scratch.room.protocol import LONGEST_MISCONCEPTION, MOST_HINTS, Status, read_invitation

STATES = {"passed": "passed", "failed": "failed", "stopped": "failed", "library": "library", "missing": "trying"}
WHAT_IS_SENT = (
    "The teacher sees your name, which exercises you have tried or passed, the kind of mistake that a check has found, "
    "and how many hints you have opened; never your code or your answers."
)

_told: set[str] = set()  # the tokens of the memberships of which this kernel has told the learner


def join(invitation: str, name: str) -> None:
    """Join the room of a workshop: `join("K7M3QX@192.168.1.20", "Ada")`, with the invitation that the teacher shows.

    It holds for all notebooks on this computer, until `leave()` or the end of the day. To change your name, join again.
    """
    try:
        place = read_invitation(invitation)
        joined = member.join(place, name)
    except (ValueError, RefusedError) as error:
        display.show_text(f"You have not joined: {error}.")
    except OSError:
        display.show_text(
            f"You have not joined: {place.address} (port {place.port}) does not answer. Is this computer in the same "
            "network as the teacher's, and is the address right? You can run this cell again at any time; your checks "
            "work without the room."
        )
    else:
        _told.add(joined.token)
        member.report(joined, so_far())
        display.show_text(f"You are in the room as {joined.name}. {WHAT_IS_SENT} `leave()` ends this.")


def leave() -> None:
    """Leave the room of a workshop: your row disappears from the teacher's page, and nothing more is sent."""
    left, known = member.leave()
    if left is None:
        display.show_text("You are in no room.")
    elif known:
        display.show_text("You have left the room, and your row was removed from the teacher's page.")
    else:
        display.show_text(
            "You have left the room: nothing more is sent. The teacher's computer does not answer, so your row stays "
            "on its page until the room is closed."
        )


def report_verdict(verdict: Verdict) -> list[str]:
    """Report a verdict to the room, if the learner is in one; returns notes for the learner, usually none."""
    state = STATES.get(verdict.status)
    misconception = verdict.misconception[:LONGEST_MISCONCEPTION] if state == "failed" else ""
    return _report(verdict.exercise, state, misconception)


def report_hints(name: str, hints: int) -> None:
    """Report the number of hints opened, if the learner is in a room."""
    for note in _report(name, "trying", hints=min(hints, MOST_HINTS)):
        display.show_text(note)


def report_library(name: str) -> None:
    """Report that the learner works with the library's version, if the learner is in a room."""
    for note in _report(name, "library"):
        display.show_text(note)


def _report(name: str, state: str | None, misconception: str = "", hints: int = 0) -> list[str]:
    try:
        joined = member.membership()
        if joined is None or name not in _exercises():
            return []
        if reason := member.why_it_ended(joined):
            member.forget()
            return [f"You are no longer in the workshop's room: {reason}."]
        notes, statuses = _first_time(joined)
        if state is not None:
            statuses[name] = Status(state, time.time(), misconception, hints)
        member.report(joined, statuses)
        return notes
    except Exception:  # a check works, whatever happens to the room
        return []


def _first_time(joined: Membership) -> tuple[list[str], dict[str, Status]]:
    """What to tell the learner, and to report, once in each kernel."""
    if joined.token in _told:
        return [], {}
    _told.add(joined.token)
    return [f"You are in the workshop's room as {joined.name}; `leave()` ends this."], so_far()


def so_far() -> dict[str, Status]:
    """The exercises that the learner has passed, or for which the library's version was taken."""
    found = {}
    for name, entry in progress_file.load().entries.items():
        if name in _exercises() and (entry.passed or entry.library):
            state = "passed" if entry.passed else "library"
            found[name] = Status(state, _when(entry), hints=min(entry.hints, MOST_HINTS))
    return found


def _when(entry: Entry) -> float:
    """When the exercise was passed or last tried, in seconds since the epoch; 0 if that is not known."""
    time_of_day = entry.passed or entry.last
    return max(datetime.fromisoformat(time_of_day).timestamp(), 0.0) if time_of_day else 0.0


def _exercises() -> Mapping[str, Exercise]:
    return {exercise.name: exercise for unit in units() for exercise in unit.exercises}
