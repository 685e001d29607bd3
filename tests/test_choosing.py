"""Which of several notebooks counts, when the file was taken for another, copied or unpacked into a folder more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

from lora_from_scratch.grading.submissions.choosing import choose
from tests.damages import Notebook, by_id, released, submission

WANTED = "unit_01.ipynb"
ELSEWHERE = [
    "unit_01-Copy1.ipynb",
    "unit_01 (1).ipynb",
    "final FINAL.ipynb",
    "unit_01/unit_01.ipynb",
    "a/b/unit_01.ipynb",
    ".ipynb_checkpoints/unit_01-checkpoint.ipynb",
]


def other_submission() -> Notebook:
    notebook = submission("01")
    by_id(notebook, "rank").source += "\n# another version\n"
    return notebook


def chosen(folder: Path, **there: Notebook) -> tuple[str, list[tuple[str, Any]], str]:
    """Which file was chosen of these, and the findings with their text."""
    for name, notebook in there.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, folder / name)
    found, path = choose(folder / WANTED, folder.parent, released("01"))
    kinds = [(finding.kind, finding.severity) for finding in found.findings]
    return str(path.relative_to(folder)), kinds, " ".join(finding.message for finding in found.findings)


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("blank", [True, False], ids=["beside the blank one", "alone"])
def test_the_only_notebook_in_which_something_is_written_counts_whatever_its_name(
    tmp_path: Path, name: str, blank: bool
) -> None:
    path, kinds, said = chosen(
        tmp_path / "x", **({WANTED: released("01")} if blank else {}), **{name: submission("01")}
    )
    assert (path, kinds) == (name, [("renamed file", "repaired")])
    assert f"`{name}`" in said


def test_of_two_that_differ_and_a_blank_one_a_person_decides(tmp_path: Path) -> None:
    path, kinds, said = chosen(
        tmp_path / "x", **{WANTED: released("01"), "a.ipynb": submission("01"), "b.ipynb": other_submission()}
    )
    assert (path, kinds) == (WANTED, [("which notebook", "human")])
    assert "`a.ipynb`, `b.ipynb`" in said


def test_of_two_that_are_equal_either_counts(tmp_path: Path) -> None:
    path, kinds, _ = chosen(
        tmp_path / "x", **{WANTED: released("01"), "a.ipynb": submission("01"), "b.ipynb": submission("01")}
    )
    assert (path, kinds) == ("a.ipynb", [("renamed file", "repaired")])


def test_the_wanted_one_counts_where_something_is_written_in_it_and_others_are_named(tmp_path: Path) -> None:
    path, kinds, said = chosen(tmp_path / "x", **{WANTED: submission("01"), "old.ipynb": other_submission()})
    assert (path, kinds) == (WANTED, [("other notebooks", "note")])
    assert "`old.ipynb`" in said


@pytest.mark.parametrize("name", ["copy.ipynb", ".ipynb_checkpoints/unit_01-checkpoint.ipynb"])
def test_a_copy_of_the_wanted_one_and_jupyters_checkpoints_are_not_mentioned(tmp_path: Path, name: str) -> None:
    there = other_submission() if name.startswith(".") else submission("01")
    assert chosen(tmp_path / "x", **{WANTED: submission("01"), name: there}) == (WANTED, [], "")


def test_a_blank_notebook_alone_or_with_blank_ones_is_a_blank_notebook(tmp_path: Path) -> None:
    assert chosen(tmp_path / "x", **{WANTED: released("01")}) == (WANTED, [], "")
    assert chosen(tmp_path / "x", **{WANTED: released("01"), "copy.ipynb": released("01")}) == (WANTED, [], "")


def test_nothing_is_taken_through_a_link(tmp_path: Path) -> None:
    nbformat.write(submission("01"), tmp_path / "elsewhere.ipynb")
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "link.ipynb").symlink_to(tmp_path / "elsewhere.ipynb")
    found, _ = choose(folder / WANTED, tmp_path, released("01"))
    assert (found.notebook, [finding.kind for finding in found.findings]) == (None, ["missing"])
