"""What learners' computers and the teacher's send to each other: JSON over HTTP in the local network.

POST /join     {"code": "K7M3QX", "name": "Ada", "token": ...}    answered by {"name": ...}, the name in the room
POST /report   {"token": ..., "sent": ..., "exercises": {"rank": {"state": "failed", "misconception": "off by one",
               "hints": 1, "at": ...}}}                           answered by {}
POST /leave    {"token": ...}                                     answered by {}

A learner's computer makes up the token, a secret that identifies it from then on, so that a request can be repeated
when its answer was lost. `sent` and `at` are seconds on the learner's own clock: they give the order of events, and
with their difference the teacher's computer needs no clock in common with it. An error is {"error": message}.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_from_scratch.support.plain_text import REPLACEMENT, one_line

PORT = 8765
STATES = ("trying", "failed", "library", "passed")  # an exercise without any of them has not been started
ALPHABET = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"  # without 0 and O, 1, I and L, which look alike
CODE_LENGTH = 6  # 31**6 is about 9e8 codes
LONGEST_NAME = 30  # characters
LONGEST_MISCONCEPTION = 100  # characters
MOST_EXERCISES = 200  # in one report
MOST_HINTS = 99
MOST_BYTES = 2**16  # of a request or an answer
TOKEN = re.compile(r"[\w-]{20,64}", re.ASCII)


@dataclass(frozen=True)
class Status:
    """A learner's state in one exercise.

    Attributes:
        state: one of `STATES`: "trying" (no verdict yet, but a hint was opened or a check could not run), "failed",
            "library" (uses the library's version) or "passed".
        at: when it was so, in seconds since the epoch on the learner's clock.
        misconception: the name of the mistake, if the state is "failed" and the mistake is known.
        hints: the number of hints opened.
    """

    state: str
    at: float
    misconception: str = ""
    hints: int = 0

    def as_json(self) -> dict[str, Any]:
        return {"state": self.state, "misconception": self.misconception, "hints": self.hints, "at": self.at}

    def after(self, before: Status | None) -> Status:
        """The status that holds when this one is reported after another one of the same exercise.

        A passed exercise stays passed, a status does not replace a later one, and "trying" says nothing new of an
        exercise that has been tried before. So reports may arrive twice, or in another order than they were sent.
        """
        if before is None:
            return self
        stays = before.state == "passed" or self.state == "trying" or self.at < before.at
        return replace(before if stays and self.state != "passed" else self, hints=max(before.hints, self.hints))


@dataclass(frozen=True)
class Invitation:
    """What a learner types to join, as text "K7M3QX@192.168.1.20", or with a port: "K7M3QX@192.168.1.20:9000"."""

    code: str
    address: str
    port: int = PORT

    def __str__(self) -> str:
        return f"{self.code}@{self.address}" + (f":{self.port}" if self.port != PORT else "")


def new_code() -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(CODE_LENGTH))


def read_invitation(text: Any) -> Invitation:
    """Read an invitation; capitals do not matter, nor do spaces.

    Raises:
        ValueError: it is none; the message says what is wrong with it.
    """
    like = 'it looks like "K7M3QX@192.168.1.20"'
    if not isinstance(text, str):
        raise ValueError(f"the invitation is text in quotes; {like}")
    code, at, place = "".join(text.split()).partition("@")
    address, colon, port = place.partition(":")
    if not at:
        raise ValueError(f"the invitation {one_line(text)!r} has no @; {like}")
    code = code.upper()
    if len(code) != CODE_LENGTH or set(code) - set(ALPHABET):
        raise ValueError(f"{one_line(code)!r} is no code: one has {CODE_LENGTH} characters, never 0, O, 1, I or L")
    try:
        ipaddress.IPv4Address(address)
    except ValueError:
        raise ValueError(f"{one_line(address)!r} is not the address of a computer; {like}") from None
    if colon and not (re.fullmatch(r"\d{1,5}", port, re.ASCII) and 0 < int(port) < 2**16):
        raise ValueError(f"{one_line(port)!r} is not a port: it is a number from 1 to {2**16 - 1}")
    return Invitation(code, address, int(port) if colon else PORT)


def read_name(name: Any) -> str:
    """The name as it will be shown: one line without invisible characters.

    Raises:
        ValueError: it is not text, is too long, or has neither a letter nor a digit.
    """
    if not isinstance(name, str):
        raise ValueError("the name must be text in quotes")
    shown = one_line(unicodedata.normalize("NFC", one_line(name).replace(REPLACEMENT, "")))
    if len(shown) > LONGEST_NAME:
        raise ValueError(f"the name has {len(shown)} characters; at most {LONGEST_NAME} are possible")
    if not any(character.isalnum() for character in shown):
        raise ValueError("the name must have at least one letter or digit")
    return shown


def read_token(value: Any) -> str:
    if not isinstance(value, str) or not TOKEN.fullmatch(value):
        raise ValueError("token must be 20 to 64 letters, digits, _ or -")
    return value


def read_report(body: Mapping[str, Any]) -> tuple[float, dict[str, Status]]:
    """When a report was sent, on the learner's clock, and its statuses by exercise.

    Raises:
        ValueError: something in it is invalid.
    """
    exercises = body.get("exercises")
    if not isinstance(exercises, dict) or len(exercises) > MOST_EXERCISES:
        raise ValueError(f"exercises must be an object with at most {MOST_EXERCISES} entries")
    return _time("sent", body.get("sent")), {name: _read_status(value) for name, value in exercises.items()}


def _read_status(value: Any) -> Status:
    if not isinstance(value, dict) or value.get("state") not in STATES:
        raise ValueError(f"state must be one of {', '.join(STATES)}")
    misconception, hints = value.get("misconception", ""), value.get("hints", 0)
    if not isinstance(misconception, str) or len(misconception) > LONGEST_MISCONCEPTION:
        raise ValueError(f"misconception must be text of at most {LONGEST_MISCONCEPTION} characters")
    if type(hints) is not int or not 0 <= hints <= MOST_HINTS:
        raise ValueError(f"hints must be a whole number from 0 to {MOST_HINTS}")
    return Status(value["state"], _time("at", value.get("at")), one_line(misconception), hints)


def _time(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 2**40:  # false for NaN too
        raise ValueError(f"{name} must be a time in seconds since 1970")
    return float(value)
