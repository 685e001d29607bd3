"""What one learner's files do to the others' grading: nothing. And what a worker may use."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")

from lora_from_scratch.grading import autograded, pool, tasks
from lora_from_scratch.grading.course_folder import open_course
from lora_from_scratch.grading.gradebook import GradebookError, UnitGradebook
from lora_from_scratch.grading.graded import Graded
from lora_from_scratch.grading.pool import Bounds, Pool, Task
from lora_from_scratch.grading.submissions import folder as door
from lora_from_scratch.grading.submissions.definitions import statements
from lora_from_scratch.grading.submissions.folder import entries, handed_in_at, take_data
from tests.grading_course import NAME, RIGHT, GradingCourse, template

MIB = 2**20
NOBODY = 65534


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradingCourse]:
    with template(tmp_path_factory.mktemp("template") / "course") as made:
        yield made


@pytest.fixture
def course(empty: GradingCourse, tmp_path: Path) -> GradingCourse:
    made = empty.copy(tmp_path / "course")
    for learner in ("ada", "bob", "cleo"):
        made.hand_in(learner, **RIGHT)
    return made


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody may enter: the superuser is not stopped by the modes of files."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@contextlib.contextmanager
def as_somebody() -> Iterator[None]:
    """Not as the superuser."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def disk_full(*_: Any, **__: Any) -> Graded:
    raise OSError(errno.ENOSPC, "No space left on device")


def of_bob(function: Any, error: BaseException) -> Any:
    """The function, which fails where it is about Bob."""

    def fails(*given: Any, **named: Any) -> Any:
        if any("bob" in str(getattr(one, "learner", one)) for one in given):
            raise error
        return function(*given, **named)

    return fails


# --- The batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["die", "raise RuntimeError"])
def test_what_fails_twice_in_the_same_way_is_given_to_a_person_and_not_tried_for_ever(
    course: GradingCourse, what: str
) -> None:
    course.hand_in("bob", fourfold_root=what)
    first = course.grade()
    assert (first.marked, first.failed, first.code) == (2, 1, 2)
    second = course.grade()
    assert (second.marked, second.failed, second.code) == (0, 0, 1)
    assert [row.learner for row in second.rows if row.needs_a_human] == ["bob"]
    assert [finding["kind"] for finding in course.record("bob")["findings"]][-1] == "grading failed"
    assert (course.grade().code, course.scores("ada")["check-Counter"][0]) == (1, 2)
    course.hand_in("bob", **RIGHT)
    assert (course.grade().marked, course.scores("bob")["check-Counter"][0]) == (1, 2)
    assert not list((course.root / "graded" / "bob").glob("*.failed"))


def test_a_full_disk_is_no_fault_of_a_submission_and_is_tried_again_each_time(course: GradingCourse) -> None:
    for _ in range(3):
        summary = course.grade(marker=f"{__name__}:disk_full")
        assert (summary.failed, summary.code) == (3, 2)
    assert course.grade().marked == 3


@pytest.mark.parametrize("step", ["key_of", "_mark", "_prepared", "handed_in_at", "make_feedback"])
@pytest.mark.parametrize(
    "error", [RuntimeError("too deep"), MemoryError(), OSError(errno.ENAMETOOLONG, "long")], ids=repr
)
def test_a_step_that_fails_on_one_submission_harms_no_other(
    course: GradingCourse, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    monkeypatch.setattr(tasks, step, of_bob(getattr(tasks, step), error))
    summary = course.grade(feedback=True, workers=2)
    rows = {row.learner: row for row in summary.rows}
    assert [rows[name].entry.score for name in ("ada", "cleo")] == [7, 7]
    assert [(rows[name].trouble, rows[name].graded.findings) for name in ("ada", "cleo")] == [((), ())] * 2
    assert rows["bob"].needs_a_human
    assert (course.root / "feedback" / "cleo" / NAME / f"{NAME}.html").is_file()


def test_what_is_shown_of_one_submission_fails_alone(course: GradingCourse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        autograded, "write", of_bob(autograded.write, OSError(errno.ENAMETOOLONG, "File name too long"))
    )
    rows = {row.learner: row for row in course.grade().rows}
    assert [rows[name].trouble for name in ("ada", "cleo")] == [(), ()]
    assert "File name too long" in rows["bob"].trouble[0]
    assert rows["bob"].entry.score == 7


def test_what_the_gradebook_cannot_hold_is_one_learners_and_a_gradebook_that_cannot_be_used_is_not(
    course: GradingCourse, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = UnitGradebook.enter
    monkeypatch.setattr(UnitGradebook, "enter", of_bob(real, ValueError("a text must not hold NUL")))
    summary = course.grade()
    assert {row.learner: row.entry.score for row in summary.rows} == {"ada": 7, "bob": 0, "cleo": 7}
    assert "could not be entered into the gradebook: ValueError: a text must not hold NUL" in summary.rows[1].trouble[0]
    assert summary.code == 2
    monkeypatch.setattr(UnitGradebook, "enter", of_bob(real, GradebookError("database is locked")))
    with pytest.raises(GradebookError):
        course.grade()


def test_nothing_of_a_learners_is_read_in_the_process_that_writes_the_gradebook(
    course: GradingCourse, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = os.open

    def noting(path: Any, *rest: Any, **more: Any) -> int:
        opened.append(str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", noting)
    assert course.grade(feedback=True).marked == 3
    assert [path for path in opened if "submitted" in path] == []


def test_a_locked_file_of_data_is_told_and_the_notebook_is_graded_without_it(public: Path) -> None:
    source = public / "handed in"
    source.mkdir()
    for name in ("data.csv", "locked.csv"):
        (source / name).write_text(name)
    (source / "locked").mkdir()
    (source / "locked.csv").chmod(0)
    (source / "locked").chmod(0)
    target = public / "taken"
    target.mkdir()
    target.chmod(0o777)
    with as_somebody():
        taken, findings = take_data(source, target)
    assert (taken, sorted(os.listdir(target))) == (True, ["data.csv"])
    assert [(finding.kind, finding.severity) for finding in findings] == [("unreadable data", "human")]
    assert "`locked (Permission denied)`, `locked.csv (Permission denied)`" in findings[0].message or (
        "`locked.csv (Permission denied)`, `locked (Permission denied)`" in findings[0].message
    )


def test_only_plain_files_are_taken_along_and_only_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "handed in", tmp_path / "taken"
    (source / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("unit_01.ipynb", "timestamp.txt", ".ipynb_checkpoints/x.csv", "helper.py", "data.csv"):
        (source / name).write_text("1")
    (source / "link").symlink_to("/etc/passwd")
    os.mkfifo(source / "pipe")
    target.mkdir()
    assert take_data(source, target) == (True, [])
    assert sorted(os.listdir(target)) == ["data.csv", "helper.py"]
    monkeypatch.setattr(door, "MOST_ENTRIES", 3)
    assert [finding.kind for finding in take_data(source, tmp_path / "less")[1]] == ["too many files"]
    monkeypatch.undo()
    monkeypatch.setattr(door, "ROOM", 1)
    assert [finding.kind for finding in take_data(source, tmp_path / "small")[1]] == ["too many files"]


def test_a_folder_is_looked_at_to_a_bounded_depth_and_number(tmp_path: Path) -> None:
    place = tmp_path
    for _ in range(30):
        place = place / "deeper"
        place.mkdir()
    for number in range(door.MOST_ENTRIES + 100):
        (tmp_path / f"{number:05}").touch()
    found = list(entries(tmp_path))
    assert len(found) == door.MOST_ENTRIES + 1
    assert found[-1].kind == "more"
    assert max(len(entry.path.parts) for entry in found) <= door.DEEPEST


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("2026-05-01 12:00:00 UTC", "2026-05-01 12:00:00.000000 UTC"),
        ("2026-05-01 12:00:00.5 UTC\n", "2026-05-01 12:00:00.500000 UTC"),
        ("2026-05-01 12:00:00", "2026-05-01 12:00:00.000000 UTC"),
        ("2026-05-01T12:00+02:00", "2026-05-01 10:00:00.000000 UTC"),
        ("2026-05-01 12:00:00 Europe/Berlin", "2026-05-01 10:00:00.000000 UTC"),
        ("2026-05-01 12:00:00 /etc/passwd", None),
        ("2026-05-01 12:00:00 ../../../etc/passwd", None),
        ("2026-05-01 12:00:00 Nowhere/Land", None),
        ("2026-05-01 12:00:00 America/", None),
        ("9999-12-31 23:59:59 -12:00", None),
        ("0001-01-01 00:00:00 +14:00", None),
        ("2026-13-41 12:00:00 UTC", None),
        ("yesterday", None),
        ("x" * 1000, None),
        ("\x00", None),
    ],
)
def test_when_it_was_handed_in_is_read_strictly_and_no_file_is_looked_up(
    tmp_path: Path, text: str, when: str | None
) -> None:
    (tmp_path / "timestamp.txt").write_text(text)
    found, why = handed_in_at(tmp_path)
    assert found == when
    assert bool(why) == (when is None)


# --- Who has handed in ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["course [2026]", "a*b?", "[!x]", "été"])
def test_a_courses_folder_may_have_any_name(empty: GradingCourse, tmp_path: Path, name: str) -> None:
    course = empty.copy(tmp_path / name)
    course.hand_in("ada", **RIGHT)
    assert [(row.learner, row.trouble) for row in course.grade(feedback=True).rows] == [("ada", ())]
    assert (course.root / "feedback" / "ada" / NAME / f"{NAME}.html").is_file()


def test_a_folder_that_begins_with_a_dot_is_told(course: GradingCourse) -> None:
    course.hand_in(".dora", **RIGHT)
    summary = course.grade()
    assert [row.learner for row in summary.rows] == ["ada", "bob", "cleo"]
    assert len(summary.refused) == 1
    assert ".dora" in summary.refused[0]
    assert "begin with a dot" in summary.refused[0]


def test_a_folder_that_cannot_be_looked_into_is_told(empty: GradingCourse, public: Path) -> None:
    course = empty.copy(public / "course")
    for learner in ("ada", "bob", "cleo"):
        course.hand_in(learner, **RIGHT)
    (course.root / "submitted" / "bob").chmod(0)
    (course.root / "submitted" / "cleo" / NAME).chmod(0)
    with as_somebody():
        names, refused = open_course(NAME, course.root).learners()
    assert names == ["ada"]
    assert ["chmod -R u+rwX" in sentence for sentence in refused] == [True, True]


# --- Workers -------------------------------------------------------------------------------------------------


def spin() -> None:
    while True:
        try:
            while True:
                pass
        except Exception:
            pass


def eat() -> int:
    return len([bytearray(MIB) for _ in range(4_000)])


def sleep() -> None:
    time.sleep(600)


def pid() -> int:
    return os.getpid()


def outcomes(*functions: Any, **bounds: Any) -> dict[str, Any]:
    with Pool(1, Bounds(**bounds), start="fork") as made:
        for function in functions:
            made.submit(Task(function.__name__, f"{__name__}:{function.__name__}"))
        return {outcome.task.name: outcome.error or outcome.value for outcome in made.outcomes()}


def test_a_task_that_takes_too_much_processor_time_ends_and_the_others_are_done() -> None:
    found = outcomes(spin, pid, processor_seconds=2)
    assert found["spin"] == "it took more than 2 seconds of processor time"
    assert isinstance(found["pid"], int)


def test_a_task_that_takes_too_much_memory_ends_and_the_others_are_done() -> None:
    found = outcomes(eat, pid, memory=256 * MIB)  # without a bound on the time: on a busy machine, memory takes some
    assert found["eat"].startswith("MemoryError")
    assert isinstance(found["pid"], int)


def test_a_task_that_waits_for_ever_is_ended() -> None:
    found = outcomes(sleep, pid, seconds=1)
    assert found["sleep"] == "it took longer than 1 seconds"
    assert isinstance(found["pid"], int)


def test_a_worker_that_has_grown_gives_way_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "GROWN", -(2**40))
    with Pool(1, start="fork") as made:
        for number in range(3):
            made.submit(Task(str(number), f"{__name__}:pid"))
        assert len({outcome.value for outcome in made.outcomes()}) == 3


def test_nothing_of_a_notebook_is_kept_when_it_is_marked(course: GradingCourse) -> None:
    statements("x = 1")
    open_ = open_course(NAME, course.root)
    job = tasks.MarkingJob(
        learner="ada",
        unit="99",
        notebook=open_.handed_in("ada") / f"{NAME}.ipynb",
        released=open_.released,
        record=open_.record("ada"),
        shown=open_.autograded("ada") / f"{NAME}.ipynb",
        course_key="",
        secret="a secret of tests",
        isolation="none",
        cache=open_.cache,
        marker="tests.stand_in_marker:mark_file",
    )
    assert isinstance(tasks.mark(job), tasks.PreparedResult)
    assert statements.cache_info().currsize == 0
