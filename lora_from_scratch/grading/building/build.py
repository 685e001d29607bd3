"""Build a unit: from its source and the library to the learner's notebook and the solved one."""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_from_scratch.checks.units import Unit, units
from lora_from_scratch.grading.building import dependencies, refusals
from lora_from_scratch.grading.building.assemble import INSTALLER, Cell, as_notebook, assemble, is_installer
from lora_from_scratch.grading.building.differences import differences
from lora_from_scratch.grading.building.execution import STEPS, Cost, execute
from lora_from_scratch.grading.building.needs import missing
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
        cells: the origin of each cell of the notebook.
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
    """The folder that contains `course/units`: the current one, one above it, or the one that contains the library.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    start = (start or Path.cwd()).resolve()
    for place in (start, *start.parents, Path(__file__).resolve().parents[3]):
        if (place / SOURCES).is_dir():
            return place
    raise FileNotFoundError(f"there is no {SOURCES} here or above; go to the project's folder, or pass it with --root")


def sources(root: Path) -> list[str]:
    """The numbers of the units that have a source."""
    return sorted(path.stem.removeprefix("unit_") for path in (root / SOURCES).glob("unit_*.py"))


def draft(unit: Unit, root: Path) -> Draft:
    """Read a unit's source and assemble its notebooks; nothing is executed or written.

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


@dataclass(frozen=True)
class Built:
    """The result of building a unit.

    Attributes:
        why: why its solved notebook was executed; empty if its previous outputs were kept.
        cost: the cost of executing it.
        differences: how the outputs of its cells differ from the previous ones.
        hashes: the hashes of its dependencies, to be recorded.
    """

    name: str
    why: list[str]
    cost: Cost | None
    differences: list[str]
    hashes: dependencies.Hashes


def build(unit: Unit, root: Path, again: bool = False) -> Built:
    """Build a unit's notebooks, solved and learner's, with their picture. Nothing is written if anything is refused.

    Args:
        again: execute the solved notebook even if none of its dependencies has changed.

    Raises:
        Refused: the unit is not fit to be released.
    """
    built = write(unit, root, again)
    dependencies.record(root, built.name, built.hashes)
    return built


def write(unit: Unit, root: Path, again: bool = False) -> Built:
    """Like `build`, but without recording the hashes, so that several processes can write their units at once."""
    import nbformat

    made = draft(unit, root)
    solved = root / "solutions" / made.name / f"{made.name}.ipynb"
    before = nbformat.read(solved, as_version=4) if solved.is_file() else None
    now = dependencies.hashes(unit, made.solved, root)
    recorded = dependencies.recorded(root).get(made.name)
    why, cost, differs = reasons(made, before, recorded, now, again), None, []
    if why:
        if lacking := missing(unit):
            raise Refused([f"{made.name} has to be executed, because {why[0]}, and that needs {', '.join(lacking)}"])
        pictures, cost = run(made, root)
        run_unsolved(made)
        keep_volatile(made.solved, made.cells, before)
        comparable = before is not None and _code(before) == _code(made.solved)
        differs = differences(made.cells, before, made.solved) if comparable else []
    else:
        now = recorded or now  # with the processor that it was executed on
        keep_outputs(made.solved, before)
        pictures = look_over(made, root)
    files = {solved: nbformat.writes(made.solved).encode() + b"\n"}
    files[root / "notebooks" / made.name / f"{made.name}.ipynb"] = made.learners.encode()
    for name, picture in pictures.items():
        for folder in ("solutions", "notebooks"):
            files[root / folder / made.name / name] = picture
    for path, content in files.items():
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, functools.partial(Path.write_bytes, data=content))
    return Built(made.name, why, cost, differs, now)


def reasons(
    made: Draft, before: Any, recorded: dependencies.Hashes | None, now: dependencies.Hashes, again: bool = False
) -> list[str]:
    """Why the solved notebook has to be executed; empty if its outputs are up to date."""
    if before is None:
        return ["there is no solved notebook yet"]
    changed = dependencies.changed(recorded, now)
    if not changed and _code(before) != _code(made.solved):
        changed = ["the code cells of the solved notebook are not those that were executed"]
    return changed or ["it was requested"] * again


def _code(notebook: Any) -> list[str]:
    """The code of a notebook's cells, without whatever cannot change an output."""
    code = (cell.source for cell in notebook.cells if cell.cell_type == "code")
    return [INSTALLER if is_installer(source) else dependencies.code_of(source) for source in code]


def keep_outputs(notebook: Any, before: Any) -> None:
    """Copy the previous outputs to the code cells."""
    pair = ([cell for cell in one.cells if cell.cell_type == "code"] for one in (notebook, before))
    for cell, old in zip(*pair, strict=True):
        cell.outputs, cell.execution_count = old.outputs, old.execution_count


def run(made: Draft, root: Path) -> tuple[dict[str, bytes], Cost]:
    """Execute the solved notebook; returns its pictures by file name, and the cost.

    Raises:
        Refused: a cell ends in an error, warns, or has a forbidden output; or a check does not pass.
    """
    try:
        cost = execute(made.solved)
    except ValueError as error:
        raise Refused([f"{SOURCES.as_posix()}/{made.name}.py: {error}"]) from None
    return look_over(made, root), cost


def run_unsolved(made: Draft) -> None:
    """Execute the learner's notebook as released, with only a few training steps.

    Raises:
        Refused: a cell ends in an error or warns; or a check reports anything other than "not started".
    """
    import nbformat

    learners = nbformat.reads(made.learners, as_version=4)
    execute(learners, building=False, settings={STEPS: "4"})
    if problems := refusals.in_an_unsolved_run(learners):
        raise Refused(f"{made.name}.ipynb, {problem}" for problem in problems)


def look_over(made: Draft, root: Path) -> dict[str, bytes]:
    """The pictures of the executed notebook, by file name.

    Raises:
        Refused: an output is not fit to be released.
    """
    problems: list[str] = []
    pictures: dict[str, bytes] = {}
    for node, cell in zip(made.solved.cells, made.cells, strict=True):
        problems += refusals.in_the_outputs(node, cell, [str(root)])
        if any(output.output_type == "error" for output in node.get("outputs", [])):
            break  # the cells below it have not run
        if cell.role == "check":
            problems += refusals.not_full_points(node, cell)
        if cell.figure:
            shown = [output.data["image/png"] for output in node.outputs if "image/png" in output.get("data", {})]
            if len(shown) != 1:
                problems.append(
                    f"{cell.place}: figure={cell.figure!r}: the cell must show exactly one figure, got {len(shown)}"
                )
            pictures[cell.figure] = base64.b64decode(shown[0]) if shown else b""
    if problems:
        raise Refused(problems)
    return pictures


def keep_volatile(notebook: Any, cells: Iterable[Cell], before: Any) -> None:
    """Keep the previous outputs of cells marked volatile as long as their source is the same."""
    old = {cell.source: cell.outputs for cell in before.cells if cell.cell_type == "code"} if before else {}
    for node, cell in zip(notebook.cells, cells, strict=True):
        if cell.volatile and node.source in old:
            node.outputs = old[node.source]


def find_units(numbers: Iterable[str], root: Path) -> list[Unit]:
    """The units with these numbers; if none are given, all that have a source.

    Raises:
        ValueError: there is no unit with this number.
    """
    known = {unit.number: unit for unit in units()}
    found = []
    for number in list(numbers) or sources(root):
        number = Path(number).stem.removeprefix("unit_").zfill(2)
        if number not in known:
            there = ", ".join(known) or "none"
            raise ValueError(f"there is no unit {number} (checks/unit_{number}/exercises.py); the units are: {there}")
        found.append(known[number])
    return found
