"""Progress bars: an output of the cell in a notebook, tqdm's own elsewhere, and nothing in a built notebook."""

from __future__ import annotations

import re
from typing import Any

import nbformat
import pytest

from lora_from_scratch.grading.building.execution import execute
from lora_from_scratch.support.progress_bar import tqdm
from tests.helpers import REPOSITORY

CODE = """\
{before}from lora_from_scratch.support.progress_bar import tqdm
for _ in tqdm(range(7), desc="<cards>", unit="card"):
    pass
for _ in tqdm(range(3), desc="gone", leave=False):
    pass
with tqdm(desc="without an end") as bar:
    bar.update(5)
"""


def outputs_of(before: str, building: bool) -> list[Any]:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE.format(before=before))])
    execute(notebook, building=building)
    return list(notebook.cells[0].outputs)


def test_in_a_notebook_a_bar_is_an_output_of_its_cell_and_says_how_far_it_came() -> None:
    outputs = outputs_of("import os\ndel os.environ['TQDM_DISABLE']\n", building=False)
    assert [output.output_type for output in outputs] == ["display_data"] * 3  # nothing on stderr
    done, gone, endless = (output.data for output in outputs)
    assert 'value="7" max="7" aria-label="&lt;cards&gt;"' in done["text/html"]
    assert re.search(r"<code>&lt;cards&gt;: 100% 7/7 \[.*card/s\]</code>$", done["text/html"])
    assert done["text/plain"].startswith("<cards>: 100%|")
    assert gone == {"text/html": "", "text/plain": ""}
    assert endless["text/plain"].startswith("without an end: 5it")
    assert "<progress  aria-label" in endless["text/html"]


def test_a_built_notebook_has_no_bars() -> None:
    assert outputs_of("", building=True) == []


def test_outside_a_notebook_it_is_tqdm(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tqdm(range(3), desc="steps", disable=False)) == [0, 1, 2]
    assert "steps: 100%|" in capsys.readouterr().err


def test_no_unit_has_bars_that_go_to_stderr() -> None:
    for source in (REPOSITORY / "course" / "units").glob("*.py"):
        assert "from tqdm" not in source.read_text(encoding="utf-8"), source.name
