"""JupyterLab in headless Chromium: its own server, and the actions of a learner with mouse and keyboard."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SCREENSHOTS = "LORA_FROM_SCRATCH_SCREENSHOTS"  # a folder that keeps them
PATIENCE = 180.0  # seconds for anything that the browser does
# All cells in the page, also those that are scrolled away; no brackets that close themselves; no offers of help.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none", "codeCellConfig": {"autoClosingBrackets": False}},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},
}


@contextlib.contextmanager
def served(root: Path, home: Path) -> Iterator[str]:
    """Start JupyterLab on `root`, with settings, runtime files and progress in `home`; yield its address."""
    for name, values in SETTINGS.items():
        file = home / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "LORA_FROM_SCRATCH_HOME": str(home / "progress"),
        "OMP_NUM_THREADS": "1",
    }
    options = ["--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0"]
    options += ["--IdentityProvider.token=", f"--ServerApp.root_dir={root}"]
    with (home / "server.log").open("wb") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for_server(server, address, home / "server.log")
            yield address
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_for_server(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api", timeout=5):
            return
        time.sleep(0.3)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by selenium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    # No sandbox: tests run as root in CI, and open nothing but this project's own pages.
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,1000",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def wait_until(holds: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """What `holds` returns as soon as it is true of a page that changes while we look at it."""
    failure: Exception | None = None
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if found := holds():
                return found
        except Exception as error:  # an element is not there yet, or no longer
            failure = error
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds:g} seconds in vain until {what}") from failure


def read(look: Callable[[], T]) -> T:
    """What `look` returns; it looks again when an element has been replaced by a new one meanwhile."""
    from selenium.common.exceptions import StaleElementReferenceException

    until = time.monotonic() + PATIENCE
    while True:
        try:
            return look()
        except StaleElementReferenceException:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


class Lab:
    """A notebook opened in JupyterLab.

    Cells are numbers, and their elements are looked up each time, since JupyterLab may replace them at any moment.
    """

    def __init__(self, driver: Any, address: str, notebook: str) -> None:
        self.driver = driver
        with urllib.request.urlopen(f"{address}/api/contents/{notebook}", timeout=PATIENCE) as answer:
            kinds = [cell["cell_type"] for cell in json.load(answer)["content"]["cells"]]
        self.count, self.last = len(kinds), max(number for number, kind in enumerate(kinds) if kind == "code")
        driver.get(f"{address}/lab/tree/{notebook}?reset")
        self.wait_until(lambda: self._kernel() == "idle", "the kernel is ready")

    def wait_until(self, holds: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
        return wait_until(holds, what, seconds)

    def cell(self, text: str) -> int:
        """The number of the first code cell whose source contains this text."""
        sources = read(lambda: [self._source(cell) for cell in self._cells()])
        found = [number for number, source in enumerate(sources) if text in source]
        assert found, f"no code cell has {text!r}"
        return found[0]

    def element(self, cell: int, selector: str = "") -> Any:
        """The element of a cell, or the first one in it that the selector finds."""

        def find() -> Any:
            element = self._cells()[cell]
            return element.find_element("css selector", selector) if selector else element

        return self.wait_until(find, f"cell {cell} has {selector or 'an element'}")

    def write(self, cell: int, source: str) -> None:
        """Replace the contents of a cell, using the keyboard."""
        from selenium.webdriver import ActionChains, Keys

        def written() -> bool:
            self._click(cell)
            ActionChains(self.driver).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).perform()
            self.driver.execute_cdp_cmd("Input.insertText", {"text": source})
            time.sleep(0.2)
            return self._source(self.element(cell)).split() == source.split()

        self.wait_until(written, "the cell has the new code")

    def run(self, cell: int, seconds: float = PATIENCE) -> str:
        """Run a cell with Shift+Enter and return the text of its output."""
        from selenium.webdriver import ActionChains, Keys

        before = read(lambda: self._prompt(cell))
        self._click(cell)
        ActionChains(self.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
        self.wait_until(lambda: self._prompt(cell) not in (before, "[*]:", "[ ]:"), "the cell has run", seconds)
        self.wait_until(lambda: self._kernel() == "idle", "the kernel is idle", seconds)
        return self.output(cell)

    def run_all(self, seconds: float) -> None:
        """Choose Run > Run All Cells from the menu; what the cells printed before is cleared first."""
        self._menu("Edit", "Clear Outputs of All Cells")
        self.wait_until(lambda: self._prompt(self.last) == "[ ]:", "the outputs are cleared")
        self._menu("Run", "Run All Cells")
        self.wait_until(lambda: self._prompt(self.last) not in ("[*]:", "[ ]:"), "the last cell has run", seconds)
        self.wait_until(lambda: self._kernel() == "idle", "the kernel is idle", seconds)

    def theme(self, name: str) -> None:
        self._menu("Settings", "Theme", name)
        light = "true" if name.endswith("Light") else "false"
        self.wait_until(lambda: self._all(f'body[data-jp-theme-light="{light}"]'), f"the theme is {name}")

    def output(self, cell: int) -> str:
        def texts() -> list[str]:
            areas = self.element(cell).find_elements("css selector", ".jp-OutputArea-output")
            return [area.text for area in areas]

        return "\n".join(read(texts))

    def errors(self) -> list[str]:
        """The text of every error output; progress bars are written to the same stream but are not errors."""
        selector = '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]'
        texts = read(lambda: [output.text for output in self._all(selector)])
        return [text for text in texts if "Traceback" in text or "Error" in text]

    def images(self, name: str) -> list[Any]:
        """This property of every image in an output: "alt", "src", "naturalWidth"."""
        return read(lambda: [image.get_property(name) for image in self._all(".jp-OutputArea-output img")])

    def show(self, cell: int, at: str = "center") -> None:
        """Scroll the notebook until the cell is in the middle, at the top ("start") or at the bottom ("end")."""
        script = "arguments[0].scrollIntoView({block: arguments[1]})"
        read(lambda: self.driver.execute_script(script, self.element(cell), at))

    def screenshot(self, name: str, cell: int | None = None) -> None:
        """Kept where the environment variable says, otherwise not made."""
        folder = os.environ.get(SCREENSHOTS)
        if folder:
            if cell is not None:
                self.show(cell)
            time.sleep(0.5)  # for animations
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def _menu(self, *path: str) -> None:
        """Choose an entry; from the start again if a menu closed itself meanwhile."""
        from selenium.webdriver import ActionChains, Keys

        def chosen() -> bool:
            ActionChains(self.driver).send_keys(Keys.ESCAPE).perform()
            for depth, label in enumerate(path):
                where = ".lm-MenuBar-itemLabel" if depth == 0 else ".lm-Menu-itemLabel"
                find = functools.partial(self._labelled, where, label)
                item = self.wait_until(find, f"the menu has {label}", PATIENCE / 6)
                if depth == 0 or depth == len(path) - 1:
                    item.click()
                else:
                    ActionChains(self.driver).move_to_element(item).perform()
            return True

        self.wait_until(chosen, f"{' > '.join(path)} is chosen")

    def _labelled(self, selector: str, label: str) -> Any:
        return next((found for found in self._all(selector) if found.text == label), None)

    def _click(self, cell: int) -> None:
        def clicked() -> bool:
            self.show(cell)
            self.element(cell, ".cm-content").click()
            return True

        self.wait_until(clicked, f"cell {cell} has the focus")

    def _cells(self) -> list[Any]:
        def all_of_them() -> list[Any] | None:
            found = self._all(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell")
            return found if len(found) >= self.count else None  # running the last one adds an empty one

        return self.wait_until(all_of_them, f"the notebook's {self.count} cells are there")

    def _kernel(self) -> str:
        found = self._all(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook-ExecutionIndicator")
        return found[0].get_attribute("data-status") if found else ""

    def _prompt(self, cell: int) -> str:
        return self.element(cell, ".jp-InputPrompt").text.strip()

    def _source(self, cell: Any) -> str:
        """The code that is shown; "" of other cells, and of a folded one."""
        if "jp-CodeCell" not in cell.get_attribute("class"):
            return ""
        shown = cell.find_elements("css selector", ".cm-content")
        return shown[0].text if shown else ""

    def _all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)
