"""What the teacher's computer knows of a room, and what follows from it: who is stuck, and where a hint helps many.

Times are in seconds since the epoch, on the teacher's clock unless it is said that they are the learner's.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lora_from_scratch.room.protocol import LONGEST_NAME, Status

STUCK = 5 * 60.0  # seconds at one exercise without passing it
AWAY = 45 * 60.0  # seconds without a sign of life; who is away does not count as stuck
MOST_HELP = 8  # learners listed as in need of help
MOST_MISCONCEPTIONS = 6
A_THIRD, TWO_THIRDS = 1 / 3, 2 / 3
FEW = 3  # learners; what fewer do says nothing about the group
DONE = ("passed", "library")


class FullError(Exception):
    """The room has no place left."""


@dataclass(frozen=True)
class Unit:
    """A unit of the course: the names of its exercises are columns of the table."""

    number: str
    title: str
    exercises: tuple[str, ...]


@dataclass
class Learner:
    """A learner in the room.

    Attributes:
        number: 1 for the first who joined, 2 for the second, ...
        key: a hash of the learner's token.
        statuses: by exercise; their times are on the learner's clock.
        here: the exercise at which the learner was last seen, or "".
        since: since when the learner has been there.
        latest: the time of the last status, on the learner's clock.
        heard: when the learner's computer last reported.
    """

    number: int
    name: str
    key: str
    heard: float
    statuses: dict[str, Status] = field(default_factory=dict)
    here: str = ""
    since: float = 0.0
    latest: float = 0.0

    def is_away(self, now: float) -> bool:
        return now - self.heard >= AWAY

    def is_working(self, now: float) -> bool:
        """Whether the learner is at an exercise that is not yet done."""
        return bool(self.here) and self.statuses[self.here].state not in DONE and not self.is_away(now)

    def is_stuck(self, now: float) -> bool:
        return self.is_working(now) and now - self.since >= STUCK


class Table:
    """The learners in a room and their exercises.

    Args:
        units: the units whose exercises are shown; reports about others are ignored.
        seats: the maximum number of learners.
        message: for an exercise and the name of a mistake, what the check tells the learner; "" if not known.
    """

    def __init__(
        self, units: Sequence[Unit], seats: int = 100, message: Callable[[str, str], str] = lambda exercise, name: ""
    ) -> None:
        self.units, self.seats, self.message = units, seats, message
        self.exercises = {name: unit for unit in units for name in unit.exercises}
        self.learners: dict[str, Learner] = {}  # by key
        self.version = 0  # of the contents; increases with every change
        self._last_number = 0

    # --- Changes ---

    def join(self, token: str, name: str, now: float) -> Learner:
        """Add a learner, or rename the one who has this token. A name that is taken gets a number.

        Raises:
            FullError: there is no place left.
        """
        key = key_of(token)
        learner = self.learners.get(key)
        if learner is None:
            if len(self.learners) >= self.seats:
                raise FullError(f"the room is full: it has places for {self.seats}")
            self._last_number += 1
            learner = self.learners[key] = Learner(self._last_number, "", key, now)
        learner.name, learner.heard = self._free(name, key), now
        self.version += 1
        return learner

    def find(self, token: str) -> Learner | None:
        return self.learners.get(key_of(token))

    def remove(self, learner: Learner) -> None:
        self.learners.pop(learner.key, None)
        self.version += 1

    def update(self, learner: Learner, statuses: Mapping[str, Status], sent: float, now: float) -> None:
        """Enter what a learner's computer has reported.

        Args:
            sent: when the report was sent, on the learner's clock.
        """
        learner.heard = now
        for name, status in sorted(statuses.items(), key=lambda item: item[1].at):
            if name not in self.exercises:
                continue
            learner.statuses[name] = status.after(learner.statuses.get(name))
            if status.at >= learner.latest:
                if name != learner.here:
                    learner.here, learner.since = name, now - max(sent - status.at, 0)
                learner.latest = status.at
        self.version += 1

    def _free(self, name: str, key: str) -> str:
        taken = {learner.name.casefold() for learner in self.learners.values() if learner.key != key}
        free, number = name, 1
        while free.casefold() in taken:
            number += 1
            free = f"{name[: LONGEST_NAME - len(f' {number}')].rstrip()} {number}"
        return free

    # --- What the page shows ---

    def view(self, now: float) -> dict[str, Any]:
        """The contents of the page, as JSON."""
        learners = sorted(self.learners.values(), key=lambda learner: learner.name.casefold())
        return {
            "unit": self._busiest_unit(now),
            "units": [asdict(unit) for unit in self.units],
            "learners": [self._row(learner, now) for learner in learners],
            "help": [self._in_need(learner, now) for learner in self._stuck(now)[:MOST_HELP]],
            "misconceptions": self._misconceptions(now),
            "advice": self._advice(now),
        }

    def _row(self, learner: Learner, now: float) -> dict[str, Any]:
        return {
            "number": learner.number,
            "name": learner.name,
            "away": learner.is_away(now),
            "here": learner.here,
            "minutes": _minutes(now - learner.since) if learner.is_working(now) else None,
            "stuck": learner.is_stuck(now),
            "exercises": {
                name: {"state": status.state, "misconception": status.misconception, "hints": status.hints}
                for name, status in learner.statuses.items()
            },
        }

    def _stuck(self, now: float) -> list[Learner]:
        """The learners who are stuck, the one who has been longest first."""
        stuck = [learner for learner in self.learners.values() if learner.is_stuck(now)]
        return sorted(stuck, key=lambda learner: (learner.since, learner.number))

    def _in_need(self, learner: Learner, now: float) -> dict[str, Any]:
        status = learner.statuses[learner.here]
        return {
            "number": learner.number,
            "name": learner.name,
            "exercise": learner.here,
            "minutes": _minutes(now - learner.since),
            "misconception": status.misconception,
            "hints": status.hints,
        }

    def _misconceptions(self, now: float) -> list[dict[str, Any]]:
        """The mistakes of those who are at an exercise now, the most frequent first."""
        working = [learner for learner in self.learners.values() if learner.is_working(now)]
        counts = Counter((learner.here, learner.statuses[learner.here].misconception) for learner in working)
        common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return [
            {"exercise": exercise, "name": name, "message": self.message(exercise, name), "count": count}
            for (exercise, name), count in common
            if name
        ][:MOST_MISCONCEPTIONS]

    def _advice(self, now: float) -> list[dict[str, Any]]:
        """For exercises at which someone is working: whether a third of the group is stuck, or two thirds are done."""
        group = [learner for learner in self.learners.values() if not learner.is_away(now)]
        if len(group) < FEW:
            return []
        working = Counter(learner.here for learner in group if learner.is_working(now))
        found = []
        for exercise in filter(working.__contains__, self.exercises):
            stuck = sum(learner.here == exercise and learner.is_stuck(now) for learner in group)
            states = [learner.statuses[exercise].state for learner in group if exercise in learner.statuses]
            done = sum(state in DONE for state in states)
            if done >= TWO_THIRDS * len(group):
                found.append({"exercise": exercise, "kind": "go on", "count": done, "of": len(group)})
            elif stuck >= A_THIRD * len(group):
                found.append({"exercise": exercise, "kind": "hint", "count": stuck, "of": len(group)})
        return found

    def _busiest_unit(self, now: float) -> str:
        """The number of the unit in which most learners are; the first one if nobody is anywhere yet."""
        there = Counter(
            self.exercises[learner.here].number
            for learner in self.learners.values()
            if learner.here and not learner.is_away(now)
        )
        return there.most_common(1)[0][0] if there else self.units[0].number

    # --- Keeping it ---

    def as_json(self) -> dict[str, Any]:
        return {"learners": [asdict(learner) for learner in self.learners.values()]}

    def restore(self, document: Mapping[str, Any]) -> None:
        """Take over the learners of a table that was kept.

        Raises:
            ValueError: the document is not one that `as_json` gives.
        """
        try:
            for values in document["learners"]:
                statuses = {name: Status(**status) for name, status in values["statuses"].items()}
                learner = Learner(**{**values, "statuses": statuses})
                if learner.here not in statuses or learner.here not in self.exercises:
                    learner.here = ""
                self.learners[learner.key] = learner
                self._last_number = max(self._last_number, learner.number)
        except (KeyError, TypeError, AttributeError):
            raise ValueError("this is not a room that was kept") from None
        self.version += 1


def key_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _minutes(seconds: float) -> int:
    return int(max(seconds, 0) // 60)
