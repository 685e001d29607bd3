"""The command's run: what is graded, what is not graded again, and what one bad submission does to the others."""

from __future__ import annotations

import base64
import io
import itertools
import os
import random
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")

from lora_from_scratch.grading import marking_run, sandbox
from lora_from_scratch.grading.graded import Finding, Graded
from lora_from_scratch.grading.keys import REASONS, why_changed
from lora_from_scratch.grading.marking_run import Progress
from tests.cli_calls import call, complaint
from tests.grading_course import NAME, RIGHT, GradingCourse, template


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradingCourse]:
    with template(tmp_path_factory.mktemp("template") / "course") as made:
        yield made


@pytest.fixture
def course(empty: GradingCourse, tmp_path: Path) -> GradingCourse:
    return empty.copy(tmp_path / "course")


PARTLY = """\
def fourfold_root(x, scale=4.0):
    import warnings

    warnings.warn("this root is slow")
    print("and says so")
    return x.double() ** 0.5 * scale
"""


def fail(*_: Any, **__: Any) -> Graded:
    raise AssertionError("this should not be marked again")


NOT_AGAIN = f"{__name__}:fail"


def test_two_workers_give_the_same_bytes_as_one(course: GradingCourse, tmp_path: Path) -> None:
    for number in range(6):
        course.hand_in(f"learner {number}", **(RIGHT | {"fourfold_root": f"x = {number}" + " half" * (number % 2)}))
    other = course.copy(tmp_path / "other")
    course.grade(workers=1)
    other.grade(workers=2)
    assert files(course.root / "graded") == files(other.root / "graded")
    assert files(course.root / "autograded") == files(other.root / "autograded")
    assert course.rows() == other.rows()


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(found)}


def test_what_is_graded_already_is_not_graded_again(course: GradingCourse) -> None:
    course.hand_in("ada", **RIGHT)
    assert course.grade().marked == 1
    assert course.grade(marker=NOT_AGAIN).marked == 0
    course.hand_in("bob", **RIGHT)
    assert course.grade().marked == 1
    assert course.grade(again=True).marked == 2


def test_a_change_of_submission_release_secret_checks_or_isolation_is_graded_again_and_said(
    course: GradingCourse, monkeypatch: pytest.MonkeyPatch
) -> None:
    course.hand_in("ada", **RIGHT)
    course.grade()

    def again(**options: Any) -> tuple[int, str]:
        summary = course.grade(**options)
        return summary.marked, summary.rows[0].why

    course.hand_in("ada", **RIGHT, guess_number="guess_number = 3")
    assert again() == (1, REASONS["submission"])
    course.released.write_text(course.released.read_text().replace("A story about roots", "Another story"))
    assert again() == (1, REASONS["release"])
    (course.root / "cohort.json").unlink()
    assert again(cohort_seed="another secret") == (1, REASONS["seed"])
    monkeypatch.setattr(marking_run, "require_sandbox", lambda isolation: None)
    assert again(isolation="bubblewrap", cohort_seed=None) == (1, REASONS["isolation"])
    assert again(isolation="bubblewrap", cohort_seed=None) == (0, "")
    monkeypatch.setenv("LORA_FROM_SCRATCH_UNITS", str(course.root / "units"))
    (course.root / "units" / "unit_99" / "exercises.py").open("a").write("# a comment\n")
    assert again(isolation="bubblewrap", cohort_seed=None) == (1, REASONS["checks"])


def test_reasons_are_told_apart_and_an_unfinished_grading_is_none() -> None:
    key = " ".join(f"{name}:1" for name in REASONS)
    for name, words in REASONS.items():
        assert why_changed(key, key.replace(f"{name}:1", f"{name}:2")) == words
    assert why_changed(key, key) == ""
    assert why_changed("", key) == "the previous grading was not finished"


def test_a_worker_that_dies_harms_only_the_submission_it_had(course: GradingCourse) -> None:
    for name in ("ada", "cleo", "dora"):
        course.hand_in(name, **RIGHT)
    course.hand_in("bob", fourfold_root="die")
    summary = course.grade(workers=2)
    rows = {row.learner: row for row in summary.rows}
    assert [rows[name].entry.score for name in ("ada", "cleo", "dora")] == [7, 7, 7]
    assert (summary.marked, summary.failed, summary.code) == (3, 1, 2)
    assert "exit code 7" in rows["bob"].trouble[0]
    assert rows["bob"].entry.score == 0
    assert "check-fourfold_root" in rows["bob"].entry.waiting  # a person decides, in the formgrader
    assert not (course.root / "graded" / "bob" / f"{NAME}.json").exists()  # and the next run tries again
    course.hand_in("bob", **RIGHT)
    assert course.grade().marked == 1
    assert course.scores("bob")["check-fourfold_root"] == (4, None, None, False)


def test_a_submission_that_cannot_be_marked_any_more_keeps_the_points_that_it_had(course: GradingCourse) -> None:
    course.hand_in("ada", **RIGHT)
    course.grade()
    course.hand_in("ada", **(RIGHT | {"Counter": "raise RuntimeError"}))
    summary = course.grade()
    assert "RuntimeError: the judge fell over" in summary.rows[0].trouble[0]
    assert (summary.rows[0].entry.score, summary.code) == (7, 2)


def test_the_time_left_is_right_after_the_first_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 submissions, half of them graded already, marked by 8 workers in 2 to 6 s each, the first in 10 s more; on a
    clock of our own."""
    now, draw = [0.0], random.Random(0)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with Progress("unit_99", 600, 8, disable=False, file=io.StringIO(), mininterval=0) as progress:
        for number in range(600):
            now[0] += 0.02
            progress.finished(number % 2)
            progress.looked_up(1)
        ends = sorted(itertools.chain.from_iterable(_one_worker(draw, now[0]) for _ in range(8)))[:300]
        for end in ends[:30]:
            now[0] = end
            progress.finished(1)
        said = progress.bar.format_dict
    left = (said["total"] - said["n"]) * said["elapsed"] / (said["n"] - said["initial"])
    assert left == pytest.approx(ends[-1] - ends[29], rel=0.2)


def _one_worker(draw: random.Random, start: float) -> Iterator[float]:
    """When a worker finishes each of the submissions that it might mark."""
    start += 10
    for _ in range(100):
        start += draw.uniform(2, 6)
        yield start


def test_a_result_that_is_damaged_on_disk_is_made_again(course: GradingCourse) -> None:
    course.hand_in("ada", **RIGHT)
    course.grade()
    record = course.root / "graded" / "ada" / f"{NAME}.json"
    whole = record.read_bytes()
    record.write_bytes(whole[:100])
    assert course.grade().marked == 1
    assert record.read_bytes() == whole


def test_two_gradings_of_a_unit_do_not_run_at_once(course: GradingCourse, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    course.hand_in("ada", **RIGHT)
    monkeypatch.setattr(marking_run, "PATIENCE", 0.1)
    lock = course.root / "graded" / f".{NAME}.lock"
    lock.parent.mkdir()
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="unit_99 is being graded by another process"):
            course.grade()


def test_a_folder_whose_name_the_gradebook_cannot_hold_is_reported_and_the_others_are_graded(
    course: GradingCourse,
) -> None:
    for name in ("ada", " bob", "c" * 129, "*", "[x]"):
        course.hand_in(name, **RIGHT)
    summary = course.grade(feedback=True)
    assert [row.learner for row in summary.rows] == ["*", "[x]", "ada"]
    assert len(summary.refused) == 2
    assert summary.code == 1
    assert [row.trouble for row in summary.rows] == [(), (), ()]
    assert all((course.root / "feedback" / name / NAME / f"{NAME}.html").is_file() for name in ("*", "[x]", "ada"))


# --- The real thing ----------------------------------------------------------------------------------------


def test_the_command_grades_real_submissions_in_the_sandbox(course: GradingCourse) -> None:
    solved = nbformat.read(course.root / "solutions" / NAME / f"{NAME}.ipynb", as_version=4)
    answers = {
        cell.metadata.nbgrader["grade_id"]: cell.source
        for cell in solved.cells
        if cell.cell_type == "code" and cell.metadata.get("nbgrader", {}).get("solution")
    }
    course.hand_in("all", **answers, why_count="To know how many there are.")
    course.hand_in("exits", **(answers | {"Counter": "import os\nos._exit(0)"}))
    course.hand_in("none")
    course.hand_in("part", **(answers | {"fourfold_root": PARTLY}))
    (course.hand_in("unreadable") / f"{NAME}.ipynb").write_text("{")
    isolation = "none" if sandbox.unavailable() else "bubblewrap"
    arguments = ("grade", "99", "--course", course.root, "--workers", "2", "--isolation", isolation)
    code, said, complaints = call(*arguments)
    assert (code, complaints) == (1, "")
    assert "unit 99: 5 submissions, 5 graded now" in said
    assert "need a human: 2 (all, unreadable)" in said
    checks = ["check-fourfold_root", "check-Counter", "check-guess_root", "check-guess_number"]
    points = {name: [course.scores(name)[check][0] for check in checks] for name in ("all", "exits", "none", "part")}
    assert points == {"all": [4, 2, 1, 2], "exits": [4, 0, 1, 2], "none": [0, 0, 0, 0], "part": [2, 2, 1, 2]}
    assert all(asks for *_, asks in course.scores("unreadable").values())
    page = (course.root / "feedback" / "part" / NAME / f"{NAME}.html").read_text()
    assert "below zero" in page  # the case that failed
    assert "math.cos" not in page  # the library's own answer
    assert call(*arguments)[1].startswith("unit 99: 5 submissions, 0 graded now")


# --- What is shown ---------------------------------------------------------------------------------------


def test_raw_cells_become_text_and_findings_stand_on_top(empty: GradingCourse) -> None:
    from lora_from_scratch.grading.autograded import shown

    notebook = empty.notebook({})
    notebook.cells.append(nbformat.v4.new_raw_cell("<script>", metadata={"format": "text/html"}))
    findings = (Finding("moved cell", "repaired", "Counter", "It was <script>moved</script>."),)
    graded = Graded("ada", NAME, {}, {}, findings, nbformat.writes(notebook), "none")
    cells = nbformat.reads(shown(graded, nbformat.read(empty.released, as_version=4)), as_version=4).cells
    assert cells[-1].cell_type == "markdown"
    assert "<pre>&lt;script&gt;</pre>" in cells[-1].source
    assert "Repaired, cell <code>Counter</code>: It was &lt;script&gt;moved" in cells[0].source
    assert not cells[-1].metadata


def test_autograded_takes_over_pictures_and_no_links_and_has_nbgraders_permissions(
    course: GradingCourse, tmp_path: Path
) -> None:
    (tmp_path / "secret.png").write_text("secret")
    folder = course.hand_in("ada", "2026-05-01 12:00:00 UTC", **RIGHT)
    (folder / "drawing.png").write_bytes(b"drawing")
    (folder / f"{NAME}.png").write_bytes(b"not the course's")
    (folder / "page.html").write_text("<script>")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "pipe.png")
    course.grade()
    shown = course.root / "autograded" / "ada" / NAME
    assert sorted(path.name for path in shown.iterdir()) == [
        "drawing.png",
        "timestamp.txt",
        f"{NAME}.ipynb",
        f"{NAME}.png",
    ]
    assert (shown / f"{NAME}.png").read_bytes() == b"a picture"
    assert stat.S_IMODE((shown / f"{NAME}.ipynb").stat().st_mode) == 0o444


def test_feedback_can_be_returned_whatever_lies_beside_the_notebook(course: GradingCourse) -> None:
    """`nbgrader release_feedback` stopped for the whole class at the first learner without one of its two files."""
    secrets = {"ada": b"0123456789abcdef" * 8, "bob": b"\xff\xfe", "eve": None, "mallory": b"0123456789abcdef" * 9}
    for learner, secret in secrets.items():
        folder = course.hand_in(learner, **RIGHT)
        if secret is not None:
            (folder / "submission_secret.txt").write_bytes(secret)
    (course.root / "submitted" / "bob" / NAME / "timestamp.txt").write_bytes(b"\xff")
    course.grade(feedback=True)
    folders = {learner: course.root / "feedback" / learner / NAME for learner in secrets}
    texts = {learner: (folder / "submission_secret.txt").read_text() for learner, folder in folders.items()}
    assert texts["ada"] == "0123456789abcdef" * 8
    assert all(re.fullmatch(r"[0-9a-f]{128}", text) for text in texts.values())
    assert len(set(texts.values())) == 4
    assert {(folder / "timestamp.txt").read_text() for folder in folders.values()} == {"", "\N{REPLACEMENT CHARACTER}"}


def test_a_feedback_page_needs_no_other_file(course: GradingCourse, tmp_path: Path) -> None:
    """The exchange returns the page alone. Only pictures are put into it, no link is followed, and there is a limit."""
    picture = b"\x89PNG\r\n\x1a\n" + b"pixels" * 100_000
    (course.root / "notebooks" / NAME / f"{NAME}.png").write_bytes(picture)
    (tmp_path / "secret.png").write_bytes(picture + b"secret")
    names = ("mine.png", "text.png", "link.png", "none.png", "../ada/none.png", "http://x.org/y.png")
    shown = "".join(f"![a]({name})" for name in names) + "![b](mine.png)" * 200
    folder = course.hand_in("eve", **RIGHT, why_count=f'{shown} <b>src="mine.png"</b>')
    (folder / "mine.png").write_bytes(picture + b"mine")
    (folder / "text.png").write_bytes(b"root:x:0:0")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    course.grade(feedback=True)
    page = (course.root / "feedback" / "eve" / NAME / f"{NAME}.html").read_text()
    assert f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"' in page
    assert f'src="data:image/png;base64,{base64.b64encode(picture + b"mine").decode()}"' in page
    assert base64.b64encode(picture + b"secret").decode() not in page
    assert base64.b64encode(b"root:x:0:0").decode() not in page
    assert "src=&quot;mine.png" in page or '<b>src="mine.png"</b>' in page
    assert len(page) < 21_000_000


def test_feedback_pages_are_nbgraders_own_and_made_again_when_points_change(course: GradingCourse) -> None:
    course.hand_in("ada", **RIGHT, why_count="To know how many.")
    course.grade(feedback=True)
    page = course.root / "feedback" / "ada" / NAME / f"{NAME}.html"
    assert "(Score: 7.0 / 12.0)" in page.read_text()
    first = page.stat().st_mtime_ns
    course.grade(feedback=True, marker=NOT_AGAIN)
    assert page.stat().st_mtime_ns == first
    course.give("ada", "why_count", 3, "Well said.")
    course.grade(feedback=True, marker=NOT_AGAIN)
    assert "(Score: 10.0 / 12.0)" in page.read_text()
    assert "Well said." in page.read_text()
    contents = re.findall(r'<li><a href="#[^"]*">([^<]*)</a>', page.read_text())
    assert {"fourfold_root", "Counter", "why_count", "why_count: comment"} <= set(contents)
    assert not {"Test cell", "Comment", "Written response"} & set(contents)


# --- The command line ------------------------------------------------------------------------------------


def test_bad_input_ends_in_one_line(course: GradingCourse, tmp_path: Path) -> None:
    assert "there is no unit 77" in complaint("grade", "77", "--course", course.root)
    assert "--workers must be at least 1" in complaint("grade", "1", "--workers", "-3", "--course", course.root)
    assert "there is no nbgrader_config.py" in complaint("grade", "01", "--course", tmp_path)
    assert "unit_01.ipynb; create it" in complaint("grade", "unit_01", "--course", course.root, "--isolation", "none")
    config = course.root / "course" / "nbgrader_config.py"
    config.write_text("this is no Python")
    assert "nbgrader_config.py cannot be read: SyntaxError" in complaint("grade", "01", "--course", course.root)


def test_without_submissions_there_is_nothing_to_grade(course: GradingCourse) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing was handed in: .*submitted/\*/unit_99"):
        course.grade()


def test_without_the_sandbox_grading_stops_unless_that_is_asked_for(
    course: GradingCourse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "unavailable", lambda: "bubblewrap is not installed")
    course.hand_in("ada", **RIGHT)
    with pytest.raises(ValueError, match=r"bubblewrap is not installed\. Nothing was graded\. --isolation none"):
        course.grade(isolation="bubblewrap")
    with pytest.raises(ValueError, match="isolation must be one of bubblewrap, user, none, got 'docker'"):
        course.grade(isolation="docker")
    assert course.grade().isolation == "none"
    assert "Graded without a sandbox" in (course.root / "reports" / f"{NAME}.md").read_text()


def test_a_new_gradebook_is_made_where_the_virtual_environment_is_not_activated(
    course: GradingCourse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    (course.root / "gradebook.db").unlink()
    assert not shutil.which("alembic")  # nbgrader starts it by its name
    course.hand_in("ada", **RIGHT)
    course.grade(start="spawn")
    assert course.scores("ada")["check-Counter"] == (2, None, None, False)
