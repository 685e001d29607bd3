"""What a learner is told before handing in."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from lora_from_scratch.cli import main
from tests.damages import after, answer, by_id, copied, metadata_stripped, released, solutions, submission


def check(notebook: object, folder: Path, *options: str) -> int:
    path = folder / "unit_01.ipynb"
    nbformat.write(notebook, path)
    return main(["check-submission", str(path), *options])


def test_a_finished_notebook_is_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(submission("01"), tmp_path) == 0
    said = capsys.readouterr().out
    assert "8 of 8" in said
    assert "Nothing to fix" in said


def test_what_is_not_written_yet_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = submission("01")
    for name in ("rank", "rank_of_counting", "nearly_low"):
        by_id(notebook, name).source = by_id(released("01"), name).source
    by_id(notebook, "row_echelon").source = 'row_echelon = library("row_echelon")'
    by_id(notebook, "rank_deficiency").source += "\n)"
    by_id(notebook, "outer_product_sum").source = "# nothing"
    assert check(notebook, tmp_path) == 1
    said = capsys.readouterr().out.splitlines()
    for line in (
        "to do: rank is not written yet.",
        "to do: You have not made the prediction rank_of_counting yet.",
        "to do: The open question nearly_low has no answer yet.",
        "to do: row_echelon is the library's version, which earns no points.",
        "to do: The cell of rank_deficiency is not valid Python. Run it and fix the error.",
        "to do: No cell above its check defines outer_product_sum.",
        "2 of 8 exercises, predictions and open questions have been filled in.",
    ):
        assert line in said


def test_damage_is_said_in_one_line_each_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = submission("01")
    after(notebook, solutions(notebook)[1], copied(solutions(notebook)[1]))
    notebook.cells.remove(answer(notebook))
    assert check(notebook, tmp_path) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("fix: The cell of rank appears 2 times")
    assert said[1].startswith("lost: The answer to the open question nearly_low is missing")
    assert len(said) == 4


def test_a_notebook_without_metadata_can_be_graded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = submission("01")
    metadata_stripped(notebook)
    assert check(notebook, tmp_path) == 1
    assert "no points are lost" in capsys.readouterr().out


def test_what_cannot_be_graded_ends_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "unit_01.ipynb"
    path.write_text("print(1)")
    assert main(["check-submission", str(path)]) == 2
    assert "not a Jupyter notebook" in capsys.readouterr().out
    mine = tmp_path / "mine.ipynb"
    nbformat.write(submission("01"), mine)
    assert main(["check-submission", str(mine)]) == 2
    assert "--unit" in capsys.readouterr().err
    assert main(["check-submission", str(mine), "--unit", "1"]) == 0
    assert main(["check-submission", str(mine), "--unit", "98"]) == 2
    assert main(["check-submission", str(tmp_path / "none.ipynb")]) == 2
    assert "there is no notebook" in capsys.readouterr().err
