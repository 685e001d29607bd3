"""A unit that needs packages beside the course's own: it is not built without them, and their versions count."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest

from lora_from_scratch.checks.units import find, units
from lora_from_scratch.grading.building import build, dependencies, needs
from lora_from_scratch.grading.building.refused import Refused
from tests.tiny_course import ROOT, enter_course


def test_most_units_need_nothing_and_unit_26_needs_pinned_packages() -> None:
    needed = {unit.number: needs.needs(unit) for unit in units()}
    assert {number for number, names in needed.items() if names} == {"26"}
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set(needed["26"]) <= pinned


def test_what_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = find("rank")[0]
    monkeypatch.setattr(needs, "needs", lambda unit: ("torch", "no-such-package"))
    assert needs.missing(unit) == ["no-such-package"]


def test_the_version_of_a_needed_package_counts_for_the_unit_that_needs_it(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    hashes = {}
    for name, text in {"now": pins, "later": pins.replace("\ngguf==", "\ngguf==9")}.items():
        (tmp_path / "constraints.txt").write_text(text, encoding="utf-8")
        units_ = (find("rank")[0], find("llama_matrices")[0])
        hashes[name] = [dependencies.hashes(unit, notebook, tmp_path)["packages"] for unit in units_]
    assert hashes["now"][0] == hashes["later"][0]
    assert hashes["now"][1] != hashes["later"][1]


def test_a_unit_is_executed_only_with_what_it_needs(
    built_course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(built_course, tmp_path / "course")
    unit = enter_course(root, monkeypatch)
    monkeypatch.setattr(build, "missing", lambda unit: ["no-such-package"])
    assert build.write(unit, root).why == []  # nothing has changed, so nothing is executed
    with pytest.raises(Refused, match="needs no-such-package"):
        build.write(unit, root, again=True)
