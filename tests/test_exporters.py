"""Exports: nbgrader's own, Canvas and Moodle; from a gradebook on SQLite, and on PostgreSQL."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")

from tests.grading_course import NAME, RIGHT, GradingCourse, template
from tests.postgres import postgres

EXPORTERS = "lora_from_scratch.grading.exporters"


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradingCourse]:
    with template(tmp_path_factory.mktemp("course") / "course") as made:
        fill(made)
        yield made


def fill(course: GradingCourse) -> None:
    def enrol(gradebook: Any) -> None:
        gradebook.add_student("ada", first_name="Ada", last_name="Lovelace", lms_user_id="4711")
        gradebook.add_student("zoe", first_name="Zoë", email="zoe@example.org")

    course.as_a_person(enrol)
    course.hand_in("ada", **(RIGHT | {"fourfold_root": "half"}), why_count="To know how many.")
    course.hand_in("bob, jr.", **RIGHT)
    course.grade()
    course.give("ada", "why_count", 2.25)


def export(course: GradingCourse, *options: str, target: str = "out.csv") -> list[list[str]]:
    """Run `nbgrader export` as an instructor does."""
    command = [sys.executable, "-m", "nbgrader", "export", f"--db={course.url}", f"--to={target}", *options]
    done = subprocess.run(command, cwd=course.root / "course", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (course.root / "course" / target).open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def late(penalty: float | None) -> Any:
    def act(gradebook: Any) -> None:
        gradebook.find_submission_notebook(NAME, NAME, "bob, jr.").late_submission_penalty = penalty

    return act


def test_canvas_gets_its_columns_the_possible_points_and_empty_cells_for_who_handed_in_nothing(
    course: GradingCourse,
) -> None:
    config = course.root / "course" / "nbgrader_config.py"
    before = config.read_text()
    config.write_text(before + f'\nc.GradeExport.columns = {{"{NAME}": "Tiny (48213)"}}\n')
    course.as_a_person(late(1.5))
    rows = export(course, f"--exporter={EXPORTERS}.CanvasExport")
    course.as_a_person(late(None))
    config.write_text(before)
    assert rows == [
        ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "Tiny (48213)"],
        ["    Points Possible", "", "", "", "", "12"],
        ["Lovelace, Ada", "4711", "", "ada", "", "7.25"],
        ["bob, jr.", "", "", "bob, jr.", "", "5.5"],
        ["Zoë", "", "", "zoe", "", ""],
    ]


def test_moodle_gets_the_columns_of_its_own_export(course: GradingCourse) -> None:
    rows = export(course, f"--exporter={EXPORTERS}.MoodleExport", '--student=["ada", "zoe"]')
    assert rows == [
        ["First name", "Last name", "ID number", "Username", "Email address", f"{NAME} (Real)"],
        ["Ada", "Lovelace", "4711", "ada", "", "7.25"],
        ["Zoë", "", "zoe", "zoe", "zoe@example.org", ""],
    ]


def test_what_a_person_has_still_to_decide_is_empty_and_not_zero(course: GradingCourse, tmp_path: Path) -> None:
    there = course.copy(tmp_path / "course")
    there.hand_in("waits", **RIGHT, why_count="To know how many.")
    there.hand_in("doubtful", **(RIGHT | {"Counter": "doubtful"}))
    there.hand_in("dies", fourfold_root="die")
    there.hand_in("zero")
    there.grade()
    for exporter in ("CanvasExport", "MoodleExport", "CsvExport"):
        found = scores(export(there, f"--exporter={EXPORTERS}.{exporter}"))
        assert found == {"waits": "", "doubtful": "", "dies": "", "zero": "0", "zoe": ""}, exporter
    there.give("waits", "why_count", 1)
    assert scores(export(there))["waits"] == "8"


def scores(rows: list[list[str]]) -> dict[str, str]:
    """By learner, what the table has as the score."""
    column = rows[0].index("score") if "score" in rows[0] else len(rows[0]) - 1
    names = ("waits", "doubtful", "dies", "zero", "zoe")
    return {name: row[column].removesuffix(".0") for row in rows for name in names if name in row}


FORMULAS = ("=1+1", "@SUM(1)", "+1", "-1", "\t=1", "\r=1", " =1", "x;=1", "\uff1d1", '=HYPERLINK("http://x")', "a\n=1")


@pytest.mark.parametrize("exporter", ["CanvasExport", "MoodleExport", "CsvExport"])
def test_no_name_is_a_formula_in_a_table(exporter: str, course: GradingCourse, tmp_path: Path) -> None:
    there = course.copy(tmp_path / "course")

    def enrol(gradebook: Any) -> None:
        for number, text in enumerate(FORMULAS):
            gradebook.add_student(f"={number}", first_name=text, last_name=text, email=text, lms_user_id=text)

    there.as_a_person(enrol)
    head, *rows = export(there, f"--exporter={EXPORTERS}.{exporter}")
    texts = [cell for row in rows for cell in row if not cell.replace(".", "").isdigit()]
    assert [cell for cell in texts if cell.lstrip()[:1] in tuple("=+-@\uff1d")] == []
    assert [cell for cell in texts if ";=" in cell or "\n" in cell or "\t" in cell or "\r" in cell] == []
    assert {len(row) for row in rows} == {len(head)}
    assert "'=1+1" in "\n".join(texts)


def test_nbgraders_own_export_has_its_columns_and_quotes_names(course: GradingCourse) -> None:
    head, *rows = export(course)
    assert head == [
        "assignment", "duedate", "timestamp", "student_id", "last_name", "first_name", "email",
        "raw_score", "late_submission_penalty", "score", "max_score",
    ]  # fmt: skip
    assert [NAME, "", "", "bob, jr.", "", "", "", "7.0", "0.0", "7.0", "12.0"] in rows


def test_lti_score_messages_have_a_score_only_when_everything_is_decided(course: GradingCourse, tmp_path: Path) -> None:
    there = course.copy(tmp_path / "course")

    def enrol(gradebook: Any) -> None:
        gradebook.add_student("eve", lms_user_id="../../eve|\u2028")
        gradebook.add_student("one", lms_user_id="same")
        gradebook.add_student("two", lms_user_id="same")
        gradebook.add_student("odd", lms_user_id="../../a|b:c@d/e")
        gradebook.add_student("dots", lms_user_id="..")
        gradebook.add_student("waits", lms_user_id="a1b2")

    there.as_a_person(enrol)
    for learner in ("eve", "one", "two", "odd", "dots"):
        there.hand_in(learner, **RIGHT)
    there.hand_in("ada", "2026-05-01 12:00:00 UTC", **RIGHT, why_count="To know how many.")
    there.hand_in("waits", **RIGHT, why_count="To know how many.")
    there.grade()
    there.give("ada", "why_count", 2.25)
    target = there.root / "course" / "scores"
    command = [sys.executable, "-m", "nbgrader", "export", f"--db={there.url}", f"--to={target}"]
    command += ["--exporter=lora_from_scratch.grading.platforms.lti.LtiExport"]
    done = subprocess.run(command, cwd=there.root / "course", capture_output=True, text=True)
    assert "bob, jr., eve" in done.stderr  # who has no id, or something else
    assert "the same lms_user_id: one, two" in done.stderr  # one's score was sent for the other
    assert "1 submissions still need a person" in done.stderr
    messages = {path.relative_to(target).as_posix(): json.loads(path.read_text()) for path in target.rglob("*.json")}
    encoded = {"..%2F..%2Fa%7Cb%3Ac%40d%2Fe", "%2E%2E", "4711", "a1b2"}
    assert messages.keys() == {f"{NAME}/{name}.json" for name in encoded}
    assert {said["userId"] for said in messages.values()} == {"../../a|b:c@d/e", "..", "4711", "a1b2"}
    ada, waits = messages[f"{NAME}/4711.json"], messages[f"{NAME}/a1b2.json"]
    assert ada.pop("timestamp").endswith("+00:00")
    assert ada == {
        "userId": "4711",
        "scoreGiven": 9.25,
        "scoreMaximum": 12.0,
        "activityProgress": "Completed",
        "gradingProgress": "FullyGraded",
        "submission": {"submittedAt": "2026-05-01T12:00:00.000+00:00"},
    }
    assert (waits["gradingProgress"], "scoreGiven" in waits) == ("PendingManual", False)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as url:
        yield url


def test_a_gradebook_on_postgresql_holds_what_one_on_sqlite_holds_and_is_exported_by_nbgrader(
    course: GradingCourse, server: str, tmp_path: Path
) -> None:
    there = GradingCourse(shutil.copytree(course.root, tmp_path / "course"), db=server)
    shutil.rmtree(there.root / "graded")
    shutil.rmtree(there.root / "autograded")
    fill(there)
    assert there.rows() == course.rows()
    there.hand_in("ada", **RIGHT, why_count="I have changed my mind.")
    summary = there.grade(feedback=True)
    assert there.scores("ada")["why_count"] == (None, 2.25, None, True)
    assert [row.learner for row in summary.rows if row.needs_a_human] == ["ada"]
    assert "(Score: 9.25 / 12.0)" in (there.root / "feedback" / "ada" / NAME / f"{NAME}.html").read_text()
    head, *rows = export(there)
    named = [dict(zip(head, row, strict=True)) for row in rows]
    scores = {row["student_id"]: (row["score"], row["max_score"]) for row in named}
    assert scores == {"ada": ("", "12.0"), "bob, jr.": ("7.0", "12.0"), "zoe": ("", "12.0")}


def test_the_formgraders_own_queries_work_on_postgresql(course: GradingCourse, server: str, tmp_path: Path) -> None:
    from nbgrader.apps import NbGraderAPI
    from nbgrader.coursedir import CourseDirectory

    there = GradingCourse(shutil.copytree(course.root, tmp_path / "course"), db=server)
    there.grade()
    there.as_a_person(lambda gradebook: gradebook.add_assignment("unit_98"))  # two units, so that sums have to be right
    api = NbGraderAPI(CourseDirectory(root=str(there.root), db_url=server, source_directory="solutions"))
    found = {one["student"]: one for one in api.get_submissions(NAME)}
    assert found["ada"]["autograded"]
    assert {one["id"]: one["max_score"] for one in api.get_students()}["zoe"] == 12
    assert [unit["max_score"] for unit in api.get_assignments() if unit["name"] == NAME] == [12]
    assert len(api.get_notebook_submissions(NAME, NAME)) == 2
