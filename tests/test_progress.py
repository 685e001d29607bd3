"""Progress: kept on this computer, never in the way, and nothing of it lost."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_from_scratch.checks import progress_file
from lora_from_scratch.checks.progress_file import Entry, load, open_hint, record, took_library
from lora_from_scratch.checks.progress_report import report
from lora_from_scratch.checks.units import find, units
from lora_from_scratch.checks.verdict import Verdict
from lora_from_scratch.support import learner_folder
from tests.cli_calls import complaint, output_of

PASSED = Verdict("row_echelon", "passed", 5, 5)
FAILED = Verdict("row_echelon", "failed", 2.5, 5)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(learner_folder.HOME, str(tmp_path / "home"))
    monkeypatch.delenv(learner_folder.SWITCH, raising=False)
    monkeypatch.setattr(progress_file, "_pending", [])
    monkeypatch.setattr(progress_file, "_unsaved", [])
    return tmp_path / "home"


def test_what_passed_when_and_after_how_many_attempts(home: Path) -> None:
    assert load().entries == {}
    for verdict in (FAILED, Verdict("row_echelon", "stopped", 0, 5), PASSED, FAILED, PASSED):
        assert record(verdict) == []
    entry = load().entries["row_echelon"]
    assert (entry.attempts, entry.points, entry.max_points) == (3, 5, 5)
    assert entry.passed is not None
    assert entry.passed <= (entry.last or "")
    assert json.loads((home / "progress.json").read_text())["version"] == progress_file.VERSION


@pytest.mark.parametrize("status", ["not started", "missing", "library", "unknown", "broken"])
def test_what_is_no_attempt_is_not_recorded(home: Path, status: str) -> None:
    record(Verdict("row_echelon", status, 0, 5))
    assert not home.exists()


def test_hints_are_counted_up_to_the_last() -> None:
    assert [open_hint("rank", 3) for _ in range(5)] == [1, 2, 3, 3, 3]
    took_library("rank")
    assert load().entries["rank"] == Entry(hints=3, library=True)


def test_switched_off_or_while_building_nothing_is_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in ((learner_folder.SWITCH, "off"), (learner_folder.BUILDING, "1")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            patch.setattr(progress_file, "_unsaved", [])
            record(PASSED)
            assert [open_hint("rank", 3) for _ in range(2)] == [1, 2]
            assert load().entries["row_echelon"].passed
    assert not home.exists()
    assert load().entries == {}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"version": 1}', b'{"version": 1, "exercises": []}', b"[" * 100_000],
)
def test_a_damaged_file_is_set_aside_and_said_in_one_line(home: Path, content: bytes) -> None:
    home.mkdir()
    (home / "progress.json").write_bytes(content)
    said = record(PASSED)
    (aside,) = home.glob("progress.damaged-*.json")
    assert aside.read_bytes() == content
    assert said == [f"Your progress file is damaged. It was moved to {aside}, and a new one is started."]
    assert load().entries["row_echelon"].passed
    assert load().notes == []


@pytest.mark.parametrize(
    "bad",
    [
        3,
        {"attempts": -1},
        {"attempts": True},
        {"attempts": 1.5},
        {"points": "5"},
        {"points": float("nan")},
        {"passed": 5},
        {"passed": "yesterday"},
        {"library": "no"},
        {"unknown": 1},
    ],
)
def test_what_is_sound_in_a_damaged_file_is_kept(home: Path, bad: Any) -> None:
    record(PASSED)
    document = json.loads((home / "progress.json").read_text())
    document["exercises"]["rank"] = bad
    (home / "progress.json").write_text(json.dumps(document))
    damaged = (home / "progress.json").read_bytes()
    progress = load()
    assert list(progress.entries) == ["row_echelon"]
    assert "the 1 valid entry is kept" in progress.notes[0]
    (aside,) = home.glob("progress.damaged-*.json")
    assert aside.read_bytes() == damaged
    assert load().notes == []


def test_two_damaged_files_in_one_second_are_both_kept(home: Path) -> None:
    home.mkdir()
    for content in ("{one", "{two"):
        (home / "progress.json").write_text(content)
        load()
    assert sorted(file.read_text() for file in home.glob("progress.damaged-*")) == ["{one", "{two"]


def test_the_file_of_a_newer_version_is_left_as_it_is(home: Path) -> None:
    home.mkdir()
    newer = '{"version": 99, "exercises": {"rank": {"stars": 5}}}'
    (home / "progress.json").write_text(newer)
    assert "newer" in record(PASSED)[0]
    assert (home / "progress.json").read_text() == newer
    assert load().entries["row_echelon"].passed  # for as long as the kernel lives


@pytest.mark.parametrize("obstacle", ["home is a file", "progress is a folder", "cannot write"])
def test_a_place_that_cannot_be_written_is_no_error(home: Path, obstacle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if obstacle == "home is a file":
        home.write_text("")
    elif obstacle == "progress is a folder":
        (home / "progress.json").mkdir(parents=True)
        (home / "progress.json" / "something").write_text("")
        monkeypatch.setattr(progress_file.os, "replace", _refuse)
    else:
        monkeypatch.setattr(progress_file, "write_json", _refuse)
    record(FAILED)
    record(PASSED)
    assert load().entries["row_echelon"].attempts == 2
    assert open_hint("rank", 3) == 1
    assert open_hint("rank", 3) == 2
    assert report()[0]


def _refuse(*arguments: Any) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_lock_that_nobody_gives_back_costs_seconds_and_no_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_file, "PATIENCE", 0.05)
    with progress_file._locked():
        record(FAILED)
        assert not progress_file.path().exists()
        assert load().entries["row_echelon"].attempts == 1
        assert not load().kept
    record(PASSED)
    progress, _ = progress_file._read()
    assert progress.entries["row_echelon"].attempts == 2  # the one that had to wait is written as well


def _writes_many(home: str, names: list[str]) -> None:
    os.environ[learner_folder.HOME] = home
    for name in names:
        record(Verdict(name, "failed", 0, 1))
        record(Verdict("both", "failed", 0, 1))


def test_two_notebooks_at_once_lose_nothing(home: Path) -> None:
    context = multiprocessing.get_context("fork")
    everything = [[f"{letter}{n}" for n in range(10)] for letter in "ab"]
    writers = [context.Process(target=_writes_many, args=(str(home), names)) for names in everything]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    entries = load().entries
    assert set(entries) == {*everything[0], *everything[1], "both"}
    assert entries["both"].attempts == 20
    assert not list(home.glob("progress.damaged*"))


ENTRIES = st.builds(
    Entry,
    attempts=st.integers(0, 99),
    hints=st.integers(0, 3),
    points=st.floats(0, 10),
    max_points=st.floats(0, 10),
    passed=st.none() | st.datetimes().map(lambda time: time.isoformat()),
    library=st.booleans(),
)


@given(st.dictionaries(st.text(max_size=5), ENTRIES, max_size=4))
def test_what_is_written_is_what_is_read(entries: dict[str, Entry]) -> None:
    with progress_file._locked():
        progress_file._write(progress_file.Progress(entries))
    assert load() == progress_file.Progress(entries)


# --- the report -----------------------------------------------------------------------------------------


def text() -> str:
    tables, notes = report()
    return "\n".join([*(table for _, table in tables), *notes])


def row(name: str) -> list[str]:
    return next(line for line in text().splitlines() if f" {name} " in line).split()


def test_the_report_counts_per_unit_and_per_idea() -> None:
    exercise = find("row_echelon")[1]
    unit = next(unit for unit in units() if unit.number == "01")
    before = row("01")
    assert before[0] == "○"
    assert exercise.idea not in text().split("By idea")[1:]
    record(FAILED)
    record(Verdict("row_echelon", "passed", exercise.points, exercise.points))
    open_hint("row_echelon", 3)
    total = sum(item.points for item in unit.checked)
    line = " ".join(row("01"))
    assert line.startswith("◐ 01")
    assert line.endswith(f"1 of {len(unit.checked)} {exercise.points} of {total} 2 1")
    same_idea = [item for each in units() for item in each.checked if item.idea == exercise.idea]
    ideas = text().split("By idea")[1]
    assert f"{exercise.idea}  1 of {len(same_idea)}" in ideas


def test_a_unit_that_is_done_has_its_mark() -> None:
    for item in units()[0].checked:
        record(Verdict(item.name, "passed", item.points, item.points))
    assert row(units()[0].number)[0] == "✓"


def test_an_exercise_that_the_course_no_longer_has_is_kept_and_not_counted(home: Path) -> None:
    before = text()
    record(Verdict("of_last_year", "passed", 100, 100))
    assert text() == before
    assert "of_last_year" in load().entries


def test_the_command_shows_the_same() -> None:
    record(PASSED)
    assert output_of("progress").strip() == "\n\n".join([*(table for _, table in report()[0]), "\n".join(report()[1])])
    assert "✓ row_echelon" in output_of("progress", "1")
    assert "passed on 20" in output_of("progress", "unit_01")
    assert complaint("progress", "88").startswith("error: there is no unit '88'; the units are 00, 01")
