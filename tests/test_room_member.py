"""The learner's side of the room: it says what it does, loses nothing on a bad network, and is never in the way."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

pytest.importorskip("starlette", reason="Starlette is not installed: pip install -e '.[room]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install -e '.[room]'")

from lora_from_scratch.checks import check, hint, in_room, join, leave, library, notebook, progress_file
from lora_from_scratch.linear_algebra.rank import row_echelon
from lora_from_scratch.room import member
from lora_from_scratch.room.protocol import Status
from lora_from_scratch.support import learner_folder
from tests.rooms import BadNetwork, RunningRoom, eventually, open_room, quick_reporter

EXERCISES = ("rank", "row_echelon", "outer_product_sum", "low_rank_parameter_count")


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningRoom]:
    with open_room("00", "01") as opened:
        yield opened


@pytest.fixture
def room(shared: RunningRoom) -> RunningRoom:
    shared.table.learners.clear()
    return shared


@pytest.fixture(autouse=True)
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A learner's own folder, kernel and notebook; the names in the notebook."""
    monkeypatch.setenv(learner_folder.HOME, str(tmp_path / "home"))
    monkeypatch.delenv(learner_folder.SWITCH, raising=False)
    monkeypatch.setattr(progress_file, "_pending", [])
    monkeypatch.setattr(progress_file, "_unsaved", [])
    new_kernel(monkeypatch)
    found: dict[str, Any] = {}
    monkeypatch.setattr(notebook, "notebook", lambda: found)
    yield found
    member.forget()


def new_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "_reporter", quick_reporter())
    monkeypatch.setattr(member, "_unsaved", None)
    monkeypatch.setattr(member, "_token", member.secrets.token_urlsafe(24))
    monkeypatch.setattr(in_room, "_told", set())


def sent() -> None:
    assert member._reporter.wait_until_sent(120)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def mine(matrix: Tensor, tolerance: float | None = None) -> Any:
    return row_echelon(matrix, tolerance)


def nothing(matrix: Tensor, tolerance: float | None = None) -> None:
    return None


def invitation(room: RunningRoom) -> str:
    return str(room.room.invitation)


# --- In the notebook -----------------------------------------------------------------------------------------


def test_a_learner_joins_tries_passes_and_leaves(
    room: RunningRoom, names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> Any:
        sent()
        return room.view()["learners"][0]["exercises"].get("row_echelon")

    join(invitation(room).lower(), "Ada")
    text = said(capsys)
    assert text.startswith("You are in the room as Ada.")
    assert "never your code" in text
    assert "leave() ends this" in text
    assert state() is None
    hint("row_echelon")
    assert state() == {"state": "trying", "misconception": "", "hints": 1}
    names["row_echelon"] = nothing
    check("row_echelon")
    assert state() == {"state": "failed", "misconception": "returns nothing", "hints": 1}
    library("row_echelon")
    assert state() == {"state": "library", "misconception": "", "hints": 1}
    names["row_echelon"] = mine
    check("row_echelon")
    assert state() == {"state": "passed", "misconception": "", "hints": 1}
    assert "room" not in said(capsys)
    leave()
    assert said(capsys) == "You have left the room, and your row was removed from the teacher's page."
    assert room.view()["learners"] == []
    leave()
    assert said(capsys) == "You are in no room."


def test_what_is_sent_is_names_states_hints_and_times(
    room: RunningRoom, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: list[Any] = []

    def post(address: str, port: int, route: str, body: Any) -> dict[str, Any]:
        bodies.append(body)
        return {"name": "Ada"}

    monkeypatch.setattr(member, "post", post)
    names["row_echelon"] = lambda matrix, tolerance=None: "a secret"
    join(invitation(room), "Ada")
    check("row_echelon")
    check("rank_from_above")  # a prediction or unknown: nothing
    sent()
    assert set(bodies[0]) == {"code", "name", "token"}
    exercises = [body["exercises"] for body in bodies[1:] if body["exercises"]]
    assert [list(one) for one in exercises] == [["row_echelon"]]
    assert set(exercises[0]["row_echelon"]) == {"state", "misconception", "hints", "at"}
    assert "secret" not in json.dumps(bodies)


def test_an_example_with_its_own_namespace_and_an_unwritten_stub_are_not_reported(
    room: RunningRoom, names: dict[str, Any]
) -> None:
    def stub(matrix: Tensor, tolerance: float | None = None) -> None:
        raise NotImplementedError

    join(invitation(room), "Ada")
    check("row_echelon", namespace={"row_echelon": nothing})
    names["row_echelon"] = stub
    check("row_echelon")
    sent()
    assert room.view()["learners"][0]["exercises"] == {}


def test_it_holds_for_the_next_kernel_which_says_so_once_and_sends_what_was_passed(
    room: RunningRoom, names: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names["row_echelon"] = mine
    check("row_echelon")
    library("rank")
    join(invitation(room), "Ada")
    sent()
    states = {name: one["state"] for name, one in room.view()["learners"][0]["exercises"].items()}
    assert states == {"row_echelon": "passed", "rank": "library"}
    said(capsys)
    room.table.learners[next(iter(room.table.learners))].statuses.clear()
    for first in (check, hint, library):
        new_kernel(monkeypatch)
        first("row_echelon")
        assert "You are in the workshop's room as Ada; leave() ends this." in said(capsys)
        first("row_echelon")
        assert "room" not in said(capsys)
    join(invitation(room), "Ada")  # a cell at the top of the notebook that is run again
    sent()
    assert said(capsys).startswith("You are in the room as Ada.")
    assert [row["name"] for row in room.view()["learners"]] == ["Ada"]
    assert set(room.view()["learners"][0]["exercises"]) == {"row_echelon", "rank"}


def test_without_a_folder_it_holds_in_the_kernel(
    room: RunningRoom, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(learner_folder.SWITCH, "off")
    join(invitation(room), "Ada")
    names["row_echelon"] = mine
    check("row_echelon")
    sent()
    assert room.view()["learners"][0]["exercises"]["row_echelon"]["state"] == "passed"
    assert not (tmp_path / "home" / "room.json").exists()


@pytest.mark.parametrize(
    ("what", "name", "reason"),
    [
        ("K7M3QX", "Ada", "has no @"),
        (7, "Ada", "text in quotes"),
        ("K7M3QY@127.0.0.1:{port}", "Ada", "not the room's code"),
        ("K7M3QX@127.0.0.1:{port}", "", "at least one letter"),
        ("K7M3QX@127.0.0.1:{port}", None, "text in quotes"),
        ("K7M3QX@127.0.0.1:1", "Ada", "does not answer"),
    ],
)
def test_who_cannot_join_is_told_why(
    room: RunningRoom, capsys: pytest.CaptureFixture[str], what: Any, name: Any, reason: str
) -> None:
    join(what.format(port=room.port) if isinstance(what, str) else what, name)
    text = said(capsys)
    assert text.startswith("You have not joined: ")
    assert reason in text
    assert member.membership() is None
    assert room.view()["learners"] == []


def test_who_is_removed_is_told_once_and_sends_nothing_more(
    room: RunningRoom, names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    join(invitation(room), "Ada")
    sent()
    room.table.learners.clear()
    names["row_echelon"] = mine
    check("row_echelon")
    sent()
    said(capsys)
    check("row_echelon")
    assert "You are no longer in the workshop's room: the room was closed, or you were removed from it." in said(capsys)
    check("row_echelon")
    assert "room" not in said(capsys)
    assert member.membership() is None


def test_a_damaged_or_old_membership_is_none(room: RunningRoom, monkeypatch: pytest.MonkeyPatch) -> None:
    join(invitation(room), "Ada")
    joined = member.membership()
    assert joined is not None
    for text in ("", "[]", "{}", "null", '{"token": 3}', '{"joined": "x"}', "\x00"):
        member.path().write_text(text)
        assert member.membership() is None
    member.write_json(member.path(), member.asdict(joined))
    assert member.membership() == joined
    monkeypatch.setattr(member.time, "time", lambda: joined.joined + member.A_DAY)
    assert member.membership() is None


# --- A bad network -------------------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a computer that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listening:
        yield listening.getsockname()[1]


@pytest.fixture(params=["gone", "silent"])
def bad_port(request: pytest.FixtureRequest, silent: int) -> int:
    return silent if request.param == "silent" else 1


def test_a_check_does_not_wait_for_a_teachers_computer_that_is_gone_or_silent(
    names: dict[str, Any], bad_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    member.write_json(member.path(), member.asdict(RunningRoom(None, bad_port).membership(0)))  # type: ignore[arg-type]
    names["row_echelon"] = mine
    assert check("row_echelon") > 0
    assert "✓ Passed" in capsys.readouterr().out
    hint("row_echelon")
    library("row_echelon")
    assert member._reporter._unsent.keys() == {"row_echelon"}  # all three have returned, and nothing has arrived
    leave()
    assert "nothing more is sent" in said(capsys) or bad_port == 1
    assert member._reporter._unsent == {}


def test_a_check_works_whatever_goes_wrong_with_the_room(
    names: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*given: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(member, "membership", lambda: RunningRoom(None, 1).membership(0))  # type: ignore[arg-type]
    monkeypatch.setattr(member, "report", breaks)
    names["row_echelon"] = mine
    assert check("row_echelon") > 0
    assert "✓ Passed" in capsys.readouterr().out


def test_what_waits_is_bounded_and_the_thread_ends(room: RunningRoom) -> None:
    reporter, lost = quick_reporter(), RunningRoom(room.room, 1)
    for number in range(5000):
        reporter.add(lost.membership(0), {EXERCISES[number % 4]: Status("failed", float(number))})
    assert set(reporter._unsent) <= set(EXERCISES)
    room.join(0, "Ada")
    reporter.add(room.membership(0), {"rank": Status("passed", 5000.0)})  # the network is back
    assert reporter.wait_until_sent(120)
    assert set(room.view()["learners"][0]["exercises"]) == set(EXERCISES)
    eventually(lambda: reporter._thread is None)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n\r\n<html>Please log in to the Wi-Fi</html>",
        b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere.example/\r\n\r\n",
        b"HTTP/1.1 500 x\r\nContent-Length: 2\r\n\r\n{}",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 60_000,
    ],
)
def test_an_answer_that_is_no_rooms_is_no_answer(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection = listening.accept()[0]
            connection.recv(2**16)
            connection.sendall(answer)
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(OSError, match=r"the answer is not that of a room|reset"):
            member.post("127.0.0.1", listening.getsockname()[1], "/leave", {})
        thread.join()


def test_forty_learners_whose_connections_drop_end_in_the_right_table(
    room: RunningRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = BadNetwork(seed=0)
    monkeypatch.setattr(member, "post", network.post)
    expected: dict[str, dict[str, str]] = {}
    for number in range(40):
        chosen = random.Random(number)
        states: dict[str, str] = {}
        for name in chosen.choices(EXERCISES, k=12):
            state = chosen.choice(("failed", "failed", "library", "passed"))
            states[name] = "passed" if states.get(name) == "passed" else state
        expected["Ada" if not number else f"Ada {number + 1}"] = states

    def learn(number: int) -> None:
        assert room.join(number, "Ada")[0] == 200
        chosen, reporter = random.Random(number), quick_reporter()
        for step, name in enumerate(chosen.choices(EXERCISES, k=12)):
            state = chosen.choice(("failed", "failed", "library", "passed"))
            reporter.add(room.membership(number), {name: Status(state, float(step))})
            if step % 4 == 0:
                reporter.wait_until_sent(0.02)
        assert reporter.wait_until_sent(120)

    done = []

    def watched(number: int) -> None:
        learn(number)
        done.append(number)

    threads = []
    for number in range(40):
        threads.append(threading.Thread(target=watched, args=(number,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(40))
    assert network.losses > 40
    rows = {row["name"]: row for row in room.view()["learners"]}
    numbered = sorted(rows.values(), key=lambda row: row["number"])
    assert len(numbered) == 40
    by_token = {number: room.table.find(room.membership(number).token) for number in range(40)}
    for number, states in enumerate(expected.values()):
        learner = by_token[number]
        assert learner is not None
        found = {name: status.state for name, status in learner.statuses.items()}
        assert found == states, number
