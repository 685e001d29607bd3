"""The formgrader in a real browser: an instructor sees the grades, grades by hand, and grades again with our command.

Screenshots are kept where LORA_FROM_SCRATCH_SCREENSHOTS names a folder.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")
pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")

from tests.grading_course import NAME, RIGHT, GradingCourse, template
from tests.jupyter_browser import CHROMIUM, DRIVER, PATIENCE, SCREENSHOTS, browser

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


@contextlib.contextmanager
def served(course: GradingCourse, home: Path) -> Iterator[str]:
    """A Jupyter server with the formgrader on the course; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "server", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={course.root}"]
    command += ["--ServerApp.jpserver_extensions={'nbgrader.server_extensions.formgrader': True}"]
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTER_DATA_DIR": str(home / "data"),
    }
    address = f"http://127.0.0.1:{port}"
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=course.root / "course", env=environment, stdout=log, stderr=log)
        try:
            until = time.monotonic() + PATIENCE
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api", timeout=5):
                    break
                assert server.poll() is None, (home / "server.log").read_text()[-2000:]
                assert time.monotonic() < until, "the server does not answer"
                time.sleep(0.3)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


class Page:
    """What a person sees and does in the formgrader."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, path: str) -> None:
        self.driver.get(f"{self.address}/formgrader/{path}")

    def find(self, selector: str) -> Any:
        return self.until(lambda: self.driver.find_element("css selector", selector), f"there is {selector}")

    def row(self, text: str) -> list[str]:
        """The cells of the table's row that has this text in it."""

        def holds() -> list[str] | None:
            for row in self.driver.find_elements("css selector", "tbody tr"):
                cells = [cell.text for cell in row.find_elements("css selector", "td")]
                if any(text in cell for cell in cells):
                    return cells
            return None

        return self.until(holds, f"a row has {text!r}")

    def value(self, field: str) -> str:
        return self.find(f"[id='{field}']").get_attribute("value")

    def placeholder(self, field: str) -> str:
        return self.find(f"[id='{field}']").get_attribute("placeholder")

    def write(self, field: str, text: str) -> None:
        """Into a score or a comment; it is saved when the field is left."""
        element = self.find(f"[id='{field}']")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()
        element.send_keys(text)
        self.driver.execute_script("arguments[0].blur()", element)

    def until(self, holds: Callable[[], Any], what: str) -> Any:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            with contextlib.suppress(Exception):  # the page is drawn anew while we look at it
                if found := holds():
                    return found
            time.sleep(0.2)
        raise AssertionError(f"waited {PATIENCE:g} seconds in vain until {what}")

    def screenshot(self, name: str) -> None:
        folder = os.environ.get(SCREENSHOTS)
        if folder:
            time.sleep(0.5)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))


def notebook_of(course: GradingCourse, learner: str) -> str:
    """The path of a learner's notebook in the formgrader."""
    found: list[str] = []
    course.as_a_person(lambda book: found.append(book.find_submission_notebook(NAME, NAME, learner).id))
    return f"submissions/{found[0]}/"


def test_an_instructor_sees_the_grades_grades_by_hand_and_keeps_that_when_it_is_graded_again(
    course: GradingCourse, tmp_path: Path
) -> None:
    with served(course, tmp_path) as address, browser() as driver:
        page = Page(driver, address)
        page.open("manage_assignments")
        assert "3" in page.row(NAME)
        page.screenshot("formgrader-assignments")
        page.open(f"manage_submissions/{NAME}")
        assert any("needs manual grading" in cell for cell in page.row("ada"))
        assert any("graded" in cell for cell in page.row("bob"))
        assert "7" in " ".join(page.row("ada"))

        page.open(notebook_of(course, "ada"))
        page.until(lambda: page.placeholder("check-fourfold_root") == "4", "the automatic points are there")
        assert page.value("why_count") == ""
        page.write("why_count", "2.5")
        page.write("why_count-comment", "Good: **counting** is knowing.")
        page.until(lambda: course.scores("ada")["why_count"] == (None, 2.5, None, False), "the score is saved")
        page.until(lambda: course.comments("ada")["why_count"][1], "the comment is saved")
        page.screenshot("formgrader-by-hand")

        course.hand_in("bob", **RIGHT)
        assert course.grade(again=True).marked == 3
        page.open(notebook_of(course, "ada"))
        page.until(lambda: page.value("why_count") == "2.5", "the score given by hand is still there")
        assert page.value("why_count-comment") == "Good: **counting** is knowing."
        page.open(notebook_of(course, "bob"))
        page.until(lambda: page.placeholder("check-fourfold_root") == "4", "the new automatic points are there")

        course.hand_in("ada", **RIGHT, why_count="I have changed my mind.")
        course.grade()
        page.open(notebook_of(course, "ada"))
        page.until(lambda: page.value("why_count") == "2.5", "the score is still there")
        page.find(".score.needs_manual_grade")  # and asks for a second look
        page.screenshot("formgrader-second-look")
        page.find("button.mark-graded:not([style*='none'])").click()
        page.until(lambda: course.scores("ada")["why_count"] == (None, 2.5, None, False), "it is resolved")


def test_what_was_found_is_shown_and_a_learners_script_is_only_text(course: GradingCourse, tmp_path: Path) -> None:
    with served(course, tmp_path) as address, browser() as driver:
        page = Page(driver, address)
        page.open(notebook_of(course, "mallory"))
        page.until(lambda: SCRIPT in page.find("body").text, "the script is shown as text")
        assert driver.title != "taken over"
