"""Pictures of a notebook in JupyterLab, in both themes, for docs/notebook.md and the README.

    python -m tests.screenshots [FOLDER]

It opens unit 01 in headless Chromium, answers a prediction and an exercise wrongly, and runs the cells of a figure.
FOLDER is docs/ by default.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from tests.helpers import REPOSITORY
from tests.jupyter_browser import Lab, browser, served

THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
WRONG = "def low_rank_parameter_count(out_features, in_features, rank):\n    return rank * out_features * in_features"
NEEDED = "row_echelon", "rank", "outer_product_sum"  # by the figure
WINDOW = 1400, 1010


def open_unit(driver: Any, address: str, theme: str) -> Lab:
    """Unit 01 in this theme, with its imports done."""
    lab = Lab(driver, address, "unit_01.ipynb")
    lab.theme(THEMES[theme])
    lab.run(lab.cell("import numpy as np"))
    return lab


def take(lab: Lab, file: Path, cell: int, at: str = "end") -> None:
    """The notebook, scrolled so that the cell is at the bottom ("end") or at the top ("start")."""
    driver = lab.driver
    driver.execute_script("document.activeElement.blur()")
    lab.show(cell, at)
    time.sleep(1)  # for animations and images
    driver.find_element("css selector", ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook").screenshot(str(file))
    Image.open(file).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)
    print(file.name)


def pictures(driver: Any, address: str, theme: str, folder: Path) -> None:
    lab = open_unit(driver, address, theme)
    driver.set_window_size(*WINDOW)
    take(lab, folder / f"notebook-start-{theme}.png", 0, at="start")

    prediction = lab.cell("rank_of_counting = None")
    lab.write(prediction, 'rank_of_counting = "three"')
    lab.run(prediction)
    lab.run(lab.cell("M = torch.tensor([[1.0, 2, 3]"))
    judged = lab.cell('check("rank_of_counting")')
    lab.run(judged)
    take(lab, folder / f"notebook-prediction-{theme}.png", judged)

    exercise = lab.cell("def low_rank_parameter_count")
    lab.write(exercise, WRONG)
    lab.run(exercise)
    judged = exercise + 1
    lab.run(judged)
    take(lab, folder / f"notebook-check-{theme}.png", judged)

    for text in (
        *(f'working("{name}")' for name in NEEDED),
        "def hilbert",
        "def draw_pivots",
        "model, _ = load_gpt2",
        "pivots[",
    ):
        lab.run(lab.cell(text))
    figure = lab.cell("slider(")
    lab.run(figure)
    assert not lab.errors(), lab.errors()
    take(lab, folder / f"notebook-figure-{theme}.png", figure)


def main() -> None:
    folder = Path(sys.argv[1]) if sys.argv[1:] else REPOSITORY / "docs"
    with tempfile.TemporaryDirectory() as name:
        root, home = Path(name) / "course", Path(name) / "home"
        for theme in THEMES:
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(REPOSITORY / "notebooks/unit_01", root)
            (home / theme).mkdir(parents=True)
            with served(root, home / theme) as address, browser() as driver:
                pictures(driver, address, theme, folder)


if __name__ == "__main__":
    main()
