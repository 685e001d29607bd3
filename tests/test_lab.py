"""`lora-from-scratch lab`: a copy of the notebooks that is the learner's own, and JupyterLab on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from lora_from_scratch.cli import lab
from tests.cli_calls import complaint


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number in ("00", "01"):
        unit = tmp_path / "notebooks" / f"unit_{number}"
        unit.mkdir(parents=True)
        (unit / f"unit_{number}.ipynb").write_text("{}")
        (unit / f"unit_{number}.png").write_bytes(b"picture")
    monkeypatch.setattr(lab, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("jupyterlab")
    return tmp_path


def test_what_is_not_there_yet_is_copied_and_what_was_written_stays(course: Path) -> None:
    mine = course / "work"
    assert lab.copy_notebooks(course / "notebooks", mine) == 2
    (mine / "unit_00/unit_00.ipynb").write_text("solved")
    (mine / "unit_01/unit_01.ipynb").unlink()
    assert lab.copy_notebooks(course / "notebooks", mine) == 1
    assert (mine / "unit_00/unit_00.ipynb").read_text() == "solved"
    assert (mine / "unit_01/unit_01.png").read_bytes() == b"picture"


def test_the_command_becomes_jupyterlab_on_the_unit(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(lab.os, "execv", lambda *command: started.append(command))
    from tests.cli_calls import output_of

    assert output_of("lab", "--unit", "1", "--no-browser", "--port", "8899") == "2 new notebooks in work.\n"
    ((program, command),) = started
    assert program == sys.executable
    assert command[:5] == [sys.executable, "-m", "jupyter", "lab", "work/unit_01/unit_01.ipynb"]
    assert {"--no-browser", "--port=8899", f"--ServerApp.root_dir={course / 'work'}"} <= set(command)
    assert output_of("lab") == "Your notebooks are in work.\n"
    assert started[1][1][4] == "work/unit_00/unit_00.ipynb"


def test_bad_input_ends_in_one_line(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert complaint("lab", "--unit", "77") == "error: there is no unit 77 in work; there are 00, 01"
    monkeypatch.setattr(lab, "NOTEBOOKS", course / "nothing")
    assert "there are no notebooks in" in complaint("lab")
    monkeypatch.setattr(lab.importlib.util, "find_spec", lambda name: None)
    assert "JupyterLab is not installed; run: python -m pip install" in complaint("lab")
