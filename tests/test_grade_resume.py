"""A grading that is killed, again and again, ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")

from lora_from_scratch.grading.keys import REASONS
from tests.grading_course import NAME, RIGHT, GradingCourse, template
from tests.stand_in_marker import SLOW

LEARNERS = [f"learner {number:02}" for number in range(10)]
KILLS = 10


def graded_before(course: GradingCourse) -> None:
    """A class that was graded once, a person has graded too, and most have handed in again since."""
    for number, learner in enumerate(LEARNERS):
        course.hand_in(learner, "2026-05-01 12:00:00 UTC", **RIGHT, why_count=f"Because of {number}.")
    course.grade()
    for number, learner in enumerate(LEARNERS):
        course.give(learner, "why_count", number / 4, f"Comment {number}.")
        changed = {"why_count": f"Because of {number}, again."} if number % 3 else {"fourfold_root": "half"}
        if number % 4:
            course.hand_in(learner, "2026-05-02 12:00:00 UTC", **(RIGHT | changed))


def start(course: GradingCourse) -> int:
    """A grading in a process of its own."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    code = 99
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        code = course.grade(workers=2, feedback=True).code
    finally:
        os._exit(code)


def is_over(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG)[0] != 0


def test_a_grading_killed_at_ten_random_moments_ends_with_the_gradebook_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SLOW, "0.05")
    with template(tmp_path / "course") as course:
        graded_before(course)
        undisturbed, disturbed = (course.copy(tmp_path / name) for name in ("undisturbed", "disturbed"))
        began = time.monotonic()
        expected = undisturbed.grade(workers=2, feedback=True)
        took = time.monotonic() - began
        moments, hit = random.Random(20260514), 0
        for _ in range(KILLS):
            child = start(disturbed)
            until = time.monotonic() + moments.uniform(0, took / 3)
            while time.monotonic() < until and not is_over(child):
                time.sleep(0.005)
            try:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                hit += 1
            except (ProcessLookupError, ChildProcessError):
                pass  # it had ended before
        ended = disturbed.grade(workers=2, feedback=True)
    assert hit >= KILLS / 2
    assert disturbed.rows() == undisturbed.rows()
    for folder in ("graded", "autograded", "feedback"):
        assert contents(disturbed.root / folder) == contents(undisturbed.root / folder)
    assert {row.learner: differences(row) for row in ended.rows} == {
        row.learner: differences(row) for row in expected.rows
    }
    again = [row.learner for row in ended.rows if REASONS["submission"] in row.why]
    assert len(again) == sum(1 for number in range(len(LEARNERS)) if number % 4)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, with nothing left over from a killed process."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != f".{NAME}.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def differences(row: Any) -> tuple[Any, ...]:
    return row.previous, row.why, row.entry
