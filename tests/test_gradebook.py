"""The gradebook: what nbgrader would write is written, and nothing that a person did is lost."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")

from lora_from_scratch.grading import formgrader
from lora_from_scratch.grading.graded import Finding, Graded
from tests.grading_course import NAME, RIGHT, GradingCourse, template
from tests.stand_in_marker import HALF


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradingCourse]:
    with template(tmp_path_factory.mktemp("template") / "course") as made:
        yield made


@pytest.fixture
def course(empty: GradingCourse, tmp_path: Path) -> GradingCourse:
    return empty.copy(tmp_path / "course")


def test_points_comments_and_open_questions_are_entered_as_nbgrader_would(course: GradingCourse) -> None:
    course.hand_in("ada", **RIGHT, guess_number="guess_number = 17", why_count="To know how many.")
    course.hand_in("bob", fourfold_root="def fourfold_root(x): half")
    summary = course.grade()
    assert course.scores("ada") == {
        "check-fourfold_root": (4, None, None, False),
        "check-Counter": (2, None, None, False),
        "check-guess_root": (1, None, None, False),
        "check-guess_number": (2, None, None, False),
        "why_count": (None, None, None, True),
    }
    assert course.scores("bob")["check-fourfold_root"] == (2, None, None, False)
    assert course.scores("bob")["why_count"] == (0, None, None, False)
    assert course.comments("bob")["fourfold_root"] == (None, None)
    assert course.comments("bob")["Counter"] == ("No response.", None)
    assert [(row.learner, row.entry.score, row.entry.max_score) for row in summary.rows] == [
        ("ada", 9, 12),
        ("bob", 2, 12),
    ]
    assert summary.code == 1  # a person has to read ada's answer


def test_scores_and_comments_of_a_person_survive_a_second_grading(course: GradingCourse) -> None:
    course.hand_in("ada", **RIGHT, why_count="To know how many.")
    course.grade()
    course.give("ada", "why_count", 2.5, "Good.")
    course.give("ada", "check-Counter", 1.0)
    before = course.rows()
    assert course.grade(again=True).code == 0  # all is decided now
    assert course.rows() == before
    assert course.scores("ada")["why_count"] == (None, 2.5, None, False)


def test_an_answer_that_changed_after_it_was_graded_by_hand_asks_for_a_person_again(course: GradingCourse) -> None:
    course.hand_in("ada", **RIGHT, why_count="To know how many.")
    course.hand_in("bob", **RIGHT, why_count="To know how many.")
    course.grade()
    for learner in ("ada", "bob"):
        course.give(learner, "why_count", 2.5, "Good.")
    course.hand_in("ada", **RIGHT, why_count="I have changed my mind.")
    summary = course.grade()
    assert course.scores("ada")["why_count"] == (None, 2.5, None, True)
    assert course.comments("ada")["why_count"] == (None, "Good.")
    assert course.scores("bob")["why_count"] == (None, 2.5, None, False)
    assert [row.learner for row in summary.rows if row.needs_a_human] == ["ada"]
    course.grade()  # nothing has changed, and nobody has looked
    assert course.scores("ada")["why_count"] == (None, 2.5, None, True)


def test_an_open_formgrader_shows_what_was_entered_after_it_read_the_gradebook(
    course: GradingCourse, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbgrader.api import Gradebook
    from nbgrader.server_extensions.formgrader.base import BaseHandler

    class Request(BaseHandler):
        def __init__(self) -> None:
            self.application = types.SimpleNamespace(settings={"nbgrader_gradebook": opened})

    monkeypatch.setitem(sys.modules, formgrader.MODULE, types.SimpleNamespace(BaseHandler=Request))
    formgrader.read_gradebook_anew()
    course.hand_in("ada", **RIGHT, why_count="To know how many.")
    course.grade()
    with Gradebook(course.url) as opened:
        first = Request()
        shown = first.gradebook.find_grade("why_count", NAME, NAME, "ada")
        shown.manual_score, shown.needs_manual_grade = 2.5, False
        first.gradebook.db.commit()  # the same request still has its change
        assert Request().gradebook.find_grade("why_count", NAME, NAME, "ada").manual_score == 2.5
        course.hand_in("ada", **RIGHT, why_count="I have changed my mind.")
        course.grade()
        assert Request().gradebook.find_grade("why_count", NAME, NAME, "ada").needs_manual_grade
        assert shown.needs_manual_grade


def test_an_answer_that_is_shown_as_text_only_is_no_other_answer_the_next_time(course: GradingCourse) -> None:
    course.hand_in("ada", **RIGHT, why_count="To know how many. <script>")
    course.grade()
    course.give("ada", "why_count", 2.5)
    course.grade(again=True)
    assert course.scores("ada")["why_count"] == (None, 2.5, None, False)


def test_points_that_a_person_set_are_put_before_the_person_when_the_code_or_the_automatic_points_change(
    course: GradingCourse,
) -> None:
    course.hand_in("ada", fourfold_root="half")
    course.grade()
    course.give("ada", "check-fourfold_root", 4.0)
    course.hand_in("ada", fourfold_root="half, with a comment more")
    course.grade()
    assert course.scores("ada")["check-fourfold_root"] == (2, 4, None, True)


def test_what_grading_could_not_decide_asks_for_a_person_and_is_said_in_a_comment(course: GradingCourse) -> None:
    course.hand_in("ada", **(RIGHT | {"Counter": "doubtful", "guess_root": "twice"}))
    assert course.grade().code == 1
    scores = course.scores("ada")
    assert scores["check-Counter"] == (2, None, None, True)
    assert scores["check-fourfold_root"][3] is False
    assert course.comments("ada")["Counter"][0] == "We are not sure about this."
    assert "&lt;b>one" in course.comments("ada")["guess_root"][0]


def test_a_comment_of_grading_holds_no_control_characters_and_no_markup(course: GradingCourse) -> None:
    course.hand_in("ada", **RIGHT)
    course.grade()
    record = course.root / "graded" / "ada" / f"{NAME}.json"
    graded = Graded.from_json(record.read_text())
    finding = Finding("ending", "lost", "Counter", "It raised `E`: \x00\x1b[2J\u202e<!--><img src=x onerror=x>-->")
    record.write_text(dataclasses.replace(graded, findings=(finding,)).to_json())
    course.grade()
    assert course.comments("ada")["Counter"] == (
        "It raised `E`: \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}\\[2J\N{REPLACEMENT CHARACTER}"
        "&lt;!-->&lt;img src=x onerror=x>-->",
        None,
    )


def test_a_submission_is_entered_whole_or_not_at_all(course: GradingCourse, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_from_scratch.grading.gradebook import UnitGradebook

    course.hand_in("ada", **RIGHT)
    course.grade()
    before = course.rows()
    course.hand_in("ada", fourfold_root="half")
    course.hand_in("bob", **RIGHT)

    def breaks(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(UnitGradebook, "_enter_comments", breaks)
    with pytest.raises(KeyboardInterrupt):
        course.grade()
    assert course.rows() == before


def late(duedate: str) -> Any:
    def act(gradebook: Any) -> None:
        gradebook.update_or_create_assignment(NAME, duedate=duedate)

    return act


def test_whoever_is_late_loses_what_the_courses_policy_says(course: GradingCourse) -> None:
    config = course.root / "course" / "nbgrader_config.py"
    config.write_text(config.read_text() + "\nc.LatePolicy.grace_hours = 0\nc.LatePolicy.days = 0\n")
    course.hand_in("ada", "2026-05-01 12:00:00 UTC", **RIGHT)
    course.hand_in("bob", "2026-05-03 12:00:00 UTC", **RIGHT)
    course.grade()
    course.as_a_person(late("2026-05-02 12:00:00 UTC"))
    rows = {row.learner: row.entry for row in course.grade().rows}
    assert (rows["ada"].score, rows["ada"].penalty) == (7, 0)
    assert (rows["bob"].score, rows["bob"].penalty, rows["bob"].late_seconds) == (7, 1.4, 24 * 3600)
    course.as_a_person(lambda gradebook: gradebook.grant_extension(NAME, "bob", days=2))
    rows = {row.learner: row.entry for row in course.grade().rows}
    assert (rows["bob"].score, rows["bob"].penalty) == (7, 0)


def test_late_days_are_spent_in_the_order_of_handing_in(course: GradingCourse) -> None:
    """Three days for the term: of 2 + 2 late days before this unit, a learner can pay three."""

    def other_units(gradebook: Any) -> None:
        gradebook.update_or_create_assignment(NAME, duedate="2026-05-02 12:00:00 UTC")
        for unit, due, handed_in in (
            ("unit_01", "2026-04-01 12:00:00 UTC", "2026-04-03 13:00:00 UTC"),  # 2 days and the hour of grace
            ("unit_02", "2026-05-10 12:00:00 UTC", "2026-05-30 12:00:00 UTC"),  # after this one
        ):
            gradebook.add_assignment(unit, duedate=due)
            gradebook.add_submission(unit, "bob", timestamp=handed_in)

    course.hand_in("bob", "2026-05-04 12:00:01 UTC", **RIGHT)
    course.grade()
    course.as_a_person(other_units)
    assert course.grade().rows[0].entry.penalty == pytest.approx(7 * 0.2)  # 2 late days, 1 of which was left


def test_a_time_that_is_none_harms_nobody_and_is_reported(course: GradingCourse, tmp_path: Path) -> None:
    course.hand_in("ada", "yesterday, about noon", **RIGHT)
    folder = course.hand_in("bob", **RIGHT)
    (tmp_path / "secret").write_text("2020-01-01 00:00:00 UTC")
    (folder / "timestamp.txt").symlink_to(tmp_path / "secret")
    summary = course.grade()
    assert ["time of submission is unknown" in " ".join(row.trouble) for row in summary.rows] == [True, True]
    assert [row[2] for row in course.rows()["submitted_assignment"]] == [None, None]
    assert not (course.root / "autograded" / "bob" / NAME / "timestamp.txt").exists()


def test_other_points_for_an_exercise_reach_the_gradebook_and_other_cells_are_refused(course: GradingCourse) -> None:
    course.hand_in("ada", **RIGHT)
    course.grade()
    course.released.write_text(course.released.read_text().replace('"points": 3', '"points": 5'))
    assert [row.entry.max_score for row in course.grade().rows] == [14]
    course.released.write_text(course.released.read_text().replace("check-Counter", "check-Other"))
    with pytest.raises(ValueError, match=r"graded cells of unit_99 have changed .* db assignment remove unit_99"):
        course.grade()


def test_a_gradebook_that_cannot_be_used_is_one_sentence_without_the_password(course: GradingCourse) -> None:
    course.hand_in("ada", **RIGHT)
    (course.root / "gradebook.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(ValueError, match=r"gradebook sqlite:////.* cannot be used: file is not a database"):
        course.grade()
    pytest.importorskip("psycopg")
    with pytest.raises(ValueError, match="cannot be used") as refused:
        course.grade(db="postgresql://me:passw0rd@127.0.0.1:1/none")
    assert "passw0rd" not in str(refused.value)
    with pytest.raises(ValueError, match="URL is invalid"):
        course.grade(db="my gradebook")


def test_misconceptions_are_in_the_stored_verdicts(course: GradingCourse) -> None:
    course.hand_in("bob", fourfold_root="half")
    course.grade()
    assert course.record("bob")["verdicts"]["check-fourfold_root"]["message"] == HALF
