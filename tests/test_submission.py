"""Reading what was handed in: whatever it is, a notebook or a finding that says why not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_from_scratch.grading.submissions import submission
from lora_from_scratch.grading.submissions.submission import Submission, read

CODE = 'print("naïve")  # Größe'
NOTEBOOK: dict[str, Any] = {
    "cells": [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# One\n", "two"]},
        {"cell_type": "code", "id": "b", "metadata": {}, "source": CODE, "outputs": [], "execution_count": 1},
    ],
    "metadata": {"kernelspec": {"display_name": "Python 3", "name": "python3"}},
    "nbformat": 4,
    "nbformat_minor": 5,
}


def handed_in(folder: Path, content: bytes | str | dict[str, Any]) -> Submission:
    path = folder / "unit_01.ipynb"
    text = json.dumps(content, ensure_ascii=False) if isinstance(content, dict) else content
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read(path)


def kinds(found: Submission) -> list[tuple[str, str]]:
    return [(finding.kind, finding.severity) for finding in found.findings]


def sources(found: Submission) -> list[str]:
    assert found.notebook is not None
    nbformat.validate(found.notebook)
    return [cell.source for cell in found.notebook.cells]


def test_a_notebook_is_read_as_it_is(tmp_path: Path) -> None:
    found = handed_in(tmp_path, NOTEBOOK)
    assert found.findings == ()
    assert sources(found) == ["# One\ntwo", CODE]
    assert [cell.id for cell in found.notebook.cells] == ["a", "b"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_another_encoding_is_put_right(tmp_path: Path, encoding: str) -> None:
    found = handed_in(tmp_path, json.dumps(NOTEBOOK, ensure_ascii=False).encode(encoding))
    assert sources(found) == ["# One\ntwo", CODE]
    assert kinds(found) == ([] if encoding == "utf-8-sig" else [("encoding", "repaired")])


UNREADABLE = {
    "nothing": (b"", "empty file"),
    "zeros": (b"\0" * 4096, "empty file"),
    "a script": (b"import torch\n", "no notebook"),
    "a picture": (bytes(range(256)) * 40, "no notebook"),
    "a page": (b"<html></html>", "no notebook"),
    "a list": (b"[1, 2]", "no notebook"),
    "a number": (b"5", "no notebook"),
    "another object": (b'{"a": 1}', "no notebook"),
    "cells that are none": (b'{"cells": 5, "nbformat": 4}', "no notebook"),
    "half of one": (json.dumps(NOTEBOOK)[:150].encode(), "damaged notebook"),
    "a conflict": (b'{\n<<<<<<< HEAD\n "cells": []\n=======\n "cells": []\n>>>>>>> b\n}', "no notebook"),
    "a deep one": (b"[" * 100_000 + b"]" * 100_000, "no notebook"),
    "deep cells": (b'{"cells": ' + b"[" * 100_000, "damaged notebook"),
    "a long number": (b'{"cells": [], "nbformat": ' + b"4" * 100_000 + b"}", "damaged notebook"),
    "many cells": (json.dumps(NOTEBOOK | {"cells": [{"cell_type": "raw"}] * 2001}).encode(), "too large"),
    "much text": (json.dumps(NOTEBOOK | {"cells": [{"source": "x" * 2_000_001}]}).encode(), "too large"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_notebook_is_a_finding_for_a_person(tmp_path: Path, name: str) -> None:
    content, kind = UNREADABLE[name]
    found = handed_in(tmp_path, content)
    assert found.notebook is None
    assert kinds(found) == [(kind, "human")]
    assert "\n" not in found.findings[0].message


def test_a_file_over_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "LARGEST", 100)
    assert kinds(handed_in(tmp_path, NOTEBOOK)) == [("too large", "human")]


def test_large_outputs_are_no_reason_to_refuse_a_notebook(tmp_path: Path) -> None:
    output = {"output_type": "stream", "name": "stdout", "text": "x" * 5_000_000}
    content = NOTEBOOK | {"cells": [{"cell_type": "code", "source": "1", "outputs": [output]}]}
    found = handed_in(tmp_path, content)
    assert found.findings == ()
    assert found.notebook.cells[0].outputs == []


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "unit_01.ipynb"
    os.mkfifo(path)
    assert kinds(read(path)) == [("unreadable file", "human")]
    path.unlink()
    path.mkdir()
    assert kinds(read(path)) == [("unreadable file", "human")]


def test_no_link_is_followed_in_any_part_of_the_path(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "unit_01"
    real.mkdir(parents=True)
    (real / "unit_01.ipynb").write_text(json.dumps(NOTEBOOK))
    submitted = tmp_path / "submitted"
    (submitted / "one").mkdir(parents=True)
    (submitted / "one" / "unit_01").symlink_to(real)
    (submitted / "two").symlink_to(real.parent)
    (submitted / "three" / "unit_01").mkdir(parents=True)
    (submitted / "three" / "unit_01" / "unit_01.ipynb").symlink_to(real / "unit_01.ipynb")
    (submitted / "four" / "unit_01").mkdir(parents=True)
    (submitted / "four" / "unit_01" / "other.ipynb").symlink_to(real / "unit_01.ipynb")
    for learner in ("one", "two", "three"):
        found = read(submitted / learner / "unit_01" / "unit_01.ipynb", submitted)
        assert (found.notebook, kinds(found)) == (None, [("symbolic link", "human")]), learner
    assert kinds(read(submitted / "four" / "unit_01" / "unit_01.ipynb", submitted)) == [("missing", "human")]


def test_older_formats_are_read(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "heading", "level": 2, "source": "Two", "metadata": {}},
        {"cell_type": "code", "input": ["x = 1\n", "y = 2"], "language": "python", "outputs": [], "metadata": {}},
    ]
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {"name": ""}, "worksheets": [{"cells": cells}]}
    found = handed_in(tmp_path, old)
    assert (sources(found), found.findings) == (["## Two", "x = 1\ny = 2"], ())
    first = handed_in(tmp_path, NOTEBOOK | {"nbformat_minor": 0, "cells": [{"cell_type": "code", "source": "1"}] * 2})
    assert len({cell.id for cell in first.notebook.cells}) == 2
    assert first == handed_in(
        tmp_path, NOTEBOOK | {"nbformat_minor": 0, "cells": [{"cell_type": "code", "source": "1"}] * 2}
    )
    assert kinds(handed_in(tmp_path, NOTEBOOK | {"nbformat": 7})) == [("old format", "note")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
CELL = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("cell_type", "source", "metadata", "id", "outputs", "attachments", "level", "input"), JSON)
    | {"metadata": st.fixed_dictionaries({"nbgrader": JSON})},
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries({"cells": st.lists(CELL | JSON, max_size=3)}, optional={"metadata": JSON, "nbformat": JSON})
)
def test_any_json_is_read_or_refused_and_the_result_can_be_written(data: dict[str, Any]) -> None:
    found = submission.normal(json.loads(json.dumps(data)), [])
    nbformat.validate(found)
    json.dumps(found, ensure_ascii=False).encode("utf-8")
