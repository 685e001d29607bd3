"""nbgrader's formgrader: a server of its own, and what a person sees and does in its pages."""

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

from tests.grading_course import NAME, GradingCourse
from tests.jupyter_browser import PATIENCE, SCREENSHOTS, read, wait_until

# Without the garbage collector, what the server has read from the gradebook is not forgotten by chance.
SERVER = "import gc, runpy; gc.disable(); runpy.run_module('jupyter_server', run_name='__main__', alter_sys=True)"
LOADED = "return formgrader.grades.loaded && formgrader.comments.loaded"


@contextlib.contextmanager
def served(course: GradingCourse, home: Path) -> Iterator[str]:
    """A Jupyter server with the formgrader on the course; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVER, "--no-browser", "--allow-root", f"--port={port}"]
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

    def open_notebook(self, course: GradingCourse, learner: str) -> None:
        """A learner's notebook, with its scores and comments, which arrive after the page."""
        self.open(notebook_of(course, learner))
        self.until(lambda: self.driver.execute_script(LOADED), f"the scores and comments of {learner} are there")

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
        return read(lambda: self.find(f"[id='{field}']").get_attribute("value"))

    def placeholder(self, field: str) -> str:
        return read(lambda: self.find(f"[id='{field}']").get_attribute("placeholder"))

    def text(self, selector: str) -> str:
        return read(lambda: self.find(selector).text)

    def write(self, field: str, text: str) -> None:
        """Into a score or a comment; it is saved when the field is left."""

        def written() -> bool:
            element = self.driver.find_element("css selector", f"[id='{field}']")
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
            element.clear()
            element.send_keys(text)
            return element.get_attribute("value") == text  # the page moves the focus when its mathematics is drawn

        self.until(written, f"{field} is {text!r}")
        self.driver.execute_script("document.activeElement.blur()")

    def press(self, selector: str) -> None:
        """A button; again if the page was scrolled away below the pointer."""

        def pressed() -> bool:
            element = self.driver.find_element("css selector", selector)
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
            element.click()
            return True

        self.until(pressed, f"{selector} is pressed")

    def until(self, holds: Callable[[], Any], what: str) -> Any:
        return wait_until(holds, what)

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
