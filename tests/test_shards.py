"""Grading on several machines that share the course's folder: `grade --shard 3/16`, then `grade --collect`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")

from lora_from_scratch.grading import marking_run
from lora_from_scratch.grading.marking_run import Options
from lora_from_scratch.grading.shards import ShardSummary, grade_shard
from lora_from_scratch.support.shard import Shard
from tests.cli_calls import call, complaint
from tests.grading_course import MARKER, NAME, RIGHT, GradingCourse, template
from tests.test_grade import NOT_AGAIN, files

MOST = 3  # shards


@pytest.fixture(scope="module")
def handed_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradingCourse]:
    with template(tmp_path_factory.mktemp("template") / "course") as made:
        for number in range(8):
            made.hand_in(f"learner {number}", **(RIGHT | {"fourfold_root": f"x = {number}" + " half" * (number % 2)}))
        yield made


@pytest.fixture
def course(handed_in: GradingCourse, tmp_path: Path) -> GradingCourse:
    return handed_in.copy(tmp_path / "course")


def shard(course: GradingCourse, number: int, count: int = MOST, **options: Any) -> ShardSummary:
    settings: dict[str, Any] = {"place": course.root, "workers": 1, "isolation": "none"}
    settings |= {"marker": MARKER, "start": "fork", "cohort_seed": "a secret of tests"}
    return grade_shard("99", Shard(number, count), Options(**(settings | options)))


def records(course: GradingCourse) -> list[str]:
    return sorted(path.parent.name for path in (course.root / "graded").glob(f"*/{NAME}.json"))


def test_shards_and_collecting_give_the_same_bytes_as_one_machine(course: GradingCourse, tmp_path: Path) -> None:
    alone = course.copy(tmp_path / "alone")
    alone.grade()
    found = [shard(course, number) for number in (2, 3, 1)]
    assert sum(summary.learners for summary in found) == 8
    assert not (course.root / "autograded").exists()
    assert not course.rows()["grade"]
    summary = course.grade(collect=True, marker=NOT_AGAIN)
    assert (summary.marked, len(summary.rows), summary.code) == (0, 8, 0)
    for folder in ("graded", "autograded"):
        assert files(course.root / folder) == files(alone.root / folder), folder
    assert course.rows() == alone.rows()


def of(number: int) -> set[str]:
    """The learners of a shard."""
    return {name for name in (*(f"learner {n}" for n in range(8)), "late") if Shard(number, MOST).holds(name)}


def test_nothing_is_graded_twice_even_if_work_arrives_in_between(course: GradingCourse) -> None:
    shard(course, 1)
    assert shard(course, 1, marker=NOT_AGAIN).marked == 0
    course.hand_in("late", **RIGHT)
    marked = [shard(course, number).marked for number in range(1, MOST + 1)]
    assert marked == [len(of(1) & {"late"}), len(of(2)), len(of(3))]
    assert [shard(course, number, marker=NOT_AGAIN).marked for number in range(1, MOST + 1)] == [0] * MOST
    assert len(records(course)) == 9


def test_every_name_is_in_one_shard() -> None:
    for name in ("ada", "Zoë", "\udcff", "[x]"):
        assert [Shard(number, 7).holds(name) for number in range(1, 8)].count(True) == 1


def test_a_shard_that_did_not_run_is_missed_and_the_others_are_entered(course: GradingCourse) -> None:
    shard(course, 1)
    shard(course, 2)
    summary = course.grade(collect=True, marker=NOT_AGAIN)
    assert [row.learner for row in summary.rows] == sorted((of(1) | of(2)) - {"late"})
    missed = sorted(of(3) - {"late"})
    assert missed
    assert summary.refused == tuple(f"{name}: no shard has graded it; run its shard again" for name in missed)
    assert summary.code == 2


def test_a_machine_with_another_version_of_the_course_is_refused(course: GradingCourse) -> None:
    shard(course, 1)
    before = files(course.root / "graded")
    released = course.released.read_text()
    course.released.write_text(released.replace("A story about roots", "Another story"))
    with pytest.raises(ValueError, match="another version of the course than this machine: the released notebook has"):
        shard(course, 2)
    assert files(course.root / "graded") == before
    course.released.write_text(released)
    shard(course, 2)
    shard(course, 3)
    course.released.write_text(released.replace("A story about roots", "Another story"))
    summary = course.grade(collect=True, marker=NOT_AGAIN)
    assert (summary.rows, summary.code) == ((), 2)
    assert "not of this version of the course: the released notebook has changed" in summary.refused[0]


def test_a_submission_that_kills_its_worker_is_tried_twice_and_then_left_to_a_person(course: GradingCourse) -> None:
    course.hand_in("learner 0", fourfold_root="die")
    number = next(n for n in range(1, MOST + 1) if Shard(n, MOST).holds("learner 0"))
    assert "learner 0: could not be graded" in shard(course, number).trouble[0]
    assert "learner 0" not in records(course)
    assert shard(course, number).trouble == ()
    for other in range(1, MOST + 1):
        shard(course, other)
    rows = {row.learner: row for row in course.grade(collect=True).rows}
    assert [name for name, row in rows.items() if row.needs_a_human] == ["learner 0"]
    assert rows["learner 1"].entry.score == 5


def test_the_report_compares_with_the_points_before_the_first_shard(course: GradingCourse) -> None:
    course.grade()
    course.hand_in("learner 0", **(RIGHT | {"fourfold_root": "half"}))
    for number in range(1, MOST + 1):
        shard(course, number)
    course.grade(collect=True)
    report = (course.root / "reports" / f"{NAME}.md").read_text()
    assert "| learner 0 | fourfold_root | 4 | 2 | handed in again |" in report
    assert not list((course.root / "graded").glob(".*.json"))


def test_a_shard_does_not_run_twice_at_once_nor_beside_a_grading(
    course: GradingCourse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marking_run, "PATIENCE", 0.1)
    lock = course.root / "graded" / f".{NAME}.lock"
    with marking_run.locked(lock, "it"), pytest.raises(ValueError, match="is being graded by another process"):
        shard(course, 1)
    with marking_run.locked(lock, "it", shared=True):
        shard(course, 2)
        with pytest.raises(ValueError, match="is being graded by another process"):
            course.grade()
    own = lock.with_name(f"{lock.name}.1-of-{MOST}")
    with marking_run.locked(own, "it"), pytest.raises(ValueError, match="shard 1/3 of unit_99 is being graded"):
        shard(course, 1)


def test_a_version_or_baseline_that_is_damaged_is_said_or_made_again(course: GradingCourse) -> None:
    shard(course, 1)
    folder = course.root / "graded"
    (folder / f".{NAME}.before.json").write_text("{")
    shard(course, 2)
    assert json.loads((folder / f".{NAME}.before.json").read_text()).keys() == of(1) - {"late"}
    (folder / f".{NAME}.version.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        shard(course, 3)


def test_the_command_says_what_a_shard_has_done(course: GradingCourse, monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(number: str, part: Shard, options: Options) -> ShardSummary:
        assert (number, part, options.place, options.again) == ("99", Shard(2, 3), course.root, True)
        return ShardSummary(number, part, 4, 3, ("ada: could not be graded\x1b",), 12.0)

    monkeypatch.setattr("lora_from_scratch.grading.shards.grade_shard", stand_in)
    code, said, complaints = call("grade", "99", "--shard", "2/3", "--again", "--course", course.root)
    assert (code, said) == (2, "unit 99, shard 2/3: 4 submissions, 3 graded now, in 12 s\n")
    assert complaints == "not graded: ada: could not be graded\N{REPLACEMENT CHARACTER}\n"


def test_bad_input_ends_in_one_line(course: GradingCourse) -> None:
    for text in ("0/3", "4/3", "3", "a/b", "1/0", "-1/3"):
        assert "--shard" in complaint("grade", "99", f"--shard={text}", "--course", course.root)
    assert "does not go with --shard" in complaint(
        "grade", "99", "--collect", "--shard", "1/2", "--course", course.root
    )
