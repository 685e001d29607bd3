"""Tables of a learner's progress, by unit and by idea."""

from __future__ import annotations

from collections.abc import Sequence

from lora_from_scratch.checks import progress_file
from lora_from_scratch.checks.display import table
from lora_from_scratch.checks.exercise import Exercise, Prediction
from lora_from_scratch.checks.progress_file import Entry, Progress
from lora_from_scratch.checks.units import Unit, units
from lora_from_scratch.support import learner_folder
from lora_from_scratch.support.translation import translate

Table = tuple[str, str]  # the table as HTML and as text
OPEN_QUESTIONS = "Open questions are not counted here: a person grades them."
SUMMARY = ("", "passed", "points", "attempts", "hints")


def report(unit: str | int | None = None) -> tuple[list[Table], list[str]]:
    """The tables, and the notes to show below them.

    Args:
        unit: the number of a unit, to list each of its exercises; None gives all units and all ideas begun so far.

    Raises:
        ValueError: there is no such unit.
    """
    chosen = None if unit is None else _find(unit)
    progress = progress_file.load()
    notes = [*progress.notes, OPEN_QUESTIONS, _place(progress)]
    if chosen is not None:
        return [_exercises(chosen, progress)], notes
    everything = [item for each in units() for item in each.checked]
    rows = [_row(f"{each.number} {translate(each.title)}", each.checked, progress) for each in units()]
    tables = [table(("unit", *SUMMARY[1:]), [*rows, _row(translate("all"), everything, progress)], "Your progress")]
    ideas: dict[str, list[Exercise | Prediction]] = {}
    for item in everything:
        ideas.setdefault(item.idea, []).append(item)
    begun = [_row(translate(idea), items, progress) for idea, items in ideas.items() if _begun(items, progress)]
    if begun:
        tables.append(table(("idea", *SUMMARY[1:]), begun, "By idea, those that you have begun"))
    return tables, notes


def _find(unit: str | int) -> Unit:
    number = str(unit).lower().removeprefix("unit").strip("_ ").zfill(2)
    for each in units():
        if each.number == number:
            return each
    raise ValueError(f"there is no unit {unit!r}; the units are {', '.join(each.number for each in units())}")


def _row(name: str, items: Sequence[Exercise | Prediction], progress: Progress) -> list[str]:
    entries = [progress.entries.get(item.name, Entry()) for item in items]
    passed = sum(entry.passed is not None for entry in entries)
    symbol = "✓" if items and passed == len(items) else "◐" if _begun(items, progress) else "○"
    points = sum(min(entry.points, item.points) for entry, item in zip(entries, items, strict=True))
    return [
        f"{symbol} {name}",
        f"{passed} of {len(items)}",
        f"{points:g} of {sum(item.points for item in items)}",
        str(sum(entry.attempts for entry in entries)),
        str(sum(entry.hints for entry in entries)),
    ]


def _exercises(unit: Unit, progress: Progress) -> Table:
    rows = []
    for item in unit.checked:
        entry = progress.entries.get(item.name, Entry())
        symbol, state = ("◐", "begun") if entry.attempts else ("○", "not begun")
        if entry.passed:
            symbol, state = "✓", f"passed on {entry.passed[:10]}"
        state = translate(state) + (translate(", took the library's") if entry.library else "")
        points = f"{min(entry.points, item.points):g} of {item.points}"
        rows.append(
            [f"{symbol} {item.name}", translate(item.idea), state, points, str(entry.attempts), str(entry.hints)]
        )
    headings = ("exercise", "idea", "state", *SUMMARY[2:])
    return table(headings, rows, f"Your progress in unit {unit.number}, {unit.title}")


def _begun(items: Sequence[Exercise | Prediction], progress: Progress) -> bool:
    return any(progress.entries[item.name].attempts for item in items if item.name in progress.entries)


def _place(progress: Progress) -> str:
    if progress.kept:
        return f"Kept in {progress_file.path()}."
    if learner_folder.switched_off():
        return f"Kept until this kernel ends ({learner_folder.SWITCH} is off)."
    return f"Kept only until this kernel ends: nothing is written to {progress_file.path()}."
