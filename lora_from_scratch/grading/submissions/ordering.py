"""Put the cells in order, and make sure that each check finds what the learner wrote for it.

These are the later steps of `matching.match`; `repairs` contains the earlier ones.
"""

from __future__ import annotations

import bisect

from lora_from_scratch.grading.submissions.claiming import Cell
from lora_from_scratch.grading.submissions.definitions import binds, checks, cut, helpers, is_python, needs
from lora_from_scratch.grading.submissions.released import ReleasedCell
from lora_from_scratch.grading.submissions.repairs import RELOAD, RepairState, named, upper

MOST_HELPERS = 20  # cells moved up for one answer; finding each one takes a pass over all cells


def arrange(state: RepairState) -> None:
    """Put the released cells into the release's order, and restore those that are missing."""
    order = [cell for cell in state.cells if cell.place is not None]
    kept = set(_longest_rising([cell.place.index for cell in order if cell.place is not None]))
    moved = [cell for number, cell in enumerate(order) if number not in kept]
    for cell in moved:
        if cell.place is not None and not cell.place.graded and cell.changed:
            cell.place = None  # an experiment that the learner changed stays where it is
        else:
            state.cells.remove(cell)
    back = [cell for cell in moved if cell.place is not None]
    graded = [cell.place for cell in back if cell.place is not None and cell.place.graded]
    state.say_of(
        "moved cell",
        graded,
        "{} is in a different place than in the released notebook. Grading moves it back.",
        "{} are in different places than in the released notebook. Grading moves them back.",
    )
    back += _missing(state, back)
    for cell in sorted(back, key=lambda cell: cell.place.index if cell.place else 0):
        state.cells.insert(_where(state, cell), cell)


def _longest_rising(numbers: list[int]) -> list[int]:
    """The indices of a longest increasing subsequence."""
    tails: list[int] = []  # for each length, the smallest last number of an increasing subsequence
    at: list[int] = []
    before: list[int] = []
    for place, number in enumerate(numbers):
        length = bisect.bisect_left(tails, number)
        tails[length : length + 1] = [number]
        at[length : length + 1] = [place]
        before.append(at[length - 1] if length else -1)
    found = at[-1:]
    while found and before[found[-1]] >= 0:
        found.append(before[found[-1]])
    return found[::-1]


def _missing(state: RepairState, moved: list[Cell]) -> list[Cell]:
    """New cells for the release's cells that are needed and missing."""
    there = {cell.place.index for cell in [*state.cells, *moved] if cell.place is not None}
    bound = {name for cell in [*state.cells, *moved] if cell.kind == "code" for name in binds(cell.source)}
    restored, tests, imports = [], [], []
    for place in state.release.places:
        if place.index in there or not (
            place.graded or (place.role == "imports" and binds(place.source).keys() - bound)
        ):
            continue
        restored.append(Cell(place.kind, place.source, place=place, restored=True))
        if place.role == "answer":
            message = (
                f"{upper(named(place))} is missing, and no other text looks like it. It earns no points. {RELOAD}."
            )
            state.say("deleted answer", "lost", place, message)
        tests += [place] if place.role == "check" else []
        imports += [place] if place.role == "imports" else []
    state.say_of(
        "deleted test",
        tests,
        "{} is missing. Grading restores it, and no points are lost.",
        "{} with checks are missing. Grading restores them, and no points are lost.",
    )
    if imports:
        message = "A cell of imports is missing, and nothing else imports the same names. Grading restores it."
        state.say("deleted imports", "repaired", None, message)
    return restored


def _where(state: RepairState, cell: Cell) -> int:
    """Where to insert: a check below the learner's own call of it, other graded cells late, the rest early."""
    place = cell.place
    assert place is not None
    placed = [(number, other.place.index) for number, other in enumerate(state.cells) if other.place is not None]
    first = next((number + 1 for number, other in reversed(placed) if other < place.index), 0)
    last = next((number for number, other in placed if other > place.index), len(state.cells))
    if place.role == "check":
        called = [n + 1 for n, c in enumerate(state.cells) if c.kind == "code" and place.name in checks(c.source)]
        return next((number for number in reversed(called) if first <= number <= last), last)
    return last if place.graded else first


# --- Definitions -----------------------------------------------------------------------------------------


def find_definitions(state: RepairState) -> None:
    """Where a check would find only the stub or nothing, move an answer from elsewhere into its cell."""
    found = {place: _find_definition(state, place) for place in state.release.solutions}
    state.say_of(
        "merged cell",
        [place for place in found if found[place] == "merged"],
        "The code of {} is in one cell with other code, where its check does not find it. Grading separates them; give "
        "it its own cell before you hand in.",
        "The code of {} is in one cell with other code, where its check does not find it. Grading separates them; give "
        "each exercise its own cell before you hand in.",
    )
    state.say_of(
        "moved code",
        [place for place in found if found[place] == "moved"],
        "The code of {} is in a different cell, where its check does not find it. Grading moves it; do the same before "
        "you hand in.",
        "The code of {} is in different cells, where the checks do not find it. Grading moves it; do the same before "
        "you hand in.",
    )


def _find_definition(state: RepairState, place: ReleasedCell) -> str:
    """Put the answer to one exercise where its check finds it; returns what was repaired: "", "moved" or "merged"."""
    own = state.at(place)[0]
    kinds = {
        cell: kind
        for cell in state.cells
        if cell.kind == "code" and (kind := state.release.kind_of(place.name, cell.source))
    }
    check = state.release.check_of(place)
    end = state.cells.index(state.at(check)[0]) if check else len(state.cells)
    early = [cell for cell in state.cells[:end] if cell in kinds]
    if early and kinds[early[-1]] != "stub" and not (own.restored and kinds[early[-1]] == "real"):
        return ""
    written = [cell for cell in kinds if kinds[cell] == "real" and (cell.place is None or cell.changed)]
    if own in written:
        _take_stubs_out(state, place, own, [cell for cell in early if kinds[cell] == "stub"])
    elif written:
        return _take_over(state, place, own, ([cell for cell in written if cell in early] or written)[-1])
    elif (text := _written_as_text(state, place)) is not None:
        return _take_over(state, place, own, text)
    elif own.restored and all(cell is own for cell in early):
        message = f"{upper(named(place))} is missing, and no code defines `{place.name}`. It earns no points. {RELOAD}."
        state.say("deleted cell", "lost", place, message)
    return ""


def _take_stubs_out(state: RepairState, place: ReleasedCell, own: Cell, stubs: list[Cell]) -> None:
    """Remove stubs between the answer and its check, which would overwrite the answer."""
    for cell in stubs:
        parts = cut(cell.source, place.name)
        if cell is own or parts is None:
            continue
        cell.source = parts[1]
        if cell.place is None and not parts[1]:
            state.cells.remove(cell)
    state.say(
        "duplicated cell",
        "repaired",
        place,
        f"Between {named(place)} and its check there is an empty copy of it. The one with your code counts. Delete the "
        "empty copy before you hand in.",
    )


def _take_over(state: RepairState, place: ReleasedCell, own: Cell, found: Cell) -> str:
    """Move the definition into its own cell: either the whole cell that contains it, or only that part."""
    others = [other for other in state.release.solutions if other is not place and other.name in binds(found.source)]
    here, there = state.cells.index(own), state.cells.index(found)
    merged = bool(others) or found.place is not None
    if found.kind != "code" or (not merged and here < there):
        own.source, own.attachments = found.source, None
        if found.place is not None:
            found.source = found.place.source
        elif here < there < _end(state, place):  # it runs where it is
            state.cells.remove(own)
            state.replace(found, own)
        else:
            state.cells.remove(found)
    else:
        _cut_over(state, place, own, found)
    return "merged" if merged else "moved"


def _end(state: RepairState, place: ReleasedCell) -> int:
    check = state.release.check_of(place)
    return state.cells.index(state.at(check)[0]) if check else len(state.cells)


def _cut_over(state: RepairState, place: ReleasedCell, own: Cell, found: Cell) -> None:
    parts = cut(found.source, place.name)
    if parts is None:  # it cannot be separated: copy the whole cell, and leave it in place too
        own.source = found.source
        return
    text, rest = parts
    answers = [solution.name for solution in state.release.solutions]
    needed = helpers(rest, text, state.cells.index(found) > state.cells.index(own), answers)
    own.source = f"{needed}\n\n\n{text}" if needed else text
    found.source = rest
    if not rest and found.place is None:
        state.cells.remove(found)
    elif not rest and found.place is not None:
        found.source = found.place.source


def _written_as_text(state: RepairState, place: ReleasedCell) -> Cell | None:
    """The last text cell that is Python and defines the name: a code cell whose type was changed."""
    found = [
        cell
        for cell in state.cells
        if cell.kind != "code" and is_python(cell.source) and state.release.kind_of(place.name, cell.source) == "real"
    ]
    return found[-1] if found else None


# --- Helpers that come too late ---------------------------------------------------------------------------


def bring_helpers_forward(state: RepairState) -> None:
    """Move the learner's own cells that an answer needs, but that come after its check, in front of the answer."""
    for place in state.release.solutions:
        own = state.at(place)[0]
        for _ in range(MOST_HELPERS):
            helper = _late_helper(state, place, own)
            if helper is None:
                break
            state.cells.remove(helper)
            state.cells.insert(state.cells.index(own), helper)
            state.say(
                "late helper",
                "repaired",
                place,
                f"The code of `{place.name}` needs a cell that comes after its check. Grading runs that cell first; "
                "move it up before you hand in.",
            )


def _late_helper(state: RepairState, place: ReleasedCell, own: Cell) -> Cell | None:
    end = _end(state, place)
    early = [cell for cell in state.cells[:end] if cell.kind == "code"]
    bound = {name for cell in early for name in binds(cell.source)}
    start = state.cells.index(own)
    wanted = set(needs(own.source)) | {
        name
        for cell in state.cells[:start]
        if cell.kind == "code" and cell.place is None
        for name in needs(cell.source)
    }
    missing = wanted - bound
    if not missing or not is_python(own.source):
        return None
    for cell in state.cells[end + 1 :]:
        if cell.place is None and cell.kind == "code" and missing & _definitely(cell):
            return cell
    return None


def _definitely(cell: Cell) -> set[str]:
    return set(binds(cell.source)) if is_python(cell.source) else set()
