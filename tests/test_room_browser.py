"""The teacher's page in a real browser: forty learners, and a connection that breaks.

Screenshots are kept where LORA_FROM_SCRATCH_SCREENSHOTS names a folder.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")
pytest.importorskip("starlette", reason="Starlette is not installed: pip install -e '.[room]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install -e '.[room]'")

from lora_from_scratch.checks.bank import wrong_answers
from lora_from_scratch.cli.room import find_units
from lora_from_scratch.room.protocol import Invitation, Status
from lora_from_scratch.room.server import Room
from lora_from_scratch.room.table import STUCK, Table
from tests.jupyter_browser import CHROMIUM, DRIVER, SCREENSHOTS, browser
from tests.rooms import CODE, RunningRoom, eventually, message_of, served

if not CHROMIUM or not DRIVER:
    pytest.skip("Chromium is not here (on Debian: apt install chromium chromium-driver)", allow_module_level=True)

pytestmark = pytest.mark.slow
MARKUP = "<b onclick=x>Bobby</b>"
# Among them: names that are taken, long, or of other scripts, one of them written from right to left.
NAMES = [
    *("Ada", "Grace", "Emmy", "Sofja", "Katherine", "Hedy", "Radia", "Barbara", "Frances", "Karen", "Joan", "Shafi"),
    *("Cynthia", "Lenore", "Daphne", "Fei-Fei", "Timnit", "Anima", "Regina", "Doina", "Joëlle", "Rediet", "Chelsea"),
    *(
        "Percy",
        "Yoshua",
        "Geoffrey",
        "Yann",
        "Andrej",
        "Ilya",
        "Tri",
        "陳省身",
        "اسماء",
        "Đặng",
        "Ólafur",
        "O'Neil & co",
    ),
    *("Ada", "Ada", "Grace", "Wolfeschlegelsteinhausenberger", MARKUP),
]
WHAT_THE_TABLE_SAYS = """
const said = cell => [cell.className, cell.querySelector(".hidden").textContent]
return Object.fromEntries([...document.querySelectorAll("tbody tr")].map(row => {
  const [name, unit, ...exercises] = row.cells
  return [name.querySelector("bdi").textContent, [unit.textContent, ...exercises.map(said)]]
}))
"""
# The texts of the page whose contrast with their background is below level AA of WCAG 2.2 (1.4.3).
LOW_CONTRAST = """
const number = colour => colour.match(/[\\d.]+/g).map(Number)
const light = colour => colour.slice(0, 3).map(c => c / 255)
  .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
function behind(element) {
  for (; element; element = element.parentElement) {
    const colour = number(getComputedStyle(element).backgroundColor)
    if (colour.length === 3 || colour[3] === 1) return colour
  }
}
const low = new Set()
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
while (walk.nextNode()) {
  const element = walk.currentNode.parentElement
  if (!walk.currentNode.data.trim() || !element.checkVisibility()) continue
  const [dark, bright] = [light(number(getComputedStyle(element).color)), light(behind(element))].sort((a, b) => a - b)
  if ((bright + 0.05) / (dark + 0.05) < 4.5) low.add(walk.currentNode.data.trim().slice(0, 40))
}
return [...low]
"""


class Running:
    """A room whose server can be stopped and started again at the same port."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.room = Room(
            Table(find_units(["00", "01", "09"]), 100, message_of), Invitation(CODE, "127.0.0.1", self.port)
        )
        self.stack = contextlib.ExitStack()

    def start(self) -> RunningRoom:
        if self.listening.fileno() == -1:
            self.listening = socket.create_server(("127.0.0.1", self.port))
        return self.stack.enter_context(served(self.room, self.listening))

    def stop(self) -> None:
        self.stack.close()
        self.listening.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    running = Running()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def room(server: Running) -> RunningRoom:
    """Forty learners: each has passed some exercises of units 01 and 09 and is at the next one."""
    opened = server.start()
    exercises = [name for unit in opened.table.units[1:] for name in unit.exercises]
    mistakes = {name: [answer.name for answer in wrong_answers(name) if answer.message] for name in exercises}
    now = time.time()

    def work(number: int) -> None:
        chosen = random.Random(number)
        opened.join(number, NAMES[number])
        place = min(max(int(chosen.gauss(6, 2.5)), 0), len(exercises) - 1)
        statuses = {name: Status("passed", now - 3600 + 60 * step) for step, name in enumerate(exercises[:place])}
        for name in exercises[1:place:4]:
            statuses[name] = Status("library", now - 1200)
        state = chosen.choice(("failed", "failed", "trying"))
        mistake = chosen.choice(mistakes[exercises[place]][:3]) if state == "failed" else ""
        at = now - chosen.uniform(*chosen.choice(((0, 60), (STUCK + 60, 2 * STUCK))))  # far from STUCK
        statuses[exercises[place]] = Status(state, at, mistake, hints=chosen.randint(0, 3))
        assert opened.report(number, **statuses)[0] == 200

    threads = [threading.Thread(target=work, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened.table.learners) == 40
    return opened


@pytest.fixture(scope="module")
def driver(room: RunningRoom) -> Iterator[Any]:
    with browser() as found:
        found.get(f"http://127.0.0.1:{room.port}/?key={room.room.key}")
        eventually(lambda: len(found.find_elements("css selector", "tbody tr")) == 40)
        yield found


def choose_unit(driver: Any, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(driver.find_element("id", "unit")).select_by_value(value)


def text(driver: Any, name: str) -> str:
    return driver.find_element("id", name).text


def test_the_table_says_of_forty_learners_what_they_have_reported(room: RunningRoom, driver: Any) -> None:
    choose_unit(driver, "all")
    said = driver.execute_script(WHAT_THE_TABLE_SAYS)
    words = {"passed": "passed", "failed": "not right yet", "trying": "begun", "library": "uses the library's version"}
    view = room.view()
    exercises = [name for unit in view["units"] for name in unit["exercises"]]
    assert len(said) == 40
    for row in view["learners"]:
        unit, *cells = said[row["name"]]
        assert unit == room.table.exercises[row["here"]].number
        for name, (look, word) in zip(exercises, cells, strict=True):
            status = row["exercises"].get(name)
            assert word.startswith(words[status["state"]] if status else "not started")
            assert look.split()[0] == (status["state"] if status else "none")
            if status and status["misconception"]:
                assert status["misconception"] in word
            assert ("stuck" in look) == (row["here"] == name and row["stuck"])
            assert ("here for" in word) == (row["here"] == name and row["minutes"] is not None)
    assert driver.current_url == f"http://127.0.0.1:{room.port}/"  # no projector shows the key
    assert text(driver, "count") == "40 learners"
    assert f'join("{CODE}@127.0.0.1:{room.port}", "your name")' in driver.page_source
    assert view["help"][0]["name"] in text(driver, "help").splitlines()[0]
    choose_unit(driver, "auto")


def test_a_name_is_text_and_can_be_hidden(driver: Any) -> None:
    assert MARKUP in driver.execute_script(WHAT_THE_TABLE_SAYS)
    assert driver.find_elements("css selector", "tbody b") == []
    driver.find_element("id", "hide").click()
    assert not set(NAMES) & set(driver.execute_script(WHAT_THE_TABLE_SAYS))
    assert "Ada" not in driver.find_element("tag name", "main").text
    driver.find_element("id", "hide").click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_it_is_readable_in_both_colour_schemes_and_on_a_telephone(
    room: RunningRoom, driver: Any, width: int, scheme: str
) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert driver.execute_script(LOW_CONTRAST) == []
    if folder := os.environ.get(SCREENSHOTS):
        for part, place in (("top", "0"), ("table", "document.getElementById('table-title').offsetTop - 10")):
            driver.execute_script(f"window.scrollTo(0, {place})")
            driver.save_screenshot(str(Path(folder) / f"room-{width}-{scheme}-{part}.png"))


def test_the_keyboard_reaches_everything_and_keeps_its_place_when_the_page_changes(
    room: RunningRoom, driver: Any
) -> None:
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.expected_conditions import alert_is_present
    from selenium.webdriver.support.ui import WebDriverWait

    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.find_element("id", "unit").click()
    ActionChains(driver).send_keys(Keys.ESCAPE, Keys.TAB, Keys.TAB, Keys.TAB).perform()
    focused = "return document.activeElement.getAttribute('aria-label')"
    first = driver.execute_script(focused)
    assert first.startswith("Remove ")
    room.join(60, "Aaron")  # a row above it
    eventually(lambda: len(driver.find_elements("css selector", "tbody tr")) == 41)
    assert driver.execute_script(focused) == first
    driver.find_element("css selector", '[aria-label="Remove Aaron"]').send_keys(Keys.ENTER)
    WebDriverWait(driver, 60).until(alert_is_present()).accept()
    eventually(lambda: len(driver.find_elements("css selector", "tbody tr")) == 40)
    assert len(room.table.learners) == 40


def test_there_is_no_error_in_the_console_and_the_page_connects_again_by_itself(
    server: Running, room: RunningRoom, driver: Any
) -> None:
    assert driver.get_log("browser") == []
    server.stop()
    eventually(lambda: "trying again" in text(driver, "lost"))
    server.start()
    room.join(61, "Zoe")
    eventually(lambda: "Zoe" in driver.execute_script(WHAT_THE_TABLE_SAYS))
    assert text(driver, "lost") == ""
    eventually(lambda: text(driver, "count") == "41 learners")
