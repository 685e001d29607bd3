"""A unit's source: plain text in jupytext's percent format, with directives on the cells.

A directive is a key on the cell's marker, as in `# %% exercise="rank"`. `DIRECTIVES` lists them; course/README.md
describes each of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_from_scratch.grading.building.refused import Refused

DIRECTIVES = {
    "exercise": "code",
    "prediction": "code",
    "check": "code",
    "open_question": "markdown",
    "points": "markdown",
    "figure": "code",
    "volatile": "code",
}
EMPTY = ("exercise", "prediction", "check")  # the build writes these cells completely


@dataclass(frozen=True)
class SourceCell:
    """A cell of the source.

    Attributes:
        kind: "code" or "markdown".
        text: its contents; for Markdown, without the comment signs.
        place: file, number of the cell (from 1) and line, for messages.
        directives: the keys on its marker.
    """

    kind: str
    text: str
    place: str
    directives: dict[str, Any] = field(default_factory=dict)

    def get(self, directive: str) -> Any:
        return self.directives.get(directive)


def read_source(path: Path, name: str | None = None) -> list[SourceCell]:
    """The cells of a unit's source.

    Args:
        name: the name of the file in messages; None means its path.

    Raises:
        FileNotFoundError: there is no such file.
        Refused: a directive is unknown, on the wrong kind of cell, or on a cell that should be empty and is not.
    """
    import jupytext

    name = name or str(path)
    if not path.is_file():
        raise FileNotFoundError(f"the source of the unit, {name}, does not exist")
    text = path.read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="py:percent")
    lines = [number for number, line in enumerate(text.splitlines(), 1) if re.match(r"# %%", line)]
    known = len(lines) == len(notebook.cells)
    cells = []
    for index, cell in enumerate(notebook.cells):
        place = f"{name}, cell {index + 1}" + (f" (line {lines[index]})" if known else "")
        directives = {key: value for key, value in cell.metadata.items() if key != "lines_to_next_cell"}
        cells.append(SourceCell(cell.cell_type, cell.source.strip("\n"), place, directives))
    problems = [problem for cell in cells for problem in _wrong_directives(cell)]
    if problems:
        raise Refused(problems)
    return cells


def _wrong_directives(cell: SourceCell) -> list[str]:
    problems = []
    for key in cell.directives:
        if key not in DIRECTIVES:
            problems.append(f"{cell.place}: unknown directive {key!r}; the directives are: {', '.join(DIRECTIVES)}")
        elif cell.kind != DIRECTIVES[key]:
            problems.append(
                f"{cell.place}: {key} is only allowed on a {DIRECTIVES[key]} cell, and this is a {cell.kind} cell"
            )
        elif key in EMPTY and cell.text.strip():
            problems.append(f"{cell.place}: a cell with {key}=... must be empty, because the build writes it")
    if not cell.text.strip() and not any(key in EMPTY for key in cell.directives):
        problems.append(f"{cell.place}: the cell is empty")
    return problems
