"""The rubrics of a unit's open questions, which stand in the solved notebook only."""

from __future__ import annotations

import re
from pathlib import Path

from lora_from_scratch.grading.building.assemble import RUBRIC


def rubrics(solved: Path) -> dict[str, list[str]]:
    """By the grade_id of an answer's cell, what earns points there; nothing if there is no solved notebook.

    Raises:
        ValueError: the file is not a notebook.
    """
    import nbformat

    found: dict[str, list[str]] = {}
    if solved.is_file():
        for cell in nbformat.read(solved, as_version=4).cells:
            _, _, rubric = cell.source.partition(RUBRIC)
            items = re.split(r"^\s*[-*] ", rubric, flags=re.MULTILINE)[1:]
            if items:
                name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
                found[name] = [" ".join(item.split()) for item in items]
    return found
