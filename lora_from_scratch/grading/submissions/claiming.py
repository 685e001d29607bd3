"""Match the cells of a submission to those of the release: by metadata, id, definitions and text."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from lora_from_scratch.grading.submissions.definitions import checks, is_python, statements
from lora_from_scratch.grading.submissions.released import Release, ReleasedCell

ALIKE = 0.6  # difflib's ratio above which two texts count as versions of each other
COMPARED = 1_000  # number of characters compared per text
PAIRS = 4_000  # maximum number of text comparisons per submission


@dataclass(eq=False)
class Cell:
    """A cell of the submission while it is being matched.

    Attributes:
        place: the matching cell of the release; None for the learner's own cell.
        restored: whether it was missing in the submission.
        dropped: whether it is left out of the result.
    """

    kind: str
    source: str
    cell_id: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    attachments: dict[str, Any] | None = None
    place: ReleasedCell | None = None
    restored: bool = False
    dropped: bool = False

    @property
    def grade_id(self) -> str:
        said = self.metadata.get("nbgrader")
        found = said.get("grade_id") if isinstance(said, dict) else None
        return found if isinstance(found, str) else ""

    @property
    def changed(self) -> bool:
        """Whether it is the learner's own cell or a released cell that the learner has changed."""
        return self.place is None or self.source.strip() != self.place.source.strip()


def claim(cells: list[Cell], release: Release) -> None:
    """Set every cell's `place`. Several cells may get the same graded place: duplicates, or parts of a split cell."""
    _by_metadata(cells, release)
    _by_cell_id(cells, release)
    _by_other_definition(cells, release)
    _by_same_text(cells, release)
    for solution in _unclaimed(cells, release.solutions):
        _by_definition(cells, release, solution)
    for check in _unclaimed(cells, release.checks):
        _by_call(cells, check)
    _by_likeness(cells, release)
    _parts_of_a_split(cells)
    for answer in _unclaimed(cells, release.answers):
        _by_position(cells, release, answer)


def _unclaimed(cells: Iterable[Cell], places: Iterable[ReleasedCell]) -> list[ReleasedCell]:
    taken = {cell.place.index for cell in cells if cell.place is not None}
    return [place for place in places if place.index not in taken]


def _free(cells: Iterable[Cell], kind: str = "") -> list[Cell]:
    return [cell for cell in cells if cell.place is None and kind in ("", cell.kind)]


def _by_metadata(cells: list[Cell], release: Release) -> None:
    places = {place.grade_id: place for place in release.places if place.grade_id}
    for cell in cells:
        cell.place = places.get(cell.grade_id)


def _by_cell_id(cells: list[Cell], release: Release) -> None:
    places = {place.cell_id: place for place in release.places if place.cell_id}
    for cell in _free(cells):
        place = places.get(cell.cell_id)
        if place is not None and (place.graded or place in _unclaimed(cells, [place])):
            cell.place = place


def _by_other_definition(cells: list[Cell], release: Release) -> None:
    """A solution cell that contains another exercise's answer instead of its own becomes that exercise's cell."""
    for cell in cells:
        if cell.place is None or cell.place.role != "solution":
            continue
        if release.kind_of(cell.place.name, cell.source):
            continue
        others = [place for place in release.solutions if release.kind_of(place.name, cell.source) == "real"]
        there = [c for c in cells if others and c.place is others[0] and c is not cell]
        if others and all(release.kind_of(others[0].name, c.source) != "real" for c in there):
            cell.place = others[0]


def _by_same_text(cells: list[Cell], release: Release) -> None:
    waiting: dict[tuple[str, str], list[ReleasedCell]] = {}
    for place in _unclaimed(cells, release.places):
        waiting.setdefault((place.kind, place.source.strip()), []).append(place)
    for cell in _free(cells):
        places = waiting.get((cell.kind, cell.source.strip()))
        if places:
            cell.place = places.pop(0)


def _by_definition(cells: list[Cell], release: Release, solution: ReleasedCell) -> None:
    """Match the last cell that defines the name, preferring cells before the check.

    Another exercise's cell keeps its place: `ordering.find_definitions` moves the answer out of it.
    """
    for wanted in ("real", "stub"):
        found = [
            cell
            for cell in cells
            if cell.kind == "code"
            and (cell.place is None or cell.place.role == "solution")
            and release.kind_of(solution.name, cell.source) == wanted
        ]
        if found:
            check = next((place for place, cell in enumerate(cells) if _is_check_of(cell, solution)), len(cells))
            early = [cell for cell in found if cells.index(cell) <= check]
            last = (early or found)[-1]
            last.place = last.place or solution
            return


def _is_check_of(cell: Cell, solution: ReleasedCell) -> bool:
    if cell.place is not None and cell.place.role == "check" and cell.place.name == solution.name:
        return True
    return cell.kind == "code" and solution.name in checks(cell.source)


def _by_call(cells: list[Cell], check: ReleasedCell) -> None:
    """Match a cell that only calls `check`, including for this name."""
    for cell in _free(cells, "code"):
        called = checks(cell.source)
        if check.name in called and len(called) == len(statements(cell.source) or ()):
            cell.place = check
            return


def _by_likeness(cells: list[Cell], release: Release) -> None:
    """Match solutions, and the questions in front of open answers, whose text is close to the release's."""
    questions = [release.places[answer.index - 1] for answer in release.answers if answer.index]
    wanted = _unclaimed(cells, [*release.solutions, *questions])
    free = _free(cells)
    scores = []
    for place in wanted[: PAIRS // max(1, len(free)) + 1]:
        scores += [(_likeness(place.source, cell.source), -place.index, number) for number, cell in enumerate(free)]
    for score, index, number in sorted(scores, reverse=True):
        place = release.places[-index]
        if score >= ALIKE and free[number].place is None and place in _unclaimed(cells, [place]):
            free[number].place = place


def _likeness(one: str, other: str) -> float:
    matcher = difflib.SequenceMatcher(None, one[:COMPARED], other[:COMPARED], autojunk=False)
    bounds: tuple[Callable[[], float], ...] = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
    return min(bound() if bound() >= ALIKE else 0.0 for bound in bounds[:2]) and matcher.ratio()


def _parts_of_a_split(cells: list[Cell]) -> None:
    """A cell whose code starts indented belongs to the cell above if the two form valid Python together."""
    for above, cell in itertools.pairwise(cells):
        first = next((line for line in cell.source.split("\n") if line.strip()), "")
        inside = first[:1].isspace() and cell.place is None and cell.kind == "code"
        solution = above.place is not None and above.place.role == "solution"
        if inside and solution and not is_python(cell.source) and is_python(f"{above.source}\n{cell.source}"):
            cell.place = above.place


def _by_position(cells: list[Cell], release: Release, answer: ReleasedCell) -> None:
    """Match the text that follows the question."""
    earlier = [number for number, cell in enumerate(cells) if cell.place and cell.place.index < answer.index]
    question = [number for number in earlier if cells[number].place is release.places[answer.index - 1]]
    if not earlier:
        return
    following = cells[(question or earlier)[-1] + 1 :]
    first = following[0] if following else None
    if first is not None and first.place is None and (first.kind != "code" or not is_python(first.source)):
        first.place = answer
