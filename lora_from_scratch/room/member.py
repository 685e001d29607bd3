"""The learner's side of the room: joining, leaving, and reporting in the background.

A check must never wait for the teacher's computer, or fail because of it. `report` only notes what has changed; a
thread sends it and tries again, less and less often, while the network is down. What waits is the latest status of each
exercise, so the queue cannot grow beyond the number of exercises.

The membership is a file in the learner's folder: it holds for all notebooks, and for a kernel that is started again.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lora_from_scratch.room.protocol import MOST_BYTES, Invitation, Status, read_name, read_token
from lora_from_scratch.support.files import write_json
from lora_from_scratch.support.learner_folder import folder, switched_off

TIMEOUT = 5.0  # seconds without an answer
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between two attempts to send
A_DAY = 12 * 3600.0  # seconds for which a membership holds


class RefusedError(Exception):
    """The teacher's computer has answered that it does not accept a request; the message says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Membership:
    """A place in a room. `joined` is in seconds since the epoch; `token` is secret."""

    address: str
    port: int
    code: str
    token: str
    name: str
    joined: float

    @property
    def is_over(self) -> bool:
        return not 0 <= time.time() - self.joined < A_DAY


_token = secrets.token_urlsafe(24)  # of this kernel; if `join` is repeated, it is recognised by it
_unsaved: Membership | None = None  # the membership where no file is written


def path() -> Path:
    return folder() / "room.json"


def membership() -> Membership | None:
    """The present membership, or None. A file that is damaged, or of another day, is none."""
    if _unsaved is not None:
        return None if _unsaved.is_over else _unsaved
    if switched_off():
        return None
    try:
        document = json.loads(path().read_bytes())
        member = Membership(**{field.name: document[field.name] for field in fields(Membership)})
        read_token(member.token)
        return None if member.is_over else member
    except (OSError, ValueError, TypeError, KeyError):
        return None


def join(invitation: Invitation, name: str) -> Membership:
    """Join a room, or change one's name in it.

    Raises:
        ValueError: there can be no such name.
        RefusedError: the teacher's computer does not accept the code, or the room is full.
        OSError: there is no answer.
    """
    global _unsaved
    before = membership()
    same = before is not None and (before.code, before.address) == (invitation.code, invitation.address)
    token = before.token if before is not None and same else _token
    body = {"code": invitation.code, "name": read_name(name), "token": token}
    answer = post(invitation.address, invitation.port, "/join", body)
    try:
        shown = read_name(answer.get("name"))
    except ValueError:
        raise OSError("the answer is not that of a room") from None
    member = Membership(invitation.address, invitation.port, invitation.code, token, shown, time.time())
    _unsaved = member
    if not switched_off():
        with contextlib.suppress(OSError):  # not writable: the membership holds in this kernel
            write_json(path(), asdict(member))
            _unsaved = None
    return member


def leave() -> tuple[Membership | None, bool]:
    """Leave the room: from now on nothing is sent.

    Returns:
        the membership that there was, and whether the teacher's computer knows that it has ended.
    """
    global _token
    member = membership()
    forget()
    _token = secrets.token_urlsafe(24)
    if member is None:
        return None, False
    try:
        post(member.address, member.port, "/leave", {"token": member.token})
    except OSError:
        return member, False
    except RefusedError:
        pass  # it does not know this member any more
    return member, True


def forget() -> None:
    """End the membership on this computer."""
    global _unsaved
    _unsaved = None
    _reporter.clear()
    with contextlib.suppress(OSError):
        path().unlink(missing_ok=True)


def report(member: Membership, statuses: Mapping[str, Status]) -> None:
    """Send these statuses in the background."""
    _reporter.add(member, statuses)


def why_it_ended(member: Membership) -> str:
    """Why the teacher's computer has ended this membership; "" if it has not, as far as is known."""
    return _reporter.refusals.get(member.token, "")


def post(address: str, port: int, route: str, body: Mapping[str, Any], timeout: float = TIMEOUT) -> dict[str, Any]:
    """Send a request and return the answer.

    Raises:
        RefusedError: the answer is an error.
        OSError: there is no answer, or none that a room gives.
    """
    connection = http.client.HTTPConnection(address, port, timeout=timeout)
    try:
        connection.request("POST", route, json.dumps(body).encode(), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        document = json.loads(answer.read(MOST_BYTES))
    except (http.client.HTTPException, ValueError, RecursionError) as error:  # as from a captive portal
        raise OSError(f"the answer is not that of a room ({type(error).__name__})") from None
    finally:
        connection.close()
    if answer.status == 200 and isinstance(document, dict):
        return document
    message = document.get("error") if isinstance(document, dict) else None
    if not isinstance(message, str):
        raise OSError(f"the answer is not that of a room (status {answer.status})")
    raise RefusedError(answer.status, message)


class Reporter:
    """Sends statuses in a thread, which ends when there is nothing left to send.

    Args:
        first_wait, longest_wait: seconds to wait after the first failure, and at most.
    """

    def __init__(self, first_wait: float = FIRST_WAIT, longest_wait: float = LONGEST_WAIT) -> None:
        self.first_wait, self.longest_wait = first_wait, longest_wait
        self._changed = threading.Condition()
        self._unsent: dict[str, Status] = {}
        self._member: Membership | None = None
        self._thread: threading.Thread | None = None
        self.refusals: dict[str, str] = {}  # by token, why the teacher's computer does not know it

    def add(self, member: Membership, statuses: Mapping[str, Status]) -> None:
        with self._changed:
            self._member = member
            for name, status in statuses.items():
                self._unsent[name] = status.after(self._unsent.get(name))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="room", daemon=True)
                self._thread.start()

    def clear(self) -> None:
        """Forget what has not been sent."""
        with self._changed:
            self._unsent.clear()
            self._member = None
            self._changed.notify_all()

    def wait_until_sent(self, seconds: float) -> bool:
        """Wait until nothing is left to send; returns whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._unsent, seconds)

    def _work(self) -> None:
        wait = self.first_wait
        while True:
            with self._changed:
                member, batch = self._member, dict(self._unsent)
                if not batch or member is None or member.is_over:
                    self._unsent.clear()
                    self._thread = None
                    self._changed.notify_all()
                    return
            if self._send(member, batch):
                wait = self.first_wait
                continue
            with self._changed:  # all learners have lost the network together: they need not all come back together
                self._changed.wait_for(lambda: self._member is None, wait * random.uniform(0.5, 1.5))
            wait = min(2 * wait, self.longest_wait)

    def _send(self, member: Membership, batch: Mapping[str, Status]) -> bool:
        """Whether this batch is done with: it has arrived, or is not wanted."""
        exercises = {name: status.as_json() for name, status in batch.items()}
        body = {"token": member.token, "sent": time.time(), "exercises": exercises}
        try:
            post(member.address, member.port, "/report", body)
        except RefusedError as error:
            if error.status == 429:  # too many at a time
                return False
            if error.status == 401:
                self.refusals[member.token] = str(error)
        except Exception:  # whatever is wrong with the network, it is not the learner's problem
            return False
        with self._changed:
            self._unsent = {name: status for name, status in self._unsent.items() if status is not batch.get(name)}
            self._changed.notify_all()
        return True


_reporter = Reporter()
