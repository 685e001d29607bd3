"""`lora-from-scratch lab`: a copy of the notebooks that is the learner's own, and JupyterLab on it."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_from_scratch.cli import lab
from lora_from_scratch.support.course_files import RECORD, copy_unchanged
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


def test_what_is_missing_is_copied_and_what_was_written_stays(course: Path) -> None:
    mine = course / "work"
    assert len(copy_unchanged(course / "notebooks", mine).new) == 4
    (mine / "unit_00/unit_00.ipynb").write_text("solved")
    (mine / "unit_01/unit_01.ipynb").unlink()
    assert copy_unchanged(course / "notebooks", mine) == (["unit_01/unit_01.ipynb"], [], [])
    assert (mine / "unit_00/unit_00.ipynb").read_text() == "solved"
    assert (mine / "unit_01/unit_01.png").read_bytes() == b"picture"


def test_a_new_release_updates_what_is_untouched_and_keeps_what_was_changed(course: Path) -> None:
    release, mine = course / "notebooks", course / "work"
    copy_unchanged(release, mine)
    (mine / "unit_00/unit_00.ipynb").write_text("solved")
    for unit in ("unit_00/unit_00", "unit_01/unit_01"):
        (release / f"{unit}.ipynb").write_text('{"new": 1}')
    for _ in range(2):  # the second time, nothing is left to update
        copied = copy_unchanged(release, mine)
        assert copied.kept == ["unit_00/unit_00.ipynb"]
        assert (mine / "unit_00/unit_00.ipynb").read_text() == "solved"
        assert (mine / "unit_01/unit_01.ipynb").read_text() == '{"new": 1}'
    assert copied.updated == []
    lines = lab.report(lab.Copied([], ["unit_01/unit_01.ipynb", "unit_01/unit_01.png"], copied.kept), mine, "en")
    assert "Brought up to date, as you had not changed them: unit_01." in lines
    assert "newer version of unit_00; your own was kept" in lines[-1]


def test_what_was_copied_is_said_in_the_language_of_the_notebooks(tmp_path: Path) -> None:
    files = ["unit_01/unit_01.ipynb"]
    said = lab.report(lab.Copied(files, files, files), tmp_path, "zh") + lab.report(
        lab.Copied([], [], []), tmp_path, "zh"
    )
    assert len(said) == 4
    for line in said:
        words = set(re.findall(r"[a-z]{2,}", line.replace(str(tmp_path), "").replace("unit_01", "")))
        assert (words, bool(re.search("[\u4e00-\u9fff]", line))) == (set(), True), line
    lab.write_contents(tmp_path, "zh")
    assert (tmp_path / lab.CONTENTS).read_text(encoding="utf-8").startswith("# 各单元")


def test_a_folder_from_before_releases_were_recorded_is_taken_over(course: Path) -> None:
    release, mine = course / "notebooks", course / "work"
    copy_unchanged(release, mine)
    (mine / "unit_00/unit_00.ipynb").write_text("solved")
    (mine / RECORD).write_text("[damaged")
    assert copy_unchanged(release, mine) == ([], [], [])
    (release / "unit_01/unit_01.ipynb").write_text('{"new": 1}')
    assert copy_unchanged(release, mine) == ([], ["unit_01/unit_01.ipynb"], [])
    assert (mine / "unit_00/unit_00.ipynb").read_text() == "solved"


def test_the_command_becomes_jupyterlab_on_the_unit(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(lab.os, "execv", lambda *command: started.append(command))
    from tests.cli_calls import output_of

    assert output_of("lab", "--unit", "1", "--no-browser", "--port", "8899") == "2 new notebooks in work.\n"
    ((program, command),) = started
    assert program == sys.executable
    assert command[:4] == [sys.executable, "-m", "jupyter", "lab"]
    assert {"--no-browser", "--port=8899", f"--ServerApp.root_dir={course / 'work'}"} <= set(command)
    assert "--LabApp.default_url=/lab/tree/unit_01/unit_01.ipynb" in command
    assert output_of("lab") == "Your notebooks are in work.\n"
    assert "--LabApp.default_url=/lab/tree/unit_00/unit_00.ipynb" in started[1][1]


def test_a_copy_that_was_cut_is_made_again_and_what_a_learner_wrote_is_not(course: Path) -> None:
    mine = course / "work"
    release = course / "notebooks" / "unit_01/unit_01.ipynb"
    release.write_text('{"cells": []}')
    for cut in ("", '{"cells'):
        copy_unchanged(course / "notebooks", mine)
        (mine / "unit_01/unit_01.ipynb").write_text(cut)
        assert copy_unchanged(course / "notebooks", mine).new == ["unit_01/unit_01.ipynb"]
        assert (mine / "unit_01/unit_01.ipynb").read_text() == '{"cells": []}'
    (mine / "unit_01/unit_01.ipynb").write_text('{"a": 1}')  # shorter, but something else
    assert copy_unchanged(course / "notebooks", mine) == ([], [], [])


def test_a_full_disk_leaves_no_cut_file(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        copy_unchanged(course / "notebooks", course / "work")
    assert not (course / "work").exists()


def test_the_folder_says_the_titles_of_the_units(course: Path) -> None:
    (course / "notebooks/unit_01/unit_01.ipynb").write_text('{"cells": [{"source": ["# Unit 01: Rank\\n", "\\n"]}]}')
    copy_unchanged(course / "notebooks", course / "work")
    lab.write_contents(course / "work", "en")
    lines = (course / "work" / lab.CONTENTS).read_text().splitlines()
    assert lines[2:] == ["- [unit_00](unit_00/unit_00.ipynb)", "- [Unit 01: Rank](unit_01/unit_01.ipynb)"]


def test_jupyterlab_finds_that_nbgrader_is_for_instructors(monkeypatch: pytest.MonkeyPatch) -> None:
    from jupyterlab_server.config import get_page_config

    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(lab.CONFIGURATION))
    assert "@jupyter/nbgrader" in get_page_config([])["disabledExtensions"]


def test_bad_input_ends_in_one_line(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert complaint("lab", "--unit", "77") == "error: there is no unit 77 in work; there are 00, 01"
    monkeypatch.setattr(lab, "NOTEBOOKS", course / "nothing")
    assert "there are no course files in" in complaint("lab")
    monkeypatch.setattr(lab.importlib.util, "find_spec", lambda name: None)
    assert "JupyterLab is not installed; run: python -m pip install" in complaint("lab")
