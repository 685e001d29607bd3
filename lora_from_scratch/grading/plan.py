"""Choose the cells of a submission that have to run for its checks to see what they would see in a full run.

A unit's experiments take minutes, and most learners leave them unchanged. Unchanged experiments are skipped unless a
cell that runs needs a name that they bind.
"""

from __future__ import annotations

from typing import Any

from lora_from_scratch.grading.submissions.definitions import binds, needs


def cells_to_run(notebook: Any, released: Any) -> list[Any]:
    """The code cells to run, in order: those that the learner wrote or changed, and those that they need.

    Args:
        notebook: the matched notebook.
        released: the notebook of the release.
    """
    known = {cell.id: cell.source.strip() for cell in released.cells}
    places = [n for n, cell in enumerate(notebook.cells) if cell.cell_type == "code" and not is_check(cell)]
    cells = notebook.cells
    chosen = {n for n in places if is_solution(cells[n]) or known.get(cells[n].id) != cells[n].source.strip()}
    chosen |= {n for n in places if "from __future__ import" in cells[n].source}  # applies to all cells below
    bound = {n: binds(cells[n].source).keys() for n in places}
    waiting = sorted(chosen)
    while waiting:
        place = waiting.pop()
        for name in needs(cells[place].source):
            binder = _binder(name, place, places, bound)
            if binder is not None and binder not in chosen:
                chosen.add(binder)
                waiting.append(binder)
    return [cells[place] for place in sorted(chosen)]


def _binder(name: str, place: int, places: list[int], bound: dict[int, Any]) -> int | None:
    """The nearest cell above that binds the name, else the first one below (a function may need it later)."""
    above = [n for n in places if n < place and name in bound[n]]
    below = [n for n in places if n > place and name in bound[n]]
    return above[-1] if above else below[0] if below else None


def is_check(cell: Any) -> bool:
    said = cell.metadata.get("nbgrader", {})
    return bool((said.get("grade") or said.get("locked")) and not said.get("solution") and cell.cell_type == "code")


def is_solution(cell: Any) -> bool:
    return bool(cell.metadata.get("nbgrader", {}).get("solution"))
