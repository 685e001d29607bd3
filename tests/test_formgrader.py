"""The formgrader in a real browser: an instructor sees the grades, grades by hand, and grades again with our command.

Screenshots are kept where LORA_FROM_SCRATCH_SCREENSHOTS names a folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")
pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")

from tests.formgrader_page import Page, served
from tests.grading_course import NAME, RIGHT, GradingCourse, template
from tests.jupyter_browser import CHROMIUM, DRIVER, browser

if not CHROMIUM or not DRIVER:
    pytest.skip("Chromium is not here (on Debian: apt install chromium chromium-driver)", allow_module_level=True)

SCRIPT = "<script>document.title = 'taken over'</script>"


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradingCourse]:
    with template(tmp_path_factory.mktemp("course") / "course") as made:
        made.hand_in("ada", **RIGHT, why_count="To know **how many** there are.")
        made.hand_in("bob", fourfold_root="half", guess_root="twice")
        made.hand_in("mallory", **RIGHT, why_count=f"Because. {SCRIPT}")
        made.grade()
        yield made


def test_an_instructor_sees_the_grades_grades_by_hand_and_keeps_that_when_it_is_graded_again(
    course: GradingCourse, tmp_path: Path
) -> None:
    with served(course, tmp_path) as address, browser() as driver:
        page = Page(driver, address)
        page.open("manage_assignments")
        page.until(lambda: "3" in page.row(NAME), "there are three submissions")
        page.screenshot("formgrader-assignments")
        page.open(f"manage_submissions/{NAME}")
        page.until(lambda: any("needs manual grading" in cell for cell in page.row("ada")), "ada's needs a person")
        assert any("graded" in cell for cell in page.row("bob"))
        assert "7" in " ".join(page.row("ada"))

        page.open_notebook(course, "ada")
        assert page.placeholder("check-fourfold_root") == "4"  # the automatic points
        assert "1 point: a reason." in page.text("body")  # the rubric
        assert page.value("why_count") == ""
        page.write("why_count", "2.5")
        page.write("why_count-comment", "Good: **counting** is knowing.")
        page.until(lambda: course.scores("ada")["why_count"] == (None, 2.5, None, False), "the score is saved")
        page.until(lambda: course.comments("ada")["why_count"][1], "the comment is saved")
        page.screenshot("formgrader-by-hand")

        course.hand_in("bob", **RIGHT)
        assert course.grade(again=True).marked == 3
        page.open_notebook(course, "ada")
        assert page.value("why_count") == "2.5"  # the score given by hand is still there
        assert page.value("why_count-comment") == "Good: **counting** is knowing."
        page.open_notebook(course, "bob")
        assert page.placeholder("check-fourfold_root") == "4"  # the new automatic points

        course.hand_in("ada", **RIGHT, why_count="I have changed my mind.")
        course.grade()
        page.open_notebook(course, "ada")
        assert page.value("why_count") == "2.5"
        page.find(".score.needs_manual_grade")  # and asks for a second look
        page.screenshot("formgrader-second-look")
        page.press("button.mark-graded:not([style*='none'])")
        page.until(lambda: course.scores("ada")["why_count"] == (None, 2.5, None, False), "it is resolved")


def test_what_was_found_is_shown_and_a_learners_script_is_only_text(course: GradingCourse, tmp_path: Path) -> None:
    with served(course, tmp_path) as address, browser() as driver:
        page = Page(driver, address)
        page.open_notebook(course, "mallory")
        page.until(lambda: SCRIPT in page.text("body"), "the script is shown as text")
        assert driver.title != "taken over"


def test_feedback_does_not_show_the_rubric(course: GradingCourse) -> None:
    course.grade(feedback=True)
    page = (course.root / "feedback" / "ada" / NAME / f"{NAME}.html").read_text(encoding="utf-8")
    assert "why_count" in page
    assert "1 point: a reason." not in page
