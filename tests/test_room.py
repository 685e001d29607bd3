"""The room's server: who joins, what is refused, what the teacher sees, and who else sees nothing."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="Starlette is not installed: pip install -e '.[room]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install -e '.[room]'")

from lora_from_scratch.cli.room import find_address, find_units, listen, restore
from lora_from_scratch.room import member, protocol, server
from lora_from_scratch.room.protocol import Invitation, Status, new_code, read_invitation, read_name
from lora_from_scratch.room.rate import Rate
from lora_from_scratch.room.table import AWAY, STUCK, Table
from lora_from_scratch.support.plain_text import one_line
from tests.cli_calls import complaint
from tests.rooms import CODE, TOKENS, RunningRoom, eventually, open_room

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningRoom]:
    with open_room("00", "01") as opened:
        yield opened


@pytest.fixture
def room(shared: RunningRoom) -> RunningRoom:
    """An empty room."""
    shared.table.learners.clear()
    shared.room._guesses, shared.room._reports = Rate(*server.GUESSES), Rate(*server.REPORTS)
    return shared


def status(state: str, ago: float = 0.0, **more: Any) -> Status:
    return Status(state, time.time() - ago, **more)


def names(room: RunningRoom) -> list[str]:
    return [learner["name"] for learner in room.view()["learners"]]


# --- Joining and leaving -----------------------------------------------------------------------------------


def test_who_joins_with_the_code_is_in_the_room_until_they_leave(room: RunningRoom) -> None:
    assert room.join(0, "Ada") == (200, {"name": "Ada"})
    assert room.join(1, "Grace", CODE.lower()) == (200, {"name": "Grace"})
    assert names(room) == ["Ada", "Grace"]
    assert room.post("/leave", {"token": TOKENS[0]}) == (200, {})
    assert names(room) == ["Grace"]
    assert room.report(0, rank=status("passed"))[0] == 401
    assert names(room) == ["Grace"]


def test_a_name_that_is_taken_gets_a_number(room: RunningRoom) -> None:
    given_names = [room.join(number, name)[1]["name"] for number, name in enumerate(["Ada", "ADA", " Ada ", "Ada 2"])]
    assert given_names == ["Ada", "ADA 2", "Ada 3", "Ada 2 2"]


def test_a_long_name_that_is_taken_is_shortened_for_its_number(room: RunningRoom) -> None:
    longest = "x" * protocol.LONGEST_NAME
    given_names = [room.join(number, longest)[1]["name"] for number in range(11)]
    assert len(set(given_names)) == 11
    assert {len(name) for name in given_names} == {protocol.LONGEST_NAME}


def test_to_join_again_with_the_same_token_is_to_be_the_same_learner(room: RunningRoom) -> None:
    room.join(0, "Ada")
    room.report(0, rank=status("passed"))
    assert room.join(0, "Ada") == (200, {"name": "Ada"})
    assert room.join(0, "Countess") == (200, {"name": "Countess"})
    assert [row["exercises"]["rank"]["state"] for row in room.view()["learners"]] == ["passed"]


@pytest.mark.parametrize("code", ["K7M3QY", "", "K7M3QXK7M3QX", None, 7, ["K7M3QX"], "\ud800"])
def test_another_code_does_not_open_the_room(room: RunningRoom, code: Any) -> None:
    code_status, answer = room.join(0, "Ada", code)
    assert code_status == 403
    assert "not the room's code" in answer["error"]
    assert names(room) == []


def test_who_guesses_codes_has_to_wait_even_with_the_right_one(room: RunningRoom) -> None:
    codes = [room.join(0, "Eve", new_code())[0] for _ in range(server.GUESSES[0])]
    assert codes == [403] * server.GUESSES[0]
    text = json.dumps({"code": CODE, "name": "Eve", "token": TOKENS[0]}).encode()
    code_status, answer, whole = room.request("POST", "/join", text)
    assert code_status == 429
    assert "wait" in answer["error"]
    assert 1 <= int(whole.headers["Retry-After"]) <= server.GUESSES[1] + 1
    assert names(room) == []


def test_a_full_room_says_so_and_keeps_who_is_in_it() -> None:
    with open_room("00", seats=2) as room:
        assert [room.join(number, "Ada")[0] for number in range(2)] == [200, 200]
        assert room.join(2, "Grace") == (403, {"error": "the room is full: it has places for 2"})
        assert room.join(1, "Emmy") == (200, {"name": "Emmy"})
        assert names(room) == ["Ada", "Emmy"]


@given(st.text(max_size=40) | st.text(st.sampled_from("a\u202e\u2066\x1b\u200b\x00<& \n\ud800é"), max_size=40))
def test_a_name_is_one_line_of_visible_text_or_refused(name: str) -> None:
    try:
        shown = read_name(name)
    except ValueError as error:
        assert "name" in str(error)  # noqa: PT017
        return
    assert shown == one_line(shown) == read_name(shown)
    assert 0 < len(shown) <= protocol.LONGEST_NAME
    assert any(map(str.isalnum, shown))
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\n\x00\x1b\ufffd")


def test_invitations_are_read_as_they_are_written_down_and_as_people_type_them() -> None:
    for written in (Invitation(CODE, "192.168.1.20"), Invitation(new_code(), "10.0.0.7", 9000)):
        assert read_invitation(str(written)) == written
    assert read_invitation(" k7m3qx @ 192.168.1.20 ") == Invitation(CODE, "192.168.1.20")
    for bad in ("K7M3QX", "K7M3Q0@10.0.0.1", "K7M3QX@room.example", "K7M3QX@10.0.0.1:0", "@10.0.0.1", "", 7, None):
        with pytest.raises(ValueError, match=r"invitation|code|address|port"):
            read_invitation(bad)


# --- Nonsense ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/report", b"", 400),
        ("/report", b"\xff\xfe{", 400),
        ("/report", b"[" * 50_000, 400),
        ("/report", b'"text"', 400),
        ("/report", b"{" + b" " * protocol.MOST_BYTES + b"}", 413),
        ("/report", {}, 401),
        ("/report", {"token": TOKENS[9]}, 401),
        ("/report", {"token": "é\ud800"}, 401),
        ("/report", {"token": ["x"]}, 401),
        ("/leave", {"token": None}, 401),
        ("/join", {"code": CODE, "name": "Eve", "token": "short"}, 400),
        ("/join", {"code": CODE, "name": "x" * 31, "token": TOKENS[5]}, 400),
        ("/join", {"code": CODE, "name": "\u202e\u200b", "token": TOKENS[5]}, 400),
        ("/join", {"code": CODE, "token": TOKENS[5]}, 400),
        ("/nowhere", {}, 404),
    ],
)
def test_nonsense_is_refused_in_words_and_harms_nobody(room: RunningRoom, path: str, body: Any, expected: int) -> None:
    room.join(0, "Ada")
    room.report(0, rank=status("passed"))
    before = room.table.as_json()["learners"][0]
    code_status, answer = room.post(path, body)
    assert code_status == expected
    assert isinstance(answer["error"], str)
    assert room.table.as_json()["learners"] == [before]


VALID = {"state": "failed", "misconception": "m", "hints": 1, "at": 1.0}


@pytest.mark.parametrize(
    "change",
    [
        {"state": "code"},
        {"state": ["failed"]},
        {"misconception": "x" * 101},
        {"misconception": None},
        {"hints": -1},
        {"hints": True},
        {"hints": 10**30},
        {"at": float("nan")},
        {"at": float("inf")},
        {"at": "now"},
        {"at": 10**400},
    ],
)
def test_a_report_with_one_wrong_value_changes_nothing(room: RunningRoom, change: dict[str, Any]) -> None:
    room.join(0, "Ada")
    body = {"token": TOKENS[0], "sent": 1.0, "exercises": {"rank": VALID, "row_echelon": VALID | change}}
    code_status, answer = room.post("/report", body)
    assert code_status == 400
    assert str(next(iter(change))) in answer["error"]
    assert room.view()["learners"][0]["exercises"] == {}


@given(JSON, JSON)
def test_whatever_is_reported_is_read_or_refused(exercises: Any, sent: Any) -> None:
    table = Table(find_units(["01"]))
    learner = table.join(TOKENS[0], "Ada", 0.0)
    try:
        when, statuses = protocol.read_report({"exercises": exercises, "sent": sent})
    except ValueError:
        return
    table.update(learner, statuses, when, 0.0)
    json.dumps(table.view(0.0), allow_nan=False)


def test_exercises_that_are_not_shown_are_ignored(room: RunningRoom) -> None:
    room.join(0, "Ada")
    assert room.report(0, rank=status("passed"), LoRALinear=status("passed"), nothing=status("failed")) == (200, {})
    assert list(room.view()["learners"][0]["exercises"]) == ["rank"]


def test_too_many_reports_have_to_wait_and_no_one_else_does(room: RunningRoom) -> None:
    room.join(0, "Eve")
    room.join(1, "Ada")
    codes = {room.report(0)[0] for _ in range(server.REPORTS[0] + 20)}
    assert codes == {200, 429}
    assert room.report(1)[0] == 200


def test_a_request_that_breaks_off_or_never_ends_harms_nobody(
    room: RunningRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "TIME_FOR_A_BODY", 0.2)
    head = b"POST /join HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", room.port)) as broken:
        broken.sendall(head[:40])
    with socket.create_connection(("127.0.0.1", room.port), timeout=60) as endless:
        endless.sendall(head + b"{")
        assert room.join(0, "Ada")[0] == 200
        assert endless.recv(4096).startswith(b"HTTP/1.1 408")
    assert names(room) == ["Ada"]


# --- What the teacher sees -----------------------------------------------------------------------------------


def test_a_passed_exercise_stays_passed_and_a_late_report_does_not_count() -> None:
    table = Table(find_units(["01"]))
    learner = table.join(TOKENS[0], "Ada", 0.0)
    for state, at in (("failed", 20.0), ("trying", 30.0), ("failed", 10.0), ("passed", 40.0), ("failed", 50.0)):
        table.update(learner, {"rank": Status(state, at, f"at {at:g}", hints=int(at) // 10)}, at, at)
        if at < 40:
            assert (learner.statuses["rank"].state, learner.statuses["rank"].misconception) == ("failed", "at 20")
    assert learner.statuses["rank"] == Status("passed", 40.0, "at 40", hints=5)


def test_the_learners_clock_may_be_wrong() -> None:
    table = Table(find_units(["01"]))
    learner = table.join(TOKENS[0], "Ada", 1000.0)
    table.update(learner, {"rank": Status("failed", 77_000.0)}, sent=77_030.0, now=1030.0)
    assert learner.since == 1000.0
    assert not learner.is_stuck(1000.0 + STUCK - 1)
    assert learner.is_stuck(1000.0 + STUCK)


def test_who_is_stuck_longest_is_helped_first_and_who_goes_on_or_away_is_not_listed() -> None:
    table = Table(find_units(["01"]))
    learners = [table.join(TOKENS[n], f"L{n}", 0.0) for n in range(5)]
    for n, learner in enumerate(learners):
        at = 100.0 - n
        table.update(learner, {"rank": Status("failed", at, "off by one")}, at, at)
    table.update(learners[3], {"row_echelon": Status("trying", 120.0)}, 120.0, 120.0)
    table.update(learners[4], {"rank": Status("library", 120.0)}, 120.0, 120.0)
    later = table.view(100.0 + STUCK)
    assert [one["name"] for one in later["help"]] == ["L2", "L1", "L0"]
    assert [one["minutes"] for one in later["help"]] == [5, 5, 5]
    assert later["misconceptions"] == [{"exercise": "rank", "name": "off by one", "message": "", "count": 3}]
    assert later["advice"] == [{"exercise": "rank", "kind": "hint", "count": 3, "of": 5}]
    for n in (0, 1):
        table.update(learners[n], {"rank": Status("passed", 200.0)}, 200.0, 200.0)
    table.update(learners[4], {"rank": Status("passed", 200.0)}, 200.0, 200.0)
    table.remove(learners[3])
    assert table.view(210.0)["advice"] == [{"exercise": "rank", "kind": "go on", "count": 3, "of": 4}]
    gone = table.view(AWAY + 300.0)
    assert gone["help"] == gone["misconceptions"] == gone["advice"] == []
    assert all(row["away"] for row in gone["learners"])


def test_a_mistake_of_the_bank_is_explained_as_the_check_explains_it(room: RunningRoom) -> None:
    from lora_from_scratch.checks.bank import wrong_answers

    answer = next(answer for answer in wrong_answers("rank") if answer.message)
    room.join(0, "Ada")
    room.report(0, rank=status("failed", misconception=answer.name))
    assert room.view()["misconceptions"][0]["message"] == answer.message


def test_the_busiest_unit_is_where_most_learners_are(room: RunningRoom) -> None:
    assert room.view()["unit"] == "00"
    for number in range(3):
        room.join(number, "Ada")
        room.report(number, **{"rank" if number else "tensor_bytes": status("passed")})
    assert room.view()["unit"] == "01"


# --- Who else sees nothing -----------------------------------------------------------------------------------


def cookie(room: RunningRoom) -> str:
    code_status, _, answer = room.request("GET", f"/?key={room.room.key}")
    assert (code_status, answer.headers["Location"]) == (303, "/")
    assert {"HttpOnly", "SameSite=strict"} <= set(answer.headers["Set-Cookie"].split("; "))
    return answer.headers["Set-Cookie"].partition(";")[0]


def test_the_page_is_for_who_has_the_key(room: RunningRoom) -> None:
    code_status, page, answer = room.request("GET", "/", headers={"Cookie": cookie(room)})
    assert code_status == 200
    assert "<!DOCTYPE html>" in page
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert room.room.key not in page
    for path in ("/", "/?key=", "/?key=wrong", "/events"):
        refused, text, _ = room.request("GET", path)
        assert refused == 403
        assert "<" not in str(text)
    assert room.post("/remove", {"number": 1})[0] == 403


def test_the_events_come_when_something_changes(room: RunningRoom) -> None:
    seen: list[Any] = []
    with socket.create_connection(("127.0.0.1", room.port), timeout=60) as stream:
        stream.sendall(f"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {cookie(room)}\r\n\r\n".encode())
        received = b""
        while len(seen) < 2:
            piece = stream.recv(2**20)
            assert piece, received
            received += piece
            seen = re.findall(rb"data: (.*)\n\n", received)
            if len(seen) == 1 and not room.table.learners:
                room.join(0, "Ada")
    first, second = map(json.loads, seen)
    assert first["learners"] == []
    assert [row["name"] for row in second["learners"]] == ["Ada"]
    assert second["invitation"] == f"{CODE}@127.0.0.1:{room.port}"


def test_a_page_elsewhere_can_neither_join_nor_read_nor_remove(room: RunningRoom) -> None:
    room.join(0, "Ada")
    number = room.view()["learners"][0]["number"]
    body = {"code": CODE, "name": "Eve", "token": TOKENS[5]}
    here, elsewhere = f"http://127.0.0.1:{room.port}", "http://evil.example"
    assert room.post("/join", body, Origin=elsewhere)[0] == 403
    assert room.post("/join", body, Origin=here)[0] == 403
    assert room.post("/join", body, Sec_Fetch_Site="cross-site")[0] == 403
    assert room.post("/join", body, Content_Type="text/plain")[0] == 415  # what a page may send without asking first
    assert room.post("/join", body, Host="evil.example")[0] == 400  # DNS rebinding
    own = {"Cookie": cookie(room)}
    assert room.request("GET", "/", headers=own | {"Host": "evil.example"})[0] == 400
    assert room.request("GET", "/events", headers=own | {"Origin": elsewhere})[0] == 403
    assert room.request("GET", "/events", headers=own | {"Sec-Fetch-Site": "same-site"})[0] == 403
    assert room.post("/remove", {"number": number}, Origin=elsewhere, **own)[0] == 403
    assert names(room) == ["Ada"]
    assert room.post("/remove", {"number": number}, Origin=here, **own)[0] == 200
    assert names(room) == []


# --- The command ---------------------------------------------------------------------------------------------


def test_what_is_kept_can_be_continued_and_has_no_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "room.json"
    with open_room("01", keep=file) as room:
        for number, name in enumerate(["Ada", "Grace"]):
            room.join(number, name)
            room.report(number, rank=status("failed", misconception="off by one", hints=2))
        before = room.view()["learners"]
    assert TOKENS[0] not in file.read_text()
    table = Table(find_units(["01"]))
    assert restore(table, file) == CODE
    assert table.view(time.time())["learners"] == before
    assert table.find(TOKENS[1]) is not None
    assert table.join(TOKENS[2], "Ada", 0.0).number == 3
    assert restore(Table(find_units(["01"])), tmp_path / "none.json") == ""
    file.write_text(file.read_text()[:-20])
    assert complaint("room", "--keep", file, "--host", "127.0.0.1").endswith("give --keep another file")


def test_without_keep_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "write_json", None)
    with open_room("01") as room:
        room.join(0, "Ada")
    assert room.table.learners


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["99"], "there is no unit '99'"),
        (["--host", "0.0.0.0"], "not all (0.0.0.0)"),
        (["--host", "room.example"], "--host must be an IPv4 address"),
        (["--host", "198.51.100.77"], "cannot listen at 198.51.100.77"),
        (["--seats", "0"], "--seats must be at least 1"),
        (["--keep", "/dev/null/room.json"], "cannot write to"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments: list[str], said: str) -> None:
    assert said in complaint("room", *arguments)


def test_a_public_address_is_used_only_if_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Probe(socket.socket):
        def connect(self, address: Any) -> None: ...
        def getsockname(self) -> Any:
            return ("8.8.8.8", 1)

    monkeypatch.setattr(socket, "socket", Probe)
    with pytest.raises(ValueError, match="is public"):
        find_address(None)
    assert find_address("8.8.8.8") == "8.8.8.8"
    assert "public address" in capsys.readouterr().err


def test_it_listens_at_the_address_that_it_prints_and_for_the_teacher_only() -> None:
    opened = listen("127.0.0.2", 0)
    try:
        assert [one.getsockname()[0] for one in opened] == ["127.0.0.2", "127.0.0.1"]
        assert len({one.getsockname()[1] for one in opened}) == 1
    finally:
        for one in opened:
            one.close()


def test_forty_at_once_all_join_with_different_names(room: RunningRoom) -> None:
    threads = [threading.Thread(target=room.join, args=(number, "Ada")) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: len(names(room)) == 40)
    assert set(names(room)) == {"Ada", *(f"Ada {number}" for number in range(2, 41))}


def test_the_command_opens_a_room_and_closes_it_again(tmp_path: Path) -> None:
    file = tmp_path / "room.json"
    command = [sys.executable, "-m", "lora_from_scratch", "room", "01", "--host", "127.0.0.1", "--port", "0"]
    running = subprocess.Popen(
        [*command, "--no-browser", "--keep", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        said = read_until(running, "Stop with")
        found = re.search(r'join\("(\S+)", "your name"\)', said)
        assert found, said
        place = read_invitation(found[1])
        member.post(place.address, place.port, "/join", {"code": place.code, "name": "Ada", "token": TOKENS[0]})
        page = re.search(rf"http://127.0.0.1:{place.port}/\?key=\S+", said)
        assert page, said
        running.send_signal(signal.SIGINT)
        rest, errors = running.communicate(timeout=120)
        assert (running.returncode, rest, errors) == (0, "", "The room is closed.\n")
    finally:
        running.kill()
    assert [learner["name"] for learner in json.loads(file.read_text())["learners"]] == ["Ada"]


def read_until(running: subprocess.Popen[str], start: str) -> str:
    """What a process has printed up to a line that starts so."""
    said = ""
    for line in iter(running.stdout.readline, ""):  # type: ignore[union-attr]
        said += line
        if line.startswith(start):
            break
    return said
