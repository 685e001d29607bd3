"""A room that listens on a real socket, and learners who report to it over a bad network."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import uvicorn

from lora_from_scratch.cli.room import find_units, message_of
from lora_from_scratch.room import member
from lora_from_scratch.room.member import Membership, Reporter
from lora_from_scratch.room.protocol import Invitation, Status
from lora_from_scratch.room.server import Room
from lora_from_scratch.room.table import Table

CODE = "K7M3QX"
TOKENS = [f"token-of-learner-number-{number:03d}" for number in range(200)]


@dataclass
class RunningRoom:
    """A room that listens at 127.0.0.1."""

    room: Room
    port: int

    @property
    def table(self) -> Table:
        return self.room.table

    def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any, http.client.HTTPResponse]:
        """The status, the body (JSON is read; "" for a stream of events, which does not end) and the whole answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {"Content-Type": "application/json"} | dict(headers or {}))
        answer = connection.getresponse()
        text = "" if "event-stream" in answer.headers.get("Content-Type", "") else answer.read().decode()
        connection.close()
        return answer.status, json.loads(text) if text.startswith("{") else text, answer

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), names)[:2]

    def join(self, number: int, name: str, code: str = CODE) -> tuple[int, Any]:
        return self.post("/join", {"code": code, "name": name, "token": TOKENS[number]})

    def report(self, number: int, **statuses: Status) -> tuple[int, Any]:
        exercises = {name: status.as_json() for name, status in statuses.items()}
        return self.post("/report", {"token": TOKENS[number], "sent": time.time(), "exercises": exercises})

    def view(self, later: float = 0.0) -> dict[str, Any]:
        """What the page shows, or will show after so many seconds."""
        return self.table.view(time.time() + later)

    def membership(self, number: int, name: str = "Ada") -> Membership:
        return Membership("127.0.0.1", self.port, CODE, TOKENS[number], name, time.time())


@contextlib.contextmanager
def open_room(*units: str, seats: int = 100, **options: Any) -> Iterator[RunningRoom]:
    """Open a room with these units."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    table = Table(find_units(list(units)), seats, message_of)
    with served(Room(table, Invitation(CODE, "127.0.0.1", port), **options), listening) as running:
        yield running


@contextlib.contextmanager
def served(room: Room, listening: socket.socket) -> Iterator[RunningRoom]:
    """Run a room's server in a thread."""
    server = uvicorn.Server(uvicorn.Config(room.app, log_level="warning", timeout_graceful_shutdown=2))
    room.is_closing = lambda: server.should_exit
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        eventually(lambda: server.started)
        yield RunningRoom(room, room.invitation.port)
    finally:
        server.should_exit = True
        thread.join()


def eventually(holds: Any) -> None:
    limit = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.01)


class BadNetwork:
    """`member.post` over a network that loses a part of the requests, and of the answers to those that arrive."""

    def __init__(self, seed: int, lost: float = 0.3) -> None:
        self.lost, self.losses = lost, 0
        self._random, self._lock, self._post = random.Random(seed), threading.Lock(), member.post

    def post(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        self._lose()
        answer = self._post(*arguments, **keywords)
        self._lose()
        return answer

    def _lose(self) -> None:
        with self._lock:
            if self._random.random() < self.lost:
                self.losses += 1
                raise ConnectionResetError("lost")


def quick_reporter() -> Reporter:
    return Reporter(first_wait=0.01, longest_wait=0.05)
