"""Repair a damaged submission step by step, and report each repair.

These are the first steps of `matching.match`, in order. Each step changes `RepairState.cells`. Each finding says what
was found, what grading does about it, and what the learner should do before handing in.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_from_scratch.grading.graded import Finding, Severity
from lora_from_scratch.grading.submissions.claiming import Cell
from lora_from_scratch.grading.submissions.definitions import binds, cut, is_python, same_code
from lora_from_scratch.grading.submissions.released import FLAGS, Release, ReleasedCell

NAMED = 3  # up to this many cells get one finding each; more share one finding
RELOAD = "Before you hand in, download a fresh copy of the unit's notebook and copy your code into it"


@dataclass
class RepairState:
    """A submission under repair: its cells in order, and the findings so far."""

    release: Release
    cells: list[Cell]
    findings: list[Finding] = field(default_factory=list)

    def say(self, kind: str, severity: Severity, place: ReleasedCell | None, message: str) -> None:
        self.findings.append(Finding(kind, severity, place.grade_id if place else "", message))

    def say_of(self, kind: str, places: Sequence[ReleasedCell], one: str, several: str) -> None:
        """One finding per place if there are few, else one for all. `{}` stands for the cell's name or the count."""
        if len(places) <= NAMED:
            for place in places:
                self.say(kind, "repaired", place, upper(one.format(named(place))))
        else:
            self.say(kind, "repaired", None, upper(several.format(f"{len(places)} cells")))

    def at(self, place: ReleasedCell) -> list[Cell]:
        return [cell for cell in self.cells if cell.place is place]

    def replace(self, cell: Cell, *others: Cell) -> None:
        number = self.cells.index(cell)
        self.cells[number : number + 1] = others


def named(place: ReleasedCell) -> str:
    """The name of the cell in messages to the learner."""
    if place.role == "check":
        return f"the check of `{place.name}`"
    return (
        f"the answer to the open question `{place.grade_id}`"
        if place.role == "answer"
        else f"the cell of `{place.name}`"
    )


def upper(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- Metadata ---------------------------------------------------------------------------------------------


def report_metadata(state: RepairState) -> None:
    """Report lost or changed nbgrader metadata and changed cell types."""
    present = [(place, state.at(place)) for place in state.release.places if place.graded and state.at(place)]
    lost = [place for place, cells in present if not any(cell.grade_id for cell in cells)]
    renamed = [p for p, cells in present if p not in lost and all(cell.grade_id != p.grade_id for cell in cells)]
    changed = [p for p, cells in present if p not in lost + renamed and not any(_same_flags(p, c) for c in cells)]
    retyped = [place for place, cells in present if all(cell.kind != place.kind for cell in cells)]
    if lost and len(lost) == len(present):
        state.say(
            "metadata lost",
            "repaired",
            None,
            "The metadata that says which cells are graded is gone; some editors remove it. Grading recognises the "
            f"cells by their contents, and no points are lost. {RELOAD}.",
        )
    elif lost:
        state.say_of(
            "metadata lost",
            lost,
            "The metadata of {} is gone. Grading recognises the cell by its contents.",
            "The metadata of {} is gone. Grading recognises the cells by their contents.",
        )
    state.say_of(
        "renamed cell",
        renamed,
        "{} has a different grade_id than in the released notebook. Grading recognises it by its contents.",
        "{} have different grade_ids than in the released notebook. Grading recognises them by their contents.",
    )
    state.say_of(
        "changed metadata",
        changed,
        "The metadata of {}, such as its points, was changed. Grading uses that of the released notebook.",
        "The metadata of {}, such as their points, was changed. Grading uses that of the released notebook.",
    )
    state.say_of(
        "changed type",
        retyped,
        "The type of {} (code or text) was changed. Grading changes it back; do the same before you hand in.",
        "The type of {} (code or text) was changed. Grading changes it back; do the same before you hand in.",
    )
    for place, cells in present:
        for cell in cells:
            cell.kind = place.kind


def _same_flags(place: ReleasedCell, cell: Cell) -> bool:
    said, wanted = cell.metadata.get("nbgrader"), place.metadata["nbgrader"]
    return isinstance(said, dict) and all(said.get(flag) == wanted.get(flag) for flag in FLAGS)


def report_kernel(state: RepairState, submitted: Any, released: Any) -> None:
    languages = []
    for notebook in (submitted, released):
        spec, info = notebook.metadata.get("kernelspec"), notebook.metadata.get("language_info")
        found = [part.get(key) for part, key in ((spec, "language"), (info, "name")) if isinstance(part, dict)]
        languages.append(next((str(name).lower() for name in found if name), "python"))
    if languages[0] != languages[1]:
        state.say(
            "changed kernel",
            "repaired",
            None,
            f"The language of the notebook is set to {languages[0][:30]}. Grading runs it with {upper(languages[1])}, "
            'as released. Choose the kernel "Python 3" before you hand in.',
        )


# --- Duplicated and split cells --------------------------------------------------------------------------


def keep_one_of_each(state: RepairState) -> None:
    """Of several cells that match the same cell of the release, keep the one that counts."""
    for place in state.release.places:
        cells = state.at(place)
        if place.role == "check" and cells:
            _keep_one_check(state, place, cells)
        elif place.role == "answer" and len(cells) > 1:
            _keep_whole_answer(state, place, cells)
        elif place.role == "solution" and len(cells) > 1:
            _keep_one_solution(state, place, cells)


def _keep_one_check(state: RepairState, place: ReleasedCell, cells: list[Cell]) -> None:
    """Keep the released test once; whatever the learner defined in it becomes a separate cell above it."""
    edited = [cell for cell in cells if not same_code(cell.source, place.source)]
    kept = next((cell for cell in cells if cell not in edited), cells[0])
    for cell in cells:
        own = [Cell("code", cell.source)] if cell in edited and binds(cell.source) else []
        state.replace(cell, *own, *([cell] if cell is kept else []))
    kept.source = place.source
    if edited:
        state.say(
            "edited test",
            "repaired",
            place,
            f"{upper(named(place))} was edited. Grading uses the released version. Write your own code in other cells.",
        )
    elif len(cells) > 1:
        state.say(
            "duplicated cell", "repaired", place, f"{upper(named(place))} appears {len(cells)} times. It counts once."
        )


def _keep_whole_answer(state: RepairState, place: ReleasedCell, cells: list[Cell]) -> None:
    texts = list(dict.fromkeys(cell.source.strip() for cell in cells if not _unanswered(place, cell.source)))
    kept = next((cell for cell in cells if not _unanswered(place, cell.source)), cells[0])
    for cell in cells:
        kept.attachments = kept.attachments or cell.attachments
        if cell is not kept:
            state.cells.remove(cell)
    if len(texts) > 1:
        kept.source = "\n\n".join(texts)
    joined = "Grading joins their texts" if len(texts) > 1 else "The one that contains text counts"
    state.say(
        "duplicated cell",
        "repaired",
        place,
        f"{upper(named(place))} appears {len(cells)} times. {joined}. Delete all but one before you hand in.",
    )


def _keep_one_solution(state: RepairState, place: ReleasedCell, cells: list[Cell]) -> None:
    written = [cell for cell in cells if not state.release.is_stub(place, cell.source)]
    if _put_together(state, place, cells, written):
        return
    answers = [cell for cell in written if state.release.kind_of(place.name, cell.source) in ("real", "library")]
    last = (answers or written or cells)[-1]
    alike = [cell for cell in cells if same_code(cell.source, last.source)]
    kept = next((cell for cell in alike if cell.cell_id == place.cell_id), last)
    others = []
    for cell in cells:
        if cell in answers and cell is not kept:
            text, rest = _without_others(state, place, cell)
            state.replace(cell, *([Cell("code", rest)] if rest else []))
            others += [] if same_code(text, kept.source) else [Cell("raw", text)]
        elif cell not in written and cell is not kept:
            state.cells.remove(cell)
        elif cell is not kept:
            cell.place = None  # it defines something else, which may be needed
    state.replace(kept, kept, *others)
    differ = bool(others)
    which = "the last one counts, and the others are not run" if differ else "the one with your code counts"
    if not written:
        which = "none of them contains code of yours"
    how = ", with different code" if differ else ""
    state.say(
        "duplicated cell",
        "repaired",
        place,
        f"{upper(named(place))} appears {len(cells)} times{how}: {which}. Delete all but one before you hand in.",
    )


def _without_others(state: RepairState, place: ReleasedCell, cell: Cell) -> tuple[str, str]:
    """The part of a cell that answers this exercise, and the rest if that answers another one (else "")."""
    text, rest = cut(cell.source, place.name) or (cell.source, "")
    others = {other.name for other in state.release.solutions if other is not place}
    return (text, rest) if others & binds(rest).keys() else (cell.source, "")


def _put_together(state: RepairState, place: ReleasedCell, cells: list[Cell], written: list[Cell]) -> bool:
    """Join the cells if they are the parts of one cell that was split; returns whether they were."""
    joined = "\n".join(cell.source for cell in written)
    broken = [cell for cell in written if not is_python(cell.source)]
    if len(written) < 2 or not broken or state.release.kind_of(place.name, joined) != "real" or not is_python(joined):
        return False
    written[0].source = joined
    for cell in cells:
        if cell is not written[0]:
            state.cells.remove(cell)
    state.say(
        "split cell",
        "repaired",
        place,
        f"{upper(named(place))} was split in two. Grading joins the parts; do the same before you hand in.",
    )
    return True


# --- Open questions ---------------------------------------------------------------------------------------


def _unanswered(place: ReleasedCell, text: str) -> bool:
    return text.strip() in ("", place.source.strip())


def complete_answers(state: RepairState) -> None:
    """Move an answer written next to its cell, or in the question's cell, into its cell."""
    for place in state.release.answers:
        cells = state.at(place)
        if cells and not _unanswered(place, cells[0].source):
            continue
        beside = _beside(state, place, cells)
        added = "" if beside else _added_to_question(state, place)
        if not beside and not added:
            continue
        if not cells:
            cells = [Cell(place.kind, place.source, place=place)]
            state.replace(beside[0], *cells, beside[0]) if beside else state.cells.append(cells[0])
        cells[0].source = added or "\n\n".join(cell.source.strip() for cell in beside)
        cells[0].attachments = next((cell.attachments for cell in beside if cell.attachments), cells[0].attachments)
        for cell in beside:
            state.cells.remove(cell)
        where = "in the cell of the question" if added else "in a different cell"
        state.say(
            "moved answer",
            "repaired",
            place,
            f"{upper(named(place))} is {where}. Grading moves it into its own cell; do the same before you hand in.",
        )


def _beside(state: RepairState, place: ReleasedCell, cells: list[Cell]) -> list[Cell]:
    """The learner's own text cells around the answer's cell and after the question, in order."""
    found: list[Cell] = []
    for number, cell in enumerate(state.cells):
        if cell in cells:
            found += [*_run(reversed(state.cells[:number])), *_run(state.cells[number + 1 :])]
        elif cell.place is not None and cell.place.index == place.index - 1:
            found += _run(state.cells[number + 1 :])
    return [cell for cell in state.cells if cell in found and not _unanswered(place, cell.source)]


def _run(cells: Iterable[Cell]) -> list[Cell]:
    """The leading cells that are the learner's own text cells."""
    return list(itertools.takewhile(lambda cell: cell.place is None and cell.kind != "code", cells))


def _added_to_question(state: RepairState, place: ReleasedCell) -> str:
    """The text that a learner added to the question's cell, which is then restored."""
    question = next((c for c in state.cells if c.place and c.place.index == place.index - 1 and c.kind != "code"), None)
    if question is None or question.place is None or question.place.role or not question.changed:
        return ""
    old, new = question.place.source.split("\n"), question.source.split("\n")
    added = [line[2:] for line in difflib.ndiff(old[:500], new[:500]) if line.startswith("+ ")]
    text = "\n".join(added).strip()
    if text:
        question.source = question.place.source
    return text


# --- Code and prose in one cell ---------------------------------------------------------------------------


def take_prose_out_of_code(state: RepairState) -> None:
    """Restore code cells that were merged with a text cell of the release, by removing that text."""
    texts = [place.source.strip() for place in state.release.places if place.kind == "markdown"]
    for cell in state.cells:
        if is_python(cell.source) and cell.kind == "code":
            continue
        code = cell.source
        for text in texts:
            code = code.replace(text, "")
        defined = {place.name for place in state.release.solutions} & binds(code).keys()
        if code == cell.source or not defined or not is_python(code):
            continue
        prose = [place.cell_id for place in state.release.places if place.kind == "markdown"]
        cell.kind, cell.source = "code", code.strip("\n")
        cell.cell_id = "" if cell.cell_id in prose else cell.cell_id
        state.say(
            "merged cell",
            "repaired",
            None,
            f"The code of `{min(defined)}` is in one cell with text. Grading separates them; split the cell before you "
            "hand in.",
        )
