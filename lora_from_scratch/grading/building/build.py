"""Building a unit: from its source and the library to the learner's notebook and the solved one."""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_from_scratch.checks.units import Unit, units
from lora_from_scratch.grading.building import refusals
from lora_from_scratch.grading.building.assemble import Cell, as_notebook, assemble
from lora_from_scratch.grading.building.execution import Cost, execute
from lora_from_scratch.grading.building.refused import Refused
from lora_from_scratch.grading.building.release import release
from lora_from_scratch.grading.building.source import read_source
from lora_from_scratch.support.files import write_atomically

SOURCES = Path("course/units")
CONFIG = Path("course/nbgrader_config.py")


@dataclass(frozen=True)
class Draft:
    """A unit before it is executed.

    Attributes:
        cells: where each cell of the notebook comes from.
        solved: the solved notebook without outputs.
        learners: the learner's notebook, as text.
    """

    unit: Unit
    cells: list[Cell]
    solved: Any
    learners: str

    @property
    def name(self) -> str:
        return f"unit_{self.unit.number}"


def course_root(start: Path | None = None) -> Path:
    """The folder that holds `course/units`: this one or one above it, otherwise the one the library is in.

    Raises:
        FileNotFoundError: there is none.
    """
    start = (start or Path.cwd()).resolve()
    for place in (start, *start.parents, Path(__file__).resolve().parents[3]):
        if (place / SOURCES).is_dir():
            return place
    raise FileNotFoundError(f"there is no {SOURCES} here or above; go to the project's folder, or name it with --root")


def sources(root: Path) -> list[str]:
    """The numbers of the units that have a source."""
    return sorted(path.stem.removeprefix("unit_") for path in (root / SOURCES).glob("unit_*.py"))


def draft(unit: Unit, root: Path) -> Draft:
    """Read a unit's source and put its notebooks together; nothing is executed or written.

    Raises:
        Refused: the unit is not fit to be released.
        FileNotFoundError: it has no source.
    """
    import nbformat

    file = f"{SOURCES.as_posix()}/unit_{unit.number}.py"
    source = read_source(root / file, file)
    problems = refusals.in_the_list(unit) + refusals.in_the_source(unit, file, source)
    try:
        cells = assemble(unit, source)
    except Refused as refused:
        raise Refused(problems + [p for p in refused.problems if p not in problems]) from None
    problems += refusals.in_the_cells(cells)
    if problems:
        raise Refused(problems)
    solved = as_notebook(cells)
    learners = release(solved, root / CONFIG)
    problems = refusals.leaks(unit, nbformat.reads(learners, as_version=4), cells)
    if problems:
        raise Refused(problems)
    return Draft(unit, cells, solved, learners)


def build(unit: Unit, root: Path) -> Cost:
    """Build a unit's notebooks, solved and learner's, with their picture. Nothing is written if anything is refused.

    Raises:
        Refused: the unit is not fit to be released.
    """
    import nbformat

    made = draft(unit, root)
    solved = root / "solutions" / made.name / f"{made.name}.ipynb"
    notebook, pictures, cost = run(made, root)
    keep_volatile(notebook, made.cells, solved)
    files = {solved: nbformat.writes(notebook).encode() + b"\n"}
    files[root / "notebooks" / made.name / f"{made.name}.ipynb"] = made.learners.encode()
    for name, picture in pictures.items():
        for folder in ("solutions", "notebooks"):
            files[root / folder / made.name / name] = picture
    for path, content in files.items():
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, functools.partial(Path.write_bytes, data=content))
    return cost


def run(made: Draft, root: Path) -> tuple[Any, dict[str, bytes], Cost]:
    """The solved notebook executed, its pictures by file name, and what it took.

    Raises:
        Refused: a cell ends in an error, warns, or shows what must not be shown; or a check is not passed.
    """
    notebook = made.solved
    try:
        cost = execute(notebook)
    except ValueError as error:
        raise Refused([f"{SOURCES.as_posix()}/{made.name}.py: {error}"]) from None
    problems: list[str] = []
    pictures: dict[str, bytes] = {}
    for node, cell in zip(notebook.cells, made.cells, strict=True):
        problems += refusals.in_the_outputs(node, cell, [str(root)])
        if any(output.output_type == "error" for output in node.get("outputs", [])):
            break  # nothing below it has run
        if cell.role == "check":
            problems += refusals.not_full_points(node, cell)
        if cell.figure:
            shown = [output.data["image/png"] for output in node.outputs if "image/png" in output.get("data", {})]
            if len(shown) != 1:
                problems.append(
                    f"{cell.place}: figure={cell.figure!r}: the cell must show one figure, got {len(shown)}"
                )
            pictures[cell.figure] = base64.b64decode(shown[0]) if shown else b""
    if problems:
        raise Refused(problems)
    return notebook, pictures, cost


def keep_volatile(notebook: Any, cells: Iterable[Cell], before: Path) -> None:
    """Cells marked volatile keep the output that they had, as long as their source is the same."""
    import nbformat

    if not before.is_file():
        return
    old = {cell.source: cell.outputs for cell in nbformat.read(before, as_version=4).cells if cell.cell_type == "code"}
    for node, cell in zip(notebook.cells, cells, strict=True):
        if cell.volatile and node.source in old:
            node.outputs = old[node.source]


def find_units(numbers: Iterable[str], root: Path) -> list[Unit]:
    """The units of these numbers; all that have a source if none are given.

    Raises:
        ValueError: a number is not that of a unit.
    """
    known = {unit.number: unit for unit in units()}
    found = []
    for number in list(numbers) or sources(root):
        number = Path(number).stem.removeprefix("unit_").zfill(2)
        if number not in known:
            there = ", ".join(known) or "none"
            raise ValueError(f"there is no unit {number} (checks/unit_{number}.py); there are: {there}")
        found.append(known[number])
    return found
