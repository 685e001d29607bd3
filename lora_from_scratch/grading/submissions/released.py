"""The structure of the released notebook: which cells are graded, and what is to be written in each."""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_from_scratch.grading.submissions.definitions import binds, checks, imports_only, same_code, statements

FLAGS = ("grade", "solution", "locked", "task", "points")  # the fields of nbgrader's metadata that must not change


@dataclass(frozen=True, eq=False)
class ReleasedCell:
    """A cell of the release.

    Attributes:
        index: from 0, in the release's order.
        role: "solution" (the learner writes code), "check" (locked, graded by the judge), "answer" (graded by a
            person), "imports" (only imports), "" for everything else.
        grade_id: nbgrader's name for the cell; "" if it has none.
        name: for a solution, the function, class or variable to be written; for a check, the name that it checks.
    """

    index: int
    role: str
    grade_id: str
    name: str
    kind: str
    source: str
    cell_id: str
    metadata: Mapping[str, Any]

    @property
    def graded(self) -> bool:
        """Whether a submission must contain it exactly once."""
        return self.role in ("solution", "check", "answer")


@dataclass(frozen=True)
class Release:
    places: tuple[ReleasedCell, ...]

    @classmethod
    def of(cls, notebook: Any) -> Release:
        return cls(tuple(_place(index, cell) for index, cell in enumerate(notebook.cells)))

    @property
    def solutions(self) -> list[ReleasedCell]:
        return [place for place in self.places if place.role == "solution"]

    @property
    def checks(self) -> list[ReleasedCell]:
        return [place for place in self.places if place.role == "check"]

    @property
    def answers(self) -> list[ReleasedCell]:
        return [place for place in self.places if place.role == "answer"]

    def check_of(self, solution: ReleasedCell) -> ReleasedCell | None:
        return next((place for place in self.checks if place.name == solution.name), None)

    def kind_of(self, name: str, source: str) -> str:
        """The kind of object that a source binds a name to, as in `Statement.binds`; "" if it does not bind it."""
        kind = binds(source).get(name, "")
        solution = next((place for place in self.solutions if place.name == name), None)
        if solution is None or kind not in ("real", "value"):
            return kind
        if kind == "value" and self.is_guess(solution):
            return "real"
        return "stub" if kind == "real" and _binding(source, name) == _binding(solution.source, name) else kind

    def is_guess(self, solution: ReleasedCell) -> bool:
        """Whether a value is to be written there (a prediction) rather than a function or class."""
        found = statements(solution.source) or ()
        return not any(statement.text.lstrip().startswith(("def ", "class ", "@", "async ")) for statement in found)

    def is_stub(self, solution: ReleasedCell, source: str) -> bool:
        """Whether nothing is written there yet."""
        return not source.strip() or same_code(source, solution.source)


def _place(index: int, cell: Any) -> ReleasedCell:
    said = cell.metadata.get("nbgrader", {})
    role = _role(said, cell)
    name = ""
    if role == "solution":
        bound = list(binds(cell.source))
        name = said["grade_id"] if said["grade_id"] in bound or not bound else bound[0]
    elif role == "check":
        name = next(iter(checks(cell.source)), said["grade_id"].removeprefix("check-"))
    return ReleasedCell(
        index, role, said.get("grade_id", ""), name, cell.cell_type, cell.source, cell.get("id", ""), cell.metadata
    )


def _role(said: Mapping[str, Any], cell: Any) -> str:
    if said.get("grade") and not said.get("solution"):
        return "check"
    if said.get("task") or (said.get("grade") and said.get("solution")):
        return "answer"
    if said.get("solution"):
        return "solution"
    if said.get("locked"):
        return "check"
    return "imports" if cell.cell_type == "code" and imports_only(cell.source) else ""


@functools.lru_cache(maxsize=4096)
def _binding(source: str, name: str) -> str:
    """The code that binds a name, normalised for whitespace and comments."""
    found = [s.text for s in statements(source) or () if name in s.binds]
    try:
        return "\n".join(ast.dump(ast.parse(text)) for text in found)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "\n".join(found)


def forget() -> None:
    """Clear the caches of parsed cells; a worker reads thousands of notebooks."""
    statements.cache_clear()
    _binding.cache_clear()
