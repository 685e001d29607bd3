"""The course in a real browser: JupyterLab in headless Chromium, driven as a learner would.

Screenshots are kept where LORA_FROM_SCRATCH_SCREENSHOTS names a folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import REPOSITORY
from tests.jupyter_browser import CHROMIUM, DRIVER, Lab, browser, served

pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install -e '.[course]'")
if not CHROMIUM or not DRIVER:
    pytest.skip("Chromium is not here (on Debian: apt install chromium chromium-driver)", allow_module_level=True)

MINUTES = 60
WRONG = """def low_rank_parameter_count(out_features, in_features, rank):
    return rank * out_features * in_features
"""
RIGHT = """def low_rank_parameter_count(out_features, in_features, rank):
    sizes = (out_features, in_features)
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in (*sizes, rank)):
        raise ValueError("whole numbers from 1")
    if rank > min(sizes):
        raise ValueError("the rank is too large")
    return sum(rank * size for size in sizes)
"""
FIGURES = """\
import torch
from lora_from_scratch.support import plotting
from lora_from_scratch.checks import progress
from lora_from_scratch.support.figures import show, slider

def draw(rank):
    figure, (axes,) = plotting.panels(1)
    axes.imshow(torch.ones(rank, rank))
    plotting.label(axes, x="column", y="row", title=f"rank {rank}")
    return figure
"""
ALT = 'Rows and columns: "low" <rank> & more'


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The learner's folder: unit 01, and a small notebook with figures that JupyterLab has no reason to trust."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    folder = tmp_path_factory.mktemp("course")
    new = nbformat.v4.new_code_cell
    cells = [
        new(FIGURES),
        new(f"show(draw(3), {ALT!r})"),
        new(f"slider(draw, 'rank', [1, 2, 4], 2, {ALT!r})"),
        new("progress()"),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbclient.NotebookClient(notebook, timeout=300).execute()
    nbformat.write(notebook, folder / "figures.ipynb")
    if (REPOSITORY / "notebooks/unit_01").is_dir():
        shutil.copytree(REPOSITORY / "notebooks/unit_01", folder / "unit_01")
    return folder


@pytest.fixture(scope="module")
def address(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(root, tmp_path_factory.mktemp("jupyter")) as found:
        yield found


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.mark.unit_01
def test_a_learner_opens_unit_01_runs_it_and_solves_an_exercise_wrongly_and_then_rightly(
    root: Path, address: str, driver: Any
) -> None:
    if not (root / "unit_01").is_dir():
        pytest.skip("unit 01 is not built yet: lora-from-scratch build 01")
    notebook = next((root / "unit_01").rglob("*.ipynb"))
    lab = Lab(driver, address, notebook.relative_to(root).as_posix())
    lab.run_all(seconds=5 * MINUTES)
    assert lab.errors() == []
    check = lab.cell('check("low_rank_parameter_count")')
    assert "Not started yet" in lab.output(check)
    lab.screenshot("learner-unit-01-not-started", check)

    exercise = lab.cell("def low_rank_parameter_count(")
    lab.write(exercise, WRONG)
    lab.run(exercise)
    verdict = lab.run(check)
    lab.screenshot("learner-unit-01-wrong", check)
    assert "✗ Not right yet" in verdict
    assert "First case that is not right" in verdict
    assert 'hint("low_rank_parameter_count")' in verdict
    assert "Traceback" not in verdict

    lab.write(exercise, RIGHT)
    lab.run(exercise)
    verdict = lab.run(check)
    lab.screenshot("learner-unit-01-right", check)
    assert "✓ Passed" in verdict
    assert "all right" in verdict
    lab.theme("JupyterLab Dark")
    lab.screenshot("learner-unit-01-dark", check)
    assert all(lab.images("alt"))
    lab.theme("JupyterLab Light")


def test_figures_have_their_alternative_text_before_and_after_running_and_the_slider_moves(
    address: str, driver: Any
) -> None:
    from selenium.webdriver import Keys

    lab = Lab(driver, address, "figures.ipynb")
    lab.wait_until(lambda: lab.images("naturalWidth")[0] > 100, "the stored figure is shown")
    assert lab.images("alt")[:1] == [ALT]
    lab.run_all(seconds=2 * MINUTES)
    assert lab.errors() == []
    control = lab.cell("slider(draw")
    lab.wait_until(lambda: len(lab.images("src")) == 2, "both figures are there")
    before = lab.images("src")[1]
    lab.show(control)
    lab.element(control, ".noUi-handle").send_keys(Keys.ARROW_RIGHT)
    lab.wait_until(lambda: lab.images("src")[1] != before, "the figure of the slider's next value")
    lab.screenshot("learner-slider", control)
    moved = f"The same figure for rank 4. For rank 2: {ALT}"
    assert lab.images("alt") == [ALT, moved]
    assert "Your progress" in lab.output(lab.cell("progress()"))
