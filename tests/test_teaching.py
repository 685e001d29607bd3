"""The page about what a class teaches: which hint, sentence or diagnosis to improve."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")

from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.progress_file import Entry
from lora_from_scratch.checks.verdict import CaseResult, Failure, Verdict
from lora_from_scratch.grading.report import as_html
from lora_from_scratch.grading.tasks import unit_of
from lora_from_scratch.grading.teaching import group, sections, study, suggestions
from tests.cli_calls import complaint, output_of
from tests.grading_course import NAME, RIGHT, GradingCourse, template

ORDER = unit_of("01").exercises[:3]
FIRST, SECOND, _ = ORDER
PASSED = Verdict(SECOND.name, "passed", SECOND.points, SECOND.points)


def wrong(got: str, misconception: str = "", sentence: str = "Rank 0 is allowed.") -> Verdict:
    cases = (CaseResult("easy", "numbers", True), CaseResult("hard", "numbers", False))
    failure = Failure("hard", {"x": "1"}, got, "2", sentence=sentence)
    return Verdict(SECOND.name, "failed", 0.0, SECOND.points, cases, 7, failure, misconception, "You forgot it.")


def entry(tries: int, hints: int = 0, minutes: int | None = 10) -> dict[str, Entry]:
    """A learner who has passed the first exercise at noon, and the second so many minutes later or never."""
    passed = None if minutes is None else f"2026-05-01T12:{minutes:02}:00+02:00"
    first = Entry(1, 0, 1, 1, "2026-05-01T12:00:00+02:00", "2026-05-01T12:00:00+02:00")
    return {FIRST.name: first, SECOND.name: Entry(tries, hints, 0, 1, passed, passed or first.passed)}


def words(verdicts: list[Verdict], progress: list[dict[str, Entry]]) -> list[tuple[str, str]]:
    found = study(SECOND, [{f"check-{SECOND.name}": verdict} for verdict in verdicts], progress, ORDER)
    return suggestions(found)


def test_wrong_answers_that_behave_alike_are_one_group() -> None:
    alike = group([wrong("1"), wrong("1"), wrong("3"), dataclasses.replace(wrong("1"), cases=())])
    assert [(one.got, one.count, one.failing) for one in alike] == [
        ("1", 2, ("hard",)),
        ("1", 1, ()),
        ("3", 1, ("hard",)),
    ]
    advice = words([wrong("1")] * 3 + [PASSED] * 7, [])
    assert ("a wrong answer for the bank", "3 answers behave alike without a diagnosis (`hard`: 1)") in advice


def test_a_common_misconception_points_to_its_message_and_a_sentence_to_itself() -> None:
    advice = dict(words([wrong("1", "forgets it")] * 4 + [PASSED] * 6, []))
    assert advice["the message about “forgets it”"] == "4 of 10 still hand it in"
    assert advice["the sentence “Rank 0 is allowed.”"] == "4 answers fail on it"
    assert not any("bank" in what for what in advice)


def test_a_hint_after_which_few_get_on_is_named() -> None:
    progress = [entry(4, 3)] * 8 + [entry(2, 1)]
    advice = dict(words([PASSED] * 9, progress))
    named = {what.split(":")[0]: why for what, why in advice.items()}
    assert named["hint 1"] == "of 9 who opened it, 1 pass without the next one"
    assert named["hint 2"] == "of 8 who opened it, 0 pass without the next one"
    assert "hint 3" not in named
    stuck = dict(words([PASSED], [entry(4, 3, None)] * 3 + [entry(2, 3)]))
    assert "of 4 who opened it, 1 pass" in stuck.values()


def test_tries_and_times_are_those_of_the_progress() -> None:
    found = study(SECOND, [], [entry(1, 0, 8), entry(3, 1, 30), entry(2, 2, None), {}], ORDER)
    assert (found.tries, found.stuck, found.hints) == ([1, 3], 1, [(0, True), (1, True), (2, False)])
    assert found.minutes == [8, 30]
    slow = dict(words([PASSED] * 3, [entry(1, 0, min(59, 2 * SECOND.minutes + 1))] * 3))
    if 2 * SECOND.minutes < 58:
        assert "the minutes, or the statement" in slow


def test_little_evidence_suggests_nothing() -> None:
    assert words([wrong("1"), wrong("2", "forgets it", ""), *[PASSED] * 30], [entry(4, 3, None)] * 2) == []


def a_class(count: int) -> tuple[list[dict[str, Verdict]], list[dict[str, Entry]]]:
    draw = random.Random(0)
    choices = [PASSED] * 6 + [wrong("1", "forgets it"), wrong("0"), wrong("NaN <b>"), wrong("5")]
    verdicts = []
    for _ in range(count):
        one = {}
        for exercise in unit_of("01").exercises:
            seen = draw.choice(choices)
            points = float(exercise.points) if seen.passed else draw.choice([0, 0.5]) * exercise.points
            one[f"check-{exercise.name}"] = dataclasses.replace(
                seen, exercise=exercise.name, points=points, max_points=exercise.points
            )
        verdicts.append(one)
    return verdicts, [
        entry(draw.randrange(1, 6), draw.randrange(4), draw.choice([None, 5, 20, 40])) for _ in range(count // 2)
    ]


def page(count: int) -> str:
    verdicts, progress = a_class(count)
    exercises: tuple[Exercise, ...] = unit_of("01").exercises
    found = [study(exercise, verdicts, progress, exercises) for exercise in exercises]
    return as_html("Unit 01: Rank. What the class teaches", sections(found, count, len(progress)))


def test_the_page_is_as_long_for_six_hundred_learners_as_for_forty() -> None:
    small, large = page(40), page(600)
    assert abs(large.count("<tr>") - small.count("<tr>")) < 0.3 * small.count("<tr>")
    assert "600 submissions that could be read; the progress of 300 learners is known" in large
    assert "NaN &lt;b&gt;" in large
    assert re.search(r'class="number share" style="--share: \d+%"', large)


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradingCourse]:
    with template(tmp_path_factory.mktemp("course") / "course") as made:
        for number in range(4):
            made.hand_in(f"secret name {number}", **(RIGHT | {"fourfold_root": "half"}))
        yield made


def test_the_command_reads_progress_that_was_handed_in_and_names_nobody(course: GradingCourse, tmp_path: Path) -> None:
    assert "has been graded; run `grade` first" in complaint("teaching", "99", "--course", course.root)
    course.grade()
    folders = [course.root / "submitted" / f"secret name {number}" / NAME for number in range(4)]
    passed = {"attempts": 3, "hints": 2, "points": 4.0, "max_points": 4.0, "passed": "2026-05-01T12:00:00"}
    document = {"version": 2, "exercises": {"fourfold_root": passed, "broken": {"attempts": -1}}}
    (folders[0] / "progress.json").write_text(json.dumps(document))
    (folders[1] / "progress.json").write_text("[" * 100_000)
    (folders[2] / "progress.json").symlink_to(folders[0] / "progress.json")
    (tmp_path / "secret name 3.json").write_text(json.dumps(document))
    path = course.root / "reports" / f"{NAME}-teaching.html"
    assert output_of("teaching", "99", "--course", course.root, "--progress", tmp_path) == f"report: {path}\n"
    text = path.read_text()
    assert "4 submissions that could be read; the progress of 2 learners is known" in text
    assert "the message about “half”" in text
    assert "4 of 4 still hand it in" in text
    assert "secret name" not in text
    assert "there is no folder" in complaint("teaching", "99", "--course", course.root, "--progress", tmp_path / "none")
