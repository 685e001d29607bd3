"""A class with hostile and broken submissions among honest ones, graded by the command as it is.

`attacks.py` and `attacks_on_grading.py` say what each of them does. All are graded in one run, as in a real class; the
tests look at the result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_from_scratch.grading.summary import Summary
from tests import attacks_on_grading
from tests.attacks import COUNTER, FULL, MARK, RIGHT, SECRETS, SOLVED, Attack
from tests.grading_course import NAME, GradingCourse, template
from tests.sandboxes import needs_bubblewrap

pytestmark = needs_bubblewrap
MARKER = "tests.attacks_marker:mark_file"
HONEST = 30
ATTACKS = attacks_on_grading.ATTACKS

# Right in different ways, loud, and slow to be quiet about it.
ROOTS = [
    RIGHT,
    RIGHT.replace("x.double().sqrt() * 4", "(16 * x.double()).sqrt()"),
    "import warnings\nwarnings.warn('loud')\nprint('loud')\n" + RIGHT,
    "import sys\nprint('to stderr', file=sys.stderr)\n" + RIGHT.replace("return", "print('inside'); return"),
    "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\n" + RIGHT,
]
COUNTERS = [COUNTER, COUNTER.replace("self.count = (self.count + 1)", "self.count = (1 + self.count)")]
REFUSES = 'raise ValueError("below zero")'


@dataclasses.dataclass(frozen=True)
class Class:
    course: GradingCourse
    summary: Summary
    port: socket.socket
    outside: dict[str, str]

    def points(self, learner: str) -> dict[str, float]:
        return {name: verdict["points"] for name, verdict in self.course.record(learner)["verdicts"].items()}


def learner_of(attack: Attack) -> str:
    return attack.name.replace(" ", "-").replace(",", "").replace("'", "")


def honest() -> Iterator[tuple[str, dict[str, str], dict[str, float]]]:
    """Thirty learners, each with what nobody else has written, and what it is worth."""
    kinds = itertools.product(ROOTS, COUNTERS, ("all", "part", "guesses wrong"))
    for number, (root, counter, kind) in enumerate(kinds):
        answers, points = SOLVED | {"fourfold_root": root, "Counter": counter}, dict(FULL)
        if kind == "part":
            answers["fourfold_root"], points["check-fourfold_root"] = root.replace(REFUSES, "return x"), 2.0
        if kind == "guesses wrong":
            answers["guess_root"], points["check-guess_root"] = 'guess_root = "a"', 0.0
        yield f"honest-{number:02}", answers, points


def fingerprints(root: Path) -> dict[str, str]:
    """Of the files that no submission may touch."""
    folders = ("solutions", "notebooks", "course", "library", "units", "answers", "submitted")
    files = [file for folder in folders for file in sorted((root / folder).rglob("*")) if file.is_file()]
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if not file.is_symlink() and "__pycache__" not in file.parts
    }


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Class]:
    with template(tmp_path_factory.mktemp("attacked")) as course, socket.create_server(("127.0.0.1", 0)) as port:
        hostile = iter(ATTACKS)
        for learner, answers, _ in honest():  # mixed, so that workers have both
            course.hand_in(learner, **answers)
        for attack in hostile:
            number = str(port.getsockname()[1])
            folder = course.hand_in(
                learner_of(attack), **{name: text.replace("PORT", number) for name, text in attack.answers.items()}
            )
            if attack.change:
                attack.change(folder)
        (course.root / "submitted" / "honest-00" / "notes.txt").write_text("THE-OTHERS-WORK")
        (course.root / "GRADEBOOK-IS-HERE").write_text("GRADEBOOK-IS-HERE")
        before = fingerprints(course.root)
        summary = course.grade(marker=MARKER, isolation="bubblewrap", workers=2)
        yield Class(course, summary, port, before)


@pytest.mark.parametrize("attack", ATTACKS, ids=learner_of)
def test_a_hostile_or_broken_submission_earns_exactly_what_is_right_in_it_and_is_told_why(
    graded: Class, attack: Attack
) -> None:
    learner = learner_of(attack)
    record = graded.course.record(learner)
    assert graded.points(learner) == attack.points
    for name, verdict in record["verdicts"].items():
        if not verdict["points"] and name.removeprefix("check-") in attack.answers:
            assert verdict["message"] or record["findings"], name
    said = graded.course.scores(learner)
    assert {name: said[name][0] for name in attack.points} == attack.points


@pytest.mark.parametrize("attack", ATTACKS, ids=learner_of)
def test_it_has_seen_nothing_of_the_others_and_of_the_answers(graded: Class, attack: Attack) -> None:
    folder = graded.course.root
    files = [folder / "graded" / learner_of(attack) / f"{NAME}.json"]
    files += (folder / "autograded" / learner_of(attack)).rglob("*.ipynb")
    for file in files:
        text = file.read_text()
        written = "".join(attack.answers.values())
        assert [secret for secret in SECRETS if secret in text and secret not in written] == []


@pytest.mark.parametrize(("learner", "answers", "points"), list(honest()), ids=[name for name, *_ in honest()])
def test_an_honest_submission_keeps_its_exact_points(
    graded: Class, learner: str, answers: dict[str, str], points: dict[str, float]
) -> None:
    assert graded.points(learner) == points
    record = graded.course.record(learner)
    assert record["findings"] == []
    said = graded.course.scores(learner)
    assert {name: said[name][0] for name in points} == points


def test_all_submissions_were_graded_in_the_sandbox(graded: Class) -> None:
    assert len(ATTACKS) >= 100
    assert len({str(answers) for _, answers, _ in honest()}) == HONEST
    assert len(graded.summary.rows) == len(ATTACKS) + HONEST
    assert (graded.summary.failed, graded.summary.isolation) == (0, "bubblewrap")
    assert all(row.trouble == () for row in graded.summary.rows if row.learner.startswith("honest"))


def test_nothing_outside_was_written(graded: Class) -> None:
    assert fingerprints(graded.course.root) == graded.outside
    places = [Path("/"), Path("/etc"), Path("/usr"), Path("/tmp"), Path("/dev"), Path.home(), graded.course.root]
    assert [place for place in places if (place / "lfs-was-here").exists()] == []
    assert [place for place in places if list(place.glob("filler-*"))] == []


def test_nobody_has_called_from_inside(graded: Class) -> None:
    graded.port.settimeout(0.1)
    with pytest.raises(TimeoutError):
        graded.port.accept()


def test_nothing_is_running_afterwards(graded: Class) -> None:
    left = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path("/proc", process, "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if MARK in command or (str(graded.course.root) in command and "bwrap" in command):
            left.append(command)
    assert left == []
