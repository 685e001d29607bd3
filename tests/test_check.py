"""What a learner calls: one friendly verdict whatever happens, and the points as a number."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_from_scratch.checks import check, display, hint, library, notebook, progress, progress_file, working
from lora_from_scratch.checks.notebook import Points, UnknownExerciseError, verdict_on
from lora_from_scratch.checks.units import find
from lora_from_scratch.linear_algebra import rank as rank_module
from lora_from_scratch.linear_algebra.rank import row_echelon
from lora_from_scratch.support import learner_folder


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(learner_folder.HOME, str(tmp_path / "home"))
    monkeypatch.setattr(progress_file, "_pending", [])
    monkeypatch.setattr(progress_file, "_unsaved", [])


def mine(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    return row_echelon(matrix, tolerance)


def said(capsys: pytest.CaptureFixture[str], name: Any, **names: Any) -> str:
    """What `check` prints, with these names in the notebook."""
    points = check(name, namespace=names)
    assert isinstance(points, float)
    return " ".join(capsys.readouterr().out.split())


def test_the_points_are_a_number_that_nbgrader_reads_and_words_for_a_person() -> None:
    points = Points(2.5, 5)
    assert repr(points) == str(points) == "2.5"
    assert float(repr(points)) == points
    assert points._repr_html_() == ""  # the verdict above it has said them


def test_a_right_answer_earns_its_points_on_other_inputs_every_time(capsys: pytest.CaptureFixture[str]) -> None:
    most = find("row_echelon")[1].points
    assert said(capsys, "row_echelon", row_echelon=mine).startswith(f"✓ Passed: row_echelon, {most} of {most} points")
    names = {"row_echelon": lambda matrix, tolerance=None: None}
    seeds = {verdict_on("row_echelon", None, names).seed for _ in range(3)}
    assert len(seeds) == 3
    assert verdict_on("row_echelon", 7, names).failure == verdict_on("row_echelon", 7, names).failure


@pytest.mark.parametrize(
    ("name", "names", "sentence"),
    [
        (
            "row_ecelon",
            {},
            "? No such exercise: row_ecelon There is no exercise 'row_ecelon'; did you mean 'row_echelon'?",
        ),
        (mine, {}, '? No such exercise: check Write the name of the exercise in quotes: check("mine").'),
        (None, {}, 'Write the name of the exercise in quotes: check("name_of_the_exercise").'),
        ("row_echelon", {}, "There is no row_echelon in this notebook yet: run the cell that defines it"),
        ("rank", {"rank": rank_module}, "rank is a module here: an import has overwritten your function."),
        ("row_echelon", {"row_echelon": 3}, "row_echelon is the number 3 here, but should be a function"),
        ("row_echelon", {"row_echelon": None}, "row_echelon is None here, but should be a function"),
        ("row_echelon", {"row_echelon": torch.eye(2)}, "row_echelon is a Tensor here, but should be a function"),
        ("row_echelon", {"row_echelon": lambda m: m}, "It has the arguments|row_echelon(matrix, tolerance=None)"),
        ("row_echelon", {"row_echelon": lambda: 0}, "cannot be called with the exercise's arguments"),
        ("row_echelon", {"row_echelon": row_echelon}, "→ The library's version: row_echelon, 0 of"),
    ],
)
def test_bad_use_is_one_friendly_verdict(
    capsys: pytest.CaptureFixture[str], name: Any, names: dict[str, Any], sentence: str
) -> None:
    assert sentence.split("|")[-1] in said(capsys, name, **names)


def test_a_class_that_is_asked_for_and_a_function_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    exercise = types.SimpleNamespace(name="Layer", object=torch.nn.Linear, points=3)
    verdict = notebook.unusable(exercise, {"Layer": mine})  # type: ignore[arg-type]
    assert verdict is not None
    assert verdict.message == "`Layer` is a function here, but should be a class: `class Layer: ...`."
    assert notebook.unusable(exercise, {"Layer": type("Layer", (), {})}) is None  # type: ignore[arg-type]


def test_a_stub_is_not_started_yet(capsys: pytest.CaptureFixture[str]) -> None:
    def stub(matrix: Tensor, tolerance: float | None = None) -> None:
        raise NotImplementedError

    out = said(capsys, "row_echelon", row_echelon=stub)
    assert out.startswith("○ Not started yet: row_echelon, 0 of")
    assert "not right" not in out
    assert progress_file.load().entries == {}


def test_an_answer_that_hangs_is_stopped_with_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exercise = find("row_echelon")[1]
    object.__setattr__(exercise, "seconds", 0.2)
    try:

        def hangs(matrix: Tensor, tolerance: float | None = None) -> None:
            while True:
                pass

        out = said(capsys, "row_echelon", row_echelon=hangs)
    finally:
        object.__setattr__(exercise, "seconds", 4.0)
    assert out.startswith("■ Stopped: row_echelon")
    assert "Is there a loop that does not end" in out
    assert "– not tried" in out


def test_a_mistake_of_the_course_is_said_to_be_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notebook, "judge", lambda *_: 1 / 0)
    assert "! The check itself failed: row_echelon" in (out := said(capsys, "row_echelon", row_echelon=mine))
    assert "This is an error in the course, not in your code" in out
    monkeypatch.setenv("LORA_FROM_SCRATCH_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        check("row_echelon", namespace={"row_echelon": mine})


def test_hints_open_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for _ in range(4):
        hint("row_echelon")
        counts.append(capsys.readouterr().out.count(" of 3: "))
    assert counts == [1, 2, 3, 3]
    hint("row_ecelon")
    assert "did you mean" in capsys.readouterr().out
    hint("rank_of_counting")
    assert "Predictions have no hints" in capsys.readouterr().out


def test_a_learner_who_is_stuck_goes_on_with_the_librarys(capsys: pytest.CaptureFixture[str]) -> None:
    most = find("row_echelon")[1].points
    assert library("row_echelon") is row_echelon
    assert f"gives 0 of {most} points" in " ".join(capsys.readouterr().out.split())
    assert progress_file.load().entries["row_echelon"].library
    assert check("row_echelon", namespace={"row_echelon": row_echelon}) == 0
    assert check("row_echelon", namespace={"row_echelon": mine}) == most


def test_an_unknown_name_stops_the_cell_without_a_traceback() -> None:
    for function in (library, working):
        with pytest.raises(UnknownExerciseError, match="There is no exercise 'row_ecelon'; did you mean") as caught:
            function("row_ecelon")
        assert caught.value._render_traceback_() == [str(caught.value)]
    with pytest.raises(UnknownExerciseError, match="no library version of it"):
        library("rank_of_counting")


def test_experiments_go_on_with_ones_own_if_it_is_right_and_with_the_librarys_otherwise() -> None:
    assert working("row_echelon", {"row_echelon": mine}) is mine
    assert working("row_echelon", {"row_echelon": lambda matrix: matrix}) is row_echelon
    assert working("row_echelon", {}) is row_echelon


def test_progress_in_a_cell(capsys: pytest.CaptureFixture[str]) -> None:
    check("row_echelon", namespace={"row_echelon": mine})
    capsys.readouterr()
    progress()
    progress("01")
    progress("77")
    out = capsys.readouterr().out
    assert "Your progress" in out
    assert "✓ row_echelon" in out
    assert "there is no unit '77'" in out


def test_a_notebook_gets_both_forms_and_the_number_as_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a real kernel: the verdict is display data, the result of the cell is what nbgrader reads."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    new = nbformat.v4.new_code_cell
    cells = [
        new("from lora_from_scratch.checks import *\ndef row_echelon(matrix): return '<i>&'"),
        new("check('row_echelon')"),
        new("library('nothing')"),
    ]
    made = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(made, timeout=120, allow_errors=True, kernel_name="python3").execute()
    verdict, result = made.cells[1].outputs
    assert (verdict.output_type, result.output_type) == ("display_data", "execute_result")
    assert verdict.data["text/plain"].startswith("✗ Not right yet: row_echelon, 0 of")
    assert verdict.data["text/html"].startswith("<div")
    assert float(result.data["text/plain"]) == 0.0
    error = made.cells[2].outputs[0]
    assert error.traceback == ["There is no exercise 'nothing'"]


def test_the_words_of_a_learner_are_shown_as_text() -> None:
    assert "<script>" not in display.as_html(verdict_on("row_echelon", 0, {"row_echelon": lambda matrix: "<script>"}))
